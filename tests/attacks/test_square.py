"""Square against a NumPy transcription on the same draws, and against its promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax import testing
from robustjax.attacks.square import (
    HALVED_AFTER,
    SquareState,
    _bump,
    _sides,
    kernel,
    square,
    square_settings,
)

THREATS = {"Linf": rj.linf(0.1), "L2": rj.l2(0.6), "L1": rj.l1(2.0)}
norms = pytest.mark.parametrize("norm", THREATS)
KEY = jax.random.key(3)
# Rows at different places of the schedule: big windows and small ones at once.
ITERATIONS = np.array([0, 30, 100, 300, 1500, 4500], np.int32)


def _linear(weight, x):
    z = x.reshape(x.shape[0], -1) @ weight
    return jnp.stack([z, -z], axis=-1)


def _problem(x, y, threat, weight, **kwargs):
    logits_fn = functools.partial(_linear, weight)
    return rj.untargeted(logits_fn, x, y, threat, rj.losses.margin_loss, **kwargs)


@jax.jit
def _init(settings, key, x, y, threat, weight):
    return kernel(settings).init(key, _problem(x, y, threat, weight))


@jax.jit
def _step(settings, key, state, x, y, threat, weight, index):
    problem = _problem(x, y, threat, weight, index=index)
    return kernel(settings).step(key, state, problem)


def _data(shape, count=6, seed=0, box=(0.0, 1.0)):
    rng = np.random.default_rng(seed)
    x = rng.uniform(*box, (count, *shape)).astype(np.float32)
    weight = rng.normal(size=int(np.prod(shape))).astype(np.float32)
    return jnp.asarray(x), jnp.zeros(count, jnp.int32), jnp.asarray(weight)


def _draws(key, index, channels, shared=False):
    key = jax.random.split(key)[1]
    if shared:
        return np.asarray(jax.random.uniform(key, (5 + channels,)))
    keys = rj.example_keys(key, jnp.asarray(index))
    draw = jax.vmap(lambda k: jax.random.uniform(k, (5 + channels,)))
    return np.asarray(draw(keys))


# The transcription, in float64 and loops, for ONE image [c, h, w].


def _np_side(norm, p, height, width):
    side = round(np.sqrt(p * height * width))
    return max(side, 1) if norm == "Linf" else max(side, 3) // 2 * 2 + 1


def _np_p(iteration, p_init=0.8):
    return p_init / 2 ** sum(iteration > limit for limit in HALVED_AFTER)


def _np_pyramid(rows, columns, power):
    out = np.zeros((rows, columns))
    for k in range(max(rows, columns) // 2 + 1):
        up, left = max(rows // 2 - k, 0), max(columns // 2 - k, 0)
        out[up : rows // 2 + k + 1, left : columns // 2 + k + 1] += 1 / (k + 1) ** power
    return out


def _np_norm(value, order):
    return (np.abs(value) ** order).sum() ** (1 / order)


def _np_eta(rows, columns, across, order):
    if across:
        return _np_eta(columns, rows, False, order).T
    power = 4 if order == 1 else 2
    parts = []
    for sign, count in ((1, rows // 2), (-1, rows - rows // 2)):
        if count:
            part = _np_pyramid(count, columns, power)
            parts.append(sign * part / _np_norm(part, order))
    eta = np.concatenate(parts)
    return eta / _np_norm(eta, order)


def _np_propose(norm, draw, iteration, delta, x, epsilon, box=(0, 1), reach=0):
    channels, height, width = delta.shape
    side = _np_side(norm, _np_p(iteration), height, width)
    side = min(side, height, width)

    def corner(u, v):
        return int(u * (height - side + reach)), int(v * (width - side + reach))

    def at(corner):
        return np.s_[:, corner[0] : corner[0] + side, corner[1] : corner[1] + side]

    first, second = corner(*draw[:2]), corner(*draw[2:4])
    signs = np.where(draw[5:] < 0.5, -1.0, 1.0)[:, None, None]
    new = delta.copy()
    if norm == "Linf":
        new[at(first)] += 2 * epsilon * signs
        new = np.clip(np.clip(new, -epsilon, epsilon), box[0] - x, box[1] - x)
        return new, first, side
    order = 1 if norm == "L1" else 2
    union = np.zeros(delta.shape, bool)
    union[at(first)] = union[at(second)] = True
    eta = _np_eta(side, side, draw[4] < 0.5, order)
    unused = max(epsilon**order - (np.abs(delta) ** order).sum(), 0)
    new[at(second)] = 0
    for c in range(channels):
        old = delta[c][at(first)[1:]]
        u = signs[c] * eta + old / max(_np_norm(old, order), 1e-12)
        mass = unused / channels + (np.abs(delta[c][union[c]]) ** order).sum()
        mass = mass * channels if order == 1 else np.sqrt(mass)
        new[c][at(first)[1:]] = u / _np_norm(u, order) * mass
    return new, first, side


@pytest.mark.parametrize("rescale", [False, True])
def test_schedule_of_p(rescale):
    """As the rule is written: halved after those iterations, of 10,000 if rescaled."""
    for count in (200, 5000, 10000, 777):
        halve_at = np.asarray(square_settings(count, rescale=rescale).halve_at)
        for iteration in range(0, count, 7):
            read = iteration * 10000 // count if rescale else iteration
            halvings = sum(read > limit for limit in HALVED_AFTER)
            assert (iteration >= halve_at).sum() == halvings


@norms
def test_sides_of_windows(norm):
    settings = square_settings()
    sides = jax.jit(
        jax.vmap(functools.partial(_sides, settings, THREATS[norm].norm, 28, 28))
    )
    iterations = np.arange(0, 9000, 10)
    tall, wide = sides(iterations)
    expected = [_np_side(norm, _np_p(i), 28, 28) for i in iterations]
    np.testing.assert_array_equal(tall, expected)
    np.testing.assert_array_equal(wide, expected)


def test_windows_of_long_images_keep_their_area():
    for norm in (rj.linf(1).norm, rj.l2(1).norm):
        for height, width in ((4, 100), (100, 4), (1, 400)):
            for iteration in (0, 20, 100):
                sides = _sides(square_settings(), norm, height, width, iteration)
                area = _np_p(iteration) * 400
                tall, wide = (int(side) for side in sides)
                assert 1 <= tall <= height and 1 <= wide <= width
                # At least a side's rounding, in the side that is not the image's.
                assert abs(tall * wide - area) <= 2 * np.sqrt(area) + 4


@pytest.mark.parametrize("order", [1, 2])
def test_bump_is_the_transcriptions(order):
    bump = jax.jit(lambda *args: _bump((9, 8), *args, order))
    for rows, columns in ((7, 7), (8, 8), (3, 3), (2, 2), (1, 1), (1, 6), (5, 4)):
        for across in (False, True):
            eta = bump((1, 0), (rows, columns), jnp.bool_(across)).reshape(9, 8)
            expected = np.zeros((9, 8))
            expected[1 : 1 + rows, :columns] = _np_eta(rows, columns, across, order)
            np.testing.assert_allclose(eta, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("norm", "shared"),
    [(norm, shared) for norm in ("Linf", "L2", "L1") for shared in (False, True)],
)
def test_proposals_equal_the_transcription(norm, shared):
    """From an arbitrary feasible point, on the draws that the kernel makes."""
    shape, threat = (16, 16, 2), THREATS[norm]
    x, y, weight = _data(shape)
    rng = np.random.default_rng(1)
    start = rj.threats.project(threat, x, jnp.asarray(rng.normal(size=x.shape)) * 0.1)
    index = np.arange(6, dtype=np.int32) * 5
    settings = square_settings(shared_window=shared)
    state = SquareState(
        start, start, jnp.full(6, 1e9), jnp.zeros(6, bool), jnp.asarray(ITERATIONS)
    )
    state, info = _step(settings, KEY, state, x, y, threat, weight, index)
    np.testing.assert_array_equal(info.delta, start)
    np.testing.assert_array_equal(state.best, start)  # 1e9 is not reached
    np.testing.assert_array_equal(state.iteration, ITERATIONS + 1)
    own = _draws(KEY, index, 2)
    epsilon = float(threat.epsilon)
    for row, iteration in enumerate(ITERATIONS):
        draw = own[row]
        if shared:
            together = _draws(KEY, index, 2, shared=True)
            draw = together if norm == "Linf" else np.append(together[:5], draw[5:])
        image = [np.asarray(a[row], np.float64).transpose(2, 0, 1) for a in (start, x)]
        new, _, _ = _np_propose(
            norm,
            draw,
            iteration,
            *image,
            epsilon,
            reach=int(norm == "Linf" and not shared),
        )
        if norm != "Linf":
            expected = jnp.asarray(new.transpose(1, 2, 0)[None], jnp.float32)
            one_x = x[row : row + 1]
            if norm == "L2":
                assert np.linalg.norm(new) <= epsilon * (1 + 1e-6)
                expected = jnp.clip(expected, -one_x, 1 - one_x)
            else:
                expected = rj.threats.project(threat, one_x, expected)
            new = np.asarray(expected[0]).transpose(2, 0, 1)
        moved = np.asarray(state.delta[row]).transpose(2, 0, 1)
        np.testing.assert_allclose(moved, new, atol=2e-5)


def test_l2_proposals_have_size_epsilon_where_no_box_clips():
    shape, threat = (9, 9, 2), rj.l2(0.6, -100, 100)
    x, y, weight = _data(shape)
    state = _init(square_settings(), KEY, x, y, threat, weight)
    for step in range(5):
        state = state._replace(iteration=jnp.asarray(ITERATIONS))
        key = jax.random.fold_in(KEY, step)
        sizes = jnp.sqrt(jnp.sum(state.delta**2, (1, 2, 3)))
        np.testing.assert_allclose(sizes, 0.6, rtol=1e-5)
        state, _ = _step(
            square_settings(), key, state, x, y, threat, weight, jnp.arange(6)
        )


def test_linf_proposals_change_one_window_to_a_corner_of_the_ball():
    shape, threat = (9, 9, 2), rj.linf(0.1, -100, 100)
    x, y, weight = _data(shape)
    state = _init(square_settings(), KEY, x, y, threat, weight)
    stripes = np.asarray(state.delta)
    np.testing.assert_array_equal(np.abs(stripes), np.float32(0.1))
    assert (stripes == stripes[:, :1]).all()  # vertical: one sign per column
    assert len(np.unique(stripes[:, 0].reshape(-1, 9 * 2), axis=0)) == 6
    state = state._replace(iteration=jnp.asarray(ITERATIONS))
    for step in range(6):
        key = jax.random.fold_in(KEY, step)
        state, _ = _step(
            square_settings(), key, state, x, y, threat, weight, jnp.arange(6)
        )
        state = state._replace(iteration=jnp.asarray(ITERATIONS))
        delta, best = np.asarray(state.delta), np.asarray(state.best)
        np.testing.assert_array_equal(np.abs(delta), np.float32(0.1))
        for row, iteration in enumerate(ITERATIONS):
            changed = delta[row] != best[row]
            assert changed.any()  # no query is lost
            side = _np_side("Linf", _np_p(iteration), 9, 9)
            rows, columns = np.nonzero(changed.any(-1))
            assert np.ptp(rows) < side and np.ptp(columns) < side


@pytest.mark.parametrize("shared", [False, True])
def test_corners_reach_all_positions(shared):
    """Uniform; only the shared form never begins in the last row and column."""
    count, (height, width) = 512, (5, 4)
    x, y, weight = _data((height, width), count)
    state = SquareState(
        jnp.zeros_like(x),
        jnp.zeros_like(x),
        jnp.full(count, 1e9),
        jnp.zeros(count, bool),
        jnp.full(count, 700, jnp.int32),  # p = 0.05: a side of one pixel
    )
    settings, hits = square_settings(shared_window=shared), np.zeros((height, width))
    threat = rj.linf(0.1, -9, 9)
    for step in range(200 if shared else 8):
        key = jax.random.fold_in(KEY, step)
        after, _ = _step(settings, key, state, x, y, threat, weight, jnp.arange(count))
        changed = np.asarray(after.delta) != 0
        assert (changed.sum((1, 2)) == 1).all()
        hits += changed.mean(0) if shared else changed.sum(0)
        if shared:
            assert (changed == changed[0]).all()
    if shared:
        assert (hits[-1] == 0).all() and (hits[:, -1] == 0).all()
        assert (hits[:-1, :-1] > 0).all()
    else:
        expected = 8 * count / (height * width)
        assert (np.abs(hits - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("shape", [(6,), (4, 4), (20, 2), (16, 16)])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_which_features_are_reached(norm, shape):
    """All, but for the last row and column of an image under L2 and L1."""
    count = 2048
    x, y, weight = _data(shape, count)
    start = jnp.zeros_like(x)
    state = SquareState(
        *(start, start, jnp.full(count, 1e9)),
        *(jnp.zeros(count, bool), jnp.full(count, 9000)),
    )
    after, _ = _step(
        square_settings(), KEY, state, x, y, THREATS[norm], weight, jnp.arange(count)
    )
    reached = (np.asarray(after.delta) != 0).any(0)
    expected = np.ones(shape, bool)
    if shape == (16, 16) and norm != "Linf":
        expected[-1] = expected[:, -1] = False
    np.testing.assert_array_equal(reached, expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_channels_first_equals_channels_last(norm):
    x, y, weight = _data((9, 9, 2))
    first = {"HWC": x, "CHW": jnp.moveaxis(x, -1, 1)}
    weights = {
        "HWC": weight,
        "CHW": jnp.moveaxis(weight.reshape(9, 9, 2), -1, 0).ravel(),
    }
    deltas = {}
    for axes, x in first.items():
        settings = square_settings(axes=axes)
        args = (x, y, THREATS[norm], weights[axes])
        state = _init(settings, KEY, *args)
        deltas[axes] = [state.delta]
        for step in range(4):
            key = jax.random.fold_in(KEY, step)
            state, _ = _step(settings, key, state, *args, jnp.arange(6))
            deltas[axes].append(state.delta)
    for last, first in zip(deltas["HWC"], deltas["CHW"], strict=True):
        moved = jnp.moveaxis(first, 1, -1)
        if norm == "Linf":
            np.testing.assert_array_equal(last, moved)
        np.testing.assert_allclose(last, moved, atol=1e-5)


@norms
def test_a_search_accepts_what_is_better_and_loses_nothing(norm):
    """The state is the worst of what was evaluated; half the rows gathered midway."""
    shape, threat = (9, 9, 2), THREATS[norm]
    x, y, weight = _data(shape)
    clean = np.asarray(x).reshape(6, -1) @ np.asarray(weight)
    y = jnp.asarray(np.where(clean > 0, 0, 1).astype(np.int32))
    settings, index = square_settings(40), np.arange(6, dtype=np.int32)
    state = _init(settings, KEY, x, y, threat, weight)
    infos, states = [], [state]
    for step in range(40):
        key = jax.random.fold_in(KEY, step)
        state, info = _step(settings, key, state, x, y, threat, weight, index)
        infos.append(info)
        states.append(state)
        assert bool(rj.is_feasible(threat, x, x + info.delta, 2e-6).all())
    scores = np.array([info.score for info in infos])
    best = np.array([s.best_score for s in states[1:]])
    np.testing.assert_array_equal(best, np.maximum.accumulate(scores))
    assert (best[-1] > scores[0]).all()  # of 39 proposals one is better
    kept = np.argmax(scores, 0)
    for row in range(6):
        np.testing.assert_array_equal(state.best[row], infos[kept[row]].delta[row])
    np.testing.assert_array_equal(state.won, best[-1] > 0)

    # Another order of the rows from step 20 on: what a compacting runner does.
    order = np.array([4, 2, 0, 5, 3, 1])
    gathered = jax.tree.map(lambda leaf: leaf[order], states[20])
    for step in range(20, 40):
        key = jax.random.fold_in(KEY, step)
        gathered, _ = _step(
            settings, key, gathered, x[order], y[order], threat, weight, index[order]
        )
    for mine, theirs in zip(gathered, state, strict=True):
        np.testing.assert_array_equal(mine, theirs[order])


def test_a_win_is_accepted_although_its_score_is_lower():
    """Where the score is no margin: the reference's rule, then `worst`'s."""
    x = jnp.full((4, 3, 3), 0.5)
    best = SquareState(
        jnp.full_like(x, 0.05),
        jnp.zeros_like(x),
        jnp.array([1.0, 1.0, 1.0, -9.0]),
        jnp.array([False, False, True, True]),
        jnp.zeros(4, jnp.int32),
    )
    wins = jnp.array([True, False, False, True])

    def score(x, key):
        return jnp.zeros(4), jnp.where(wins[:, None], *jnp.eye(2)[:, None])

    problem = rj.untargeted(lambda x: x, x, jnp.ones(4, jnp.int32), rj.linf(0.1))
    problem = problem._replace(score=score)
    state, info = jax.jit(lambda b: kernel(square_settings()).step(KEY, b, problem))(
        best
    )
    taken = np.asarray((state.best == best.delta).all((1, 2)))
    np.testing.assert_array_equal(info.success, wins)
    np.testing.assert_array_equal(taken, [True, False, False, True])
    np.testing.assert_array_equal(state.won, [True, False, True, True])


# Vectors under every norm, and more of epsilon 0 and 1e6: the conformance table.
SHAPES = [
    ((1, 1, 1), "HWC", ("L2",)),
    ((2, 7, 3), "HWC", ("Linf", "L2")),
    ((3, 8, 2), "CHW", ("L1",)),
    ((5, 4), "CHW", ("L2",)),
    ((2, 2, 2, 3), None, ("Linf",)),
]
CASES = [(norm, shape, axes) for shape, axes, names in SHAPES for norm in names]


@pytest.mark.parametrize(("norm", "shape", "axes"), CASES)
def test_feasible_for_any_shape_and_budget(norm, shape, axes):
    x, y, weight = _data(shape, 4)
    x = jnp.where(x < 0.3, 0.0, jnp.where(x > 0.8, 1.0, x))  # on faces of the box
    attack_fn = square(30, axes=axes, rescale=True)
    go = jax.jit(lambda key, threat: attack_fn(key, _problem(x, y[:4], threat, weight)))
    make = type(THREATS[norm].norm)()
    for epsilon in (0.0, 1e-3, 0.5, 30.0, 1e6, np.inf):
        threat = rj.ThreatModel(make, jnp.float32(epsilon))
        result = go(KEY, threat)
        assert bool(rj.is_feasible(threat, x, result.x_adv).all()), epsilon
        if epsilon == 0:
            np.testing.assert_array_equal(result.x_adv, x)
        else:
            assert (np.asarray(result.size) > 0).all()


def test_a_budget_for_each_row():
    x, y, weight = _data((6, 6, 1), 4)
    threat = rj.l2(np.array([0.0, 0.1, 0.5, 1.0]))
    go = jax.jit(lambda key: square(30)(key, _problem(x, y, threat, weight)))
    result = go(KEY)
    assert bool(rj.is_feasible(threat, x, result.x_adv).all())
    assert (np.diff(np.asarray(result.size)) > 0).all()


def test_begins_where_the_problem_says():
    x, y, weight = _data((6, 6, 1), 4)
    threat = rj.linf(0.1)
    problem = _problem(x, y, threat, weight, start=jnp.clip(x + 0.3, 0, 1))
    state = kernel(square_settings()).init(KEY, problem)
    np.testing.assert_allclose(state.delta, jnp.clip(0.1, 0, 1 - x), atol=1e-6)


def test_needs_no_gradient_and_makes_exactly_its_queries():
    x, y, weight = _data((6, 6, 1), 4)
    seen = []

    def logits_fn(x):
        jax.debug.callback(lambda: seen.append(None))
        return jax.lax.stop_gradient(jnp.round(20 * _linear(weight, x)))

    problem = rj.untargeted(logits_fn, x, y, rj.linf(0.3), rj.losses.margin_loss)
    result = jax.jit(lambda key: square(25)(key, problem))(KEY)
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert len(seen) == 25
    clean = problem.score(x, None)[0]
    assert (np.asarray(result.score) > np.asarray(clean)).all()


def test_other_numbers_do_not_trace_again():
    x, y, weight = _data((6, 6, 1), 4)
    traces = []

    @jax.jit
    def go(settings, epsilon):
        traces.append(None)
        problem = _problem(x, y, rj.ThreatModel(rj.l2(1).norm, epsilon), weight)
        state = kernel(settings).init(KEY, problem)
        return kernel(settings).step(KEY, state, problem)

    for count, p_init, rescale in ((10, 0.8, False), (50, 0.1, True), (7, 1.0, False)):
        go(square_settings(count, p_init, rescale), jnp.float32(p_init))
    assert len(traces) == 1


def test_tolerance_against_the_linear_oracle():
    """Tens of queries in 12 dimensions come near the worst case; see conformance."""
    oracle = testing.linear_oracle("Linf")
    assert (testing.shortfall(square(300, rescale=True), oracle) < 0.05).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"p_init": 0.0}, "p_init=0.0"),
        ({"p_init": 1.5}, "p_init=1.5"),
        ({"axes": "NCHW"}, "axes='NCHW'"),
        ({"num_restarts": 0}, "n=0"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        square(**arguments)


def test_errors_for_shapes_and_norms():
    x, y, weight = _data((2, 2, 2, 2), 2)
    with pytest.raises(ValueError, match="axes=None"):
        square(2)(KEY, _problem(x, y, rj.linf(0.1), weight))
    with pytest.raises(TypeError, match="Linf, L2 or L1"):
        square(2, axes=None)(KEY, _problem(x, y, rj.l0(2), weight))
