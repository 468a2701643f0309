"""experiments.directed_vs_random: its constants and parts, and both runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import directed_vs_random as experiment
from tests.experiments import schema


@pytest.mark.parametrize("name", experiment.NOISES)
def test_the_constant_of_a_noise_is_the_spread_of_a_coordinate(name):
    _, sample, constant = experiment.NOISES[name]
    keys = jax.random.split(jax.random.key(0), 20_000)
    delta = np.asarray(jax.vmap(lambda key: sample(key, 0.5, (3,)))(keys))
    # Symmetric noise: any w of unit length has the spread of a coordinate.
    assert np.abs(delta.mean(0)).max() < 0.02
    np.testing.assert_allclose(delta.std(0) / 0.5, constant(3), rtol=0.03)


def test_a_linear_net_moves_as_the_formula_says():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 3)).astype(np.float32)
    x = rng.random((5, 4, 4, 1), np.float32)
    z = x.reshape(5, 16) @ w
    y = jnp.asarray(z.argmin(1).astype(np.int32))

    def f(x):
        return x.reshape(len(x), 16) @ w

    f = jax.tree_util.Partial(f)
    masked = z.copy()
    masked[np.arange(5), y] = -np.inf
    slope = (w[:, masked.argmax(1)] - w[:, y]).T.reshape(5, 4, 4)
    for block in (1, 2):
        directed, mean, spread, l1, l2 = experiment.net_changes(
            f, jax.random.key(0), x, y, 0.1, block=block, num_noise=1000
        )
        np.testing.assert_allclose(l1, np.abs(slope).sum((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(l2, np.sqrt((slope**2).sum((1, 2))), rtol=1e-5)
        np.testing.assert_allclose(directed, 0.1 * l1, rtol=1e-4)
        # One sign for each block: the spread is that of the blocks' sums.
        sums = slope.reshape(5, 4 // block, block, 4 // block, block).sum((2, 4))
        expected = 0.1 * np.sqrt((sums**2).sum((1, 2)))
        np.testing.assert_allclose(spread, expected, rtol=0.1)
        assert np.abs(mean / spread).max() < 5 / 1000**0.5


def test_images_are_made_smaller_by_means_and_larger_between():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        experiment.resize(x, 2)[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]]
    )
    large = experiment.resize(x, 8)
    assert large.shape == (1, 8, 8, 1)
    assert x.min() <= large.min() and large.max() <= x.max()
    np.testing.assert_allclose(experiment.exponent([1, 4, 16], [3, 6, 12]), 0.5)


@pytest.mark.slow  # tests/experiments/conftest.py says which run always
@pytest.mark.quick
def test_a_tiny_run_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "FACTORS", (1, 2))
    config = experiment.Config(
        out=str(tmp_path),
        nets=("MLP",),
        dims=(4, 16),
        num_weights=1,
        num_noise=100,
        sizes=(4, 8),
        net_noise=4,
        num_train=64,
        num_test=8,
        num_epochs=1,
    )
    experiment.main(config)
    results = schema.check(tmp_path)
    assert set(results["measurements"]["nets"]) == {"MLP", "MLP, lifted"}
    assert set(results["measurements"]["linear"]) == set(experiment.NOISES)
    assert results["claims"]["directed"]["holds"]


@pytest.mark.slow
def test_the_default_run_holds_its_claims(tmp_path):
    experiment.main(dataclasses.replace(experiment.Config(), out=str(tmp_path)))
    claims = schema.check(tmp_path)["claims"]
    for name in ("Linf corner", "Linf ball", "L2 sphere", "L2 ball"):
        assert claims[f"exponent {name}"]["bounds"] == [0.45, 0.55]
    assert not [name for name, claim in claims.items() if not claim["holds"]]
