"""Our attacks on nets that others trained, against the official AutoAttack's verdicts.

Per example: clean predictions equal; nothing is broken that AutoAttack, a much longer
attack, calls robust (on these nets its verdict is exact, to `EXTRA` examples); and PGD
leaves at most a few points that it breaks.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import robustjax as rj
from robustjax import data, models
from robustjax.models.importers.layers import from_layers

SHARED = Path(__file__).parents[2] / "shared"
COUNT = 100
EXTRA = 1
ATTACKS = {
    "PGD-40": rj.pgd(40),
    "targeted PGD-20": rj.multi_target(rj.pgd(20), 3),
}

pytestmark = [
    pytest.mark.polished,
    pytest.mark.skipif(
        not (SHARED / "reference").is_dir(),
        reason="needs ../shared: third-party nets, data and AutoAttack's verdicts",
    ),
]


def _case(name, dataset, threat, reference, most_missed, marks=()):
    """`most_missed`: how many of the examples that AutoAttack breaks PGD may miss."""
    given = (name, dataset, threat, reference, most_missed)
    return pytest.param(*given, id=f"{name}-{reference}", marks=marks)


SLOW = pytest.mark.slow
CONV, RESNET = "eran_cifar_convsmall_pgd", "vnncomp_cifar_resnet2b"
CASES = [
    _case(CONV, "cifar10", rj.linf("2/255"), "Linf_2over255", 1, SLOW),
    _case(CONV, "cifar10", rj.l2(0.25), "L2_0.25", 1, SLOW),
    _case(CONV, "cifar10", rj.l1(5.0), "L1_5", 3, SLOW),
    _case(RESNET, "cifar10", rj.linf("2/255"), "Linf_2over255", 1, SLOW),
    _case("kw_fashion_eps01", "fashion_mnist", rj.linf(0.1), "Linf_0.1", 2),
]


def _load(name):
    folder = SHARED / "models" / name
    spec = json.loads((folder / "net.json").read_text())
    with np.load(folder / "weights.npz") as weights:
        model = from_layers(spec["layers"], dict(weights))
    return models.logits_fn(model, *model.init(jax.random.key(0), None))


@pytest.mark.parametrize(
    ("name", "dataset", "threat", "reference", "most_missed"), CASES
)
def test_pgd_against_autoattack(name, dataset, threat, reference, most_missed):
    with np.load(SHARED / "reference" / f"{name}_{reference}.npz") as arrays:
        known = {key: arrays[key][:COUNT] for key in arrays.files}
    images = data.load(dataset, SHARED / "data").x_test[known["index"]]
    report = rj.evaluate(
        _load(name),
        images.astype(np.float32) / 255,
        known["label"],
        threat,
        suite=None,
        attacks=ATTACKS,
        index=known["index"],
        batch_size=COUNT,
        progress=False,
    )
    assert report.flags == []
    np.testing.assert_array_equal(report.correct, known["clean_correct"])
    extra = known["robust"] & ~report.robust
    assert extra.sum() <= EXTRA, f"robust for AutoAttack: {np.flatnonzero(extra)}"
    missed = (report.robust & ~known["robust"]).sum()
    assert missed <= most_missed
