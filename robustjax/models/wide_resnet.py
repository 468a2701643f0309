"""WideResNet-d-k."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from robustjax.models.base import Model, from_linen
from robustjax.models.convolution import Convolution
from robustjax.models.resnet import PreActResNet


def wide_resnet(
    depth: int = 28,
    widen_factor: int = 10,
    num_classes: int = 10,
    *,
    base_width: int = 16,
    activation: str = "relu",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    batch_groups: int = 1,
    momentum: float = 0.9,
    tiny: float = 1e-5,
    remat: bool = False,
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
) -> Model:
    """WideResNet-d-k: three stages of (d - 4) / 6 pre-activation blocks.

    A stem of w channels (16), then `w k, 2 w k, 4 w k`; strides (1, 2, 2); no dropout.
    Convolutions are initialized by He's rule with fan-out.

    Args:
        depth: d, with d - 4 a multiple of 6: 28, 34, 70.
        widen_factor: k, the multiple of the base widths.
        num_classes: number of logits.
        base_width: w, the channels of the stem; 16 is the published net.
        activation: "relu", "silu" (as Gowal et al., arXiv:2010.03593) or "gelu".
        mean: of the inputs, per channel or one value.
        std: likewise.
        batch_groups: ghost BatchNorm groups; must divide the batch.
        momentum: weight of BatchNorm's old running statistics.
        tiny: BatchNorm's addition to the variance.
        remat: compute a block's activations again in the backward pass: less memory
            for one more forward pass.
        dtype: of the computation; weights, statistics and logits are float32.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]`; `extra = {"batch_stats": ...}`.

    Raises:
        ValueError: when depth - 4 is not a multiple of 6.

    Reference: Zagoruyko & Komodakis, arXiv:1605.07146.

    >>> import jax
    >>> model = wide_resnet(10, 1)
    >>> x = jnp.zeros((5, 16, 16, 3))
    >>> logits_of = lambda key: model.apply(*model.init(key, x), x)[0]
    >>> jax.eval_shape(logits_of, jax.random.key(0)).shape
    (5, 10)
    """
    count = blocks_per_stage(depth)
    width = base_width * widen_factor
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
            remat=remat,
        )
    )


def blocks_per_stage(depth: int) -> int:
    """(d - 4) / 6: the blocks in each stage of a WideResNet with d layers.

    Args:
        depth: d, with d - 4 a multiple of 6.

    Raises:
        ValueError: when it is not.

    >>> blocks_per_stage(28)
    4
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(
            f"depth={depth}: a WideResNet has 6 n + 4 layers, such as 16, 28, 34, 70."
        )
    return (depth - 4) // 6
