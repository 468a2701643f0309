"""The zoo: shapes, sizes, modes, and layers against independent arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from robustjax import models
from robustjax.models.cifar_resnet import ResNet
from robustjax.models.layers import (
    BatchNorm,
    _normalize_batch,
    average_pool,
    cast,
    max_pool,
    normalize,
)

pytestmark = pytest.mark.polished

KEY = jax.random.key(0)
# Compiling is what takes the time here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def uniform(*shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype("float32")


def parameters(model, shape):
    params, _ = jax.eval_shape(model.init, KEY, jnp.zeros(shape))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_imagenet_stem_is_the_papers():
    """A 7 x 7 convolution with stride 2, ReLU, and the maximum over 3 x 3 by 2."""
    form = (4, (), True, 5, (0.0,), (1.0,), 0.9, 0.0, 1, jnp.float32, "plain")
    model = models.from_linen(ResNet(*form, stem="imagenet"))
    x = uniform(2, 14, 14, 3)
    params, extra = model.init(KEY, x)
    logits, _ = model.apply(params, extra, x)
    out = lax.conv_general_dilated(
        *(x, params["stem"]["kernel"], (2, 2), [(3, 3), (3, 3)]),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # BatchNorm's running mean is 0 and its variance 1
    frame = [(0, 0), (1, 1), (1, 1), (0, 0)]
    out = jnp.pad(jnp.maximum(out, 0), frame, constant_values=-jnp.inf)
    out = np.max([out[:, i : i + 7 : 2, j : j + 7 : 2] for i, j in np.ndindex(3, 3)], 0)
    head = params["head"]
    expected = out.mean((1, 2)) @ head["kernel"] + head["bias"].reshape(1, -1)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="stem='large'"):
        models.resnet50(stem="large")


def test_sizes_are_the_published_ones():
    image = (1, 32, 32, 3)
    # kuangliu/pytorch-cifar's PreActResNet18 has 11,171,146 and no last BatchNorm.
    assert parameters(models.preact_resnet18(), image) == 11_171_146 + 2 * 512
    large = models.resnet50(1000, stem="imagenet")
    assert parameters(large, (1, 64, 64, 3)) == 25_557_032  # torchvision's
    # Zagoruyko & Komodakis, table 1: 36.5 M (28-10) and 8.9 M (40-4).
    assert parameters(models.wide_resnet(28, 10), image) == 36_479_194
    assert round(parameters(models.wide_resnet(40, 4), image) / 1e5) == 89
    assert parameters(models.madry_mnist(), (1, 28, 28, 1)) == 3_274_634
    # timm's vit_base_patch16_224 and vit_small_patch16_224.
    large = (1, 224, 224, 3)
    assert parameters(models.vit_base(pool="token"), large) == 86_567_656
    assert parameters(models.vit_small(pool="token"), large) == 22_050_664


MODELS = {
    "mlp": (models.mlp, {"features": (8,)}),
    "small_cnn": (models.small_cnn, {"channels": (4, 6), "hidden": 8}),
    "madry_mnist": (models.madry_mnist, {"channels": (4, 6), "hidden": 8}),
    "preact_resnet18": (
        models.preact_resnet18,
        {"width": 1, "activation": "silu", "batch_groups": 2},
    ),
    "wide_resnet": (models.wide_resnet, {"depth": 10, "widen_factor": 1}),
    "vit": (models.vit, {"patch_size": 4, "width": 8, "depth": 1, "num_heads": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_float32_in_both_precisions_and_convolutions_agree(name):
    make, options = MODELS[name]
    x = uniform(4, 8, 8, 3)
    jit = functools.partial(jax.jit, compiler_options=QUICK)

    def build(**more):
        return make(num_classes=3, **options, **more)

    model = build(mean=(0.5,), std=(0.25, 0.2, 0.3))
    params, extra = jit(model.init)(KEY, x)
    logits, updated = jit(lambda p, e, x: model.apply(p, e, x, train=True))(
        params, extra, x
    )
    assert logits.shape == (4, 3) and logits.dtype == jnp.float32
    assert jax.tree.structure(updated) == jax.tree.structure(extra)
    assert bool(extra) == ("resnet" in name)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    half = build(mean=(0.5,), std=(0.25, 0.2, 0.3), dtype=jnp.bfloat16)
    rough, _ = jit(half.apply)(params, extra, x)
    exact, _ = jit(model.apply)(params, extra, x)
    assert rough.dtype == jnp.float32 and not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, atol=0.1 * float(jnp.abs(exact).max()))
    if name not in ("mlp", "vit"):  # the switch to forward mode takes the same weights
        plain = build(mean=(0.5,), std=(0.25, 0.2, 0.3), convolution="plain")
        value, tangent = jit(
            lambda x: jax.jvp(lambda x: plain.apply(params, extra, x)[0], (x,), (x,))
        )(x)
        np.testing.assert_allclose(value, exact, atol=1e-4)
        assert tangent.shape == exact.shape


def test_ghost_groups_are_separate_batches():
    norm, one = BatchNorm(batch_groups=2), BatchNorm()
    x = 3 * uniform(6, 2, 2, 5) + 1
    variables = norm.init(KEY, x, train=True)
    both, _ = norm.apply(variables, x, train=True, mutable="batch_stats")
    halves = [
        one.apply(variables, half, train=True, mutable="batch_stats")[0]
        for half in (x[:3], x[3:])
    ]
    np.testing.assert_allclose(both, np.concatenate(halves), atol=1e-5)
    with pytest.raises(ValueError, match="batch_groups=2"):
        norm.apply(variables, x[:5], train=True, mutable="batch_stats")


def test_batch_norm_follows_its_definition():
    x = 3 * uniform(6, 2, 2, 5) + 1
    norm = BatchNorm(momentum=0.9, tiny=1e-5)
    variables = norm.init(KEY, x, train=False)
    scale, bias = uniform(5, seed=1), uniform(5, seed=2)
    variables = {**variables, "params": {"scale": scale, "bias": bias}}
    out, new = norm.apply(variables, x, train=True, mutable="batch_stats")
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(
        out, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, atol=1e-4
    )
    stats = jax.tree.map(np.asarray, new["batch_stats"])
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var * 24 / 23, rtol=1e-5)
    judged = norm.apply({**variables, **new}, x, train=False)
    np.testing.assert_allclose(
        judged,
        (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * scale + bias,
        atol=1e-4,
    )


def test_batch_norms_rule_is_the_derivative_of_its_definition():
    with jax.enable_x64():
        x, weight = (jnp.asarray(uniform(2, 6, 5, seed=i), float) for i in (0, 1))
        args = x, *(jnp.asarray(uniform(5, seed=i), float) for i in (2, 3))

        def ours(x, scale, bias):
            return _normalize_batch(x, scale, bias, 1e-5)

        def definition(x, scale, bias):
            mean, var = x.mean(1), x.var(1)
            out = (x - mean[:, None]) / jnp.sqrt(var[:, None] + 1e-5)
            return out * scale[None, None] + bias[None, None], mean, var

        def first(f):
            def loss(*args):
                out, mean, var = f(*args)
                return jnp.sum(weight * out**2) + jnp.sum(mean**2) + jnp.sum(var**3)

            return jax.grad(loss, (0, 1, 2))

        def second(f):
            def penalty(*args):
                return sum(jnp.sum(g**2) for g in first(f)(*args))

            return jax.grad(penalty, (0, 1, 2))

        def forward(f):
            return lambda *args: jax.jvp(f, args, (weight, args[2], args[1]))

        for derivative in (first, second, forward):
            got, wanted = (jax.jit(derivative(f))(*args) for f in (ours, definition))
            for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_pooling_agrees_with_reduce_window_and_shares_ties():
    x = uniform(2, 7, 8, 3)

    def reference(x):
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )

    np.testing.assert_array_equal(max_pool(x), reference(x))
    weight = uniform(2, 3, 4, 3, seed=1)
    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(weight * f(x)))(x)
        for f in (max_pool, reference)
    )
    np.testing.assert_array_equal(ours, theirs)

    # The rule of its own is differentiable again, and "plain" serves forward mode.
    def twice(convolution):
        def penalty(x):
            def inner(x):
                return jnp.sum(max_pool(x**2, convolution=convolution) * weight)

            return jnp.sum(jax.grad(inner)(x) ** 2)

        return jax.grad(penalty)(x)

    np.testing.assert_allclose(twice("canonical"), twice("plain"), 1e-6)

    def plain(x):
        return max_pool(x, convolution="plain")

    _, moved = jax.jvp(plain, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(moved, jnp.ones_like(moved))
    tied = jax.grad(lambda x: jnp.sum(max_pool(x)))(jnp.zeros((1, 2, 2, 1)))
    np.testing.assert_array_equal(tied, np.full((1, 2, 2, 1), 0.25))
    np.testing.assert_allclose(
        average_pool(x, 3), x[:, :6, :6].reshape(2, 2, 3, 2, 3, 3).mean((2, 4)), 1e-5
    )


def test_a_kernel_is_cast_as_astype_casts_it():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint64).astype("uint32")
    special = [np.inf, -np.inf, 0.0, -0.0, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8]
    kernel = np.concatenate([bits.view("float32"), np.float32(special)])
    kernel = kernel[~np.isnan(kernel)]
    for dtype in (jnp.bfloat16, jnp.float32):
        found = jax.jit(lambda k, dtype=dtype: cast(k, dtype))(kernel)
        expected = jnp.asarray(kernel).astype(dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(found, "float32").view("uint32"),
            np.asarray(expected, "float32").view("uint32"),
        )


def test_bad_arguments_say_the_fix():
    with pytest.raises(ValueError, match="one per channel"):
        normalize(jnp.zeros((1, 4, 4, 3)), (0.5, 0.5), (1.0,))
    with pytest.raises(ValueError, match="depth=12"):
        models.wide_resnet(12, 1)
    with pytest.raises(ValueError, match="activation='swish'"):
        models.mlp((4,), activation="swish").init(KEY, jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="cannot pool"):
        max_pool(jnp.zeros((1, 1, 4, 1)))
