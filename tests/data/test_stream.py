import numpy as np
import pytest

from robustjax.data import stream, to_float

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


def test_shards_share_the_global_batches():
    whole = batches(batch_size=6, epochs=2)
    shards = [
        batches(batch_size=2, epochs=2, shard_index=i, shard_count=3) for i in range(3)
    ]
    assert [len(s) for s in shards] == [len(whole)] * 3 == [6] * 3
    for step, batch in enumerate(whole):
        dealt = np.concatenate([s[step].index for s in shards])
        assert set(dealt) == set(batch.index) and len(set(dealt)) == 6


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
        ({"source": (X, Y[:3])}, "23 images and 3 labels"),
        ({"transform": len}, "not for arrays"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)
