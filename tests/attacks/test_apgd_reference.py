"""APGD with cross-entropy and with targeted DLR against official AutoAttack's stages.

On nets that others trained: as many examples broken by the first, as many left by both,
as the authors' code says in `../shared/reference/*.json`.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import robustjax as rj
from robustjax import data, models
from robustjax.attacks.apgd import apgd, apgd_targeted
from robustjax.models.importers.layers import from_layers

SHARED = Path(__file__).parents[3] / "shared"
SLACK = 2  # examples; measured: at most 1 apart after apgd-ce, 0 after both

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED / "reference").is_dir(),
        reason="needs ../shared: third-party nets, data and AutoAttack's verdicts",
    ),
]

# name, data set, threat, reference, restarts of apgd-ce, targets of apgd-t
CASES = [
    ("eran_cifar_convsmall_pgd", "cifar10", rj.linf("2/255"), "Linf_2over255", 1, 9),
    ("eran_cifar_convsmall_pgd", "cifar10", rj.l2(0.25), "L2_0.25", 1, 9),
    ("eran_cifar_convsmall_pgd", "cifar10", rj.l1(5.0), "L1_5", 5, 5),
    ("kw_fashion_eps01", "fashion_mnist", rj.linf(0.1), "Linf_0.1", 1, 9),
]


def _load(name):
    folder = SHARED / "models" / name
    spec = json.loads((folder / "net.json").read_text())
    with np.load(folder / "weights.npz") as weights:
        model = from_layers(spec["layers"], dict(weights))
    return models.logits_fn(model, *model.init(jax.random.key(0), None))


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "exact"])
@pytest.mark.parametrize(
    ("name", "dataset", "threat", "verdicts", "num_restarts", "num_targets"),
    CASES,
    ids=[f"{case[0]}-{case[3]}" for case in CASES],
)
def test_breaks_what_the_authors_code_breaks(
    name, dataset, threat, verdicts, num_restarts, num_targets, reference
):
    with np.load(SHARED / "reference" / f"{name}_{verdicts}.npz") as arrays:
        known = dict(arrays)
    path = SHARED / "reference" / f"{name}_{verdicts}.json"
    stages = json.loads(path.read_text())["stages"]
    pixels = data.load(dataset, SHARED / "data").x_test[known["index"]]
    x = pixels.astype(np.float32) / 255
    logits_fn = _load(name)

    def left_by(attack_fn, rows):
        result = rj.attack(
            logits_fn,
            x[rows],
            known["label"][rows],
            threat,
            attack_fn,
            batch_size=64,
            index=known["index"][rows],
        )
        inside = rj.is_feasible(threat, x[rows], result.x_adv)
        assert bool(inside.all())
        return rows[~np.asarray(result.success)]

    rows = np.flatnonzero(known["clean_correct"])
    assert len(rows) == stages["apgd-ce"]["points"]
    after_ce = left_by(apgd(num_restarts=num_restarts, reference=reference), rows)
    targeted = apgd_targeted(num_targets=num_targets, reference=reference)
    after_both = left_by(targeted, after_ce)
    official = stages["apgd-t"]["points"], stages["fab-t"]["points"]
    print(f"left: {len(after_ce)}, {len(after_both)}; official: {official}")
    assert abs(len(after_ce) - official[0]) <= SLACK
    assert abs(len(after_both) - official[1]) <= SLACK
