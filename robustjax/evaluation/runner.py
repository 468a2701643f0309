"""The runner: from a logits function and N examples to adversarial ones, judged.

`attack` runs one attack, `evaluate` several and judges them. Both check their inputs,
compile once for each shape, and pad the last batch.
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import threats
from robustjax.attacks.base import AttackFn, Result
from robustjax.attacks.pgd import fgsm, pgd
from robustjax.evaluation import checks as inputs
from robustjax.evaluation import fast, strong, suites
from robustjax.evaluation.binarization import binarization_test
from robustjax.evaluation.binarization import flag as binarization_flag
from robustjax.evaluation.board import Board, Enough, clean_margin
from robustjax.evaluation.doctor import after, chosen, doctor, usual_scale
from robustjax.evaluation.driver import (
    Driver,
    Model,
    OneShot,
    Stage,
    judge,
    ladder,
    pad,
    plan,
)
from robustjax.evaluation.ledger import (
    Ledger,
    code_digest,
    digest,
    model_digest,
    tree_digest,
)
from robustjax.evaluation.report import Report, StageCost, ThreatReport
from robustjax.evaluation.suites import standard_passes
from robustjax.logging import LiveLine, duration
from robustjax.losses import cross_entropy
from robustjax.models.canonical import canonicalize
from robustjax.norms import L0
from robustjax.parallel import fetch
from robustjax.problems import takes_key, untargeted
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key, LossFn

# jit knows a function by its identity: made once, so that each is compiled once.
PGD = pgd(40)
FGSM = fgsm()


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
    x, y, index = inputs.check_inputs(x, y, threat, index, batch_size)
    key = inputs.check_key(key)
    inputs.check_attack_fn(attack_fn)
    f = _prepare(logits_fn, x, y, batch_size)
    results = []
    for rows, count, padded in _batches(len(x), batch_size):
        here = _of_rows(threat, rows)
        if np.ndim(here.epsilon):
            here = dataclasses.replace(here, epsilon=pad(here.epsilon, padded))
        arrays = [pad(array[rows], padded) for array in (x, y, index)]
        result = _attack_batch(attack_fn, loss, f, *arrays, here, key)
        results.append(jax.tree.map(lambda a, n=count: np.asarray(a)[:n], result))
    return jax.tree.map(lambda *parts: jnp.asarray(np.concatenate(parts)), *results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attack_batch(attack_fn, loss, f, x, y, index, threat, key):
    return attack_fn(key, untargeted(f, x, y, threat, loss, index=index))


def evaluate(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel | Mapping[str, ThreatModel],
    *,
    suite: str | Sequence[str] | None = "standard",
    attacks: Mapping[str, AttackFn] | Sequence[AttackFn] = (),
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
    resume: str | os.PathLike[str] | None = None,
    checks: str = "default",
    image_axes: str | None = "HWC",
    individual: bool = False,
    stop_below: float | None = None,
    features_fn: Callable[..., Array] | None = None,
    mesh: Any = None,
    progress: bool = True,
) -> Report:
    """Measure clean and robust accuracy, example by example.

    A suite attacks what is classified correctly, attack after attack; a point leaves
    when the judge confirms it: a fresh forward pass at matmul precision `highest` on a
    point inside the ball (`is_feasible`: 1e-6 and rounding) and the box (exactly). What
    it does not confirm is attacked on. What is misclassified without an attack is not
    robust. A last pass over all points must agree, or `flipped` lists which did not.

    Args:
      logits_fn: see `attack`.
      x, y, key, batch_size, index: see `attack`.
      threat: one threat model, or a name for each of several.
      suite: "standard" (AutoAttack: apgd-ce, apgd-t, fab-t, square), "fast" (its
        verdict for a fifteenth of the passes), "strong" (what standard misses, too),
        "plus", "rand" (random models), a list of names such as
        `("apgd-ce", "square")`, or None: only `attacks`.
      attacks: your own AttackFns, with or without names: judged and listed like ours,
        after the suite.
      resume: a folder that remembers what is finished: the same call goes on where it
        was killed, and other weights, data, threats, suites or keys are refused.
      checks: "default", "full" (with the binarization test) or "none": what makes a
        model's robustness doubtful. Findings are `ModelWarning`s and `report.flags`;
        the evaluation goes on.
      image_axes: "HWC", "CHW", or None for inputs that are no images: where Square
        finds rows and columns (on the wrong axes it is weaker, silently).
      individual: run each of `attacks` on every correctly classified example, so that
        the accuracy under each is its own.
      stop_below: end once robust accuracy has fallen below.
      features_fn: `f(x) -> [B, F]`, for the binarization test; None: the logits.
      mesh: `parallel.data_mesh(...)`: split the rows over devices, `batch_size` rows on
        each.
      progress: write a live line to stderr.

    Returns:
      The report: `print` it, or `report.save(folder)`.

    Raises:
      TypeError, ValueError: for bad inputs; see `robustjax.evaluation.checks`.

    >>> import jax.numpy as jnp, robustjax as rj
    >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> report = rj.evaluate(
    ...     logits_fn, x, y, rj.linf(0.1), suite=("apgd-ce",), progress=False
    ... )
    >>> report.clean_accuracy, report.robust_accuracy
    (1.0, 0.5)
    """
    named = dict(threat) if isinstance(threat, Mapping) else {"threat": threat}
    extra = _named_attacks(attacks)
    run_suite, suite_name = _chosen(suite)
    if not named:
        raise ValueError("threat is empty: pass at least one.")
    if run_suite is None and not extra:
        raise ValueError(
            "suite is None and attacks is empty: pass at least one attack."
        )
    if run_suite is not None:
        for name, t in named.items():
            if isinstance(getattr(t, "norm", None), L0):
                raise ValueError(
                    f"threat {name!r} is L0, for which suite={suite_name!r} has no "
                    "attacks: pass suite=None and attacks={'PGD': pgd()}."
                )
    if checks not in CHECKS:
        raise ValueError(f"checks={checks!r}: choose 'default', 'full' or 'none'.")
    for t in named.values():
        x, y, index = inputs.check_inputs(x, y, t, index, batch_size)
    x = x.astype(np.float32)
    if len(np.unique(index)) < len(index):
        raise ValueError(
            f"index names {len(index) - len(np.unique(index))} examples twice: give "
            "each example a number of its own."
        )
    axes = _axes(image_axes, x)
    key_judge, key_attacks, key_checks = jax.random.split(inputs.check_key(key), 3)
    f, looped = prepare_model(logits_fn, x, y, batch_size)
    shapes = ladder(batch_size, len(x), 1 if mesh is None else mesh.size)
    first = next(iter(named.values()))
    driver = Driver(
        Model(f, jnp.float32(1)), first, shapes, looped, mesh, key_judge[None]
    )
    order = np.argsort(index, kind="stable")
    logits = clean_logits(driver, x, order)
    prediction = predicted(logits)
    flags: list[inputs.Flag] = []
    measured: dict[str, Any] = {}
    check_passes = 0
    for name, t in named.items() if checks != "none" else ():
        diagnosis = doctor(
            f,
            *(x, y, t, index, key_checks),
            image_axes=axes or "HWC",
            passes=CHECKED_PART * standard_passes(logits, int((prediction == y).sum())),
            looped=looped,
        )
        check_passes += diagnosis.passes
        prefix = f"{name}: " if len(named) > 1 else ""
        measured |= {prefix + check: seen for check, seen in diagnosis.checks.items()}
        known = {flag.name for flag in flags}
        raised = list(diagnosis.flags)
        if checks == "full":
            tested = binarization(f, x, t, index, key_checks, features_fn)
            measured[f"{prefix}binarization test"], more = tested
            raised += more
        news = [flag for flag in raised if flag.name not in known]
        news = [flag._replace(message=prefix + flag.message) for flag in news]
        inputs.warn(news)
        flags += news
    random = suite_name == "rand" or any(flag.name == "random" for flag in flags)
    if random:
        driver = driver._replace(keys=jax.random.split(key_judge, NUM_PASSES))
    live = _Live(progress)
    reports: dict[str, ThreatReport] = {}
    randomized = []
    for name, t in named.items():
        scale = 1.0
        if suite_name in RESCALED:
            scale = usual_scale(clean_margin(logits, y)[prediction == y])
        epsilon = np.broadcast_to(np.asarray(t.epsilon, np.float32), y.shape)
        ledger = None
        if resume is not None:
            header = {
                "model": model_digest(f, x),
                "x": digest(x[order]),
                "y": digest(y[order]),
                "index": digest(index[order]),
                "threat": f"{t.norm} {digest(epsilon[order], t.lower, t.upper)}",
                "suite": f"{suite_name} {', '.join(extra)} {axes} scale {scale:g}",
                "key": tree_digest(key_attacks),
                "rows": f"{shapes}, {len(driver.keys)} judging",
                "machine": _machine(),
                "code": code_digest(),
            }
            ledger = Ledger(Path(resume) / _folder(name), header, logits[order])
        here = driver._replace(
            model=Model(f, jnp.float32(scale)),
            threat=dataclasses.replace(t, epsilon=0.0),
        )
        board = Board(
            here,
            x,
            y,
            index,
            epsilon,
            scale * logits,
            prediction,
            key_attacks,
            image_axes=axes,
            ledger=ledger,
            points=suite_name in RESCALED,
            stop_below=stop_below,
            on_stage=functools.partial(live.stage, name if len(named) > 1 else ""),
        )
        notes = ()
        try:
            if run_suite is not None:
                notes = run_suite(board) or ()
            # Beside a suite they are further attacks of the sequence.
            individual = individual and run_suite is None
            for attack_name, attack_fn in extra.items():
                if attack_name in board.costs:  # a stage of the suite is called so
                    attack_name = f"{attack_name} (own)"
                shot = Stage(
                    attack_name,
                    OneShot(attack_fn),
                    (),
                    1,
                    forward=0,
                    backward=0,
                    raw=True,
                )
                everyone = board.ordered(np.flatnonzero(board.correct))
                board.run(shot, everyone if individual else None)
        except Enough:
            notes = (f"Stopped: robust accuracy fell below {stop_below:g}.",)
        reports[name], correct = _report(board, t, tuple(notes), individual)
        news = [] if individual or checks == "none" else after(board.broken_by)
        news = [flag for flag in news if flag.name not in {f.name for f in flags}]
        inputs.warn(news)
        flags += news
        if random:
            randomized.append(correct)
        if board.refused.any():
            flag = inputs.Flag(
                "points outside the threat model",
                f"adversarial points of {board.refused.sum()} examples were refused: "
                "they lie outside ball or box. An attack that leaves them is weaker "
                "than it could be.",
            )
            inputs.warn([flag])
            flags.append(flag)
        live.note(f"{name}: {reports[name].robust_accuracy:.4f} robust")
    config = {
        "suite": suite_name,
        "attacks": list(extra),
        "batch_size": batch_size,
        "shapes": list(shapes),
        "image_axes": axes,
        "checks": checks,
        "judge_matmul_precision": "highest",
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "key": np.asarray(jax.random.key_data(key_attacks)).tolist(),
        "thresholds": {"ball": "1e-6 max(1, epsilon) and rounding", "box": "exact"},
    }
    return Report(
        y,
        index,
        prediction,
        reports,
        flags,
        config,
        x=x,
        suite=suite_name,
        checks=measured or None,
        check_passes=check_passes,
        randomized=_randomized(randomized) if random else None,
    )


SUITES: dict[str, Any] = {
    "standard": suites.standard,
    "fast": fast.fast,
    "strong": strong.strong,
    "plus": suites.plus,
    "rand": suites.rand,
}
RESCALED = ("fast", "strong")
CHECKS = ("default", "full", "none")
CHECKED_PART = 0.01
NUM_BINARIZED = 32


def binarization(
    f: Any,
    x: np.ndarray,
    threat: ThreatModel,
    index: np.ndarray,
    key: Key,
    features_fn: Callable[..., Array] | None = None,
) -> tuple[dict[str, Any], list[inputs.Flag]]:
    """The binarization test with PGD-40 on 32 examples: what was seen, and flags."""
    take = chosen(index)[:NUM_BINARIZED]
    features = f if features_fn is None else canonicalize(features_fn)
    few = _of_rows(threat, take)
    found = binarization_test(features, x[take], few, PGD, key, index=index[take])
    flag = binarization_flag(found)
    count = int(found.tested.sum())
    message = f"found {found.solved.sum()} of {count} planted adversarial points"
    seen = {
        "result": ("ok" if count else "not run") if flag is None else "flagged",
        "value": found.success_rate if count else None,
        "message": message if flag is None else flag.message,
    }
    return seen, [] if flag is None else [flag]


NUM_PASSES = 10


def _chosen(suite: Any) -> tuple[Any, str | None]:
    if suite is None:
        return None, None
    if isinstance(suite, str):
        if suite in SUITES:
            return SUITES[suite], suite
        if suite in suites.ATTACKS:
            return suites.custom((suite,)), suite
        raise ValueError(
            f"suite={suite!r} is unknown: choose {', '.join(map(repr, SUITES))}, or a "
            f"list of attacks among {', '.join(suites.ATTACKS)}."
        )
    return suites.custom(tuple(suite)), ", ".join(suite)


def _named_attacks(attacks: Any) -> dict[str, AttackFn]:
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif callable(attacks):
        raise TypeError("attacks is a function: pass a list, [attack], or a dict.")
    else:
        named = {}
        for number, attack_fn in enumerate(attacks, 1):
            name = getattr(attack_fn, "__name__", "attack")
            named[f"{name} {number}" if name in named else name] = attack_fn
    for attack_fn in named.values():
        inputs.check_attack_fn(attack_fn)
    return named


def _axes(image_axes: str | None, x: np.ndarray) -> str | None:
    if image_axes not in ("HWC", "CHW", None):
        raise ValueError(f"image_axes={image_axes!r}: choose 'HWC', 'CHW' or None.")
    return image_axes if x.ndim == 4 else None


def _machine() -> str:
    config = jax.config
    precision = f"{config.jax_default_matmul_precision} x64 {config.jax_enable_x64}"
    return f"{jax.__version__} {jax.default_backend()} {precision}"


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


@jax.jit
def _clean(model, x, key):
    with jax.default_matmul_precision("highest"):
        return model.logits_fn(x, key).astype(jnp.float32)


def clean_logits(driver: Driver, x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`[N, K]` logits of clean examples, at the judge's precision."""
    logits, begin = None, 0
    for shape in plan(len(x), driver.shapes):
        take = order[begin : begin + shape]
        here = driver.put(pad(x[take], shape))
        found = fetch(_clean(driver.model, here, driver.keys[0]))
        if logits is None:
            logits = np.zeros((len(x), found.shape[1]), np.float32)
        logits[take] = found[: len(take)]
        begin += shape
    assert logits is not None
    return logits


