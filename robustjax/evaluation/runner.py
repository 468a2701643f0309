"""The runner: from a logits function and N examples to adversarial ones, judged.

`attack` runs one attack, `evaluate` several and judges them. Both check their inputs,
compile once for each shape, and pad the last batch.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import threats
from robustjax.attacks.base import AttackFn, Result
from robustjax.attacks.pgd import fgsm, pgd
from robustjax.evaluation import checks
from robustjax.evaluation.report import Report, ThreatReport
from robustjax.logging import LiveLine, duration
from robustjax.losses import cross_entropy
from robustjax.models.canonical import canonicalize
from robustjax.problems import predictions, takes_key, untargeted
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, LossFn

# jit knows a function by its identity: made once, so that each is compiled once.
PGD = pgd(40)
FGSM = fgsm()
NUM_CHECKED = 64


def attack(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel,
    attack_fn: AttackFn = PGD,
    *,
    loss: LossFn = cross_entropy,
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
) -> Result:
    """Attack N examples: the shortest way from a model to adversarial examples.

    Args:
      logits_fn: `f(x)` or `f(x, key)`, inputs `[B, ...]` to logits `[B, K]`. Best a
        `jax.tree_util.Partial` over its weights, as `robustjax.models.logits_fn`
        returns: then another checkpoint does not compile again.
      x: `[N, ...]` inputs in the box of `threat`, for images [0, 1].
      y: `[N]` integer labels.
      threat: `linf(8 / 255)`, `l2(0.5)`, `l1(12.0)`, `l0(20)`, ...; its epsilon may be
        an array `[N]`.
      attack_fn: the attack, PGD-40 by default. Make it once: a new `pgd()` compiles
        anew.
      loss: `(logits, y) -> [B]`, what the attack raises.
      key: `jax.random.key(0)` by default.
      batch_size: examples at once; changes speed and memory, not the result (but for
        the rounding of sums, and for random models: they draw by position).
      index: `[N]` integers, which example of its data set each row is. Give it when you
        attack a subset or another order: the same example then draws the same noise.

    Returns:
      `Result` for all N rows: `x_adv`, `success` (the prediction differs from `y`),
      `size`, `score`.

    Raises:
      TypeError, ValueError: for bad inputs; see `robustjax.evaluation.checks`.

    >>> import jax.numpy as jnp, robustjax as rj
    >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> rj.attack(logits_fn, x, y, rj.linf(0.1)).success.tolist()
    [True, False]
    """
    x, y, index = checks.check_inputs(x, y, threat, index, batch_size)
    key = checks.check_key(key)
    checks.check_attack_fn(attack_fn)
    f = _prepare(logits_fn, x, y, batch_size)
    results = []
    for rows, count, padded in _batches(len(x), batch_size):
        here = _of_rows(threat, rows)
        if np.ndim(here.epsilon):
            here = dataclasses.replace(here, epsilon=_pad(here.epsilon, padded))
        arrays = [_pad(array[rows], padded) for array in (x, y, index)]
        result = _attack_batch(attack_fn, loss, f, *arrays, here, key)
        results.append(jax.tree.map(lambda a, n=count: np.asarray(a)[:n], result))
    return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), *results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attack_batch(attack_fn, loss, f, x, y, index, threat, key):
    return attack_fn(key, untargeted(f, x, y, threat, loss, index=index))


@jax.jit
def _predict(f, x, key):
    # Judging is float32 where the default is less (TPU, recent GPUs).
    with jax.default_matmul_precision("highest"):
        return predictions(f(x, key).astype(jnp.float32))


def evaluate(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel | Mapping[str, ThreatModel],
    *,
    attacks: Mapping[str, AttackFn] | None = None,
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
    run_checks: bool = True,
    progress: bool = True,
) -> Report:
    """Measure clean and robust accuracy, example by example.

    Each attack runs on every correctly classified example. An attack's success counts
    only when the judge confirms it: a fresh forward pass at matmul precision
    `highest` on a point inside the ball (`is_feasible`: 1e-6 and rounding) and the box
    (exactly). Refused points are flagged. What is misclassified without an attack is
    not robust.

    Args:
      logits_fn: see `attack`.
      x, y, key, batch_size, index: see `attack`.
      threat: one threat model, or a name for each of several.
      attacks: a name for each attack; FGSM and PGD-40 by default. Your own AttackFn
        is judged like ours.
      run_checks: look for what makes a model's robustness doubtful (softmax outputs,
        BatchNorm in train mode, saturation, ...) on 64 examples. Findings are
        `ModelWarning`s and `report.flags`; the evaluation goes on.
      progress: write a live line to stderr.

    Returns:
      The report: `print` it, or `report.save(folder)`.

    Raises:
      TypeError, ValueError: for bad inputs; see `robustjax.evaluation.checks`.

    >>> import jax.numpy as jnp, robustjax as rj
    >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> report = rj.evaluate(logits_fn, x, y, rj.linf(0.1), progress=False)
    >>> report.clean_accuracy, report.robust_accuracy
    (1.0, 0.5)
    """
    named = dict(threat) if isinstance(threat, Mapping) else {"threat": threat}
    if attacks is not None and not isinstance(attacks, Mapping):
        raise TypeError("attacks is no dict: pass names and attacks, {'PGD': pgd(50)}.")
    attacks = {"FGSM": FGSM, "PGD-40": PGD} if attacks is None else dict(attacks)
    for attack_fn in attacks.values():
        checks.check_attack_fn(attack_fn)
    if not named or not attacks:
        empty = "attacks" if named else "threat"
        raise ValueError(f"{empty} is empty: pass at least one.")
    for t in named.values():
        x, y, index = checks.check_inputs(x, y, t, index, batch_size)
    key_judge, key_attacks, key_checks = jax.random.split(checks.check_key(key), 3)
    f = _prepare(logits_fn, x, y, batch_size)
    prediction = _predictions(f, x, batch_size, key_judge)
    flags = []
    if run_checks:
        few = min(NUM_CHECKED, len(x))
        flags = checks.check_model(f, jnp.asarray(x[:few]), y[:few], key_checks)
        checks.warn(flags)

    live = _Live(len(named) * len(attacks), progress)
    correct = np.flatnonzero(prediction == y)
    found: dict[str, ThreatReport] = {}
    refused = 0
    for name, t in named.items():
        broken_by = {}
        worst, size = x.copy(), np.zeros(len(x), np.float32)
        for number, (attack_name, attack_fn) in enumerate(attacks.items()):
            broken = np.zeros(len(x), bool)
            if len(correct):
                here = _of_rows(t, correct)
                result = attack(
                    f,
                    x[correct],
                    y[correct],
                    here,
                    attack_fn,
                    key=jax.random.fold_in(key_attacks, number),
                    batch_size=batch_size,
                    index=index[correct],
                )
                x_adv = np.asarray(result.x_adv)
                answers = _predictions(f, x_adv, batch_size, key_judge)
                inside = np.asarray(
                    threats.is_feasible(here, jnp.asarray(x[correct]), result.x_adv)
                )
                wins = answers != y[correct]
                refused += int((wins & ~inside).sum())
                broken[correct] = inside & wins
                # The first success stays; before it, the newest attempt.
                earlier = np.any([np.zeros_like(broken), *broken_by.values()], axis=0)
                take = inside & ~earlier[correct]
                worst[correct[take]] = x_adv[take]
                size[correct[take]] = np.asarray(result.size)[take]
            broken_by[attack_name] = broken
            live.update(f"{name}, {attack_name}: {broken.sum()} of {len(x)} broken")
        robust = (prediction == y) & ~np.any(list(broken_by.values()), axis=0)
        epsilon = float(np.mean(np.asarray(t.epsilon)))
        found[name] = ThreatReport(epsilon, broken_by, robust, worst, size)
    if refused:
        flag = checks.Flag(
            "points outside the threat model",
            f"{refused} adversarial points were refused: they lie outside ball or box. "
            "An attack that leaves them is weaker than it could be.",
        )
        checks.warn([flag])
        flags.append(flag)
    config = {"attacks": list(attacks), "batch_size": batch_size}
    return Report(y, index, prediction, found, flags, config)


class _Live:
    """The evaluation's live line: what was found, how long it still takes."""

    def __init__(self, total: int, progress: bool):
        self.line = LiveLine(sys.stderr if progress else None)
        self.total, self.done, self.began = total, 0, time.monotonic()

    def update(self, text: str) -> None:
        self.done += 1
        seconds = time.monotonic() - self.began
        left = duration(seconds / self.done * (self.total - self.done))
        text = f"{text} ({self.done}/{self.total}, about {left} left)"
        if self.done < self.total:
            self.line.update(text)
        else:
            self.line.note(f"{text}, took {duration(seconds)}")


