"""Accuracy against epsilon: from one minimal-norm run, or by a sweep over budgets."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import threats
from robustjax.attacks import fab
from robustjax.evaluation import checks, runner
from robustjax.evaluation.board import Board
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
    """

    epsilon: np.ndarray
    accuracy: np.ndarray
    distance: np.ndarray


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
    mesh: Any = None,
) -> Curve:
    """One run of targeted FAB without a budget gives the whole curve.

    Every point that counts is judged again at matmul precision `highest`.
    Reference: Croce and Hein, arXiv 1907.02044.

    Args:
      logits_fn, x, y, key, batch_size, index, mesh: see `evaluate`.
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
    board = _board(logits_fn, x, y, threat, key, batch_size, index, mesh)
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
    return _curve(epsilon, distance)


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
    image_axes: str | None = "HWC",
    mesh: Any = None,
) -> Curve:
    """A suite at each budget, from the smallest; who has fallen stays fallen.

    Args:
      logits_fn, x, y, suite, key, batch_size, index, image_axes, mesh: see
        `evaluate`.
      threat: norm and box.
      epsilons: budgets.

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
    x, y, index = checks.check_inputs(x, y, threat, index, batch_size)
    distance = np.full(len(y), np.inf)
    left = np.arange(len(y))
    for epsilon in epsilons:
        if not len(left):
            break
        report = runner.evaluate(
            logits_fn,
            *(x[left], y[left]),
            dataclasses.replace(threat, epsilon=jnp.float32(epsilon)),
            suite=suite,
            key=key,
            batch_size=batch_size,
            index=index[left],
            checks="none",
            image_axes=image_axes,
            mesh=mesh,
            progress=False,
        )
        found = next(iter(report.threats.values()))
        broken = report.correct & ~report.robust
        distance[left[broken]] = np.minimum(found.size[broken], epsilon)
        distance[left[~report.correct]] = 0.0
        left = left[report.robust]
    return _curve(np.array(epsilons), distance)


def _curve(epsilon: np.ndarray, distance: np.ndarray) -> Curve:
    slack = 1e-6 * np.maximum(1, epsilon)
    beyond = distance[None, :] > (epsilon + slack)[:, None]
    wrong = distance == 0
    return Curve(epsilon, (beyond & ~wrong[None]).mean(1), distance)


def _board(logits_fn, x, y, threat, key, batch_size, index, mesh) -> Board:
    x, y, index = checks.check_inputs(x, y, threat, index, batch_size)
    f, looped = prepare_model(logits_fn, x, y, batch_size)
    f = put_shared(f, mesh)
    key_judge, key_attack = jax.random.split(checks.check_key(key))
    driver = Driver(
        Model(f, jnp.float32(1)),
        dataclasses.replace(threat, epsilon=0.0),
        ladder(batch_size, len(x), num_devices(mesh)),
        looped,
        mesh,
        key_judge[None],
    )
    logits = clean_logits(driver, x, np.argsort(index, kind="stable"))
    ones = np.ones(len(y), np.float32)
    prediction = predicted(logits)
    return Board(driver, x, y, index, ones, logits, prediction, key_attack)
