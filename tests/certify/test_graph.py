"""Nets read from their jaxprs: float64 values, constants, rounding, local bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from robustjax import models
from robustjax.certify.evaluate import logits, rounding
from robustjax.certify.lipschitz import lipschitz, slope, steepest_gradient
from robustjax.certify.local import local_constants, local_radius
from robustjax.certify.operator_norms import operator_norm
from robustjax.certify.operators import dense
from robustjax.certify.radius import all_constants, certified_radius
from robustjax.certify.trace import trace
from robustjax.models.importers.layers import from_layers
from robustjax.models.lipschitz import lipschitz_net

NORMS = ("Linf", "L2", "L1")


class Users(nn.Module):
    """Layers as a user may write them."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.Conv(4, (3, 3))(x), (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        x = jnp.concatenate([jnp.tanh(x), jnp.abs(nn.Conv(2, (1, 1))(x))], -1)
        x = jnp.clip(nn.avg_pool(x, (2, 2), (2, 2)), -0.4, 0.3)
        first, second = jnp.split(x, 2, -1)
        x = jnp.maximum(first, second).reshape(x.shape[0], -1)
        x = jnp.einsum("oi,bi->bo", jnp.ones((5, x.shape[1])) * 0.3, x)
        return nn.sigmoid(nn.Dense(3)(x)) - 2.0 * x[:, 1:4]


def residual():
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(4, 1, 3, 3)).astype("f") * 0.4,
        "b": rng.normal(size=(4,)).astype("f"),
        "c": rng.normal(size=(4, 4, 3, 3)).astype("f") * 0.3,
        "d": rng.normal(size=(4, 4, 1, 1)).astype("f"),
        "e": rng.normal(size=(3, 16)).astype("f"),
    }
    conv = {"op": "conv", "w": "c", "padding": 1}
    spec = [
        {"op": "normalize", "mean": [0.3], "std": [0.5]},
        {"op": "conv", "w": "a", "b": "b", "padding": [0, 0, 1, 1], "stride": 2},
        {"op": "relu"},
        {"op": "residual", "main": [{"op": "relu"}, conv], "shortcut": []},
        {"op": "residual", "main": [conv], "shortcut": [{"op": "conv", "w": "d"}]},
        {"op": "relu"},
        {"op": "avgpool", "k": 2},
        {"op": "flatten"},
        {"op": "dense", "w": "e"},
    ]
    return from_layers(spec, arrays)


NETS = {
    "mlp": (models.mlp((7, 6), 3), (4, 4, 1)),
    "silu": (models.mlp((7,), 3, activation="silu"), (4, 4, 1)),
    "cnn": (models.small_cnn(3, channels=(3, 4), hidden=5), (4, 4, 1)),
    "preact": (models.wide_resnet(10, 1, 3, base_width=2), (8, 8, 1)),
    "lipschitz": (lipschitz_net(3, channels=(4,), hidden=(6,)), (4, 4, 1)),
    "residual": (residual(), (9, 9, 1)),
    "user": (models.from_linen(Users()), (8, 8, 2)),
}


@pytest.fixture(scope="module", params=NETS)
def net(request):
    """A net with random weights and statistics, its graph, constants and examples."""
    model, shape = NETS[request.param]
    x = np.random.default_rng(1).uniform(size=(3, *shape)).astype(np.float32)
    params, extra = jax.jit(model.init)(jax.random.key(0), x)
    extra = jax.tree.map(lambda a: a + jnp.linspace(0.05, 0.2, a.size), extra)
    f = jax.jit(models.logits_fn(model, params, extra))
    graph = trace(f, x)
    return request.param, f, graph, all_constants(graph), x


def sizes(delta, norm):
    order = {"Linf": np.inf, "L2": 2, "L1": 1}[norm]
    return np.linalg.norm(delta.reshape(len(delta), -1), order, axis=1)


def test_float64_logits_agree_and_float32_stays_within_its_bound(net):
    _, f, graph, constants, x = net
    z, exact = np.asarray(f(x), np.float64), logits(graph, x)
    np.testing.assert_allclose(z, exact, rtol=2e-5, atol=2e-5)
    bound = rounding(graph, x, constants["L2"], np.zeros(len(x)))
    error = z - exact
    moved = np.abs(error[:, :, None] - error[:, None, :])
    assert (moved <= bound).all()
    assert bound.max() < 0.05 * np.abs(exact).max()


@functools.partial(jax.jit, static_argnums=0)
def one_gradient(f, x, row):
    return jax.grad(lambda x: (f(x) @ row).sum())(x)


def jacobians(f, x):
    rows = [one_gradient(f, x, row) for row in np.eye(3, dtype=np.float32)]
    found = np.asarray(np.stack(rows, 1), np.float64)
    return found.reshape(*found.shape[:2], -1)


