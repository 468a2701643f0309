"""Norms against brute force in float64: nearest points, moves, duals, samples."""

import functools
import itertools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from robustjax.norms import L0, L1, L2, AnyOf, Linf

NORMS = [Linf(), L2(), L1(), L0()]
SHAPES = [(), (1,), (5,), (2, 1, 3)]
SETTINGS = settings(max_examples=60)
by_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)


@functools.cache
def compiled(norm, method):
    return jax.jit(getattr(norm, method))


def call(norm, method, *args):
    floats = [np.asarray(a, np.float32) for a in args]
    return np.asarray(compiled(norm, method)(*floats))


def size64(norm, delta):
    delta = np.abs(np.asarray(delta, np.float64)).ravel()
    if isinstance(norm, Linf):
        return delta.max(initial=0)
    if isinstance(norm, L2):
        return np.sqrt(np.sum(delta**2))
    return delta.sum() if isinstance(norm, L1) else float(np.count_nonzero(delta))


def bisect(outside, high):
    """The point in [0, high] where `outside` turns from True to False."""
    low = 0.0
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if outside(middle) else (low, middle)
    return high


def nearest(norm, delta, epsilon, low, high):
    """Nearest point of ball and box in float64, the slow way."""
    delta, low, high = (np.asarray(v, np.float64) for v in (delta, low, high))
    clipped = np.clip(delta, low, high)
    if isinstance(norm, Linf):
        return np.clip(delta, np.maximum(low, -epsilon), np.minimum(high, epsilon))
    if isinstance(norm, L0):
        flat, options = delta.ravel(), []
        count = min(int(min(epsilon, flat.size)), flat.size)
        for chosen in itertools.combinations(range(flat.size), count):
            mask = np.isin(np.arange(flat.size), chosen)
            options.append(np.where(mask, clipped.ravel(), 0.0))
        best = min(options, key=lambda p: np.sum((p - flat) ** 2))
        return best.reshape(delta.shape)
    if size64(norm, clipped) <= epsilon:
        return clipped
    if isinstance(norm, L2):

        def point(shrink):
            return np.clip(delta * 2.0**-shrink, low, high)

        return point(bisect(lambda s: size64(norm, point(s)) > epsilon, 200.0))

    def point(tau):
        return np.clip(np.sign(delta) * np.maximum(np.abs(delta) - tau, 0), low, high)

    top = np.abs(delta).max(initial=0)
    return point(bisect(lambda tau: size64(norm, point(tau)) > epsilon, top))


def distance(p, delta):
    return np.sqrt(np.sum((np.asarray(p, np.float64) - np.asarray(delta)) ** 2))


def check_nearest(norm, p, delta, epsilon, low, high):
    reference = nearest(norm, delta, epsilon, low, high)
    # Float32 rounds delta itself: where |delta| >> epsilon that is the limit.
    scale = np.abs(delta).max(initial=0)
    slack = 2e-6 * max(np.abs(reference).max(initial=0), 1e-30) + 2e-7 * scale
    if isinstance(norm, L2):
        # What the box leaves for the others is a difference of squares, and rounding
        # counts the more the less is left.
        left = size64(norm, reference[(reference > low) & (reference < high)])
        slack *= max(1, min(1e3, 0.1 * epsilon / max(left, 1e-30)))
    assert np.all(np.isfinite(p))
    assert np.all((p >= low) & (p <= high))
    assert size64(norm, p) <= epsilon * (1 + 1e-6)
    if isinstance(norm, L0):  # ties have several nearest points
        gap = distance(p, delta) - distance(reference, delta)
        assert gap <= 2e-6 * max(distance(reference, delta), scale) + 1e-30
    else:
        np.testing.assert_allclose(p, reference, rtol=0, atol=slack)


def values(limit, least=0.0):
    """Floats with many zeros, ties and magnitudes."""
    kinds = [0.0, 0.25, 0.5, 1.0, 1e-6, limit]
    kinds = [v for v in kinds if v >= least]
    return st.one_of(
        st.sampled_from(kinds),
        st.floats(float(np.float32(least)), float(np.float32(limit)), width=32).map(
            lambda v: v if abs(v) > 1e-30 else 0.0
        ),
    )


@st.composite
def problems(draw):
    shape = draw(st.sampled_from(SHAPES))
    array = functools.partial(hnp.arrays, np.float32, shape)
    sign = draw(array(elements=st.sampled_from([-1.0, 1.0])))
    delta = sign * draw(array(elements=values(draw(st.sampled_from([1.0, 100.0])))))
    low = -draw(array(elements=values(1.0)))
    high = draw(array(elements=values(1.0)))
    epsilon = draw(
        st.sampled_from([0.0, 1e-3, 0.3, 0.5, 1.0, 2.0, 2.5, 7.0, 1e6, np.inf])
    )
    return delta.astype(np.float32), float(np.float32(epsilon)), low, high


