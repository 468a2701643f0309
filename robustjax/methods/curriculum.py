"""Curricula: what a method attacks with, as a function of the training step.

A schedule maps the step (int32 scalar, traced) to a threat model or to a number of
attack steps; `curriculum` makes of a method with a schedule inside a method. Budget,
norm and number of steps are data, so one compiled step serves the whole training.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from robustjax.attacks.base import (
    Attack,
    AttackFn,
    Result,
    evaluate_point,
    select,
)
from robustjax.attacks.gradient import gradient_ascent, sparse_steepest
from robustjax.methods.base import Method, Stages
from robustjax.problems import Problem, example_keys
from robustjax.threats import ThreatModel, apply, stack, too_wide
from robustjax.types import Array, Key


def curriculum(build: Callable[[Array], Method]) -> Method:
    """The method that is `build(step)` at each step.

    `curriculum(lambda step: madry(model, ramp(linf(0.3), 500)(step), attack_fn))`

    Args:
      build: `step -> Method`, called inside the trace. Methods may differ in what is
        data (budget, norm, number of steps, weights), not in their form.

    Returns:
      A `Method` with the stages, carry and repeats of `build(0)`.

    Raises:
      TypeError: build does not return a Method.

    >>> from robustjax.methods.base import Aux, from_loss
    >>> def build(step):
    ...     return from_loss(lambda p, *rest: (step * p, Aux({}, (), {})))
    >>> grads = jax.jit(curriculum(build).grads)
    >>> [float(grads(1.0, {}, (), None, step, None)[0]) for step in (0, 3)]
    [0.0, 3.0]
    """
    first = build(jnp.int32(0))
    if not isinstance(first, Method):
        raise TypeError(
            f"build(0) is {first!r}, no Method: give a function of the step, such as "
            "lambda step: madry(model, ramp(threat, 500)(step))."
        )

    def grads(params, extra, carry, batch, step, key):
        return build(step).grads(params, extra, carry, batch, step, key)

    def attack(params, extra, carry, batch, step, key):
        return _stages(build(step)).attack(params, extra, carry, batch, step, key)

    def loss(params, extra, carry, batch, examples, step, key):
        inputs = (params, extra, carry, batch, examples, step, key)
        return _stages(build(step)).loss(*inputs)

    stages = None if first.stages is None else Stages(attack, loss)
    return first._replace(grads=grads, stages=stages)


def _stages(method: Method) -> Stages:
    assert method.stages is not None  # as those of build(0), which were looked at
    return method.stages


def ramp(
    threat: ThreatModel, num_steps: int, *, first: float = 0.0, delay: int = 0
) -> Callable[[Array], ThreatModel]:
    """`step -> threat` whose epsilon grows linearly and then stays.

    `epsilon (first + (1 - first) clip((step - delay) / num_steps, 0, 1))`

    Args:
      threat: the one of the end.
      num_steps: how long it grows.
      first: the fraction of epsilon at the beginning.
      delay: steps before it begins to grow.

    Raises:
      ValueError: num_steps is below 1.

    >>> from robustjax.threats import linf
    >>> schedule = ramp(linf(0.5), 10)
    >>> [float(schedule(step).epsilon) for step in (0, 5, 20)]
    [0.0, 0.25, 0.5]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; give 1 or more.")
    if (message := too_wide(threat)) is not None:
        warnings.warn(message, UserWarning, stacklevel=2)

    def at(step: Array) -> ThreatModel:
        part = jnp.clip((step - delay) / num_steps, 0, 1)
        return dataclasses.replace(
            threat, epsilon=threat.epsilon * (first + (1 - first) * part)
        )

    return at


def in_turn(
    threat_models: Sequence[ThreatModel], switches: Sequence[int]
) -> Callable[[Array], ThreatModel]:
    """`step -> threat`, one after the other: `in_turn([l2(1), linf(0.2)], [500])`.

    The norm is data (`AnyOf`); of the norms' code only that of the step's norm runs.

    Args:
      threat_models: in order.
      switches: the step at which each but the first begins; rising.

    Raises:
      ValueError: another number of switches than threats minus one, or not rising.

    >>> from robustjax.threats import l2, linf
    >>> schedule = in_turn([l2(1.0), linf(0.2)], [10])
    >>> [round(float(schedule(step).epsilon), 3) for step in (9, 10)]
    [1.0, 0.2]
    """
    switches = list(switches)
    if len(switches) != len(threat_models) - 1 or switches != sorted(set(switches)):
        raise ValueError(
            f"switches is {switches} for {len(threat_models)} threats; give the step "
            "at which each but the first begins, in rising order."
        )
    stacked = stack(threat_models)

    def at(step: Array) -> ThreatModel:
        begun = jnp.asarray(step) >= jnp.asarray(switches, jnp.int32)
        current = begun.sum(dtype=jnp.int32)
        return jax.tree.map(lambda leaf: leaf[current], stacked)

    return at