@pytest.mark.parametrize("norm", NORMS)
def test_constants_bound_every_gradient_and_every_slope(net, norm):
    _, f, _, constants, x = net
    found = constants[norm]
    order = {"Linf": 1, "L2": 2, "L1": np.inf}[norm]
    rows = jacobians(f, x)
    assert (np.linalg.norm(rows, order, axis=2) <= found.each).all()
    pairs = np.linalg.norm(rows[:, :, None] - rows[:, None, :], order, axis=3)
    assert (pairs <= found.pairs).all()
    assert (found.pairs <= found.each[:, None] + found.each + 1e-9).all()
    rng = np.random.default_rng(2)
    for width in (1e-2, 0.3):
        other = x + width * rng.normal(size=x.shape).astype(np.float32)
        moved = np.asarray(f(other) - f(x), np.float64)
        assert (sizes(moved, norm) <= found.vector * sizes(other - x, norm)).all()
        if norm == "L2":
            largest = found.pairs.max() / np.sqrt(2)
            assert largest <= found.vector * (1 + 1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_local_constants_bound_the_gradients_in_the_ball(net, norm):
    name, f, graph, constants, x = net
    y = np.asarray(f(x)).argmax(1)
    rng = np.random.default_rng(3)
    order = {"Linf": 1, "L2": 2, "L1": np.inf}[norm]

    def slopes(at):
        rows = jacobians(f, at)
        return np.linalg.norm(rows[np.arange(3), y][:, None] - rows, order, axis=2)

    for radius in (0.0, 0.05):
        bound = local_constants(graph, x, y, norm, radius, constants)
        assert (bound <= constants[norm].pairs[y]).all()
        for _ in range(3):
            delta = rng.normal(size=x.shape)
            length = sizes(delta, norm).reshape(-1, 1, 1, 1)
            at = (x + radius * delta / length).astype(np.float32)
            assert (slopes(at) <= bound * (1 + 1e-4) + 1e-5).all()
        if radius == 0 and name in ("mlp", "cnn", "residual", "lipschitz"):
            np.testing.assert_allclose(bound, slopes(x), rtol=1e-3, atol=1e-5)


def test_the_local_radius_is_not_below_the_global_one(net):
    _, f, graph, constants, x = net
    y = np.asarray(f(x)).argmax(1)
    near = certified_radius(graph, x, y, "L2", constants)
    local = local_radius(graph, x, y, "L2", constants, num_steps=2)
    assert (local >= near * (1 - 1e-6)).all()


@pytest.mark.parametrize("net", ["cnn", "residual"], indirect=True)
def test_the_search_stays_below_the_constant(net):
    _, f, _, constants, x = net
    y = np.asarray(f(x)).argmax(1)
    at_x = steepest_gradient(f, x, y, "L2", num_steps=1, radius=0.0)
    found = steepest_gradient(f, x, y, "L2", num_steps=5)
    assert (found >= at_x * (1 - 1e-5)).all()
    assert (found <= constants["L2"].pairs[y].max(1)).all()


def test_maxmin_keeps_the_constant_and_aol_keeps_it_at_one():
    model = lipschitz_net(3, channels=(4,), hidden=(6,))
    x = np.zeros((1, 4, 4, 1))
    params, extra = jax.jit(model.init)(jax.random.key(0), x)
    noise = jax.random.normal
    params = jax.tree.map(lambda a: a + noise(jax.random.key(1), a.shape), params)
    graph = trace(models.logits_fn(model, params, extra), x)
    assert "pair" in [node.kind for node in graph.nodes]
    assert 0.05 < lipschitz(graph, "L2").vector <= 1 + 1e-6


def test_batch_normalization_is_folded():
    """Behind a convolution its factor joins the kernel: no product of two norms."""
    rng = np.random.default_rng(0)
    w, factor = rng.normal(size=(6, 5)), rng.uniform(0.1, 3, size=5)
    w, factor = w.astype(np.float32), factor.astype(np.float32)
    graph = trace(lambda x: x @ w * factor[None], np.zeros((1, 6)))
    exact = np.linalg.svd(w * factor, compute_uv=False)[0]
    assert exact <= lipschitz(graph, "L2").vector <= 1.01 * exact


def test_slopes_of_curves():
    at = np.linspace(-6, 6, 200_001)
    gate = 1 / (1 + np.exp(-at))
    nodes = {"silu": at * gate, "logistic": gate, "tanh": np.tanh(at)}
    for kind, values in nodes.items():
        steepest = np.abs(np.diff(values) / np.diff(at)).max()
        node = trace(lambda x: x, np.zeros((1, 1))).nodes[0]._replace(kind=kind)
        assert steepest <= slope(node, "L2") * (1 + 1e-9)
        assert slope(node, "L2") < 1.001 * steepest


@pytest.mark.parametrize(
    ("f", "complaint"),
    [
        (lambda x: x * x, "mul"),
        (lambda x: jax.nn.softmax(x), "exp"),
        (lambda x: x.astype(jnp.bfloat16), "bfloat16"),
        (lambda x: jnp.round(x), "round"),
        (lambda x: jnp.ones((1, 3)), "do not depend on x"),
        (lambda x: x[:, 0], "shape"),
    ],
)
def test_what_is_not_known_is_refused(f, complaint):
    with pytest.raises(ValueError, match=complaint):
        trace(f, np.zeros((1, 3)))


FORMS = {
    "grouped": (4, {"feature_group_count": 2}),
    "dilated kernel": (2, {"rhs_dilation": (2, 1)}),
    "transposed": (2, {"lhs_dilation": (2, 2)}),
    "strided, cropped": (2, {"window_strides": (2, 1), "padding": ((-1, 1), (2, 0))}),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("order", ["NHWC", "NCHW"])
def test_every_form_of_a_convolution_is_read_rightly(name, order):
    channels, change = FORMS[name]
    arguments = {"window_strides": (1, 1), "padding": ((1, 1), (0, 2)), **change}
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    shape = (5, 6, channels) if order == "NHWC" else (channels, 5, 6)
    x = rng.normal(size=(3, *shape)).astype(np.float32)

    def f(x):
        out = jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=(order, "HWIO", order), **arguments
        )
        return out.reshape(x.shape[0], -1)

    graph = trace(f, x)
    np.testing.assert_allclose(logits(graph, x), f(x), rtol=1e-4, atol=1e-5)
    chain = graph.logits.terms[0][1]
    exact = np.linalg.svd(dense(chain), compute_uv=False)[0]
    assert exact <= operator_norm(chain, "L2") <= 1.01 * exact
