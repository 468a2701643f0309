"""FAB: its projections against linear programs, its distances against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import robustjax as rj
from robustjax import testing
from robustjax.attacks import fab
from robustjax.attacks.fab_projections import nearest_on_plane
from robustjax.losses import difference

NORMS = {"Linf": rj.Linf(), "L2": rj.L2(), "L1": rj.L1()}
SIZES = {"Linf": np.inf, "L2": 2, "L1": 1}
DIMENSION = 6


@functools.partial(jax.jit, static_argnums=0)
def project(norm, value, w, low, high):
    return jax.vmap(lambda *row: nearest_on_plane(norm, *row))(value, w, low, high)


def planes(count=60, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(count, DIMENSION)) * 10.0 ** rng.integers(-3, 4, (count, 1))
    w[::3] = np.round(w[::3] / np.abs(w[::3]).max(1, keepdims=True) * 3)  # ties, zeros
    low, high = -rng.uniform(size=w.shape), rng.uniform(size=w.shape)
    low[rng.uniform(size=w.shape) < 0.2] = 0  # coordinates on a face of the box
    value = rng.normal(size=count) * 0.4 * np.abs(w).sum(1)
    value[:3] = 0
    return [a.astype(np.float32).astype(np.float64) for a in (value, w, low, high)]


def least(norm, value, w, low, high):
    """The optimum by a linear program, or by SLSQP for L2; float64."""
    eye, one = np.eye(DIMENSION), np.ones((DIMENSION, 1))
    bounds = list(zip(low, high, strict=True))
    if norm == "Linf":
        found = optimize.linprog(
            [0] * DIMENSION + [1],
            A_ub=np.block([[eye, -one], [-eye, -one]]),
            b_ub=np.zeros(2 * DIMENSION),
            A_eq=[[*w, 0]],
            b_eq=[-value],
            bounds=[*bounds, (0, None)],
        )
    elif norm == "L1":
        found = optimize.linprog(
            np.ones(2 * DIMENSION),
            A_eq=[[*w, *-w]],
            b_eq=[-value],
            bounds=[(0, h) for h in high] + [(0, -lo) for lo in low],
        )
    else:
        start = np.clip(-value * w / max(w @ w, 1e-30), low, high)
        found = optimize.minimize(
            lambda d: d @ d,
            start,
            jac=lambda d: 2 * d,
            bounds=bounds,
            constraints=[{"type": "eq", "fun": lambda d: value + w @ d}],
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-14},
        )
        return np.sqrt(found.fun) if found.success else np.nan
    return found.fun


@pytest.mark.parametrize("norm", NORMS)
def test_the_nearest_point_of_a_plane_in_a_box(norm):
    value, w, low, high = planes()
    moved = np.asarray(project(NORMS[norm], *map(jnp.float32, (value, w, low, high))))
    moved = moved.astype(np.float64)
    assert (moved >= low).all() and (moved <= high).all()
    against = -np.sign(w) * np.where(value < 0, -1, 1)[:, None]
    corner = np.where(against > 0, high, low) * (w != 0)
    compared = 0
    for i in range(len(value)):
        scale = max(np.abs(w[i]).sum(), 1e-6)
        if np.abs(w[i] @ corner[i]) <= abs(value[i]):  # out of reach: the corner
            np.testing.assert_allclose(moved[i], corner[i], atol=1e-6)
            continue
        assert abs(value[i] + w[i] @ moved[i]) <= 1e-5 * scale
        best = least(norm, value[i], w[i], low[i], high[i])
        if np.isfinite(best):
            size = np.linalg.norm(moved[i], SIZES[norm])
            assert size <= best * (1 + 1e-3) + 1e-5
            compared += 1
    assert compared > 25


@pytest.mark.parametrize("norm", NORMS)
def test_degenerate_planes(norm):
    zero, room = jnp.zeros((1, DIMENSION)), jnp.ones((1, DIMENSION))
    flat = project(NORMS[norm], jnp.array([1.0]), zero, -room, room)
    np.testing.assert_array_equal(flat, zero)  # no gradient: no move
    far = jnp.full((1, DIMENSION), jnp.inf)  # no box
    w = jnp.arange(1.0, 1 + DIMENSION)[None]
    moved = np.asarray(project(NORMS[norm], jnp.array([-2.0]), w, -far, far))
    dual = {"Linf": np.abs(w).sum(), "L2": np.linalg.norm(w), "L1": np.abs(w).max()}
    assert np.linalg.norm(moved[0], SIZES[norm]) == pytest.approx(
        2 / dual[norm], rel=1e-5
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box_active", [False, True])
def test_finds_the_exact_distance_of_a_linear_model(norm, box_active):
    oracle = testing.linear_oracle(norm, box_active=box_active, batch_size=6)
    threat = rj.threat(norm, np.inf, oracle.threat.lower, oracle.threat.upper)
    result = testing._run(fab.fab(30), oracle._replace(threat=threat))
    w = np.asarray(oracle.logits_fn.args[0], np.float64)
    for i, (x, y) in enumerate(zip(np.asarray(oracle.x), oracle.y, strict=True)):
        sign = 1.0 if y == 0 else -1.0
        low = float(oracle.threat.lower) - x.astype(np.float64)
        high = float(oracle.threat.upper) - x.astype(np.float64)

        def left(epsilon, sign=sign, low=low, high=high, i=i):
            drop = testing._least(norm, sign * w, low, high, epsilon)
            return oracle.clean_margin[i] + 2 * drop

        if left(1e3) > 0:
            assert not result.success[i]
            continue
        distance = optimize.brentq(left, 0, 1e3, xtol=1e-9)
        assert bool(result.success[i])
        assert distance * (1 - 1e-4) <= result.size[i] <= distance * 1.01


@pytest.mark.parametrize("targeted", [True, False])
def test_success_counts_inside_the_ball_only(targeted):
    oracle = testing.linear_oracle("L2", batch_size=8, box_active=True)
    result = testing._run(fab.fab(20, targeted=targeted), oracle)
    inside = rj.is_feasible(oracle.threat, oracle.x, result.x_adv)
    assert not np.any(np.asarray(result.success) & ~np.asarray(inside))
    clear = np.abs(oracle.worst_margin) > 0.02
    np.testing.assert_array_equal(
        np.asarray(result.success)[clear], (oracle.worst_margin < 0)[clear]
    )


def test_untargeted_takes_the_nearest_of_all_classes():
    """Class 2 is far in logits and near in distance: its gradient is steep."""
    w = jnp.array([[0.0, 1.0, 10.0], [0.0, 0.0, 0.0]])
    bias = jnp.array([[0.0, -0.3, -1.0]])
    logits_fn = lambda x: x @ w + bias  # noqa: E731
    x, y = jnp.array([[0.0, 0.5]]), jnp.array([0])
    problem = rj.untargeted(logits_fn, x, y, rj.l2(jnp.inf))
    result = fab.fab(20, targeted=False)(jax.random.key(0), problem)
    assert float(result.size[0]) == pytest.approx(0.1, rel=0.02)


def steps(problem, attack, state, first, last):
    for t in range(first, last):
        state, _ = attack.step(jax.random.fold_in(jax.random.key(1), t), state, problem)
    return state


def test_rows_of_a_state_may_be_gathered_midway():
    oracle = testing.linear_oracle("L2", batch_size=8, box_active=True)
    target = 1 - oracle.y
    attack = fab.kernel(fab.fab_settings())

    def build(rows):
        return rj.untargeted(
            oracle.logits_fn,
            oracle.x[rows],
            oracle.y[rows],
            oracle.threat,
            lambda z, y: difference(z, y, target[rows]),
            index=jnp.asarray(rows, jnp.int32),
        )

    rows, order = np.arange(8), np.random.default_rng(0).permutation(8)
    state = attack.init(jax.random.key(0), build(rows))
    assert all(leaf.shape[0] == 8 for leaf in jax.tree.leaves(state))
    middle = steps(build(rows), attack, state, 0, 4)
    whole = steps(build(rows), attack, middle, 4, 8)
    moved = jax.tree.map(lambda leaf: leaf[order], middle)
    shuffled = steps(build(order), attack, moved, 4, 8)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(shuffled), strict=True):
        np.testing.assert_array_equal(a[order], b)


def test_a_restart_begins_half_of_epsilon_away():
    oracle = testing.linear_oracle("L2", batch_size=4)
    problem = rj.untargeted(oracle.logits_fn, oracle.x, oracle.y, rj.l2(0.4, -9, 9))
    settings = fab.fab_settings(random_start=True)
    state = fab.kernel(settings).init(jax.random.key(0), problem)
    size = np.linalg.norm(state.delta.reshape(4, -1), axis=1)
    np.testing.assert_allclose(size, 0.2, rtol=1e-5)


def test_bad_settings_say_the_fix():
    with pytest.raises(ValueError, match="alpha_max=2"):
        fab.fab_settings(alpha_max=2)
    with pytest.raises(ValueError, match="beta=0"):
        fab.fab_settings(beta=0)
    with pytest.raises(ValueError, match="num_steps=0"):
        fab.fab(0)
    with pytest.raises(TypeError, match="no projection for L0"):
        nearest_on_plane(rj.L0(), jnp.zeros(()), jnp.ones(2), -jnp.ones(2), jnp.ones(2))
