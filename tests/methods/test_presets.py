"""Presets have the authors' settings, and are methods that train ten classes.

What stands here was read in the papers that the presets name and in the authors' code:
yaodongyu/TRADES, YisenWang/MART, MadryLab/cifar10_challenge and mnist_challenge,
locuslab/fast_adversarial and robust_union, csdongxian/AWP, ftramer/MultiRobustness,
pdejorge/N-FGSM, ashafahi/free_adv_train,
tml-epfl/understanding-fast-adv-training (sh/exps_diff_eps_cifar10.sh), imrahulr/hat,
fra31/robust-finetuning, deepmind-research (adversarial_robustness/jax/experiment.py)
and wzekai99/DM-Improves-AT. Sizes of steps and of noise are in pixels, as there.
"""

import importlib
import inspect

import jax
import jax.numpy as jnp
import pytest

import robustjax as rj
from robustjax.losses import margin_loss
from robustjax.methods import (
    awp,
    eat,
    fast,
    free,
    generated,
    gradalign,
    hat,
    logit_pairing,
    madry,
    mart,
    msd,
    multinorm,
    nfgsm,
    trades,
)
from robustjax.models.base import Model
from robustjax.threats import l1, l2, linf
from robustjax.types import Batch

FILES = (
    *(awp, eat, fast, free, generated, gradalign, hat, logit_pairing, madry),
    *(mart, msd, nfgsm, trades),
)
# Whose arguments are settings: methods, what smooths or mixes, attacks.
BUILDERS = (
    *("awp", "eat", "free", "gradalign", "hat", "madry", "mart", "msd", "trades"),
    *("adversarial_logit_pairing", "smoothed", "with_stream"),
    *("adam", "apgd_training", "noisy_step", "pgd", "steepest_of_all"),
)


def given(builder, **arguments):
    return {f"{builder}.{name}": value for name, value in arguments.items()}


def steps(num_steps, step, random_start=False):
    return given("pgd", num_steps=num_steps, step=step, random_start=random_start)


# BatchNorm: how it runs in the attack, and which passes move its running statistics.
BOTH = ("natural", "adversarial")
TRADES = {"bn_mode": "eval", "moved_by": (*BOTH, "natural"), "start_noise": 1e-3}
CARMON = {**TRADES, "moved_by": BOTH[::-1]}
MART = {"bn_mode": "eval", "moved_by": BOTH, "start_noise": 1e-3}
HAT = {"bn_mode": "eval", "moved_by": (*BOTH, "helped"), "start_noise": 1e-3}
WANG = {"bn_mode": "batch", "moved_by": BOTH, "start_noise": None}
GOWAL = given(
    "trades", beta=6, bn_mode="batch", moved_by=("adversarial",), start_noise=None
) | given("adam", num_steps=10, step=[0.1] * 5 + [0.01] * 5, random_start=True)
BATCH = given("madry", bn_mode="batch")

