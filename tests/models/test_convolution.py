"""The canonical convolution against XLA's own: values and every derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from robustjax.models import forms
from robustjax.models.convolution import (
    canonical_convolution,
    conv2d,
    has_own_rule,
    tpu_input_gradient,
)
from robustjax.models.forms import DIMENSIONS, Geometry, direct


def close(actual, expected, tolerance=2e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, atol=tolerance * scale, rtol=0)


def normal(seed, shape):
    """NumPy's numbers: JAX would compile a program for every shape."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def derivatives(function, x, kernel, cotangent, *, twice):
    """Value, both gradients, and both gradients of a function of the gradients."""

    def score(x, kernel):
        return jnp.sum(cotangent * jnp.sin(function(x, kernel)))

    def penalty(x, kernel):
        dx, dk = jax.grad(score, (0, 1))(x, kernel)
        return jnp.sum(jnp.square(dx)) + jnp.sum(jnp.tanh(dk))

    def all_of_them(x, kernel):
        gradients = jax.grad(score, (0, 1))(x, kernel)
        second = jax.grad(penalty, (0, 1))(x, kernel) if twice else ()
        return function(x, kernel), gradients, second

    return jax.jit(all_of_them)(x, kernel)


def canonical(x, kernel, geometry):
    return canonical_convolution(x, kernel, geometry)  # which takes no keywords


def compare(x_shape, kernel_shape, geometry, *, twice=True):
    x, kernel = normal(0, x_shape), 0.3 * normal(1, kernel_shape)
    out = jax.eval_shape(lambda x, k: direct(x, k, geometry), x, kernel)
    cotangent = normal(2, out.shape)
    ours, plain = (
        derivatives(
            functools.partial(f, geometry=geometry), x, kernel, cotangent, twice=twice
        )
        for f in (canonical, direct)
    )
    jax.tree.map(close, ours, plain)


# One row per form and edge: every branch of forms.convolve and forms.kernel_gradient.
CASES = {
    "direct": ((2, 6, 6, 5), (3, 3, 5, 18), Geometry((1, 1), ((1, 1), (1, 1)))),
    "by taps": ((2, 6, 7, 8), (3, 5, 8, 2), Geometry((1, 1), ((1, 0), (2, 1)))),
    "few inputs": ((2, 7, 6, 1), (5, 5, 1, 9), Geometry((1, 1), ((2, 2), (2, 2)))),
    "few inputs, stride": (
        (2, 8, 9, 3),
        (3, 3, 3, 9),
        Geometry((2, 2), ((1, 1), (1, 1))),
    ),
    "stride 2": ((2, 8, 8, 6), (3, 3, 6, 10), Geometry((2, 2), ((1, 1), (1, 1)))),
    "stride 2, odd": ((2, 7, 9, 6), (3, 3, 6, 10), Geometry((2, 2), ((0, 1), (1, 0)))),
    "stride 3, kernel 2": ((2, 10, 8, 6), (2, 2, 6, 5), Geometry((3, 3))),
    "strides differ": ((2, 8, 8, 6), (4, 3, 6, 5), Geometry((2, 1), ((1, 2), (1, 1)))),
    "1 x 1": ((2, 5, 5, 6), (1, 1, 6, 9), Geometry()),
    "1 x 1, stride 2": ((2, 5, 6, 6), (1, 1, 6, 9), Geometry((2, 2))),
    "1 x 1, padded": ((2, 5, 5, 6), (1, 1, 6, 9), Geometry((2, 2), ((1, 0), (2, 1)))),
    "large kernel": ((2, 12, 12, 5), (9, 9, 5, 4), Geometry((1, 1), ((4, 4), (4, 4)))),
    "dilated kernel": (
        (2, 9, 9, 6),
        (3, 3, 6, 5),
        Geometry((1, 1), ((2, 2), (2, 2)), rhs_dilation=(2, 2)),
    ),
    "dilated input": (
        (2, 4, 4, 6),
        (3, 3, 6, 5),
        Geometry((1, 1), ((1, 2), (1, 2)), lhs_dilation=(2, 2)),
    ),
    "everything": (
        (2, 6, 6, 6),
        (3, 2, 6, 5),
        Geometry((2, 1), ((2, 2), (1, 2)), (2, 3), (1, 2)),
    ),
    "wide padding": ((2, 4, 4, 6), (3, 3, 6, 5), Geometry((2, 2), ((4, 5), (3, 4)))),
    "batch of one": ((1, 4, 4, 6), (3, 3, 6, 16), Geometry((1, 1), ((1, 1), (1, 1)))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_gradients_and_double_backward(case):
    compare(*case)


@pytest.mark.parametrize("most", (2, 16))
@pytest.mark.parametrize(
    "name", ("direct", "stride 2, odd", "stride 3, kernel 2", "wide padding")
)
def test_a_kernel_gradient_in_parts(name, most, monkeypatch):
    monkeypatch.setattr(forms, "CACHED", 1)
    monkeypatch.setattr(forms, "MOST_PARTS", most)
    assert len(forms._parts(3, 100)) == min(most, 3)
    compare(*CASES[name], twice=False)


@settings(max_examples=6)
@given(data=st.data())
def test_any_geometry_agrees_with_the_ordinary_convolution(data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    window = pair(1, 4)
    size = (window[0] + pair(0, 5)[0], window[1] + pair(0, 5)[1])
    channels = data.draw(st.sampled_from((1, 3, 6)))
    features = data.draw(st.sampled_from((1, 3, 6, 17)))
    geometry = Geometry(pair(1, 3), (pair(0, 2), pair(0, 2)))
    compare((2, *size, channels), (*window, channels, features), geometry, twice=False)


@pytest.mark.parametrize("padding", ("SAME", "VALID", ((1, 2), (0, 1))))
@pytest.mark.parametrize("strides", ((1, 1), (2, 2)))
def test_conv2d_pads_as_lax_does(padding, strides):
    x, kernel = normal(0, (2, 7, 8, 5)), normal(1, (3, 2, 5, 6))
    expected = lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=DIMENSIONS
    )
    for word in ("plain", "canonical"):
        close(conv2d(x, kernel, strides, padding, convolution=word), expected)


@pytest.mark.parametrize("name", ("by taps", "stride 2"))
def test_under_vmap_over_inputs_and_over_kernels(name):
    x_shape, kernel_shape, geometry = CASES[name]
    x, kernel = normal(0, (3, *x_shape)), normal(1, (3, *kernel_shape))

    def gradients(function):
        def one(x, k):
            return jax.grad(
                lambda *a: jnp.sum(jnp.sin(function(*a, geometry))), (0, 1)
            )(x, k)

        def both(x, k):
            return jax.vmap(one)(x, k), jax.vmap(one, (0, None))(x, k[0])

        return jax.jit(both)(x, kernel)

    jax.tree.map(close, gradients(canonical_convolution), gradients(direct))


def test_forward_mode_needs_the_plain_convolution():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 3))

    def tangent(word):
        return jax.jvp(lambda x: conv2d(x, kernel, convolution=word), (x,), (x,))[1]

    close(tangent("plain"), conv2d(x, kernel, convolution="plain"))
    with pytest.raises(TypeError, match="forward-mode"):
        tangent("canonical")