def predicted(logits: np.ndarray) -> np.ndarray:
    """`[N]` int32 predictions; -1 where a logit is NaN."""
    return np.where(np.isnan(logits).any(1), -1, logits.argmax(1)).astype(np.int32)


def _report(
    board: Board, threat: ThreatModel, notes: tuple[str, ...], individual: bool
) -> tuple[ThreatReport, np.ndarray]:
    """The last pass over all points, and the threat's report."""
    order = board.ordered(np.arange(len(board.y)))
    verdict = judge(
        board.driver,
        *(a[order] for a in (board.x, board.y, board.epsilon, board.x_adv)),
    )
    back = np.argsort(order, kind="stable")
    wrong, prediction = verdict.wrong[back], verdict.prediction[back]
    # What the last pass finds wrong is broken, whatever the stages said of it.
    late = board.alive & wrong
    if late.any():
        board.alive &= ~late
        board.broken_by["last pass"] = late
    flipped = board.correct & ~board.alive & ~wrong
    size = np.asarray(
        threats.size(threat, jnp.asarray(board.x_adv) - jnp.asarray(board.x))
    )
    costs = tuple(
        StageCost(name, cost.points, cost.broken, *cost.passes, cost.seconds)
        for name, cost in board.costs.items()
    )
    found = ThreatReport(
        float(np.mean(board.epsilon)),
        board.broken_by,
        board.alive.copy(),
        board.x_adv,
        size,
        norm=str(type(threat.norm).__name__),
        adv_prediction=prediction,
        margin=board.margin / np.float32(board.driver.model.scale),
        stages=costs,
        flipped=tuple(int(i) for i in board.index[flipped]),
        unconfirmed=tuple(int(i) for i in board.index[board.doubted & board.alive]),
        notes=notes,
        further=board.further,
        rank=board.rank,
        individual=individual,
        epsilons=board.epsilon if np.ndim(threat.epsilon) else None,
    )
    return found, verdict.correct[:, back] & board.correct


