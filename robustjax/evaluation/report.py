"""What an evaluation found, as values, as a table and as files."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from robustjax.evaluation import html, table
from robustjax.evaluation.checks import Flag
from robustjax.evaluation.intervals import wilson
from robustjax.logging import plain, provenance, replacing, write_json

SCHEMA_VERSION = 1
PARTS = ("robust", "x_adv", "size", "margin", "rank", "adv_prediction", "epsilons")
"""Fields of a ThreatReport that `examples.npz` holds, where there are any."""


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What one stage of a suite did, and what it cost.

    A pass is one example once through the model, forward or backward.

    points:   the examples it ran on.
    broken:   those of them that it broke, confirmed by the judge.
    forward, backward: passes that the attack asked for.
    executed_forward, executed_backward: passes that the machine ran, padding included.
    """

    name: str
    points: int
    broken: int
    forward: int
    backward: int
    executed_forward: int
    executed_backward: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class ThreatReport:
    """What the attacks found under one threat model.

    epsilon:   the budget (the mean, where each example has its own).
    broken_by: attack name -> `[N]` bool, confirmed adversarial examples, in the order
               in which the attacks ran.
    robust:    `[N]` bool: classified correctly, and broken by no attack.
    x_adv:     `[N, ...]`: the first adversarial point found; where there is none, that
               of the smallest margin (after a resume perhaps `x`; `x` if the example
               was wrong without an attack).
    size:      `[N]`: the norm of `x_adv - x`.
    norm:      `Linf`, `L2`, ..., for headings.
    adv_prediction: `[N]`: what the judge sees in `x_adv`; -1: the logits are NaN.
    margin:    `[N]` float32: the smallest margin that any attack reached, NaN unknown.
    stages:    what each stage cost.
    flipped:   index of examples that an attack broke and that the last pass classifies
               correctly. They stay broken; what only that pass finds wrong is broken by
               "last pass".
    unconfirmed: index of examples that an attack claimed and the judge never confirmed.
    notes:     what the suite leaves out, in sentences.
    further:   an interval for the fraction of all examples that the attack on the
               suite's sample might still break (see `notes`), or None.
    curve:     `{"epsilon": [...], "accuracy": [...]}`, accuracy against the budget.
    individual: every attack ran on every correct example, so that its accuracy is its
               own. Otherwise an attack ran on what the earlier ones left.
    epsilons:  `[N]`: the budget of each example, where each has its own.
    rank:      `[N]`: where a broken example stood in the ranking by margin when the
               stage that broke it began: the fraction of survivors before it (NaN:
               unbroken).
    """

    epsilon: float
    broken_by: dict[str, np.ndarray]
    robust: np.ndarray
    x_adv: np.ndarray
    size: np.ndarray
    norm: str = ""
    adv_prediction: np.ndarray | None = None
    margin: np.ndarray | None = None
    stages: tuple[StageCost, ...] = ()
    flipped: tuple[int, ...] = ()
    unconfirmed: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    further: tuple[float, float] | None = None
    curve: dict[str, list[float]] | None = None
    individual: bool = False
    epsilons: np.ndarray | None = None
    rank: np.ndarray | None = None

    @property
    def robust_accuracy(self) -> float:
        """The fraction that no attack broke."""
        return float(self.robust.mean())

    @property
    def broken(self) -> np.ndarray:
        """`[N]` bool: broken by an attack; not those that were wrong without one."""
        none = np.zeros(len(self.robust), bool)
        return np.any([none, *self.broken_by.values()], axis=0)

    @property
    def broken_by_name(self) -> np.ndarray:
        """`[N]` text: the first attack that broke each example, "" where none did."""
        width = max([1, *map(len, self.broken_by)])
        names = np.zeros(len(self.robust), f"<U{width}")
        for name, broken in self.broken_by.items():
            names[broken & (names == "")] = name
        return names