# file.preset -> its threats, and what its builders are given
PRESETS = {
    "madry.cifar_paper": ([linf(8 / 255)], steps(7, 2 / 255, True)),
    "madry.cifar_code": ([linf(8 / 255)], steps(10, 2 / 255, True)),
    "madry.mnist": ([linf(0.3)], steps(40, 0.01, True)),
    "madry.one_step": ([linf(8 / 255)], steps(1, 10 / 255, True)),
    "trades.cifar10": (
        [linf(0.031)],
        given("trades", beta=6, **TRADES) | steps(10, 0.007),
    ),
    "trades.mnist": ([linf(0.3)], given("trades", beta=1, **TRADES) | steps(40, 0.01)),
    "trades.deepmind": ([linf(8 / 255)], GOWAL),
    "awp.cifar10": (
        [linf(8 / 255)],
        BATCH | given("awp", gamma=0.01, warmup=0) | steps(10, 2 / 255, True),
    ),
    "awp.cifar10_trades": (
        [linf(8 / 255)],
        given("awp", gamma=0.005, warmup=9 * 391)
        | given("trades", beta=6, **TRADES)
        | steps(10, 2 / 255),
    ),
    "mart.resnet18": ([linf(0.031)], given("mart", beta=5, **MART) | steps(10, 0.007)),
    "mart.wide_resnet": (
        [linf(0.031)],
        given("mart", beta=6, **MART) | steps(10, 0.007),
    ),
    "fast.cifar10": ([linf(8 / 255)], BATCH | steps(1, 10 / 255, True)),
    "fast.mnist": ([linf(0.3)], BATCH | steps(1, 0.375, True)),
    "fast.imagenet": ([linf(4 / 255)], BATCH | steps(1, 5 / 255, True)),
    "nfgsm.cifar10": (
        [linf(8 / 255)],
        BATCH | given("noisy_step", noise=16 / 255, step=8 / 255),
    ),
    "nfgsm.svhn": (
        [linf(12 / 255)],
        BATCH | given("noisy_step", noise=36 / 255, step=12 / 255),
    ),
    "free.cifar10": ([linf(8 / 255)], given("free", repeats=8, step=8 / 255)),
    "free.imagenet": ([linf(4 / 255)], given("free", repeats=4, step=4 / 255)),
    "logit_pairing.imagenet64": (
        [linf(16 / 255)],
        given("adversarial_logit_pairing", strength=0.5, bn_mode="eval")
        | given("adversarial_logit_pairing", raised=logit_pairing.least_likely)
        | given("smoothed", smoothing=0.1)
        | steps(10, 2 / 255, True),
    ),
    "msd.cifar10": (
        [linf(0.03), l2(0.3), l1(12)],
        given("msd", bn_mode="batch")
        | given("steepest_of_all", num_steps=50, step=[0.003, 0.05, 1]),
    ),
    "msd.mnist": (
        [linf(0.3), l2(2), l1(10)],
        given("msd", bn_mode="batch", density=12.5 / 784)
        | given("steepest_of_all", num_steps=100, step=[0.01, 0.1, 1]),
    ),
    "eat.cifar10": (
        [linf(8 / 255), l1(12)],
        given("eat", bn_mode="eval") | given("apgd_training", num_steps=10),
    ),
    "hat.cifar10": (
        [linf(8 / 255)],
        given("hat", beta=2.5, gamma=0.5, reach=2, **HAT) | steps(10, 2 / 255),
    ),
    "generated.carmon": (
        [linf(0.031)],
        given("trades", beta=6, **CARMON)
        | given("with_stream", smoothing=0)
        | steps(10, 0.007),
    ),
    "generated.rebuffi": (  # the labels of the stream are smoothed
        [linf(8 / 255)],
        GOWAL | given("with_stream", smoothing=0.1, num_classes=10),
    ),
    "generated.wang": (  # all labels are
        [linf(8 / 255)],
        given("trades", beta=5, **WANG)
        | given("with_stream", smoothing=0)
        | given("smoothed", smoothing=0.1)
        | steps(10, 2 / 255, True),
    ),
}
EIGHT = (0.027, 0.036, 0.047, 0.063, 0.084, 0.112, 0.15, 0.2)
STRENGTHS = dict(
    enumerate((*EIGHT, 0.267, 0.356, 0.474, 0.632, 0.843, 1.124, 1.5, 2.0), 1)
)


def init(key, x):
    return jnp.zeros((16, 10)), {}


def apply(params, extra, x, *, train=False, key=None):
    return x.reshape(len(x), -1) @ params, extra


MODEL = Model(init, apply)


def build(name):
    file, _, preset = name.partition(".")
    builder = getattr(importlib.import_module(f"robustjax.methods.{file}"), preset)
    if file == "madry":  # the attack alone
        return madry.madry(MODEL, PRESETS[name][0][0], builder())
    helper = [lambda x: x.reshape(len(x), -1)[:, :10]] if file == "hat" else []
    return builder(MODEL, *helper)


