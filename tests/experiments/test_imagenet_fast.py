"""imagenet_fast: its images, its schedule, and a run on a tiny image folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import imagenet_fast
from experiments.imagenet_fast import cut, rate, some_images
from experiments.machine import Machine
from robustjax import models
from robustjax.training.loop import FitResult
from robustjax.training.state import TrainState
from robustjax.types import Batch

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": (32, 48)}, r"crops=\(32, 48\).*one per phase"),
        ({"ends": (6, 12)}, "one per phase"),
        ({"ends": (6, 12, 15, 18)}, "one per phase"),
        ({"ends": (6, 6, 15)}, r"ends=\(6, 6, 15\).*rise"),
        ({"rise": 6.0}, "rise=6.0"),
        ({"num_watched": 0}, "num_watched is 0; give 1 or more"),
        ({"num_test": 0}, "num_test is 0; give 1 or more"),
        ({"batch_sizes": (32, 16, 15), "machine": Machine(2)}, "batch_size 15"),
    ],
)
def test_a_later_phase_is_checked_before_the_first(changes, message):
    config = dataclasses.replace(imagenet_fast.PRESETS["small"], **changes)
    with pytest.raises(ValueError, match=message):
        imagenet_fast.main(config)


def test_some_images_are_spread_over_the_classes(tmp_path):
    write_folder(tmp_path)
    x, y = some_images(str(tmp_path), "train", 16, 6)
    assert (x.shape, x.dtype) == ((6, 16, 16, 3), np.float32)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(x[:, 0, 0, 0], y * (100 / 255), atol=1e-6)


def test_crops_are_parts_of_their_images_at_places_of_their_own():
    """Each pixel tells where it was: all 4 x 4 places and both directions come."""
    rows, edge, crop = 400, 8, 5
    place = np.arange(edge * edge, dtype=np.uint8).reshape(edge, edge, 1)
    x = np.tile(place, (rows, 1, 1, 3))
    batch = Batch(x, np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32))
    cropped = jax.jit(cut(crop))(jax.random.key(0), batch)
    assert cropped.x.dtype == jnp.float32
    seen = set()
    for image in np.rint(np.asarray(cropped.x) * 255).astype(int):
        mirrored = bool(image[0, 0, 0] > image[0, 1, 0])
        top, left = divmod(int(image[0, -1 if mirrored else 0, 0]), edge)
        part = place[top : top + crop, left : left + crop]
        np.testing.assert_array_equal(
            image, np.tile(part[:, ::-1] if mirrored else part, (1, 1, 3))
        )
        seen.add((top, left, mirrored))
    assert len(seen) == 4 * 4 * 2
    # An example's crop depends on key and index, not on its company.
    alone = jax.tree.map(lambda leaf: leaf[7:8], batch)
    again = jax.jit(cut(crop))(jax.random.key(0), alone)
    np.testing.assert_array_equal(again.x[0], cropped.x[7])


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


def colors(num_classes, width, stem, mean, std, **options):
    """A net in ResNet-50's place, which compiles in minutes: reads the mean color."""
    assert (stem, width) == ("imagenet", 1)

    def init(key, x):
        return 0.1 * jax.random.normal(key, (3, num_classes)), {}

    def apply(params, extra, x, *, train=False, key=None):
        x = (x - jnp.array(mean).reshape(1, 1, 1, 3)) / jnp.array(std).reshape(
            1, 1, 1, 3
        )
        return x.mean((1, 2)) @ params, extra

    return models.Model(init, apply)


@pytest.mark.parametrize(("stop", "expected"), [(0.0, "last"), (1.0, "best")])
def test_a_collapse_in_the_last_epoch_is_not_carried_on(stop, expected):
    rows = [{"kind": "train", "loss": 1.0}, {"kind": "validate", "stop": stop}]
    state = TrainState(8, "last", "last", None, None, None, None)
    trained = FitResult(state, "best", "best", {}, rows)
    assert imagenet_fast.carried_on(trained) == (expected, expected)


@pytest.mark.slow
@pytest.mark.quick
def test_three_phases_begin_where_the_one_before_ended(tmp_path, capsys, monkeypatch):
    write_folder(tmp_path / "images")
    monkeypatch.setattr(models, "resnet50", colors)
    given, found, fit = [], [], imagenet_fast.fit

    def watched(*arguments, start, **options):
        given.append(start)
        found.append(fit(*arguments, start=start, **options))
        return found[-1]

    monkeypatch.setattr(imagenet_fast, "fit", watched)
    config = imagenet_fast.Config(
        out=str(tmp_path / "run"),
        images=str(tmp_path / "images"),
        width=1,
        crops=(16, 24, 32),
        batch_sizes=(8, 4, 4),
        ends=(6, 12, 15),
        learning_rate=1.0,
        num_watched=6,
        num_test=6,
        test_batch_size=6,
        machine=Machine(num_devices=1),
    )
    results = imagenet_fast.main(config)
    assert results["clean_accuracy"] == 1  # the classes differ in color
    assert set(results["threats"]) == {"threat"}
    assert given[0] is None
    for start, before in zip(given[1:], found, strict=False):
        np.testing.assert_array_equal(start[0], before.state.params)
    said = capsys.readouterr().out
    assert "phase 1: 12 steps at 16 pixels" in said
    assert "phase 3: 12 steps at 32 pixels" in said
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        *(f"phase_{i}" for i in (1, 2, 3)),
        "results.json",
    ]
    with pytest.raises(ValueError, match="weight_decay"):
        imagenet_fast.main(dataclasses.replace(config, weight_decay=0.5))
    capsys.readouterr()
