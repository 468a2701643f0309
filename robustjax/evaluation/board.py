"""What an evaluation knows of every example under one threat model, stage by stage."""

import functools
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from robustjax.evaluation.driver import drive
from robustjax.evaluation.judge import Driver
from robustjax.evaluation.ledger import Ledger
from robustjax.evaluation.stage import Outcome, Passes, Rows, Stage
from robustjax.types import Key

# Rows that run side by side, in batches: they are packed together as they fall.
GROUP = 4


class Enough(Exception):
    """Robust accuracy has fallen below `stop_below`."""


class Progress(NamedTuple):
    """How far an evaluation is.

    name:  of the stage.
    part:  of this run of it that is done, 0 to 1.
    alive: examples still robust.
    done:  passes executed since the board was made.
    left:  passes to come where nothing else breaks; None: the suite did not say.
    """

    name: str
    part: float
    alive: int
    done: int
    left: float | None


class Cost(NamedTuple):
    """What a stage was run on, broke, and took."""

    points: int
    broken: int
    passes: Passes
    seconds: float


class Board:
    """N examples, and the one place that changes what is known of them.

    A suite is a function of a board: it reads `alive`, `margin`, `x_adv`, and calls
    `run`. All arrays are on the host.

    alive:     `[N]` bool: classified correctly and not yet broken.
    margin:    `[N]` the smallest margin that any attack reached (of scaled logits).
    x_adv:     `[N, ...]`: the first confirmed adversarial point; before it, the point
               of smallest margin.
    broken_by: stage name -> `[N]` bool.
    rank:      `[N]` where a broken example stood in the ranking by margin when the
               stage that broke it began: the fraction of survivors before it (NaN:
               unbroken).
    further:   an interval for the fraction that the attack on a sample might still
               break, or None.
    logits:    `[N, K]` clean logits, scaled.
    """

    def __init__(
        self,
        driver: Driver,
        x: np.ndarray,
        y: np.ndarray,
        index: np.ndarray,
        epsilon: np.ndarray,
        logits: np.ndarray,
        prediction: np.ndarray,
        key: Key,
        *,
        image_axes: str | None = "HWC",
        samples: int = 1,
        ledger: Ledger | None = None,
        points: bool = False,
        stop_below: float | None = None,
        on_stage: Callable[[Progress], None] = lambda news: None,
        expected: float | None = None,
    ):
        self.driver, self.x, self.y, self.index = driver, x, y, index
        self.epsilon, self.logits, self.key = epsilon, logits, key
        self.image_axes, self.samples = image_axes, samples
        self.ledger, self.points = ledger, points
        self.stop_below, self.on_stage = stop_below, on_stage
        # Passes on an example that nothing breaks: the suite's, and those so far.
        self.expected, self._spent, self._executed = expected, 0.0, 0
        self.correct = prediction == y
        self.alive = self.correct.copy()
        self.x_adv = np.array(x, np.float32)
        self.margin = clean_margin(logits, y)
        self.refused = np.zeros(len(y), bool)
        self.doubted = np.zeros(len(y), bool)
        self._labels: dict[str, int] = {}
        self.rank = np.full(len(y), np.nan, np.float32)
        self.further: tuple[float, float] | None = None
        self._ranks: dict[str, np.ndarray] = {}
        self.broken_by: dict[str, np.ndarray] = {}
        self.costs: dict[str, Cost] = {}

    @property
    def norm(self) -> Any:
        """The geometry, a norm."""
        return self.driver.threat.norm

    def survivors(self) -> np.ndarray:
        """Places of the examples that are still robust, in the order of `index`."""
        return self.ordered(np.flatnonzero(self.alive))

    def ordered(self, places: np.ndarray) -> np.ndarray:
        """Places in the order of `index`: no choice depends on the order of rows."""
        return places[np.argsort(self.index[places], kind="stable")]

    def bottom(self, fraction: float, floor: int = 0) -> np.ndarray:
        """The `max(floor, ceil(fraction * S))` survivors of smallest margin; ties by
        index."""
        places = self.survivors()
        count = max(floor, int(np.ceil(fraction * len(places))))
        return places[np.argsort(self.margin[places], kind="stable")[:count]]

    def ranked(self, rank: int) -> np.ndarray:
        """`[N]` int32: the class of rank `rank` (1 = best) other than y, clean logits.
        With too few classes the last one."""
        rest = np.array(np.nan_to_num(self.logits, nan=0.0))
        rest[np.arange(len(rest)), self.y] = -np.inf
        order = np.argsort(-rest, axis=1, kind="stable")
        return order[:, min(rank, rest.shape[1] - 1) - 1].astype(np.int32)

    def run(
        self,
        stage: Stage,
        places: np.ndarray | None = None,
        *,
        label: str | None = None,
        target: np.ndarray | None = None,
        start: np.ndarray | None = None,
        radius: float = 1.0,
        counts: bool = True,
    ) -> Outcome:
        """Run a stage on some examples, and note what it found.

        Args:
          stage: the attack.
          places: which examples, in any order; None: all survivors.
          label: names this run among those of the stage: its randomness and its place
            in the ledger. None: the stage's name.
          target: `[N]` classes, for targeted losses.
          start: `[len(places), ...]` points to begin at.
          radius: the budget as a multiple of epsilon.
          counts: False: a phase outside of the real ball: nothing it finds counts.

        Returns:
          The `Outcome`, in the order of `places`.
        """
        label = label or stage.name
        # The same run again is another one: other noise, another place in the ledger.
        again = self._labels.get(label, 0)
        self._labels[label] = again + 1
        label = f"{label}, again {again}" if again else label
        places = self.survivors() if places is None else places
        order = np.argsort(self.index[places], kind="stable")
        if stage.name not in self._ranks:
            ranking = np.full(len(self.y), np.nan, np.float32)
            ranked = self.bottom(1.0)
            ranking[ranked] = np.arange(len(ranked)) / max(len(ranked), 1)
            self._ranks[stage.name] = ranking
        key = jax.random.fold_in(self.key, zlib.crc32(label.encode()) & 0x7FFFFFFF)
        began = time.monotonic()
        size = GROUP * self.driver.shapes[-1]
        outcomes: list[Outcome] = []
        fallen = 0
        each = stage.num_steps * (stage.forward + stage.backward) * stage.samples
        share = each * len(places) / max(int(self.alive.sum()), 1)
        for number, first in enumerate(range(0, len(places), size)):
            take = order[first : first + size]
            here = places[take]
            rows = Rows(
                self.x[here],
                self.y[here],
                self.index[here],
                (np.zeros_like(self.y) if target is None else target)[here],
                (radius * self.epsilon[here]).astype(np.float32),
            )
            group = f"{label}#{number}"
            found = None
            if self.ledger is not None:
                found = self.ledger.get(group, rows.index, self.x[here])
            if found is None:
                found = drive(
                    self.driver,
                    stage,
                    rows,
                    key,
                    None if start is None else start[take],
                    counts,
                    functools.partial(
                        self._tell, stage, share, first, here, places, fallen
                    ),
                )
                self._executed += found.passes.executed()
                if self.ledger is not None:
                    self.ledger.put(
                        group, stage.name, rows.index, found, self.points and counts
                    )
            outcomes.append(found)
            fallen += int((found.broken & self.alive[here]).sum()) if counts else 0
        self._spent += share
        outcome = _in_order(outcomes, order, self.x.shape[1:])
        if counts:
            self._note(stage.name, places, outcome)
        cost = self.costs.get(stage.name, Cost(0, 0, Passes(), 0.0))
        self.costs[stage.name] = Cost(
            max(cost.points, len(places)),
            cost.broken + (int(outcome.broken.sum()) if counts else 0),
            cost.passes + outcome.passes,
            cost.seconds + time.monotonic() - began,
        )
        robust = float(self.alive.mean())
        if self.stop_below is not None and robust < self.stop_below:
            raise Enough
        return outcome

    def _tell(
        self,
        stage: Stage,
        share: float,
        first: int,
        here: np.ndarray,
        places: np.ndarray,
        fallen: int,
        steps: int,
        running: int,
        executed: int,
    ) -> None:
        """Report what `drive` says of one group of a run's rows; `fallen`: in those
        before it, of which the board does not know yet."""
        alive = int(self.alive.sum()) - fallen - (len(here) - running)
        part = (first + len(here) * steps / stage.num_steps) / len(places)
        rest = (1 - part) * share
        if self.expected is not None:
            rest = max(rest, self.expected - self._spent - part * share)
        left = None if self.expected is None else rest * alive
        done = self._executed + executed
        self.on_stage(Progress(stage.name, part, alive, done, left))

    def pay(self, name: str, rows: int, size: int, looks: int) -> None:
        """Note `looks` forward and backward passes that a suite made itself, of `rows`
        examples in batches of `size` rows in all."""
        cost = self.costs.get(name, Cost(0, 0, Passes(), 0.0))
        more = Passes(looks * rows, looks * rows, looks * size, looks * size)
        points = max(cost.points, rows)
        self.costs[name] = cost._replace(points=points, passes=cost.passes + more)

    def _note(self, name: str, places: np.ndarray, outcome: Outcome) -> None:
        broken = self.broken_by.setdefault(name, np.zeros(len(self.y), bool))
        broken[places[outcome.broken]] = True
        self.refused[places[outcome.refused]] = True
        self.doubted[places[outcome.doubted]] = True
        fresh = self.alive[places]
        first = places[outcome.broken & fresh]
        taken = outcome.x_adv[outcome.broken & fresh]
        self.alive[first] = False
        self.rank[first] = self._ranks[name][first]
        self.x_adv[first] = taken
        closer = self.alive[places] & (outcome.margin < self.margin[places])
        self.margin[first] = outcome.margin[outcome.broken & fresh]
        self.margin[places] = np.minimum(self.margin[places], outcome.margin)
        self.x_adv[places[closer]] = outcome.x_adv[closer]


def clean_margin(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`[N]` float32: the label's logit minus the best other one.

    >>> clean_margin(np.array([[3.0, 1.0, 2.0]]), np.array([0])).tolist()
    [1.0]
    """
    usable = np.nan_to_num(logits.astype(np.float32), nan=0.0)
    rows = np.arange(len(y))
    own = usable[rows, y]
    rest = usable.copy()
    rest[rows, y] = -np.inf
    return own - rest.max(1)


def _in_order(outcomes: list[Outcome], order: np.ndarray, shape: Any) -> Outcome:
    """Groups put together, rows back where the caller had them."""
    if not outcomes:
        none = np.zeros(0, bool)
        points = np.zeros((0, *shape), np.float32)
        nothing = np.zeros(0, np.float32)
        return Outcome(none, points, nothing, none, points, none, Passes())
    back = np.argsort(order, kind="stable")
    total = Passes()
    for outcome in outcomes:
        total += outcome.passes

    def whole(name: str) -> np.ndarray:
        return np.concatenate([getattr(outcome, name) for outcome in outcomes])[back]

    names = ("broken", "x_adv", "margin", "doubted", "handed", "refused")
    return Outcome(**{name: whole(name) for name in names}, passes=total)
