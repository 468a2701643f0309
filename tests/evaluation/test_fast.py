"""What is particular to the suite `fast`."""

import jax
import numpy as np
import pytest

import robustjax as rj
from robustjax.evaluation import fast
from tests.evaluation.small_net import NET, evaluate, net


@pytest.mark.parametrize("factor", [2.0**13, 2.0**-13])
def test_fast_sees_through_a_scale_of_the_logits(factor):
    plain = evaluate(suite="fast")
    f = jax.tree_util.Partial(net, [NET.args[0][0], NET.args[0][1] * factor])
    scaled = evaluate(f, suite="fast")
    np.testing.assert_array_equal(scaled.robust, plain.robust)
    np.testing.assert_array_equal(
        scaled.threats["threat"].x_adv, plain.threats["threat"].x_adv
    )


@pytest.mark.parametrize("epsilon", [1e-7, 100.0])
def test_fast_says_what_it_left_out(epsilon, monkeypatch):
    """Nothing breaks, or everything at once; and where the ladder finds its work."""

    def note():
        found = evaluate(suite="fast", threat=rj.l2(epsilon)).threats["threat"]
        return found.notes[0], "apgd-t" in found.broken_by

    told, targets = note()
    assert "short APGD runs" in told and targets == (epsilon < 1)
    monkeypatch.setattr(fast, "ladder", lambda board, rounds: True)
    told, targets = note()
    assert "gradients mislead" in told and "leaves out FAB" in told and not targets


def test_where_gradients_mislead_a_sample_says_what_ladders_would_still_break(
    monkeypatch,
):
    monkeypatch.setattr(fast, "ladder", lambda board, rounds: True)
    climbed = []

    def round_of(board, places, kind, label):
        climbed.append(kind)
        board.alive[places[: kind == "b"]] = False  # one falls in two of the rounds
        return 1

    monkeypatch.setattr(fast, "round_of", round_of)
    found = evaluate(suite="fast", threat=rj.l2(1e-6)).threats["threat"]
    assert climbed == list("obnb")
    low, high = found.further
    assert 0 <= low < high <= 1
    # Of 24 survivors four are the sample, of which two fall: of the other 20 half.
    assert "broke 2 of 4 sampled" in found.notes[1]
    assert low + high == pytest.approx(20 / 24) and 0.1 < low < 0.2
    assert f"{low:.1%} to {high:.1%} of all" in found.notes[1]


def test_the_floor_of_small_sets():
    assert [fast.small_floor(n) for n in (20, 200, 400, 5000)] == [4, 6, 12, 12]
