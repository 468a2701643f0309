"""experiments.regularization_in_disguise writes what it promises; its claims hold."""

import json

import numpy as np
import pytest

from experiments import regularization_in_disguise as disguise

TINY = dict(
    num_train=64, num_test=8, num_epochs=1, num_points=3, gap_steps=5, test_steps=2,
    train_epsilons=(0.1,), train_steps=1, differences=(1.0,),
)  # fmt: skip


@pytest.mark.slow  # tests/experiments/conftest.py says which run always
@pytest.mark.quick
def test_a_tiny_run_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(disguise, "NORMS", {"L2": disguise.NORMS["L2"]})
    monkeypatch.setattr(disguise, "POWER", {"L2": disguise.POWER["L2"]})
    disguise.main(disguise.Config(out=str(tmp_path), **TINY))
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "regularization_in_disguise.png").stat().st_size > 1000
    nets = results["measurements"]["nets"]
    assert set(nets) == {"standard", "PGD 0.1", "penalty 0.1", "difference 1 0.1"}
    assert {"slope_L2", "constant_L2"} < set(results["claims"])
    for net in nets.values():
        accuracy = np.array(net["accuracy"])
        assert ((accuracy >= 0) & (accuracy <= accuracy[0])).all()


def test_the_exponent_is_that_of_a_power():
    epsilons = np.geomspace(1e-3, 1e-1, 5)
    assert disguise.exponent(epsilons, 3 * epsilons**1.5) == pytest.approx(1.5)


@pytest.mark.slow
def test_the_default_run_holds_its_claims(tmp_path):
    disguise.main(disguise.Config(out=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    for norm in ("Linf", "L2", "L1"):
        assert results["claims"][f"slope_{norm}"]["bounds"] == [1.8, 2.2]
    assert all(claim["holds"] for claim in results["claims"].values())
