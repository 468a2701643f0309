"""The conformance table of training methods: a new method adds one row."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.attacks.apgd import apgd_training
from robustjax.attacks.base import last
from robustjax.attacks.noise import noise
from robustjax.attacks.pgd import fgsm, pgd
from robustjax.data.sources import load
from robustjax.losses import cross_entropy
from robustjax.methods.awp import awp
from robustjax.methods.base import (
    Aux,
    Method,
    batch_loss,
    from_loss,
    from_stages,
    label_loss,
    smoothed,
)
from robustjax.methods.curriculum import curriculum, growing, in_turn, variable_pgd
from robustjax.methods.eat import eat
from robustjax.methods.fast import fast
from robustjax.methods.free import free
from robustjax.methods.generated import with_stream
from robustjax.methods.gradalign import gradalign
from robustjax.methods.gradient_penalty import gradient_penalty
from robustjax.methods.hat import hat
from robustjax.methods.logit_pairing import (
    adversarial_logit_pairing,
    clean_logit_pairing,
)
from robustjax.methods.madry import cifar_code, cifar_paper, madry, mnist, one_step
from robustjax.methods.mart import mart
from robustjax.methods.microbatch import microbatches
from robustjax.methods.minimax import minimax_loss
from robustjax.methods.msd import msd
from robustjax.methods.multinorm import average, maximum
from robustjax.methods.nfgsm import nfgsm
from robustjax.methods.standard import standard
from robustjax.methods.trades import trades
from robustjax.metrics import value
from robustjax.models.base import Model, from_linen, logits_fn
from robustjax.parallel import constrain_rows, data_mesh, put_global, replicated
from robustjax.problems import untargeted
from robustjax.threats import l1, l2, linf
from robustjax.training.state import TrainState, create_state
from robustjax.training.step import Decay, averaged_from, make_train_step, ramped
from robustjax.types import Batch


class Net(nn.Module):
    """A dense net with BatchNorm, in the dtype of its input."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = x.reshape(x.shape[0], -1)
        kind = {"dtype": x.dtype, "param_dtype": x.dtype}
        x = nn.Dense(16, **kind)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, **kind)(x)
        return nn.Dense(10, **kind)(nn.relu(x))


MODEL = from_linen(Net())


def linear(x):
    weights = 0.1 * jnp.arange(640.0).reshape(64, 10) % 1.0
    return {"w": weights}, {}


def linear_apply(params, extra, x, *, train=False, key=None):
    return x.reshape(x.shape[0], -1) @ params["w"], extra


LINEAR = Model(lambda key, x: linear(x), linear_apply)
ATTACK = pgd(2, 0.7, keep=last)


class Row(NamedTuple):
    """A method, and how often a batch moves the running statistics.

    streams: whether the method learns from the stream of `batch_of` too.
    ema:     the decay of the averages that are kept; None: none are.
    quick:   whether all checks run every time, or some among the slow tests.
    """

    build: Callable[[Model], Method]
    updates_per_batch: int = 1
    streams: bool = False
    ema: Decay | None = None
    quick: bool = False


BALLS = [linf(0.1), l2(0.5)]
SHORT = pgd(2, 0.7, random_start=False, keep=last)


def everything(model):
    """AWP x TRADES x generated data."""
    method = trades(model, linf(0.1), SHORT, outer=smoothed(0.1))
    return awp(with_stream(method, smoothing=0.1, num_classes=10))


def scheduled(model):
    """L2 before Linf, with a growing number of steps."""
    threat, steps = in_turn([l2(0.5), linf(0.1)], [2]), growing(1, 2, 4)
    return lambda step: madry(model, threat(step), variable_pgd(steps(step), 0.7))


