"""The judge: a fresh look at points, in a few shapes, on one device or several."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import losses, threats
from robustjax.models.compiling import convolution_options, quick_options
from robustjax.parallel import fetch, put_shared, put_split
from robustjax.problems import predictions
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, LogitsFn, PyTree

# What a batch costs beside its rows, in rows: keeps the plan from splitting too finely.
OVERHEAD = 2


class Model(NamedTuple):
    """The model under attack: a pytree, so that its weights are data.

    logits_fn: called `(x, key)`.
    scale:     scalar; attacks see `scale * logits`. A power of two changes no verdict.
    """

    logits_fn: LogitsFn
    scale: Array


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


def compiler_options() -> tuple[tuple[str, bool | str], ...]:
    """Compiler options for convolutions in evaluations, as items.

    oneDNN's, but none where a compilation cache is set: programs that call oneDNN
    cannot be kept there, and who sets one does not want to wait for compiling again.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return ()
    return tuple(convolution_options().items())


@functools.cache
def judging(options: tuple[tuple[str, bool | str], ...]) -> Callable[..., Any]:
    """The judge's program; made at the first use, as `driver.programs`."""
    return jax.jit(_judge, compiler_options=dict(options) | quick_options(1))


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
        return put_split(tree, self.mesh)

    def share(self, tree: PyTree) -> PyTree:
        """What every row reads: on the device, or on all of them."""
        return put_shared(tree, self.mesh)


def ladder(batch_size: int, count: int, devices: int = 1) -> tuple[int, ...]:
    """Rows per program, ascending: 8, 64 and the batch, none above what is there.

    A smaller shape would save rows of few survivors, and cost a compilation each.

    Args:
      batch_size: rows per device at most.
      count: examples in all.
      devices: that share them.

    >>> ladder(256, 1000), ladder(256, 40), ladder(8, 1000, devices=4)
    ((8, 64, 256), (8, 40), (32,))
    """
    top = min(batch_size, -(-count // devices))
    return tuple(devices * s for s in (*(s for s in (8, 64) if s < top), top))


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
        found = judging(compiler_options())(
            driver.model, driver.threat, *driver.put(here), driver.keys
        )
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
