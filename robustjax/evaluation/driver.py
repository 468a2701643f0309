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
from robustjax.attacks.base import Attack, AttackFn, Info, evaluate_point, select
from robustjax.gradients import eot
from robustjax.parallel import fetch, put_global, replicated, split_rows
from robustjax.problems import Problem, maximize, predictions
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, LogitsFn, LossFn, PyTree

LOSSES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "cross_entropy": lambda z, y, target: losses.cross_entropy(z, y),
    "margin": lambda z, y, target: losses.margin_loss(z, y),
    "dlr": lambda z, y, target: losses.dlr(z, y),
    "dlr_targeted": losses.dlr_targeted,
    "difference": losses.difference,
}
"""What a stage may raise, `(logits, y, target) -> [B]`. Chosen by data: one compiled
program serves them all."""

# What a batch costs beside its rows, in rows: keeps the plan from splitting too finely.
OVERHEAD = 2


class Stage(NamedTuple):
    """One attack of a suite.

    name:      what the report calls it.
    make:      `settings -> Attack`, a module-level function (jit knows it by identity).
    settings:  a pytree; its leaves are data.
    num_steps: points evaluated for each row.
    loss:      a name of `LOSSES`.
    forward, backward: passes of one row in one step.
    chunk:     steps between two looks at who has fallen.
    hand_over: the field of the last state that the caller wants back, or None.
    samples:   random draws of the model that each score averages (EOT).
    raw:       the perturbation is judged as it is, not clipped into the box: for
               attacks of others, whose mistakes must be seen.
    """

    name: str
    make: Callable[[Any], Attack]
    settings: PyTree
    num_steps: int
    loss: str = "cross_entropy"
    forward: int = 1
    backward: int = 1
    chunk: int = 10
    hand_over: str | None = None
    samples: int = 1
    raw: bool = False


class OneShotState(NamedTuple):
    """`x_adv`: what the attack returned, to the bit; `delta`: its distance from x."""

    delta: Array
    x_adv: Array


class OneShot(NamedTuple):
    """An `AttackFn` as a kernel of one step, so that the driver drives only kernels."""

    attack_fn: AttackFn
    loss: LossFn | None = None

    def __call__(self, settings: PyTree) -> Attack:
        del settings

        def init(key: Key, problem: Problem) -> OneShotState:
            return OneShotState(jnp.zeros_like(problem.x), problem.x + 0)

        def step(
            key: Key, state: OneShotState, problem: Problem
        ) -> tuple[OneShotState, Info]:
            key_run, key_look = jax.random.split(key)
            result = self.attack_fn(key_run, problem)
            delta = result.x_adv - problem.x
            info = evaluate_point(problem, delta, key_look)
            # What it claims, also outside of the ball: the judge says no, and the
            # report tells. And what wins without being claimed.
            success = result.success | info.success
            x_adv = result.x_adv.astype(problem.x.dtype)
            return OneShotState(delta, x_adv), info._replace(success=success)

        return Attack(init, step)


class Rows(NamedTuple):
    """What an attack reads of each row; leaves lead with B, on host or device."""

    x: Any
    y: Any
    index: Any
    target: Any
    epsilon: Any


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


class Model(NamedTuple):
    """The model under attack: a pytree, so that its weights are data.

    logits_fn: called `(x, key)`.
    scale:     scalar; attacks see `scale * logits`. A power of two changes no verdict.
    """

    logits_fn: LogitsFn
    scale: Array


class Passes(NamedTuple):
    """Forward and backward passes: counted (a row once), executed (padding too)."""

    forward: int = 0
    backward: int = 0
    executed_forward: int = 0
    executed_backward: int = 0

    def __add__(self, other: Any) -> "Passes":
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))