def in_pixels(name, value, epsilons):
    """Builders take sizes in units of epsilon: one, one for each threat, a schedule."""
    if name == "step_sizes":
        return "step", [v * e for v, e in zip(value, epsilons, strict=True)]
    if name == "learning_rate":
        return "step", [float(value(t)) * epsilons[0] for t in range(10)]
    if name in ("step_size", "noise"):
        return name.removesuffix("_size"), value * epsilons[0]
    return name, value


def check(monkeypatch, build, threats, expected):
    calls = {}

    def watched(builder):
        def watching(*args, **kwargs):
            call = inspect.signature(builder).bind(*args, **kwargs)
            call.apply_defaults()
            calls[builder.__name__] = call.arguments
            return builder(*args, **kwargs)

        return watching

    for file in FILES:
        for name in BUILDERS:
            if hasattr(file, name):
                monkeypatch.setattr(file, name, watched(getattr(file, name)))
    method = build()
    found = [c.get("threats") or [c["threat"]] for c in calls.values() if "model" in c]
    assert found == [threats]
    epsilons = [float(threat.epsilon) for threat in threats]
    settings = {}
    for builder, arguments in calls.items():
        pairs = (in_pixels(name, v, epsilons) for name, v in arguments.items())
        settings |= given(builder, **dict(pairs))
    for name, value in expected.items():
        assert settings[name] == pytest.approx(value), name
    return method, calls


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_as_published(name, monkeypatch):
    threats, expected = PRESETS[name]
    method, calls = check(monkeypatch, lambda: build(name), threats, expected)
    plain = {"madry"} if name.startswith("madry") else set()
    assert set(calls) - plain == {key.partition(".")[0] for key in expected}
    rows = jax.ShapeDtypeStruct((4, 4, 4, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    batch = Batch(rows, labels, labels, None, {"generated": Batch(rows, labels)})

    def grads(key, batch):
        params, extra = init(key, batch.x)
        carry = method.init(params, batch)
        return method.grads(params, extra, carry, batch, jnp.int32(0), key)[0]

    assert jax.eval_shape(grads, jax.random.key(0), batch).shape == (16, 10)


@pytest.mark.parametrize("name", ["average", "maximum"])
def test_presets_of_tramer_are_as_published(name, monkeypatch):
    """Their three attacks are made by one builder: which is which, the method says."""
    made, method = [], []

    def watched(*arguments, **options):
        call = inspect.signature(rj.pgd).bind(*arguments, **options)
        call.apply_defaults()
        made.append((rj.pgd(*arguments, **options), call.arguments))
        return made[-1][0]

    plain = getattr(multinorm, name)
    monkeypatch.setattr(multinorm, "pgd", watched)
    monkeypatch.setattr(
        multinorm, name, lambda *a, **k: method.append((a, k)) or plain(*a, **k)
    )
    getattr(multinorm, f"{name}_cifar10")(MODEL)
    [((_, threats, attacks), settings)] = method
    assert threats == [linf(8 / 255), l2(80 / 255), l1(2000 / 255)]
    assert settings == {"inner": margin_loss}
    found = []
    for attack_fn, threat in zip(attacks, threats, strict=True):
        [given] = [arguments for one, arguments in made if one is attack_fn]
        size = given["step_size"] or 2.5 / given["num_steps"]
        assert given["random_start"] and given["keep"] is rj.last
        size *= float(threat.epsilon) * 255
        found.append((given["num_steps"], pytest.approx(size), given["density"]))
    # In pixels of 255: 2.5 epsilon / steps; under L1 2 for the steepest hundredth.
    sparse = found[2][2]
    assert [f[:2] for f in found] == [(10, 2), (40, 5), (100, 510)] and sparse == 0.01


@pytest.mark.parametrize("epsilon", STRENGTHS)
def test_strengths_of_gradalign_are_as_published(epsilon, monkeypatch):
    expected = {"strength": STRENGTHS[epsilon], "step": 1.25 * epsilon / 255}
    expected |= {"through_clean": False, "bn_mode": "batch"}
    check(
        monkeypatch,
        lambda: gradalign.cifar10(MODEL, epsilon),
        [linf(epsilon / 255)],
        given("gradalign", **expected),
    )
    assert gradalign.STRENGTHS == STRENGTHS
