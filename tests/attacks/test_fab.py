"""FAB: its projections against linear programs, its distances against closed forms."""

import functools
from typing import NamedTuple

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
DUALS = {"Linf": 1, "L2": 2, "L1": np.inf}
DIMENSION = 6
STEPS = 25


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


def test_weights_of_many_magnitudes_and_nearly_all_room_needed():
    """Newton's passes suffice: the plane is met, by the form that the optimum has."""
    rng = np.random.default_rng(0)
    w = np.exp(3 * rng.normal(size=(64, 200))).astype(np.float32)
    low = -(rng.uniform(size=w.shape) ** 4).astype(np.float32)
    need = (np.abs(w * low).sum(1) * np.linspace(0.1, 0.999, 64)).astype(np.float32)
    for norm in NORMS.values():
        moved = project(norm, *map(jnp.asarray, (need, w, low, -low)))
        met = (np.asarray(moved, np.float64) * w).sum(1)
        np.testing.assert_allclose(-met, need, rtol=1e-5)


@pytest.mark.parametrize(("eta", "most"), [(1.05, 1.01), (1.001, 1.001)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box_active", [False, True])
def test_finds_the_exact_distance_of_a_linear_model(norm, box_active, eta, most):
    """To a tenth of what it overshoots: from `beta` of the way a move goes beyond."""
    oracle = testing.linear_oracle(norm, box_active=box_active, batch_size=6)
    threat = rj.threat(norm, np.inf, oracle.threat.lower, oracle.threat.upper)
    result = testing._run(fab.fab(30, eta=eta), oracle._replace(threat=threat))
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
        assert distance * (1 - 1e-4) <= result.size[i] <= distance * most


@pytest.mark.parametrize("targeted", [True, False])
def test_success_counts_inside_the_ball_only(targeted):
    oracle = testing.linear_oracle("L2", batch_size=8, box_active=True, epsilon=0.2)
    result = testing._run(fab.fab(20, targeted=targeted), oracle)
    # Who has no success in the ball gets a point of it all the same.
    assert rj.is_feasible(oracle.threat, oracle.x, result.x_adv).all()
    assert 0 < (oracle.worst_margin > 0.02).sum() < 8
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
    go = jax.jit(lambda key: fab.fab(20, targeted=False)(key, problem))
    result = go(jax.random.key(0))
    assert float(result.size[0]) == pytest.approx(0.1, rel=0.02)


def test_rows_of_a_state_may_be_gathered_midway():
    oracle = testing.linear_oracle("L2", batch_size=8, box_active=True)
    attack = fab.kernel(fab.fab_settings())

    def build(rows):
        target = 1 - oracle.y[rows]
        return rj.untargeted(
            oracle.logits_fn,
            oracle.x[rows],
            oracle.y[rows],
            oracle.threat,
            lambda z, y: difference(z, y, target),
            index=rows,
        )

    @jax.jit
    def steps(rows, state):
        def body(state, t):
            return attack.step(jax.random.key(t), state, build(rows))[0], None

        return jax.lax.scan(body, state, jnp.arange(4))[0]

    rows, order = jnp.arange(8), np.random.default_rng(0).permutation(8)
    state = attack.init(jax.random.key(0), build(rows))
    assert all(leaf.shape[0] == 8 for leaf in jax.tree.leaves(state))
    middle = steps(rows, state)
    whole = steps(rows, middle)
    moved = jax.tree.map(lambda leaf: leaf[order], middle)
    shuffled = steps(jnp.asarray(order), moved)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(shuffled), strict=True):
        np.testing.assert_array_equal(a[order], b)


class Net(NamedTuple):
    """A tiny net in float64, written again: `tanh(x A + a) B`, K classes."""

    inner: np.ndarray
    bias: np.ndarray
    outer: np.ndarray

    def logits(self, x):
        return np.tanh(x @ self.inner + self.bias) @ self.outer

    def jacobian(self, x):
        slope = 1 - np.tanh(x @ self.inner + self.bias) ** 2
        return (self.inner * slope) @ self.outer  # [D, K]


def plane_move(norm, value, w, low, high):
    """The nearest point by bisection over the multiplier, 200 halvings, float64."""
    against = -np.sign(w) * (-1 if value < 0 else 1)
    room = np.where(against > 0, high, -low) * (w != 0)
    steep = np.abs(w)
    if steep @ room <= abs(value):
        return against * room
    if norm == "L1":
        left, moved = abs(value), np.zeros_like(w)
        for i in np.argsort(-steep):
            moved[i] = min(room[i], left / steep[i])
            left -= moved[i] * steep[i]
        return against * moved
    rate = steep if norm == "L2" else (w != 0) * 1.0
    below, above = 0.0, 1e9
    for _ in range(200):
        middle = (below + above) / 2
        enough = steep @ np.minimum(middle * rate, room) >= abs(value)
        below, above = (below, middle) if enough else (middle, above)
    return against * np.minimum(above * rate, room)


def boundary(norm, net, x, y, target):
    """Gap and gradient of the target's boundary at x, or of the nearest one."""
    z, jac = net.logits(x), net.jacobian(x)
    other = target
    if other is None:
        far = np.array([
            np.inf if k == y else abs(z[k] - z[y])
            / np.linalg.norm(jac[:, k] - jac[:, y], DUALS[norm])
            for k in range(len(z))
        ])  # fmt: skip
        other = far.argmin()
    return z[other] - z[y], jac[:, other] - jac[:, y]


def moved_from(norm, x, delta, start, gap, w):
    """From `start`, by the boundary as linearized at `delta`."""
    here = plane_move(norm, gap + w @ (start - delta), w, -x - start, 1 - x - start)
    there = plane_move(norm, gap - w @ delta, w, -x, 1 - x)
    near, far = (np.linalg.norm(d, SIZES[norm]) for d in (here, there))
    a = min(max(near, 1e-8) / (max(near, 1e-8) + max(far, 1e-8)), 0.1)
    moved = (1 - a) * (start + 1.05 * here) + a * 1.05 * there
    return np.clip(x + moved, 0, 1) - x


def iterated(norm, net, x, y, target, num_steps, progress):
    """The points where the authors' iterations arrive."""
    del progress
    delta, best, points = np.zeros_like(x), np.inf, []
    for _ in range(num_steps):
        gap, w = boundary(norm, net, x + delta, y, target)
        delta = moved_from(norm, x, delta, delta, gap, w)
        points.append(delta)
        if net.logits(x + delta).argmax() != y:
            best = min(best, np.linalg.norm(delta, SIZES[norm]))
            delta = 0.9 * delta
    return np.array(points), best


def transcribed(norm, net, x, y, target, num_steps, progress):
    """The points that FAB evaluates for one example, by the paper's formulas."""
    delta, best, stepped_back, points = np.zeros_like(x), np.inf, False, []
    for _ in range(num_steps):
        points.append(delta)
        gap, w = boundary(norm, net, x + delta, y, target)
        size = np.linalg.norm(delta, SIZES[norm])
        wrong = net.logits(x + delta).argmax() != y
        much = size < progress * best if progress else False
        best = min(best, size) if wrong else best
        if wrong and not stepped_back and not much:
            delta, stepped_back = 0.9 * delta, True
            continue
        start = 0.9 * delta if wrong and not stepped_back else delta
        stepped_back = False
        delta = moved_from(norm, x, delta, start, gap, w)
    return np.array(points), best


@pytest.mark.parametrize("norm", NORMS)
def test_below_the_floor_nothing_moves_under_l2_and_l1(norm):
    """The authors' floor is absolute, and Linf has none."""
    w, room = jnp.array([1.0, 1e-9, -1e-7, 0.0]), jnp.ones(4)
    out_of_reach = rj.threat(norm, 1.0).norm, jnp.float32(5.0), w, -room, room
    assert nearest_on_plane(*out_of_reach).tolist() == [-1, -1, 1, 0]
    with_floor = nearest_on_plane(*out_of_reach, floor=1e-8).tolist()
    assert with_floor == ([-1, -1, 1, 0] if norm == "Linf" else [-1, 0, 1, 0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("form", [0.0, 0.99, "reference"])
def test_the_points_are_those_of_a_transcription(norm, targeted, form):
    rng = np.random.default_rng(3)
    net = Net(rng.normal(size=(5, 8)), rng.normal(size=8), rng.normal(size=(8, 4)))
    x = rng.uniform(size=(6, 5))
    x[:, 0] = 0.0  # on a face of the box
    y, target = net.logits(x).argmax(1), net.logits(x).argsort(1)[:, -2]
    inner, bias, outer = (jnp.asarray(a, jnp.float32) for a in net)
    loss = lambda z, y: difference(z, y, jnp.asarray(target))  # noqa: E731
    problem = rj.untargeted(
        lambda x: jnp.tanh(x @ inner + bias[None]) @ outer,
        jnp.asarray(x, jnp.float32),
        jnp.asarray(y),
        rj.threat(norm, np.inf),
        loss,
    )
    reference = form == "reference"
    progress = 0.99 if reference else form
    attack = fab.kernel(
        fab.fab_settings(targeted=targeted, progress=progress, reference=reference)
    )

    @jax.jit
    def go(key):
        def body(state, t):
            state, info = attack.step(key, state, problem)
            return state, info.delta

        return jax.lax.scan(body, attack.init(key, problem), jnp.arange(STEPS))

    state, points = go(jax.random.key(0))
    for i in range(len(x)):
        aim = target[i] if targeted else None
        expect = iterated if reference else transcribed
        wanted, best = expect(norm, net, x[i], y[i], aim, STEPS, progress)
        np.testing.assert_allclose(points[:, i], wanted, atol=1e-4)
        np.testing.assert_allclose(state.best_size[i], best, rtol=1e-3)
    assert np.isfinite(state.best_size).sum() >= 4  # both kinds of step were taken


@pytest.mark.parametrize("norm", NORMS)
def test_a_restart_begins_half_of_epsilon_away(norm):
    oracle = testing.linear_oracle(norm, batch_size=4)
    settings = fab.fab_settings(random_start=True)

    @jax.jit
    def first(epsilon):
        threat = rj.ThreatModel(oracle.threat.norm, epsilon, -9.0, 9.0)
        problem = rj.untargeted(oracle.logits_fn, oracle.x, oracle.y, threat)
        return fab.kernel(settings).init(jax.random.key(0), problem).delta

    size = jax.vmap(oracle.threat.norm.size)
    np.testing.assert_allclose(size(first(0.4)), 0.2, rtol=1e-5)
    far = np.asarray(first(jnp.inf))  # without a budget the box is the scale
    assert (np.abs(oracle.x + far) <= 9).all()
    assert (size(far) > 0.1).all()


def test_restarts_lose_nothing_and_reach_another_boundary():
    """At x the gradient is 0: only a run that begins elsewhere finds the way."""

    def flat(x):
        ramp = jax.nn.relu(x[:, :1] - 0.5)
        return jnp.concatenate([jnp.zeros_like(ramp), ramp - 0.1], 1)

    x, y = jnp.full((4, 2), 0.4), jnp.zeros(4, jnp.int32)
    problem = rj.untargeted(flat, x, y, rj.linf(0.4))
    go = jax.jit(
        lambda key, n: fab.fab(20, num_restarts=n)(key, problem), static_argnums=1
    )
    assert not go(jax.random.key(0), 1).success.any()
    result = go(jax.random.key(0), 8)
    assert result.success.all()
    np.testing.assert_allclose(result.size, 0.2, rtol=0.01)


def test_bad_settings_say_the_fix():
    with pytest.raises(ValueError, match="alpha_max=2"):
        fab.fab_settings(alpha_max=2)
    with pytest.raises(ValueError, match="beta=0"):
        fab.fab_settings(beta=0)
    with pytest.raises(ValueError, match="progress=-1"):
        fab.fab_settings(progress=-1)
    with pytest.raises(ValueError, match="num_restarts=0"):
        fab.fab(num_restarts=0)
    with pytest.raises(ValueError, match="num_steps=0"):
        fab.fab(0)
    with pytest.raises(TypeError, match="no projection for L0"):
        nearest_on_plane(rj.L0(), jnp.zeros(()), jnp.ones(2), -jnp.ones(2), jnp.ones(2))