@by_norm
@SETTINGS
@given(problems())
def test_project_box_is_the_nearest_point(norm, problem):
    delta, epsilon, low, high = problem
    p = call(norm, "project_box", delta, epsilon, low, high)
    assert p.shape == delta.shape and p.dtype == np.float32
    check_nearest(norm, p, delta, epsilon, low, high)
    if epsilon == 0:
        assert np.all(p == 0)
    again = call(norm, "project_box", p, epsilon, low, high)
    np.testing.assert_allclose(again, p, rtol=0, atol=2e-6 * np.abs(p).max(initial=0))


@by_norm
@SETTINGS
@given(problems())
def test_project_is_the_nearest_point_of_the_ball(norm, problem):
    delta, epsilon, _, _ = problem
    p = call(norm, "project", delta, epsilon)
    everywhere = np.full(delta.shape, np.inf)
    check_nearest(norm, p, delta, epsilon, -everywhere, everywhere)
    again = call(norm, "project", p, epsilon)
    np.testing.assert_allclose(again, p, rtol=0, atol=2e-6 * np.abs(p).max(initial=0))
    if size64(norm, delta) <= epsilon * (1 - 1e-6):
        np.testing.assert_array_equal(p, delta)


@by_norm
def test_no_feasible_point_is_nearer(norm):
    """Independent of the formula: sampled feasible points, and SLSQP where smooth."""
    rng = np.random.default_rng(0)
    for _ in range(8):
        delta = rng.normal(size=5)
        low, high = -rng.uniform(0, 1, 5), rng.uniform(0, 1, 5)
        epsilon = 2.0 if isinstance(norm, L0) else rng.uniform(0.1, 1)
        p = call(norm, "project_box", delta, epsilon, low, high)
        q = rng.uniform(low, high, (4000, 5))
        if isinstance(norm, L0):
            q[np.argsort(rng.random(q.shape), 1) >= 2] = 0
        else:  # shrunk until inside; about half end on the sphere
            sizes = np.array([size64(norm, row) for row in q])
            q *= np.minimum(1, epsilon / sizes)[:, None]
        best = np.min(np.sum((q - delta) ** 2, 1))
        assert distance(p, delta) ** 2 <= best + 1e-6
        if isinstance(norm, L2 | L1):
            # d = up - down makes the l1 norm smooth; for L2 down and up are just split
            def size_left(v, epsilon=epsilon):
                if isinstance(norm, L1):
                    return epsilon - np.sum(v)
                return epsilon**2 - np.sum((v[:5] - v[5:]) ** 2)

            solution = optimize.minimize(
                lambda v, delta=delta: np.sum((v[:5] - v[5:] - delta) ** 2),
                np.full(10, 1e-3),
                bounds=[(0, h) for h in high] + [(0, -b) for b in low],
                constraints={"type": "ineq", "fun": size_left},
                method="SLSQP",
                options={"maxiter": 500, "ftol": 1e-12},
            )
            assert solution.success
            np.testing.assert_allclose(p, solution.x[:5] - solution.x[5:], atol=2e-4)


@pytest.mark.parametrize("norm", [L2(), L1()], ids=["L2", "L1"])
def test_threshold_is_exact_for_magnitudes_far_apart(norm):
    """What a fixed number of Newton steps gets wrong: breakpoints over 14 decades."""
    rng = np.random.default_rng(1)
    rows, n = 48, 257
    spread = rng.uniform(0, 7, (rows, 1))
    delta = 10 ** (spread * rng.uniform(-1, 1, (rows, n))) * rng.choice(
        [-1, 1], (rows, n)
    )
    low = -(10 ** (-spread * rng.uniform(0, 1, (rows, n))))
    high = 10 ** (-spread * rng.uniform(0, 1, (rows, n)))
    delta, low, high = (v.astype(np.float32) for v in (delta, low, high))
    full = np.array(
        [size64(norm, np.clip(*v)) for v in zip(delta, low, high, strict=True)]
    )
    epsilon = (full * 10 ** rng.uniform(-6, 0, rows)).astype(np.float32)
    p = np.asarray(jax.jit(jax.vmap(norm.project_box))(delta, epsilon, low, high))
    for i in range(rows):
        reference = nearest(norm, delta[i], epsilon[i], low[i], high[i])
        assert size64(norm, p[i]) <= epsilon[i] * (1 + 2e-6)
        assert np.all((p[i] >= low[i]) & (p[i] <= high[i]))
        ulp = 1.2e-7 * np.abs(delta[i]).max() * isinstance(norm, L1)
        np.testing.assert_allclose(
            p[i], reference, rtol=0, atol=3e-6 * epsilon[i] + ulp
        )
        # the budget is used up: neither short of the sphere nor beyond it
        assert size64(norm, p[i]) >= epsilon[i] * (1 - 3e-6)


