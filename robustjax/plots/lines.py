"""Lines over one axis: accuracy against epsilon, brackets, anything with intervals."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from robustjax.plots.base import COLORS, INK, new_figure, style, tidy

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure


class Curve(NamedTuple):
    """Accuracy against epsilon.

    epsilon:  `[E]`, rising.
    accuracy: `[E]`, in [0, 1].
    """

    epsilon: Sequence[float]
    accuracy: Sequence[float]


class Line(NamedTuple):
    """Values `y` against `x`, for `draw_lines`.

    x, y:      `[N]` each.
    low, high: `[N]` each, the ends of an interval that is shaded; or None.
    theory:    a thin gray line without markers, which says what is expected.
    """

    x: Any
    y: Any
    low: Any = None
    high: Any = None
    theory: bool = False


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

    >>> figure = draw_curves({"Linf": {"net": Curve([0.0, 0.1], [1.0, 0.4])}})
    >>> figure.axes[0].get_xlabel()
    'Linf budget epsilon'
    """
    if figure is None:
        figure = new_figure(3 * len(curves), 3)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (panel, nets) in zip(panels, curves.items(), strict=True):
        if marked and panel in marked:
            axes.axvline(marked[panel], color="#999999", linestyle=":", linewidth=1)
        for number, (net, curve) in enumerate(nets.items()):
            axes.plot(
                curve.epsilon,
                curve.accuracy,
                **style(number),
                linewidth=2,
                markersize=4,
                label=net,
                clip_on=False,
            )
        axes.set(xlim=(0, None), ylim=(0, 1), xlabel=f"{panel} budget epsilon")
        tidy(axes)
    panels[0].set_ylabel(f"accuracy under {attack}")
    panels[0].legend(frameon=False, loc="lower left", title="trained")
    return figure


def draw_lines(
    lines: Mapping[str, Line],
    figure: "Figure | SubFigure | None" = None,
    *,
    x: str = "",
    y: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> "Figure | SubFigure":
    """One panel: a line for each name, with its interval shaded.

    Args:
      lines: name -> `Line`; a name that starts with `_` is not in the legend.
      figure: to draw into; None: a new one.
      x, y: what stands on the axes, with units.
      title: above the panel.
      log_x, log_y: logarithmic axes.

    Returns:
      The figure; `save` writes it.

    Raises:
      ValueError: a line's arrays differ in length.

    >>> found = Line([1, 10, 100], [1, 3, 10], low=[0.9, 2, 9], high=[1.1, 4, 11])
    >>> figure = draw_lines({"measured": found}, x="d", log_x=True, log_y=True)
    >>> figure.axes[0].get_xscale(), len(figure.axes[0].collections)
    ('log', 1)
    """
    for name, line in lines.items():
        sizes = {len(v) for v in line[:4] if v is not None}
        if len(sizes) != 1:
            raise ValueError(f"line {name!r} has arrays of lengths {sorted(sizes)}.")
    figure = new_figure(4.5, 3.4) if figure is None else figure
    axes = figure.subplots()
    number = 0
    for name, line in lines.items():
        if line.theory:
            axes.plot(line.x, line.y, color=INK, linewidth=1, label=name, zorder=1)
            continue
        look = style(number)
        number += 1
        axes.plot(line.x, line.y, **look, linewidth=1.8, markersize=4.5, label=name)
        if line.low is not None and line.high is not None:
            axes.fill_between(
                *(line.x, line.low, line.high),
                color=look["color"],
                alpha=0.2,
                linewidth=0,
            )
    if log_x:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, axes.get_xlim())
    if log_y:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, axes.get_ylim())
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    tidy(axes)
    if any(not name.startswith("_") for name in lines):
        axes.legend(frameon=False, fontsize=9)
    return figure


def _plain_ticks(axis: "Axis", limits: tuple[float, float]) -> None:
    """1, 2, 5, 10 instead of powers, where a logarithmic axis is less than 1:1000."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if 1e-3 < limits[0] and limits[1] < 1000 * min(limits[0], 100.0):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def draw_bracket(
    epsilon: Any,
    certified: Any,
    empirical: Any,
    figure: "Figure | SubFigure | None" = None,
    *,
    x: str = "budget epsilon",
    title: str = "",
    attack: str = "attacked",
) -> "Figure | SubFigure":
    """Certified and empirical accuracy against epsilon; the unknown zone is shaded.

    Args:
      epsilon: `[E]`, rising.
      certified: `[E]` accuracies that are proven, a lower bound.
      empirical: `[E]` accuracies that attacks left, an upper bound.
      figure: to draw into; None: a new one.
      x: what stands on the axis.
      title: above the panel.
      attack: the name of the upper line.

    Returns:
      The figure; `save` writes it.

    Raises:
      ValueError: the lower bound is above the upper one somewhere, or NaN.

    >>> figure = draw_bracket([0.0, 1.0], [0.9, 0.2], [0.9, 0.5], x="L2 epsilon")
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['unknown', 'attacked', 'certified']
    """
    epsilon, low, high = map(np.asarray, (epsilon, certified, empirical))
    crossed = ~(low <= high)
    if crossed.any():
        i = int(np.flatnonzero(crossed)[0])
        raise ValueError(
            f"at epsilon {epsilon[i]:g} the certified accuracy {low[i]:g} is not below "
            f"the empirical {high[i]:g}: one of the two is wrong."
        )
    figure = new_figure(4.5, 3.2) if figure is None else figure
    axes = figure.subplots()
    shade: dict[str, Any] = {"facecolor": "#DDDDDD", "edgecolor": "#BBBBBB"}
    shade |= {"hatch": "///", "linewidth": 0, "label": "unknown"}
    axes.fill_between(epsilon, low, high, **shade)
    axes.plot(epsilon, high, "--", color=COLORS[1], linewidth=2, label=attack)
    axes.plot(epsilon, low, "-", color=COLORS[0], linewidth=2, label="certified")
    axes.set(xlim=(0, epsilon[-1]), ylim=(0, 1), xlabel=x, ylabel="accuracy")
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
