"""experiments.duel writes what it promises; its claims hold by default."""

import json

import numpy as np
import pytest

from experiments import duel


@pytest.mark.slow  # tests/experiments/conftest.py says which run always
@pytest.mark.quick
def test_a_tiny_run_writes_everything(tmp_path, monkeypatch):
    few = {name: duel.players()[name] for name in ("none", "FGSM", duel.REFERENCE)}
    few["10 short steps"] = few[duel.REFERENCE]
    monkeypatch.setattr(duel, "players", lambda: few)
    config = duel.Config(
        out=str(tmp_path), num_epochs=1, epochs_per_look=1, num_watched=8,
        watch_steps=1, num_test=8, test_steps=1,
    )  # fmt: skip
    duel.main(config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "duel.png").stat().st_size > 1000
    assert set(results["claims"]) == {"attack", "steps", "step_size", "left_by_fgsm"}
    nets = results["measurements"]["nets"]
    assert set(nets) == set(few)
    for net in nets.values():
        assert 0 <= net["robust_accuracy"] <= net["clean_accuracy"] <= 1
    assert nets["none"]["shown"] == nets["none"]["clean"]
    # The same player under two names, the same seed: the same net.
    again, first = nets["10 short steps"], nets[duel.REFERENCE]
    np.testing.assert_array_equal(again["strong"], first["strong"])


@pytest.mark.slow
def test_the_default_run_holds_its_claims(tmp_path):
    duel.main(duel.Config(out=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert all(claim["holds"] for claim in results["claims"].values())
    assert all(claim["bounds"][0] == 0 for claim in results["claims"].values())
