"""canonicalize: users' networks give the same values and gradients, canonically."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from robustjax.models.base import from_linen, logits_fn
from robustjax.models.canonical import canonicalize, count_convolutions
from robustjax.models.madry_mnist import small_cnn

X = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 8, 8, 3)), jnp.float32)
KEY = jax.random.key(0)


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.silu(nn.Conv(7, (3, 3), strides=2)(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def linen_cnn():
    model = from_linen(LinenCNN())
    return logits_fn(model, *model.init(KEY, X[:1])), (2, 0)


def nchw_cnn():
    numbers = np.random.default_rng(1)
    kernels = [
        jnp.asarray(numbers.normal(size=shape, scale=0.2), jnp.float32)
        for shape in ((6, 3, 3, 3), (4, 6, 2, 2))
    ]

    def apply(kernels, x, key=None):
        x = jnp.transpose(x, (0, 3, 1, 2))
        for kernel in kernels:
            x = jnp.tanh(lax.conv(x, kernel, (1, 1), "SAME"))
            x = lax.reduce_window(
                x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
            )
        return jnp.mean(x, (2, 3))

    return jax.tree_util.Partial(apply, kernels), (2, 0)


def checkpointed_cnn():
    f, _ = nchw_cnn()
    return jax.tree_util.Partial(jax.jit(jax.checkpoint(f.func)), *f.args), (2, 0)


def equinox_cnn():
    keys = jax.random.split(KEY, 2)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 5, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(5, 4, 3, stride=2, key=keys[1]),
            eqx.nn.Lambda(lambda x: x.mean((1, 2))),
        ]
    )
    params, static = eqx.partition(net, eqx.is_array)

    def apply(params, x, key=None):
        return jax.vmap(eqx.combine(params, static))(jnp.transpose(x, (0, 3, 1, 2)))

    return jax.tree_util.Partial(apply, params), (2, 0)


def haiku_cnn():
    def forward(x):
        x = hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID")(jax.nn.relu(hk.Conv2D(6, 3)(x)))
        return hk.Linear(4)(hk.Flatten()(hk.Conv2D(5, 1)(x)))

    net = hk.without_apply_rng(hk.transform(forward))
    return jax.tree_util.Partial(net.apply, net.init(KEY, X[:1])), (2, 0)


def grouped_and_scanned():
    kernel = 0.3 * jnp.ones((3, 3, 1, 3))
    square = 0.1 * jnp.ones((3, 3, 3, 3))
    numbers = ("NHWC", "HWIO", "NHWC")

    def f(x):  # takes no key
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=3
        )

        def body(x, _):
            x = lax.conv_general_dilated(
                x, square, (1, 1), "SAME", dimension_numbers=numbers
            )
            return x, None

        x, _ = lax.scan(body, x, None, 2)
        x = lax.conv_general_dilated(
            x, square, (2, 2), "SAME", dimension_numbers=numbers
        )
        return x.mean((1, 2))

    return f, (1, 2)


NETS = (
    linen_cnn,
    nchw_cnn,
    checkpointed_cnn,
    equinox_cnn,
    haiku_cnn,
    grouped_and_scanned,
)


@pytest.mark.parametrize("make", NETS)
def test_same_values_same_gradients_and_the_right_count(make):
    f, counts = make()
    assert count_convolutions(f, X) == counts
    g = canonicalize(f)

    def value_and_gradients(f, x):
        def score(f, x):
            logits = f(x)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.value_and_grad(score, (0, 1), has_aux=True, allow_int=True)(f, x)

    if isinstance(f, jax.tree_util.Partial):
        ours, theirs = (jax.jit(value_and_gradients)(h, X) for h in (g, f))
    else:
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda x, h=h: jnp.sum(jnp.sin(h(x)))))(X)
            for h in (g, f)
        )
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=2e-5 * scale, rtol=0)


def test_nothing_ordinary_is_left_and_doing_it_twice_changes_nothing():
    f, _ = linen_cnn()
    g = canonicalize(f)
    assert count_convolutions(g, X) == (0, 0)
    assert "reduce_window" not in str(jax.make_jaxpr(g)(X))
    np.testing.assert_array_equal(jax.jit(canonicalize(g))(X), jax.jit(g)(X))


def test_our_own_models_need_no_replacement():
    model = small_cnn(4)
    f = logits_fn(model, *model.init(KEY, X[:1]))
    assert count_convolutions(f, X) == (0, 0)


def test_two_checkpoints_share_one_trace():
    f, _ = nchw_cnn()
    traces = []

    @jax.jit
    def run(f, x):
        traces.append(1)
        return f(x)

    first = run(canonicalize(f), X)
    second = run(canonicalize(jax.tree.map(lambda leaf: 2 * leaf, f)), X)
    assert len(traces) == 1
    assert not np.allclose(first, second)


def test_keys_reach_functions_that_take_them():
    def noisy(x, key=None):
        noise = 0.0 if key is None else jax.random.normal(key, (1, 3))
        return x.mean((1, 2)) + noise

    g = canonicalize(noisy)
    np.testing.assert_array_equal(g(X), noisy(X))
    np.testing.assert_array_equal(g(X, KEY), noisy(X, KEY))
    np.testing.assert_array_equal(g(X, key=KEY), noisy(X, KEY))
    plain = canonicalize(lambda x: x.mean((1, 2)))
    np.testing.assert_array_equal(plain(X, KEY), plain(X))


def test_custom_derivative_rules_are_kept():
    kernel = jnp.ones((3, 3, 3, 4))

    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(
            lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )

    straight_through.defvjp(
        lambda x: (straight_through(x), None), lambda _, g: (g[..., :3],)
    )
    assert count_convolutions(straight_through, X) == (0, 1)
    gradient = jax.grad(lambda x: canonicalize(straight_through)(x).sum())(X)
    np.testing.assert_array_equal(gradient, np.ones_like(X))


def test_under_vmap_and_scan():
    f, _ = nchw_cnn()

    def attack(f, x):
        def body(x, _):
            return x + 0.1 * jnp.sign(jax.grad(lambda x: f(x).sum())(x)), None

        return lax.scan(body, x, None, 2)[0]

    stacked = jnp.stack([X, X[::-1]])
    ours, theirs = (
        jax.jit(lambda h, x: jax.vmap(lambda x: attack(h, x))(x))(h, stacked)
        for h in (canonicalize(f), f)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
