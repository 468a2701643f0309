"""Certified radii, linear models and brackets, against closed forms and attacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax import models, testing
from robustjax.certify import bracket as brackets
from robustjax.certify.bracket import Bracket, CrossingError, bracket, check_crossing
from robustjax.certify.linear import linear_distance, linear_margin
from robustjax.certify.radius import (
    certified_radius,
    logit_radius,
    pair_radius,
    vector_radius,
)
from robustjax.certify.trace import trace
from robustjax.parallel import data_mesh

NORMS = ("Linf", "L2", "L1")
STEEPEST = {"Linf": np.sign, "L2": lambda w: w / np.linalg.norm(w)}


def steepest(w, norm):
    if norm == "L1":
        return np.where(np.arange(w.size) == np.abs(w).argmax(), np.sign(w), 0.0)
    return STEEPEST[norm](w)


def linear_net(num_classes=4, count=6, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(count, num_classes)).astype(np.float32)
    b = rng.normal(size=num_classes).astype(np.float32)
    x = rng.uniform(size=(5, count)).astype(np.float32)
    return w, b, x, (x @ w + b).argmax(1)


def logits_of(w, b):
    return jax.tree_util.Partial(lambda w, b, x: x @ w + b[None], w, b)


@pytest.mark.parametrize("box_active", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_linear_margin_is_the_oracles(norm, box_active):
    oracle = testing.linear_oracle(norm, box_active=box_active, batch_size=7)
    weight, bias = oracle.logits_fn.args
    weights = np.stack([weight, -weight], 1).astype(np.float64)
    box = (0.0, 1.0) if box_active else (-np.inf, np.inf)
    for epsilon, expected in (
        (float(oracle.threat.epsilon), oracle.worst_margin),
        (0.0, oracle.clean_margin),
    ):
        found = linear_margin(
            weights, [bias, -bias], oracle.x, oracle.y, norm, epsilon, *box
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_linear_distance_is_where_the_margin_ends(norm):
    w, b, x, y = linear_net()
    y[0] = (y[0] + 1) % 4  # wrong already
    for box in ((-np.inf, np.inf), (0.0, 1.0)):
        distance = linear_distance(w, b, x, y, norm, *box)
        assert distance[0] == 0
        for i in range(1, len(x)):
            one = x[i : i + 1], y[i : i + 1], norm
            if np.isinf(distance[i]):  # not even all of the box helps
                assert linear_margin(w, b, *one, 1e3, *box)[0] > 0
                continue
            assert linear_margin(w, b, *one, distance[i] * (1 - 1e-9), *box)[0] > 0
            assert linear_margin(w, b, *one, distance[i] * (1 + 1e-9), *box)[0] < 1e-9
    near = linear_distance(w, b, x, y, norm)
    assert (linear_distance(w, b, x, y, norm, 0.0, 1.0) >= near * (1 - 1e-9)).all()
    assert linear_distance(np.ones((6, 4)), b, x, [b.argmax()] * 5, norm)[0] == np.inf


@pytest.mark.parametrize(
    ("norm", "half", "no_box", "steep"),
    [("Linf", 2, 4 / 3, 3), ("L2", 5**0.5, 4 / 5**0.5, 5**0.5), ("L1", 3, 2, 2)],
)
def test_half_a_box_is_exact_in_closed_form(norm, half, no_box, steep):
    """`2 x_0 - x_1 + 3` at (1, 1): x_0 falls by 1 at most, x_1 rises without end."""
    w, b, one = np.array([[2.0, 0.0], [-1.0, 0.0]]), [3.0, 0.0], np.ones((1, 2))
    for sign, half_box in ((1, (0.0, np.inf)), (-1, (-np.inf, 0.0))):
        for box, expected in ((half_box, half), ((-np.inf, np.inf), no_box)):
            model = sign * w, b, sign * one, [0], norm
            distance = linear_distance(*model, *box)[0]
            assert distance == pytest.approx(expected, rel=1e-12)
            assert linear_margin(*model, 0.5, *box)[0] == pytest.approx(4 - steep / 2)
            there = linear_margin(*model, distance, *box)[0]
            assert there == pytest.approx(0, abs=1e-12)
            assert linear_margin(*model, np.inf, *box)[0] == -np.inf
    same = np.ones((2, 2)), [1.0, 0.0], one, [0], norm
    assert linear_distance(*same, 0.0, np.inf)[0] == np.inf
    assert linear_margin(*same, np.inf, 0.0, np.inf)[0] == 1


@pytest.mark.parametrize("norm", NORMS)
def test_half_a_box_is_a_box_that_reaches_far(norm):
    w, b, x, y = linear_net()
    for half, far in (
        ((0.0, np.inf), (0.0, 1e4)),
        ((-np.inf, 1.0), (-1e4, 1.0)),
        ((0.0, np.inf), (0.0, 1e30)),  # finite, and no reason to be less exact
        ((-np.inf, np.inf), (-1e4, 1e4)),
    ):
        distance = linear_distance(w, b, x, y, norm, *half)
        assert np.isfinite(distance).all()
        np.testing.assert_allclose(
            distance, linear_distance(w, b, x, y, norm, *far), rtol=1e-12
        )
        for epsilon in (0.1, 3.0):
            np.testing.assert_allclose(
                linear_margin(w, b, x, y, norm, epsilon, *half),
                linear_margin(w, b, x, y, norm, epsilon, *far),
                rtol=1e-12,
            )


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_net_the_radius_is_the_distance(norm):
    """Not above it, in float64; and close below."""
    w, b, x, y = linear_net()
    radius = certified_radius(trace(logits_of(w, b), x), x, y, norm)
    distance = linear_distance(w, b, x, y, norm)
    assert (radius < distance).all()
    assert (radius > 0.999 * distance).all()


@pytest.mark.parametrize("norm", NORMS)
def test_float32_keeps_its_answer_up_to_the_radius(norm):
    """The steepest step to the very edge of the ball, and its neighbors in float32."""
    for seed in range(20):
        w, b, x, y = linear_net(seed=seed, count=50)
        f = logits_of(w, b)
        radius = certified_radius(trace(f, x), x, y, norm).astype(np.float64)
        for i in range(len(x)):
            for j in set(range(4)) - {int(y[i])}:
                slope = (w[:, j] - w[:, y[i]]).astype(np.float64)
                step = steepest(slope, norm) * radius[i]
                x_adv = np.float32(x[i] + step * (1 - 1e-7))
                assert f(x_adv[None]).argmax() == y[i]


def test_formulas_of_radii():
    # z = (x, -x): each logit 1-Lipschitz; the vector sqrt(2); the pair 2.
    assert logit_radius(np.array([2.0]), 1.0)[0] == 1.0
    assert vector_radius(np.array([2.0]), np.sqrt(2))[0] == pytest.approx(1.0)
    assert pair_radius([[0.0, 2.0]], [[0.0, 2.0]], [0])[0] == 1.0
    assert pair_radius([[0.0, -1.0]], [[0.0, 2.0]], [0])[0] == 0.0
    assert pair_radius([[0.0, 1.0]], [[0.0, 0.0]], [0])[0] == np.inf


def test_a_constant_in_one_norm_serves_the_others():
    """Under Linf a matrix of signs is better measured in L2; the radius takes both."""
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    w = q[:, :2].astype(np.float32)
    f = jax.tree_util.Partial(lambda a, w, x: (x @ a) @ a.T @ w, q.astype("f"), w)
    x = np.random.default_rng(1).uniform(size=(3, 16)).astype(np.float32)
    y = np.asarray(f(x)).argmax(1)
    graph = trace(f, x)
    found = certified_radius(graph, x, y, "Linf")
    distance = linear_distance(w, np.zeros(2), x, y, "Linf")
    assert (found <= distance).all()
    l2 = certified_radius(graph, x, y, "L2")
    assert (found >= l2 / 4 * (1 - 1e-6)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_brackets_close_on_linear_nets(norm):
    w, b, x, y = linear_net(count=12)
    y[0] = (y[0] + 1) % 4
    threat = rj.threat(norm, {"Linf": 0.5, "L2": 2.0, "L1": 6.0}[norm], -9.0, 9.0)
    fab_steps = 5 if norm == "L2" else 0  # one norm is enough for FAB's part
    f = logits_of(w, b)
    found = bracket(f, x, y, threat, batch_size=5, fab_steps=fab_steps, checks="none")
    distance = linear_distance(w, b, x, y, norm)
    assert found.correct.tolist() == [False] + [True] * 4
    assert found.certified[0] == found.found[0] == 0
    assert (found.certified <= distance).all()
    known = np.isfinite(found.found)
    assert known.sum() >= 3
    assert (found.found[known] >= distance[known] * (1 - 1e-6)).all()
    # PGD alone may climb towards another class than the nearest.
    most = 1.02 if fab_steps else 1.3
    assert (found.found[known] <= most * distance[known]).all()
    low, high = found.accuracies([0.0, 1e-3, 100.0])
    assert low[0] == high[0] == 0.8
    assert low[-1] == 0.0
    assert (low <= high).all()
    assert "certified" in found.table([0.0, 0.1])
    figure = brackets.draw_bracket(found, "a linear net")
    assert figure.axes[0].get_title("left") == "a linear net"


def test_four_devices_give_the_bracket_of_one():
    w, b, x, y = linear_net(count=10)
    given = logits_of(w, b), x, y, rj.l2(2.0, -9.0, 9.0)
    asked = {"num_bisections": 3, "fab_steps": 3, "checks": "none"}
    one = bracket(*given, **asked)
    four = bracket(*given, **asked, mesh=data_mesh(jax.devices()[:4]), batch_size=2)
    np.testing.assert_array_equal(four.correct, one.correct)
    np.testing.assert_allclose(four.found, one.found, rtol=1e-4)
    assert np.isfinite(one.found).sum() >= 3


def test_a_radius_that_is_too_large_fails_loudly():
    w, b, x, y = linear_net()
    distance = linear_distance(w, b, x, y, "L2")
    with pytest.raises(CrossingError, match="certified radii are larger"):
        bracket(
            logits_of(w, b),
            *(x, y, rj.l2(2.0, -9.0, 9.0)),
            1.05 * distance,
            fab_steps=0,
            batch_size=5,
        )
    one = np.ones(1)
    check_crossing(Bracket("L2", one > 0, one, one))
    with pytest.raises(CrossingError, match="first example 0"):
        check_crossing(Bracket("L2", one > 0, 1.0001 * one, one))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"threat": rj.l0(2)}, "L0"),
        ({"radius": np.zeros(3)}, "one for each"),
    ],
)
def test_brackets_refuse_what_they_cannot_compare(change, complaint):
    w, b, x, y = linear_net()
    arguments = {"threat": rj.l2(0.5), "radius": np.zeros(5), **change}
    with pytest.raises(ValueError, match=complaint):
        bracket(logits_of(w, b), x, y, **arguments)


def test_wrong_arguments_are_named():
    w, b, x, y = linear_net()
    with pytest.raises(ValueError, match="L0"):
        linear_margin(w, b, x, y, "L0", 0.1)
    with pytest.raises(ValueError, match="-1"):
        linear_margin(w, b, x, y, "L2", -1)
    with pytest.raises(ValueError, match="L0"):
        certified_radius(trace(logits_of(w, b), x), x, y, "L0")


def test_attacks_respect_the_radius_of_a_small_net():
    """PGD of exactly the certified size, per example, in each norm."""
    model = models.mlp((16, 16), 3)
    x = np.random.default_rng(0).uniform(size=(32, 10)).astype(np.float32)
    f = models.logits_fn(model, *jax.jit(model.init)(jax.random.key(0), x))
    y = np.asarray(f(x)).argmax(1)
    graph = trace(f, x)
    attack_fn = rj.pgd(5)
    for norm in NORMS:
        radius = certified_radius(graph, x, y, norm)
        assert (radius > 0).mean() > 0.9
        for factor, wins in ((1.0, 0), (100.0, 1)):
            threat = rj.threat(norm, jnp.asarray(factor * radius), -9.0, 9.0)
            broken = rj.attack(f, x, y, threat, attack_fn, batch_size=32).success
            assert broken.sum() >= wins
            assert factor > 1 or not broken.any()
