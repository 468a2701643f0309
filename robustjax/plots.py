"""Pictures: accuracy against epsilon, and what the attacks did.

Matplotlib is imported by the functions that draw; no window and no global state.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

# Blue and orange of Okabe and Ito first: told apart by everybody.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, WRONG, RIGHT = "#333333", "#C0392B", "#1E8449"


class Curve(NamedTuple):
    """Accuracy against epsilon.

    epsilon:  `[E]`, rising.
    accuracy: `[E]`, in [0, 1].
    """

    epsilon: Sequence[float]
    accuracy: Sequence[float]


class Attacked(NamedTuple):
    """One example and what became of it, for `draw_examples`.

    x:      `[H, W, C]` clean, in [0, 1].
    y:      its class, as text.
    x_adv:  net -> `[H, W, C]`, the attacked image.
    answer: net -> the class that the net sees in it, as text.
    title:  of the column's group, such as the threat.
    """

    x: np.ndarray
    y: str
    x_adv: Mapping[str, np.ndarray]
    answer: Mapping[str, str]
    title: str


def new_figure(width: float, height: float) -> "Figure":
    """An empty white figure in inches; `figure.savefig(path)` writes it."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=110, facecolor="white", layout="constrained")


def draw_curves(
    curves: Mapping[str, Mapping[str, Curve]],
    marked: Mapping[str, float] | None = None,
    figure: "Figure | SubFigure | None" = None,
    *,
    attack: str = "attack",
) -> "Figure | SubFigure":
    """Accuracy against epsilon: a panel per threat, a line per net.

    Args:
      curves: panel -> net -> `Curve`.
      marked: panel -> the epsilon that is marked by a dotted line.
      figure: to draw into; None: a new one.
      attack: what the accuracy was measured under, for the label.

    Returns:
      The figure; `save` writes it.
    """
    if figure is None:
        figure = new_figure(3 * len(curves), 3)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (panel, nets) in zip(panels, curves.items(), strict=True):
        if marked and panel in marked:
            axes.axvline(marked[panel], color="#999999", linestyle=":", linewidth=1)
        for color, (net, curve) in zip(COLORS, nets.items(), strict=False):
            axes.plot(
                curve.epsilon,
                curve.accuracy,
                color=color,
                linewidth=2,
                marker="o",
                markersize=4,
                label=net,
                clip_on=False,
            )
        axes.set(xlim=(0, None), ylim=(0, 1), xlabel=f"{panel} budget epsilon")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(f"accuracy under {attack}")
    panels[0].legend(frameon=False, loc="lower left", title="trained")
    return figure


def draw_examples(
    examples: Sequence[Attacked], figure: "Figure | SubFigure | None" = None
) -> "Figure | SubFigure":
    """Images, perturbations and predictions: a column per example.

    Rows: the clean image; then for each net the perturbation (gray is none, brighter
    is more light) and the attacked image with the class that the net sees, red where
    it is wrong.

    Args:
      examples: the columns; neighbors of one title are grouped, and the largest change
        in a group is drawn as black or white.
      figure: to draw into; None: a new one.

    Returns:
      The figure; `save` writes it.
    """
    nets = list(examples[0].x_adv)
    if figure is None:
        figure = new_figure(1.2 + 0.9 * len(examples), 0.8 + 0.9 * (1 + 2 * len(nets)))
    rows, columns = 1 + 2 * len(nets), len(examples)
    groups = list(dict.fromkeys(example.title for example in examples))
    # A thin empty column between two groups.
    widths, place = [], []
    for i, example in enumerate(examples):
        if i and example.title != examples[i - 1].title:
            widths.append(0.35)
        place.append(len(widths))
        widths.append(1.0)
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths)
    largest = {
        group: max(
            float(np.abs(x_adv - example.x).max())
            for example in examples
            if example.title == group
            for x_adv in example.x_adv.values()
        )
        for group in groups
    }
    for i in range(columns):
        example = examples[i]
        panels = [figure.add_subplot(grid[row, place[i]]) for row in range(rows)]
        _show(panels[0], example.x)
        panels[0].set_xlabel(example.y, color=INK, labelpad=1)
        for number, net in enumerate(nets):
            delta, attacked = panels[1 + 2 * number], panels[2 + 2 * number]
            change = example.x_adv[net] - example.x
            reach = largest[example.title] or 1.0
            _show(delta, 0.5 + 0.5 * change / reach)
            _show(attacked, example.x_adv[net])
            answer = example.answer[net]
            color = RIGHT if answer == example.y else WRONG
            attacked.set_xlabel(answer, color=color, labelpad=1, fontweight="bold")
            for panel in (delta, attacked):
                panel.spines[:].set_color(color)
                panel.spines[:].set_linewidth(1.2)
        if i == 0:
            names = ["clean image"]
            for net in nets:
                names += [f"{net}:\nperturbation", f"{net}:\nattacked, sees"]
            for panel, name in zip(panels, names, strict=True):
                panel.set_ylabel(
                    name, rotation=0, ha="right", va="center", color=INK, labelpad=6
                )
        if i == 0 or example.title != examples[i - 1].title:
            panels[0].set_title(example.title, loc="left", color=INK, fontsize=11)
    return figure


def _show(axes, image: np.ndarray) -> None:
    image = np.clip(np.asarray(image, np.float32), 0, 1)
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def draw_both(
    curves: Mapping[str, Mapping[str, Curve]],
    examples: Sequence[Attacked],
    marked: Mapping[str, float] | None = None,
    *,
    attack: str = "attack",
) -> "Figure":
    """`draw_curves` above `draw_examples`, in one figure."""
    figure = new_figure(9, 8.2)
    parts = figure.subfigures(2, 1, height_ratios=(3, 5.2), squeeze=False)
    top, bottom = np.ravel(parts)
    draw_curves(curves, marked, top, attack=attack)
    draw_examples(examples, bottom)
    return figure


def save(figure: "Figure | SubFigure", path: str | os.PathLike[str]) -> None:
    """Write the figure as PNG, in a folder that is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.figure.savefig(path, format="png")  # a part of a figure: all of it
