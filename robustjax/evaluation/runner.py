"""The runner: from a logits function and N examples to judged adversarial ones."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.attacks.base import AttackFn
from robustjax.digests import digest, program_digest, tree_digest
from robustjax.evaluation import checks as inputs
from robustjax.evaluation import fast, strong, suites
from robustjax.evaluation.attack import PGD
from robustjax.evaluation.binarization import binarization_test
from robustjax.evaluation.binarization import flag as binarization_flag
from robustjax.evaluation.board import Board, Enough, clean_margin
from robustjax.evaluation.doctor import (
    Diagnosis,
    after,
    chosen,
    doctor,
    usual_scale,
)
from robustjax.evaluation.judge import Driver, Model, ladder
from robustjax.evaluation.last_pass import last_pass, randomized
from robustjax.evaluation.ledger import Ledger, code_digest, model_digest
from robustjax.evaluation.live import Live
from robustjax.evaluation.prepare import (
    clean_logits,
    no_gradient,
    of_rows,
    predicted,
    prepare_model,
    traced_attacks,
)
from robustjax.evaluation.report import Report, ThreatReport
from robustjax.evaluation.stage import OneShot, Stage
from robustjax.models.canonical import canonicalize
from robustjax.norms import L0
from robustjax.parallel import num_devices, put_shared
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key


class _Findings(NamedTuple):
    """What the checks said: flags, what each measured, passes.

    said: threats (their prefixes) and messages by the names of flags.
    """

    flags: list[inputs.Flag]
    measured: dict[str, Any]
    passes: int
    said: set[tuple[str, str]]

    def keep(self, news: Sequence[inputs.Flag], prefix: str) -> list[inputs.Flag]:
        """Keep the first of each name under a threat, but what is word for word that
        of another threat; return it, to be warned of."""
        kept = []
        for flag in news:
            says = {(flag.name, prefix), (flag.name, flag.message)}
            if not says & self.said:
                kept.append(flag._replace(message=prefix + flag.message))
            self.said.update(says)
        self.flags.extend(kept)
        return kept


class _Task(NamedTuple):
    """What is the same under every threat model.

    driver:    its threat and scale are set by `_under`.
    x, y, index, logits, prediction: `[N, ...]`; logits as the model gives them.
    suite, suite_name: how survivors are attacked.
    extra:     name -> the user's own attack.
    programs:  threat -> a hash of what these compute; no attacks, no hash.
    """

    driver: Driver
    x: np.ndarray
    y: np.ndarray
    index: np.ndarray
    logits: np.ndarray
    prediction: np.ndarray
    suite: Any
    suite_name: str | None
    extra: dict[str, AttackFn]
    programs: dict[str, str]
    key: Key
    axes: str | None
    individual: bool
    stop_below: float | None
    resume: Path | None
    live: Live


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
        verdict for about a twentieth of the passes), "strong" (its misses, too),
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
      individual: with `suite=None`, run each of `attacks` on every correctly classified
        example, so that the accuracy under each is its own. Beside a suite they attack
        what is left.
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
    _check_request(named, run_suite, suite_name, extra, checks)
    _check_limits(stop_below, resume, named)
    for t in named.values():
        x, y, index = inputs.check_inputs(x, y, t, index, batch_size)
    x = x.astype(np.float32)
    inputs.check_unique(index)
    axes = image_axes_of(image_axes, x)
    key_judge, key_attacks, key_checks = jax.random.split(inputs.check_key(key), 3)
    f, looped = prepare_model(logits_fn, x, y, batch_size)
    f = put_shared(f, mesh)
    first = next(iter(named.values()))
    programs = {}
    for name, t in named.items():
        traced = traced_attacks(extra, f, x, y, t).items()
        programs[name] = digest(*(f"{n} {program_digest(p)}" for n, p in traced))
    shapes = ladder(batch_size, len(x), num_devices(mesh))
    model = Model(f, jnp.float32(1))
    driver = Driver(model, first, shapes, looped, mesh, key_judge[None])
    logits = clean_logits(driver, x, np.argsort(index, kind="stable"))
    task = _Task(
        driver,
        *(x, y, index, logits, predicted(logits)),
        *(run_suite, suite_name, extra, programs, key_attacks, axes),
        # Beside a suite they are further attacks of the sequence.
        individual and run_suite is None,
        stop_below,
        None if resume is None else Path(resume),
        Live(progress),
    )
    found = _Findings([], {}, 0, set())
    if checks != "none":
        found = _examine(task, named, checks == "full", key_checks, features_fn)
        inputs.warn(found.flags)
    fresh_keys = None
    random = suite_name == "rand" or any(flag.name == "random" for flag in found.flags)
    if random:
        keys = jax.random.split(key_judge, NUM_PASSES)
        task = task._replace(driver=driver._replace(keys=keys))
        # Draws of their own: the stages' points were chosen by fooling the others.
        key_judge = jax.random.fold_in(key_judge, NUM_PASSES)
        fresh_keys = jax.random.split(key_judge, NUM_PASSES)
    reports: dict[str, ThreatReport] = {}
    passes = []
    for name, t in named.items():
        prefix = name if len(named) > 1 else ""
        reports[name], correct, news = _under(task, name, t, prefix, fresh_keys)
        passes.append(correct)
        skipped = task.individual or checks == "none"
        wanted = [n for n in news if not skipped or n.name == OUTSIDE]
        inputs.warn(found.keep(wanted, f"{name}: " if prefix else ""))
        task.live.note(f"{name}: {reports[name].robust_accuracy:.4f} robust")
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
        task.prediction,
        reports,
        found.flags,
        config,
        x=x,
        suite=suite_name,
        checks=found.measured or None,
        check_passes=found.passes,
        randomized=randomized(passes) if random else None,
    )


def _check_request(
    named: Mapping[str, ThreatModel],
    run_suite: Any,
    suite_name: str | None,
    extra: Mapping[str, AttackFn],
    checks: str,
) -> None:
    if not named:
        raise ValueError("threat is empty: pass at least one.")
    if run_suite is None and not extra:
        raise ValueError(
            "suite is None and attacks is empty: pass at least one attack."
        )
    for name, t in named.items() if run_suite is not None else ():
        if isinstance(getattr(t, "norm", None), L0):
            raise ValueError(
                f"threat {name!r} is L0, for which suite={suite_name!r} has no "
                "attacks: pass suite=None and attacks={'PGD': pgd()}."
            )
    if checks not in CHECKS:
        raise ValueError(f"checks={checks!r}: choose 'default', 'full' or 'none'.")


def _check_limits(
    stop_below: float | None, resume: Any, named: Mapping[str, ThreatModel]
) -> None:
    if stop_below is not None and not 0 <= stop_below <= 1:
        raise ValueError(f"stop_below={stop_below}: give an accuracy from 0 to 1.")
    folders: dict[str, str] = {}
    for name in named if resume is not None else ():
        other = folders.setdefault(_folder(name), name)
        if other != name:
            raise ValueError(
                f"threats {other!r} and {name!r} would share the folder "
                f"{_folder(name)!r} of resume={resume}: rename one."
            )


def _examine(
    task: _Task,
    named: Mapping[str, ThreatModel],
    full: bool,
    key: Key,
    features_fn: Callable[..., Array] | None,
) -> _Findings:
    """The checks of the model, under each threat."""
    f = task.driver.model.logits_fn
    found = _Findings([], {}, 0, set())
    for name, t in named.items():
        diagnosis = examine(
            *(task.driver, task.logits, task.x, task.y, t, task.index, key, task.axes)
        )
        found = found._replace(passes=found.passes + diagnosis.passes)
        prefix = f"{name}: " if len(named) > 1 else ""
        seen, raised = dict(diagnosis.checks), list(diagnosis.flags)
        if full and features_fn is None and no_gradient(f, task.x[:1]) is not None:
            reason = "the model cannot be differentiated"
            skipped = {"result": "not run", "value": None, "message": reason}
            seen["binarization test"] = skipped
        elif full:
            seen["binarization test"], more = binarization(
                f, task.x, t, task.index, key, features_fn
            )
            raised += more
        if task.suite_name == "rand":  # what the others are warned of is wanted here
            raised = [r for r in raised if r.name != "random"]
        found.measured.update({prefix + check: s for check, s in seen.items()})
        found.keep(raised, prefix)
    return found


def examine(
    driver: Driver,
    logits: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    threat: ThreatModel,
    index: np.ndarray,
    key: Key,
    axes: str | None,
) -> Diagnosis:
    """The doctor, for a hundredth of the passes that AutoAttack takes at most."""
    survivors = int((predicted(logits) == y).sum())
    return doctor(
        driver.model.logits_fn,
        *(x, y, threat, index, key),
        image_axes=axes or "HWC",
        passes=CHECKED_PART * suites.standard_passes(logits, survivors),
        looped=driver.looped,
    )


def _under(
    task: _Task, name: str, t: ThreatModel, prefix: str, fresh_keys: Key | None
) -> tuple[ThreatReport, np.ndarray, list[inputs.Flag]]:
    """Suite and own attacks under one threat: the report, the judge's verdicts
    `[P, N]` on the last points, and what is doubtful."""
    scale = 1.0
    if task.suite_name in RESCALED:
        right = task.prediction == task.y
        scale = usual_scale(clean_margin(task.logits, task.y)[right])
    epsilon = np.broadcast_to(np.asarray(t.epsilon, np.float32), task.y.shape)
    model = task.driver.model._replace(scale=jnp.float32(scale))
    board = Board(
        task.driver._replace(model=model, threat=dataclasses.replace(t, epsilon=0.0)),
        *(task.x, task.y, task.index),
        epsilon,
        scale * task.logits,
        task.prediction,
        task.key,
        image_axes=task.axes,
        ledger=_ledger(task, name, t, epsilon, scale),
        points=task.suite_name in RESCALED,
        stop_below=task.stop_below,
        on_stage=functools.partial(task.live.stage, prefix, time.monotonic()),
        expected=suites.about(task.suite_name, task.logits.shape[1], t.norm),
    )
    notes: Sequence[str] = ()
    try:
        if task.suite is not None:
            notes = task.suite(board) or ()
        for attack_name, attack_fn in task.extra.items():
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
            board.run(shot, everyone if task.individual else None)
    except Enough:
        notes = (f"Stopped: robust accuracy fell below {task.stop_below:g}.",)
    report, correct = last_pass(board, t, tuple(notes), task.individual, fresh_keys)
    news = list(after(board.broken_by))
    if board.refused.any():
        message = (
            f"adversarial points of {board.refused.sum()} examples were refused: they "
            "lie outside ball or box. An attack that leaves them is weaker than it "
            "could be."
        )
        news.append(inputs.Flag(OUTSIDE, message))
    return report, correct, news


def _ledger(
    task: _Task, name: str, t: ThreatModel, epsilon: np.ndarray, scale: float
) -> Ledger | None:
    if task.resume is None:
        return None
    order = np.argsort(task.index, kind="stable")
    driver, extra = task.driver, ", ".join(task.extra)
    header = {
        "model": model_digest(driver.model.logits_fn, task.x),
        "x": digest(task.x[order]),
        "y": digest(task.y[order]),
        "index": digest(task.index[order]),
        "threat": f"{t.norm} {digest(epsilon[order], t.lower, t.upper)}",
        "suite": f"{task.suite_name} {extra} {task.axes} scale {scale:g}"
        + (" individual" if task.individual else ""),
        "attacks": task.programs[name],
        "key": tree_digest(task.key),
        "rows": f"{driver.shapes}, {len(driver.keys)} judging",
        "machine": _machine(),
        "code": code_digest(),
    }
    return Ledger(task.resume / _folder(name), header, task.logits[order])


SUITES: dict[str, Any] = {
    "standard": suites.standard,
    "fast": fast.fast,
    "strong": strong.strong,
    "plus": suites.plus,
    "rand": suites.rand,
}
RESCALED = ("fast", "strong")
OUTSIDE = "points outside the threat model"
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
    few = of_rows(threat, take)
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
    if not len(suite):
        raise ValueError(
            "suite is empty, so nothing would be attacked: name attacks, or pass "
            "suite=None with attacks of your own."
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
    for name, attack_fn in named.items():
        if not isinstance(name, str) or name in ("", "last pass"):
            raise ValueError(
                f"attacks has the name {name!r}: give a text of your own, such as "
                "{'mine': attack}."
            )
        inputs.check_attack_fn(attack_fn)
    return named


def image_axes_of(image_axes: str | None, x: np.ndarray) -> str | None:
    """Where Square finds rows and columns; None: these inputs are no images."""
    if image_axes not in ("HWC", "CHW", None):
        raise ValueError(f"image_axes={image_axes!r}: choose 'HWC', 'CHW' or None.")
    return image_axes if x.ndim in (3, 4) else None  # `[N, H, W]`: one channel


def _machine() -> str:
    config = jax.config
    precision = f"{config.jax_default_matmul_precision} x64 {config.jax_enable_x64}"
    return f"{jax.__version__} {jax.default_backend()} {precision}"


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
