"""Accuracy against epsilon: from one minimal-norm run, or by a sweep over budgets."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import threats
from robustjax.attacks import fab
from robustjax.evaluation import checks as inputs
from robustjax.evaluation import runner
from robustjax.evaluation.board import Board
from robustjax.evaluation.doctor import after
from robustjax.evaluation.judge import Driver, Model, judge, ladder
from robustjax.evaluation.prepare import clean_logits, predicted, prepare_model
from robustjax.evaluation.stage import Stage
from robustjax.parallel import num_devices, put_shared
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key


class Curve(NamedTuple):
    """Robust accuracy as a function of the budget; an upper bound, as every attack is.

    epsilon:  `[M]` budgets, ascending.
    accuracy: `[M]` the fraction correct and not broken within each.
    distance: `[N]` the smallest adversarial perturbation found (0: wrong without one,
              `inf`: none found).
    flags:    what makes these numbers doubtful, as in an evaluation's report.
    """

    epsilon: np.ndarray
    accuracy: np.ndarray
    distance: np.ndarray
    flags: tuple[inputs.Flag, ...] = ()


def minimal_norm_curve(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel,
    *,
    num_steps: int = 150,
    num_targets: int = 9,
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
    checks: str = "default",
    image_axes: str | None = "HWC",
    mesh: Any = None,
) -> Curve:
    """One run of targeted FAB without a budget gives the whole curve.

    Every point that counts is judged again at matmul precision `highest`.
    Reference: Croce and Hein, arXiv 1907.02044.

    Args:
      logits_fn, x, y, key, batch_size, index, image_axes, mesh: see `evaluate`.
      checks: "default": examine the model first, at a quarter of the threat's epsilon
        (of `inf` at a 32nd of the data's range), where points are left to look at;
        findings are `ModelWarning`s and `flags`, and a random model is judged by ten
        draws. "none": trust it.
      threat: norm and box; its epsilon is where the returned budgets end (64 of them,
        evenly spaced); of `inf` they end at the largest distance found.
      num_steps: of each run.
      num_targets: runs, one for each of the best other classes.

    >>> import robustjax as rj
    >>> w = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> curve = minimal_norm_curve(lambda x: x @ w, x, y, rj.linf(0.5), num_steps=5)
    >>> curve.distance.round(2).tolist()
    [0.05, 0.4]
    """
    asked = (key, batch_size, index, checks, image_axes, mesh)
    board, flags = examined(logits_fn, x, y, threat, middle(threat, x), *asked)
    inputs.warn(flags)
    distance = np.where(board.correct, np.inf, 0.0)
    settings = fab.fab_settings(targeted=True)
    stage = Stage(
        "fab-t", fab.kernel, settings, num_steps, "difference", hand_over="best"
    )
    places = board.survivors()
    for rank in range(1, min(num_targets, board.logits.shape[1] - 1) + 1):
        found = board.run(
            stage,
            places,
            label=f"minimal {rank}",
            target=board.ranked(rank),
            radius=np.inf,
            counts=False,
        )
        size = np.asarray(
            threats.size(threat, jnp.asarray(found.handed - board.x[places]))
        )
        # FAB's points lie on the far side of a boundary; at distance 0 it found none.
        verdict = judge(
            board.driver,
            *(board.x[places], board.y[places], size.astype(np.float32), found.handed),
        )
        wins = verdict.wrong & (size < distance[places])
        distance[places[wins]] = size[wins]
    limit = float(np.max(np.asarray(threat.epsilon)))
    if not np.isfinite(limit):
        limit = float(np.max(distance, where=np.isfinite(distance), initial=0.0))
    epsilon = np.linspace(0, limit, 64)
    return _curve(epsilon, distance, flags)


def sweep_curve(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel,
    epsilons: Sequence[float],
    *,
    suite: Any = "fast",
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
    checks: str = "default",
    image_axes: str | None = "HWC",
    mesh: Any = None,
) -> Curve:
    """A suite at each budget, from the smallest; who has fallen stays fallen.

    Args:
      logits_fn, x, y, suite, key, batch_size, index, image_axes, mesh: see
        `evaluate`.
      threat: norm and box.
      epsilons: budgets.
      checks: as of `minimal_norm_curve`, at the budget in the middle.

    >>> import robustjax as rj
    >>> w = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> curve = sweep_curve(
    ...     lambda x: x @ w, x, y, rj.linf(1.0), [0.1, 0.3], suite=("apgd-ce",)
    ... )
    >>> curve.accuracy.tolist()
    [0.5, 0.5]
    """
    epsilons = sorted(float(e) for e in epsilons)
    if not epsilons:
        raise ValueError("epsilons is empty; give at least one budget.")
    x, y, index = inputs.check_inputs(x, y, threat, index, batch_size)
    flags: list[inputs.Flag] = []
    if checks != "none":
        at = jnp.float32(epsilons[(len(epsilons) - 1) // 2])
        asked = (key, batch_size, index, checks, image_axes, mesh)
        _, flags = examined(logits_fn, x, y, threat, at, *asked)
        if suite == "rand":  # what the others are warned of is wanted here
            flags = [flag for flag in flags if flag.name != "random"]
    inputs.warn(flags)
    # A random model is judged by several draws, for which `evaluate` must know it.
    level = "default" if any(flag.name == "random" for flag in flags) else "none"
    distance = np.full(len(y), np.inf)
    left, misled = np.arange(len(y)), []
    for epsilon in epsilons:
        if not len(left):
            break
        with warnings.catch_warnings():
            if level != "none":
                warnings.simplefilter("ignore", inputs.ModelWarning)  # said above
            report = runner.evaluate(
                logits_fn,
                *(x[left], y[left]),
                dataclasses.replace(threat, epsilon=jnp.float32(epsilon)),
                suite=suite,
                key=key,
                batch_size=batch_size,
                index=index[left],
                checks=level,
                image_axes=image_axes,
                mesh=mesh,
                progress=False,
            )
        found = next(iter(report.threats.values()))
        broken = report.correct & ~report.robust
        distance[left[broken]] = np.minimum(found.size[broken], epsilon)
        distance[left[~report.correct]] = 0.0
        left = left[report.robust]
        if checks != "none" and not misled:
            misled = [
                flag._replace(message=f"at epsilon {epsilon:g} {flag.message}")
                for flag in after(found.broken_by)
            ]
    inputs.warn(misled)
    return _curve(np.array(epsilons), distance, [*flags, *misled])


def _curve(
    epsilon: np.ndarray, distance: np.ndarray, flags: Sequence[inputs.Flag]
) -> Curve:
    slack = 1e-6 * np.maximum(1, epsilon)
    beyond = distance[None, :] > (epsilon + slack)[:, None]
    wrong = distance == 0
    accuracy = (beyond & ~wrong[None]).mean(1)
    return Curve(epsilon, accuracy, distance, tuple(flags))


def examined(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel,
    epsilon: Any,
    key: Key | None,
    batch_size: int,
    index: Any,
    checks: str,
    image_axes: str | None,
    mesh: Any,
) -> tuple[Board, list[inputs.Flag]]:
    """The model on its board, and what the doctor says of it at `epsilon`."""
    if checks not in ("default", "none"):
        raise ValueError(f"checks={checks!r}: choose 'default' or 'none'.")
    x, y, index = inputs.check_inputs(x, y, threat, index, batch_size)
    axes = runner.image_axes_of(image_axes, x)
    f, looped = prepare_model(logits_fn, x, y, batch_size)
    f = put_shared(f, mesh)
    key = inputs.check_key(key)
    key_judge, key_attack = jax.random.split(key)
    driver = Driver(
        Model(f, jnp.float32(1)),
        dataclasses.replace(threat, epsilon=0.0),
        ladder(batch_size, len(x), num_devices(mesh)),
        looped,
        mesh,
        key_judge[None],
    )
    logits = clean_logits(driver, x, np.argsort(index, kind="stable"))
    flags: list[inputs.Flag] = []
    if checks != "none":
        near = dataclasses.replace(threat, epsilon=epsilon)
        key_checks = jax.random.fold_in(key, 2)
        flags = runner.examine(
            *(driver, logits, x, y, near, index, key_checks, axes)
        ).flags
    if any(flag.name == "random" for flag in flags):
        keys = jax.random.split(key_judge, runner.NUM_PASSES)
        driver = driver._replace(keys=keys)
    ones = np.ones(len(y), np.float32)
    prediction = predicted(logits)
    return Board(driver, x, y, index, ones, logits, prediction, key_attack), flags


def middle(threat: ThreatModel, x: Any) -> np.ndarray:
    """A budget that leaves points: a quarter of the largest one that is asked for.

    Where that is infinite: every coordinate moved by a 32nd of the data's range.
    """
    epsilon = np.asarray(threat.epsilon, np.float32) / 4
    part = np.full((1, *np.shape(x)[1:]), np.ptp(np.asarray(x)) / 32, np.float32)
    without = np.asarray(threats.size(threat, jnp.asarray(part)))[0]
    return np.where(np.isfinite(epsilon), epsilon, without)
