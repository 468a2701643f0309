"""Residual networks with BatchNorm after each convolution; the CIFAR forms."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from robustjax.models.base import Model, from_linen
from robustjax.models.convolution import Convolution
from robustjax.models.layers import BatchNorm, Conv, Dense, normalize
from robustjax.types import Array

Stem = Literal["cifar", "imagenet"]
EXPANSION = 4  # a bottleneck's output channels, in multiples of its inner ones


class Block(nn.Module):
    """Two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3, 1 x 1; each followed by
    BN; ReLU between them and after the sum. Where the shape changes the shortcut is a
    1 x 1 convolution with BN."""

    features: int
    stride: int
    bottleneck: bool
    momentum: float
    tiny: float
    batch_groups: int
    dtype: Any
    convolution: Convolution

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        def unit(x: Array, features: int, size: int, stride: int, names: str) -> Array:
            conv, norm = names.split()
            x = Conv(
                features,
                size,
                stride,
                padding=size // 2,
                dtype=self.dtype,
                convolution=self.convolution,
                name=conv,
            )(x)
            return BatchNorm(
                self.momentum, self.tiny, self.batch_groups, self.dtype, name=norm
            )(x, train=train)

        if self.bottleneck:
            width = EXPANSION * self.features
            out = jax.nn.relu(unit(x, self.features, 1, 1, "conv1 bn1"))
            out = jax.nn.relu(unit(out, self.features, 3, self.stride, "conv2 bn2"))
            out = unit(out, width, 1, 1, "conv3 bn3")
        else:
            width = self.features
            out = jax.nn.relu(unit(x, width, 3, self.stride, "conv1 bn1"))
            out = unit(out, width, 3, 1, "conv2 bn2")
        if self.stride != 1 or x.shape[-1] != width:
            x = unit(x, width, 1, self.stride, "shortcut shortcut_bn")
        return jax.nn.relu(out + x)


class ResNet(nn.Module):
    """A stem with BN and ReLU, stages of blocks, global average, logits.

    `stem`: "cifar", a 3 x 3 convolution; "imagenet", a 7 x 7 one with stride 2 and the
    maximum over 3 x 3 with stride 2.
    """

    width: int
    blocks: tuple[int, ...]
    bottleneck: bool
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    momentum: float
    tiny: float
    batch_groups: int
    dtype: Any
    convolution: Convolution
    stem: Stem = "cifar"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = normalize(x, self.mean, self.std)
        large = self.stem == "imagenet"
        x = Conv(
            self.width,
            *((7, 2) if large else (3, 1)),
            padding=3 if large else 1,
            dtype=self.dtype,
            convolution=self.convolution,
            name="stem",
        )(x)
        x = BatchNorm(
            self.momentum, self.tiny, self.batch_groups, self.dtype, name="stem_bn"
        )(x, train=train)
        x = jax.nn.relu(x)
        if large:
            # After ReLU a frame of zeros is as good as one of minus infinities.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nn.max_pool(x, (3, 3), (2, 2))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = Block(
                    self.width * 2**stage,
                    2 if stage > 0 and block == 0 else 1,
                    self.bottleneck,
                    self.momentum,
                    self.tiny,
                    self.batch_groups,
                    self.dtype,
                    self.convolution,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train)
        x = jnp.mean(x.astype(jnp.float32), (1, 2))
        return Dense(
            self.num_classes,
            kernel_init=nn.initializers.lecun_normal(),
            dtype=self.dtype,
            name="head",
        )(x).astype(jnp.float32)


def resnet18(
    num_classes: int = 10,
    *,
    width: int = 64,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    batch_groups: int = 1,
    momentum: float = 0.9,
    tiny: float = 1e-5,
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
) -> Model:
    """ResNet-18 for CIFAR: a 3 x 3 stem without pooling, four stages of two blocks.

    `width * (1, 2, 4, 8)` channels, strides (1, 2, 2, 2); each block is two 3 x 3
    convolutions with BatchNorm, and ReLU after the sum. Convolutions are initialized by
    He's rule with fan-out.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; 64 is the published net.
        mean: of the inputs, per channel or one value.
        std: likewise.
        batch_groups: ghost BatchNorm groups; must divide the batch.
        momentum: weight of BatchNorm's old running statistics.
        tiny: BatchNorm's addition to the variance.
        dtype: of the computation; weights, statistics and logits are float32.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]`; `extra = {"batch_stats": ...}`.

    Reference: He et al., arXiv:1512.03385; as used by Sehwag et al., arXiv:2104.09425.

    >>> key, x = jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    >>> params, extra = jax.eval_shape(resnet18().init, key, x)
    >>> params["head"]["kernel"].shape
    (512, 10)
    """
    return from_linen(
        ResNet(
            width,
            (2, 2, 2, 2),
            False,
            num_classes,
            tuple(mean),
            tuple(std),
            momentum,
            tiny,
            batch_groups,
            dtype,
            convolution,
        )
    )


def resnet50(
    num_classes: int = 10,
    *,
    width: int = 64,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    batch_groups: int = 1,
    momentum: float = 0.9,
    tiny: float = 1e-5,
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
    stem: Stem = "cifar",
) -> Model:
    """ResNet-50, (3, 4, 6, 3) bottlenecks; for CIFAR a 3 x 3 stem without pooling.

    A bottleneck has `width * (1, 2, 4, 8)` inner channels and four times as many at its
    output; its 3 x 3 convolution carries the stride (1, 2, 2, 2). Convolutions are
    initialized by He's rule with fan-out.

    Args:
        num_classes: number of logits.
        width: inner channels of the first stage; 64 is the published net.
        mean: of the inputs, per channel or one value.
        std: likewise.
        batch_groups: ghost BatchNorm groups; must divide the batch.
        momentum: weight of BatchNorm's old running statistics.
        tiny: BatchNorm's addition to the variance.
        dtype: of the computation; weights, statistics and logits are float32.
        convolution: "auto", "plain" (needed for forward mode) or "canonical".
        stem: "imagenet": a 7 x 7 convolution with stride 2 and the maximum over 3 x 3
            with stride 2, as in the paper.

    Returns:
        A model on `[B, H, W, C]`; `extra = {"batch_stats": ...}`.

    Raises:
        ValueError: on another word for `stem`.

    Reference: He et al., arXiv:1512.03385; as used by Engstrom et al. (the
    `robustness` library, 2019) and Augustin et al., arXiv:2003.09461.

    >>> key, x = jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    >>> params, extra = jax.eval_shape(resnet50().init, key, x)
    >>> params["head"]["kernel"].shape
    (2048, 10)
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem={stem!r}: choose 'cifar' or 'imagenet'.")
    return from_linen(
        ResNet(
            width,
            (3, 4, 6, 3),
            True,
            num_classes,
            tuple(mean),
            tuple(std),
            momentum,
            tiny,
            batch_groups,
            dtype,
            convolution,
            stem,
        )
    )
