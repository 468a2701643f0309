"""experiments.curriculum_l2_linf: its arithmetic, a tiny run, and what it claims."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import curriculum_l2_linf as experiment
from robustjax.norms import L2, Linf
from robustjax.threats import size
from tests.experiments import schema


def test_every_way_ends_with_linf_and_begins_as_it_says():
    delta = jnp.array([[0.3, 0.4]])
    for way, budget, norm in (
        ("Linf", 0.2, Linf()),
        ("L2 first", 0.5 * 0.2 * 8, L2()),
        ("ramp", 0.1, Linf()),
    ):
        at = experiment.schedule(way, 0.2, 10, 64, 0.5)
        assert float(at(5).epsilon) == pytest.approx(budget)
        np.testing.assert_allclose(size(at(5), delta), norm.size(delta[0]), rtol=1e-6)
        for step in (10, 99):
            assert float(at(step).epsilon) == pytest.approx(0.2)
            np.testing.assert_allclose(size(at(step), delta), 0.4, rtol=1e-6)


def test_an_interval_over_three_seeds_is_students():
    found = experiment.over_seeds([0.1, 0.2, 0.6])
    half = 4.303 * np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3)
    assert found["mean"] == pytest.approx(0.3)
    assert found["high"] - found["low"] == pytest.approx(2 * half)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (0,)}, r"seeds=\(0,\); give 2 to 5"),
        ({"seeds": (0, 0)}, "different"),
        ({"ways": ("ramp",)}, "give Linf"),
        ({"epsilons": ()}, "epsilons is empty"),
    ],
)
def test_what_cannot_be_summarized_is_not_trained(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.main(experiment.Config(**changes))


@pytest.mark.slow  # tests/experiments/conftest.py says which run always
@pytest.mark.quick
def test_a_tiny_run_writes_everything(tmp_path):
    config = experiment.Config(
        out=str(tmp_path),
        seeds=(0, 1),
        ways=("Linf", "L2 first"),
        epsilons=(0.1,),
        num_train=128,
        num_test=20,
        num_epochs=2,
        attack_steps=1,
        test_steps=2,
    )
    experiment.main(config)
    results = schema.check(tmp_path)
    runs = results["measurements"]["runs"]
    assert [(r["way"], r["seed"]) for r in runs] == [
        ("Linf", 0), ("Linf", 1), ("L2 first", 0), ("L2 first", 1),
    ]  # fmt: skip
    for run in runs:
        assert 0 <= run["robust_accuracy"] <= run["clean_accuracy"] <= 1
        assert (run["updates"], run["gradients"]) == (4, 8)
    assert results["claims"]["equal_cost"]["holds"]
    alone, first = ([r["robust_accuracy"] for r in runs][i : i + 2] for i in (0, 2))
    summary = results["measurements"]["summary"]["L2 first 0.1"]
    assert summary["minus_linf"]["mean"] == pytest.approx(
        np.mean(first) - np.mean(alone)
    )


@pytest.mark.slow
def test_the_default_run_costs_the_same_and_is_stable_at_the_usual_budget(tmp_path):
    """That Linf alone becomes constant at the large budget is not seen: the page."""
    experiment.main(experiment.Config(out=str(tmp_path)))
    claims = schema.check(tmp_path)["claims"]
    assert claims["equal_cost"]["holds"] and claims["stable"]["holds"]
