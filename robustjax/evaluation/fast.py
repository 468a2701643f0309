"""`fast`: AutoAttack's verdict for a small part of its passes.

After some 50 gradients nearly all that a long attack still breaks has a small margin.
So budgets follow the rank of the margin: short runs on everybody, then targets, other
starts and Square on the bottom of the list only. Square is a generator of starts (a
region that gradients do not lead to), APGD finishes from where it ended. Under L2 a
ladder of shrinking balls from far starts goes around gradients that mislead.

Parts: rank of targets by MALT (Melamed et al., arXiv 2407.02240); Square
(Andriushchenko et al., arXiv 1912.00049); APGD (Croce and Hein, arXiv 2003.01690).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.attacks.apgd import phases
from robustjax.evaluation.board import Board
from robustjax.evaluation.intervals import wilson
from robustjax.evaluation.judge import pad, plan
from robustjax.evaluation.stage import Outcome
from robustjax.evaluation.starts import near_image, noisy, normal, other_image
from robustjax.evaluation.suites import apgd_stage, square_stage
from robustjax.norms import L1, L2
from robustjax.parallel import fetch


class Budget(NamedTuple):
    """What `fast` spends; fractions are of the survivors, by rank of margin.

    steps:     of the two runs on everybody.
    targeted:  fraction, number of targets, steps.
    starts:    fraction for four runs from other starts, steps.
    square:    `(fraction, times, queries, steps of the finisher)` for each round.
    last:      fraction and steps of the last targeted runs.
    sentinels: random survivors outside of the bottom, attacked as a sample.
    rounds:    of the ladder, as letters: o (another image), n (noise), b (breathing).
    """

    steps: int = 25
    targeted: tuple[float, int, int] = (0.20, 3, 60)
    starts: tuple[float, int] = (0.12, 30)
    square: tuple[tuple[float, int, int, int], ...] = (
        (0.08, 2, 400, 40),
        (0.03, 1, 3000, 40),
    )
    last: tuple[float, int] = (0.02, 100)
    sentinels: int = 20
    rounds: str = "onbobobob"


LEFT_OUT = (
    "fast leaves out FAB, and spends targets, other starts and Square on the survivors "
    "of smallest margin only: the rest was seen by two short APGD runs and a sample."
)
LEFT_OUT_MASKED = (
    "Under L2 gradients mislead here: fast ran ladders from far starts on everybody "
    "instead of targets and Square, and leaves out FAB."
)
MASKED = 0.02
TIRED = 0.01
RADII = (3.0, 2.0, 1.4, 1.0)
BREATH = ((1.5, 10), (1.0, 20))
GRAIN = 1.0
"""The ladder rounds its gradients (`Apgd.grain`): their last bits decide nothing."""


def fast(board: Board) -> Sequence[str]:
    """The suite; returns its notes."""
    return run_fast(board, Budget())[1]


def run_fast(board: Board, budget: Budget) -> tuple[bool, list[str]]:
    """`fast` with other constants: whether gradients mislead (L2), and its notes."""
    floor = small_floor(len(board.survivors()))
    run(board, "apgd-ce", "cross_entropy", budget.steps)
    run(board, "apgd-margin", "margin", budget.steps, start="near")
    masked = False
    if isinstance(board.norm, L2):
        masked = ladder(board, budget.rounds)
    if not masked:
        fraction, count, steps = budget.targeted
        targeted(board, fraction, floor, count, steps, "1")
        other_starts(board, *budget.starts, floor)
        for number, (fraction, times, queries, steps) in enumerate(budget.square):
            for again in range(times):
                places = board.bottom(fraction, floor)
                name = f"apgd+square {number}.{again}"
                square_start(board, places, queries, steps, name)
        targeted(board, budget.last[0], floor, count, budget.last[1], "2")
    notes = [LEFT_OUT_MASKED if masked else LEFT_OUT]
    count = min(budget.sentinels, max(4, len(board.alive) // 25))
    return masked, notes + (climb_sample if masked else sentinel)(board, count)


def small_floor(survivors: int) -> int:
    """How many points a stage takes at least: 12 of a large set, 4 of a small one."""
    return int(np.clip(survivors // 32, 4, 12))


def run(
    board: Board,
    name: str,
    loss: str,
    num_steps: int,
    places: np.ndarray | None = None,
    *,
    start: str | np.ndarray | None = None,
    label: str | None = None,
    target: np.ndarray | None = None,
    **settings: float,
) -> Outcome:
    """APGD on some survivors: `start` is "near", "other", points, or None: uniform.

    Under L1 in three phases, as the reference.
    """
    label = label or name
    places = board.survivors() if places is None else places
    if isinstance(start, str):
        chosen = near_image if start == "near" else other_image
        start = chosen(board, places, label)
    radii: Sequence[tuple[float, int]] = ((1.0, num_steps),)
    if isinstance(board.norm, L1):
        radii = phases(num_steps)
        start = normal(board, places, label) if start is None else start
    found = None
    for radius, steps in radii:
        stage = apgd_stage(board, name, loss, steps, reference=False, **settings)
        found = board.run(
            stage._replace(num_steps=steps),
            places,
            label=f"{label}, radius {radius:g}",
            target=target,
            start=start,
            radius=radius,
            counts=radius == 1,
        )
        start = found.handed
    assert found is not None
    return found


def climb(
    board: Board,
    places: np.ndarray,
    start: np.ndarray,
    radii: Sequence[tuple[float, int]],
    label: str,
) -> int:
    """Margin ascent through shrinking balls, each from the last best point projected.

    Returns how many points broke in the last one, which must be the real ball.
    """
    for radius, steps in radii:
        stage = apgd_stage(
            board, "ladder", "margin", steps, reference=False, grain=GRAIN
        )
        found = board.run(
            stage._replace(num_steps=steps),
            places,
            label=f"{label}, radius {radius:g}",
            start=start,
            radius=radius,
            counts=radius == 1,
        )
        start = found.handed
    return int(found.broken.sum())


def ladder(board: Board, rounds: str) -> bool:
    """Rounds of far starts; True: gradients inside the ball mislead here.

    "o": from another class's image, "n": from noise, through 3, 2, 1.4 and 1 epsilon;
    "b": breathing, from the best point through 1.5 and 1 epsilon.
    """
    tired = 0
    for number, kind in enumerate(rounds):
        places = board.survivors()
        if not len(places):
            return number > 0
        broken = round_of(board, places, kind, f"ladder {number}{kind}")
        if number == 0 and not misleads(broken, len(places)):
            return False
        tired = tired + 1 if broken < TIRED * len(places) else 0
        if tired == 2:
            break
    return True


def misleads(broken: int, places: int) -> bool:
    """Whether far starts broke more than luck of what starts in the ball had left.

    >>> misleads(1, 20), misleads(2, 20), misleads(3, 200)
    (False, True, False)
    """
    return broken >= max(2, MASKED * places)


def round_of(board: Board, places: np.ndarray, kind: str, label: str) -> int:
    """One round of the ladder, by its letter; returns how many points it broke."""
    if kind == "b":
        return climb(board, places, board.x_adv[places], BREATH, label)
    start = (other_image if kind == "o" else noisy)(board, places, label)
    return climb(board, places, start, [(radius, 10) for radius in RADII], label)


def targeted(
    board: Board, fraction: float, floor: int, count: int, steps: int, name: str
) -> None:
    """Targeted DLR against the classes whose boundary is nearest to first order."""
    places = board.bottom(fraction, floor)
    if not len(places):
        return
    targets = malt(board, places, count)
    for rank in range(targets.shape[1]):
        target = np.zeros_like(board.y)
        target[places] = targets[:, rank]
        here = places[board.alive[places]]
        run(
            board,
            "apgd-t",
            "dlr_targeted",
            steps,
            here,
            label=f"apgd-t {name}.{rank}",
            target=target,
            first_step=0.5,
        )


def other_starts(board: Board, fraction: float, steps: int, floor: int) -> None:
    """Four short runs: two losses, two kinds of starts, one without momentum."""
    places = board.bottom(fraction, floor)
    kinds = (
        ("margin", "other", 0.75),
        ("margin", None, 0.75),
        ("cross_entropy", "other", 0.75),
        ("margin", "other", 1.0),
    )
    for number, (loss, start, momentum) in enumerate(kinds):
        here = places[board.alive[places]]
        label = f"apgd-starts {number}"
        run(
            board,
            "apgd-starts",
            loss,
            steps,
            here,
            start=start,
            label=label,
            momentum=momentum,
        )


def square_start(
    board: Board, places: np.ndarray, queries: int, steps: int, label: str
) -> None:
    """Square from scratch, then APGD on the margin from where it ended."""
    stage = square_stage(board, "apgd+square", queries, rescale=True)
    found = board.run(stage, places, label=f"{label} square")
    left = board.alive[places]
    run(
        board,
        "apgd+square",
        "margin",
        steps,
        places[left],
        start=found.handed[left],
        label=f"{label} apgd",
        first_step=0.5,
    )


def sentinel(board: Board, count: int) -> list[str]:
    """A sample of the survivors that only the short runs have seen.

    If one of them breaks, all are attacked likewise.
    """
    easy = np.setdiff1d(board.survivors(), board.bottom(0.3))
    easy = board.ordered(easy)
    if not len(easy):
        return []
    sample = sampled(board, easy, count)
    square_start(board, sample, 400, 40, "sentinel")
    broken = int((~board.alive[sample]).sum())
    if broken:
        rest = easy[board.alive[easy]]
        square_start(board, rest, 400, 40, "sentinel rest")
        return [
            f"{broken} of {len(sample)} sampled points of large margin broke: the "
            f"other {len(rest)} were attacked likewise."
        ]
    upper = 1 - 0.05 ** (1 / len(sample))
    share = len(easy) / len(board.alive)
    board.further = (0.0, upper * share)
    return [
        f"None of {len(sample)} sampled points of large margin broke under Square and "
        f"APGD: with 95 % confidence at most {upper:.0%} of such points would, "
        f"{upper * share:.1%} of all."
    ]


def climb_sample(board: Board, count: int) -> list[str]:
    """Where gradients mislead: how many of a sample of the survivors further rounds of
    the ladder break, and so what these would break of all."""
    places = board.survivors()
    if not len(places):
        return []
    sample = sampled(board, places, count)
    for kind in "obnb":
        left = sample[board.alive[sample]]
        if len(left):
            round_of(board, left, kind, f"sentinel ladder {kind}")
    broken = int((~board.alive[sample]).sum())
    share = (len(places) - len(sample)) / len(board.alive)  # the sample has had them
    low, high = (share * part for part in wilson(broken, len(sample)))
    board.further = (low, high)
    return [
        f"Four more rounds broke {broken} of {len(sample)} sampled survivors: with "
        f"95 % confidence they would break {low:.1%} to {high:.1%} of all examples "
        "more. The suite strong makes more of them."
    ]


def sampled(board: Board, places: np.ndarray, count: int) -> np.ndarray:
    """`count` of some places, by key and index."""
    key = jax.random.fold_in(board.key, 7)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, board.index[places])
    draws = np.asarray(jax.vmap(lambda k: jax.random.uniform(k))(keys))
    return places[np.argsort(draws, kind="stable")[:count]]


@jax.jit
def _distance(model, norm, x, y, target, key):
    """`|z_t - z_y| / dual(grad)`: first-order distance to the boundary, `[B]`."""

    def gap(x):
        z = model.scale * model.logits_fn(x, key).astype(jnp.float32)
        z = jnp.nan_to_num(z)
        at = jnp.take_along_axis
        own, other = at(z, y[:, None], -1)[:, 0], at(z, target[:, None], -1)[:, 0]
        return jnp.sum(own - other), own - other

    grad, value = jax.grad(gap, has_aux=True)(x)
    steep = jax.vmap(norm.dual)(jnp.nan_to_num(grad))
    return value / jnp.maximum(steep, 1e-30)


def malt(board: Board, places: np.ndarray, count: int, among: int = 9) -> np.ndarray:
    """`[n, count]` classes whose linearized boundary at the clean point is nearest.

    `(z_y - z_k) / ||grad z_y - grad z_k||_dual`, smallest first, among the `among` best
    other classes. Costs a forward and a backward pass for each of these.
    Reference: Melamed et al., arXiv 2407.02240 (there the L1 norm of the gradient).
    """
    among = min(among, board.logits.shape[1] - 1)
    driver, key = board.driver, board.driver.keys[0]
    distance = np.zeros((len(places), among), np.float32)
    classes = np.stack([board.ranked(r + 1)[places] for r in range(among)], 1)
    begin = 0
    for shape in plan(len(places), driver.shapes):
        take = slice(begin, begin + shape)
        for rank in range(among):
            rows = (board.x[places], board.y[places], classes[:, rank])
            here = driver.put([pad(a[take], shape) for a in rows])
            found = _distance(driver.model, driver.threat.norm, *here, key)
            part = distance[take, rank]
            part[:] = fetch(found)[: len(part)]
        begin += shape
    board.pay("malt", len(places), sum(plan(len(places), driver.shapes)), among)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(classes, nearest, 1)
