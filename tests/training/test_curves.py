"""What a run leaves as pictures and as TensorBoard events."""

import json
import sys

import numpy as np
import pytest

from robustjax import plots
from robustjax.training.curves import draw_run, read_rows
from robustjax.training.optimizers import one_cycle
from robustjax.training.tensorboard import to_tensorboard

ROWS = [
    {"kind": "train", "step": 5, "loss": 2.0, "accuracy": 0.25, "seconds": 1.5},
    {"kind": "train", "step": 10, "loss": None, "accuracy": 0.5, "seconds": 3.0},
    {"kind": "validate", "step": 10, "robust_accuracy": 0.125, "robust_gap": -0.25},
    {"kind": "train", "step": 20, "loss": 0.5, "accuracy": 0.75, "seconds": 6.0},
    {"kind": "validate", "step": 20, "robust_accuracy": 0.375, "robust_gap": 0.5},
]


@pytest.fixture
def folder(tmp_path):
    lines = (json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def drawn(figure):
    """Panel -> label -> (x, y)."""
    return {
        axes.get_title("left"): {
            line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axes.lines
        }
        for axes in figure.axes
    }


def test_a_run_is_drawn_as_it_was_written(folder):
    rate = one_cycle(0.1, 20, warmup_steps=10)
    figure = draw_run(folder, rate)
    panels = drawn(figure)
    assert panels.pop("loss") == {"training batches": ([5, 20], [2.0, 0.5])}
    assert panels.pop("accuracy, training batches") == {
        "shown to the net": ([5, 10, 20], [0.25, 0.5, 0.75])
    }
    assert panels.pop("accuracy, held out") == {"robust": ([10, 20], [0.125, 0.375])}
    gap = panels.pop("robust accuracy, on which images")["gap"]
    assert gap == ([10, 20], [-0.25, 0.5])
    ((steps, rates),) = panels.pop("learning rate").values()
    assert steps == [5, 10, 20]
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.0], atol=1e-9)
    assert not panels
    by_title = {axes.get_title("left"): axes for axes in figure.axes}
    assert by_title["loss"].get_yscale() == "log"
    assert by_title["robust accuracy, on which images"].get_ylim()[0] < -0.25
    plots.save(figure, folder / "curves.png")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_training_images_may_come_from_the_watch_for_collapse():
    def shown(**numbers):
        row = {"kind": "validate", "step": 3, "train_pgd_accuracy": 0.5, **numbers}
        return drawn(draw_run([row]))["robust accuracy, on which images"]

    assert shown()["training images"] == ([3], [0.5])
    assert shown(train_robust_accuracy=0.25)["training images"] == ([3], [0.25])


def test_a_history_without_a_folder_is_drawn_too():
    assert "learning rate" not in drawn(draw_run(ROWS))
    with pytest.raises(ValueError, match="no rows with known metrics"):
        draw_run([])
    with pytest.raises(FileNotFoundError, match="give the folder that was `out`"):
        draw_run("nowhere")


def test_without_tensorboard_the_error_says_what_to_do(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ImportError, match="pip install tensorboard, or draw"):
        to_tensorboard(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_every_number(folder):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    to_tensorboard(folder)
    out = to_tensorboard(folder)  # a second time: in place of the first
    (path,) = out.iterdir()
    found = {}
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            number = value.tensor.float_val[0]  # as TensorBoard itself converts it
            found[value.tag, event.step] = (number, event.wall_time)
    expected, seconds = {}, 0.0
    for row in read_rows(folder):
        seconds = row.get("seconds", seconds)
        for name, number in row.items():
            if name not in ("kind", "step") and number is not None:
                expected[f"{row['kind']}/{name}", row["step"]] = (number, seconds)
    assert found == expected and len(found) == 12