def test_bfloat16_is_computed_directly():
    x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 8, 2), jnp.bfloat16)
    gradient = jax.grad(
        lambda x: jnp.sum(conv2d(x, kernel, convolution="canonical")).astype("float32")
    )(x)
    assert gradient.dtype == jnp.bfloat16 and gradient[0, 1, 1, 0] == 18


def test_every_convolution_in_the_double_backward_is_canonical():
    x, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6, 20))
    geometry = Geometry((1, 1), ((1, 1), (1, 1)))

    def score(x, k):
        return jnp.sum(jnp.sin(canonical_convolution(x, k, geometry)))

    def penalty(x, k):
        return jnp.sum(jnp.square(jax.grad(score)(x, k)))

    text = str(jax.make_jaxpr(jax.grad(penalty, (0, 1)))(x, kernel))
    numbers = [part.split("\n")[0] for part in text.split("dimension_numbers=")[1:]]
    specs = [line for line in numbers if "ConvDimensionNumbers" in line]
    assert len(specs) >= 4
    for line in specs:
        assert "lhs_spec=(0, 3, 1, 2)" in line and "rhs_spec=(3, 2, 0, 1)" in line
        assert "out_spec=(0, 3, 1, 2)" in line


def test_the_word_is_checked():
    assert has_own_rule("canonical") and not has_own_rule("plain")
    with pytest.raises(ValueError, match="convolution='fast'"):
        has_own_rule("fast")


@pytest.mark.parametrize("pads", (((1, 1), (1, 1)), ((2, 0), (0, 1))))
def test_the_rule_for_tpus_is_the_gradient(pads):
    """No TPU here: its branch by itself, beside autodiff's, in float64."""
    geometry = Geometry(padding=pads)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, 7, 6, 5), jnp.float64)
        kernel = jax.random.normal(jax.random.key(1), (3, 2, 5, 4), jnp.float64)
        out, pull = jax.vjp(lambda x: direct(x, kernel, geometry), x)
        g = jax.random.normal(jax.random.key(2), out.shape, jnp.float64)
        found = tpu_input_gradient(x, kernel, g, geometry)
        np.testing.assert_allclose(found, pull(g)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "edge, size, strides",
    ((1, (8, 6), (2, 2)), (1, (7, 5), (2, 3)), (3, (8, 6), (2, 2))),
)
def test_of_a_strided_convolution_too(edge, size, strides):
    pad = (edge // 2, edge // 2)
    geometry = Geometry(strides, (pad, pad))
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, *size, 5), jnp.float64)
        kernel = jax.random.normal(jax.random.key(1), (edge, edge, 5, 4), jnp.float64)
        out, pull = jax.vjp(lambda x: direct(x, kernel, geometry), x)
        g = jax.random.normal(jax.random.key(2), out.shape, jnp.float64)
        found = tpu_input_gradient(x, kernel, g, geometry)
        np.testing.assert_allclose(found, pull(g)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size, dilated", ((1, False), (3, True)))
def test_programs_for_tpus_have_no_holes_under_pixel_products(kernel_size, dilated):
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((kernel_size, kernel_size, 2, 3))
    gradient = jax.jit(
        jax.grad(lambda x: jnp.sum(jnp.square(conv2d(x, kernel, (2, 2)))))
    )
    text = gradient.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert ("lhs_dilate = [2, 2]" in text) is dilated


def test_programs_for_tpus_pack_kernels_and_others_do_not():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 3))
    gradient = jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(conv2d(x, k))))
    # Both kernels and the cotangent.
    for platform, barriers in (("tpu", 3), ("cuda", 0)):
        text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("optimization_barrier") == barriers, platform
