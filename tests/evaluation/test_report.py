"""The report on made-up findings: numbers, files, page and table."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from matplotlib.image import imread

from robustjax.evaluation import gallery, html, html_tables, inline
from robustjax.evaluation.checks import Flag
from robustjax.evaluation.intervals import wilson
from robustjax.evaluation.report import Report, StageCost, ThreatReport

# Row 0 is wrong without an attack, 1 and 2 fall to the first, 3 to the second.
Y = np.array([0, 1, 0, 1, 0])
PREDICTION = np.array([-1, 1, 0, 1, 0])
FIRST = np.array([False, True, True, False, False])
SECOND = np.array([False, False, False, True, False])
STAGES = (
    StageCost("one", 4, 2, 400, 300, 800, 600, 1.5),
    StageCost("two", 2, 1, 20, 10, 32, 16, 0.5),
    StageCost("free", 1, 0, 5, 0, 8, 0, 0.1),
)


def found(x=None, **changes):
    x = np.full((5, 4, 4, 1), 0.5, np.float32) if x is None else x
    values = {
        "epsilon": 8 / 255,
        "broken_by": {"one": FIRST, "two": SECOND},
        "robust": np.array([False, False, False, False, True]),
        "x_adv": x + np.float32(8 / 255),
        "size": np.full(5, 8 / 255, np.float32),
        "norm": "Linf",
        "adv_prediction": np.array([-1, 0, 1, 0, 0]),
        "margin": np.array([np.nan, -1, -1, -1, 0.25], np.float32),
        "stages": STAGES,
        "flipped": (3,),
        "unconfirmed": (4,),
        "notes": ("Nothing is left out.",),
        "further": (0.0, 0.125),
        "curve": {"epsilon": [0.0, 8 / 255], "accuracy": [0.8, 0.2]},
    }
    return ThreatReport(**(values | changes))


def report(x=None, threats=None, **changes):
    x = np.full((5, 4, 4, 1), 0.5, np.float32) if x is None else x
    values = {
        "y": Y,
        "index": np.arange(10, 15),
        "prediction": PREDICTION,
        "threats": {"threat": found(x)} if threats is None else threats,
        "flags": [Flag("softmax", "The outputs are probabilities.")],
        "config": {"key": 0, "thresholds": {"saturated": 0.9}},
        "x": x,
        "suite": "standard",
        "checks": {
            "scale": {"result": "ok", "value": 1.25, "message": "Fine."},
            "full": {"result": "not run", "value": None, "message": "Not asked for."},
        },
        "check_passes": 77,
        "randomized": {
            "passes": 10,
            "robust_accuracy_mean": 0.15,
            "low": 0.1,
            "high": 0.2,
        },
    }
    return Report(**(values | changes))


@pytest.mark.parametrize("total", [1, 7, 1000])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_wilson_is_scipys(total, confidence):
    for successes in {0, 1, total // 3, total - 1, total}:
        test = scipy.stats.binomtest(successes, total)
        theirs = test.proportion_ci(confidence, method="wilson")
        ours = wilson(successes, total, confidence)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        assert 0 <= ours[0] <= successes / total <= ours[1] <= 1


@pytest.mark.parametrize("bad", [(3, 2), (-1, 2), (0, 0), (1, 2, 1.0)])
def test_wilson_refuses_impossible_counts(bad):
    with pytest.raises(ValueError, match="pass"):
        wilson(*bad)


def test_a_sequence_tells_the_accuracy_that_is_left():
    sequence = report()
    assert sequence.accuracy("threat", "one") == pytest.approx(2 / 5)
    assert sequence.accuracy("threat", "two") == pytest.approx(1 / 5)
    own = report(threats={"threat": found(individual=True)})
    assert own.accuracy("threat", "two") == pytest.approx(3 / 5)
    assert own.accuracy("threat", "one") == pytest.approx(2 / 5)


def test_the_first_attack_gets_the_example():
    both = {"one": FIRST, "two": SECOND | FIRST}
    names = found(broken_by=both).broken_by_name
    assert names.tolist() == ["", "one", "one", "two", ""]
    assert names.dtype.kind == "U"
    assert found(broken_by={}).broken_by_name.tolist() == [""] * 5


def test_the_numbers_of_report_json(tmp_path):
    folder = report().save(tmp_path / "run")
    saved = json.loads((folder / "report.json").read_text())
    assert saved["schema_version"] == 1
    assert saved["clean_accuracy"] == 0.8 and saved["robust_accuracy"] == 0.2
    assert saved["robust_accuracy_interval"] == pytest.approx(wilson(1, 5))
    assert saved["classes"] == {
        "class": [0, 1],
        "num_examples": [3, 2],
        "clean_accuracy": [pytest.approx(2 / 3), 1.0],
        "robust_accuracy": [pytest.approx(1 / 3), 0.0],
    }
    threat = saved["threats"]["threat"]
    assert threat["broken"] == threat["broken_first"] == {"one": 2, "two": 1}
    assert threat["accuracy"] == {"one": 0.4, "two": 0.2}
    assert threat["stages"][0] == dataclasses.asdict(STAGES[0])
    assert threat["passes"] == {
        "forward": 425,
        "backward": 310,
        "executed_forward": 840,
        "executed_backward": 616,
    }
    assert threat["flipped"] == [3] and threat["further"] == [0.0, 0.125]
    assert saved["flags"][0]["name"] == "softmax"
    assert saved["checks"]["scale"]["value"] == 1.25
    assert saved["check_passes"] == 77 and saved["config"]["key"] == 0
    assert {"versions", "git", "device", "written"} < set(saved["provenance"])
    assert {p.name for p in folder.iterdir()} == {
        "report.json",
        "report.html",
        "examples.npz",
    }


def test_docs_describe_every_field():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    parts = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.M | re.S))

    def named(part):
        cells = re.findall(r"^\| (`.*?) \|", parts[part], re.M)
        return {name for cell in cells for name in re.findall("`(.+?)`", cell)}

    summary = report().summary() | {"provenance": None}
    assert named("report.json") == set(summary)
    assert named("threats") == set(summary["threats"]["threat"])
    assert named("stages") == {f.name for f in dataclasses.fields(StageCost)}
    assert named("classes") == set(summary["classes"])


def test_arrays_per_example(tmp_path):
    both = {"Linf": found(), "L2": found(norm="L2", epsilons=np.arange(5.0))}
    folder = report(threats=both).save(tmp_path)
    with np.load(folder / "examples.npz", allow_pickle=False) as arrays:
        assert arrays["index"].tolist() == [10, 11, 12, 13, 14]
        assert arrays["prediction"][0] == -1
        assert arrays["Linf/broken_by_name"].tolist() == ["", "one", "one", "two", ""]
        np.testing.assert_array_equal(arrays["Linf/broken_by/one"], FIRST)
        np.testing.assert_array_equal(arrays["L2/x_adv"], both["L2"].x_adv)
        np.testing.assert_array_equal(arrays["L2/epsilons"], np.arange(5.0))
        np.testing.assert_array_equal(arrays["L2/margin"], both["L2"].margin)
        assert "Linf/epsilons" not in arrays


class Page(HTMLParser):
    """What a browser would see: text, attributes, whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self.words).split())
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def pictures(self):
        """Arrays in [0, 1], read by matplotlib, an independent decoder."""
        sources = [a["src"].split(",")[1] for tag, a in self.seen if tag == "img"]
        return [imread(io.BytesIO(base64.b64decode(s)), "png") for s in sources]


