"""Suites, driver and ledger on models whose truth is known."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustjax as rj
from robustjax import testing
from robustjax.attacks.base import Attack, inform
from robustjax.evaluation import board as board_module
from robustjax.evaluation import driver, fast, judge, runner, suites
from robustjax.evaluation import stage as stages
from robustjax.models.canonical import canonicalize
from robustjax.parallel import data_mesh

QUIET = {"progress": False, "checks": "none"}
COUNT = 24


def net(weights, x, key=None):
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ weights[0])
    return hidden @ weights[1]


def make_net(seed=0, scale=4.0):
    rng = np.random.default_rng(seed)
    shapes = ((36, 16), (16, 4))
    weights = [jnp.asarray(rng.normal(size=s, scale=0.4), jnp.float32) for s in shapes]
    weights[1] = weights[1] * scale
    return jax.tree_util.Partial(net, weights)


NET = make_net()
X = np.random.default_rng(1).uniform(size=(COUNT, 6, 6, 1)).astype(np.float32)
Y = np.asarray(jnp.argmax(NET(X), -1), np.int32)
# Smallest perturbations of PGD lie around 0.02: some points fall, some do not.
THREAT = rj.linf(0.03)


def evaluate(f=NET, x=X, y=Y, threat=THREAT, **changes):
    return rj.evaluate(f, x, y, threat, **({"batch_size": 16} | QUIET | changes))


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


@pytest.mark.parametrize("factor", [2.0**13, 2.0**-13])
def test_fast_sees_through_a_scale_of_the_logits(factor):
    plain = evaluate(suite="fast")
    f = jax.tree_util.Partial(net, [NET.args[0][0], NET.args[0][1] * factor])
    scaled = evaluate(f, suite="fast")
    np.testing.assert_array_equal(scaled.robust, plain.robust)
    np.testing.assert_array_equal(
        scaled.threats["threat"].x_adv, plain.threats["threat"].x_adv
    )


class Killed(Exception):
    pass


def test_killed_and_continued(tmp_path, standard, monkeypatch):
    """Killed again and again, each time a little later; nothing finished is repeated,
    and the verdicts are those of an unbroken run."""
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


def make_late(settings):
    """Claims to have won at x, which is no win; does win at its fourth point."""

    def init(key, problem):
        del key
        return (jnp.zeros_like(problem.x), jnp.zeros(len(problem.x), jnp.int32))

    def step(key, state, problem):
        delta, t = state
        score, logits = problem.score(problem.x + delta, key)
        info = inform(problem, delta, score, logits)
        info = info._replace(success=info.success | (t == 0))
        far = jnp.where(t[:, None, None, None] >= 2, settings, 0.0)
        return (jnp.broadcast_to(far, delta.shape), t + 1), info

    return Attack(init, step)


def test_what_the_judge_refuses_is_attacked_on():
    def threshold(x):
        bright = x.mean((1, 2, 3))
        return jnp.stack([0.5 - bright, bright - 0.5], -1)

    x = np.full((5, 6, 6, 1), 0.4, np.float32)
    x[3:] = 0.1
    late = stages.Stage("late", make_late, np.float32(0.2), 10, "margin", chunk=1)

    def suite(board):
        board.run(late)

    report = _with_suite(suite, threshold, x, np.zeros(5, int), rj.linf(0.2))
    np.testing.assert_array_equal(report.robust, [False] * 3 + [True] * 2)


def _with_suite(suite, f, x, y, threat, batch_size=16):
    runner.SUITES["own"] = suite
    try:
        return rj.evaluate(f, x, y, threat, suite="own", batch_size=batch_size, **QUIET)
    finally:
        del runner.SUITES["own"]


@pytest.mark.parametrize(("batch_size", "chunk"), [(16, 1), (4, 7), (24, 100)])
def test_shapes_and_chunks_change_no_verdict(batch_size, chunk):
    def suite(board):
        stage = suites.apgd_stage(board, "apgd", "cross_entropy", 30)
        board.run(stage._replace(chunk=chunk))

    found = _with_suite(suite, NET, X, Y, THREAT, batch_size)
    reference = _with_suite(suite, NET, X, Y, THREAT, 16)
    np.testing.assert_array_equal(found.robust, reference.robust)


def test_steps_from_the_host_are_those_of_the_loop():
    f = canonicalize(NET)
    rows = stages.Rows(X, Y, np.arange(COUNT), np.zeros_like(Y), np.full(COUNT, 0.03))
    rows = jax.tree.map(lambda a: a.astype("float32" if a.dtype == float else "int32"),
                        rows._replace(x=X))._replace(x=X)  # fmt: skip
    one = judge.Driver(
        judge.Model(f, jnp.float32(1)),
        dataclasses.replace(THREAT, epsilon=0.0),
        (16,),
        True,
        None,
        jax.random.split(jax.random.key(0), 1),
    )
    settings = suites.apgd.apgd_settings(20, rj.Linf())
    stage = stages.Stage("apgd", suites.apgd.kernel, settings, 21)
    looped = driver.drive(one, stage, rows, jax.random.key(3))
    hosted = driver.drive(one._replace(looped=False), stage, rows, jax.random.key(3))
    np.testing.assert_array_equal(looped.broken, hosted.broken)
    np.testing.assert_allclose(looped.margin, hosted.margin, rtol=1e-4, atol=1e-5)
    assert looped.passes == hosted.passes


@pytest.mark.parametrize("count", [1, 5, 16, 17, 40, 63, 64, 65, 178, 255, 300, 1000])
def test_a_plan_holds_all_rows_and_little_else(count):
    shapes = (16, 64, 256)
    parts = judge.plan(count, shapes)
    assert sum(parts) - parts[-1] < count <= sum(parts)
    assert set(parts) <= set(shapes)
    assert sum(parts) < count + 16 + 0.25 * count


def test_no_shape_is_compiled_twice():
    few = {"suite": ("apgd-ce", "apgd-t", "fab-t"), "batch_size": 4}  # one shape
    evaluate(**few)
    before = driver.programs(judge.compiler_options()).advance._cache_size()
    evaluate(**few)
    evaluate(make_net(7), threat=rj.linf(0.02), key=jax.random.key(1), **few)
    evaluate(x=X[:9], y=Y[:9], **few)
    assert driver.programs(judge.compiler_options()).advance._cache_size() == before


def test_with_a_compilation_cache_no_program_calls_onednn(monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "convolution_options", lambda: {"onednn": True})
    cached = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert judge.compiler_options() == (("onednn", True),)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert judge.compiler_options() == ()
    finally:
        jax.config.update("jax_compilation_cache_dir", cached)


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


def test_threats_of_one_folder_are_refused_before_anything_runs(tmp_path):
    threats = {"L2 1": rj.l2(0.1), "L2_1": rj.l2(0.2)}
    with pytest.raises(ValueError, match="'L2 1' and 'L2_1' would share the folder"):
        evaluate(threat=threats, suite=("apgd-ce",), resume=tmp_path)
    assert not list(tmp_path.iterdir())


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


def test_what_the_last_pass_finds_wrong_is_broken(monkeypatch):
    """A judge that confirms nothing in the middle; at the end the truth counts."""
    blind = driver.judge

    def never(*arguments):
        verdict = blind(*arguments)
        return verdict._replace(wrong=np.zeros_like(verdict.wrong))

    monkeypatch.setattr(driver, "judge", never)
    found = evaluate(suite=("apgd-ce",), threat=rj.linf(0.3))
    monkeypatch.undo()
    assert found.robust_accuracy == 0
    assert found.threats["threat"].broken_by["last pass"].all()


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


def test_the_same_attack_twice_is_two_runs(tmp_path):
    report = evaluate(suite=("apgd-ce", "apgd-ce"), resume=tmp_path)
    lines = (tmp_path / "threat" / "ledger.jsonl").read_text().splitlines()
    groups = [json.loads(line)["group"] for line in lines]
    assert groups == ["apgd-ce 0#0", "apgd-ce 0, again 1#0"]
    assert report.robust_accuracy < 1


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


def test_an_index_twice_is_refused():
    with pytest.raises(ValueError, match="examples twice"):
        evaluate(index=np.zeros(COUNT, int))
