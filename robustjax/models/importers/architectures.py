"""The architectures of published checkpoints: nets of the zoo, and PyTorch's names.

An `Architecture` is a value: a family, its sizes, its normalization. What the families
call their arrays is in `_NAMES`, one `_Names` for each.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustjax.models.base import Model
from robustjax.models.cifar_resnet import resnet18, resnet50
from robustjax.models.deepmind import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    dm_preact_resnet18,
    dm_wide_resnet,
)
from robustjax.models.resnet import preact_resnet18
from robustjax.models.wide_resnet import wide_resnet

ARCHITECTURES = (
    "preact_resnet18",
    "preact_resnet18_raw",
    "resnet18",
    "resnet50",
    "wide_resnet_D_K",
    "dm_preact_resnet18",
    "dm_wide_resnet_D_K",
)
"""Names for `architecture`; D is the depth (28, 34, 70), K the widening factor."""


class Architecture(NamedTuple):
    """Which net a checkpoint belongs to; made by `architecture` or `robustbench`."""

    family: str
    depth: int
    widen_factor: int
    width: int
    num_classes: int
    channels: int
    border: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Names(NamedTuple):
    """PyTorch's names: of a block (counted from 1, or from 0) and of what is in it."""

    block: str
    parts: dict[str, str]


_SAME = {name: name for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")}
_PREACT = _Names(
    "layer{stage}.{block0}.",
    {**_SAME, "shortcut": "shortcut.0", "stem": "conv1", "bn": "bn", "head": "linear"},
)
_NAMES = {
    "preact_resnet18": _PREACT,
    "preact_resnet18_raw": _PREACT,
    "resnet18": _Names(
        "layer{stage}.{block0}.",
        {
            **_SAME,
            "shortcut": "shortcut.0",
            "shortcut_bn": "shortcut.1",
            "stem": "conv1",
            "stem_bn": "bn1",
            "head": "linear",
        },
    ),
    "wide_resnet": _Names(
        "block{stage}.layer.{block0}.",
        {**_SAME, "shortcut": "convShortcut", "stem": "conv1", "bn": "bn1"}
        | {"head": "fc"},
    ),
    "dm_wide_resnet": _Names(
        "layer.{stage0}.block.{block0}.",
        {
            "bn1": "batchnorm_0",
            "conv1": "conv_0",
            "bn2": "batchnorm_1",
            "conv2": "conv_1",
            "shortcut": "shortcut",
            "stem": "init_conv",
            "bn": "batchnorm",
            "head": "logits",
        },
    ),
    "dm_preact_resnet18": _Names(
        "layer_{stage0}.{block0}.",
        {
            "bn1": "batchnorm_0",
            "conv1": "conv_2d_1",
            "bn2": "batchnorm_1",
            "conv2": "conv_2d_2",
            "shortcut": "shortcut",
            "stem": "conv_2d",
            "bn": "batchnorm",
            "head": "logits",
        },
    ),
}
_NAMES["resnet50"] = _NAMES["resnet18"]
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def architecture(
    name: str,
    num_classes: int = 10,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    width: int | None = None,
    channels: int = 3,
    border: int = 0,
) -> Architecture:
    """The net of a checkpoint, by the name of its architecture.

    - "preact_resnet18": shortcuts read the activated input; BatchNorm at the end.
    - "preact_resnet18_raw": shortcuts read the raw input; no BatchNorm at the end.
    - "resnet18", "resnet50": BatchNorm after each convolution, 3 x 3 stem.
    - "wide_resnet_28_10" and any other depth and factor; `sub_block1` is not used.
    - "dm_wide_resnet_28_10", "dm_preact_resnet18": DeepMind's, with SiLU.

    Args:
        name: one of these.
        num_classes: number of logits.
        mean: of the inputs in [0, 1], per channel; None: what the checkpoint itself
            holds, else CIFAR-10's for DeepMind's nets, 0 for the others.
        std: likewise; else 1.
        width: channels of the first stage, of the stem for WideResNets; None: the
            published 64 and 16.
        channels: of the images.
        border: zeros around the image (DeepMind's `padding`).

    Raises:
        ValueError: on an unknown name, or one of mean and std without the other.

    >>> architecture("wide_resnet_34_20").widen_factor
    20
    """
    sizes = re.fullmatch(r"((?:dm_)?wide_resnet)_(\d+)_(\d+)", name)
    family = sizes[1] if sizes else name
    if family not in _NAMES or ("wide" in family and not sizes):
        raise ValueError(
            f"architecture {name!r} is unknown; known are {', '.join(ARCHITECTURES)}, "
            "such as wide_resnet_28_10; `robustbench` takes RobustBench's ids."
        )
    if (mean is None) != (std is None):
        raise ValueError("mean and std: give both or none.")
    if border and not family.startswith("dm_"):
        raise ValueError(f"border={border}: only DeepMind's nets have one.")
    depth, widen_factor = (int(sizes[2]), int(sizes[3])) if sizes else (0, 0)
    return Architecture(
        family,
        depth,
        widen_factor,
        width if width is not None else 16 if sizes else 64,
        num_classes,
        channels,
        border,
        tuple(mean or ()),
        tuple(std or ()),
    )


def build(architecture: Architecture) -> Model:
    """The zoo's net of an architecture.

    Args:
        architecture: of `architecture` or `robustbench`.

    Returns:
        A model on `[B, H, W, C]` in [0, 1].

    >>> model = build(architecture("resnet18", width=2))
    """
    family, depth, widen_factor, width, num_classes, _, border, mean, std = architecture
    if not mean:
        is_dm = family.startswith("dm_") and architecture.channels == 3
        mean, std = (CIFAR10_MEAN, CIFAR10_STD) if is_dm else ((0.0,), (1.0,))
    if family == "wide_resnet":
        return wide_resnet(
            depth, widen_factor, num_classes, base_width=width, mean=mean, std=std
        )
    if family == "dm_wide_resnet":
        return dm_wide_resnet(
            depth,
            widen_factor,
            num_classes,
            base_width=width,
            border=border,
            mean=mean,
            std=std,
        )
    if family == "dm_preact_resnet18":
        return dm_preact_resnet18(
            num_classes, width=width, border=border, mean=mean, std=std
        )
    if family == "preact_resnet18_raw":
        return preact_resnet18(
            num_classes,
            width=width,
            shortcut="raw",
            last_norm=False,
            mean=mean,
            std=std,
        )
    make = {
        "preact_resnet18": preact_resnet18,
        "resnet18": resnet18,
        "resnet50": resnet50,
    }[family]
    return make(num_classes, width=width, mean=mean, std=std)


class Leaf(NamedTuple):
    """One array: where it is in our params or extra, and its shape in PyTorch."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


def leaves(architecture: Architecture) -> dict[str, Leaf]:
    """PyTorch's name of every array of the net -> its path with us and its shape there.

    The path begins with "params" or "batch_stats"; convolutions are OIHW in PyTorch
    and dense layers [out, in].

    Args:
        architecture: of `architecture` or `robustbench`.

    >>> leaves(architecture("resnet18"))["linear.weight"].shape
    (10, 512)
    """
    x = jax.ShapeDtypeStruct((1, 32, 32, architecture.channels), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, extra = jax.eval_shape(build(architecture).init, key, x)
    found = {}
    tree = {"params": params, **extra}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(key.key for key in keys)
        shape = leaf.shape
        if len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        name = _torch_name(_NAMES[architecture.family], path[1:])
        found[name] = Leaf(path, shape[::-1] if len(shape) == 2 else shape)
    return found


def _torch_name(names: _Names, path: tuple[str, ...]) -> str:
    """("stage1_block2", "conv1", "kernel") -> "layer1.1.conv1.weight"."""
    prefix = ""
    place = re.fullmatch(r"stage(\d+)_block(\d+)", path[0])
    if place:
        stage, block = int(place[1]), int(place[2])
        prefix = names.block.format(stage=stage, stage0=stage - 1, block0=block - 1)
    return f"{prefix}{names.parts[path[-2]]}.{_LEAVES[path[-1]]}"
