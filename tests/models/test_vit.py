"""The vision transformer against independent arithmetic in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax import models
from robustjax.models.vit import attention, patches


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def block(x, p, heads):
    y = norm(x, p["norm1"])
    query, key, value = (dense(y, p[name]) for name in ("query", "key", "value"))
    width = x.shape[-1] // heads
    out = np.zeros_like(x)
    for b in range(len(x)):
        for h in range(heads):
            at = slice(h * width, (h + 1) * width)
            scores = query[b, :, at] @ key[b, :, at].T / np.sqrt(width)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, :, at] = weights @ value[b, :, at]
    x = x + dense(out, p["out"])
    y = dense(norm(x, p["norm2"]), p["mlp1"])
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return x + dense(y, p["mlp2"])


def transcribed(params, x, size, heads, pool):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = (x.astype(np.float64) - 0.5) / 0.5
    rows = [
        np.stack([
            image[r : r + size, c : c + size].reshape(-1)
            for r in range(0, x.shape[1], size)
            for c in range(0, x.shape[2], size)
        ])
        for image in x
    ]  # fmt: skip
    x = dense(np.stack(rows), p["embed"])
    if pool == "token":
        x = np.concatenate([np.repeat(p["token"], len(x), 0), x], 1)
    x = x + p["place"]
    for i in range(2):
        x = block(x, p[f"block{i + 1}"], heads)
    x = norm(x, p["norm"])
    return dense(x[:, 0] if pool == "token" else x.mean(1), p["head"])


def noise(leaf):
    return leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_logits_are_those_of_a_transcription(pool):
    x = np.random.default_rng(0).uniform(size=(2, 4, 8, 3)).astype(np.float32)
    model = models.vit(4, 8, 2, 2, 3, pool=pool)
    params, extra = jax.jit(model.init)(jax.random.key(0), x)
    params = jax.tree.map(noise, params)
    logits, _ = jax.jit(model.apply)(params, extra, x)
    expected = transcribed(params, x, 4, 2, pool)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_attention_and_its_derivatives_are_those_of_the_formula():
    def formula(query, key, value):
        scores = jnp.einsum("bthd,bshd->bhts", query, key) / jnp.sqrt(query.shape[-1])
        weights = jnp.exp(scores)
        weights /= weights.sum(-1, keepdims=True)
        return jnp.einsum("bhts,bshd->bthd", weights, value)

    def second(f, primals, tangents):
        """Reverse over reverse: a gradient of a directional derivative."""

        def along(*xs):
            _, pull = jax.vjp(f, *xs)
            return sum(
                jnp.vdot(a, b) for a, b in zip(pull(f(*xs)), tangents, strict=True)
            )

        return jax.grad(along, (0, 1, 2))(*primals)

    def everything(f, primals, tangents):
        out, pull = jax.vjp(f, *primals)
        forward = jax.jvp(f, primals, tangents)
        return forward, pull(jnp.cos(out)), second(f, primals, tangents)

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = [(2, 4, 3, 5), (2, 6, 3, 5), (2, 6, 3, 5)]
        primals, tangents = (
            tuple(jnp.asarray(rng.normal(size=s)) for s in shapes) for _ in range(2)
        )
        ours, expected = (
            jax.jit(everything, static_argnums=0)(f, primals, tangents)
            for f in (attention, formula)
        )
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10)  # noqa: E731
        jax.tree.map(close, ours, expected)


def test_attention_in_bfloat16_is_closer_than_what_autodiff_writes():
    """To float32 arithmetic on the same bfloat16 numbers: no gradient of the weights is
    rounded on its way to queries and keys."""
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=(2, 32, 2, 8)), jnp.bfloat16) for _ in range(4)]

    def gradients(f, dtype):
        *qkv, g = (x.astype(dtype) for x in xs)
        out, pull = jax.vjp(f, *qkv)
        assert out.dtype == dtype
        return [np.asarray(d, np.float32) for d in jax.jit(pull)(g)]

    def errors(f):
        exact = gradients(f, jnp.float32)
        low = gradients(f, jnp.bfloat16)
        pairs = zip(low, exact, strict=True)
        return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]

    ours, plain = errors(attention), errors(jax.nn.dot_product_attention)
    assert max(ours) < 2**-8
    assert ours[0] < 0.9 * plain[0]
    assert ours[1] < 0.9 * plain[1]


def test_computing_activations_again_changes_nothing():
    x = np.random.default_rng(0).uniform(size=(2, 4, 4, 1)).astype(np.float32)
    grads = []
    for remat in (False, True):
        model = models.vit(2, 4, 1, 2, 3, remat=remat)
        params, extra = jax.jit(model.init)(jax.random.key(0), x)
        total = lambda p, x, m=model: jnp.sum(m.apply(p, {}, x)[0] ** 2)  # noqa: E731
        grads.append(jax.jit(jax.grad(total, argnums=(0, 1)))(params, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *grads)


def test_bad_sizes_say_the_fix():
    with pytest.raises(ValueError, match="patch_size=3 does not divide images of 8x8"):
        patches(jnp.zeros((1, 8, 8, 1)), 3)
    with pytest.raises(ValueError, match="width=9 is no multiple of num_heads=2"):
        models.vit(4, 9, 1, 2)
    with pytest.raises(ValueError, match="pool='max'"):
        models.vit(4, 8, 1, 2, pool="max")
