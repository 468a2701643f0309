"""Rematerialization changes what is kept, never what comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models

X = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype("float32")
OPTIONS = {"activation": "silu", "num_classes": 3, "convolution": "plain"}
NET = functools.partial(models.wide_resnet, 10, 1, base_width=4, **OPTIONS)


def loss(model, extra, params):
    logits, updated = model.apply(params, extra, jnp.asarray(X), train=True)
    return jnp.square(logits).sum(), updated


def kept(model, params, extra):
    """How many numbers wait for the backward pass; its weights are not counted."""

    def residuals(params):
        return jax.vjp(functools.partial(loss, model, extra), params, has_aux=True)[1]

    weights = [leaf.shape for leaf in jax.tree.leaves(params)]
    leaves = jax.tree.leaves(jax.eval_shape(residuals, params))
    return sum(leaf.size for leaf in leaves if leaf.shape not in weights)


def test_less_is_kept_and_the_gradient_is_the_same():
    plain = NET()
    nets = [plain, models.rematerialized(plain), NET(remat=True)]
    params, extra = jax.jit(plain.init)(jax.random.key(0), X)
    for other in nets[1:]:  # the same names and shapes: checkpoints fit
        shapes = jax.eval_shape(other.init, jax.random.key(0), X)
        assert jax.tree.structure(shapes) == jax.tree.structure((params, extra))
    found = []
    for model in nets:
        grad = jax.grad(functools.partial(loss, model, extra), has_aux=True)
        found.append(jax.jit(grad)(params))
    for other in found[1:]:
        for a, b in zip(*map(jax.tree.leaves, (found[0], other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    plain, products, blocks = (kept(model, params, extra) for model in nets)
    # Beside a convolution's output, BatchNorm and SiLU keep two to four arrays.
    assert products < plain / 2
    assert blocks < plain / 2


def test_equal_models_are_equal_and_others_refused():
    assert models.rematerialized(NET()) == models.rematerialized(NET())
    with pytest.raises(TypeError, match="no Model"):
        models.rematerialized(models.wide_resnet)
