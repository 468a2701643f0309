"""The curves of a run, drawn from its `metrics.jsonl` alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax import plots
from robustjax.training.run_folder import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

Rows = Sequence[Mapping[str, Any]]

# Panel -> what it shows: kind of row, metric, label. A panel without data is left out.
PANELS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "loss": (("train", "loss", "training batches"), ("validate", "loss", "held out")),
    "accuracy, training batches": (
        ("train", "clean_accuracy", "clean"),
        ("train", "accuracy", "shown to the net"),
    ),
    "accuracy, held out": (
        ("validate", "clean_accuracy", "clean"),
        ("validate", "robust_accuracy", "robust"),
    ),
    "robust accuracy, on which images": (
        ("validate", "train_robust_accuracy", "training images"),
        ("validate", "train_pgd_accuracy", "training images"),  # where that is missing
        ("validate", "robust_accuracy", "held out"),
        ("validate", "robust_gap", "gap"),
    ),
    "accuracy, training images under attack": (
        ("validate", "train_fgsm_accuracy", "FGSM"),
        ("validate", "train_pgd_accuracy", "PGD"),
        ("validate", "bn_batch_fgsm_accuracy", "FGSM, mode batch"),
        ("validate", "bn_batch_pgd_accuracy", "PGD, mode batch"),
    ),
    "gradient norms": (
        ("validate", "input_gradient_norm", "of the input"),
        ("train", "gradient_norm", "of the weights"),
    ),
    "local linearity": (
        ("validate", "alignment", "alignment of gradients"),
        ("validate", "nonlinearity", "nonlinearity"),
    ),
    "norm of the weights": (("train", "weight_norm", "_"),),
}
LOGARITHMIC = ("loss", "gradient norms")


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run, in order: kind "train" or "validate", step, numbers.

    Raises:
      FileNotFoundError: the folder has no `metrics.jsonl`.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give the folder that was `out` of a training."
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_run(
    rows: Rows | str | Path, learning_rate: Callable[[int], Any] | None = None
) -> "Figure":
    """Draw loss, accuracies, the gap to held-out data, norms, and the learning rate.

    What was not measured has no panel: `monitors.overfitting`, `smoothness`,
    `catastrophic_overfitting` and `with_norms` measure it.

    Args:
      rows: the run's folder, or `FitResult.history`.
      learning_rate: step -> rate; with `Method.repeats` = m, of update `m * step`.

    Returns:
      The figure; `plots.save` writes it.

    Raises:
      FileNotFoundError: the folder has no `metrics.jsonl`.
      ValueError: there is nothing to draw in it.

    >>> row = {"kind": "train", "loss": 1.0, "accuracy": 0.5}
    >>> figure = draw_run([{**row, "step": t} for t in (1, 2)], lambda step: 0.1)
    >>> [axes.get_title("left") for axes in figure.axes]
    ['loss', 'accuracy, training batches', 'learning rate']
    """
    if isinstance(rows, str | Path):
        rows = read_rows(rows)
    panels = {}
    for title, metrics in PANELS.items():
        found: dict[str, plots.Line] = {}
        for kind, name, label in metrics:
            line = _line(rows, kind, name)
            if len(line.x) and label not in found:
                found[label] = line
        if found:
            panels[title] = found
    if learning_rate is not None and rows:
        steps = np.array(sorted({row["step"] for row in rows}))
        rates = [float(learning_rate(int(step))) for step in steps]
        panels["learning rate"] = {"_": plots.Line(steps, np.array(rates))}
    if not panels:
        raise ValueError("the run has no rows with known metrics: nothing to draw.")
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = plots.new_figure(4.0 * columns, 2.9 * height)
    parts = np.ravel(figure.subfigures(height, columns, squeeze=False))
    for part, (title, lines) in zip(parts, panels.items(), strict=False):
        _draw(part, title, lines)
    return figure


def _line(rows: Rows, kind: str, name: str) -> plots.Line:
    """Step and value where the metric is a number (JSON has no NaN: null)."""
    found = [
        (row["step"], row[name])
        for row in rows
        if row["kind"] == kind and row.get(name) is not None
    ]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return plots.Line(np.array(steps), np.array(values, float))


def _draw(part: "SubFigure", title: str, lines: Mapping[str, plots.Line]) -> None:
    values = np.concatenate([line.y for line in lines.values()])
    logarithmic = title in LOGARITHMIC and float(values.min()) > 0
    plots.draw_lines(lines, part, x="step", title=title, log_y=logarithmic)
    axes = part.axes[0]
    for drawn, line in zip(axes.lines, lines.values(), strict=True):
        drawn.set_markevery(max(1, len(line.x) // 12))  # more would hide the line
    if "accuracy" in title:
        axes.set_ylim(min(0.0, float(values.min())) - 0.02, 1.02)
