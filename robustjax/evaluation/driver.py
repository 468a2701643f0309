"""Drives one attack over many rows: few shapes, chunks of steps, survivors compacted.

Rows live in a short ladder of shapes, so each attack is compiled at most once per shape
and never again as points fall. Every few steps the points that claim to have won go to
the judge; what it confirms leaves, what it does not is attacked on, and the survivors
are packed into smaller shapes. A row's result depends on neither: its randomness comes
from its index, its state is its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import losses, threats
from robustjax.attacks.base import select
from robustjax.evaluation.judge import (
    Driver,
    Model,
    compiler_options,
    judge,
    pad,
    plan,
)
from robustjax.evaluation.stage import LOSSES, Outcome, Passes, Rows, Stage
from robustjax.gradients import eot
from robustjax.models.compiling import quick_options
from robustjax.parallel import fetch
from robustjax.problems import Problem, maximize, predictions
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key


class Best(NamedTuple):
    """What a stage has found so far, by row.

    found:   `[B]` bool, a success that the judge has not refused.
    x_adv:   `[B, ...]` where: of several the one of smallest margin.
    won:     `[B]` its margin.
    margin:  `[B]` the smallest margin inside the ball.
    closest: `[B, ...]` where.
    """

    found: Array
    x_adv: Array
    won: Array
    margin: Array
    closest: Array


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    norm: Any, logits_fn: Callable[..., Array], x: Array, key: Key | None
) -> Array:
    """Traced once for a shape: the attacks' programs ask for it many times.

    Under another norm anew, as all programs: whoever changed weights that a function
    closes over must not be attacked on the old ones and judged on the new ones.
    """
    del norm
    return logits_fn(x, key).astype(jnp.float32)


def _problem(
    model: Model,
    names: tuple[str, ...],
    loss: Array,
    samples: int,
    threat: ThreatModel,
    rows: Rows,
    start: Any,
) -> Problem:
    def call(x: Array, key: Key | None) -> Array:
        return model.scale * _logits(threat.norm, model.logits_fn, x, key)

    def score(logits: Array) -> Array:
        scores = [LOSSES[name](logits, rows.y, rows.target) for name in names]
        if len(scores) == 1:
            return scores[0]
        # One is chosen by data. The others' gradients are finite (losses.finite) and
        # multiplied by 0.
        return jax.lax.select_n(jnp.broadcast_to(loss, rows.y.shape), *scores)

    problem = maximize(
        call,
        rows.x,
        ThreatModel(threat.norm, rows.epsilon, threat.lower, threat.upper),
        score,
        lambda logits: predictions(logits) != rows.y,
        index=rows.index,
        start=start,
        y=rows.y,
    )
    return eot(problem, samples) if samples > 1 else problem


def _start(make, names, samples, settings, model, loss, threat, rows, start, key):
    """The first state, and nothing found. Does not evaluate the model."""
    problem = _problem(model, names, loss, samples, threat, rows, start)
    state = make(settings).init(key, problem)
    no = jnp.zeros(rows.x.shape[:1], bool)
    # Not rows.x itself: the carry is donated step by step, its buffers must be its own.
    nowhere = jnp.zeros_like(rows.x)
    infinite = jnp.full(rows.x.shape[:1], jnp.inf, jnp.float32)
    best = Best(no, nowhere, infinite, infinite + 0, nowhere)
    return state, best


def _step(
    make, names, samples, raw, settings, model, loss, threat, rows, key, t, carry
):
    state, best = carry
    problem = _problem(model, names, loss, samples, threat, rows, None)
    state, info = make(settings).step(jax.random.fold_in(key, t), state, problem)
    if raw:
        x_adv = state.x_adv
    else:
        x_adv = threats.apply(problem.threat, rows.x, info.delta)
    inside = info.size <= rows.epsilon + 1e-6 * jnp.maximum(1, rows.epsilon)
    margin = losses.margin(info.logits, rows.y).astype(jnp.float32)
    # Of several wins between two looks the clearest one goes to the judge.
    clearer = info.success & (~best.found | (margin < best.won))
    closer = inside & (margin < best.margin)
    return state, Best(
        best.found | info.success,
        select(clearer, x_adv, best.x_adv),
        jnp.where(clearer, margin, best.won),
        jnp.where(closer, margin, best.margin),
        select(closer, x_adv, best.closest),
    )


def _advance(
    make,
    names,
    samples,
    raw,
    settings,
    model,
    loss,
    threat,
    rows,
    key,
    carry,
    begin,
    end,
):
    """The steps `begin .. end - 1`, in one program whatever their number."""

    def body(t, carry):
        fixed = (make, names, samples, raw, settings, model, loss, threat, rows, key)
        return _step(*fixed, t, carry)

    return jax.lax.fori_loop(begin, end, body, carry)


class Programs(NamedTuple):
    """What `drive` compiles, once per attack and shape.

    start:   the first state.
    advance: a chunk of steps in a loop.
    one:     one step without a loop, driven from the host: where a model's convolutions
             could not be rewritten, their gradients inside a loop run 10 times slower
             on CPU.
    """

    start: Callable[..., Any]
    advance: Callable[..., Any]
    one: Callable[..., Any]


@functools.cache
def programs(options: tuple[tuple[str, bool | str], ...]) -> Programs:
    """Made at the first use: the `judge.compiler_options` depend on the machine."""

    def stepping(f: Callable[..., Any], carry: int) -> Callable[..., Any]:
        fixed = {"static_argnums": (0, 1, 2, 3), "donate_argnums": (carry,)}
        return jax.jit(f, compiler_options=dict(options) | quick_options(1), **fixed)

    start = jax.jit(_start, static_argnums=(0, 1, 2), compiler_options=quick_options())
    return Programs(start, stepping(_advance, 10), stepping(_step, 11))


class _Part(NamedTuple):
    """Rows that run together: their places among the stage's rows, and their arrays."""

    places: np.ndarray
    rows: Rows
    carry: Any


