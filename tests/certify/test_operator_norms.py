"""Operator norms against dense matrices: never below, and close."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from robustjax.certify import operator_norms
from robustjax.certify.operator_norms import (
    folded,
    operator_norm,
    spectral_bounds,
    torus_bound,
)
from robustjax.certify.operators import Op, adjoint, apply, dense
from robustjax.certify.trace import trace

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = [  # size, kernel, strides, pads
    ((5, 5, 2), (3, 3, 2, 3), (1, 1), ((1, 1), (1, 1))),
    ((6, 6, 2), (3, 3, 2, 3), (2, 2), ((1, 1), (1, 1))),
    ((6, 5, 1), (3, 2, 1, 4), (2, 1), ((0, 1), (0, 0))),
    ((8, 8, 1), (5, 5, 1, 2), (1, 1), ((2, 2), (2, 2))),
    ((4, 4, 3), (1, 1, 3, 2), (2, 2), ((0, 0), (0, 0))),
    ((5, 5, 2), (4, 4, 2, 2), (3, 3), ((2, 3), (1, 2))),
]


def chain_of(size, kernel, strides, pads):
    """The convolution as a chain, read from JAX, and its matrix, made by JAX."""

    def f(x):
        out = lax.conv_general_dilated(
            x, kernel, strides, pads, dimension_numbers=DIMENSIONS
        )
        return out.reshape(x.shape[0], -1)

    value = trace(f, np.zeros((1, *size))).logits
    basis = jnp.eye(int(np.prod(size))).reshape(-1, *size)
    return value.terms[0][1], np.asarray(f(basis), np.float64)


def kernels():
    for number, (size, shape, strides, pads) in enumerate(CONVOLUTIONS):
        kernel = np.random.default_rng(number).normal(size=shape).astype(np.float32)
        yield size, kernel, strides, pads
        yield size, np.abs(kernel), strides, pads  # smooth: where a torus is loosest


@pytest.mark.parametrize(
    "case", list(kernels()), ids=lambda c: f"{c[0]}{c[1].shape}{c[2]}"
)
def test_norms_of_convolutions_against_dense_matrices(case):
    chain, matrix = chain_of(*case)
    np.testing.assert_allclose(dense(chain), matrix, atol=1e-5)
    exact = np.linalg.svd(dense(chain), compute_uv=False)[0]
    assert exact <= operator_norm(chain, "L2") <= 1.01 * exact
    for norm, axis in (("Linf", 0), ("L1", 1)):
        sums = np.abs(dense(chain)).sum(axis).max()
        assert sums <= operator_norm(chain, norm) <= sums * (1 + 1e-8)
    # The bounds of large layers hold too; here they are allowed to be looser.
    size, kernel, strides, pads = case
    torus = torus_bound(kernel.astype(np.float64), size[:2], strides, pads)
    assert exact <= torus <= 2 * exact


def test_adjoints_are_adjoint():
    rng = np.random.default_rng(0)
    for case in kernels():
        chain, _ = chain_of(*case)
        x = rng.normal(size=(2, *chain[0].source))
        g = rng.normal(size=(2, *chain[-1].target))
        for absolute in (False, True):
            left = np.vdot(g, apply(chain, x, absolute))
            right = np.vdot(adjoint(chain, g, absolute), x)
            np.testing.assert_allclose(left, right, rtol=1e-10)


@pytest.mark.parametrize("shape", [(7, 5), (60, 300), (400, 300)])
def test_spectral_bounds_contain_the_largest_singular_value(shape):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=shape) * 1e-3
    exact = np.linalg.svd(matrix, compute_uv=False)[0]
    lower, upper = spectral_bounds(matrix)
    assert lower <= exact * (1 + 1e-12)
    assert exact <= upper <= 1.01 * exact


def test_spectral_bounds_of_close_and_of_no_singular_values():
    # The largest value hides in a cluster, where iterations converge slowly.
    values = np.concatenate([[1.0], np.linspace(0.9, 0.9999, 399)])
    q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(400, 400)))
    lower, upper = spectral_bounds(q * values)
    assert lower <= 1 <= upper <= 1.01
    assert spectral_bounds(np.zeros((3, 4))) == (0.0, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        spectral_bounds(np.full((2, 2), np.nan))


def test_a_wrong_guess_is_caught_by_the_proof(monkeypatch):
    """Were the iteration to miss the largest value, the factorization would not."""
    monkeypatch.setattr(operator_norms, "_largest_eigenvalue", lambda gram: 0.5)
    _, upper = spectral_bounds(np.diag([1.0, 2.0, 0.1]))
    assert upper >= 2.0


def test_large_layers_are_bounded_operation_by_operation(monkeypatch):
    size, kernel, strides, pads = next(iter(kernels()))
    scale = np.random.default_rng(3).uniform(-2, 2, kernel.shape[3])
    chain, _ = chain_of(size, kernel, strides, pads)
    chain = chain[:-1]  # without the flattening
    target = chain[-1].target
    whole = (*chain, Op("scale", target, target, np.broadcast_to(scale, target)))
    exact = np.linalg.svd(dense(whole), compute_uv=False)[0]
    assert len(folded(whole)) == 1
    x = np.random.default_rng(4).normal(size=(2, *chain[0].source))
    np.testing.assert_allclose(apply(folded(whole), x), apply(whole, x))
    monkeypatch.setattr(operator_norms, "DENSE_ENTRIES", 0)
    assert exact <= operator_norm(whole, "L2") <= 1.2 * exact
    for norm, axis in (("Linf", 0), ("L1", 1)):
        sums = np.abs(dense(whole)).sum(axis).max()
        assert sums <= operator_norm(whole, norm) <= sums * (1 + 1e-8)


def test_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="'L3'"):
        operator_norm((), "L3")


def test_float32_matches_the_net_it_was_read_from():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 3))
    chain, matrix = chain_of((5, 5, 2), kernel, (1, 1), ((1, 1), (1, 1)))
    x = np.random.default_rng(0).normal(size=(3, *chain[0].source))
    np.testing.assert_allclose(
        apply(chain, x).reshape(3, -1), x.reshape(3, -1) @ matrix, atol=1e-4
    )
