"""experiments.linear_margin writes what it promises; its claims hold by default."""

import json

import numpy as np
import pytest

from experiments import linear_margin


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_tiny_run_writes_everything(tmp_path):
    config = linear_margin.Config(
        out=str(tmp_path), num_epochs=1, num_examples=8, attack_steps=2, box_steps=2
    )
    linear_margin.main(config)
    results = read(tmp_path)
    assert (tmp_path / "linear_margin.png").stat().st_size > 1000
    assert set(results["claims"]) == {
        f"{norm}_{box}" for norm in ("linf", "l2", "l1") for box in ("no_box", "box")
    }
    assert all(claim["holds"] for claim in results["claims"].values())
    for claim in results["claims"].values():
        assert np.isfinite(claim["value"])
    assert results["measurements"]["examples"] == 8


@pytest.mark.slow
def test_the_default_run_holds_its_claims(tmp_path):
    linear_margin.main(linear_margin.Config(out=str(tmp_path)))
    results = read(tmp_path)
    assert results["measurements"]["examples"] == 1000
    for norm in ("linf", "l2", "l1"):
        assert results["claims"][f"{norm}_no_box"]["bounds"] == [0.0, 1e-5]
    assert all(claim["holds"] for claim in results["claims"].values())