METHODS = {
    "standard": Row(lambda model: standard(model), quick=True),
    "standard, smoothed": Row(lambda model: standard(model, outer=smoothed(0.1))),
    "madry, Linf": Row(lambda model: madry(model, linf(0.1), ATTACK)),
    "madry, L2": Row(lambda model: madry(model, l2(0.5), ATTACK)),
    "madry, batch statistics": Row(
        lambda model: madry(model, linf(0.1), ATTACK, bn_mode="batch"), quick=True
    ),
    "trades": Row(lambda model: trades(model, linf(0.1), SHORT), 3),
    "mart": Row(lambda model: mart(model, linf(0.1), SHORT), 2),
    "awp": Row(lambda model: awp(madry(model, linf(0.1), ATTACK))),
    "awp, trades, ema, generated": Row(
        everything, 3, streams=True, ema=ramped(0.99), quick=True
    ),
    "ema": Row(lambda model: standard(model), ema=ramped(0.99)),
    "swa": Row(lambda model: standard(model), ema=averaged_from(0), quick=True),
    "generated": Row(
        lambda model: with_stream(madry(model, linf(0.1), ATTACK)), streams=True
    ),
    "hat": Row(
        lambda model: hat(model, linf(0.1), logits_fn(LINEAR, *linear(None)), SHORT), 3
    ),
    "free": Row(lambda model: free(model, linf(0.1), repeats=3), 3, quick=True),
    "fast": Row(lambda model: fast(model, linf(0.1))),
    "nfgsm": Row(lambda model: nfgsm(model, linf(0.1))),
    "gradalign": Row(lambda model: gradalign(model, linf(0.1))),
    "adversarial logit pairing": Row(
        lambda model: adversarial_logit_pairing(model, linf(0.1), ATTACK)
    ),
    "clean logit pairing": Row(lambda model: clean_logit_pairing(model, noise=0.1)),
    "average of norms": Row(lambda model: average(model, BALLS, SHORT), 2),
    "maximum over norms": Row(lambda model: maximum(model, BALLS, SHORT)),
    "msd": Row(lambda model: msd(model, BALLS, num_steps=2, step_sizes=(0.5, 0.5))),
    "eat": Row(lambda model: eat(model, [linf(0.1), l1(2.0)], apgd_training(3))),
    "gradient penalty": Row(lambda model: gradient_penalty(model, linf(0.1))),
    "gradient penalty, by differences": Row(
        lambda model: gradient_penalty(model, l2(0.5), difference=0.1, bn_mode="batch"),
    ),
    "curriculum": Row(lambda model: curriculum(scheduled(model))),
    "microbatches": Row(
        lambda model: microbatches(madry(model, linf(0.1), ATTACK), 2), 2
    ),
    # scripts/new_method adds rows above this line.
}
EVERY = pytest.mark.parametrize("name", METHODS)
SOME = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if row.quick else pytest.mark.slow)
        for name, row in METHODS.items()
    ],
)


def batch_of(size: int, first: int = 0) -> Batch:
    digits = load("digits")
    rows = slice(first, first + size)
    batch = Batch(
        jnp.asarray(digits.x_train[rows], jnp.float32) / digits.max_value,
        jnp.asarray(digits.y_train[rows]),
        jnp.arange(first, first + size, dtype=jnp.int32),
    )
    return batch._replace(streams={"generated": batch._replace(x=0.9 * batch.x)})


def rows_of(name: str, rows: int) -> int:
    """How many rows count where the batch has `rows`: its stream has as many."""
    return rows * (2 if METHODS[name].streams else 1)


TX = optax.sgd(0.05, momentum=0.9)


@functools.cache
def initial(dtype: str, ema: bool = False):
    """The first state, but for the carry."""

    @jax.jit
    def create(key):
        x = jnp.zeros((1, 8, 8, 1), dtype)
        batch = Batch(x, jnp.zeros(1))
        state = create_state(key, MODEL, standard(MODEL), TX, batch, ema=ema)
        # Flax keeps BatchNorm's statistics in float32 whatever the input is.
        cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
        return dataclasses.replace(state, extra=cast(state.extra), ema=cast(state.ema))

    return create(jax.random.key(0))


def begin(name: str, batch: Batch):
    row = METHODS[name]
    method, state = row.build(MODEL), initial(str(batch.x.dtype), row.ema is not None)
    carry = jax.tree.map(jnp.array, method.init(state.params, batch))
    state = dataclasses.replace(state, carry=carry)
    return state, make_train_step(method, TX, row.ema)


