"""Does the gradient lead where it should? Short attacks on few points, compared.

APGD starts inside the ball six times; then whoever is left is attacked from elsewhere:
by one long step, from far outside the ball, and from where a gradient-free search ends.
On a sound model none of these finds what the six runs missed, and the runs agree.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from robustjax.attacks import apgd, square
from robustjax.evaluation.driver import drive
from robustjax.evaluation.judge import Driver
from robustjax.evaluation.stage import SHARED, Rows, Stage
from robustjax.norms import L0, L1, L2
from robustjax.types import Key

ROUNDS = 3
RADII = (3.0, 2.0, 1.4)
# Fewer points say nothing on average.
FEWEST = 8
# docs/checks.md says which nets set these.
DISAGREE, LOWER = 0.008, 0.01
# Steps that tell disagreement from slow convergence, and the bound after them.
LONG, SETTLED = 200, 0.0075
LEAST, SHARE = 3, 0.05
LEAST_RESTART, SHARE_RESTART = 5, 0.1


class Evidence(NamedTuple):
    """What the comparison found; counts are of examples.

    points:   attacked (correctly classified).
    left:     not broken by the in-ball runs.
    restart:  broken by the later in-ball runs only.
    one_step, far, search: broken by that only.
    disagree: change of the smallest margin between runs of one attack, over the clean
              one: its median, less a standard error; None: too few examples were left.
    settled:  the same of `LONG` steps; None: not measured, for short runs agree or the
              passes do not suffice.
    lower:    median of how much lower far starts end, over the clean margin.
    unbroken: of `points`, with the whole box allowed.
    passes:   forward and backward.
    """

    points: int
    left: int
    restart: int
    one_step: int
    far: int
    search: int
    disagree: float | None
    settled: float | None
    lower: float | None
    unbroken: int
    passes: int


def reasons(found: Evidence) -> list[str]:
    """Why the gradient is thought to mislead, in words; nothing: it does not.

    >>> reasons(Evidence(64, 50, 0, 0, 9, 0, 0.001, None, 0.2, 0, 0))[0]
    'starts outside of the ball broke 9 of 50 more'
    """
    said = []
    ways = {
        "one long step": found.one_step,
        "starts outside of the ball": found.far,
        "a search without gradients": found.search,
    }
    for way, count in ways.items():
        if count >= LEAST and count > SHARE * found.left:
            said.append(f"{way} broke {count} of {found.left} more")
    if found.lower is not None and found.lower > LOWER:
        said.append(
            f"starts outside of the ball end lower, by {found.lower:.1%} of the margin"
        )
    if found.settled is not None and found.settled > SETTLED:
        said.append(
            f"two runs of one attack, of {LONG} steps, end {found.settled:.1%} of the "
            "margin apart"
        )
    # Short runs of sound nets were up to 1.34 % apart: they had not converged.
    elif found.settled is None and (found.disagree or 0) > 2 * DISAGREE:
        said.append(
            f"two runs of one attack end {found.disagree:.1%} of the margin apart"
        )
    return said


def cost(num_steps: int) -> int:
    """Passes of one example that survives everything.

    >>> cost(40)
    910
    """
    far = 4 * (num_steps // 4 + 1)
    unbounded = 2 * (num_steps // 2 + 1)
    gradient = (2 * ROUNDS + 1) * (num_steps + 1) + 2 + far + unbounded
    return 2 * gradient + 4 * num_steps


def long_cost() -> int:
    """Passes of one example in the long runs.

    >>> long_cost()
    1206
    """
    return 2 * ROUNDS * (LONG + 1)


def compare(
    driver: Driver,
    rows: Rows,
    clean_margin: np.ndarray,
    key: Key,
    num_steps: int,
    image_axes: str = "HWC",
    passes: float = math.inf,
) -> Evidence:
    """Attack correctly classified rows from inside the ball and from elsewhere.

    Args:
      driver: model, threat and shapes.
      rows: the examples, host arrays.
      clean_margin: `[n]`, positive, in the logits that attacks see.
      key: noise is drawn from it and each example's index.
      num_steps: of each in-ball run; `cost` tells what that costs.
      image_axes: for Square.
      passes: what may be spent; the longer runs take what the others leave of it.
    """
    keys = list(jax.random.split(key, 32))
    total, spent = len(rows.y), 0
    axes = image_axes if rows.x.ndim <= 4 else None

    def ascend(places, steps, loss, start, radius=1.0, counts=True, first_step=None):
        nonlocal spent
        settings = apgd.apgd_settings(steps, driver.threat.norm, first_step=first_step)
        stage = Stage("apgd", apgd.kernel, settings, steps + 1, loss, hand_over="best")
        stage = stage._replace(losses=SHARED)
        here = _some(rows, places)
        here = here._replace(epsilon=(radius * here.epsilon).astype(np.float32))
        found = drive(driver, stage, here, keys.pop(), start=start, counts=counts)
        spent += found.passes.forward + found.passes.backward
        return found

    def noise(places: np.ndarray, size: float) -> np.ndarray:
        return _noise(driver, _some(rows, places), keys.pop(), size)

    # Inside the ball: two losses, three starts.
    left = np.arange(total)
    margins, earlier = np.full((ROUNDS, 2, total), np.nan), 0
    for number in range(ROUNDS):
        for which, loss in enumerate(("cross_entropy", "margin")):
            found = ascend(left, num_steps, loss, noise(left, 1.0))
            margins[number, which, left] = found.margin
            left = left[~found.broken]
        earlier = earlier if number else total - len(left)
    restart = total - len(left) - earlier
    margins = margins[:, :, left]
    best = margins.min((0, 1), initial=np.inf)
    disagree = _apart(margins / clean_margin[left])

    # From elsewhere: each only on who is left of all.
    one = ascend(left, 1, "margin", noise(left, 1.0))
    here = left[~one.broken]
    steps, start = num_steps // 4, noise(here, math.inf)
    for radius in RADII:
        start = ascend(here, steps, "margin", start, radius, counts=False).handed
    found = ascend(here, steps, "margin", start)
    ends = np.where(found.broken, np.minimum(found.margin, 0), found.margin)
    lower = (best[~one.broken] - ends) / clean_margin[here]
    far = int(found.broken.sum())
    here = here[~found.broken]
    search = 0
    if len(here) and not isinstance(driver.threat.norm, L0):
        queries = Stage(
            "square",
            square.kernel,
            square.square_settings(4 * num_steps, axes=axes),
            4 * num_steps,
            "margin",
            backward=0,
            chunk=50,
            hand_over="best",
        )
        won = drive(driver, queries, _some(rows, here), keys.pop())
        spent += won.passes.forward
        search, kept = int(won.broken.sum()), ~won.broken
        end = ascend(here[kept], num_steps, "margin", won.handed[kept], first_step=0.5)
        search += int(end.broken.sum())

    # Short runs may be apart because they had not converged yet.
    settled, remaining = None, passes - spent - 2 * total * 2 * (num_steps // 2 + 1)
    count = int(min(len(left), max(remaining, 0) / long_cost()))
    if (disagree or 0) > DISAGREE and count >= FEWEST:
        some = left[np.linspace(0, len(left) - 1, count).astype(int)]
        starts = (noise(some, 1.0) for _ in range(ROUNDS))
        runs = [ascend(some, LONG, "margin", start).margin for start in starts]
        settled = _apart(np.stack(runs)[:, None] / clean_margin[some])

    # The whole box.
    everyone = np.arange(total)
    rows = rows._replace(epsilon=_reach(driver, rows))
    for loss in ("margin", "cross_entropy"):
        steps = num_steps // 2
        start = noise(everyone, 1.0)
        free = ascend(everyone, steps, loss, start)
        everyone = everyone[~free.broken]
    return Evidence(
        total,
        len(left),
        restart,
        int(one.broken.sum()),
        far,
        search,
        disagree,
        settled,
        float(np.median(lower)) if len(lower) >= FEWEST else None,
        len(everyone),
        spent,
    )


def _apart(margins: np.ndarray) -> float | None:
    """How far the runs `[runs, losses, n]` of one loss end apart, over the examples."""
    count = margins.shape[2]
    if count < FEWEST:
        return None
    changes = np.abs(margins - np.roll(margins, 1, 0))
    # The median, less its standard error: few examples must not alarm by luck.
    below = max(0.0, 0.5 - 0.5 / math.sqrt(count))
    return float(np.quantile(changes, below, axis=2).mean())


def _some(rows: Rows, places: np.ndarray) -> Rows:
    return Rows(*(leaf[places] for leaf in rows))


def _noise(driver: Driver, rows: Rows, key: Key, size: float) -> np.ndarray:
    """Starts `[n, ...]` around the examples; by key and index alone."""
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    draws = [
        np.random.default_rng([*words, int(i) % 2**32]).normal(size=rows.x.shape[1:])
        for i in rows.index
    ]
    draws = np.asarray(draws, np.float32).reshape(rows.x.shape)
    low, high = np.asarray(driver.threat.lower), np.asarray(driver.threat.upper)
    if math.isinf(size):
        return np.clip(rows.x + (high - low) * draws, low, high).astype(np.float32)
    epsilon = rows.epsilon.reshape(-1, *(1,) * (rows.x.ndim - 1))
    flat = draws.reshape(len(draws), math.prod(rows.x.shape[1:]))
    if isinstance(driver.threat.norm, L1 | L2 | L0):
        # The projection brings what is outside to the ball's surface.
        unit = draws / (np.linalg.norm(flat, axis=1).reshape(epsilon.shape) + 1e-30)
        far = np.where(np.isfinite(epsilon), epsilon, 1.0)
        if not isinstance(driver.threat.norm, L2):
            unit, far = draws, high - low
        return np.clip(rows.x + far * unit, low, high).astype(np.float32)
    step = np.minimum(epsilon, high - low) * np.tanh(draws)
    return np.clip(rows.x + step, low, high).astype(np.float32)


def _reach(driver: Driver, rows: Rows) -> np.ndarray:
    """`[n]` the budget that permits the whole box."""
    width = float(np.max(np.asarray(driver.threat.upper) - driver.threat.lower))
    size = math.prod(rows.x.shape[1:])
    norm = driver.threat.norm
    if isinstance(norm, L0):
        return np.full(len(rows.y), size, np.float32)
    power = 1.0 if isinstance(norm, L1) else 0.5 if isinstance(norm, L2) else 0.0
    return np.full(len(rows.y), width * size**power, np.float32)
