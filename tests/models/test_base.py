"""The model contract: adapters, and logits functions that are data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from robustjax.models.base import Model, from_linen, from_nnx, logits_fn
from robustjax.models.mlp import mlp

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 4)), jnp.float32)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.dense(self.norm(x)))


MAKERS = {
    "linen": lambda: from_linen(LinenNet()),
    "nnx": lambda: from_nnx(lambda rngs: NnxNet(rngs)),
}


def running_mean(extra):
    means = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(extra)
        if "mean" in jax.tree_util.keystr(path)
    ]
    assert len(means) == 1
    return means[0]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_an_adapter_keeps_the_contract(make):
    model = make()
    params, extra = model.init(KEY, X[:1])
    # Evaluation: the same extra, no noise, even with a key.
    logits, same = jax.jit(model.apply)(params, extra, X)
    again, _ = jax.jit(model.apply)(params, extra, X, key=KEY)
    assert logits.shape == (6, 3)
    np.testing.assert_array_equal(logits, again)
    assert jax.tree.structure(same) == jax.tree.structure(extra)
    np.testing.assert_array_equal(running_mean(same), running_mean(extra))
    # Training: statistics move halfway to the batch's, the structure stays.
    train = jax.jit(lambda p, e, k: model.apply(p, e, X, train=True, key=k))
    first, updated = train(params, extra, KEY)
    np.testing.assert_allclose(running_mean(updated), X.mean(0) / 2, atol=1e-6)
    assert jax.tree.structure(updated) == jax.tree.structure(extra)
    # Dropout follows the key and nothing else.
    np.testing.assert_array_equal(first, train(params, extra, KEY)[0])
    assert not np.array_equal(first, train(params, extra, jax.random.key(1))[0])
    # Gradients flow in training, to every weight.
    gradient = jax.grad(
        lambda p: jnp.sum(jnp.square(model.apply(p, extra, X, train=True, key=KEY)[0]))
    )(params)
    assert all(float(jnp.abs(leaf).sum()) > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_two_checkpoints_share_one_trace_and_one_program(make):
    traces = []

    @jax.jit
    def run(f, x):
        traces.append(1)
        return f(x, KEY)  # the key is for Dropout, in train mode

    model = make()
    checkpoints = [model.init(jax.random.key(seed), X[:1]) for seed in range(2)]
    first, second = (
        run(logits_fn(model, *checkpoint), X) for checkpoint in checkpoints
    )
    assert not np.allclose(first, second)
    # A model that is built again, equally, is the same model.
    run(logits_fn(make(), *checkpoints[0]), X)
    assert len(traces) == 1
    run(logits_fn(model, *checkpoints[0], train=True), X)
    assert len(traces) == 2


def test_train_mode_uses_the_batch_and_drops_the_updates():
    model = from_linen(nn.BatchNorm(use_running_average=None))
    params, extra = model.init(KEY, X)
    np.testing.assert_allclose(logits_fn(model, params, extra)(X), X, atol=1e-4)
    by_batch = logits_fn(model, params, extra, train=True)(X)
    np.testing.assert_allclose(by_batch.mean(0), np.zeros(4), atol=1e-5)
    np.testing.assert_array_equal(running_mean(extra), np.zeros(4))


def test_weights_are_leaves_and_the_rest_is_static():
    model = mlp((5,), 3)
    params, extra = model.init(KEY, X[:1])
    f = logits_fn(model, params, extra)
    assert len(jax.tree.leaves(f)) == len(jax.tree.leaves(params)) == 4
    # Weights are arguments of the program; its constants are one mean and one std.
    closed = jax.make_jaxpr(lambda f, x: f(x))(f, X)
    assert len(closed.jaxpr.invars) == 5
    assert sum(np.size(constant) for constant in closed.consts) == 2
    np.testing.assert_array_equal(f(X), f(X, key=KEY))


def test_plain_functions_are_a_model():
    model = Model(
        init=lambda key, x: ({"w": jnp.ones((x.shape[-1], 2))}, {}),
        apply=lambda p, e, x, *, train=False, key=None: (x @ p["w"], e),
    )
    f = logits_fn(model, *model.init(KEY, X))
    np.testing.assert_allclose(f(X)[:, 0], X.sum(1), rtol=1e-6)


def test_from_linen_names_what_it_was_given():
    with pytest.raises(TypeError, match="from_nnx"):
        from_linen(NnxNet(nnx.Rngs(0)))
