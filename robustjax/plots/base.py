"""What all pictures share: the ground, the colors, and how to write a file."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure, SubFigure

# Blue and orange of Okabe and Ito first: told apart by everybody.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
INK, WRONG, RIGHT = "#333333", "#C0392B", "#1E8449"
# Below zero dark blue, zero gray, above light orange: lightness rises all the way.
SIGNED = ("#00233F", "#0072B2", "#A9A9A9", "#F0B43C", "#FFF6C8")


def new_figure(width: float, height: float) -> "Figure":
    """An empty white figure in inches.

    >>> new_figure(3, 2).get_size_inches().tolist()
    [3.0, 2.0]
    """
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=110, facecolor="white", layout="constrained")


def save(figure: "Figure | SubFigure", path: str | os.PathLike[str]) -> None:
    """Write the figure as PNG, in a folder that is made where it is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(new_figure(1, 1), Path(folder) / "new" / "one.png")
    ...     (Path(folder) / "new" / "one.png").read_bytes()[1:4]
    b'PNG'
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.figure.savefig(path, format="png")  # a part of a figure: all of it


def style(number: int) -> dict[str, Any]:
    """Color, line style and marker of the line `number`, as `axes.plot` takes them.

    The first 6 lines differ in color, neighbors in line style and marker too; no two of
    the first 24 are the same.

    >>> style(1)
    {'color': '#D55E00', 'linestyle': '--', 'marker': 's'}
    """
    turn = number // len(COLORS)
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": LINE_STYLES[(number + turn) % len(LINE_STYLES)],
        "marker": MARKERS[(number + turn) % len(MARKERS)],
    }


def tidy(axes: "Axes") -> None:
    """No frame above and at the right, a pale grid behind the lines.

    >>> axes = new_figure(2, 2).subplots()
    >>> tidy(axes)
    >>> axes.spines["top"].get_visible()
    False
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def signed_map() -> "Colormap":
    """The diverging color map of `SIGNED`: zero in the middle, lightness rising.

    >>> signed_map()(0.5)[:3] == signed_map()(0.5)[:1] * 3  # gray
    True
    """
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", SIGNED, N=257)


def lightness(color: Any) -> float:
    """How light a color (red, green, blue in [0, 1]) looks: 0 black, 1 white (CIE L*).

    >>> round(lightness((1, 1, 1)), 2), round(lightness((0, 0, 1)), 2)
    (1.0, 0.32)
    """
    color = np.asarray(color, np.float64)
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    if luminance <= (6 / 29) ** 3:
        return luminance * (29 / 3) ** 3 / 100
    return 1.16 * luminance ** (1 / 3) - 0.16
