"""AOL layers, MaxMin and the margin method, against dense matrices and formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from robustjax import models
from robustjax.methods.lipschitz_margin import lipschitz_margin
from robustjax.models.lipschitz import (
    aol_conv,
    aol_dense,
    lipschitz_net,
    max_min,
    squeeze,
)
from robustjax.types import Batch


def spectral(f, shape):
    basis = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    matrix = np.asarray(f(basis), np.float64).reshape(len(basis), -1)
    return np.linalg.svd(matrix, compute_uv=False)[0]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("convolution", ["plain", "canonical"])
def test_aol_convolutions_have_norm_at_most_one(stride, convolution):
    for seed in range(3):
        kernel = 5 * jax.random.normal(jax.random.key(seed), (3, 3, 2, 4))
        scaled = aol_conv(kernel, convolution=convolution)

        def f(x, kernel=scaled):
            return lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        assert 0.1 < spectral(f, (6, 6, 2)) <= 1 + 1e-6
        # By hand: all shifted products of channels, in float64.
        k = np.asarray(kernel, np.float64)
        total = np.zeros(2)
        for du in range(-2, 3):
            for dv in range(-2, 3):
                for u in range(max(0, du), min(3, 3 + du)):
                    assert 0 <= u - du < 3
                here = k[max(0, du) : 3 + min(0, du), max(0, dv) : 3 + min(0, dv)]
                there = k[max(0, -du) : 3 + min(0, -du), max(0, -dv) : 3 + min(0, -dv)]
                total += np.abs(np.einsum("uvio,uvjo->ij", here, there)).sum(1)
        expected = k / np.sqrt(total)[:, None]
        np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-6)


def test_aol_dense_has_norm_at_most_one_and_keeps_orthogonal_matrices():
    kernel = jax.random.normal(jax.random.key(0), (7, 5))
    assert 0.3 < np.linalg.svd(aol_dense(kernel), compute_uv=False)[0] <= 1 + 1e-6
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    np.testing.assert_allclose(aol_dense(jnp.asarray(3 * q, jnp.float32)), q, atol=1e-6)


def test_max_min_sorts_pairs_and_squeeze_moves_pixels():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype(np.float32)
    found = np.asarray(max_min(jnp.asarray(x)))
    pairs = np.sort(np.stack([x[..., :3], x[..., 3:]]), 0)
    np.testing.assert_array_equal(found, np.concatenate([pairs[1], pairs[0]], -1))
    small = np.asarray(squeeze(jnp.asarray(x)))
    np.testing.assert_array_equal(small[1, 0, 1].reshape(2, 2, 6), x[1, 0:2, 2:4])
    with pytest.raises(ValueError, match="3 is an odd number"):
        max_min(jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="5 x 4 pixels"):
        squeeze(jnp.zeros((1, 5, 4, 1)))
    with pytest.raises(ValueError, match="odd"):
        lipschitz_net(channels=(3,))


def test_the_net_moves_its_logits_no_further_than_its_inputs():
    model = lipschitz_net(channels=(4,), hidden=(16,))
    x = jax.random.uniform(jax.random.key(0), (20, 8, 8, 1))
    params, extra = jax.jit(model.init)(jax.random.key(1), x[:1])
    params = jax.tree.map(lambda a: 3 * a + 0.5, params)
    f = jax.jit(models.logits_fn(model, params, extra))
    other = x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)
    moved = jnp.linalg.norm(f(x) - f(other), axis=1)
    distance = jnp.linalg.norm((x - other).reshape(20, -1), axis=1)
    assert (moved <= distance * (1 + 1e-5)).all()
    assert (moved > 1e-3 * distance).all()


def test_the_margin_loss_is_its_formula():
    model = models.mlp((), 3)
    x, y = jnp.ones((4, 2)), jnp.array([0, 1, 2, 0])
    params, extra = model.init(jax.random.key(0), x)
    batch = Batch(x, y, jnp.arange(4), jnp.ones(4, bool))
    method = lipschitz_margin(model, 0.3, constant=2.0, temperature=0.5)
    _, aux = method.grads(params, extra, (), batch, 0, jax.random.key(0))
    z = np.asarray(models.logits_fn(model, params, extra)(x), np.float64)
    z[np.arange(4), y] -= np.sqrt(2) * 2.0 * 0.3
    z /= 0.5
    loss = 0.5 * (np.log(np.exp(z).sum(1)) - z[np.arange(4), y])
    found = aux.metrics["loss"]
    np.testing.assert_allclose(found.total / found.count, loss.mean(), rtol=1e-5)


def test_the_margin_loss_counts_who_is_certified_at_its_radius():
    """Of a linear net on the plane, whose constant is 1, by margins in float64."""
    model = models.mlp((), 2)
    x = jnp.linspace(0, 1, 41)[:, None] * jnp.ones((1, 2))
    params, extra = model.init(jax.random.key(0), x)
    unit = np.array([[1, -1], [1, -1]]) / 2
    params = jax.tree.map(
        lambda a: unit if a.ndim == 2 else a + np.array([-0.5, 0.5]), params
    )
    y = jnp.zeros(41, int)
    batch = Batch(x, y, jnp.arange(41), jnp.ones(41, bool))
    z = np.asarray(models.logits_fn(model, params, extra)(x), np.float64)
    for radius in (0.0, 0.2):
        method = lipschitz_margin(model, radius)
        _, aux = method.grads(params, extra, (), batch, 0, jax.random.key(0))
        certified = (z[:, 0] - z[:, 1]) / np.sqrt(2) > radius - 1e-6
        found = aux.metrics["accuracy"]
        assert found.total / found.count == certified.mean()
    assert 0 < certified.mean() < 0.5


@pytest.mark.parametrize(
    "change", [{"radius": -0.1}, {"constant": 0.0}, {"temperature": 0.0}]
)
def test_the_margin_loss_refuses_wrong_numbers(change):
    arguments = {"radius": 0.1, **change}
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        lipschitz_margin(models.mlp((), 3), **arguments)