def growing(first: int, final: int, num_steps: int) -> Callable[[Array], Array]:
    """`step -> int32`: from `first` to `final` by ones, in stages of equal length.

    Args:
      first, final: numbers of attack steps, `0 <= first <= final`.
      num_steps: training steps that the stages share; afterwards it stays `final`.

    Raises:
      ValueError: the numbers fall or are negative, or num_steps is below 1.

    >>> schedule = growing(0, 2, 30)
    >>> [int(schedule(step)) for step in (0, 9, 10, 29, 99)]
    [0, 0, 1, 2, 2]
    """
    if not 0 <= first <= final or num_steps < 1:
        raise ValueError(
            f"first is {first}, final {final} and num_steps {num_steps}; give "
            "0 <= first <= final and 1 or more training steps."
        )
    stages = final - first + 1

    def at(step: Array) -> Array:
        # step * stages may pass int32: compare with the steps at which stages begin.
        begins = [-(-num_steps * i // stages) for i in range(1, stages)]
        begun = jnp.asarray(step) >= jnp.asarray(begins, jnp.int32)
        return first + begun.sum(dtype=jnp.int32)

    return at


def cat_step_size(key: Key, num_steps: Array) -> Array:
    """CAT's draw: `2 / k * U(1, 10 / k)` of epsilon for an attack of k steps.

    Up to k = 20 every row can reach the face of the ball, whatever is drawn. From 11 on
    the second end of the draw is the lower one, as in numpy.

    Source: perturb_true in the code of Cai et al. 2018, arXiv:1805.04807.

    >>> keys = jax.random.split(jax.random.key(0), 1000)
    >>> drawn = jax.vmap(cat_step_size, in_axes=(0, None))(keys, jnp.int32(4))
    >>> [round(float(v), 2) for v in (drawn.min(), drawn.mean(), drawn.max())]
    [0.5, 0.88, 1.25]
    """
    k = jnp.maximum(num_steps, 1)
    return 2 / k * (1 + (10 / k - 1) * jax.random.uniform(key))


def variable_pgd(
    num_steps: int | Array,
    step_size: float | Array | Callable[[Key, Array], Array] | None = None,
    *,
    mixed: bool = False,
    random_start: bool = True,
    density: float = 0.005,
) -> AttackFn:
    """`pgd(num_steps, step_size, keep=last)` where the number of steps may be traced.

    The loop's trip count is data: another number compiles nothing anew, and k steps
    cost k gradients, not those of the longest attack. 0 steps leave x as it is.

    Args:
      num_steps: int32 scalar, such as `growing(0, 7, 1000)(step)`.
      step_size: fraction of epsilon, or a function such as `cat_step_size` of a row's
        key and number of steps that draws it; None: `2.5 / num_steps`, at most 1.
      mixed: row by row a number drawn uniformly from 0 to `num_steps`, so that weaker
        attacks are not forgotten; it costs what `num_steps` for all costs.
      random_start, density: as for `pgd`.

    Returns:
      An attack for training; its last point counts.

    Raises:
      ValueError: num_steps is negative.

    Reference: Cai et al. 2018, Curriculum Adversarial Training, arXiv:1805.04807.

    Differs from the authors' code: the number of steps is a function of the training
    step; theirs grows when validation has not improved for 10 epochs, and goes on from
    the best weights. Theirs splits the batch into equal parts for 0 to k steps, draws a
    step size for each part and not for each row, and attacks in mode batch.

    >>> import robustjax as rj
    >>> x, y = jnp.full((1, 2), 0.5), jnp.array([0])
    >>> problem = rj.untargeted(lambda x: x, x, y, rj.linf(0.1))
    >>> attacked = jax.jit(lambda k: variable_pgd(k)(jax.random.key(0), problem).x_adv)
    >>> attacked(0), attacked(3)
    (Array([[0.5, 0.5]], dtype=float32), Array([[0.4, 0.6]], dtype=float32))
    """
    if not isinstance(num_steps, Tracer) and num_steps < 0:
        raise ValueError(f"num_steps={num_steps}: must be 0 or more.")
    count = jnp.asarray(num_steps, jnp.int32)
    if step_size is None:
        step_size = jnp.minimum(1.0, 2.5 / jnp.maximum(count, 1))

    def moving(size: float | Array) -> Attack:
        return gradient_ascent(
            lambda norm: optax.chain(sparse_steepest(norm, density), optax.scale(size)),
            random_start,
        )

    def attack_fn(key: Key, problem: Problem) -> Result:
        key = jax.random.fold_in(key, 0)  # as the one run of `pgd`: the same noise
        own = jnp.broadcast_to(count, problem.index.shape)
        if mixed:
            key, key_mix = jax.random.split(key)
            keys = example_keys(key_mix, problem.index)
            own = jax.vmap(lambda k: jax.random.randint(k, (), 0, count + 1))(keys)
        if callable(step_size):
            key, key_size = jax.random.split(key)
            drawn = jax.vmap(step_size)(example_keys(key_size, problem.index), own)
            kernel = moving(drawn.reshape(drawn.shape + (1,) * (problem.x.ndim - 1)))
        else:
            kernel = moving(step_size)
        key_init, key_steps, key_final = jax.random.split(key, 3)
        state = kernel.init(key_init, problem)
        clean = jnp.zeros_like(problem.x)
        state = state._replace(delta=select(own > 0, state.delta, clean))

        def body(t, state):
            moved, _ = kernel.step(jax.random.fold_in(key_steps, t), state, problem)
            return select(t < own, moved, state) if mixed else moved

        state = jax.lax.fori_loop(0, count, body, state)
        final = evaluate_point(problem, state.delta, key_final)
        x_adv = apply(problem.threat, problem.x, final.delta)
        result = Result(x_adv, final.success, final.size, final.score)
        return jax.lax.stop_gradient(result)

    return attack_fn
