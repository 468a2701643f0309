import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from robustjax.methods.base import Aux, Method
from robustjax.metrics import mean_of, value
from robustjax.training.state import Ema, TrainState
from robustjax.training.step import averaged_from, make_train_step, ramped
from robustjax.types import Batch

BATCH = Batch(jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32))


def noisy(repeats: int) -> Method:
    """Gradients that are pure noise: what a step makes of its key shows."""

    def grads(params, extra, carry, batch, step, key):
        noise = jax.random.normal(key, params.shape)
        extra = {"mean": extra["mean"] + 1.0, "count": extra["count"] + 1}
        return noise, Aux(extra, carry + 1, {"noise": mean_of(noise)})

    return Method(lambda params, batch: jnp.int32(0), grads, repeats)


def first(ema: bool = False) -> TrainState:
    params = jnp.ones(3)
    extra = {"mean": jnp.zeros(()), "count": jnp.int32(0)}
    averages = Ema(params, extra) if ema else None
    state = optax.sgd(1.0).init(params)
    key = jax.random.key(0)
    return TrainState(jnp.int32(0), params, extra, state, jnp.int32(0), averages, key)


def test_step_t_draws_from_fold_in_of_t():
    step = make_train_step(noisy(1), optax.sgd(1.0))
    state, _ = step(first(), BATCH)
    state, metrics = step(state, BATCH)
    key = jax.random.key(0)
    draws = [jax.random.normal(jax.random.fold_in(key, t), (3,)) for t in (0, 1)]
    np.testing.assert_allclose(state.params, 1 - draws[0] - draws[1], rtol=1e-6)
    np.testing.assert_allclose(value(metrics["noise"]), draws[1].mean(), rtol=1e-6)
    assert int(state.step) == 2


def test_repeats_make_that_many_updates_on_one_batch():
    step = jax.jit(make_train_step(noisy(4), optax.sgd(1.0)))
    state, metrics = step(first(), BATCH)
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.normal(jax.random.fold_in(key, r), (3,)) for r in range(4)]
    np.testing.assert_allclose(state.params, 1 - sum(draws), rtol=1e-5, atol=1e-6)
    assert (int(state.step), int(state.carry)) == (1, 4)
    assert float(metrics["noise"].count) == 12
    with pytest.raises(ValueError, match="repeats is 0"):
        make_train_step(noisy(0), optax.sgd(1.0))


@pytest.mark.parametrize("decay", [0.9, lambda step: 0.9])
def test_averages_of_weights_and_statistics(decay):
    step = make_train_step(noisy(1), optax.sgd(1.0), ema_decay=decay)
    state, expected = first(ema=True), jnp.ones(3)
    for _ in range(3):
        state, _ = step(state, BATCH)
        expected = 0.9 * expected + 0.1 * state.params
        np.testing.assert_allclose(state.ema.params, expected, rtol=1e-5)
    # 0, then 1, 2, 3 averaged in; counters are copied.
    np.testing.assert_allclose(state.ema.extra["mean"], 0.1 * (0.81 + 2 * 0.9 + 3))
    assert int(state.ema.extra["count"]) == 3


@pytest.mark.parametrize("decay", [1.0, 99.5, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay is {decay}; give a number from 0"):
        make_train_step(noisy(1), optax.sgd(1.0), ema_decay=decay)


def test_ramped_decay_follows_the_step():
    step = make_train_step(noisy(1), optax.sgd(1.0), ema_decay=ramped(0.999))
    state = dataclasses.replace(first(ema=True), step=jnp.int32(8))
    state, _ = step(state, BATCH)
    np.testing.assert_allclose(state.ema.params, 0.5 + 0.5 * state.params, rtol=1e-6)


@pytest.mark.parametrize("name", ["batch", "unlabeled"])
def test_masked_rows_are_kept_from_batch_statistics(name):
    masked = BATCH._replace(mask=jnp.array([True, False]))
    batch = masked if name == "batch" else BATCH._replace(streams={name: masked})
    step = make_train_step(noisy(1), optax.sgd(1.0))
    with pytest.raises(
        ValueError, match=rf"{name} has a mask, .* \(count\).*mask=None"
    ):
        step(first(), batch)
    # Where there are no statistics, the losses mind the mask and all is well.
    grads = noisy(1).grads

    def without(params, extra, *rest):
        found, aux = grads(params, {"mean": 0.0, "count": 0}, *rest)
        return found, aux._replace(extra={})

    method = Method(lambda params, batch: jnp.int32(0), without)
    state, _ = make_train_step(method, optax.sgd(1.0))(
        dataclasses.replace(first(), extra={}), batch
    )
    assert int(state.step) == 1


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (2, 3)])
def test_averaged_from_is_the_plain_mean_of_weights_and_statistics(start, every):
    with jax.enable_x64(True):
        step = jax.jit(
            make_train_step(
                noisy(1), optax.sgd(1.0), ema_decay=averaged_from(start, every)
            )
        )
        state = jax.tree.map(
            lambda v: v.astype(jnp.float64) if v.dtype == jnp.float32 else v,
            first(ema=True),
        )
        seen = []
        for t in range(12):
            state, _ = step(state, BATCH)
            seen.append([np.asarray(v) for v in (state.params, state.extra["mean"])])
            counted = seen[start : t + 1 : every] if t >= start else seen[-1:]
            assert state.ema.params.dtype == np.float64
            for found, values in zip(
                (state.ema.params, state.ema.extra["mean"]),
                zip(*counted, strict=True),
                strict=True,
            ):
                np.testing.assert_allclose(found, np.mean(values, 0), rtol=1e-14)
            assert int(state.ema.extra["count"]) == t + 1


def test_averaged_from_refuses_what_is_no_step():
    with pytest.raises(ValueError, match="start is -1, every 1; give 0 or more"):
        averaged_from(-1)
    with pytest.raises(ValueError, match="every 0"):
        averaged_from(0, 0)