def page(given):
    text = html.render(given, {"written": "today"})
    assert text.isascii()
    return Page(text)


def test_the_page_needs_nothing_else():
    shown = page(report())
    assert {"script", "link", "iframe", "object"}.isdisjoint(t for t, _ in shown.seen)
    for _, attributes in shown.seen:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in html.STYLE and "@import" not in html.STYLE


def test_the_page_tells_what_was_found():
    text = page(report()).text
    low, high = wilson(1, 5)
    assert f"{100 * low:.1f} % to {100 * high:.1f} %" in text
    for part in [
        "softmax The outputs are probabilities.",
        "verdicts flipped The last pass classifies these broken examples correctly "
        "again: 3.",
        "unconfirmed successes",
        "Linf, epsilon 0.03137 = 8/255",
        "Might still fall 0.0 to 12.5 %",
        "15.0 % 10.0 % to 20.0 % mean over 10 random passes",
        "one 40.0 % 2 66.7 %",
        "two 20.0 % 1 33.3 %",
        "Nothing is left out.",
        "full not run Not asked for.",
        "They took 77 passes",
        "thresholds: saturated 0.9",
        "written today",
    ]:
        assert part in text, part
    # What is loud comes before the number that it makes doubtful.
    assert text.index("softmax") < text.index("Robust accuracy")


