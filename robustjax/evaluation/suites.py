"""The suites of AutoAttack as functions of a board, and the stages they are made of.

Reference: Croce and Hein, arXiv 2003.01690 (standard, plus, rand); for L1, Croce and
Hein, arXiv 2103.01208.
Differs from the authors' code: a point leaves as soon as the judge confirms it, in the
middle of an attack too; noise belongs to the example, not to the batch; Square draws a
window for each example; EOT averages scores as well as gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from robustjax.attacks import apgd, fab, square
from robustjax.evaluation.board import Board
from robustjax.evaluation.stage import SHARED, Stage
from robustjax.evaluation.starts import normal
from robustjax.norms import L1

Suite = Callable[[Board], None]


FAB_STEPS = 100
"""Iterations of FAB, each three passes: two where it stands, one where it arrives."""


def apgd_stage(board: Board, name: str, loss: str, num_steps: int, **changes) -> Stage:
    """APGD of `num_steps` moves, as the reference runs it."""
    settings = apgd.apgd_settings(num_steps, board.norm, **changes)
    return Stage(
        name,
        apgd.kernel,
        settings,
        num_steps + 1,
        loss,
        hand_over="best",
        samples=board.samples,
        losses=SHARED if loss in SHARED else (),
    )


def run_apgd(
    board: Board,
    name: str,
    loss: str,
    *,
    label: str | None = None,
    target: np.ndarray | None = None,
    num_steps: int = 100,
) -> None:
    """One run on the survivors; under L1 in phases at 3, 2 and 1 times epsilon."""
    label = label or name
    if not isinstance(board.norm, L1):
        stage = apgd_stage(board, name, loss, num_steps)
        board.run(stage, label=label, target=target)
        return
    places = board.survivors()
    start = normal(board, places, label)
    for radius, steps in apgd.phases(num_steps):
        found = board.run(
            apgd_stage(board, name, loss, steps),
            places,
            label=f"{label}, radius {radius:g}",
            target=target,
            start=start,
            radius=radius,
            counts=radius == 1,
        )
        start = found.handed


def apgd_ce(board: Board, restarts: int | None = None) -> None:
    """APGD on cross-entropy; L1: 5 restarts."""
    for number in range(restarts or (5 if isinstance(board.norm, L1) else 1)):
        run_apgd(board, "apgd-ce", "cross_entropy", label=f"apgd-ce {number}")


def apgd_dlr(board: Board, restarts: int | None = None) -> None:
    """APGD on DLR (with 2 classes on the margin)."""
    for number in range(restarts or 1):
        run_apgd(board, "apgd-dlr", "dlr", label=f"apgd-dlr {number}")


def apgd_t(board: Board, targets: int | None = None) -> None:
    """APGD on targeted DLR against the 9 best other classes; L1: 5."""
    many = targets or (5 if isinstance(board.norm, L1) else 9)
    for rank in range(1, min(many, board.logits.shape[1] - 1) + 1):
        run_apgd(
            board,
            "apgd-t",
            "dlr_targeted",
            label=f"apgd-t {rank}",
            target=board.ranked(rank),
        )


def fab_t(
    board: Board, targets: int = 9, steps: int = FAB_STEPS, fraction: float = 1.0
) -> None:
    """Targeted FAB against the 9 best other classes, at the reference's points.

    `fraction`: of the survivors, those of smallest margin.
    """
    settings = fab.fab_settings(targeted=True, reference=True)
    places = board.bottom(fraction, 12)
    for rank in range(1, min(targets, board.logits.shape[1] - 1) + 1):
        stage = _fab_stage("fab-t", settings, steps, "difference")
        here = places[board.alive[places]]
        board.run(stage, here, label=f"fab-t {rank}", target=board.ranked(rank))


def _fab_stage(name: str, settings: fab.Fab, steps: int, loss: str) -> Stage:
    return Stage(name, fab.kernel, settings, steps, loss, forward=2)


def fab_untargeted(board: Board, restarts: int = 5, steps: int = FAB_STEPS) -> None:
    """Untargeted FAB; each step takes a backward pass for every class."""
    classes = board.logits.shape[1]
    for number in range(restarts):
        settings = fab.fab_settings(
            targeted=False, random_start=number > 0, reference=True
        )
        stage = _fab_stage("fab", settings, steps, "margin")
        board.run(stage._replace(backward=classes), label=f"fab {number}")


def square_stage(board: Board, name: str, num_steps: int, **changes) -> Stage:
    """Square on the margin, windows drawn for each example."""
    settings = square.square_settings(num_steps, axes=board.image_axes, **changes)
    return Stage(
        name,
        square.kernel,
        settings,
        num_steps,
        "margin",
        backward=0,
        chunk=50,
        hand_over="best",
        samples=board.samples,
    )


def run_square(board: Board, num_steps: int = 5000) -> None:
    """Square with 5000 queries."""
    board.run(square_stage(board, "square", num_steps))


ATTACKS: dict[str, Suite] = {
    "apgd-ce": apgd_ce,
    "apgd-dlr": apgd_dlr,
    "apgd-t": apgd_t,
    "fab": fab_untargeted,
    "fab-t": fab_t,
    "square": run_square,
}
"""Attacks that a custom suite names, as the reference runs them."""


def standard(board: Board) -> None:
    """apgd-ce, apgd-t, fab-t, square."""
    custom(("apgd-ce", "apgd-t", "fab-t", "square"))(board)


def passes(name: str, num_classes: int, norm: Any) -> int:
    """Forward and backward passes of a suite's attack on a point that it does not
    break, as `standard`, `plus` and custom suites run it (`plus`: restarts apart).

    >>> from robustjax.norms import Linf
    >>> [passes(name, 10, Linf()) for name in ("apgd-ce", "apgd-t", "square")]
    [202, 1818, 5000]
    """
    few = isinstance(norm, L1)
    targets = min(9, num_classes - 1)
    return {
        "apgd-ce": 202 * (5 if few else 1),
        "apgd-dlr": 202,
        "apgd-t": 202 * (min(5, targets) if few else targets),
        "fab": 5 * FAB_STEPS * (2 + num_classes),
        "fab-t": 3 * FAB_STEPS * targets,
        "square": 5000,
    }[name]


def standard_passes(logits: np.ndarray, survivors: int) -> int:
    """Forward and backward passes of `standard` on points that nothing breaks, under
    Linf and L2."""
    names, classes = ("apgd-ce", "apgd-t", "fab-t", "square"), logits.shape[1]
    return survivors * sum(passes(name, classes, None) for name in names)


def about(suite: str | None, num_classes: int, norm: Any) -> float | None:
    """Passes of a suite on a point that nothing breaks, for telling how long it takes.

    `fast` and `strong`: what they took on the nets of docs/reproduce.md, as parts of
    `standard`. None where it cannot be said.
    """

    def total(*names: str) -> float:
        return sum(passes(name, num_classes, norm) for name in names)

    whole = total("apgd-ce", "apgd-t", "fab-t", "square")
    known = {
        "standard": whole,
        "strong": 0.7 * whole,
        "fast": 0.06 * whole,
        "rand": 20 * total("apgd-ce", "apgd-dlr"),
        "plus": whole + total("apgd-dlr", "fab") + 8 * 202,
    }
    if suite in known:
        return known[suite]
    names = suite.split(", ") if suite is not None else []
    return total(*names) if names and all(name in ATTACKS for name in names) else None


def plus(board: Board) -> None:
    """apgd-ce and apgd-dlr with 5 restarts, fab, square, apgd-t, fab-t."""
    apgd_ce(board, 5)
    apgd_dlr(board, 5)
    fab_untargeted(board)
    run_square(board)
    apgd_t(board, 9)
    fab_t(board)


def rand(board: Board) -> None:
    """apgd-ce and apgd-dlr on the mean of 20 draws of the model."""
    board.samples = 20
    apgd_ce(board, 1)
    apgd_dlr(board, 1)


def custom(names: Sequence[str]) -> Suite:
    """The named attacks, one after the other.

    Raises:
      ValueError: a name is unknown.
    """
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ValueError(
            f"suite names the attacks {unknown}: choose among {', '.join(ATTACKS)}."
        )

    def run(board: Board) -> None:
        for name in names:
            ATTACKS[name](board)

    return run
