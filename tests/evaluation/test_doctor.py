"""The doctor names what is wrong with broken models and is silent on sound ones.

docs/checks.md says which nets set its thresholds; those here are others.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import robustjax as rj
from robustjax import data, models
from robustjax.evaluation.binarization import binarization_test, flag
from robustjax.evaluation.doctor import _agreement, after, chosen, doctor, finite_box
from robustjax.evaluation.masking import Evidence, reasons
from robustjax.losses import margin_loss
from robustjax.methods.madry import madry
from robustjax.methods.trades import trades
from robustjax.models.canonical import canonicalize
from robustjax.models.importers.layers import from_layers
from robustjax.training.loop import fit
from tests.evaluation.broken_models import CORPUS, digits, model, net, train, train_all

SHARED = Path(__file__).parents[3] / "shared"
THREAT = rj.linf(0.1)
PGD = rj.pgd(40)
PER_EXAMPLE = 97  # what the runner grants: 1 % of what `standard` spends


@pytest.fixture(scope="session")
def params():
    return train_all(10)


def examine(f, count=360, threat=THREAT, **changes):
    _, _, x, y = (a[:count] for a in digits())
    return doctor(f, x, y, threat, np.arange(len(y)), jax.random.key(1), **changes)


def names(diagnosis):
    return [flag.name for flag in diagnosis.flags]


@pytest.mark.parametrize("name", CORPUS)
def test_a_broken_model_is_flagged_by_name(params, name):
    found = examine(model(params, name))
    assert CORPUS[name].flag in names(found)
    assert found.random == (CORPUS[name].flag == "random")
    for check in found.checks.values():
        assert check["result"] in ("ok", "flagged", "not run") and check["message"]


def test_a_sound_model_is_not_flagged_and_log_softmax_is_noted(params):
    found = examine(model(params, "sound"))
    assert found.flags == []
    noted = examine(model(params, "log-softmax"))
    assert noted.flags == []
    assert "log-probabilities" in noted.checks["probabilities"]["message"]
    assert "log-prob" not in found.checks["probabilities"]["message"]


@pytest.mark.parametrize(
    "count", [100, pytest.param(360, marks=(pytest.mark.slow, pytest.mark.quick))]
)
def test_passes_stay_in_budget_and_what_is_left_out_says_so(params, count):
    found = examine(model(params, "sound"), count, passes=PER_EXAMPLE * count)
    assert found.passes <= PER_EXAMPLE * count
    assert found.flags == []
    assert found.checks["gradient masked"]["result"] == "ok"
    for little in (0, 5000):
        short = examine(model(params, "sound"), count, passes=little)
        assert short.checks["gradient masked"]["result"] == "not run"
        assert "passes" in short.checks["gradient masked"]["message"]


@pytest.mark.parametrize(
    ("norm", "epsilon"),
    [
        ("Linf", 0.1),
        pytest.param("L2", 0.3, marks=(pytest.mark.slow, pytest.mark.quick)),
    ],
)
def test_an_infinite_box_does_not_blind_the_doctor(norm, epsilon):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((64, 20), (20, 3)))

    def logits(w, rounds, x, key):
        return jnp.where(rounds, jnp.round(4 * x) / 4, jnp.tanh(x)) @ w

    def look(rounds, *box):
        f = jax.tree_util.Partial(logits, w, np.bool_(rounds))
        y = np.asarray(f(x, None)).argmax(1)
        threat = rj.threat(norm, epsilon, *box)
        found = doctor(f, x, y, threat, np.arange(64), jax.random.key(1))
        return set(names(found)), found.checks

    flags, finite = look(True, -10.0, 10.0)
    assert "with the whole box allowed" in finite["unbounded attack fails"]["message"]
    for box in ((-np.inf, np.inf), (-np.inf, 10.0)):
        there, checks = look(True, *box)
        assert there == flags >= {"vanishing gradient", "unbounded attack fails"}
        for name in ("vanishing gradient", "saturated loss", "low precision"):
            assert checks[name] == finite[name]
        # No ball is cut, so the runs are those in the finite box.
        name = "gradient masked"
        assert checks[name]["value"] == finite[name]["value"]
        message = checks["unbounded attack fails"]["message"]
        assert "whole range of these data" in message
        sound, checks = look(False, *box)
        assert sound == set()
        assert all(check["result"] == "ok" for check in checks.values())
        assert checks["unbounded attack fails"]["value"] == 0


def test_a_box_of_data_has_a_width_and_cuts_no_ball():
    x, low = np.array([[2.0, 3.0], [2.0, 5.0]]), np.array([-np.inf, 0.0])
    threat = rj.linf(np.array([0.5, np.inf]), low, np.inf)
    for ball, more in ((False, 0.003), (True, 0.5)):
        found = finite_box(threat, x, ball)
        np.testing.assert_allclose(found.lower, [2 - more, 0], rtol=1e-6)
        assert found.upper == pytest.approx(5 + more)
    still = finite_box(rj.l0(3, -np.inf, np.inf), np.ones((4, 2)), ball=True)
    assert still.lower < 1 < still.upper < 2
    assert finite_box(THREAT, x) is THREAT


def test_order_does_not_matter(params):
    _, _, x, y = digits()
    f, key = model(params, "k winners"), jax.random.key(1)
    there = doctor(f, x, y, THREAT, np.arange(len(y)), key)
    back = doctor(f, x[::-1], y[::-1], THREAT, np.arange(len(y))[::-1], key)
    assert there == back


def test_chosen_is_spread():
    take = chosen(np.arange(1000))
    assert len(set(take)) == 64
    assert np.histogram(take, 4, (0, 1000))[0].min() >= 14


@jax.jit
def _attacked(f, judged, x, y):
    """Whom PGD-40 on the margin of the mean over 8 draws breaks."""
    problem = rj.eot(rj.untargeted(f, x, y, THREAT, margin_loss), 8)
    x_adv = rj.pgd(40)(jax.random.key(2), problem).x_adv
    keys = jax.random.split(jax.random.key(3), 8)
    answers = jax.lax.map(lambda key: rj.predictions(judged(x_adv, key)) == y, keys)
    return answers.mean(0) < 0.5


def test_true_accuracy_is_found_where_an_attack_of_ours_can(params):
    _, _, x, y = (a[:64] for a in digits())
    f = model(params, "sound")
    true = int(_attacked(f, f, x, y).sum())
    assert 32 <= true < 64
    for name, broken in CORPUS.items():
        if broken.remedy is not None:
            judged = model(params, name)
            f = model(params, f"{name}, mended") if broken.mended else judged
            assert _attacked(f, judged, x, y).sum() >= true - 4, name


def test_scale_is_a_power_of_two_that_follows_the_logits(params):
    one = examine(model(params, "sound"), 64).scale
    f = jax.tree_util.Partial(lambda p, x, key: 2.0**13 * net(p, x), params["net"])
    many = examine(f, 64, passes=0).scale
    assert many == one / 2**13
    assert np.log2(one) % 1 == 0


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_name_their_fallback(params, classes):
    f = jax.tree_util.Partial(lambda p, x, key: net(p, x)[:, :classes], params["net"])
    _, _, x, y = digits()
    x, y = x[y < classes], y[y < classes]
    found = doctor(f, x, y, THREAT, np.arange(len(y)), jax.random.key(0), passes=0)
    assert found.flags == []
    assert f"{classes} classes" in found.checks["few classes"]["message"]


def test_reasons_need_more_than_luck():
    quiet = Evidence(64, 50, 0, 0, 0, 0, 0.006, None, -0.01, 0, 0)
    assert reasons(quiet) == []
    assert reasons(quiet._replace(search=2)) == []
    assert (
        "a search without gradients broke 3 of 50"
        in reasons(quiet._replace(search=3))[0]
    )
    for change in ({"far": 9}, {"one_step": 9}, {"lower": 0.02}, {"disagree": 0.02}):
        assert len(reasons(quiet._replace(**change))) == 1
    short = quiet._replace(disagree=0.012)  # perhaps it had not converged
    settled = short._replace(settled=0.006)
    assert reasons(short) == reasons(settled) == []
    assert "apart, which may be slow" in _agreement(short)
    assert _agreement(settled) == "its runs agree after 200 steps"
    assert _agreement(quiet) == "its runs agree"
    assert "200 steps, end 0.9% of" in reasons(short._replace(settled=0.009))[0]


def test_square_after_gradients():
    gradient, none = np.arange(500) < 90, np.zeros(500, bool)

    def flags(count, n=500):
        mine = np.arange(n) >= n - count
        return [f.name for f in after({"apgd-ce": gradient[:n], "square": mine})]

    assert flags(6) == ["gradient masked"]  # as on sdp_mnist_cnn_a_adv
    assert flags(3) == []  # as on kw_fashion_eps01
    assert flags(1, 200) == []
    assert after({"apgd-ce": gradient, "square": none}) == []
    assert after({"apgd-ce": gradient, "square": gradient}) == []


@pytest.mark.parametrize(
    ("seed", "widths", "epsilon", "activation"),
    [
        (11, (96,), 0.0, jax.nn.relu),
        pytest.param(12, (64, 64, 32), 0.0, jax.nn.silu, marks=pytest.mark.slow),
        pytest.param(13, (64, 48), 0.1, jax.nn.relu, marks=pytest.mark.slow),
    ],
)
def test_no_false_alarm_on_nets_trained_here(seed, widths, epsilon, activation):
    params = train(seed, widths, epsilon, activation)
    f = jax.tree_util.Partial(lambda p, x, key: net(p, x, activation), params)
    assert names(examine(f, passes=PER_EXAMPLE * 360)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "beta"), [(0, None), (7, None), (8, 6.0)])
def test_no_false_alarm_on_the_nets_of_the_readme(seed, beta):
    """The zoo's net on the digits, whose short runs have not converged."""
    digits_, threat = data.load("digits"), rj.linf(0.15)
    small, attack = models.small_cnn(), rj.pgd(7, keep=rj.last)
    method = madry(small, threat, attack)
    if beta is not None:
        method = trades(small, threat, attack, beta=beta)
    train_set = data.resident(digits_.x_train, digits_.y_train, digits_.max_value)
    options = {"batch_size": 64, "num_steps": 500, "log": False}
    tx = optax.adam(5e-3)
    found = fit(jax.random.key(seed), small, method, tx, train_set, **options)
    f = models.logits_fn(small, found.params, found.extra)
    few = examine(f, threat=threat, passes=PER_EXAMPLE * 360)
    assert names(few) == []
    assert "its runs agree" in few.checks["gradient masked"]["message"]


