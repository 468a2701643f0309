import jax
import numpy as np
import pytest

from robustjax.data import by_step, image_folder, stream, to_float
from robustjax.methods.standard import standard
from robustjax.models.mlp import mlp
from robustjax.training import optimizers
from robustjax.training.loop import fit

X = np.random.RandomState(0).randint(0, 256, (23, 4, 4, 1)).astype(np.uint8)
Y = np.arange(23) % 10


class Examples:
    def __len__(self):
        return 23

    def __getitem__(self, index):
        return {"image": X[index], "label": int(Y[index])}


def batches(source=(X, Y), batch_size=5, seed=1, **options):
    iterator = stream(source, batch_size, seed, **options)
    found = list(iterator)
    iterator.close()
    return found


@pytest.mark.parametrize("source", [(X, Y), Examples(), list(zip(X, Y, strict=True))])
def test_batches_hold_what_the_source_holds(source):
    found = batches(source, epochs=2)
    assert len(found) == 2 * 4
    for batch in found:
        assert batch.x.dtype == np.float32 and batch.y.dtype == np.int32
        np.testing.assert_array_equal(batch.x, to_float(X[batch.index], 255))
        np.testing.assert_array_equal(batch.y, Y[batch.index])
    epochs = [np.concatenate([b.index for b in found[i : i + 4]]) for i in (0, 4)]
    assert all(len(set(e)) == 20 for e in epochs)
    assert (epochs[0] != epochs[1]).any()