def drive(
    driver: Driver,
    stage: Stage,
    rows: Rows,
    key: Key,
    start: np.ndarray | None = None,
    counts: bool = True,
    on_chunk: Callable[[int, int, int], None] = lambda *news: None,
) -> Outcome:
    """Run one stage on rows (host arrays, any number) and return what it found.

    Args:
      driver: model, threat and shapes.
      stage: the attack.
      rows: `[n, ...]` host arrays.
      key: of this stage; rows add their index.
      start: `[n, ...]` points to begin at, or None.
      counts: False: a phase outside of the real ball; no success counts, and nobody
        leaves.
      on_chunk: called with the steps done, the rows still running, and the passes
        executed.
    """
    n = len(rows.y)
    loss = np.int32(_names(stage).index(stage.loss))
    shared = driver.share((stage.settings, driver.model, loss, driver.threat))
    broken, refused, doubted = (np.zeros(n, bool) for _ in range(3))
    x_adv = np.array(rows.x, np.float32)
    margin = np.full(n, np.inf, np.float32)
    handed = np.zeros((n, 0), np.float32)
    if stage.hand_over is not None:
        handed = np.array(rows.x, np.float32)
    passes = Passes()
    alive, gone = np.arange(n), np.zeros(n, bool)
    low, high = np.asarray(driver.threat.lower), np.asarray(driver.threat.upper)

    def record(part: _Part, rest: np.ndarray) -> None:
        """Note what is known of those of a part's rows that leave unbroken."""
        state, best = part.carry
        places = part.places[rest]
        if not len(places):
            return
        count = len(part.places)
        margin[places] = fetch(best.margin)[:count][rest]
        if counts:
            measured = np.isfinite(margin[places])
            closest = fetch(best.closest)[:count][rest]
            x_adv[places[measured]] = closest[measured]
        if stage.hand_over is not None:
            delta = fetch(getattr(state, stage.hand_over))[:count][rest]
            handed[places] = np.clip(rows.x[places] + delta, low, high)

    parts = [
        _begin(driver, stage, shared, rows, start, key, places, shape)
        for places, shape in _shares(alive, driver.shapes)
    ]
    done = 0
    while done < stage.num_steps and len(alive):
        steps = min(stage.chunk, stage.num_steps - done)
        for number, part in enumerate(parts):
            carry = _run_chunk(driver, stage, shared, key, part, done, steps)
            parts[number] = part._replace(carry=carry)
            size = len(part.rows.y)
            passes += _cost(stage, steps, int((~gone[part.places]).sum()), size)
        done += steps
        if counts:
            for number, part in enumerate(parts):
                part, leave, doubt, outside = _look(driver, part, rows, gone)
                parts[number] = part
                doubted[part.places[doubt]] = True
                refused[part.places[outside]] = True
                fallen = part.places[leave]
                if len(fallen):
                    broken[fallen] = gone[fallen] = True
                    best = part.carry[1]
                    x_adv[fallen] = fetch(best.x_adv)[: len(leave)][leave]
                    margin[fallen] = fetch(best.won)[: len(leave)][leave]
        if gone[alive].any():
            alive = alive[~gone[alive]]
            parts = _packed(driver, parts, gone, len(alive))
        on_chunk(done, len(alive), passes.executed())
    for part in parts:
        record(part, ~gone[part.places])
    return Outcome(broken, x_adv, margin, doubted, handed, refused, passes)


