"""Curves of accuracy against epsilon on linear models, whose distances are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import robustjax as rj
from robustjax import testing
from robustjax.certify.bracket import bracket
from robustjax.evaluation import runner
from robustjax.evaluation.curves import examined
from robustjax.parallel import data_mesh

ORACLE = testing.linear_oracle("L2", batch_size=10, box_active=True, seed=4)


def distances():
    w = np.asarray(ORACLE.logits_fn.args[0], np.float64)
    found = []
    for i, (x, y) in enumerate(zip(np.asarray(ORACLE.x), ORACLE.y, strict=True)):
        sign, row = (1.0 if y == 0 else -1.0), x.astype(np.float64)

        def left(epsilon, sign=sign, row=row, i=i):
            drop = testing._least("L2", sign * w, -row, 1 - row, epsilon)
            return ORACLE.clean_margin[i] + 2 * drop

        found.append(optimize.brentq(left, 0, 50) if left(50) < 0 else np.inf)
    return np.array(found)


def test_one_minimal_norm_run_gives_the_curve():
    y = np.array(ORACLE.y)
    y[0] = 1 - y[0]  # wrong without an attack
    curve = rj.minimal_norm_curve(
        ORACLE.logits_fn, ORACLE.x, y, rj.l2(1.0), num_steps=30, batch_size=10
    )
    truth = distances()
    truth[0] = 0
    np.testing.assert_allclose(curve.distance, truth, rtol=0.01, atol=1e-6)
    assert curve.accuracy[0] == 0.9
    assert (np.diff(curve.accuracy) <= 0).all()
    expected = (truth[None] * 1.005 > curve.epsilon[:, None]) & (truth > 0)[None]
    assert np.abs(curve.accuracy - expected.mean(1)).max() <= 0.1


def test_a_curve_without_an_end_ends_at_the_largest_distance():
    given = ORACLE.logits_fn, ORACLE.x, ORACLE.y
    curve = rj.minimal_norm_curve(*given, rj.linf(np.inf), num_steps=20)
    finite = np.isfinite(curve.distance)
    assert finite.sum() >= 5
    assert curve.epsilon[-1] == pytest.approx(curve.distance[finite].max())
    assert curve.accuracy[0] == 1 and curve.accuracy[-1] == (~finite).mean()


def test_a_sweep_agrees_where_it_looks():
    epsilons = [0.4, 0.05, 0.2]
    curve = rj.sweep_curve(
        ORACLE.logits_fn,
        *(ORACLE.x, ORACLE.y, rj.l2(1.0), epsilons),
        suite=("apgd-ce",),
        batch_size=10,
    )
    four = rj.sweep_curve(
        ORACLE.logits_fn,
        *(ORACLE.x, ORACLE.y, rj.l2(1.0), epsilons),
        suite=("apgd-ce",),
        checks="none",
        batch_size=2,
        mesh=data_mesh(jax.devices()[:4]),
    )
    np.testing.assert_array_equal(four.accuracy, curve.accuracy)
    truth = distances()
    assert curve.epsilon.tolist() == pytest.approx(sorted(epsilons))
    for epsilon, accuracy in zip(curve.epsilon, curve.accuracy, strict=True):
        clear = np.abs(truth - epsilon) > 0.01
        assert abs(accuracy - (truth > epsilon).mean()) <= (~clear).mean()


W = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
X = np.random.default_rng(1).uniform(-1, 1, (64, 20)).astype(np.float32)
WIDE = rj.linf(2.0, -10, 10)


def rounded(x):
    """No slope anywhere, and easily broken."""
    return jnp.round(4 * x) / 4 @ W


CURVES = {
    "minimal": lambda *given, **more: rj.minimal_norm_curve(
        *given, WIDE, num_steps=2, num_targets=1, **more
    ),
    "sweep": lambda *given, **more: rj.sweep_curve(
        *given, WIDE, [0.5, 2.0], suite=("apgd-ce",), **more
    ),
    "bracket": lambda *given, **more: bracket(
        *given, WIDE, np.zeros(64), num_bisections=0, fab_steps=0, **more
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_model_without_slopes_is_flagged(name):
    y = np.asarray(rounded(X)).argmax(1)
    with pytest.warns(rj.ModelWarning, match="vanishing gradient"):
        found = CURVES[name](rounded, X, y)
    if name != "bracket":
        assert "vanishing gradient" in [flag.name for flag in found.flags]
    if name == "minimal":
        assert found.accuracy[-1] > 0.9  # what is not to be trusted
    CURVES[name](rounded, X, y, checks="none")  # and now nothing is said
    with pytest.raises(ValueError, match="checks='full': choose 'default' or 'none'"):
        CURVES[name](rounded, X, y, checks="full")


def test_without_a_budget_the_model_is_examined_within_the_range_of_the_data():
    y = np.asarray(rounded(X)).argmax(1)
    with pytest.warns(rj.ModelWarning, match="vanishing gradient"):
        rj.minimal_norm_curve(
            *(rounded, X, y, rj.l2(np.inf, -10, 10)), num_steps=1, num_targets=1
        )


def test_a_random_model_is_judged_by_ten_draws():
    def noisy(x, key):
        return x @ W + 0.5 * jax.random.normal(key, (len(x), 3))

    y = (X @ W).argmax(1)
    rest = (WIDE, 0.5, None, 64, None, "default", None, None)
    board, flags = examined(noisy, X, y, *rest)
    assert "random" in [flag.name for flag in flags]
    assert len(board.driver.keys) == 10
    board, _ = examined(lambda x: x @ W, X, y, *rest)
    assert len(board.driver.keys) == 1


class Enough(Exception):
    pass


@pytest.mark.parametrize(
    ("threat", "curve", "at"),
    [
        (rj.linf(0.08, -10, 10), rj.minimal_norm_curve, 0.02),
        (rj.linf(np.inf, -10, 10), rj.minimal_norm_curve, np.ptp(X) / 32),
        (rj.l2(np.inf, -10, 10), rj.minimal_norm_curve, np.ptp(X) / 32 * 20**0.5),
        (rj.l2(4.0, -10, 10), bracket, 1.0),
        (WIDE, lambda *given: rj.sweep_curve(*given, [1.0, 0.02, 0.01]), 0.02),
    ],
)
def test_the_model_is_examined_where_points_are_left(monkeypatch, threat, curve, at):
    """At the end of the axis all fall, and no two runs of an attack can disagree."""

    def examine(driver, logits, x, y, threat, *rest):
        assert np.asarray(threat.epsilon) == pytest.approx(at, rel=1e-5)
        raise Enough

    monkeypatch.setattr(runner, "examine", examine)
    with pytest.raises(Enough):
        curve(lambda x: x @ W, X, (X @ W).argmax(1), threat)


def test_a_sweep_of_a_random_model_by_its_own_suite_says_nothing(monkeypatch):
    def noisy(x, key):
        return x @ W + 0.5 * jax.random.normal(key, (len(x), 3))

    def evaluate(*given, **how):
        raise Enough

    monkeypatch.setattr(runner, "evaluate", evaluate)
    given = noisy, X, (X @ W).argmax(1), WIDE, [0.1]
    with pytest.raises(Enough):  # and no warning, which would be an error, before it
        rj.sweep_curve(*given, suite="rand")
    with pytest.warns(rj.ModelWarning, match="random"), pytest.raises(Enough):
        rj.sweep_curve(*given, suite="fast")


def test_a_sweep_says_where_square_alone_breaks():
    """Flat inside of a cell: gradient attacks stand still, Square does not."""

    def flat(x):
        return jnp.where(jnp.abs(x) < 0.01, 0.0, jnp.sign(x)) @ W

    y = np.asarray(flat(X)).argmax(1)
    with pytest.warns(rj.ModelWarning) as warned:
        curve = rj.sweep_curve(
            *(flat, X, y, WIDE, [1.0]), suite=("apgd-ce", "square"), image_axes=None
        )
    said = [str(w.message) for w in warned]
    assert any("at epsilon 1 square, which uses no gradient" in text for text in said)
    assert len(said) == len(curve.flags) == len(set(said))


def test_a_sweep_needs_a_budget():
    with pytest.raises(ValueError, match="epsilons is empty"):
        rj.sweep_curve(rounded, X, np.zeros(64, int), WIDE, [])
