"""Losses against formulas written out in float64, and against bad logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import losses

RNG = np.random.default_rng(0)


def _case(num_classes, batch=6):
    z = RNG.normal(size=(batch, num_classes)) * 3
    y = RNG.integers(num_classes, size=batch)
    return z, y, (y + 1) % num_classes


def _margin(z, y):
    return z[y] - max(v for k, v in enumerate(z) if k != y)


def _dlr(z, y):
    s = np.sort(z)[::-1]
    return -_margin(z, y) / (s[0] - s[2] + 1e-12)


def _dlr_targeted(z, y, t):
    s = np.sort(z)[::-1]
    low = s[2] if len(z) == 3 else (s[2] + s[3]) / 2
    return -(z[y] - z[t]) / (s[0] - low + 1e-12)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
def test_losses_are_the_published_formulas(num_classes):
    z, y, t = _case(num_classes)
    rows = range(len(y))
    log_sum = np.log(np.exp(z).sum(1))
    expected = {
        losses.cross_entropy: [log_sum[i] - z[i, y[i]] for i in rows],
        losses.margin: [_margin(z[i], y[i]) for i in rows],
        losses.margin_loss: [-_margin(z[i], y[i]) for i in rows],
        losses.cw: [-max(_margin(z[i], y[i]) + 50, 0) for i in rows],
        losses.dlr: [
            _dlr(z[i], y[i]) if num_classes > 2 else -_margin(z[i], y[i]) for i in rows
        ],
    }
    for loss, values in expected.items():
        got = loss(jnp.asarray(z, jnp.float32), jnp.asarray(y))
        np.testing.assert_allclose(got, values, rtol=2e-5, atol=2e-5)
    got = losses.dlr_targeted(jnp.asarray(z), jnp.asarray(y), jnp.asarray(t))
    values = [
        _dlr_targeted(z[i], y[i], t[i]) if num_classes > 2 else z[i, t[i]] - z[i, y[i]]
        for i in rows
    ]
    np.testing.assert_allclose(got, values, rtol=2e-5, atol=2e-5)


def test_kl_and_soft_labels():
    p, q = RNG.normal(size=(2, 5, 4))
    softmax_p = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    log_q = q - np.log(np.exp(q).sum(1, keepdims=True))
    cross = -(softmax_p * log_q).sum(1)
    entropy = -(softmax_p * np.log(softmax_p)).sum(1)
    kl = losses.kl(jnp.asarray(q), jnp.asarray(p))
    np.testing.assert_allclose(kl, cross - entropy, rtol=1e-4)
    soft = losses.soft_cross_entropy(jnp.asarray(q), jnp.asarray(softmax_p))
    np.testing.assert_allclose(soft, cross, rtol=1e-5)


def test_cw_stops_at_its_confidence():
    z = jnp.array([[-100.0, 0.0]])
    grad = jax.grad(lambda z: losses.cw(z, jnp.array([0])).sum())(z)
    assert not grad.any()


def test_dlr_ignores_shift_and_scale():
    z, y, t = _case(10)
    z, y, t = jnp.asarray(z), jnp.asarray(y), jnp.asarray(t)
    np.testing.assert_allclose(losses.dlr(7 * z + 3, y), losses.dlr(z, y), rtol=1e-4)
    np.testing.assert_allclose(
        losses.dlr_targeted(7 * z + 3, y, t), losses.dlr_targeted(z, y, t), rtol=1e-4
    )


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan, 3e38])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_bad_logits_give_finite_losses_and_gradients(bad, column):
    z = jnp.zeros((1, 4)).at[0, column].set(bad)
    y, t = jnp.array([0]), jnp.array([1])
    for loss in (
        losses.cross_entropy,
        losses.margin_loss,
        losses.cw,
        losses.dlr,
        lambda z, y: losses.dlr_targeted(z, y, t),
        lambda z, y: losses.kl(z, jnp.ones((1, 4))),
    ):
        value, grad = jax.value_and_grad(lambda z, loss=loss: loss(z, y).sum())(z)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


def test_half_precision_is_computed_in_float32():
    z = jnp.array([[10.0, 9.97]], jnp.bfloat16)
    assert losses.cross_entropy(z, jnp.array([0])).dtype == jnp.float32


def test_one_hot_losses_use_no_sort():
    """`top_k` and `sort` bring an all-gather under sharding."""
    z, y = jnp.zeros((4, 10)), jnp.zeros(4, jnp.int32)
    for loss in (losses.dlr, lambda z, y: losses.dlr_targeted(z, y, y)):
        text = str(jax.make_jaxpr(loss)(z, y))
        assert "sort[" not in text
        assert "top_k[" not in text


def test_a_column_of_labels_is_no_distribution():
    with pytest.raises(ValueError, match=r"\(2, 1\).*y\[:, 0\]"):
        losses.soft_cross_entropy(jnp.zeros((2, 3)), jnp.ones((2, 1), int))