def test_text_is_escaped_everywhere():
    evil = "<script>alert('1')</script>&\u00e9\""
    values = {"broken_by": {evil: FIRST}, "norm": evil, "notes": (evil,), "stages": ()}
    given = report(
        threats={evil: found(**values), "b": found()},
        flags=[Flag(evil, evil)],
        config={evil: evil, "class_names": [evil, "dog"]},
        checks={evil: {"result": evil, "value": evil, "message": evil}},
        suite=evil,
    )
    shown = page(given)
    assert "script" not in {tag for tag, _ in shown.seen}
    # Title, heading, two times the flag, checks, config, attack, notes, classes, ...
    assert shown.text.count(evil) > 15


def test_pictures_show_the_clean_the_magnified_and_the_attacked():
    x = np.linspace(0.1, 0.9, 5 * 3 * 4 * 6).reshape(5, 3, 4, 6).astype(np.float32)
    attacked = x.copy()
    attacked[1, 0] += 0.05
    attacked[1, 1] -= 0.1
    given = report(
        x,
        threats={"threat": found(x, x_adv=attacked, broken_by={"one": FIRST})},
        config={"image_axes": "CHW"},
    )
    shown = page(given)
    clean, change, adversarial = shown.pictures()[:3]
    assert clean.shape[:2] == (4, 6)
    np.testing.assert_allclose(clean[..., :3], np.moveaxis(x[1], 0, -1), atol=0.002)
    after = np.moveaxis(attacked[1], 0, -1)
    np.testing.assert_allclose(adversarial[..., :3], after, atol=0.002)
    # The largest change, -0.1, is black; 0.05 is half way from gray to white.
    expected = np.broadcast_to([0.75, 0.0, 0.5], (4, 6, 3))
    np.testing.assert_allclose(change[..., :3], expected, atol=0.003)
    assert "\u00d7 10" in shown.text
    # Example 2 is left as it was.
    np.testing.assert_allclose(shown.pictures()[4][..., :3], 0.5, atol=0.003)
    assert "example 11, class 1, broken by one sees 1" in shown.text


def test_the_gallery_is_chosen_by_size_then_margin_then_index():
    size = np.array([0.0, 0.03, 0.02, 0.01, 0.0], np.float32)
    rows, _ = gallery.chosen(report(threats={"t": found(size=size)}), "t")
    assert rows.tolist() == [3, 2, 1]
    # In hundredths of epsilon they are equal: rounding must not choose.
    size = np.float32(8 / 255) + np.array([0, 3e-9, 2e-9, 1e-9, 0], np.float32)
    rows, _ = gallery.chosen(report(threats={"t": found(size=size)}), "t")
    assert rows.tolist() == [1, 2, 3]
    margin = np.array([np.nan, 3, np.nan, 1, 2], np.float32)
    values = {"broken_by": {}, "robust": PREDICTION == Y, "margin": margin}
    rows, why = gallery.chosen(report(threats={"t": found(**values)}), "t")
    assert rows.tolist() == [3, 4, 1, 2]
    assert "margin" in why


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 6, 3), None, (8, 6, 3)),
        ((3, 8, 6), None, (8, 6, 3)),
        ((3, 8, 3), "CHW", (8, 3, 3)),
        ((3, 8, 3), "HWC", (3, 8, 3)),
        ((8, 6, 1), "HWC", (8, 6)),
        ((1, 8, 6), "CHW", (8, 6)),
        ((8, 6), None, (8, 6)),
        ((8, 6, 5), "HWC", None),
        ((7,), None, None),
        ((), None, None),
    ],
)
def test_what_is_an_image(shape, axes, expected):
    image = gallery.as_image(np.zeros(shape), axes)
    assert (None if image is None else image.shape) == expected


