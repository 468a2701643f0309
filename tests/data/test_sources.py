import gzip

import numpy as np
import pytest

from robustjax.data import load
from robustjax.data.dataset import KNOWN

RANDOM = np.random.RandomState(0)


def arrays(n=12, m=6, shape=(28, 28), classes=10):
    return {
        "x_train": RANDOM.randint(0, 256, (n, *shape)).astype(np.uint8),
        "y_train": (np.arange(n) % classes).astype(np.uint8),
        "x_test": RANDOM.randint(0, 256, (m, *shape)).astype(np.uint8),
        "y_test": (np.arange(m) % classes).astype(np.uint8),
    }


def save(path, **changes):
    np.savez_compressed(path, **{**arrays(), **changes})
    return path


def idx_bytes(x):
    sizes = b"".join(int(n).to_bytes(4, "big") for n in x.shape)
    return bytes([0, 0, 8, x.ndim]) + sizes + x.tobytes()


def save_idx(folder, content, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, x in content.items():
        split = "train" if name.endswith("train") else "t10k"
        kind = "images-idx3" if name[0] == "x" else "labels-idx1"
        path = folder / f"{split}-{kind}-ubyte{'.gz' if packed else ''}"
        raw = idx_bytes(x)
        path.write_bytes(gzip.compress(raw) if packed else raw)
    return folder


def assert_holds(dataset, content):
    for name, expected in content.items():
        found = getattr(dataset, name)
        assert found.dtype == (np.uint8 if name[0] == "x" else np.int32)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


# ---- digits


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = load("digits")
    assert digits.x_train.shape == (1437, 8, 8, 1) and digits.max_value == 16
    assert digits.source.endswith("1,437 training and 360 test images")
    with np.load("robustjax/data/digits.npz") as archive:
        index = archive["index"]
    np.testing.assert_array_equal(np.sort(index), np.arange(1797))
    theirs = datasets.load_digits()
    x = np.concatenate([digits.x_train, digits.x_test])[..., 0]
    np.testing.assert_array_equal(x, theirs.images[index])
    y = np.concatenate([digits.y_train, digits.y_test])
    np.testing.assert_array_equal(y, theirs.target[index])
    assert np.bincount(digits.y_test).min() >= 25  # every class can be judged


# ---- what is found, and in which order


def test_npz_by_name_and_by_path(tmp_path, monkeypatch):
    content = arrays()
    path = save(tmp_path / "mine.npz", **content)
    dataset = load("mine", tmp_path)
    assert_holds(dataset, content)
    assert dataset.num_classes == 10 and dataset.max_value == 255
    assert dataset.source == "mine from mine.npz: 12 training and 6 test images"
    assert_holds(load(str(path)), content)
    monkeypatch.setenv("ROBUSTJAX_DATA_DIR", str(tmp_path))
    assert_holds(load("mine"), content)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_in_its_folder_and_in_data_dir(tmp_path, packed):
    content = arrays()
    folder = save_idx(tmp_path / "mnist", content, packed)
    for dataset in (load("mnist", tmp_path), load("mnist", folder)):
        assert_holds(dataset, content)
        assert dataset.x_train.shape == (12, 28, 28, 1)
        assert "(the full set has 60,000 and 10,000)" in dataset.source
    assert_holds(load(str(folder)), content)


def test_npz_comes_before_idx(tmp_path):
    save_idx(tmp_path / "mnist", arrays())
    content = arrays()
    save(tmp_path / "mnist.npz", **content)
    assert_holds(load("mnist", tmp_path), content)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder(tmp_path, channels):
    image = pytest.importorskip("PIL.Image")
    shape = (6, 5) if channels == 1 else (6, 5, 3)
    content = arrays(n=6, m=3, shape=shape, classes=3)
    for name, label in zip("cab", (2, 0, 1), strict=True):
        for split in ("train", "test"):
            folder = tmp_path / "mine" / split / name
            folder.mkdir(parents=True)
            x, y = content[f"x_{split}"], content[f"y_{split}"]
            for i in np.flatnonzero(y == label):
                image.fromarray(x[i]).save(folder / f"{i}.png")
    dataset = load("mine", tmp_path)
    assert dataset.num_classes == 3 and dataset.x_train.shape == (6, 6, 5, channels)
    for split in ("train", "test"):  # sorted by class, then by file name
        order = np.argsort(content[f"y_{split}"], kind="stable")
        x = content[f"x_{split}"][order].reshape(-1, 6, 5, channels)
        np.testing.assert_array_equal(getattr(dataset, f"x_{split}"), x)
        y = content[f"y_{split}"][order]
        np.testing.assert_array_equal(getattr(dataset, f"y_{split}"), y)

    image.fromarray(content["x_train"][0][:4]).save(
        tmp_path / "mine" / "train" / "c" / "odd.png"
    )
    with pytest.raises(ValueError, match="odd.png has 5x4 pixels"):
        load("mine", tmp_path)
    (tmp_path / "mine" / "train" / "c" / "odd.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="odd.png cannot be read"):
        load("mine", tmp_path)


def test_image_folder_without_test_split(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "mine" / "train" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no images"):
        load("mine", tmp_path)


# ---- conversions without loss


def test_column_labels_and_exact_floats_are_converted(tmp_path):
    content = arrays()
    changes = {
        "y_train": content["y_train"][:, None].astype(np.int64),
        "x_train": content["x_train"] / np.float32(255),
        "x_test": content["x_test"] / 255.0,
    }
    path = save(tmp_path / "mine.npz", **{**content, **changes})
    dataset = load(str(path))
    assert_holds(dataset, content)
    assert "converted from float" in dataset.source


# ---- errors


def test_missing_set_says_what_helps(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("cifar10", tmp_path / "nowhere")
    for part in (
        "nowhere (which does not exist)",
        "cifar10.npz",
        "cifar10/*-ubyte[.gz]",
        "cifar10/VERSION",
        "scripts/prepare_data cifar10 --from FILE",
        "--data-dir",
        "ROBUSTJAX_DATA_DIR",
    ):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="Did you mean 'cifar10'") as error:
        load("cifar", tmp_path)
    assert all(name in str(error.value) for name in KNOWN)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(str(tmp_path / "no.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no data set"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="name is empty"):
        load("")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="no .npz and no folder"):
        load(str(tmp_path / "a.txt"))


GOOD = arrays()
FLOATS = np.linspace(-1, 1, 6 * 28 * 28, dtype=np.float32).reshape(6, 28, 28)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": GOOD["x_train"][:0], "y_train": GOOD["y_train"][:0]}, "at least"),
        ({"y_train": GOOD["y_train"][:5]}, "12 images and y_train 5 labels"),
        ({"y_test": GOOD["y_test"].astype(np.float32)}, "y_test is float32"),
        ({"y_test": np.eye(10)[GOOD["y_test"]]}, "One-hot"),
        ({"y_test": GOOD["y_test"].astype(int) - 1}, "label -1"),
        ({"y_test": GOOD["y_test"] + np.uint8(9)}, "label 14 .* 0 to 9"),
        ({"x_test": FLOATS}, "values from -1 to 1"),
        ({"x_test": FLOATS[::-1] * 0 + np.float32(np.nan)}, "multiples of 1/255"),
        ({"x_test": GOOD["x_test"][:, :20]}, "both need one shape"),
        (
            {"x_train": GOOD["x_train"] // 255, "x_test": GOOD["x_test"] // 255},
            "by 255",
        ),
        ({"x_test": GOOD["x_test"].astype(np.int32) + 1}, "1 to 256"),
        ({"x_test": np.zeros((6, 3, 28, 28), np.uint8)}, "channels come last"),
        ({"x_test": np.zeros((6, 784), np.uint8)}, r"shape \(6, 784\)"),
        ({"x_test": np.full((6, 28, 28), "a")}, "images are uint8"),
        ({"max_value": 0}, "max_value is 0"),
    ],
)
def test_foreign_arrays(tmp_path, changes, message):
    content = {**GOOD, **changes}
    if "x_train" in changes and "y_train" not in changes:
        content["y_train"] = GOOD["y_train"]
    np.savez(tmp_path / "mnist.npz", **content)
    with pytest.raises(ValueError, match=message) as error:
        load("mnist", tmp_path)
    assert "mnist.npz" in str(error.value)


def test_another_set_under_a_public_name(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **GOOD)
    with pytest.raises(ValueError, match="is not CIFAR-10.*a name of its own"):
        load("cifar10", tmp_path)


def test_npz_that_is_cut_or_lacks_a_split(tmp_path):
    path = save(tmp_path / "mine.npz")
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="mine.npz cannot be read.*truncated"):
            load("mine", tmp_path)
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match="mine.npz cannot be read"):
        load("mine", tmp_path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="another kind of file"):
        load("mine", tmp_path)
    np.savez(path, x_train=GOOD["x_train"], y_train=GOOD["y_train"])
    with pytest.raises(ValueError, match="lacks x_test, y_test; it holds x_train"):
        load("mine", tmp_path)
    with open(path, "wb") as file:
        np.save(file, GOOD["x_train"])
    with pytest.raises(ValueError, match="one bare array"):
        load("mine", tmp_path)


def test_idx_that_is_cut_foreign_or_missing(tmp_path):
    folder = save_idx(tmp_path / "mnist", GOOD)
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{path.name} cannot be unpacked"):
        load("mnist", tmp_path)
    path.write_bytes(gzip.compress(idx_bytes(GOOD["x_train"])[:-9]))
    with pytest.raises(ValueError, match=r"states the shape \(12, 28, 28\)"):
        load("mnist", tmp_path)
    path.write_bytes(gzip.compress(idx_bytes(GOOD["x_train"])[:9]))
    with pytest.raises(ValueError, match="truncated"):
        load("mnist", tmp_path)
    path.write_bytes(gzip.compress(b"<html>not found</html>"))
    with pytest.raises(ValueError, match="no IDX file"):
        load("mnist", tmp_path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="no gzip file"):
        load("mnist", tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no IDX file for x_train"):
        load("mnist", tmp_path)
    save_idx(folder, GOOD, packed=False)
    assert_holds(load("mnist", tmp_path), GOOD)  # the unpacked twin is taken
    (folder / "test-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match="look like y_test"):
        load("mnist", tmp_path)
