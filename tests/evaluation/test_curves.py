"""Curves of accuracy against epsilon on linear models, whose distances are known."""

import jax
import numpy as np
import pytest
from scipy import optimize

import robustjax as rj
from robustjax import testing
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
        batch_size=2,
        mesh=data_mesh(jax.devices()[:4]),
    )
    np.testing.assert_array_equal(four.accuracy, curve.accuracy)
    truth = distances()
    assert curve.epsilon.tolist() == pytest.approx(sorted(epsilons))
    for epsilon, accuracy in zip(curve.epsilon, curve.accuracy, strict=True):
        clear = np.abs(truth - epsilon) > 0.01
        assert abs(accuracy - (truth > epsilon).mean()) <= (~clear).mean()