def _prepare(
    logits_fn: Callable[..., Array], x: np.ndarray, y: np.ndarray, batch_size: int
) -> Any:
    """The model as a pytree called `f(x, key)`, its answer's shape checked."""
    if not callable(logits_fn):
        raise TypeError(
            f"logits_fn is a {type(logits_fn).__name__}: pass a function f(x) that "
            "returns logits, such as robustjax.models.logits_fn(model, params, extra)."
        )
    f = logits_fn
    if not isinstance(f, jax.tree_util.Partial):
        f = jax.tree_util.Partial(f)
    if not takes_key(f):
        f = jax.tree_util.Partial(_without_key, f)
    rows = min(batch_size, len(x))
    shape = jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    checks.check_logits(jax.eval_shape(f, shape, jax.random.key(0)), y, rows)
    checks.note_costs(f, shape)
    # On CPU an ordinary convolution inside an attack's loop is 10 times slower.
    return canonicalize(f)


def _without_key(f: Callable[..., Array], x: Array, key: Key | None = None) -> Array:
    return f(x)


def _pad(rows: np.ndarray, count: int) -> np.ndarray:
    """Repeat the first row until there are `count`."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def _batches(size: int, batch_size: int) -> Iterator[tuple[slice, int, int]]:
    """Slices of equal shape over `size` rows: `(rows, how many count, padded to)`."""
    padded = min(batch_size, size)
    for begin in range(0, size, padded):
        yield slice(begin, begin + padded), min(padded, size - begin), padded


def _of_rows(threat: ThreatModel, rows: Any) -> ThreatModel:
    """The threat of some rows, where each row has an epsilon of its own."""
    if np.ndim(threat.epsilon) == 0:
        return threat
    return dataclasses.replace(threat, epsilon=np.asarray(threat.epsilon)[rows])


def _predictions(f: Any, x: np.ndarray, batch_size: int, key: Key) -> np.ndarray:
    return np.concatenate(
        [
            np.asarray(_predict(f, _pad(x[rows], padded), key))[:count]
            for rows, count, padded in _batches(len(x), batch_size)
        ]
    )
