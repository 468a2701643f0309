"""The residual networks of DeepMind's adversarial training: SiLU, padding as in JAX."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from robustjax.models.base import Model, from_linen
from robustjax.models.convolution import Convolution
from robustjax.models.resnet import PreActResNet
from robustjax.models.wide_resnet import blocks_per_stage

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
# Strided convolutions pad as "SAME" does for an even number of pixels: nothing before,
# one row and column after.
PADS = (0, 1)


def dm_wide_resnet(
    depth: int = 28,
    widen_factor: int = 10,
    num_classes: int = 10,
    *,
    base_width: int = 16,
    activation: str = "silu",
    border: int = 0,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    batch_groups: int = 1,
    momentum: float = 0.9,
    tiny: float = 1e-5,
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
) -> Model:
    """WideResNet-d-k as DeepMind published it: SiLU, and another padding.

    `wide_resnet`, but a 3 x 3 convolution with stride 2 is padded by one row below and
    one column to the right only, as "SAME" does for an even number of pixels.

    Args:
        depth: d, with d - 4 a multiple of 6: 28, 34, 70, 106.
        widen_factor: k, the multiple of the base widths.
        num_classes: number of logits.
        base_width: channels of the stem; 16 is the published net.
        activation: "silu", "relu" or "gelu".
        border: zeros around the image on each side, before the normalization (2 brings
            MNIST's 28 pixels to 32).
        mean: of the inputs, per channel or one value; CIFAR-10's by default.
        std: likewise.
        batch_groups: ghost BatchNorm groups; must divide the batch.
        momentum: weight of BatchNorm's old running statistics.
        tiny: BatchNorm's addition to the variance.
        dtype: of the computation; weights, statistics and logits are float32.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]`; `extra = {"batch_stats": ...}`.

    Raises:
        ValueError: when depth - 4 is not a multiple of 6.

    Reference: Gowal et al., arXiv:2010.03593; Rebuffi et al., arXiv:2103.01946.
    Differs from the authors' code: the average before the logits is over all pixels,
    theirs over 8 x 8 (the same for 32 x 32 images).

    >>> import jax
    >>> key, x = jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    >>> params, extra = jax.eval_shape(dm_wide_resnet().init, key, x)
    >>> params["head"]["kernel"].shape
    (640, 10)
    """
    count, width = blocks_per_stage(depth), base_width * widen_factor
    return from_linen(
        PreActResNet(
            (base_width, width, 2 * width, 4 * width),
            (count, count, count),
            num_classes,
            activation,
            tuple(mean),
            tuple(std),
            momentum,
            tiny,
            batch_groups,
            dtype,
            convolution,
            pads=PADS,
            border=border,
        )
    )


def dm_preact_resnet18(
    num_classes: int = 10,
    *,
    width: int = 64,
    activation: str = "silu",
    border: int = 0,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    batch_groups: int = 1,
    momentum: float = 0.9,
    tiny: float = 1e-5,
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
) -> Model:
    """PreActResNet-18 as DeepMind published it: SiLU, 3 x 3 shortcuts, other padding.

    `preact_resnet18`, but where the shape changes the shortcut is a 3 x 3 convolution
    of the block's raw input, and 3 x 3 convolutions with stride 2 are padded by one row
    below and one column to the right only.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; 64 is the published net.
        activation: "silu", "relu" or "gelu".
        border: zeros around the image on each side, before the normalization.
        mean: of the inputs, per channel or one value; CIFAR-10's by default.
        std: likewise.
        batch_groups: ghost BatchNorm groups; must divide the batch.
        momentum: weight of BatchNorm's old running statistics.
        tiny: BatchNorm's addition to the variance.
        dtype: of the computation; weights, statistics and logits are float32.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]`; `extra = {"batch_stats": ...}`.

    Reference: Rebuffi et al., arXiv:2103.01946; Rade & Moosavi-Dezfooli, ICLR 2022.
    Differs from the authors' code: the average before the logits is over all pixels,
    theirs over 4 x 4 (the same for 32 x 32 images).

    >>> import jax
    >>> key, x = jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    >>> params, extra = jax.eval_shape(dm_preact_resnet18().init, key, x)
    >>> params["head"]["kernel"].shape
    (512, 10)
    """
    return from_linen(
        PreActResNet(
            (width, width, 2 * width, 4 * width, 8 * width),
            (2, 2, 2, 2),
            num_classes,
            activation,
            tuple(mean),
            tuple(std),
            momentum,
            tiny,
            batch_groups,
            dtype,
            convolution,
            shortcut="raw",
            shortcut_size=3,
            pads=PADS,
            border=border,
        )
    )
