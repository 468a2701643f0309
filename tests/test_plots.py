"""The pictures show the numbers they are given, and everybody can read them."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from robustjax import plots
from robustjax.plots.base import lightness, signed_map

GROUND = 0.22  # at least so much darker than white, in CIE L* of 1


def matrix(**options):
    return plots.draw_matrix(
        {"one": [[0.0, 0.5], [1.0, np.nan]]}, ["a", "b"], ["c", "d"], **options
    )


def surface():
    a, b = np.linspace(-1, 1, 7), np.linspace(0, 2, 5)
    return plots.draw_surface(a, b, a[None] + 2 * b[:, None], label="loss")


PICTURES = {
    "curves": lambda: plots.draw_curves({"Linf": {"a": plots.Curve([0, 1], [1, 0])}}),
    "lines": lambda: plots.draw_lines({"a": plots.Line([1, 2], [3, 4])}),
    "bracket": lambda: plots.draw_bracket([0, 1], [1, 0], [1, 0.5]),
    "matrix": matrix,
    "surface": surface,
    "images": lambda: plots.draw_images({"a": [np.eye(3)]}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_has_an_opaque_white_ground(name, tmp_path):
    plots.save(PICTURES[name](), tmp_path / "one.png")
    image = matplotlib.image.imread(tmp_path / "one.png")
    assert (image[..., 3] == 1).all()
    assert (image[0] == 1).all()
    assert image.std() > 0.01


def test_importing_plots_does_not_import_matplotlib():
    code = "import sys, robustjax.plots; print('matplotlib' in sys.modules)"
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_lines_are_told_apart_without_color_and_none_repeats():
    looks = [tuple(plots.style(i).values()) for i in range(24)]
    assert len(set(looks)) == 24
    for one, next_one in zip(looks, looks[1:], strict=False):
        assert all(a != b for a, b in zip(one, next_one, strict=True))
    for color in (*plots.COLORS, plots.INK, plots.WRONG, plots.RIGHT):
        assert lightness(to_rgb(color)) < 1 - GROUND


def test_more_nets_than_colors_are_all_drawn():
    nets = {str(i): plots.Curve([0, 1], [1, i / 9]) for i in range(9)}
    lines = plots.draw_curves({"Linf": nets}).axes[0].get_lines()
    assert [line.get_ydata()[1] for line in lines] == [i / 9 for i in range(9)]


@pytest.mark.parametrize(("color", "expected"), [("#777777", 0.5003), ("red", 0.5324)])
def test_lightness_is_that_of_cie(color, expected):
    # L* 50.03 and 53.24: the published values of these colors (sRGB, D65).
    assert lightness(to_rgb(color)) == pytest.approx(expected, abs=2e-4)


def test_the_signed_map_rises_in_lightness_and_is_gray_at_zero():
    light = [lightness(signed_map()(v)[:3]) for v in np.linspace(0, 1, 65)]
    assert (np.diff(light) > 0).all()
    red, green, blue = signed_map()(0.5)[:3]
    assert red == green == blue


def test_a_matrix_shows_its_values_on_one_scale():
    axes = matrix(x="target", y="source").axes[0]
    assert axes.get_images()[0].get_clim() == (0, 1)
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.50", "1.00"]
    at = [tuple(map(int, text.get_position())) for text in axes.texts]
    assert at == [(0, 0), (1, 0), (0, 1)]  # column, row
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["c", "d"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("target", "source")


@pytest.mark.parametrize("signed", [False, True])
def test_text_in_a_matrix_is_legible_on_its_cell(signed):
    values = np.linspace(-1, 1, 25).reshape(5, 5)
    names = list("abcde")
    figure = plots.draw_matrix({"one": values}, names, names, signed=signed)
    axes = figure.axes[0]
    image = axes.get_images()[0]
    for text, value in zip(axes.texts, values.ravel(), strict=True):
        ground = lightness(image.to_rgba(np.array([[value]]))[0, 0, :3])
        assert abs(lightness(to_rgb(text.get_color())) - ground) > 0.4


def test_a_signed_matrix_has_zero_in_the_middle():
    figure = plots.draw_matrix({"d": [[-0.1, 0.4]]}, ["a"], ["b", "c"], signed=True)
    assert figure.axes[0].get_images()[0].get_clim() == (-0.4, 0.4)


def test_perturbations_are_drawn_around_zero():
    x, small = np.full((2, 2, 1), 0.5), np.array([[0.1, -0.05], [0, 0]])
    images = {"image": [x, x], "delta": [small, 4 * small]}
    for shared, factor in ((False, 1.0), (True, 0.25)):
        figure = plots.draw_images(
            images,
            ["first", "second"],
            signed=["delta"],
            shared=shared,
            captions={"delta": ["3", "4"]},
        )
        _, _, one, two = figure.axes
        assert one.get_images()[0].get_clim() == (-1, 1)
        shown = [axes.get_images()[0].get_array() for axes in (one, two)]
        np.testing.assert_allclose(shown[0], 10 * factor * small, atol=1e-6)
        np.testing.assert_allclose(shown[1], 10 * small, atol=1e-6)
        assert [one.get_xlabel(), two.get_xlabel()] == ["3", "4"]
    assert figure.axes[0].get_title() == "first"


def test_colored_perturbations_are_colors_around_gray():
    delta = np.zeros((2, 2, 3))
    delta[0, 0, 1] = -0.2
    figure = plots.draw_images({"delta": [delta]}, signed=["delta"])
    shown = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(shown, 0.5 + 2.5 * delta, atol=1e-6)


def test_a_surface_shows_the_values_where_they_belong():
    axes = surface().axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert (left, right, bottom, top) == (-1, 1, 0, 2)
    (point,) = axes.get_lines()
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (0, 0)
    plots.draw_surface([0, 1], [0, 1], np.zeros((2, 2)))  # constant: no level lines


def test_lines_shade_intervals_and_leave_theory_without_markers():
    lines = {
        "measured": plots.Line([1, 10], [1, 2], [0.5, 1], [2, 3]),
        "theory": plots.Line([1, 10], [1, 2], theory=True),
        "_hidden": plots.Line([1, 10], [1, 2]),
    }
    figure = plots.draw_lines(lines, x="d", y="ratio", log_x=True)
    axes = figure.axes[0]
    assert [line.get_marker() for line in axes.get_lines()] == ["o", "None", "s"]
    (band,) = axes.collections
    corners = {tuple(v) for v in band.get_paths()[0].vertices}
    assert {(1, 0.5), (1, 2), (10, 1), (10, 3)} <= corners
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["measured", "theory"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


def test_the_bracket_shades_what_lies_between():
    figure = plots.draw_bracket([0, 1, 2], [1, 0.25, 0], [1, 0.75, 0.5])
    axes = figure.axes[0]
    (zone,) = axes.collections
    corners = {tuple(v) for v in zone.get_paths()[0].vertices}
    assert {(1, 0.25), (1, 0.75), (2, 0), (2, 0.5)} <= corners
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [
        [1, 0.75, 0.5],
        [1, 0.25, 0],
    ]


@pytest.mark.parametrize(
    ("draw", "complaint"),
    [
        (lambda: plots.draw_bracket([0, 1], [1, 0.6], [1, 0.5]), "at epsilon 1 "),
        (lambda: plots.draw_bracket([0], [np.nan], [1]), "at epsilon 0 "),
        (lambda: plots.draw_lines({"a": plots.Line([1], [1, 2])}), "line 'a'"),
        (lambda: plots.draw_matrix({"m": [[1]]}, ["a"], ["b", "c"]), "matrix 'm'"),
        (lambda: plots.draw_images({"a": [np.eye(2)], "b": []}), "row 'b' has 0"),
        (lambda: plots.draw_images({"a": []}, signed=["b"]), "'b' is no row"),
        (lambda: plots.draw_surface([0, 1], [0], np.zeros((2, 1))), r"give \(1, 2\)"),
        (lambda: plots.draw_surface([0, 1], [0], [[0, np.inf]]), "infinity"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, complaint):
    with pytest.raises(ValueError, match=complaint):
        draw()