@dataclasses.dataclass(frozen=True)
class Report:
    """What `evaluate` returns.

    y, index, prediction: `[N]`, the labels, which examples, the clean predictions
             (-1: the logits are NaN).
    threats: name -> `ThreatReport`.
    flags:   what the model checks found.
    config:  what was asked for, as JSON knows it; `image_axes` ("HWC", "CHW", "HW") and
             `class_names` (a list) tell the page how to show an example.
    x:       `[N, ...]`: the clean inputs, for the pictures.
    checks:  name -> {"result": "ok" | "flagged" | "not run", "value", "message"}.
    check_passes: what the checks cost, in passes.
    randomized: of random models: {"passes", "robust_accuracy_mean", "low", "high"}.
    """

    y: np.ndarray
    index: np.ndarray
    prediction: np.ndarray
    threats: dict[str, ThreatReport]
    flags: list[Flag]
    config: dict[str, Any]
    x: np.ndarray | None = None
    suite: str | None = None
    checks: dict[str, Any] | None = None
    check_passes: int = 0
    randomized: dict[str, Any] | None = None

    @property
    def correct(self) -> np.ndarray:
        """`[N]` bool: classified correctly without an attack."""
        return self.prediction == self.y

    @property
    def robust(self) -> np.ndarray:
        """`[N]` bool: robust under every threat model."""
        return np.logical_and.reduce([t.robust for t in self.threats.values()])

    @property
    def clean_accuracy(self) -> float:
        """The fraction classified correctly without an attack."""
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """The fraction robust under every threat model (one: under that one)."""
        return float(self.robust.mean())

    def accuracy(self, threat: str, attack: str) -> float:
        """The accuracy under one attack alone; in a sequence: after it.

        In a sequence (`individual` is false) a late attack meets only what is left.
        What it broke by itself says nothing about its strength, so the accuracy that
        remains after it and all earlier ones is returned.
        """
        found = self.threats[threat]
        broken = found.broken_by[attack]
        if not found.individual:
            names = list(found.broken_by)
            so_far = names[: names.index(attack) + 1]
            broken = np.any([found.broken_by[name] for name in so_far], axis=0)
        return float((self.correct & ~broken).mean())

    def __str__(self) -> str:
        """The numbers as a table, the flags last, where a terminal shows them."""
        return table.render(self)

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON knows them; docs/report.md explains each."""
        total = len(self.y)
        classes = np.unique(self.y)
        rows = [self.y == c for c in classes]
        return {
            "schema_version": SCHEMA_VERSION,
            "suite": self.suite,
            "num_examples": total,
            "clean_accuracy": self.clean_accuracy,
            "clean_accuracy_interval": wilson(self.correct.sum(), total),
            "robust_accuracy": self.robust_accuracy,
            "robust_accuracy_interval": wilson(self.robust.sum(), total),
            "threats": {name: self._threat(name) for name in self.threats},
            "classes": {
                "class": classes.tolist(),
                "num_examples": [int(r.sum()) for r in rows],
                "clean_accuracy": [float(self.correct[r].mean()) for r in rows],
                "robust_accuracy": [float(self.robust[r].mean()) for r in rows],
            },
            "randomized": self.randomized,
            "flags": [flag._asdict() for flag in self.flags],
            "checks": self.checks,
            "check_passes": self.check_passes,
            "config": self.config,
        }

    def _threat(self, name: str) -> dict[str, Any]:
        found = self.threats[name]
        first = found.broken_by_name
        sizes = found.size[found.broken]
        budgets = found.epsilons
        costs = ("forward", "backward", "executed_forward", "executed_backward")
        return {
            "norm": found.norm,
            "epsilon": found.epsilon,
            "epsilon_range": None
            if budgets is None
            else [float(np.min(budgets)), float(np.max(budgets))],
            "robust_accuracy": found.robust_accuracy,
            "robust_accuracy_interval": wilson(found.robust.sum(), len(found.robust)),
            "individual": found.individual,
            "accuracy": {a: self.accuracy(name, a) for a in found.broken_by},
            "broken": {a: int(b.sum()) for a, b in found.broken_by.items()},
            "broken_first": {a: int((first == a).sum()) for a in found.broken_by},
            "size_of_broken": None
            if not len(sizes)
            else {f.__name__: float(f(sizes)) for f in (np.min, np.median, np.max)},
            "stages": [dataclasses.asdict(stage) for stage in found.stages],
            "passes": {c: sum(getattr(s, c) for s in found.stages) for c in costs},
            "flipped": list(found.flipped),
            "unconfirmed": list(found.unconfirmed),
            "further": found.further,
            "curve": found.curve,
            "notes": list(found.notes),
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.json`, `examples.npz` and `report.html` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        origin = provenance()
        # The run began earlier: what provenance() calls so is the time of writing.
        origin["written"] = origin.pop("started")
        with replacing(folder / "examples.npz") as path, open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **_arrays(self))
        write_json(folder / "report.json", self.summary() | {"provenance": origin})
        with replacing(folder / "report.html") as path:
            path.write_text(html.render(self, plain(origin)), encoding="ascii")
        return folder


def _arrays(report: Report) -> dict[str, np.ndarray]:
    """What `examples.npz` holds."""
    arrays = {name: getattr(report, name) for name in ("y", "index", "prediction")}
    for name, found in report.threats.items():
        for part in PARTS:
            if getattr(found, part) is not None:
                arrays[f"{name}/{part}"] = getattr(found, part)
        arrays[f"{name}/broken_by_name"] = found.broken_by_name
        for attack, broken in found.broken_by.items():
            arrays[f"{name}/broken_by/{attack}"] = broken
    return arrays