def test_the_seed_alone_decides():
    one, two, other = batches(epochs=1), batches(epochs=1), batches(epochs=1, seed=2)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
    assert any((a.index != b.index).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("step", [0, 3, 4, 6])
def test_resume_from_a_step_and_from_a_state(step):
    whole = [b.index for b in batches(epochs=2)]
    rest = [b.index for b in batches(epochs=2, start_step=step)]
    np.testing.assert_array_equal(rest, whole[step:])
    first = stream((X, Y), 5, 1, epochs=2)
    for _ in range(step):
        next(first)
    state = first.get_state()
    first.close()
    second = stream((X, Y), 5, 1, epochs=2)
    second.set_state(state)
    np.testing.assert_array_equal([b.index for b in second], whole[step:])
    second.close()


def test_without_epochs_it_never_ends():
    iterator = stream((X, Y), 5, 1)
    assert sum(len(next(iterator).y) for _ in range(50)) == 250
    iterator.close()


def shards(source, count, **options):
    """Per step, what the processes of a run hold together, in their order."""
    found = [
        batches(source, 6 // count, shard_index=i, shard_count=count, **options)
        for i in range(count)
    ]
    assert len({len(one) for one in found}) == 1
    return [
        [np.concatenate(field) for field in zip(*(b[:3] for b in step), strict=True)]
        for step in zip(*found, strict=True)
    ]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_hold_the_batch_of_one(count):
    whole = [batch[:3] for batch in batches(batch_size=6, epochs=2)]
    assert len(whole) == 6
    together = shards((X, Y), count, epochs=2)
    jax.tree.map(np.testing.assert_array_equal, together, [list(b) for b in whole])
    # A checkpoint of one run goes on with another number of processes.
    rest = shards((X, Y), count, epochs=2, start_step=4)
    jax.tree.map(np.testing.assert_array_equal, rest, [list(b) for b in whole[4:]])


class Recorder(Examples):
    """Notes what is read; `together` as ArrayRecord does, many rows at once."""

    def __init__(self, together):
        self.read = []
        if together:
            self.__getitems__ = lambda rows: [self[row] for row in rows]

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("together", [False, True])
def test_a_process_reads_its_own_rows_only(together):
    readers = [Recorder(together) for _ in range(3)]
    for i, reader in enumerate(readers):
        options = {"shard_index": i, "shard_count": 3, "epochs": 1, "start_step": 1}
        index = np.concatenate([b.index for b in batches(reader, 2, **options)])
        assert sorted(reader.read) == sorted(index.tolist())  # each once
        assert len(index) == 4
    assert len({row for reader in readers for row in reader.read}) == 12


def test_by_step_is_a_function_of_the_step():
    whole = batches(epochs=3)
    batch_at = by_step((X, Y), 5, 1, epochs=3)
    for step in (0, 1, 2, 7, 8, 3, 3, 11, 0):
        for found, expected in zip(batch_at(step)[:3], whole[step][:3], strict=True):
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="batch_size is 24"):
        by_step((X, Y), 24, 1)


def test_fit_goes_on_with_the_exact_example(tmp_path):
    """Stopped by `validate` and begun again: every example as in an unbroken run."""
    images = X.astype(np.float32)

    def examples(out, stop_at):
        seen, batch_at = [], by_step((images, Y), 5, 1, max_value=None)

        def noted(step):
            batch = batch_at(step)
            seen.append((step, batch.index.tolist()))
            return batch

        calls = []

        def validate(params, extra):
            calls.append(1)
            return {"robust_accuracy": 0.0, "stop": float(len(calls) == stop_at)}

        model = mlp((3,))
        fit(
            *(jax.random.key(0), model, standard(model), optimizers.sgd(0.01), noted),
            batch_size=5, num_steps=9, checkpoint_every=3, out=out,
            validate=validate, log=False,
        )  # fmt: skip
        return seen  # with some of step 0 among them, for shapes

    unbroken = examples(tmp_path / "one", None)[-9:]
    assert [step for step, _ in unbroken] == list(range(9))
    first = examples(tmp_path / "two", 3)[-9:-3]  # it ends without a third checkpoint
    rest = [entry for entry in examples(tmp_path / "two", None) if entry[0]]
    assert first + rest == unbroken


def folder_of(root, sizes):
    image = pytest.importorskip("PIL.Image")
    for label, (name, (height, width)) in enumerate(sizes.items()):
        place = root / "train" / name
        place.mkdir(parents=True)
        for n in range(6):
            pixels = np.full((height, width, 3), 40 * label + n, np.uint8)
            pixels[:, : (width - min(height, width)) // 2] = 255  # cut off
            image.fromarray(pixels).save(place / f"{n}.png")
    (root / "train" / "notes.txt").write_text("no class")


def test_image_folder_is_streamed_by_processes(tmp_path):
    folder_of(tmp_path, {"cat": (8, 8), "dog": (8, 14)})
    source = image_folder(tmp_path, size=4)
    assert len(source) == 12 and source.classes == ("cat", "dog")
    assert source[7]["label"] == 1 and (source[7]["image"] == 41).all()
    whole = [list(b[:3]) for b in batches(source, 6, max_value=None, epochs=1)]
    for x, y, index in whole:
        assert x.shape == (6, 4, 4, 3) and x.dtype == np.uint8
        np.testing.assert_array_equal(y, index // 6)
        np.testing.assert_array_equal(x[:, 0, 0, 0], 40 * y + index % 6)
    together = shards(source, 2, max_value=None, epochs=1)
    jax.tree.map(np.testing.assert_array_equal, together, whole)


def test_image_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="val holds no images"):
        image_folder(tmp_path, "val")
    folder_of(tmp_path, {"cat": (4, 4)})
    with pytest.raises(ValueError, match="size is 0"):
        image_folder(tmp_path, size=0)
    (tmp_path / "train/cat/3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="3.png cannot be read as an image"):
        image_folder(tmp_path)[3]


def test_transform_and_raw_pixels():
    def decode(example):
        return example["image"][:2], 9 - example["label"]

    for batch in batches(Examples(), epochs=1, transform=decode, max_value=None):
        assert batch.x.dtype == np.uint8
        np.testing.assert_array_equal(batch.x, X[batch.index][:, :2])
        np.testing.assert_array_equal(batch.y, 9 - Y[batch.index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 24}, "batch_size is 24, with 23 examples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index is 2"),
        ({"epochs": 0}, "epochs 0"),
        ({"start_step": -1}, "start_step is -1"),
        ({"read_ahead": 0}, "read_ahead is 0"),
        ({"source": (X, Y[:3])}, "23 images and 3 labels"),
        ({"transform": len}, "not for arrays"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)
