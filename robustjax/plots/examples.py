"""Images: what the attacks did to them, and grids of images and perturbations."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from robustjax.plots.base import INK, RIGHT, WRONG, new_figure, signed_map
from robustjax.plots.lines import Curve, draw_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


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

    >>> x = np.full((4, 4, 1), 0.5)
    >>> one = Attacked(x, "cat", {"net": x + 0.1}, {"net": "dog"}, "Linf 0.1")
    >>> [axes.get_xlabel() for axes in draw_examples([one]).axes]
    ['cat', '', 'dog']
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


def _show(axes: "Axes", image: np.ndarray) -> None:
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
    """`draw_curves` above `draw_examples`, in one figure.

    >>> x = np.full((4, 4, 1), 0.5)
    >>> one = Attacked(x, "cat", {"net": x + 0.1}, {"net": "dog"}, "Linf 0.1")
    >>> len(draw_both({"Linf": {"net": Curve([0.0, 0.1], [1.0, 0.4])}}, [one]).axes)
    4
    """
    figure = new_figure(9, 8.2)
    parts = figure.subfigures(2, 1, height_ratios=(3, 5.2), squeeze=False)
    top, bottom = np.ravel(parts)
    draw_curves(curves, marked, top, attack=attack)
    draw_examples(examples, bottom)
    return figure


def draw_images(
    rows: Mapping[str, Sequence[np.ndarray]],
    columns: Sequence[str] = (),
    figure: "Figure | SubFigure | None" = None,
    *,
    signed: Collection[str] = (),
    shared: bool = False,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> "Figure | SubFigure":
    """A grid of images; signed rows (perturbations, gradients) around gray for zero.

    A signed value v is drawn as v / max|v|. One channel: in the map `SIGNED`, dark blue
    below zero, light orange above. Three channels: as the color 0.5 + 0.5 v.

    Args:
      rows: name -> images `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, equally many in all;
        sizes may differ. Unsigned ones lie in [0, 1].
      columns: names above the first row.
      figure: to draw into; None: a new one.
      signed: the names of the signed rows.
      shared: one max|v| for a signed row, so that lengths compare; False: one for
        each image, so that small ones show their pattern.
      captions: row -> a text below each of its images.

    Returns:
      The figure; `save` writes it.

    Raises:
      ValueError: rows of different lengths, or a name in `signed` or `captions` that is
        no row.

    >>> x = np.eye(4)
    >>> figure = draw_images({"image": [x], "gradient": [x - 0.5]}, signed=["gradient"])
    >>> figure.axes[1].get_images()[0].get_clim()
    (-1.0, 1.0)
    """
    captions = captions or {}
    width = len(next(iter(rows.values()), ()))
    for name in (*signed, *captions):
        if name not in rows:
            raise ValueError(f"{name!r} is no row; the rows are {', '.join(rows)}.")
    for name, images in rows.items():
        if len(images) != width:
            raise ValueError(
                f"row {name!r} has {len(images)} images, the first {width}."
            )
    if figure is None:
        figure = new_figure(1.3 + width, 0.4 + 1.12 * len(rows))
    panels = figure.subplots(len(rows), width, squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        largest = [float(np.abs(image).max()) for image in images]
        for i, (axes, image) in enumerate(zip(line, images, strict=True)):
            image = np.asarray(image, np.float32)
            image = image[..., None] if image.ndim == 2 else image
            if name not in signed:
                _show(axes, image)
            else:
                image = image / ((max(largest) if shared else largest[i]) or 1.0)
                if image.shape[-1] == 1:
                    limits = {"vmin": -1.0, "vmax": 1.0}
                    axes.imshow(image[..., 0], cmap=signed_map(), **limits)
                    axes.set(xticks=[], yticks=[])
                else:
                    _show(axes, 0.5 + 0.5 * image)
            if name in captions:
                axes.set_xlabel(captions[name][i], color=INK, labelpad=2, fontsize=9)
        line[0].set_ylabel(
            name, rotation=0, ha="right", va="center", color=INK, labelpad=6
        )
    for axes, name in zip(panels[0], columns, strict=False):
        axes.set_title(name, color=INK, fontsize=10)
    return figure
