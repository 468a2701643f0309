"""Models: pairs of pure functions, adapters to libraries, and the zoo."""

from robustjax.models.base import Model as Model
from robustjax.models.base import from_linen as from_linen
from robustjax.models.base import from_nnx as from_nnx
from robustjax.models.base import logits_fn as logits_fn
from robustjax.models.cifar_resnet import resnet18 as resnet18
from robustjax.models.cifar_resnet import resnet50 as resnet50
from robustjax.models.compiling import convolution_options as convolution_options
from robustjax.models.compiling import tpu_options as tpu_options
from robustjax.models.convolution import conv2d as conv2d
from robustjax.models.deepmind import dm_preact_resnet18 as dm_preact_resnet18
from robustjax.models.deepmind import dm_wide_resnet as dm_wide_resnet
from robustjax.models.layers import average_pool as average_pool
from robustjax.models.layers import max_pool as max_pool
from robustjax.models.layers import normalize as normalize
from robustjax.models.lipschitz import lipschitz_net as lipschitz_net
from robustjax.models.madry_mnist import madry_mnist as madry_mnist
from robustjax.models.madry_mnist import small_cnn as small_cnn
from robustjax.models.mlp import mlp as mlp
from robustjax.models.remat import rematerialized as rematerialized
from robustjax.models.resnet import preact_resnet18 as preact_resnet18
from robustjax.models.vit import vit as vit
from robustjax.models.vit import vit_base as vit_base
from robustjax.models.vit import vit_small as vit_small
from robustjax.models.wide_resnet import wide_resnet as wide_resnet