def _names(stage: Stage) -> tuple[str, ...]:
    return stage.losses or (stage.loss,)


def _cost(stage: Stage, steps: int, count: int, size: int) -> Passes:
    forward = steps * stage.forward * stage.samples
    backward = steps * stage.backward * stage.samples
    return Passes(forward * count, backward * count, forward * size, backward * size)


def _shares(places: np.ndarray, shapes: Sequence[int]):
    """The places of each batch of the plan, and its shape."""
    begin = 0
    for shape in plan(len(places), shapes):
        yield places[begin : begin + shape], shape
        begin += shape


def _begin(driver, stage, shared, rows, start, key, places, shape) -> _Part:
    take = pad(places, shape)
    here = driver.put(jax.tree.map(lambda leaf: np.asarray(leaf)[take], rows))
    begin_at = None if start is None else driver.put(np.asarray(start)[take])
    static = stage.make, _names(stage), stage.samples
    carry = programs(compiler_options()).start(*static, *shared, here, begin_at, key)
    return _Part(places, here, carry)


def _run_chunk(driver, stage, shared, key, part, done, steps):
    static = stage.make, _names(stage), stage.samples, stage.raw
    fixed = (*static, *shared, part.rows, key)
    if driver.looped:
        bounds = np.int32(done), np.int32(done + steps)
        return programs(compiler_options()).advance(*fixed, part.carry, *bounds)
    carry = part.carry
    for t in range(done, done + steps):
        carry = programs(compiler_options()).one(*fixed, np.int32(t), carry)
    return carry


def _look(driver: Driver, part: _Part, rows: Rows, gone: np.ndarray):
    """Who claims to have won goes to the judge: `(part, leave, doubted, outside)`, bool
    masks over the part's places. A claim that it does not confirm is forgotten, and the
    attack goes on."""
    state, best = part.carry
    count = len(part.places)
    found = fetch(best.found)
    claims = np.flatnonzero(found[:count] & ~gone[part.places])
    leave, doubted, outside = (np.zeros(count, bool) for _ in range(3))
    if not len(claims):
        return part, leave, doubted, outside
    at = part.places[claims]
    points = fetch(best.x_adv)[claims]
    verdict = judge(driver, rows.x[at], rows.y[at], rows.epsilon[at], points)
    leave[claims] = verdict.wrong
    doubted[claims], outside[claims] = ~verdict.wrong, ~verdict.inside
    if not verdict.wrong.all():
        kept = np.array(found)
        kept[claims[~verdict.wrong]] = False
        best = best._replace(found=driver.put(kept))
        part = part._replace(carry=(state, best))
    return part, leave, doubted, outside


def _packed(
    driver: Driver, parts: list[_Part], gone: np.ndarray, alive: int
) -> list[_Part]:
    """The survivors in fewer or smaller batches, where that saves rows."""
    now = sum(len(part.rows.y) for part in parts)
    if not alive:
        return []
    if sum(plan(alive, driver.shapes)) >= now:
        return parts
    keep = [np.flatnonzero(~gone[part.places]) for part in parts]
    trees = [
        jax.tree.map(lambda leaf, k=k: leaf[k], fetch((part.rows, part.carry)))
        for part, k in zip(parts, keep, strict=True)
    ]
    places = np.concatenate([p.places[k] for p, k in zip(parts, keep, strict=True)])
    tree = jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)
    packed = []
    for take, shape in _shares(np.arange(alive), driver.shapes):
        taken = [pad(leaf[take], shape) for leaf in jax.tree.leaves(tree)]
        rows, carry = driver.put(jax.tree.unflatten(jax.tree.structure(tree), taken))
        packed.append(_Part(places[take], rows, carry))
    return packed