@by_norm
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steepest_reaches_the_dual_norm(norm, scale, shape):
    rng = np.random.default_rng(2)
    grad = (scale * rng.normal(size=shape)).astype(np.float32)
    move = call(norm, "steepest", grad)
    dual = float(call(norm, "dual", grad))
    gained = np.sum(move.astype(np.float64) * grad)
    np.testing.assert_allclose(gained, dual, rtol=2e-6)
    assert size64(norm, move) <= 1 + 1e-6
    assert np.abs(move).max(initial=0) <= 1 + 1e-6
    # and no point of the unit ball gains more
    if isinstance(norm, L1 | L0):
        np.testing.assert_allclose(dual, np.abs(grad).max(initial=0), rtol=1e-6)
    else:
        power = {Linf: 1, L2: 2}[type(norm)]
        wide = np.abs(grad.astype(np.float64)).ravel()
        np.testing.assert_allclose(dual, np.linalg.norm(wide, power), rtol=1e-6)


@by_norm
@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_vanishing_gradient_gives_no_nan(norm, value):
    grad = np.full((2, 1, 3), value, np.float32)
    for method, args in [("steepest", ()), ("sparse_steepest", (0.3,)), ("dual", ())]:
        out = call(norm, method, grad, *args)
        assert np.all(np.isfinite(out))
        assert value != 0 or np.all(out == 0)


def test_sparse_steepest_takes_the_top_coordinates():
    rng = np.random.default_rng(3)
    n = 40
    for density in [0.0, 0.05, 0.3, 0.99, 1.0]:
        grad = rng.integers(-4, 5, n).astype(np.float32)  # ties, zeros
        k = max(1, round(density * n))
        move = call(L1(), "sparse_steepest", grad, density)
        order = np.argsort(-np.abs(grad), kind="stable")[:k]  # ties: the first
        kept = np.zeros(n, bool)
        kept[order] = True
        kept &= grad != 0
        np.testing.assert_array_equal(move != 0, kept)
        np.testing.assert_allclose(move, kept * np.sign(grad) / kept.sum(), 1e-6)


def test_sparse_steepest_of_l0_leaves_the_choice_to_the_projection():
    grad = np.array([2.0, -4.0, 0.0], np.float32)
    move = call(L0(), "sparse_steepest", grad, 0.1)
    np.testing.assert_array_equal(move, [0.5, -1.0, 0.0])


@pytest.mark.parametrize("norm", [Linf(), L2(), L1(), L0()])
def test_stride_and_free(norm):
    width = np.array([1.0, 255.0], np.float32)
    grad, stuck = np.array([1.0, -1.0], np.float32), np.array([True, False])
    is_count = isinstance(norm, L0)
    expected = width if is_count else [0.25, 0.25]
    np.testing.assert_array_equal(norm.stride(0.25, jnp.asarray(width)), expected)
    free = norm.free(jnp.asarray(grad), jnp.asarray(stuck))
    np.testing.assert_array_equal(free, grad if is_count else [0.0, -1.0])


@pytest.mark.parametrize("norm", [Linf(), L2()], ids=["Linf", "L2"])
def test_sparse_steepest_of_dense_norms_is_steepest(norm):
    grad = np.random.default_rng(4).normal(size=(3, 2))
    np.testing.assert_array_equal(
        call(norm, "sparse_steepest", grad, 0.1), call(norm, "steepest", grad)
    )


def test_ties_go_to_the_first():
    grad = np.array([0.5, -2.0, 2.0, 2.0])
    np.testing.assert_array_equal(call(L1(), "steepest", grad), [0, -1, 0, 0])
    np.testing.assert_array_equal(call(L0(), "steepest", grad), [0, -1, 0, 0])
    np.testing.assert_array_equal(call(L0(), "project", grad, 2.9), [0, -2, 2, 0])


def test_l0_with_the_box_keeps_what_saves_most():
    delta = np.array([5.0, 1.0, -0.9])  # the largest may hardly move
    p = call(L0(), "project_box", delta, 1.0, [-1, -1, -1], [0.05, 1, 1])
    np.testing.assert_array_equal(p, [0, 1, 0])


@by_norm
@settings(SETTINGS, max_examples=30)
@given(problems())
def test_size(norm, problem):
    delta = problem[0]
    np.testing.assert_allclose(call(norm, "size", delta), size64(norm, delta), 1e-5)


