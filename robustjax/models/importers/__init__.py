"""Published checkpoints as models of ours."""

from robustjax.models.importers.architectures import Architecture as Architecture
from robustjax.models.importers.architectures import architecture as architecture
from robustjax.models.importers.architectures import build as build
from robustjax.models.importers.checkpoint import read_weights as read_weights
from robustjax.models.importers.layers import from_layers as from_layers
from robustjax.models.importers.robustbench import robustbench as robustbench
from robustjax.models.importers.robustbench import (
    robustbench_entry as robustbench_entry,
)
from robustjax.models.importers.state_dict import from_net_folder as from_net_folder
from robustjax.models.importers.state_dict import from_state_dict as from_state_dict
from robustjax.models.importers.state_dict import load as load
