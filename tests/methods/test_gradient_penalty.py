"""The gradient penalty against numpy: passes, gradients and BatchNorm by hand.

The transcription knows neither JAX nor automatic differentiation: the input gradient is
the chain rule written out, the weight gradient central differences, all in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.losses import cross_entropy
from robustjax.methods.gradient_penalty import dual_norm, gradient_penalty
from robustjax.models.base import Model
from robustjax.norms import AnyOf
from robustjax.threats import ThreatModel, l0, l1, l2, linf
from robustjax.types import Batch

ROWS, SIZE, HIDDEN, CLASSES = 6, 5, 7, 3
TINY = 1e-5
EPSILON = 0.1


def weights():
    rng = np.random.default_rng(0)
    return {
        "first": rng.normal(size=(SIZE, HIDDEN)),
        "scale": rng.uniform(0.5, 1.5, HIDDEN),
        "bias": rng.normal(size=HIDDEN),
        "second": rng.normal(size=(HIDDEN, CLASSES)),
    }


def statistics():
    """Far from those of the batch: a wrong mode shows."""
    return {"mean": np.linspace(-1, 2, HIDDEN), "var": np.linspace(0.3, 4, HIDDEN)}


def inputs():
    rng = np.random.default_rng(1)
    return rng.uniform(0.2, 0.8, (ROWS, SIZE)), np.array([0, 1, 2, 0, 1, 2])


def apply(params, extra, x, *, train=False, key=None):
    h = x.reshape(x.shape[0], -1) @ params["first"]
    mean, var = extra["mean"], extra["var"]
    if train:
        mean, var = h.mean(0), h.var(0)
        extra = {name: 0.9 * extra[name] + 0.1 * new for name, new in
                 {"mean": mean, "var": var}.items()}  # fmt: skip
    h = (h - mean[None]) / jnp.sqrt(var + TINY)[None]
    return jnp.tanh(h * params["scale"][None] + params["bias"][None]) @ params[
        "second"
    ], extra


MODEL = Model(lambda key, x: (weights(), statistics()), apply)


def by_hand(w, x, y, train):
    """Losses `[B]`, the gradient of their sum by x, and the batch's statistics."""
    h = x @ w["first"]
    mean, var = h.mean(0), h.var(0)
    used = (mean, var) if train else (statistics()["mean"], statistics()["var"])
    root = np.sqrt(used[1] + TINY)
    normal = (h - used[0]) / root
    a = np.tanh(normal * w["scale"] + w["bias"])
    z = a @ w["second"]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    losses = -np.log(p[np.arange(ROWS), y])
    g = (p - np.eye(CLASSES)[y]) @ w["second"].T * (1 - a**2) * w["scale"]
    if train:  # BatchNorm's backward pass
        g = g - g.mean(0) - normal * (g * normal).mean(0)
    return losses, g / root @ w["first"].T, {"mean": mean, "var": var}


DUAL = {
    "Linf": lambda g: np.abs(g).sum(1),
    "L2": lambda g: np.sqrt((g**2).sum(1)),
    "L1": lambda g: np.abs(g).max(1),
}
STEEPEST = {
    "Linf": np.sign,
    "L2": lambda g: g / np.sqrt((g**2).sum(1, keepdims=True)),
    "L1": lambda g: np.sign(g) * (np.abs(g) == np.abs(g).max(1, keepdims=True)),
}
THREATS = {"Linf": linf, "L2": l2, "L1": l1}


def expected(w, norm, train, difference, direction):
    x, y = inputs()
    here, slope, _ = by_hand(w, x, y, train)
    clean, _, _ = by_hand(w, x, y, True)
    if difference is None:
        penalty = EPSILON * DUAL[norm](slope)
    else:
        step = difference * EPSILON
        ahead, _, _ = by_hand(w, x + step * direction, y, train)
        penalty = EPSILON * (ahead - here) / step
    return (clean + 0.7 * penalty).mean(), 0.7 * penalty.mean()


@pytest.mark.parametrize("bn_mode", ["eval", "batch"])
@pytest.mark.parametrize("difference", [None, 0.1])
@pytest.mark.parametrize("norm", THREATS)
def test_loss_gradient_and_statistics_are_those_by_hand(norm, difference, bn_mode):
    train = bn_mode == "batch"
    w, (x, y) = weights(), inputs()
    with jax.enable_x64(True):
        epsilon = jnp.float64(EPSILON)
        threat = ThreatModel(THREATS[norm](0.1).norm, epsilon)
        method = gradient_penalty(
            MODEL, threat, weight=0.7, difference=difference, bn_mode=bn_mode
        )
        batch = Batch(jnp.asarray(x), jnp.asarray(y), jnp.arange(ROWS))
        params, extra = jax.tree.map(jnp.asarray, (w, statistics()))
        grads, aux = jax.jit(method.grads)(
            params, extra, (), batch, jnp.int32(0), jax.random.key(0)
        )
        grads, aux = jax.device_get((grads, aux))
    _, slope, moved = by_hand(w, x, y, train)
    direction = STEEPEST[norm](slope)  # a constant: not differentiated
    loss, penalty = expected(w, norm, train, difference, direction)
    np.testing.assert_allclose(aux.metrics["loss"].total / ROWS, loss, rtol=1e-12)
    np.testing.assert_allclose(aux.metrics["penalty"].total / ROWS, penalty, rtol=1e-9)
    for name, new in moved.items():
        kept = 0.9 * statistics()[name] + 0.1 * new
        np.testing.assert_allclose(aux.extra[name], kept, rtol=1e-12)
    for name, found in grads.items():
        slopes = np.zeros_like(w[name])
        for place in np.ndindex(w[name].shape):
            sides = []
            for sign in (1, -1):
                moved_w = {k: v.copy() for k, v in w.items()}
                moved_w[name][place] += sign * 1e-5
                sides.append(expected(moved_w, norm, train, difference, direction)[0])
            slopes[place] = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-8, err_msg=name)


