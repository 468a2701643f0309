"""Pictures: accuracies, lines, matrices, images, perturbations and loss surfaces.

Every `draw_` function takes plain arrays, draws one thing into a new figure or into one
that is given (a part of `figure.subfigures(...)`: pictures compose), and returns it;
`save` writes it. Matplotlib is imported when something is drawn; there is no window and
no global state.

Colors are those of Okabe and Ito, which color-blind readers tell apart; lines differ in
style and marker too, and color maps rise in lightness, so that a gray print says the
same. The ground is white and opaque: a picture reads alike on dark and on light pages.
"""

from robustjax.plots.base import (
    COLORS,
    INK,
    LINE_STYLES,
    MARKERS,
    RIGHT,
    SIGNED,
    WRONG,
    new_figure,
    save,
    style,
    tidy,
)
from robustjax.plots.examples import (
    Attacked,
    draw_both,
    draw_examples,
    draw_images,
)
from robustjax.plots.grids import draw_matrix, draw_surface
from robustjax.plots.lines import (
    Curve,
    Line,
    draw_bracket,
    draw_curves,
    draw_lines,
)

__all__ = [
    "COLORS",
    "INK",
    "LINE_STYLES",
    "MARKERS",
    "RIGHT",
    "SIGNED",
    "WRONG",
    "Attacked",
    "Curve",
    "Line",
    "draw_both",
    "draw_bracket",
    "draw_curves",
    "draw_examples",
    "draw_images",
    "draw_lines",
    "draw_matrix",
    "draw_surface",
    "new_figure",
    "save",
    "style",
    "tidy",
]
