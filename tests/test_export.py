"""Every public attack and every method's training step lowers for CPU, GPU and TPU.

Lowering only, by `jax.export`: nothing is compiled. Which attacks and methods there are
is read from the package, so that a new one must get a row here. One form of each runs
every time; `scripts/test -m slow tests/test_export.py` adds the other norms and forms.
"""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export

import robustjax as rj
from robustjax import models
from robustjax.losses import cross_entropy, cw, dlr, margin_loss
from robustjax.methods.awp import awp
from robustjax.methods.curriculum import curriculum
from robustjax.methods.eat import eat
from robustjax.methods.fast import fast
from robustjax.methods.free import free
from robustjax.methods.generated import with_stream
from robustjax.methods.gradalign import gradalign
from robustjax.methods.gradient_penalty import gradient_penalty
from robustjax.methods.hat import hat
from robustjax.methods.lipschitz_margin import lipschitz_margin
from robustjax.methods.logit_pairing import (
    adversarial_logit_pairing,
    clean_logit_pairing,
)
from robustjax.methods.madry import madry
from robustjax.methods.mart import mart
from robustjax.methods.microbatch import microbatches
from robustjax.methods.msd import msd
from robustjax.methods.multinorm import average, maximum
from robustjax.methods.nfgsm import nfgsm
from robustjax.methods.standard import standard
from robustjax.methods.trades import trades
from robustjax.training.state import create_state
from robustjax.training.step import make_train_step
from robustjax.types import Batch

PLATFORMS = ("cpu", "cuda", "tpu")
X, Y = jnp.full((4, 6, 6, 3), 0.5), jnp.array([0, 1, 2, 3], jnp.int32)
MODEL = models.mlp((8,), num_classes=5)
WEIGHTS = MODEL.init(jax.random.key(0), X)
BUDGETS = {"Linf": 0.1, "L2": 0.5, "L1": 2.0, "L0": 3.0}
ALL = tuple(BUDGETS)


def lowered(f, *arguments, platforms=PLATFORMS) -> str:
    """What `f` becomes for the platforms; a primitive without a rule raises."""
    exported = export.export(jax.jit(f), platforms=platforms)(*arguments)
    assert exported.platforms == platforms
    return exported.mlir_module()


PGD = rj.pgd(3)
STACKED = rj.stack([rj.threat(norm, BUDGETS[norm]) for norm in ALL])
# What is before the comma is a public name.
ATTACKS = {
    "pgd": (PGD, ALL),
    "pgd, restarts, last": (rj.pgd(3, num_restarts=2, keep=rj.last), ("L2",)),
    "fgsm": (rj.fgsm(), ALL),
    "momentum": (rj.momentum(3), ALL),
    "adam": (rj.adam(3), ALL),
    "noise": (rj.noise("uniform", 2), ALL),
    "noise, sign": (rj.noise("sign", 2), ALL),
    "noise, gaussian": (rj.noise("gaussian", 2), ALL),
    "apgd": (rj.apgd(5), ("Linf", "L2", "L1")),
    "apgd, exact": (rj.apgd(5, reference=False), ("Linf", "L2", "L1")),
    "apgd_targeted": (rj.apgd_targeted(5, 2), ("Linf", "L2", "L1")),
    "fab": (rj.fab(3, num_targets=2), ("Linf", "L2", "L1")),
    "fab, untargeted": (rj.fab(3, targeted=False), ("Linf", "L2", "L1")),
    "square": (rj.square(5), ("Linf", "L2", "L1")),
    "run": (rj.run(rj.gradient_ascent(rj.steepest), 3, keep=rj.smallest), ("Linf",)),
    "restarts": (rj.restarts(PGD, 2), ("Linf",)),
    "multi_target": (rj.multi_target(PGD, 2), ("Linf",)),
    "over_threats": (rj.over_threats(rj.fgsm(), STACKED, "map"), ("Linf",)),
    "over_threats, vmap": (rj.over_threats(rj.fgsm(), STACKED, "vmap"), ("Linf",)),
    "sequence": (rj.sequence(rj.fgsm(), PGD, hand_over=True), ("Linf",)),
}
LOSSES = {"cross_entropy": cross_entropy, "margin": margin_loss, "cw": cw, "dlr": dlr}


def attacked(attack_fn, threat, loss=cross_entropy, wrap=lambda problem: problem):
    def f(params, extra, x, y):
        logits_fn = models.logits_fn(MODEL, params, extra)
        problem = wrap(rj.untargeted(logits_fn, x, y, threat, loss))
        return attack_fn(jax.random.key(0), problem)

    return lowered(f, *WEIGHTS, X, Y)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=pytest.mark.slow if place or "," in name else ())
        for name, (_, norms) in ATTACKS.items()
        for place, norm in enumerate(norms)
    ],
)
def test_attack_lowers_for_every_platform(name, norm):
    assert attacked(ATTACKS[name][0], rj.threat(norm, BUDGETS[norm]))


@pytest.mark.parametrize("norm", ("L2", "L1", "L0"))
def test_pgd_lowers_under_every_norm(norm):
    assert attacked(PGD, rj.threat(norm, BUDGETS[norm]))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_apgd_lower(loss):
    assert attacked(rj.apgd(3), rj.linf(0.1), LOSSES[loss])