@functools.cache
def draws(norm, epsilon, n, count=4000):
    keys = jax.random.split(jax.random.key(7), count)
    sample = jax.vmap(lambda key: norm.sample(key, epsilon, (n,)))
    return np.asarray(jax.jit(sample)(keys), np.float64)


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("norm", NORMS[:3], ids=["Linf", "L2", "L1"])
def test_samples_are_uniform_in_the_ball(norm, n):
    epsilon = 0.5
    d = draws(norm, epsilon, n)
    radius = np.array([size64(norm, row) for row in d])
    assert radius.max() <= epsilon * (1 + 1e-6)
    # the share of the volume within the radius is uniform
    assert stats.kstest((radius / epsilon) ** n, "uniform").pvalue > 1e-3
    # second moments of the uniform distribution on the ball
    moment = {
        Linf: 1 / 3,
        L2: 1 / (n + 2),
        L1: 2 / ((n + 1) * (n + 2)),
    }[type(norm)]
    np.testing.assert_allclose(np.mean(d**2, 0), epsilon**2 * moment, rtol=0.1)
    error = np.sqrt(epsilon**2 * moment / len(d))
    assert np.all(np.abs(d.mean(0)) < 5 * error)
    correlation = np.corrcoef(d.T) if n > 1 else np.eye(1)
    assert np.abs(correlation - np.eye(n)).max() < 0.08


def test_l0_samples_choose_coordinates_and_values_uniformly():
    d = draws(L0(), 2.7, 6)
    chosen = d != 0
    assert np.all(chosen.sum(1) == 2)
    np.testing.assert_allclose(chosen.mean(0), 1 / 3, atol=0.03)
    assert stats.kstest(d[chosen], "uniform", (-1, 2)).pvalue > 1e-3


@by_norm
def test_sample_shapes_and_zero_budget(norm):
    for shape in SHAPES:
        sample = norm.sample(jax.random.key(0), 0.0, shape)
        assert sample.shape == shape and sample.dtype == jnp.float32
        assert np.all(np.asarray(sample) == 0)


def test_jit_tells_norms_apart():
    """By structure, not by hash alone: equal ones would share a program by chance."""
    structures = [jax.tree.structure(norm) for norm in NORMS]
    for i, one in enumerate(structures):
        assert [one == other for other in structures] == [i == j for j in range(4)]
    assert not any(jax.tree.leaves(norm) for norm in NORMS)


def test_any_of_is_its_member():
    rng = np.random.default_rng(5)
    delta = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    low, high = -0.4 * jnp.ones((2, 3)), 0.3 * jnp.ones((2, 3))
    calls = {
        "size": (delta,),
        "project": (delta, 1.2),
        "project_box": (delta, 1.2, low, high),
        "steepest": (delta,),
        "sparse_steepest": (delta, 0.4),
        "dual": (delta,),
    }

    traces = []

    @jax.jit
    def all_of(norm):
        traces.append(norm)
        out = {name: getattr(norm, name)(*args) for name, args in calls.items()}
        return out | {"sample": norm.sample(jax.random.key(1), 1.2, (2, 3))}

    members = tuple(NORMS)
    index = jnp.arange(4)
    stacked = jax.vmap(lambda i: all_of(AnyOf(members, i)))(index)
    for i, member in enumerate(members):
        expected = all_of(member)
        switched = all_of(AnyOf(members, jnp.int32(i)))
        for name, value in expected.items():
            np.testing.assert_allclose(switched[name], value, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(stacked[name][i], value, atol=1e-6, err_msg=name)
    assert len(traces) == 5  # one per member, and one for every index of AnyOf


@by_norm
def test_half_precision_is_computed_in_float32(norm):
    delta = jnp.asarray([3.0, -4.0, 0.5], jnp.bfloat16)
    half = norm.project_box(delta, 1.0, -1.0, 1.0)
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(
        half, norm.project_box(delta.astype(jnp.float32), 1.0, -1.0, 1.0)
    )
    assert norm.steepest(delta).dtype == norm.dual(delta).dtype == jnp.float32


@by_norm
def test_x64(norm):
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):
        delta, low, high = rng.normal(size=6), -rng.random(6), rng.random(6)
        epsilon = 2.0 if isinstance(norm, L0) else 0.7
        p = norm.project_box(delta, epsilon, low, high)
        assert p.dtype == jnp.float64
        reference = nearest(norm, delta, epsilon, low, high)
        np.testing.assert_allclose(p, reference, atol=1e-13)
        assert norm.sample(jax.random.key(0), 1.0, (3,), jnp.float64).dtype == p.dtype
        assert norm.project(delta.astype(np.float32), epsilon).dtype == jnp.float32