def many(classes, shape=(6,), count=90):
    """Every class once or more; those divisible by 3 are broken, by 5 wrong."""
    y = np.arange(count) % classes
    prediction = np.where(y % 5 == 0, (y + 1) % classes, y)
    correct = prediction == y
    broken = correct & (y % 3 == 0)
    x = np.full((count, *shape), 0.5, np.float32)
    values = {
        "broken_by": {"one": broken},
        "robust": correct & ~broken,
        "size": np.ones(count, np.float32),
        "adv_prediction": np.where(broken, -1, prediction),
        "margin": np.full(count, 1e-30, np.float32),
        "flipped": (),
        "unconfirmed": (),
        "curve": {"epsilon": [0.0, np.nan], "accuracy": [0.5, 0.1]},
    }
    return Report(
        y,
        np.arange(count),
        prediction,
        {"threat": found(x, **values)},
        [],
        {},
        x=x,
        checks={"scale": {"result": "ok", "value": None, "message": ""}},
    )


def test_of_many_classes_the_worst_and_the_best_are_shown():
    shown = page(many(80))
    assert "The 20 worst and the 20 best of 80 classes." in shown.text
    # Class 0 is wrong without an attack, 3 is broken, 79 robust, 20th of the broken
    # and wrong in the middle are not shown.
    worst, best = shown.text.split("Classes")[1].split("\u2026")
    assert " 0 2 0.0 % 0.0 %" in worst and "79 1 100.0 % 100.0 %" in best
    assert "77 1" in best and "77 1" not in worst
    few = page(many(2)).text
    assert "worst" not in few.split("Classes")[1]
    assert "1 check ran and found nothing suspicious" in few
    assert "sees NaN" in shown.text


def test_vectors_have_bars_and_no_pictures():
    shown = page(many(80))
    assert not shown.pictures()
    bars = [a for tag, a in shown.seen if tag == "svg" and a["class"] == "bars"]
    assert len(bars) == gallery.MOST
    assert "The inputs are no images" in shown.text
    assert not any(
        t == "svg" and a["class"] == "bars" for t, a in page(many(80, (500,))).seen
    )


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_everything_or_nothing_robust(robust, count, tmp_path):
    x = np.zeros((count, 2, 2, 3), np.float32)
    y = np.zeros(count, np.int32)
    all_of_them = np.ones(count, bool)
    one = ThreatReport(
        epsilon=0.0,
        broken_by={"one": all_of_them & (not robust)},
        robust=all_of_them & robust,
        x_adv=x,
        size=np.zeros(count),
        margin=np.full(count, np.nan),
        curve={"epsilon": [], "accuracy": []},
    )
    given = Report(y, y, y, {"threat": one}, [], {}, x=x)
    text = page(given).text
    assert f"{100.0 * robust:.1f} % " in text
    assert len(page(given).pictures()) == 3 * count
    assert ("Nothing was broken" in text) == robust
    assert "no check was recorded" in text
    given.save(tmp_path)
    assert f"{float(robust):.3f}" in str(given)


def test_nothing_classified_correctly():
    nothing = np.zeros(5, bool)
    given = report(
        prediction=1 - Y,
        threats={"t": found(broken_by={"one": nothing}, robust=nothing, stages=())},
    )
    assert "Examples" not in page(given).text
    assert "nan" not in str(given)


