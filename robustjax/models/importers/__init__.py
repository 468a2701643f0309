"""Published checkpoints as models of ours."""

from robustjax.models.importers.layers import from_layers as from_layers
