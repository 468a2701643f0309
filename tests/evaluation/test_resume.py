"""How a run goes on from its ledger, and what a ledger takes for another run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax.evaluation import board as board_module
from tests.evaluation.small_net import COUNT, NET, THREAT, X, Y, evaluate, make_net, net


class Killed(Exception):
    pass


def test_killed_and_continued(tmp_path, monkeypatch):
    """Killed again and again, each time a little later; nothing finished is repeated,
    and the verdicts are those of an unbroken run."""
    standard = evaluate(suite="standard")
    driven, allowed = [], [0]
    original = board_module.drive

    def counted(driver, stage, *rest):
        if len(driven) == allowed[0]:
            raise Killed
        driven.append(stage.name)
        return original(driver, stage, *rest)

    monkeypatch.setattr(board_module, "drive", counted)
    folder = tmp_path / "ledger"
    for more in (1, 3, 8, 1000):
        allowed[0] = len(driven) + more
        try:
            report = evaluate(suite="standard", resume=folder)
            break
        except Killed:
            # A kill may leave half a line and half a file.
            with open(folder / "threat" / "ledger.jsonl", "a") as file:
                file.write('{"group": "half')
            (folder / "threat" / "groups" / "000099.npz.saving").write_bytes(b"half")
    np.testing.assert_array_equal(report.robust, standard.robust)
    for name, broken in standard.threats["threat"].broken_by.items():
        np.testing.assert_array_equal(report.threats["threat"].broken_by[name], broken)
    groups = [
        json.loads(line)["group"]
        for line in (folder / "threat" / "ledger.jsonl").read_text().splitlines()
    ]
    assert len(groups) == len(set(groups)) == len(driven)
    # Finished: the same call reads, and drives nothing.
    again = evaluate(suite="standard", resume=folder)
    assert len(driven) == len(groups)
    np.testing.assert_array_equal(again.robust, standard.robust)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"f": make_net(1)}, "model"),
        ({"f": jax.tree_util.Partial(net, [w * 1.001 for w in NET.args[0]])}, "model"),
        ({"x": np.clip(X + 1e-3, 0, 1)}, "x"),
        ({"threat": rj.linf(0.031)}, "threat"),
        ({"threat": rj.l2(0.03)}, "threat"),
        ({"threat": rj.linf(0.03, 0, 1.5)}, "threat"),
        ({"key": jax.random.key(1)}, "key"),
        ({"suite": ("apgd-ce", "apgd-dlr")}, "suite"),
        ({"index": np.arange(COUNT) + 1}, "index"),
        ({"y": (Y + 1) % 4}, "y"),
        ({"batch_size": 8}, "rows"),
    ],
)
def test_a_ledger_serves_nothing_else(tmp_path_factory, changes, field):
    folder = tmp_path_factory.getbasetemp() / "one ledger"
    if not folder.exists():
        evaluate(suite=("apgd-ce",), resume=folder)
    with pytest.raises(ValueError, match=f"another '{field}'"):
        evaluate(**({"suite": ("apgd-ce",), "resume": folder} | changes))


def test_a_ledger_of_a_closure_is_known_by_what_it_computes(tmp_path):
    """A bare closure has no weights to hash: its constants and its trace are."""
    evaluate(lambda x: NET(x), suite=("apgd-ce",), resume=tmp_path)
    evaluate(lambda x: NET(x), suite=("apgd-ce",), resume=tmp_path)
    with pytest.raises(ValueError, match="another 'model'"):
        evaluate(lambda x: 1.01 * NET(x), suite=("apgd-ce",), resume=tmp_path)


def test_a_ledger_sees_what_an_own_attack_does_under_each_threat(tmp_path):
    """It branches on the norm, and only the second branch is mended."""

    def own(steps):
        def mine(key, problem):
            weak = isinstance(problem.threat.norm, rj.norms.L2)
            return rj.pgd(steps if weak else 5)(key, problem)

        return {"mine": mine}

    threats = {"Linf": THREAT, "L2": rj.l2(0.2)}
    few = {"x": X[:4], "y": Y[:4], "threat": threats}
    given = {"suite": None, "resume": tmp_path, **few}
    evaluate(attacks=own(1), **given)
    with pytest.raises(ValueError, match="attacks"):
        evaluate(attacks=own(20), **given)
    with pytest.raises(ValueError, match="suite"):
        evaluate(attacks=own(1), individual=True, **given)


def test_a_ledger_sees_constants_inside_an_inner_jit(tmp_path):
    def towards(size):
        there = np.full(X.shape[1:], size, np.float32)
        move = jax.jit(lambda x: jnp.clip(x + there[None], 0, 1))

        def attack(key, problem):
            x_adv = move(problem.x)
            none = jnp.zeros(len(x_adv))
            return rj.Result(x_adv, none > 0, none, none)

        return {"mine": attack}

    evaluate(suite=("apgd-ce",), attacks=towards(0.01), resume=tmp_path)
    evaluate(suite=("apgd-ce",), attacks=towards(0.01), resume=tmp_path)
    with pytest.raises(ValueError, match="another 'attacks'"):
        evaluate(suite=("apgd-ce",), attacks=towards(0.02), resume=tmp_path)


def test_a_gradient_that_differs_is_another_model(tmp_path):
    def rounded(weights, x, key=None):
        return net(weights, jnp.round(8 * x) / 8)

    def mended(weights, x, key=None):
        return net(weights, rj.bpda(lambda x: jnp.round(8 * x) / 8)(x))

    weights = NET.args[0]
    y = np.asarray(jnp.argmax(rounded(weights, X), -1))
    few = {"suite": ("apgd-ce",), "resume": tmp_path, "y": y}
    evaluate(jax.tree_util.Partial(rounded, weights), **few)
    with pytest.raises(ValueError, match="another 'model'"):
        evaluate(jax.tree_util.Partial(mended, weights), **few)


def test_the_same_attack_twice_is_two_runs(tmp_path):
    report = evaluate(suite=("apgd-ce", "apgd-ce"), resume=tmp_path)
    lines = (tmp_path / "threat" / "ledger.jsonl").read_text().splitlines()
    groups = [json.loads(line)["group"] for line in lines]
    assert groups == ["apgd-ce 0#0", "apgd-ce 0, again 1#0"]
    assert report.robust_accuracy < 1


def test_threats_of_one_folder_are_refused_before_anything_runs(tmp_path):
    threats = {"L2 1": rj.l2(0.1), "L2_1": rj.l2(0.2)}
    with pytest.raises(ValueError, match="'L2 1' and 'L2_1' would share the folder"):
        evaluate(threat=threats, suite=("apgd-ce",), resume=tmp_path)
    assert not list(tmp_path.iterdir())