def test_the_union_of_threats():
    other = np.array([False, True, False, False, False])
    values = {"broken_by": {"pgd": FIRST | SECOND}, "individual": True, "stages": ()}
    given = report(
        threats={
            "Linf": found(),
            "L2": found(
                norm="L2", robust=other, epsilons=np.linspace(0.1, 0.2, 5), **values
            ),
        }
    )
    assert given.robust_accuracy == 0.0
    text = page(given).text
    assert "every threat at once 0.0 %" in text
    assert "L2 L2 0.1 to 0.2 (one per example, mean 0.03137) 20.0 %" in text
    assert given.summary()["threats"]["L2"]["epsilon_range"] == [0.1, 0.2]
    printed = str(given)
    # One is a sequence and one is not: a table for each.
    assert "after one" in printed and "\npgd " in printed
    assert "robust under every threat: 0.000" in printed


def test_print():
    lines = str(report()).splitlines()
    assert lines[0] == "suite standard"
    assert lines[1].split() == (
        "threat, Linf 0.03137 accuracy broken of forward backward executed s".split()
    )
    rows = [line.split() for line in lines[3:]]
    assert rows[0] == ["clean", "0.800"]
    assert rows[1] == "after one 0.400 2 4 400 300 1.4k 1.5".split()
    assert rows[2] == "after two 0.200 1 2 20 10 48 0.5".split()
    assert rows[3] == "free 0 1 5 0 8 0.1".split()
    assert rows[4] == "all attacks 0.200 3 4 425 310 1.46k 2.1".split()
    assert lines[-3].startswith("!! softmax:")
    assert lines[-2].startswith("!! verdicts flipped:")
    plain = report(threats={"a": found(stages=()), "b": found(stages=())})
    assert re.search(r"^after two +0\.200 +0\.200$", str(plain), re.M)
    own = report(threats={"a": found(stages=(), individual=True)})
    assert re.search(r"^two +0\.600$", str(own), re.M)


def test_passes_of_an_own_attack_are_not_called_0():
    mine = StageCost("mine", 4, 2, 0, 0, 0, 0, 1.5)
    one = report(threats={"a": found(stages=(mine,))})
    assert re.search(r"^mine +2 +4 +- +- +- +1\.5$", str(one), re.M)
    cells = re.search(
        r"<tr><td class=text>mine</td>.*?</tr>", html_tables.attacks(one, "a")
    )
    assert cells is not None
    assert re.findall("<td>([^<]*)</td>", cells[0])[-6:] == ["4", *["-"] * 4, "1.5"]


def test_ticks_are_round_and_inside():
    for low, high in [(0, 1), (0, 8 / 255), (-3.2, 7.7), (0, 1e-12), (0, 3e8)]:
        marks = inline.ticks(low, high)
        assert 2 <= len(marks) <= 6
        assert low - 1e-9 * high <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    assert inline.ticks(2, 2) == [2]


def test_histogram_counts_every_value():
    values = np.array([0.1, 0.1, 0.9, np.nan, np.inf, 0.5])
    heights = re.findall(r'<rect .*?height="([0-9.]+)"', inline.histogram(values, "m"))
    unit = max(map(float, heights)) / 2
    assert sum(map(float, heights)) == pytest.approx(4 * unit, abs=0.5)
    assert inline.histogram(np.array([np.nan]), "m") == ""


def test_the_curve_goes_through_its_points():
    drawn = inline.curve([0.2, 0.0], [0.25, 1.0], "epsilon", marked=(0.1, 0.5))
    line = re.search(r'class="line" d="M([0-9. ]+)L([0-9. ]+)"', drawn)
    (x0, y0), (x1, y1) = [map(float, line[i].split()) for i in (1, 2)]
    dot = re.search(r'class="dot" cx="([0-9.]+)" cy="([0-9.]+)"', drawn)
    x, y = map(float, dot.groups())
    assert x0 < x1 and y0 < y1
    assert x == pytest.approx((x0 + x1) / 2, abs=0.1)
    assert (y - y0) / (y1 - y0) == pytest.approx(0.5 / 0.75, abs=0.01)
    assert inline.curve([np.nan], [0.5], "epsilon") == ""
