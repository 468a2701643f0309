"""Logits of imported nets against PyTorch's own.

The golden files are made by scripts/make_golden_importers.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.models.base import logits_fn
from robustjax.models.importers import (
    architecture,
    build,
    from_state_dict,
    robustbench,
    robustbench_entry,
)
from robustjax.models.importers.architectures import ARCHITECTURES, leaves

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "importers"
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}

# name in the file -> architecture, its arguments
NETS = {
    "preact_resnet18": ("preact_resnet18", {"width": 1}),
    "preact_resnet18_raw": ("preact_resnet18_raw", {"width": 2}),
    "resnet18": ("resnet18", {"width": 2}),
    "resnet50": ("resnet50", {"width": 1, **CIFAR}),
    "wide_resnet_16_2": ("wide_resnet_16_2", {"width": 2}),
    "wide_resnet_16_2_sub_block1": ("wide_resnet_16_2", {"width": 2}),
    "dm_preact_resnet18": ("dm_preact_resnet18", {"width": 1}),
    "dm_wide_resnet_16_2": ("dm_wide_resnet_16_2", {"width": 2}),
    "dm_wide_resnet_10_1_grey": (
        "dm_wide_resnet_10_1",
        {"width": 2, "channels": 1, "border": 2, "mean": (0.5,), "std": (0.25,)},
    ),
}


def golden(name):
    with np.load(GOLDEN / "golden.npz") as file:
        names, flat = file[f"{name}/names"], file[f"{name}/values"]
        shapes = json.loads(str(file[f"{name}/shapes"]))
        x, logits = file[f"{name}/x"], file[f"{name}/logits"]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(flat, ends[:-1])
    arrays = {
        str(key): part.reshape(shape)
        for key, part, shape in zip(names, parts, shapes, strict=True)
    }
    return arrays, jnp.asarray(x, jnp.float32) / 255, logits


def relative(logits, expected):
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NETS)
def test_logits_are_those_of_pytorch(name):
    arrays, x, expected = golden(name)
    family, sizes = NETS[name]
    net = architecture(family, 5, **sizes)
    model, params, extra = from_state_dict(net, arrays)
    f = logits_fn(model, params, extra)
    logits = jax.jit(lambda f, x: f(x))(f, x)
    assert np.abs(expected[0] - expected[1]).max() > 0.01 * np.abs(expected).max()
    assert relative(logits, expected) < 1e-4


def test_the_golden_files_cover_every_architecture():
    families = {family.replace("16_2", "D_K") for family, _ in NETS.values()}
    assert set(ARCHITECTURES) <= families


def test_neighbors_have_other_logits():
    """What tells the forms apart is seen by the golden files."""
    arrays, x, expected = golden("dm_wide_resnet_16_2")
    swap = {"init_conv": "conv1", "logits": "fc", "batchnorm.": "bn1."}
    wide = {}
    for name, array in arrays.items():
        for ours, theirs in swap.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        if name.startswith("layer."):
            _, stage, _, block, part, leaf = name.split(".")
            part = {"shortcut": "convShortcut"}.get(
                part, part.replace("batchnorm_", "bn").replace("conv_", "conv")
            )
            if part[-1] in "01":
                part = part[:-1] + str(int(part[-1]) + 1)
            name = f"block{int(stage) + 1}.layer.{block}.{part}.{leaf}"
        wide[name] = array
    net = architecture("wide_resnet_16_2", 5, width=2, **CIFAR)
    model, params, extra = from_state_dict(net, wide)
    # ReLU for SiLU, and the padding on both sides.
    assert relative(model.apply(params, extra, x)[0], expected) > 1e-2


def test_published_sizes():
    # Counted by PyTorch in the published code.
    for name, count in (
        ("preact_resnet18_raw", 11_171_146),
        ("resnet18", 11_173_962),
        ("resnet50", 23_520_842),
        ("wide_resnet_28_10", 36_479_194),
        ("dm_wide_resnet_28_10", 36_479_194),
    ):
        found = leaves(architecture(name)).values()
        sizes = [np.prod(leaf.shape) for leaf in found if leaf.path[0] == "params"]
        assert sum(sizes) == count, name


def test_robustbench_ids():
    rice = robustbench("Rice2020Overfitting")
    assert (rice.family, rice.depth, rice.widen_factor) == ("wide_resnet", 34, 20)
    assert robustbench("Rice2020Overfitting", threat="L2").family == "preact_resnet18"
    assert robustbench("Wang2023Better_WRN-70-16", "cifar100").num_classes == 100
    assert robustbench("Carmon2019Unlabeled").mean == (0.0,)  # takes [0, 1] as it is
    assert robustbench("Modas2021PRIMEResNet18", threat="corruptions").mean == ()
    assert robustbench_entry("Kireev2021Effectiveness_RLAT") == "last"
    assert robustbench_entry("Wong2020Fast") is None
    with pytest.raises(ValueError, match="Carmon2019Unlabeled"):
        robustbench("Chen2020Adversarial")
    with pytest.raises(ValueError, match="'imagenet'"):
        robustbench("Standard", "imagenet")


def test_bad_architectures_say_what_is_known():
    with pytest.raises(ValueError, match="'resnet19' is unknown; known are preact"):
        architecture("resnet19")
    with pytest.raises(ValueError, match="'wide_resnet' is unknown"):
        architecture("wide_resnet")
    with pytest.raises(ValueError, match="give both or none"):
        architecture("resnet18", mean=(0.5,))
    with pytest.raises(ValueError, match="only DeepMind's"):
        architecture("resnet18", border=2)
    with pytest.raises(ValueError, match="depth=29"):
        build(architecture("wide_resnet_29_10"))


def test_equal_architectures_share_compiled_programs():
    first, second = (build(architecture("resnet18", width=2)) for _ in range(2))
    assert first.apply == second.apply and hash(first.apply) == hash(second.apply)