def test_wrappers_lower():
    def wrap(problem):
        problem = rj.input_diversity(problem)
        return rj.translation_invariant(problem, size=3)

    assert attacked(PGD, rj.linf(0.1), wrap=wrap)
    assert attacked(PGD, rj.linf(0.1), wrap=lambda problem: rj.eot(problem, 2))


def test_every_public_attack_has_a_row():
    makers = {
        name
        for name in rj.__all__
        if inspect.isfunction(getattr(rj, name))
        and inspect.signature(getattr(rj, name)).return_annotation == rj.AttackFn
    }
    assert makers == {name.split(",")[0] for name in ATTACKS}


THREAT, BALLS = rj.linf(0.1), [rj.linf(0.1), rj.l2(0.5), rj.l1(2.0)]
SHORT = rj.pgd(2, keep=rj.last)


def stepwise(step):
    return madry(MODEL, rj.linf(0.01 * step), SHORT)


# What is before the comma is a file of robustjax/methods.
METHODS = {
    "standard": lambda: standard(MODEL),
    "madry": lambda: madry(MODEL, THREAT, SHORT),
    "trades": lambda: trades(MODEL, THREAT, SHORT),
    "mart": lambda: mart(MODEL, THREAT, SHORT),
    "awp": lambda: awp(trades(MODEL, THREAT, SHORT)),
    "hat": lambda: hat(MODEL, THREAT, models.logits_fn(MODEL, *WEIGHTS), SHORT),
    "free": lambda: free(MODEL, THREAT, repeats=2),
    "fast": lambda: fast(MODEL, THREAT),
    "nfgsm": lambda: nfgsm(MODEL, THREAT),
    "gradalign": lambda: gradalign(MODEL, THREAT),
    "logit_pairing": lambda: adversarial_logit_pairing(MODEL, THREAT, SHORT),
    "logit_pairing, clean": lambda: clean_logit_pairing(MODEL, noise=0.1),
    "multinorm": lambda: average(MODEL, BALLS, SHORT),
    "multinorm, maximum": lambda: maximum(MODEL, BALLS, SHORT),
    "msd": lambda: msd(MODEL, BALLS, num_steps=2, step_sizes=(0.5, 0.5, 0.5)),
    "eat": lambda: eat(MODEL, BALLS, SHORT),
    "gradient_penalty": lambda: gradient_penalty(MODEL, THREAT),
    "gradient_penalty, differences": lambda: gradient_penalty(
        MODEL, rj.l2(0.5), difference=0.1
    ),
    "lipschitz_margin": lambda: lipschitz_margin(MODEL, 0.5),
    "curriculum": lambda: curriculum(stepwise),
    "microbatch": lambda: microbatches(madry(MODEL, THREAT, SHORT), 2),
    "generated": lambda: with_stream(madry(MODEL, THREAT, SHORT)),
}
NO_METHODS = ("__init__", "base", "minimax")
TX = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "," in name else ())
        for name in METHODS
    ],
)
def test_training_step_lowers_for_every_platform(name):
    method = METHODS[name]()
    batch = Batch(X, Y, jnp.arange(4, dtype=jnp.int32))
    batch = batch._replace(streams={"generated": batch})

    def f(raw_key, batch):
        state = create_state(
            jax.random.wrap_key_data(raw_key), MODEL, method, TX, batch
        )
        state, metrics = make_train_step(method, TX)(state, batch)
        return state.params, metrics

    assert lowered(f, jax.random.key_data(jax.random.key(0)), batch)


def test_every_method_has_a_row():
    folder = Path(inspect.getfile(rj)).parent / "methods"
    files = {path.stem for path in folder.glob("*.py")} - set(NO_METHODS)
    assert files == {name.split(",")[0] for name in METHODS}


def gradients(model, shape):
    x = jnp.ones((2, *shape))
    params, extra = jax.eval_shape(model.init, jax.random.key(0), x)

    def f(params, extra, x):
        def loss(params, x):
            return jnp.sum(model.apply(params, extra, x)[0] ** 2)

        return jax.grad(loss, (0, 1))(params, x)

    return f, (params, extra, x)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_convolutions_take_the_form_of_the_platform_they_are_lowered_for(platform):
    """On this machine, which is a CPU: barriers keep the canonical form apart; on TPU,
    of both convolutions, kernel, turned kernel and cotangent."""
    words = ("auto", "canonical" if platform == "cpu" else "plain")
    texts = []
    for convolution in words:
        net = models.small_cnn(channels=(8, 8), hidden=8, convolution=convolution)
        f, arguments = gradients(net, (28, 28, 1))
        texts.append(lowered(f, *arguments, platforms=(platform,)))
    auto, wanted = ([text.count(op) for op in COUNTED] for text in texts)
    assert auto[1:] == wanted[1:]
    assert auto[0] == wanted[0] + (6 if platform == "tpu" else 0)
    assert (wanted[0] > 0) == (platform == "cpu")


def test_gradients_of_kernels_lower_for_a_batch_of_unknown_size():
    net = models.small_cnn(channels=(8, 8), hidden=8)
    f, (params, extra, x) = gradients(net, (28, 28, 1))
    batch = jax.export.symbolic_shape("b, 28, 28, 1")
    rows = jax.ShapeDtypeStruct(batch, x.dtype)
    exported = jax.export.export(jax.jit(f))(params, extra, rows)
    assert exported.in_avals[-1].shape == batch


COUNTED = (
    "stablehlo.optimization_barrier",
    "stablehlo.convolution",
    "stablehlo.dot_general",
)