def test_by_default_what_is_penalized_is_what_learns():
    """With running statistics a net can be flat there and learn with the batch's."""
    x, y = inputs()
    batch = Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y), jnp.arange(ROWS))
    state = jax.tree.map(
        lambda v: jnp.asarray(v, jnp.float32), (weights(), statistics())
    )

    def penalty(**mode):
        method = gradient_penalty(MODEL, linf(0.1), **mode)
        found = method.grads(*state, (), batch, jnp.int32(0), jax.random.key(0))
        return float(found[1].metrics["penalty"].total)

    assert penalty() == penalty(bn_mode="batch") != penalty(bn_mode="eval")


def test_dual_norm_has_a_derivative_where_the_norm_has_a_corner():
    grad = jnp.array([[0.0, 0.0], [3.0, -4.0]])
    cases = {
        "Linf": ([0, 7], [[0, 0], [1, -1]]),
        "L2": ([0, 5], [[0, 0], [0.6, -0.8]]),
        "L1": ([0, 4], [[0, 0], [0, -1]]),
    }
    for norm, (values, slopes) in cases.items():
        threat = THREATS[norm](1.0)
        np.testing.assert_allclose(dual_norm(threat, grad), values, rtol=1e-6)
        found = jax.grad(lambda g, t=threat: dual_norm(t, g).sum())(grad)
        np.testing.assert_allclose(found, slopes, rtol=1e-6)


def linear_loss(epsilon, difference):
    """Of a linear model, on one batch; `loss(params)` and its gradient."""
    apply = lambda params, extra, x, *, train=False, key=None: (x @ params, extra)  # noqa: E731
    model = Model(lambda key, x: (jnp.zeros((SIZE, CLASSES)), {}), apply)
    x, y = inputs()
    batch = Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y))
    method = gradient_penalty(model, linf(epsilon), difference=difference)
    params = jnp.asarray(np.random.default_rng(2).normal(size=(SIZE, CLASSES)))
    params = params.astype(jnp.float32)
    grads, aux = jax.jit(method.grads)(params, {}, (), batch, 0, jax.random.key(0))
    return params, batch, grads, aux.metrics["loss"].total / ROWS


def test_a_difference_over_all_of_epsilon_is_training_on_fgsm():
    params, batch, grads, loss = linear_loss(0.3, 1.0)
    slope = jax.grad(lambda x: cross_entropy(x @ params, batch.y).sum())(batch.x)
    x_adv = batch.x + 0.3 * jnp.sign(slope)

    def fgsm_loss(params):
        return cross_entropy(x_adv @ params, batch.y).mean()

    np.testing.assert_allclose(loss, fgsm_loss(params), rtol=1e-5)
    np.testing.assert_allclose(grads, jax.grad(fgsm_loss)(params), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("difference", [None, 0.1])
def test_budget_zero_is_standard_training(difference):
    params, batch, grads, loss = linear_loss(0.0, difference)

    def plain(params):
        return cross_entropy(batch.x @ params, batch.y).mean()

    np.testing.assert_allclose(loss, plain(params), rtol=1e-6)
    np.testing.assert_allclose(grads, jax.grad(plain)(params), rtol=1e-5, atol=1e-7)


def test_what_has_no_meaning_is_refused():
    either = AnyOf((linf(1).norm, l0(1).norm), jnp.int32(0))
    for threat in (l0(3), ThreatModel(either, 0.1)):
        with pytest.raises(ValueError, match="threat is L0.*give linf, l2 or l1"):
            gradient_penalty(MODEL, threat)
    with pytest.raises(ValueError, match="epsilon is inf.*finite"):
        gradient_penalty(MODEL, linf(np.inf))
    with pytest.raises(ValueError, match="difference is 0"):
        gradient_penalty(MODEL, linf(0.1), difference=0)
    with pytest.raises(ValueError, match="weight is -1"):
        gradient_penalty(MODEL, linf(0.1), weight=-1)
    with pytest.raises(ValueError, match="bn_mode is 'train'"):
        gradient_penalty(MODEL, linf(0.1), bn_mode="train")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no ThreatModel"):
        gradient_penalty(MODEL, 0.1)  # type: ignore[arg-type]