def _randomized(correct: list[np.ndarray]) -> dict[str, Any]:
    """Accuracy of a random model under all threats, over passes, with an interval."""
    passes = np.logical_and.reduce(correct).mean(1)
    mean = float(passes.mean())
    half = 1.96 * float(passes.std(ddof=1)) / np.sqrt(len(passes))
    return {
        "passes": len(passes),
        "robust_accuracy_mean": mean,
        "low": max(0.0, mean - half),
        "high": min(1.0, mean + half),
    }


class _Live:
    """The evaluation's live line: which stage, how far, how many are left, how long."""

    def __init__(self, progress: bool):
        self.line = LiveLine(sys.stderr if progress else None)
        self.began, self.last = time.monotonic(), ("", 0.0, 0)

    def stage(self, threat: str, name: str, done: int, steps: int, alive: int) -> None:
        now = time.monotonic()
        if self.last[0] != name or done < self.last[2]:
            self.last = (name, now, 0)
        began = self.last[1]
        self.last = (name, began, done)
        left = (now - began) / max(done, 1) * max(steps - done, 0)
        text = f"{threat} {name}: step {done} of {steps}, {alive} left".strip()
        spent = duration(now - self.began)
        self.line.update(
            f"{text}, about {duration(left)} for this run ({spent} so far)"
        )

    def note(self, text: str) -> None:
        self.line.note(f"{text}, took {duration(time.monotonic() - self.began)}")


def _prepare(
    logits_fn: Callable[..., Array], x: np.ndarray, y: np.ndarray, batch_size: int
) -> Any:
    return prepare_model(logits_fn, x, y, batch_size)[0]


def prepare_model(
    logits_fn: Callable[..., Array], x: np.ndarray, y: np.ndarray, batch_size: int
) -> tuple[Any, bool]:
    """The model as a pytree called `f(x, key)`, its answer's shape checked; and whether
    steps may run in a loop of the compiled program."""
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
    inputs.check_logits(jax.eval_shape(f, shape, jax.random.key(0)), y, rows)
    looped = inputs.note_costs(f, shape)
    # On CPU an ordinary convolution inside an attack's loop is 10 times slower.
    return canonicalize(f), looped


def _without_key(f: Callable[..., Array], x: Array, key: Key | None = None) -> Array:
    return f(x)


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
