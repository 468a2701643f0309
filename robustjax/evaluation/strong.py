"""`strong`: AutoAttack and what it misses, for at most its passes.

The two APGD attacks of `standard` run on everybody. FAB and Square, which cost three
quarters of it and break next to nothing at large margins, run on the bottom of the
ranking only (FAB on everybody where gradients mislead). What that saves pays for more
of what `fast` is made of: Square with APGD as the finisher, other starts, and under L2
ladder after ladder from far starts, which breaks points that AutoAttack calls robust.
"""

from collections.abc import Sequence

import numpy as np

from robustjax.evaluation import fast, suites
from robustjax.evaluation.board import Board

FIRST = fast.Budget(
    steps=30,
    targeted=(0.30, 3, 60),
    starts=(0.20, 30),
    square=((0.12, 2, 400, 40), (0.05, 1, 3000, 40)),
    last=(0.05, 100),
    sentinels=40,
)
BOTTOM = 0.4
ROUNDS = 24
TIRED = 3
PART = 0.5
"""Of `standard`'s passes on the same points: what the ladders may take."""


def strong(board: Board) -> Sequence[str]:
    """The suite; returns its notes."""
    first = np.flatnonzero(board.alive)
    budget = suites.standard_passes(board.logits, len(first))
    masked, _ = fast.run_fast(board, FIRST)
    board.further = None  # what comes was not in the sample's attack
    if masked:
        climb_again(board, PART * budget)
    suites.apgd_ce(board)
    suites.apgd_t(board)
    fraction = 1.0 if masked else BOTTOM
    suites.fab_t(board, fraction=fraction)
    bottom_square(board, BOTTOM)
    if masked:
        climb_again(board, 0.95 * budget, again=1)
    else:
        for number in range(3):
            places = board.bottom(0.15, 12)
            fast.square_start(board, places, 1000, 60, f"apgd+square strong {number}")
    share = "everybody" if masked else f"the {fraction:.0%} of smallest margin"
    return [
        f"strong runs FAB on {share}, Square on the {BOTTOM:.0%} of smallest margin."
    ]


def spent(board: Board) -> int:
    """Counted passes so far, forward and backward."""
    return sum(c.passes.forward + c.passes.backward for c in board.costs.values())


def climb_again(board: Board, budget: float, again: int = 0) -> None:
    """Fresh ladders, each with breathing, until the passes are spent or it tires."""
    tired = 0
    for number in range(ROUNDS):
        places = board.survivors()
        if not len(places) or tired == TIRED or spent(board) > budget:
            return
        broken = 0
        for letter in ("o" if number % 2 else "n", "b", "b"):
            places = board.survivors()
            label = f"ladder again {again}.{number}{letter}{broken}"
            broken += fast.round_of(board, places, letter, label)
        tired = tired + 1 if broken < 0.01 * len(places) else 0


def bottom_square(board: Board, fraction: float) -> None:
    """Square with 5000 queries on the bottom of the ranking, then APGD."""
    places = board.bottom(fraction, 12)
    found = board.run(suites.square_stage(board, "square", 5000), places)
    left = board.alive[places]
    fast.run(
        board,
        "apgd+square",
        "margin",
        60,
        places[left],
        start=found.handed[left],
        label="apgd+square 5000",
        first_step=0.5,
    )
