"""experiments.gradient_map: its parts by hand, a tiny run, and the default run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gradient_map as experiment
from tests.experiments import schema


def test_a_linear_net_is_measured_as_the_formulas_say():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 2)).astype(np.float32)
    x = rng.random((5, 4, 4, 1), np.float32)
    y = np.zeros(5, np.int32)
    f = jax.tree_util.Partial(lambda x: x.reshape(len(x), 16) @ w)
    quiet = np.zeros((4, 4, 1), bool)
    quiet[0] = True
    config = dataclasses.replace(experiment.Config(), num_noise=1000)
    found = experiment.measure(f, x, y, 0 * x, quiet, config)
    slope = (w[:, 1] - w[:, 0]).astype(float)
    l1, l2 = np.abs(slope).sum(), np.linalg.norm(slope)
    flat = x.reshape(5, 16)
    cosine = np.abs(flat @ slope) / (l2 * np.linalg.norm(flat, axis=1))
    np.testing.assert_allclose(found["alignment"], cosine, rtol=1e-5)
    np.testing.assert_allclose(found["gradient_l1"], np.full(5, l1), rtol=1e-5)
    share = np.abs(slope[:4]).sum() / l1
    np.testing.assert_allclose(found["quiet_share"], np.full(5, share), rtol=1e-5)
    for name in ("ratio", "ratio_at_epsilon"):
        np.testing.assert_allclose(found[name], np.full(5, l1 / l2), rtol=0.1)
    assert found["margin_bend"].max() < 1e-3  # a plane is not bent
    np.testing.assert_array_equal(found["loss_bend"], np.zeros(5))  # no perturbation


def test_the_surface_holds_the_losses_of_its_points():
    f = jax.tree_util.Partial(lambda x: x.reshape(len(x), 4)[:, :2] ** 2)
    x, y = jnp.ones((1, 2, 2, 1)), jnp.array([1])
    first = jnp.zeros_like(x).at[0, 0, 0, 0].set(1.0)
    second = jnp.zeros_like(x).at[0, 0, 1, 0].set(1.0)
    a, b = np.array([0.0, 1.0, 2.0], np.float32), np.array([0.0, -1.0], np.float32)
    found = experiment.losses(f, x, y, first, second, a, b)[..., 0]
    gap = (1 + a[None]) ** 2 - (1 + b[:, None]) ** 2  # logit 0 minus logit 1
    np.testing.assert_allclose(found, np.log1p(np.exp(gap)), rtol=1e-5)


@pytest.mark.slow  # tests/experiments/conftest.py says which run always
@pytest.mark.quick
def test_a_tiny_run_writes_everything(tmp_path):
    config = experiment.Config(
        out=str(tmp_path),
        net="MLP",
        num_train=64,
        num_test=16,
        num_epochs=1,
        num_noise=4,
        num_shown=2,
    )
    experiment.main(config)
    results = schema.check(tmp_path)
    assert set(results["claims"]) == {
        *("alignment", "quiet_share", "loss_bend", "ratio_standard", "ratio_robust")
    }
    for net in ("standard", "robust"):
        measured = results["measurements"][net]
        assert 0 <= measured["attacked_right"]["mean"] <= 1
        assert measured["alignment"]["low"] < measured["alignment"]["high"]


@pytest.mark.slow
def test_the_default_run_holds_its_claims(tmp_path):
    experiment.main(dataclasses.replace(experiment.Config(), out=str(tmp_path)))
    claims = schema.check(tmp_path)["claims"]
    assert not [name for name, claim in claims.items() if not claim["holds"]]