class Outcome(NamedTuple):
    """What a stage gave for its rows, in their order, on the host.

    broken:  `[n]` bool, confirmed by the judge.
    x_adv:   `[n, ...]`: where broken that point, elsewhere the one of smallest margin.
    margin:  `[n]` the smallest margin reached (`inf`: none was measured).
    doubted: `[n]` bool: a claim that the judge did not confirm.
    handed:  `[n, ...]` the state's field that `hand_over` names, or an empty array.
    refused: `[n]` bool: a claim that lies outside of ball or box.
    passes:  counted and executed.
    """

    broken: np.ndarray
    x_adv: np.ndarray
    margin: np.ndarray
    doubted: np.ndarray
    handed: np.ndarray
    refused: np.ndarray
    passes: Passes


def _problem(
    model: Model, loss: Array, samples: int, threat: ThreatModel, rows: Rows, start: Any
) -> Problem:
    def call(x: Array, key: Key | None) -> Array:
        return model.scale * model.logits_fn(x, key).astype(jnp.float32)

    def score(logits: Array) -> Array:
        branches = list(LOSSES.values())
        return jax.lax.switch(loss, branches, logits, rows.y, rows.target)

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(make, samples, settings, model, loss, threat, rows, start, key):
    """The first state, and nothing found. Does not evaluate the model."""
    problem = _problem(model, loss, samples, threat, rows, start)
    state = make(settings).init(key, problem)
    no = jnp.zeros(rows.x.shape[:1], bool)
    # Not rows.x itself: the carry is donated step by step, its buffers must be its own.
    nowhere = jnp.zeros_like(rows.x)
    infinite = jnp.full(rows.x.shape[:1], jnp.inf, jnp.float32)
    best = Best(no, nowhere, infinite, infinite + 0, nowhere)
    return state, best


def _step(make, samples, raw, settings, model, loss, threat, rows, key, t, carry):
    state, best = carry
    problem = _problem(model, loss, samples, threat, rows, None)
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(9,))
def _advance(
    make, samples, raw, settings, model, loss, threat, rows, key, carry, begin, end
):
    """The steps `begin .. end - 1`, in one program whatever their number."""

    def body(t, carry):
        fixed = (make, samples, raw, settings, model, loss, threat, rows, key)
        return _step(*fixed, t, carry)

    return jax.lax.fori_loop(begin, end, body, carry)


_advance_one = functools.partial(
    jax.jit(_step, static_argnums=(0, 1, 2), donate_argnums=(10,))
)
"""One step without a loop, driven from the host: where a model's convolutions could not
be rewritten, their gradients inside a loop run 10 times slower on CPU."""


@jax.jit
def _judge(model, threat, x, y, epsilon, x_adv, keys):
    """A fresh look at points: predictions `[P, B]`, margins, inside ball and box."""
    here = ThreatModel(threat.norm, epsilon, threat.lower, threat.upper)
    # float32 where the default is less (TPU, recent GPUs).
    with jax.default_matmul_precision("highest"):

        def look(key: Key) -> Array:
            return model.logits_fn(x_adv, key).astype(jnp.float32)

        # One pass needs no loop, in which a CPU convolves slowly.
        alone = len(keys) == 1
        logits = look(keys[0])[None] if alone else jax.lax.map(look, keys)
    margin = losses.margin(model.scale * jnp.mean(logits, 0), y)
    inside = threats.is_feasible(here, x, x_adv)
    return jax.vmap(predictions)(logits), margin, inside


class Verdict(NamedTuple):
    """What the judge says of points, in their order.

    wrong:      `[n]` bool: misclassified (random models: in most passes) inside ball
                and box.
    inside:     `[n]` bool.
    prediction: `[n]` the first pass's prediction; -1 where a logit is NaN.
    correct:    `[P, n]` bool, pass by pass.
    """

    wrong: np.ndarray
    inside: np.ndarray
    prediction: np.ndarray
    correct: np.ndarray


