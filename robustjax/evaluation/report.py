"""What an evaluation found, as values, as a table and as files."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from robustjax.evaluation.checks import Flag
from robustjax.logging import provenance, write_json


@dataclasses.dataclass(frozen=True)
class ThreatReport:
    """What the attacks found under one threat model.

    epsilon:   the budget (the mean, where each example has its own).
    broken_by: attack name -> `[N]` bool, confirmed adversarial examples.
    robust:    `[N]` bool: classified correctly, and broken by no attack.
    x_adv:     `[N, ...]`: the first adversarial point found; where there is none, the
               last attempt (`x` if the example was wrong without an attack).
    size:      `[N]`: the norm of `x_adv - x`.
    """

    epsilon: float
    broken_by: dict[str, np.ndarray]
    robust: np.ndarray
    x_adv: np.ndarray
    size: np.ndarray

    @property
    def robust_accuracy(self) -> float:
        """The fraction that no attack broke."""
        return float(self.robust.mean())


@dataclasses.dataclass(frozen=True)
class Report:
    """What `evaluate` returns.

    y, index, prediction: `[N]`, the labels, which examples, the clean predictions.
    threats: name -> `ThreatReport`.
    flags:   what the model checks found.
    """

    y: np.ndarray
    index: np.ndarray
    prediction: np.ndarray
    threats: dict[str, ThreatReport]
    flags: list[Flag]
    config: dict[str, Any]

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
        """The accuracy under one attack alone."""
        broken = self.threats[threat].broken_by[attack]
        return float((self.correct & ~broken).mean())

    def __str__(self) -> str:
        """A table: a row for each attack, a column for each threat model."""
        names = list(self.threats)
        attacks = list(next(iter(self.threats.values())).broken_by)
        rows = [["clean"] + [f"{self.clean_accuracy:.3f}"] * len(names)]
        for attack in attacks:
            rows.append([attack] + [f"{self.accuracy(n, attack):.3f}" for n in names])
        if len(attacks) > 1:
            worst = [f"{self.threats[n].robust_accuracy:.3f}" for n in names]
            rows.append(["all attacks", *worst])
        head = ["accuracy"] + [f"{n} {self.threats[n].epsilon:.4g}" for n in names]
        table = [head, *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        if len(names) > 1:
            lines.append(f"robust under every threat: {self.robust_accuracy:.3f}")
        lines += [f"!! {flag.name}: {flag.message}" for flag in self.flags]
        return "\n".join(lines) + f"\n{len(self.y)} examples"

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON knows them."""
        return {
            "num_examples": len(self.y),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "threats": {
                name: {
                    "epsilon": found.epsilon,
                    "robust_accuracy": found.robust_accuracy,
                    "accuracy": {a: self.accuracy(name, a) for a in found.broken_by},
                }
                for name, found in self.threats.items()
            },
            "flags": [flag._asdict() for flag in self.flags],
            "config": self.config,
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.json` and `examples.npz` (per example) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"y": self.y, "index": self.index, "prediction": self.prediction}
        for name, found in self.threats.items():
            arrays |= {f"{name}/robust": found.robust, f"{name}/x_adv": found.x_adv}
            arrays[f"{name}/size"] = found.size
            for attack, broken in found.broken_by.items():
                arrays[f"{name}/broken_by/{attack}"] = broken
        temporary = folder / "examples.npz.saving"
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(temporary, folder / "examples.npz")
        write_json(
            folder / "report.json", self.summary() | {"provenance": provenance()}
        )
        return folder
