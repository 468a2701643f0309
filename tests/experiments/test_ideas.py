"""Claims, the results that all experiments on ideas write, and their pages."""

import dataclasses
import math
import re

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import common, ideas
from experiments.ideas import step_seconds  # tests of experiments leave it out
from robustjax import data, models, plots
from robustjax.methods.standard import standard
from tests.experiments import schema

PAGES = schema.ROOT / "docs" / "ideas"
NAMES = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "README")


@dataclasses.dataclass(frozen=True)
class Config:
    out: str
    sizes: tuple[int, ...] = (1, 2)


def save(folder, claims, measurements=None, figures=("one.png",)):
    plots.save(plots.draw_lines({"a": plots.Line([1, 2], [1, 2])}), folder / "one.png")
    config = Config(str(folder))
    return ideas.save(
        *(folder, config, claims, measurements or {}, figures, common.start())
    )


@pytest.mark.parametrize(
    ("value", "holds"), [(1.8, True), (2.2, True), (2.3, False), (math.nan, False)]
)
def test_a_claim_holds_within_its_bounds(value, holds, tmp_path, capsys):
    save(tmp_path, {"slope": ideas.Claim("the slope is 2", value, 1.8, 2.2)})
    found = schema.check(tmp_path)["claims"]["slope"]
    assert found["holds"] is holds
    assert found["bounds"] == [1.8, 2.2]
    assert ("holds  the slope" if holds else "FAILS  the slope") in capsys.readouterr()[
        0
    ]


def test_results_are_plain_numbers_and_open_bounds_are_null(tmp_path):
    claims = {"all": ideas.Claim("anything", np.float32(3.0), low=0.0)}
    measured = {"array": np.arange(3), "jax": jnp.ones(2), "deep": {"x": [np.int64(1)]}}
    save(tmp_path, claims, measured)
    found = schema.check(tmp_path)
    assert found["claims"]["all"]["bounds"] == [0.0, None]
    assert found["measurements"] == {
        "array": [0, 1, 2],
        "jax": [1.0, 1.0],
        "deep": {"x": [1]},
    }
    assert found["config"] == {"out": tmp_path.name, "sizes": [1, 2]}


def test_a_missing_figure_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="two.png"):
        save(tmp_path, {}, figures=["two.png"])


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        ({"measurements": None}, "measurements"),
        ({"claims": {"a": {"says": "x", "value": 2, "bounds": [3, 4]}}}, "a"),
        (
            {"claims": {"a": dict(says="x", value=2, bounds=[3, 4], holds=True)}},
            "a",
        ),
        ({"figures": []}, "no figure"),
        ({"more": 1}, "more"),
    ],
)
def test_the_check_sees_what_is_wrong(broken, where, tmp_path):
    save(tmp_path, {"a": ideas.Claim("x", 1.0)})
    common.write_json(tmp_path / "results.json", schema.check(tmp_path) | broken)
    with pytest.raises(AssertionError, match=where):
        schema.check(tmp_path)


def index() -> str:
    return (PAGES / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_its_picture_its_experiment_and_its_place_in_the_index(name):
    text = (PAGES / f"{name}.md").read_text()
    image = f"images/{name}.png"
    assert text.startswith("# ")
    assert f"]({image})" in text
    assert f"python -m experiments.{name}" in text
    assert "**Source" in text or "## Source" in text
    assert (schema.ROOT / "experiments" / f"{name}.py").is_file()
    assert f"]({name}.md)" in index() and image in index()


@pytest.mark.parametrize(
    "path", sorted(PAGES.glob("images/*.png")), ids=lambda p: p.stem
)
def test_a_picture_is_small_and_opaque_and_some_page_shows_it(path):
    assert path.stat().st_size <= 150_000
    image = matplotlib.image.imread(path)
    assert image.shape[-1] == 3 or (image[..., 3] == 1).all()
    pages = [page.read_text() for page in PAGES.glob("*.md") if page.stem != "README"]
    assert any(f"](images/{path.name})" in text for text in pages)


def test_the_index_names_an_experiment_once_and_by_its_own_picture():
    linked = re.findall(r"\]\((\w+)\.md\)", index())
    shown = re.findall(r'src="images/(\w+)\.png"', index())
    assert linked == shown
    assert len(set(linked)) == len(linked)
    assert set(NAMES) <= set(linked)


def test_a_step_is_timed_on_a_batch():
    mlp = models.mlp((4,))
    method, shapes = standard(mlp), []

    def grads(params, extra, carry, batch, *rest):
        shapes.append(batch.x.shape)
        return method.grads(params, extra, carry, batch, *rest)

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 4, 4, 1), np.uint8)
    train_set = data.resident(images, np.arange(20) % 10, 255)
    counting = method._replace(grads=grads)
    found = step_seconds(mlp, counting, train_set, batch_size=8, repeats=3)
    assert 0 < found < 10
    assert shapes == [(8, 4, 4, 1)]  # one trace