@functools.cache
def compiled(name: str):
    """The first state and the jitted step at 64 rows, shared by tests."""
    state, step = begin(name, batch_of(64))
    return state, jax.jit(step)


def equal(first, second) -> bool:
    first, second = (jax.tree.leaves(_numbers(tree)) for tree in (first, second))
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def _numbers(tree):
    return jax.tree.map(
        lambda leaf: (
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        ),
        tree,
    )


@SOME
def test_loss_is_finite_and_falls(name):
    batch = batch_of(64)
    state, step = compiled(name)
    repeats = METHODS[name].build(MODEL).repeats
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(value(metrics["loss"])))
        assert float(metrics["loss"].count) == rows_of(name, 64) * repeats
        assert 0 <= float(value(metrics["accuracy"])) <= 1
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    assert int(state.step) == 12


@SOME
def test_statistics_move_as_the_method_says(name):
    """Passes in train mode whose statistics are kept are counted in `extra`."""
    row = METHODS[name]

    def apply(params, extra, x, *, train=False, key=None):
        logits = x.reshape(x.shape[0], -1) @ params
        return logits, {"passes": extra["passes"] + jnp.int32(train)}

    method = row.build(Model(lambda key, x: (jnp.zeros(()), {}), apply))
    step = jax.jit(make_train_step(method, optax.sgd(0.1)))
    params = 0.1 * jax.random.normal(jax.random.key(0), (64, 10))
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        extra={"passes": jnp.int32(0)},
        opt_state=optax.sgd(0.1).init(params),
        carry=jax.tree.map(jnp.array, method.init(params, batch_of(4))),
        ema=None,
        key=jax.random.key(0),
    )
    for n in range(1, 4):
        state, _ = step(state, batch_of(4))
        assert int(state.extra["passes"]) == n * row.updates_per_batch


@SOME
def test_masked_rows_never_count(name):
    """Garbage in masked rows changes neither gradients nor metrics.

    BatchNorm in train mode mixes rows by nature, so the model here has none.
    """
    method = METHODS[name].build(LINEAR)
    batch = batch_of(8)
    params, extra = linear(batch.x)
    mask = jnp.arange(8) < 5

    @jax.jit
    def grads(x, y):
        masked = Batch(x, y, batch.index, mask, batch.streams)
        step, carry = jnp.zeros((), jnp.int32), method.init(params, masked)
        return method.grads(params, extra, carry, masked, step, jax.random.key(1))

    expected, aux = grads(batch.x, batch.y)
    found, aux_found = grads(batch.x.at[5:].set(0.25), batch.y.at[5:].set(0))
    assert float(aux.metrics["loss"].count) == 5 + rows_of(name, 8) - 8
    assert equal(expected, found) and equal(aux.metrics, aux_found.metrics)
    # Free's carry has the batch's rows: those of masked examples may be anything.
    for a, b in zip(*map(jax.tree.leaves, (aux.carry, aux_found.carry)), strict=True):
        assert np.array_equal(a[:5], b[:5])


@SOME
def test_restored_at_step_k_is_as_unbroken(name, tmp_path):
    from robustjax.training import checkpoint

    state, step = compiled(name)
    for k in range(2):
        state, _ = step(state, batch_of(64, 64 * k))
    checkpoint.save(tmp_path, 2, state, {})
    restored = checkpoint.restore(tmp_path, 2, jax.eval_shape(lambda s: s, state))
    for k in range(2, 4):
        state, _ = step(state, batch_of(64, 64 * k))
        restored, _ = step(restored, batch_of(64, 64 * k))
    assert equal(state, restored)
    if METHODS[name].ema is not None:
        assert not equal(state.ema.params, state.params)