MASKED = [
    ("sdp_mnist_cnn_a_adv", "mnist", rj.linf(0.3)),
    ("fast_mnist_pgd", "mnist", rj.l2(1.5)),
]
QUIET = [
    ("kw_mnist_eps01", "mnist", rj.linf(0.1)),
    ("kw_fashion_eps01", "fashion_mnist", rj.linf(0.1)),
    ("eran_mnist_mlp_6_100", "mnist", rj.linf(0.026)),
    ("eran_cifar_convsmall_pgd", "cifar10", rj.linf("2/255")),
    ("eran_cifar_convsmall_pgd", "cifar10", rj.l2(0.25)),
    ("eran_cifar_convsmall_pgd", "cifar10", rj.l1(5.0)),
    ("vnncomp_cifar_resnet2b", "cifar10", rj.linf("2/255")),
]


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason="needs ../shared: third-party nets, data"
)
@pytest.mark.parametrize(
    ("name", "dataset", "threat", "expected"),
    [(*case, ["gradient masked"]) for case in MASKED] + [(*case, []) for case in QUIET],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_third_party_nets(name, dataset, threat, expected):
    folder = SHARED / "models" / name
    spec = json.loads((folder / "net.json").read_text())
    with np.load(folder / "weights.npz") as weights:
        imported = from_layers(spec["layers"], dict(weights))
    f = models.logits_fn(imported, *imported.init(jax.random.key(0), None))
    split = data.load(dataset, SHARED / "data")
    x, y = np.float32(split.x_test[:500]) / 255, np.int32(split.y_test[:500])
    found = doctor(
        canonicalize(f),
        x,
        y,
        threat,
        np.arange(500),
        jax.random.key(0),
        passes=PER_EXAMPLE * 500,
    )
    assert names(found) == expected
    assert found.passes <= PER_EXAMPLE * 500


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_binarization(params, norm):
    _, _, x, _ = (a[:32] for a in digits())
    threat = rj.threat(norm, {"Linf": 0.1, "L2": 0.5}[norm])

    def features(p, which, x, key):
        x = jax.lax.cond(which, jax.lax.stop_gradient, lambda x: x, x)
        return net(p[:-1], x)

    def run(which):
        f = jax.tree_util.Partial(features, params["net"], which)
        return binarization_test(f, x, threat, PGD, jax.random.key(0), num_inner=499)

    sound, blind = run(np.bool_(False)), run(np.bool_(True))
    assert sound.tested.mean() > 0.5
    assert sound.success_rate >= 0.95 and flag(sound) is None
    assert blind.success_rate < 0.5
    assert flag(blind).name == "attack fails the binarization test"


def test_binarization_believes_points_and_not_claims():
    x = np.random.default_rng(0).uniform(0.3, 0.7, (16, 20)).astype(np.float32)
    pgd = rj.pgd(10)

    def rate(attack_fn):
        run = binarization_test(jnp.tanh, x, THREAT, attack_fn, jax.random.key(0))
        assert run.tested.sum() >= 8
        return run.success_rate

    def all_of(problem):
        return jnp.ones(len(problem.x), bool)

    def stays(key, problem):
        return pgd(key, problem)._replace(x_adv=problem.x, success=all_of(problem))

    def modest(key, problem):
        return pgd(key, problem)._replace(success=~all_of(problem))

    def leaves_ball(key, problem):
        wider = dataclasses.replace(problem.threat, epsilon=2 * problem.threat.epsilon)
        found = pgd(key, problem._replace(threat=wider))
        return found._replace(success=all_of(problem))

    assert rate(modest) == rate(pgd) == 1
    assert rate(stays) == rate(leaves_ball) == 0