class Driver(NamedTuple):
    """What all stages of an evaluation share.

    model:   the model under attack.
    threat:  norm and box; budgets come row by row.
    shapes:  rows per program, ascending (of all devices together).
    looped:  run chunks as one program; False: one step per call, from the host.
    mesh:    devices that share the rows, or None.
    keys:    `[P]` the judge's keys, a pass for each (more than one: random models).
    """

    model: Model
    threat: ThreatModel
    shapes: tuple[int, ...]
    looped: bool
    mesh: Any
    keys: Key

    def put(self, tree: PyTree) -> PyTree:
        """Rows to the device, or divided over the devices."""
        return put_global(tree, None if self.mesh is None else split_rows(self.mesh))

    def share(self, tree: PyTree) -> PyTree:
        """What every row reads: on the device, or on all of them."""
        return put_global(tree, None if self.mesh is None else replicated(self.mesh))


def ladder(batch_size: int, count: int, devices: int = 1) -> tuple[int, ...]:
    """Rows per program, ascending: 4, 16, 64 and the batch, none above what is there.

    Args:
      batch_size: rows per device at most.
      count: examples in all.
      devices: that share them.

    >>> ladder(256, 1000), ladder(256, 40), ladder(8, 1000, devices=4)
    ((4, 16, 64, 256), (4, 16, 40), (16, 32))
    """
    top = min(batch_size, -(-count // devices))
    return tuple(devices * s for s in (*(s for s in (4, 16, 64) if s < top), top))


def plan(count: int, shapes: Sequence[int]) -> list[int]:
    """The shapes that hold `count` rows with the least padding, largest first.

    >>> plan(178, (16, 64, 256)), plan(3, (16, 64)), plan(0, (16,))
    ([64, 64, 64], [16], [])
    """
    top = max(shapes)
    whole, rest = divmod(count, top)
    best: list[tuple[int, list[int]]] = [(0, [])]
    for rows in range(1, rest + 1):
        options = [
            (shape + OVERHEAD + best[max(rows - shape, 0)][0], shape)
            for shape in shapes
        ]
        cost, shape = min(options)
        best.append((cost, [shape, *best[max(rows - shape, 0)][1]]))
    return [top] * whole + sorted(best[rest][1], reverse=True)


def pad(rows: np.ndarray, count: int) -> np.ndarray:
    """Repeat the first row until there are `count`."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def judge(
    driver: Driver, x: np.ndarray, y: np.ndarray, epsilon: np.ndarray, x_adv: np.ndarray
) -> Verdict:
    """Look at points afresh, in a program of its own, at matmul precision `highest`."""
    parts, begin = [], 0
    for shape in plan(len(x), driver.shapes):
        count = min(shape, len(x) - begin)
        here = [pad(a[begin : begin + count], shape) for a in (x, y, epsilon, x_adv)]
        found = _judge(driver.model, driver.threat, *driver.put(here), driver.keys)
        prediction, _, inside = fetch(found)
        parts.append((prediction[:, :count], inside[:count]))
        begin += count
    if not parts:
        none, passes = np.zeros(0, bool), len(driver.keys)
        return Verdict(none, none, np.zeros(0, np.int32), np.zeros((passes, 0), bool))
    prediction = np.concatenate([p for p, _ in parts], 1)
    inside = np.concatenate([i for _, i in parts])
    correct = prediction == y
    wrong = inside & (correct.mean(0) < 0.5)
    return Verdict(wrong, inside, prediction[0], correct)


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
    on_chunk: Callable[[int, int], None] = lambda steps, alive: None,
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
      on_chunk: called with the steps done and the rows still running.
    """
    n = len(rows.y)
    loss = np.int32(list(LOSSES).index(stage.loss))
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
        on_chunk(done, len(alive))
    for part in parts:
        record(part, ~gone[part.places])
    return Outcome(broken, x_adv, margin, doubted, handed, refused, passes)


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
    carry = _start(stage.make, stage.samples, *shared, here, begin_at, key)
    return _Part(places, here, carry)


def _run_chunk(driver, stage, shared, key, part, done, steps):
    fixed = (stage.make, stage.samples, stage.raw, *shared, part.rows, key)
    if driver.looped:
        return _advance(*fixed, part.carry, np.int32(done), np.int32(done + steps))
    carry = part.carry
    for t in range(done, done + steps):
        carry = _advance_one(*fixed, np.int32(t), carry)
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
