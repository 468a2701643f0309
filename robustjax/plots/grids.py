"""Numbers on a plane: matrices with their values, and loss surfaces."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax.plots.base import INK, lightness, new_figure, signed_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

MAP = "cividis"  # rises in lightness; made for color-blind readers


def draw_matrix(
    matrices: Mapping[str, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    figure: "Figure | SubFigure | None" = None,
    *,
    x: str = "",
    y: str = "",
    label: str = "",
    limits: tuple[float, float] | None = None,
    signed: bool = False,
    form: str = ".2f",
) -> "Figure | SubFigure":
    """Matrices side by side on one color scale, each value written in its cell.

    Args:
      matrices: title -> values `[R, C]`; NaN: an empty cell.
      rows, columns: names, `R` and `C` of them.
      figure: to draw into; None: a new one.
      x, y: what columns and rows are, such as "target" and "source".
      label: of the color bar.
      limits: of the color scale; None: the smallest and largest value; signed: zero in
        the middle.
      signed: values around zero, such as differences, in a diverging map.
      form: how a value is written.

    Returns:
      The figure; `save` writes it.

    Raises:
      ValueError: a matrix of another shape than the names say.

    >>> figure = draw_matrix({"PGD": [[1.0, 0.2], [0.3, 0.9]]}, ["a", "b"], ["a", "b"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['1.00', '0.20', '0.30', '0.90']
    """
    values = {name: np.asarray(v, np.float64) for name, v in matrices.items()}
    shape = (len(rows), len(columns))
    for name, value in values.items():
        if value.shape != shape:
            raise ValueError(
                f"matrix {name!r} has shape {value.shape}; the names say {shape}."
            )
    every = np.concatenate([v[np.isfinite(v)] for v in values.values()])
    if limits is None:
        low, high = (every.min(), every.max()) if every.size else (0.0, 1.0)
        reach = max(-low, high)
        low, high = (-reach, reach) if signed else (low, high)
    else:
        low, high = limits
    if figure is None:
        width = 0.62 * len(columns) + 0.3
        margin = 1.0 + 0.075 * max(map(len, rows))
        figure = new_figure(margin + width * len(values), 1.5 + 0.5 * len(rows))
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    colors = signed_map() if signed else MAP
    image = None
    for axes, (name, value) in zip(panels, values.items(), strict=True):
        image = axes.imshow(value, cmap=colors, vmin=low, vmax=high, aspect="auto")
        for (row, column), cell in np.ndenumerate(value):
            if np.isfinite(cell):
                ground = image.to_rgba(np.array([[cell]]))[0, 0, :3]
                ink = "white" if lightness(ground) < 0.5 else "black"
                text = {"ha": "center", "va": "center", "fontsize": 9, "color": ink}
                axes.text(column, row, format(cell, form), **text)
        axes.set_xticks(range(shape[1]), columns)
        if max(map(len, columns)) > 5:
            axes.set_xticks(range(shape[1]), columns, rotation=40, ha="right")
        axes.set_yticks(range(shape[0]), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(name, color=INK, fontsize=11)
        axes.set_xlabel(x)
    panels[0].set_ylabel(y)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label=label, shrink=0.9)
    return figure


def draw_surface(
    a: Any,
    b: Any,
    values: Any,
    figure: "Figure | SubFigure | None" = None,
    *,
    x: str = "first direction",
    y: str = "second direction",
    title: str = "",
    label: str = "loss",
    limits: tuple[float, float] | None = None,
) -> "Figure | SubFigure":
    """A function around a point along two directions, as labeled level lines.

    Args:
      a: `[A]` steps along the first direction, rising; the point itself is 0.
      b: `[B]` steps along the second one.
      values: `[B, A]`, of the function at `point + a * first + b * second`.
      figure: to draw into; None: a new one.
      x, y: the directions, with units.
      title: above the panel.
      label: of the color bar.
      limits: of the color scale, such as one for several panels; None: of `values`.

    Returns:
      The figure; `save` writes it.

    Raises:
      ValueError: `values` is not `[B, A]`, or holds NaN or infinity.

    >>> a, b = np.linspace(-1, 1, 5), np.linspace(-1, 1, 3)
    >>> figure = draw_surface(a, b, b[:, None] + a[None] ** 2)
    >>> figure.axes[0].get_xlabel()
    'first direction'
    """
    a, b, values = (np.asarray(v, np.float64) for v in (a, b, values))
    if values.shape != (len(b), len(a)):
        raise ValueError(f"values has shape {values.shape}; give {(len(b), len(a))}.")
    if not np.isfinite(values).all():
        raise ValueError("values holds NaN or infinity; a surface needs numbers.")
    figure = new_figure(4.4, 3.4) if figure is None else figure
    axes = figure.subplots()
    low, high = (values.min(), values.max()) if limits is None else limits
    high = high if high > low else low + 1.0  # a constant has no level
    levels = np.linspace(low, high, 15)
    beyond = "neither" if limits is None else "both"
    filled = axes.contourf(a, b, values, levels, cmap=MAP, extend=beyond)
    if values.max() > values.min():
        inside = levels[1:-1:2]
        inside = inside[(inside > values.min()) & (inside < values.max())]
        grounds = filled.to_rgba(inside)[:, :3]
        ink = ["white" if lightness(c) < 0.5 else "black" for c in grounds]
        lines = axes.contour(a, b, values, inside, colors=ink, linewidths=0.7)
        axes.clabel(lines, fontsize=7, fmt="%.2g")
    axes.plot([0], [0], "o", color="white", markeredgecolor="black", markersize=6)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    small = 1e-3 * (high - low)
    bar = figure.colorbar(filled, ax=axes, label=label)
    bar.ax.yaxis.set_major_formatter(
        lambda value, place: "0" if abs(value) < small else f"{value:.2g}"
    )
    return figure
