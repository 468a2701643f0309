"""imagenet_fast: its images, its schedule, and a run on a tiny image folder."""

import dataclasses

import numpy as np
import pytest

from experiments import imagenet_fast
from experiments.imagenet_fast import batches, list_images, rate, some_images
from tests.experiments.test_experiments import quick_compilation

__all__ = ["quick_compilation"]

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
CLASSES = ("ant", "bee", "cat")


def write_folder(root, per_class=6):
    """Images of several shapes; the class is in the red, the left half has the blue."""
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                x = np.zeros((30 + number, 40 - number, 3), np.uint8)
                x[..., 0] = 100 * label
                x[:, : x.shape[1] // 2, 2] = 255
                kind = "png" if number % 2 else "bmp"
                Image.fromarray(x).save(folder / f"{number}.{kind}")
    (root / "train" / "ant" / "readme.txt").write_text("no image")


def test_images_are_listed_by_class_and_cut_square(tmp_path):
    write_folder(tmp_path)
    images, names = list_images(tmp_path / "train")
    assert (len(images), names) == (18, list(CLASSES))
    x, y = some_images(images, 16, 6)
    assert (x.shape, x.dtype, y.tolist()) == (
        (6, 16, 16, 3),
        np.float32,
        [0, 0, 1, 1, 2, 2],
    )
    np.testing.assert_allclose(x[:, 0, 0, 0], y * (100 / 255), atol=1e-6)
    for folder in (tmp_path / "nowhere", tmp_path / "train" / "ant"):
        with pytest.raises(FileNotFoundError, match="train/CLASS"):
            list_images(folder)


def test_a_batch_follows_from_seed_and_step(tmp_path):
    write_folder(tmp_path)
    images, _ = list_images(tmp_path / "train")
    batch = batches(images, 16, 4, seed=1)
    asked = {step: batch(step) for step in (0, 1, 2, 5)}
    for step, found in asked.items():
        assert found.x.shape == (4, 16, 16, 3)
        labels = np.round(found.x[:, 0, 0, 0] * 255 / 100).astype(int)
        assert labels.tolist() == found.y.tolist()
        again = batches(images, 16, 4, seed=1)(step)
        np.testing.assert_array_equal(again.x, found.x)
        assert again.index.tolist() == found.index.tolist()
    # A quarter of the edge is left for the crop's place, and half are mirrored.
    edges = np.concatenate(
        [np.abs(np.diff(b.x[:, 0, :, 2], axis=1)).argmax(1) for b in asked.values()]
    )
    assert len(set(edges.tolist())) > 2
    left = np.concatenate([b.x[:, 0, 0, 2] for b in asked.values()])
    assert {round(v) for v in left.tolist()} == {0, 1}


def test_phases_are_the_published_ones():
    paper = imagenet_fast.PRESETS["paper"]
    assert paper.crops == (128, 224, 288)
    assert paper.batch_sizes == (512, 224, 128)
    assert paper.step_size == 5 / 4
    assert imagenet_fast.PRESETS["large"].epsilon == "4/255"
    epochs = {0: (0, 0.5, 1, 6), 1: (0, 6), 2: (0, 3)}
    expected = {0: (0, 0.2, 0.4, 0.04), 1: (0.04, 0.004), 2: (0.004, 0.0004)}
    for phase, at in epochs.items():
        schedule = rate(paper, phase, per_epoch=100)
        found = [float(schedule(round(epoch * 100))) for epoch in at]
        np.testing.assert_allclose(found, expected[phase], rtol=1e-5)


def test_what_is_no_image_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--images is absent"):
        imagenet_fast.main(imagenet_fast.Config(out=str(tmp_path)))
    write_folder(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "dog")
    with pytest.raises(ValueError, match="different classes"):
        imagenet_fast.main(imagenet_fast.Config(out="x", images=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
# Ten updates leave BatchNorm's running statistics far away: the logits are huge.
@pytest.mark.filterwarnings("ignore::robustjax.evaluation.checks.ModelWarning")
def test_three_phases_run_and_go_on(tmp_path, capsys):
    write_folder(tmp_path / "images")
    config = imagenet_fast.Config(
        out=str(tmp_path / "run"),
        images=str(tmp_path / "images"),
        width=1,
        crops=(16, 16, 24),
        batch_sizes=(8, 4, 4),
        ends=(1, 2, 3),
        rise=0.5,
        num_watched=6,
        num_test=6,
        test_batch_size=6,
    )
    results = imagenet_fast.main(config)
    assert 0 <= results["robust_accuracy"] <= results["clean_accuracy"] <= 1
    said = capsys.readouterr().out
    assert "phase 3: 4 steps at 24 pixels" in said
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        *(f"phase_{i}" for i in (1, 2, 3)),
        "results.json",
    ]
    again = imagenet_fast.main(config)  # nothing is left to train
    assert again["clean_accuracy"] == results["clean_accuracy"]
    assert "going on from step 4 of 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="weight_decay"):
        imagenet_fast.main(dataclasses.replace(config, weight_decay=0.5))
    capsys.readouterr()
