"""Threat models: feasibility in ball and box, budgets per row, stacking, messages."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustjax import threats as T
from robustjax.norms import L0, L1, L2, AnyOf, Linf

BUILDERS = {"Linf": T.linf, "L2": T.l2, "L1": T.l1, "L0": T.l0}
SHAPES = [(3,), (3, 1), (3, 2, 2, 1)]  # batches; one number, vector, image
by_norm = pytest.mark.parametrize("name", BUILDERS)
jit_project = jax.jit(T.project)
jit_apply = jax.jit(T.apply)


def box_floats(low, high):
    """Floats of the box, its ends and its last bits included."""
    low, high = float(np.float32(low)), float(np.float32(high))
    ends = [low, high, np.nextafter(np.float32(high), np.float32(low)).item()]
    return st.sampled_from(ends) | st.floats(low, high, width=32, allow_subnormal=False)


@st.composite
def cases(draw):
    shape = draw(st.sampled_from(SHAPES))
    lower, upper = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)]))
    x = draw(hnp.arrays(np.float32, shape, elements=box_floats(lower, upper)))
    limit = draw(st.sampled_from([0.1, 3.0, 1e4]))
    delta = draw(hnp.arrays(np.float32, shape, elements=box_floats(-limit, limit)))
    epsilon = draw(st.sampled_from([0.0, 0.03, 0.3, 1.0, 2.0, 50.0, np.inf]))
    return x, delta, epsilon, lower, upper


@by_norm
@settings(max_examples=80)
@given(cases())
def test_projected_points_are_feasible(name, case):
    x, delta, epsilon, lower, upper = case
    threat = BUILDERS[name](epsilon, lower, upper)
    d = jit_project(threat, x, delta)
    x_adv = np.asarray(jit_apply(threat, x, d))
    assert np.all(np.isfinite(x_adv))
    assert np.all((x_adv >= np.float32(lower)) & (x_adv <= np.float32(upper)))
    assert np.all(T.size(threat, d) <= threat.epsilon * (1 + 1e-6))
    assert np.all(T.is_feasible(threat, x, x_adv))
    # x + delta itself may miss the box by a rounding of the sum, never by more
    assert np.abs(x + np.asarray(d) - x_adv).max() <= 1.2e-7
    if epsilon == 0:
        np.testing.assert_array_equal(x_adv, x)
    if epsilon == np.inf:
        np.testing.assert_allclose(x_adv, np.clip(x + delta, lower, upper), atol=2e-7)


def test_threats_of_different_norms_have_different_structures():
    structures = [jax.tree.structure(build(0.1)) for build in BUILDERS.values()]
    for i, one in enumerate(structures):
        assert [one == other for other in structures] == [i == j for j in range(4)]


def batch(shape=(4, 3, 2), seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=shape).astype(np.float32)
    return x, rng.normal(size=shape).astype(np.float32)


@by_norm
def test_one_budget_per_row(name):
    x, delta = batch()
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def all_of(threat):
        start = T.random_start(threat, keys, x)
        d = T.project(threat, x, delta)
        return d, start, T.project_sequential(threat, x, delta)

    budgets = np.array([0.0, 0.3, 1.0, 3.0], np.float32)
    together = all_of(BUILDERS[name](budgets))
    for i, epsilon in enumerate(budgets):
        shared = BUILDERS[name](epsilon)
        for mine, same in zip(together, all_of(shared), strict=True):
            np.testing.assert_allclose(mine[i], same[i], atol=1e-7)
        assert np.all(T.size(shared, together[0])[i] <= epsilon * (1 + 1e-6))


@by_norm
def test_box_as_an_array(name):
    x, delta = batch()
    lower = np.linspace(-0.5, 0.0, 6, dtype=np.float32).reshape(3, 2)
    upper = lower + 1.5
    threat = BUILDERS[name](1.0, lower, upper)
    d = T.project(threat, x, delta)
    x_adv = np.asarray(T.apply(threat, x, d))
    assert np.all((x_adv >= lower) & (x_adv <= upper))
    assert T.is_feasible(threat, x, x_adv).all()
    # the same problem, moved into a scalar box
    moved = BUILDERS[name](1.0, 0.0, 1.5)
    np.testing.assert_allclose(T.project(moved, x - lower, delta), d, atol=1e-6)


def test_box_per_channel():
    x, delta = batch()
    channels = T.linf(np.inf, np.array([0.0, 0.2]), np.array([1.0, 0.8]))
    x = np.clip(x, channels.lower, channels.upper)
    x_adv = T.apply(channels, x, T.project(channels, x, delta))
    full = T.linf(np.inf, *np.broadcast_to([[[0, 0.2]], [[1, 0.8]]], (2, 3, 2)))
    np.testing.assert_array_equal(x_adv, T.apply(full, x, T.project(full, x, delta)))
    expected = np.clip(x + delta, channels.lower, channels.upper)
    np.testing.assert_allclose(x_adv, expected, atol=2e-7)


def test_nearest_point_where_ball_then_box_falls_short():
    """On a binary image half of an L2 step points out of the box."""
    x = jnp.array([[0.0, 1.0, 0.0, 1.0] * 4])
    delta = jnp.array([[-1.0, 1.0, 1.0, -1.0] * 4])
    threat = T.l2(1.5)
    np.testing.assert_allclose(T.size(threat, T.project(threat, x, delta)), 1.5, 1e-6)
    short = T.size(threat, T.project_sequential(threat, x, delta))
    np.testing.assert_allclose(short, 1.5 / np.sqrt(2), 1e-6)


@by_norm
def test_random_start_differs_by_key_and_fills_the_ball(name):
    x = jnp.full((64, 6), 0.5)
    threat = BUILDERS[name](2.0 if name == "L0" else 0.3)
    keys = jax.random.split(jax.random.key(3), 64)
    random_start = jax.jit(T.random_start)
    start = random_start(threat, keys, x)
    assert start.shape == x.shape and T.is_feasible(threat, x, x + start).all()
    # L0: the corners of the box attract several values
    different = len(np.unique(np.asarray(start), axis=0))
    assert different == 64 or (name == "L0" and different > 48)
    assert np.max(T.size(threat, start)) > 0.9 * threat.epsilon
    permuted = random_start(threat, keys[::-1], x)
    np.testing.assert_array_equal(permuted[::-1], start)


def test_random_start_with_an_infinite_budget_in_a_stack():
    x = jnp.full((16, 6), 0.5)
    keys = jax.random.split(jax.random.key(0), 16)
    stacked = T.stack([build(np.inf) for build in BUILDERS.values()])
    starts = np.asarray(
        jax.jit(jax.vmap(T.random_start, (0, None, None)))(stacked, keys, x)
    )
    assert np.all(np.isfinite(starts)) and np.all(np.abs(starts).max(2) > 0)
    assert np.all((starts >= -0.5) & (starts <= 0.5))


def test_is_feasible_sees_each_violation():
    x = jnp.full((5, 2), 0.5)
    x_adv = jnp.array(
        [[0.5, 0.6], [0.5, 0.601], [0.5, np.nan], [1.01, 0.5], [0.4, 0.6]]
    )
    wide = T.linf(np.array([0.1, 0.1, 1.0, 1.0, 0.1], np.float32))
    np.testing.assert_array_equal(
        T.is_feasible(wide, x, x_adv), [True, False, False, False, True]
    )
    np.testing.assert_array_equal(T.is_feasible(T.l0(1), x, x_adv)[:2], [True, True])
    assert not T.is_feasible(T.l0(1), x, x_adv)[4]
    assert T.is_feasible(T.linf(0.1), x, x_adv, tolerance=0.01)[1]


THREATS = [T.linf(0.1), T.l2(0.5), T.l1(1.2), T.l0(2), T.linf(0.0), T.l2(np.inf)]


def test_stacked_threats_equal_a_loop():
    x, delta = batch()
    stacked = T.stack(THREATS)
    assert stacked.norm.members == (Linf(), L2(), L1(), L0())  # each once

    def all_of(threat):
        d = T.project(threat, x, delta)
        return d, T.size(threat, d)

    by_vmap = jax.jit(jax.vmap(all_of))(stacked)
    by_map = jax.jit(functools.partial(jax.lax.map, all_of))(stacked)
    alone = jax.jit(all_of)
    for n, threat in enumerate(THREATS):
        for one, v, m in zip(alone(threat), by_vmap, by_map, strict=True):
            np.testing.assert_allclose(v[n], one, atol=1e-6)
            np.testing.assert_allclose(m[n], one, atol=1e-6)


def test_unstack_undoes_stack():
    boxes = [T.linf(0.1, np.zeros(2), 1.0), T.l2(0.5, -1.0, np.array([2.0, 3.0]))]
    for threats in (THREATS, boxes):
        back = T.unstack(T.stack(threats))
        assert [t.norm for t in back] == [t.norm for t in threats]
        for old, new in zip(threats, back, strict=True):
            for name in ("epsilon", "lower", "upper"):
                a, b = getattr(old, name), getattr(new, name)
                np.testing.assert_array_equal(np.broadcast_to(a, np.shape(b)), b)
    with pytest.raises(TypeError, match="not stacked"):
        T.unstack(T.linf(0.1))


def test_stack_errors():
    with pytest.raises(ValueError, match="empty"):
        T.stack([])
    with pytest.raises(TypeError, match="unstack it first"):
        T.stack([T.stack(THREATS)])
    with pytest.raises(ValueError, match=r"lower has the shapes \[\(2,\), \(3,\)\]"):
        T.stack([T.linf(0.1, np.zeros(2)), T.linf(0.1, np.zeros(3))])


def test_a_new_budget_does_not_trace_again():
    traces = []

    @jax.jit
    def projected(threat, x, delta):
        traces.append(threat)
        return T.project(threat, x, delta)

    x, delta = batch()
    for epsilon in (0.1, "8/255", np.float64(0.2), 1, jnp.float32(0.3)):
        projected(T.l2(epsilon), x, delta)
    assert len(traces) == 1


def test_tracers_pass_unchecked_and_vmap_over_budgets():
    x, delta = batch()
    budgets = jnp.array([0.1, 0.2])
    curve = jax.vmap(lambda e: T.project(T.linf(e), x, delta))(budgets)
    for n, epsilon in enumerate(budgets):
        np.testing.assert_array_equal(curve[n], T.project(T.linf(epsilon), x, delta))


@by_norm
@pytest.mark.parametrize(
    "epsilon", [-0.1, np.nan, np.array([0.1, -1.0]), "-8/255"], ids=str
)
def test_bad_budgets(name, epsilon):
    with pytest.raises(ValueError, match="epsilon=.*negative or NaN; a budget is"):
        BUILDERS[name](epsilon)


@pytest.mark.parametrize("text", ["8/0", "eight", "8/255/2", ""])
def test_budgets_that_are_no_number(text):
    with pytest.raises(ValueError, match=r"epsilon=.* is not a number; write it like"):
        T.linf(text)


@pytest.mark.parametrize("epsilon", [[0.1, "x"], {"Linf": 0.1}], ids=str)
def test_budgets_of_a_wrong_type(epsilon):
    with pytest.raises(ValueError, match=r"epsilon=.* is not a number"):
        T.linf(epsilon)


def test_constants_are_checked_under_jit():
    with pytest.raises(ValueError, match="negative or NaN"):
        jax.jit(lambda x: T.project(T.linf(-0.1), x, x))(jnp.ones((1, 2)))


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="lower=1.0 is not below upper=0.0"):
        T.linf(0.1, 1.0, 0.0)
    with pytest.raises(ValueError, match="lower=0.0 is not below upper=nan"):
        T.linf(0.1, 0.0, np.nan)
    with pytest.raises(ValueError, match=r"epsilon has shape \(1, 1\)"):
        T.linf(np.ones((1, 1)))
    with pytest.raises(ValueError, match="norm='L3' is unknown; choose Linf, L2, L1"):
        T.threat("L3", 0.1)


def test_threats_by_name():
    for name, norm in [("Linf", Linf()), ("l2", L2()), ("L1", L1()), ("l0", L0())]:
        assert T.threat(name, 1.0).norm == norm
    np.testing.assert_allclose(T.threat("LINF", "8/255").epsilon, 8 / 255, 1e-6)


def test_standard_threats():
    for dataset, norm, epsilon in [
        ("cifar10", "Linf", 8 / 255),
        ("CIFAR10", "l2", 0.5),
        ("cifar10", "L1", 12),
        ("mnist", "Linf", 0.3),
        ("fashion_mnist", "Linf", 0.1),
        ("imagenet", "Linf", 4 / 255),
    ]:
        threat = T.standard_threat(dataset, norm)
        np.testing.assert_allclose(threat.epsilon, epsilon, rtol=1e-6)
    with pytest.raises(ValueError, match="known: .*cifar10 Linf.*threat"):
        T.standard_threat("cifar10", "L0")


@by_norm
def test_sharded_batches_need_no_collectives(name):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    x, delta = (jax.device_put(v, rows) for v in batch((8, 3, 2)))

    def both(threat, x, delta):
        return T.project(threat, x, delta), jax.vmap(threat.norm.sparse_steepest)(
            delta, jnp.full(8, 0.3)
        )

    program = jax.jit(both).lower(BUILDERS[name](1.0), x, delta).compile()
    text = program.as_text()
    assert "num_partitions=4" in text
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_a_threat_is_a_pytree():
    leaves = jax.tree.leaves(T.l2(0.5))
    assert [float(leaf) for leaf in leaves] == [0.5, 0.0, 1.0]
    assert len(jax.tree.leaves(T.stack(THREATS))) == 4
    assert isinstance(T.stack(THREATS).norm, AnyOf)
