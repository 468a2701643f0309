"""experiments.ball_of_stability writes what it promises; its claims hold by default."""

import json

import pytest

from experiments import ball_of_stability


def read(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow  # tests/experiments/conftest.py says which run always
@pytest.mark.quick
def test_a_tiny_run_writes_everything(tmp_path):
    config = ball_of_stability.Config(
        out=str(tmp_path),
        net="mlp",
        num_epochs=1,
        num_test=4,
        num_bisections=1,
        fab_steps=0,
    )
    ball_of_stability.main(config)
    results = read(tmp_path)
    for name in ("ball_of_stability.png", "condition.png"):
        assert (tmp_path / name).stat().st_size > 1000
    for net in ("standard", "robust", "1-Lipschitz"):
        measured = results["measurements"][net]
        assert len(measured["lists"]["found"]) == 4
        for kind in ("bracket", "local", "global"):
            assert results["claims"][f"{net}_{kind}"]["holds"]
    assert results["claims"]["one"]["holds"]


@pytest.mark.slow
def test_the_default_run_holds_its_claims(tmp_path):
    ball_of_stability.main(ball_of_stability.Config(out=str(tmp_path)))
    results = read(tmp_path)
    assert all(claim["holds"] for claim in results["claims"].values())
    at = results["measurements"]["1-Lipschitz"]
    assert at["certified_accuracy"][1] > 0.8  # at 36/255
