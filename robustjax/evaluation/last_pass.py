"""The last pass over all points, and what the report says of one threat."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import stats

from robustjax import threats
from robustjax.evaluation.board import Board
from robustjax.evaluation.judge import judge
from robustjax.evaluation.report import StageCost, ThreatReport
from robustjax.threats import ThreatModel
from robustjax.types import Key


def last_pass(
    board: Board,
    threat: ThreatModel,
    notes: tuple[str, ...],
    individual: bool,
    fresh_keys: Key | None = None,
) -> tuple[ThreatReport, np.ndarray]:
    """The last pass over all points, and the threat's report.

    Returns also `[P, N]`, who is right there, pass by pass: of a random model by
    `fresh_keys`, draws that chose no point. Who was not right without an attack counts
    as wrong in all, since nothing attacked it.
    """
    order = board.ordered(np.arange(len(board.y)))
    rows = [a[order] for a in (board.x, board.y, board.epsilon, board.x_adv)]
    verdict = counted = judge(board.driver, *rows)
    if fresh_keys is not None:
        counted = judge(board.driver._replace(keys=fresh_keys), *rows)
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
    return found, counted.correct[:, back] & board.correct


def randomized(correct: list[np.ndarray]) -> dict[str, Any]:
    """Accuracy of a random model under all threats, over passes, with an interval."""
    passes = np.logical_and.reduce(correct).mean(1)
    mean = float(passes.mean())
    quantile = stats.t.ppf(0.975, len(passes) - 1)
    half = float(quantile * passes.std(ddof=1) / np.sqrt(len(passes)))
    return {
        "passes": len(passes),
        "robust_accuracy_mean": mean,
        "low": max(0.0, mean - half),
        "high": min(1.0, mean + half),
    }
