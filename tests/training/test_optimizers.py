import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.training import optimizers as o

SCHEDULES = {
    "constant": (o.constant(0.3), {0: 0.3, 99: 0.3}),
    "constant, warm-up": (o.constant(0.3, warmup_steps=10), {0: 0.0, 5: 0.15, 10: 0.3}),
    "cosine": (o.cosine(0.2, 100), {0: 0.2, 25: 0.1 + 0.1 / 2**0.5, 50: 0.1, 100: 0.0}),
    "cosine, warm-up and floor": (
        o.cosine(0.2, 110, warmup_steps=10, final=0.1),
        {0: 0.0, 5: 0.1, 10: 0.2, 60: 0.15, 110: 0.1, 500: 0.1},
    ),
    "one cycle": (o.one_cycle(0.2, 100), {0: 0.0, 20: 0.1, 40: 0.2, 70: 0.1, 100: 0.0}),
    "one cycle, early peak": (
        o.one_cycle(0.2, 100, warmup_steps=20, final=0.04),
        {10: 0.1, 20: 0.2, 60: 0.12, 100: 0.04},
    ),
    "cosine cycle": (  # PyTorch's OneCycleLR from step to step
        o.cosine_cycle(0.2, 100, warmup_steps=20),
        {0: 0.008, 10: 0.104, 20: 0.2, 60: 0.1000004, 100: 8e-7, 300: 8e-7},
    ),
    "linear": (
        o.linear([0.0, 0.1, 0.005], [0, 20, 40]),
        {0: 0.0, 5: 0.025, 20: 0.1, 30: 0.0525, 40: 0.005, 99: 0.005},
    ),
    "piecewise": (
        o.piecewise(0.1, [40, 60]),
        {0: 0.1, 39: 0.1, 40: 0.01, 59: 0.01, 60: 0.001},
    ),
    "piecewise, warm-up": (
        o.piecewise(0.1, [40], factor=0.5, warmup_steps=20),
        {10: 0.05, 20: 0.1, 40: 0.05},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_hit_their_values(name):
    schedule, expected = SCHEDULES[name]
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(
            jax.jit(schedule)(jnp.int32(step)), rate, rtol=1e-5, atol=1e-8
        )


PARAMS = {
    "Dense": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)},
    "Norm": {"scale": jnp.full(2, 2.0)},
}


def update(tx, grads=None):
    grads = jax.tree.map(jnp.zeros_like, PARAMS) if grads is None else grads
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("build", [o.sgd, o.adamw])
def test_decay_of_kernels_spares_norms_and_biases(build):
    some = update(build(0.5, weight_decay=0.1, decay="kernels"))
    every = update(build(0.5, weight_decay=0.1, decay="all"))
    # -lr * weight_decay * w, and Nesterov's first step adds momentum times as much.
    moved = -0.5 * 0.1 * 2.0 * (1.9 if build is o.sgd else 1.0)
    np.testing.assert_allclose(some["Dense"]["kernel"], moved, rtol=1e-6)
    assert float(jnp.abs(some["Dense"]["bias"]).max()) == 0
    assert float(jnp.abs(some["Norm"]["scale"]).max()) == 0
    for leaf in jax.tree.leaves(every):
        np.testing.assert_allclose(leaf, moved, rtol=1e-6)


def test_sgd_is_pytorchs():
    """Three steps by hand: g + wd*w, m <- 0.9 m + g, w <- w - lr (g + 0.9 m)."""
    tx = o.sgd(0.1, momentum=0.9, weight_decay=0.01)
    w = jnp.array(1.0)
    state, expected, m = tx.init(w), 1.0, 0.0
    for gradient in (0.5, -0.2, 0.3):
        updates, state = tx.update(jnp.array(gradient), state, w)
        w = optax.apply_updates(w, updates)
        g = gradient + 0.01 * expected
        m = 0.9 * m + g
        expected -= 0.1 * (g + 0.9 * m)
    np.testing.assert_allclose(w, expected, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_momentum_may_follow_the_rate(nesterov):
    """As PyTorch under CyclicLR: each update with the momentum of its own step."""
    rate = o.one_cycle(0.2, 4, warmup_steps=2)
    momentum = o.against(rate, 0.2, 0.9, 0.8)
    tx = o.sgd(rate, momentum=momentum, nesterov=nesterov)
    w = jnp.array(1.0)
    state, expected, m = tx.init(w), 1.0, 0.0
    at = [(0.5, 0, 0.9), (-0.2, 0.1, 0.85), (0.3, 0.2, 0.8), (1.0, 0.1, 0.85)]
    for gradient, lr, mu in at:
        updates, state = jax.jit(tx.update)(jnp.array(gradient), state, w)
        w = optax.apply_updates(w, updates)
        m = mu * m + gradient
        expected -= lr * (gradient + mu * m if nesterov else m)
    np.testing.assert_allclose(w, expected, rtol=1e-6)
    low = jnp.ones(3, jnp.bfloat16)
    begun = tx.init(low)
    after = jax.eval_shape(tx.update, low, begun, low)
    types = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert types(after) == types((low, begun))  # else no loop could carry it


def test_clipping_leaves_the_first_offender_alone():
    """One entry that is not finite does not make every tensor NaN."""
    for bad, other in ((np.nan, -1.0), (np.inf, 0.0), (1e30, 0.0)):
        grads = jax.tree.map(jnp.ones_like, PARAMS)
        grads["Dense"]["bias"] = jnp.full_like(grads["Dense"]["bias"], bad)
        found = update(o.sgd(1.0, momentum=0.0, clip_norm=0.1), grads)
        assert np.isfinite(found["Dense"]["bias"]).all() == np.isfinite(bad)
        np.testing.assert_array_equal(found["Norm"]["scale"], other)


def test_clipping_bounds_the_global_norm():
    grads = jax.tree.map(lambda leaf: 100 * leaf, PARAMS)
    clipped = update(o.sgd(1.0, momentum=0.0, clip_norm=2.0), grads)
    np.testing.assert_allclose(optax.tree.norm(clipped), 2.0, rtol=1e-5)
    small = jax.tree.map(lambda leaf: 1e-3 * leaf, PARAMS)
    kept = update(o.sgd(1.0, momentum=0.0, clip_norm=2.0), small)
    np.testing.assert_allclose(kept["Dense"]["bias"], -2e-3, rtol=1e-6)


def test_adam_moves_by_the_learning_rate_at_first():
    moved = update(o.adam(0.01), jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_allclose(moved["Norm"]["scale"], -0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: o.sgd(0.1, weight_decay=0.1, decay="weights"), "'weights'"),
        (lambda: o.adamw(0.1, weight_decay=-1.0), "weight_decay is -1"),
        (lambda: o.sgd(0.1, clip_norm=0.0), "clip_norm is 0"),
        (lambda: o.one_cycle(0.1, 10, warmup_steps=10), "warmup_steps is 10"),
        (lambda: o.cosine_cycle(0.1, 10, warmup_steps=10), "warmup_steps is 10"),
        (lambda: o.linear([0.1], [0, 1]), "1 values for 2 steps"),
        (lambda: o.linear([0.1, 0.2], [5, 1]), r"\[5, 1\]"),
        (lambda: o.piecewise(0.1, [60, 40]), r"\[60, 40\]"),
    ],
)
def test_messages_name_the_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