def run_on(devices: int, name: str, dtype: str, num_steps: int):
    batch = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf,
        batch_of(16),
    )
    state, step = begin(name, batch)
    mesh = data_mesh(jax.devices()[:devices])

    @jax.jit
    def run(state, batch):
        batch = constrain_rows(batch, mesh)
        body = lambda _, state: step(state, batch)[0]  # noqa: E731
        return jax.lax.fori_loop(0, num_steps, body, state)

    placed = put_global((state, batch), replicated(mesh))
    return jax.device_get(_numbers(run(*placed)))


def distance(one: TrainState, four: TrainState) -> float:
    """Over all that a state holds: weights, statistics, momenta, carry, averages."""
    pairs = zip(*map(jax.tree.leaves, (one, four)), strict=True)
    return np.max([np.abs(a - b).max() for a, b in pairs])  # NaN if there is one


@SOME
def test_one_device_is_four_devices(name):
    one, four = (run_on(n, name, "float32", 1) for n in (1, 4))
    assert distance(one, four) <= 1e-5


@SOME
def test_one_device_is_four_devices_in_float64(name):
    with jax.enable_x64(True):
        one, four = (run_on(n, name, "float64", 20) for n in (1, 4))
    kinds = {leaf.dtype for leaf in jax.tree.leaves((one.params, one.extra, one.ema))}
    assert kinds == {np.dtype("float64")}
    assert distance(one, four) <= 1e-8


@EVERY
def test_a_model_in_bfloat16_is_attacked_and_judged_in_float32(name):
    """Whatever the model computes in, inputs, losses and gradients are float32."""
    seen = []

    def apply(params, extra, x, *, train=False, key=None):
        seen.append(x.dtype)
        logits, extra = LINEAR.apply(
            jax.tree.map(lambda w: w.astype(jnp.bfloat16), params),
            extra,
            x.astype(jnp.bfloat16),
        )
        return logits, extra

    method = METHODS[name].build(Model(LINEAR.init, apply))
    batch = batch_of(8)
    params, extra = linear(batch.x)
    carry, step = method.init(params, batch), jnp.int32(0)
    grads, aux = jax.eval_shape(
        method.grads, params, extra, carry, batch, step, jax.random.key(0)
    )
    assert seen and set(seen) == {jnp.dtype("float32")}
    found = {leaf.dtype for leaf in jax.tree.leaves((grads, aux.metrics))}
    assert found == {jnp.dtype("float32")}


