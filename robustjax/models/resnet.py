"""Pre-activation residual networks for 32 x 32 images."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from robustjax.models.base import Model, from_linen
from robustjax.models.convolution import Convolution
from robustjax.models.layers import BatchNorm, Conv, Dense, activate, normalize
from robustjax.types import Array

Shortcut = Literal["activated", "raw"]


class PreActBlock(nn.Module):
    """BN, activation, conv, BN, activation, conv.

    Where the shape changes the shortcut is a convolution of `shortcut_size`. It reads
    the input after BN and activation ("activated") or before ("raw"). `pads` are those
    (before, after) of a 3 x 3 convolution with stride 2.
    """

    features: int
    stride: int
    activation: str
    momentum: float
    tiny: float
    batch_groups: int
    dtype: Any
    convolution: Convolution
    shortcut: Shortcut = "activated"
    shortcut_size: int = 1
    pads: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def norm(name: str) -> BatchNorm:
            return BatchNorm(
                self.momentum, self.tiny, self.batch_groups, self.dtype, name=name
            )

        def conv(size: int, stride: int, name: str) -> Conv:
            uneven = size == 3 and stride == 2
            return Conv(
                self.features,
                size,
                stride,
                padding=(self.pads, self.pads) if uneven else size // 2,
                dtype=self.dtype,
                convolution=self.convolution,
                name=name,
            )

        out = activate(norm("bn1")(x, train=train), self.activation)
        if self.stride != 1 or x.shape[-1] != self.features:
            source = out if self.shortcut == "activated" else x
            x = conv(self.shortcut_size, self.stride, "shortcut")(source)
        out = conv(3, self.stride, "conv1")(out)
        out = activate(norm("bn2")(out, train=train), self.activation)
        return x + conv(3, 1, "conv2")(out)


class PreActResNet(nn.Module):
    """A stem, stages of blocks, BN and activation, global average, logits.

    Without `last_norm` the last BN and activation are left out. `border` is a frame of
    zeros around the image, before the normalization; the rest is `PreActBlock`'s.
    """

    features: tuple[int, ...]  # of the stem, then of each stage
    blocks: tuple[int, ...]
    num_classes: int
    activation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    momentum: float
    tiny: float
    batch_groups: int
    dtype: Any
    convolution: Convolution
    shortcut: Shortcut = "activated"
    shortcut_size: int = 1
    pads: tuple[int, int] = (1, 1)
    last_norm: bool = True
    border: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        if self.border:
            frame = (self.border, self.border)
            x = jnp.pad(x, ((0, 0), frame, frame, (0, 0)))
        x = normalize(x, self.mean, self.std)
        x = Conv(
            self.features[0],
            padding=1,
            dtype=self.dtype,
            convolution=self.convolution,
            name="stem",
        )(x)
        kind = PreActBlock
        if self.remat:
            kind = nn.remat(PreActBlock, static_argnums=(2,))  # `train` is no data
        for stage, (width, count) in enumerate(
            zip(self.features[1:], self.blocks, strict=True)
        ):
            for block in range(count):
                x = kind(
                    width,
                    2 if stage > 0 and block == 0 else 1,
                    self.activation,
                    self.momentum,
                    self.tiny,
                    self.batch_groups,
                    self.dtype,
                    self.convolution,
                    self.shortcut,
                    self.shortcut_size,
                    self.pads,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train)
        if self.last_norm:
            x = BatchNorm(
                self.momentum, self.tiny, self.batch_groups, self.dtype, name="bn"
            )(x, train=train)
            x = activate(x, self.activation)
        x = jnp.mean(x.astype(jnp.float32), (1, 2))
        return Dense(
            self.num_classes,
            kernel_init=nn.initializers.lecun_normal(),
            dtype=self.dtype,
            name="head",
        )(x).astype(jnp.float32)


def preact_resnet18(
    num_classes: int = 10,
    *,
    width: int = 64,
    activation: str = "relu",
    shortcut: Shortcut = "activated",
    last_norm: bool = True,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    batch_groups: int = 1,
    momentum: float = 0.9,
    tiny: float = 1e-5,
    remat: bool = False,
    dtype: Any = jnp.float32,
    convolution: Convolution = "auto",
) -> Model:
    """PreActResNet-18, the usual net of adversarial training on CIFAR-10.

    Four stages of two blocks, `width * (1, 2, 4, 8)` channels, strides (1, 2, 2, 2);
    a last BatchNorm and activation before the global average. Convolutions are
    initialized by He's rule with fan-out.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; 64 is the published net.
        activation: "relu", "silu" or "gelu".
        shortcut: what the shortcuts' 1 x 1 convolutions read: a block's input after its
            first BatchNorm and activation, or "raw" (as in the net of Wong et al.).
        last_norm: False: no BatchNorm and activation before the global average (as in
            the net of Wong et al.).
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
        ValueError: on another word for `shortcut`.

    Reference: He et al., arXiv:1603.05027; as used by Wong et al., arXiv:2001.03994,
    and Rice et al., arXiv:2002.11569.

    >>> import jax
    >>> model = preact_resnet18(width=2)
    >>> x = jnp.zeros((5, 16, 16, 3))
    >>> logits_of = lambda key: model.apply(*model.init(key, x), x)[0]
    >>> jax.eval_shape(logits_of, jax.random.key(0)).shape
    (5, 10)
    """
    if shortcut not in ("activated", "raw"):
        raise ValueError(f"shortcut={shortcut!r}: choose 'activated' or 'raw'.")
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
            shortcut,
            last_norm=last_norm,
            remat=remat,
        )
    )
