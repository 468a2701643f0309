"""Suites on models whose truth is known, and what `evaluate` takes and refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax import testing
from robustjax.evaluation import judge, runner, suites
from robustjax.parallel import data_mesh
from tests.evaluation.small_net import COUNT, NET, QUIET, THREAT, X, Y, evaluate, net


@pytest.fixture(scope="module")
def standard():
    return evaluate(suite="standard")


@pytest.mark.parametrize(
    ("suite", "norm"),
    [
        *(("fast", norm) for norm in ("Linf", "L2", "L1")),
        (("apgd-ce", "fab-t"), "L2"),
        pytest.param(("apgd-ce", "fab-t"), "Linf", marks=pytest.mark.slow),
        pytest.param(("apgd-ce", "fab-t"), "L1", marks=pytest.mark.slow),
    ],
)
def test_verdict_is_the_exact_one_on_a_linear_model(suite, norm):
    oracle = testing.linear_oracle(
        norm, shape=(3, 4, 1), batch_size=12, box_active=True, seed=5
    )
    report = rj.evaluate(
        oracle.logits_fn,
        oracle.x,
        oracle.y,
        oracle.threat,
        suite=suite,
        batch_size=16,
        **QUIET,
    )
    # What stands within a thousandth of the boundary may fall on either side.
    clear = np.abs(oracle.worst_margin) > 1e-3
    truth = oracle.worst_margin > 0
    np.testing.assert_array_equal(report.robust[clear], truth[clear])
    assert 0 < report.robust_accuracy < 1


def test_standard_reports_what_broke_what_and_at_what_cost(standard):
    found = standard.threats["threat"]
    assert list(found.broken_by) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert 0 < standard.robust_accuracy < standard.clean_accuracy
    broken = np.sum(list(found.broken_by.values()), 0)
    np.testing.assert_array_equal(broken, standard.correct & ~standard.robust)
    wrong = np.argmax(NET(found.x_adv), -1) != Y
    np.testing.assert_array_equal(wrong, ~standard.robust)
    assert bool(rj.is_feasible(THREAT, X, jnp.asarray(found.x_adv)).all())
    assert found.flipped == ()
    for stage in found.stages:
        assert stage.forward <= stage.executed_forward
        assert stage.backward <= stage.executed_backward
    square = {s.name: s for s in found.stages}["square"]
    # 5000 queries for each survivor, none for the rest of its batch.
    assert square.forward == 5000 * standard.robust.sum()
    assert square.backward == 0


def test_order_changes_nothing(standard):
    order = np.random.default_rng(2).permutation(COUNT)
    shuffled = evaluate(x=X[order], y=Y[order], index=order)
    np.testing.assert_array_equal(shuffled.robust, standard.robust[order])
    for name, broken in standard.threats["threat"].broken_by.items():
        mine = shuffled.threats["threat"].broken_by[name]
        np.testing.assert_array_equal(mine, broken[order])
    np.testing.assert_array_equal(
        shuffled.threats["threat"].x_adv, standard.threats["threat"].x_adv[order]
    )


def test_four_devices_give_the_verdicts_of_one():
    few = {"suite": ("apgd-ce", "square"), "batch_size": 4, "stop_below": None}
    one = evaluate(**few)
    four = evaluate(mesh=data_mesh(jax.devices()[:4]), **few)
    np.testing.assert_array_equal(four.robust, one.robust)
    assert 0 < one.robust_accuracy < 1


def test_own_attacks_are_traced_under_every_threat_with_a_budget_for_each_row():
    def scalar(key, problem):
        moved = problem.x + problem.threat.epsilon * jnp.ones(problem.x.shape)
        return rj.Result(moved, *3 * (jnp.zeros(len(moved)) > 1,))

    with pytest.raises((TypeError, ValueError)) as error:
        evaluate(suite="standard", attacks={"scalar": scalar})
    assert "a budget for each row" in "".join(error.value.__notes__)

    def not_l1(key, problem):
        if isinstance(problem.threat.norm, rj.norms.L1):
            raise NotImplementedError("no L1")
        return rj.fgsm()(key, problem)

    threats = {"Linf": THREAT, "L1": rj.l1(1.0)}
    with pytest.raises(NotImplementedError) as error:
        evaluate(suite="standard", threat=threats, attacks={"some": not_l1})
    assert "under L1" in "".join(error.value.__notes__)


def test_a_model_without_gradients_is_flagged_and_square_runs(tmp_path):
    """By a callback to the host; its ledger knows it too."""

    def ask(x):
        return np.asarray(NET(jnp.asarray(x)))

    def opaque(x):
        return jax.pure_callback(ask, jax.ShapeDtypeStruct((len(x), 4), jnp.float32), x)

    given = {"suite": ("square",), "threat": rj.linf(0.3), "resume": tmp_path}
    with pytest.warns(rj.evaluation.checks.ModelWarning, match="differentiated"):
        report = evaluate(opaque, checks="full", **given)
    assert [f.name for f in report.flags] == ["vanishing gradient"]
    assert report.checks["gradient masked"]["result"] == "not run"
    assert report.checks["binarization test"]["result"] == "not run"
    assert report.robust_accuracy < report.clean_accuracy
    again = evaluate(opaque, **given)
    np.testing.assert_array_equal(again.robust, report.robust)


def test_weights_that_lie_on_one_device_go_to_all_of_a_mesh():
    weights = jax.device_put(NET.args[0], jax.devices()[1])
    few = {"suite": ("apgd-ce",), "batch_size": 4}
    f = jax.tree_util.Partial(net, weights)
    four = evaluate(f, mesh=data_mesh(jax.devices()[:4]), **few)
    np.testing.assert_array_equal(four.robust, evaluate(**few).robust)


def test_images_of_one_channel_may_come_without_it():
    given = {"suite": ("square",), "threat": rj.linf(0.03), "y": Y[:4]}
    whole, flat = (evaluate(x=x[:4], **given) for x in (X, X[..., 0]))
    assert whole.config["image_axes"] == flat.config["image_axes"] == "HWC"
    np.testing.assert_array_equal(whole.robust, flat.robust)
    np.testing.assert_array_equal(
        whole.threats["threat"].x_adv[..., 0], flat.threats["threat"].x_adv
    )
    assert runner.image_axes_of("HWC", X.reshape(COUNT, 36)) is None


def test_the_live_line_knows_what_is_left(monkeypatch):
    told = []
    monkeypatch.setattr(
        runner.Live, "stage", lambda self, threat, began, news: told.append(news)
    )
    names = ("apgd-ce", "apgd-t", "fab-t")
    x, y = np.concatenate([X, X]), np.concatenate([Y, Y])
    report = evaluate(suite=names, batch_size=4, x=x, y=y)  # three groups of 16 rows
    (first, *_) = report.threats["threat"].broken_by.values()
    assert first[:16].any() and first[16:32].any()
    assert [name for name in names if any(t.name == name for t in told)] == [*names]
    for before, after in itertools.pairwise(told):
        assert after.alive <= before.alive and after.done >= before.done
        assert 0 <= after.left <= before.left
    assert told[-1].part == 1 and told[-1].left == 0
    assert told[-1].alive == report.robust.sum()
    stages = report.threats["threat"].stages
    assert told[-1].done == sum(
        s.executed_forward + s.executed_backward for s in stages if s.name in names
    )


def test_stop_below_ends_early():
    report = evaluate(suite="standard", stop_below=0.99, threat=rj.linf(0.5))
    assert list(report.threats["threat"].broken_by) == ["apgd-ce"]
    assert "fell below" in report.threats["threat"].notes[0]
    assert "Stopped: robust accuracy fell below 0.99." in str(report)


def test_two_and_three_classes():
    for classes in (2, 3):
        f = jax.tree_util.Partial(net, [NET.args[0][0], NET.args[0][1][:, :classes]])
        y = np.asarray(jnp.argmax(f(X), -1))
        report = evaluate(f, y=y, suite=("apgd-ce", "apgd-dlr", "apgd-t", "fab-t"))
        assert report.robust_accuracy < 1
        assert report.threats["threat"].flipped == ()


def test_own_attacks_are_judged_and_listed_after_the_suite():
    def mine(key, problem):
        return rj.pgd(20)(key, problem)

    report = evaluate(suite=("apgd-ce",), attacks=[mine], threat=rj.linf(0.02))
    assert list(report.threats["threat"].broken_by) == ["apgd-ce", "mine"]


def test_bad_arguments_say_the_fix():
    with pytest.raises(ValueError, match="suite='standrad' is unknown"):
        evaluate(suite="standrad")
    with pytest.raises(ValueError, match="apgd-x"):
        evaluate(suite=("apgd-ce", "apgd-x"))
    with pytest.raises(ValueError, match="is L0"):
        evaluate(threat=rj.l0(3))
    with pytest.raises(ValueError, match="image_axes='HCW'"):
        evaluate(image_axes="HCW")
    with pytest.raises(ValueError, match="at least one attack"):
        evaluate(suite=None)
    with pytest.raises(ValueError, match="checks='all'"):
        evaluate(checks="all")
    with pytest.raises(TypeError, match="pass a list"):
        evaluate(attacks=rj.pgd(5))
    for empty in ((), []):
        with pytest.raises(ValueError, match="suite is empty, so nothing would"):
            evaluate(suite=empty, attacks=[rj.pgd(5)])
    for percent in (30, -3, float("nan")):
        with pytest.raises(ValueError, match="stop_below=.*from 0 to 1"):
            evaluate(suite="standard", stop_below=percent)


def test_random_models_are_judged_over_passes():
    def noisy(x, key):
        return NET(x) + 0.3 * jax.random.normal(key, (x.shape[0], 4))

    report = evaluate(noisy, suite="rand", batch_size=24)
    assert report.randomized["passes"] == runner.NUM_PASSES
    low, high = report.randomized["low"], report.randomized["high"]
    assert low < report.randomized["robust_accuracy_mean"] < high
    assert abs(report.randomized["robust_accuracy_mean"] - report.robust_accuracy) < 0.3


def test_random_models_are_counted_on_draws_that_no_attack_has_seen(monkeypatch):
    """Who was chosen for fooling ten draws fools those more often than others."""
    seen = []
    judged = judge.judge

    def watched(driver, *rows):
        seen.append(np.asarray(jax.random.key_data(driver.keys)))
        return judged(driver, *rows)

    def noisy(x, key):
        return NET(x) + 0.3 * jax.random.normal(key, (x.shape[0], 4))

    run = runner.suites.ATTACKS["apgd-ce"]
    monkeypatch.setattr("robustjax.evaluation.last_pass.judge", watched)

    def suite(board):
        seen.append(np.asarray(jax.random.key_data(board.driver.keys)))
        run(board)

    monkeypatch.setitem(runner.SUITES, "rand", suite)
    report = evaluate(noisy, suite="rand", batch_size=24)
    during, again, last = seen
    np.testing.assert_array_equal(during, again)
    assert len(during) == len(last) == runner.NUM_PASSES
    assert not {tuple(k) for k in during} & {tuple(k) for k in last}
    # That other draws decide otherwise is no doubt.
    assert report.threats["threat"].flipped == ()


def test_an_attack_that_claims_nothing_is_judged_all_the_same():
    def modest(key, problem):
        result = rj.pgd(20)(key, problem)
        return result._replace(success=jnp.zeros_like(result.success))

    plain = evaluate(suite=None, attacks=[rj.pgd(20)])
    found = evaluate(suite=None, attacks=[modest])
    np.testing.assert_array_equal(found.robust, plain.robust)
    assert found.robust_accuracy < 1


def test_points_on_the_faces_of_any_box_are_accepted_as_they_are():
    """x + (face - x) may pass the face by a rounding error, the point does not."""
    low, high = -0.4242, 2.8215
    x = low + (high - low) * X

    def scaled(x):
        return NET((x - low) / (high - low))

    found = evaluate(
        scaled, x=x, threat=rj.linf(1.0, low, high), suite=None, attacks=[rj.pgd(20)]
    )
    assert found.robust_accuracy == 0
    assert found.flags == []


def test_own_attacks_named_like_a_stage_run_all_the_same(tmp_path):
    def suite(board):
        board.run(suites.square_stage(board, "square", 1))

    runner.SUITES["own"] = suite
    try:
        report = evaluate(
            suite="own", attacks={"square": rj.pgd(20)}, resume=tmp_path, threat=THREAT
        )
    finally:
        del runner.SUITES["own"]
    names = list(report.threats["threat"].broken_by)
    assert names == ["square", "square (own)"]
    assert report.threats["threat"].broken_by["square (own)"].any()


def test_an_index_twice_is_refused():
    with pytest.raises(ValueError, match="examples twice"):
        evaluate(index=np.zeros(COUNT, int))