@pytest.mark.parametrize("bn_mode", ["eval", "batch"])
def test_no_gradient_flows_through_the_attack(bn_mode):
    """The gradient is that of the plain loss at a constant adversarial point."""
    batch, state = batch_of(16), initial("float32")
    params, extra = state.params, state.extra
    key = jax.random.key(5)
    method = madry(MODEL, linf(0.1), ATTACK, bn_mode=bn_mode)
    grads = jax.jit(method.grads)
    found, aux = grads(params, extra, (), batch, jnp.int32(0), key)

    @jax.jit
    def attack(params, extra):
        attack_key, _ = jax.random.split(key)
        frozen = logits_fn(MODEL, params, extra, train=bn_mode == "batch")
        problem = untargeted(frozen, batch.x, batch.y, linf(0.1), index=batch.index)
        return ATTACK(attack_key, problem).x_adv

    x_adv = np.asarray(attack(params, extra))
    assert np.abs(x_adv - np.asarray(batch.x)).max() > 0.01

    def manual(params):
        logits, new = MODEL.apply(params, extra, jnp.asarray(x_adv), train=True)
        return cross_entropy(logits, batch.y).mean(), new

    expected, statistics = jax.jit(jax.grad(manual, has_aux=True))(params)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(*map(jax.tree.leaves, (aux.extra, statistics)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_leaking_attack_is_stopped():
    """Even an attack that returns a function of the weights gives no gradient."""

    def apply(params, extra, x, *, train=False, key=None):
        return x * params, extra

    def leaking(key, problem):
        result = ATTACK(key, problem)
        score, _ = problem.score(problem.x, None)
        return result._replace(x_adv=problem.x + 0.0 * score[:, None] + score[:, None])

    model = Model(lambda key, x: (jnp.array(2.0), {}), apply)
    batch = Batch(jnp.array([[0.3, 0.7]]), jnp.array([1]))
    loss = minimax_loss(model, leaking, linf(0.1))

    def total(params):
        return loss(params, {}, (), batch, jnp.int32(0), jax.random.key(0))[0]

    shift = cross_entropy(2.0 * batch.x, batch.y)[:, None]

    def by_hand(params):
        return cross_entropy((batch.x + shift) * params, batch.y).mean()

    found, expected = jax.jit(jax.grad(total))(2.0), jax.jit(jax.grad(by_hand))(2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# There is no stage of an attack to leak: the method has no attack, or one with the
# derivative written out (test_free and test_gradient_penalty.py have it by hand).
WITHOUT_STAGES = (
    "standard",
    "standard, smoothed",
    "ema",
    "swa",
    "free",
    "clean logit pairing",
    "gradient penalty",
    "gradient penalty, by differences",
)


@jax.custom_vjp
def nothing(weights):
    """0, a function of the weights whose derivative nobody may ask for."""
    return jnp.float32(0)


def derivative_of_nothing(_, slope):
    raise AssertionError("the gradient flows through the attack")


nothing.defvjp(lambda weights: (nothing(weights), None), derivative_of_nothing)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in WITHOUT_STAGES])
def test_no_gradient_flows_through_the_stage_of_the_attack(name, monkeypatch):
    """What the attack hands on may depend on the weights: the loss takes constants.

    Wrappers (AWP, streams, curricula, microbatches) get the leaking method. Nothing is
    compiled: the derivative is asked for, or is not, while the gradient is traced.
    """
    leaks = []

    def leaking(stages, *init):
        def attack(params, *rest):
            leaks.append(name)
            return jax.tree.map(
                lambda a: a + nothing(params) if a.dtype == jnp.float32 else a,
                stages.attack(params, *rest),
            )

        return from_stages(stages._replace(attack=attack), *init)

    files = [file for n, file in sys.modules.items() if "robustjax.methods." in n]
    for file in files:
        if hasattr(file, "from_stages"):
            monkeypatch.setattr(file, "from_stages", leaking)
    batch, method = batch_of(8), METHODS[name].build(LINEAR)
    params, extra = linear(batch.x)
    carry, step = method.init(params, batch), jnp.int32(0)
    jax.eval_shape(method.grads, params, extra, carry, batch, step, jax.random.key(0))
    assert leaks, f"{name} has no stages; if it needs none, add it to WITHOUT_STAGES"


def test_index_and_not_position_decides_the_random_start():
    batch = batch_of(8)
    params, extra = linear(None)
    method = madry(LINEAR, linf(0.1), one_step())
    order = jnp.array([3, 1, 0, 2, 7, 6, 5, 4])
    permuted = Batch(batch.x[order], batch.y[order], batch.index[order])
    args = (jnp.int32(0), jax.random.key(2))
    grads = jax.jit(method.grads)
    expected, _ = grads(params, extra, (), batch, *args)
    found, _ = grads(params, extra, (), permuted, *args)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "epsilon", "reach"),
    [
        (cifar_paper, 8 / 255, 7 * 2 / 255),
        (cifar_code, 8 / 255, 10 * 2 / 255),
        (mnist, 0.3, 40 * 0.01),
        (one_step, 8 / 255, 1.25 * 8 / 255),
    ],
)
def test_presets_move_as_published(preset, epsilon, reach):
    """A constant gradient moves every pixel by steps * step size, from the far corner
    of the ball at most to the near one."""
    weights = jnp.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    x, signs = jnp.full((1, 3), 0.5), weights[None, :, 0]
    problem = untargeted(lambda x: x @ weights, x, jnp.array([1]), linf(epsilon))
    problem = problem._replace(start=x - epsilon * signs)
    moved = jax.jit(lambda key: preset()(key, problem).x_adv)(jax.random.key(0)) - x
    expected = (min(reach, 2 * epsilon) - epsilon) * signs
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_soft_labels_train_and_are_attacked():
    batch = batch_of(8)
    soft = batch._replace(y=jax.nn.one_hot(batch.y, 10))
    params, extra = linear(None)
    method = madry(LINEAR, linf(0.1), ATTACK)
    args = (jnp.int32(0), jax.random.key(2))
    hard_grads, hard = jax.jit(method.grads)(params, extra, (), batch, *args)
    soft_grads, found = jax.jit(method.grads)(params, extra, (), soft, *args)
    for a, b in zip(*map(jax.tree.leaves, (hard_grads, soft_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert value(hard.metrics["accuracy"]) == value(found.metrics["accuracy"])


def test_smoothing_zero_is_cross_entropy_and_is_bounded():
    logits = jax.random.normal(jax.random.key(0), (4, 10))
    y = jnp.arange(4)
    np.testing.assert_allclose(
        smoothed(0.0)(logits, y), label_loss(logits, y), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"smoothing is 1\.0"):
        smoothed(1.0)


def test_a_broken_model_shows_in_the_loss():
    logits = jnp.array([[0.0, 1.0], [jnp.nan, 0.0]])
    batch = Batch(jnp.zeros((2, 1)), jnp.array([1, 0]))
    assert np.isnan(batch_loss(logits, batch)[0])
    fine = batch._replace(mask=jnp.array([True, False]))
    assert np.isfinite(batch_loss(logits, fine)[0])


def test_bn_mode_is_checked():
    with pytest.raises(ValueError, match="bn_mode is 'train'.*eval"):
        madry(MODEL, linf(0.1), ATTACK, bn_mode="train")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "threat", "attack_fn", "message"),
    [
        (Net(), linf(0.1), ATTACK, r"Linen module, Net: pass from_linen\(module\)"),
        (MODEL.apply, linf(0.1), ATTACK, r"no Model: .* Model\(init, apply\)"),
        (MODEL, 0.1, ATTACK, r'threat is 0.1, no ThreatModel: .* linf\("8/255"\)'),
        (MODEL, ATTACK, linf(0.1), "the attack is ThreatModel.*, no function"),
        (MODEL, linf, ATTACK, "threat is <function linf.*, no ThreatModel"),
        (MODEL, linf(0.1), pgd, r"pgd\(num_steps, ...\), .* call it, pgd\(\)"),
        (MODEL, linf(0.1), fgsm, r"fgsm\(step_size, ...\), .* call it, fgsm\(\)"),
        (MODEL, linf(0.1), noise, r"noise\(kind, ...\), .* call it, noise\(\)"),
        (MODEL, linf(0.1), cifar_code, r"an attack takes \(key, problem\)"),
        (MODEL, linf(0.1), 7, r"the attack is 7, no function \(key, problem\)"),
    ],
)
def test_what_is_no_model_threat_or_attack_is_named(model, threat, attack_fn, message):
    with pytest.raises(TypeError, match=message):
        madry(model, threat, attack_fn)
    with pytest.raises(TypeError, match=message):
        minimax_loss(model, attack_fn, threat)
    if "Model(init" in message or "from_linen" in message:
        with pytest.raises(TypeError, match=message):
            standard(model)


def test_a_budget_wider_than_the_box_is_doubted():
    with pytest.warns(UserWarning, match='write "8/255"; if all of the box') as found:
        madry(MODEL, linf(8), ATTACK)
    assert len(found) == 1
    madry(MODEL, linf(8, lower=0, upper=255), ATTACK)  # warnings are errors here
    madry(MODEL, linf(np.inf), ATTACK)
    jax.jit(lambda epsilon: madry(MODEL, linf(epsilon), ATTACK) and epsilon)(8.0)


def test_carry_of_a_method_of_ones_own():
    def loss(params, extra, carry, batch, step, key):
        return params**2, Aux(extra, carry + 1, {})

    method = from_loss(loss, lambda params, batch: jnp.zeros(()))
    carry = method.init(jnp.array(1.0), batch_of(2))
    _, aux = method.grads(jnp.array(1.0), {}, carry, None, 0, None)
    assert float(aux.carry) == 1
