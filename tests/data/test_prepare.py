import importlib.util
import io
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from robustjax.data import load, stream
from robustjax.data.arrayrecord import tfds_source
from robustjax.data.prepare import NAMES, main, prepare

tfds = pytest.importorskip(
    "tensorflow_datasets", reason="needs the extra robustjax[data]"
)
RANDOM = np.random.RandomState(0)
ROOT = Path(__file__).parents[2]


def arrays(shape, n=300, m=40, classes=10):
    return {
        "x_train": RANDOM.randint(0, 256, (n, *shape)).astype(np.uint8),
        "y_train": RANDOM.randint(0, classes, n).astype(np.int32),
        "x_test": RANDOM.randint(0, 256, (m, *shape)).astype(np.uint8),
        "y_test": RANDOM.randint(0, classes, m).astype(np.int32),
    }


def assert_holds(dataset, content):
    for name, expected in content.items():
        np.testing.assert_array_equal(getattr(dataset, name), expected)


def planes(x):
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


@pytest.mark.parametrize("name", NAMES)
def test_prepared_set_is_read_by_tfds_and_load(tmp_path, name):
    shape = (28, 28, 1) if "mnist" in name else (32, 32, 3)
    content = arrays(shape, 60, 20, 100 if name == "cifar100" else 10)
    np.savez(tmp_path / "set.npz", **content)
    data_dir = tmp_path / "data"
    target = prepare(name, data_dir, [tmp_path / "set.npz"])
    assert target == data_dir / name / str(tfds.builder_cls(name).VERSION)
    assert sorted(p.name for p in data_dir.iterdir()) == [name]
    for split, size in (("train", 60), ("test", 20)):
        source = tfds.data_source(name, data_dir=data_dir, split=split)
        assert len(source) == size
        for row in (0, 7, size - 1):  # in the order of the files
            image = source[row]["image"]
            np.testing.assert_array_equal(image, content[f"x_{split}"][row])
            assert source[row]["label"] == content[f"y_{split}"][row]
    dataset = load(name, data_dir)
    assert_holds(dataset, content)
    assert f"TFDS ArrayRecord {name}/{target.name}: 60 training" in dataset.source
    assert_holds(load(str(target)), content)


def test_stream_reads_a_prepared_set(tmp_path):
    content = arrays((28, 28, 1), 40, 10)
    np.savez(tmp_path / "set.npz", **content)
    target = prepare("mnist", tmp_path, [tmp_path / "set.npz"])
    batches = stream(tfds_source(target, "train"), 8, 0, epochs=1, max_value=None)
    found = list(batches)
    batches.close()
    index = np.concatenate([b.index for b in found])
    np.testing.assert_array_equal(np.sort(index), np.arange(40))
    x = np.concatenate([b.x for b in found])
    np.testing.assert_array_equal(x, content["x_train"][index])
    # Four processes, from the second step on: the rows of one, in its order.
    options = {"epochs": 1, "start_step": 1, "max_value": None, "shard_count": 4}
    four = []
    for shard in range(4):
        part = stream(tfds_source(target, "train"), 2, 0, shard_index=shard, **options)
        four.append(list(part))
        part.close()
    for step, one in enumerate(found[1:]):
        for field in ("x", "y", "index"):
            dealt = [getattr(shard[step], field) for shard in four]
            np.testing.assert_array_equal(np.concatenate(dealt), getattr(one, field))
    with pytest.raises(ValueError, match="has the splits .* not 'validation'"):
        tfds_source(target, "validation")


@pytest.mark.parametrize("name", ["cifar10", "svhn_cropped", "mnist"])
def test_order_of_a_set_that_tfds_shuffled(tmp_path, name):
    """Ids give the official order back; without ids (MNIST) `source` says so."""
    content = arrays((28, 28, 1) if name == "mnist" else (32, 32, 3), 30, 10)
    official = tfds.builder_cls(name)

    def examples(self, split):
        for row, x in enumerate(content[f"x_{split}"]):
            example = {"image": png(x), "label": int(content[f"y_{split}"][row])}
            if "id" in self.info.features:
                example["id"] = f"{split}_{row:05d}"
            yield row, example

    def splits(self, dl_manager):
        return {s: self._generate_examples(s) for s in ("train", "test")}

    shuffled = type(
        "Shuffled",
        (official,),
        {
            "name": name,
            "__module__": official.__module__,
            "_generate_examples": examples,
            "_split_generators": splits,
        },
        skip_registration=True,
    )
    builder = shuffled(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare(download_dir=str(tmp_path / "downloads"))
    stored = tfds.data_source(name, data_dir=tmp_path, split="train")
    labels = [stored[i]["label"] for i in range(30)]
    assert labels != content["y_train"].tolist()  # TFDS did shuffle
    dataset = load(name, tmp_path)
    if name != "mnist":
        assert_holds(dataset, content)
        assert "shuffled" not in dataset.source
    else:
        assert dataset.y_train.tolist() == labels
        assert "in TFDS's shuffled order" in dataset.source


def test_prepared_set_that_is_damaged(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays((28, 28, 1), 400, 10))
    target = prepare("mnist", tmp_path, [tmp_path / "set.npz"])
    (record,) = target.glob("*train*")
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged.*prepare_data mnist"):
        load("mnist", tmp_path)
    record.unlink()
    with pytest.raises(ValueError, match="a file is missing"):
        load("mnist", tmp_path)
    (target / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="truncated or damaged"):
        load("mnist", tmp_path)


def png(x):
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(buffer, "png")
    return buffer.getvalue()


def cifar_members(name, content, kind):
    """The batch files as they are published, five training batches for CIFAR-10."""
    members = {}
    ten = name == "cifar10"
    for split, count in (("train", 5 if ten else 1), ("test", 1)):
        xs = np.array_split(content[f"x_{split}"], count)
        ys = np.array_split(content[f"y_{split}"], count)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            file = split
            if ten:
                file = f"data_batch_{i + 1}" if split == "train" else "test_batch"
            if kind == "python":
                label = b"labels" if ten else b"fine_labels"
                batch = {b"data": planes(x), label: y.tolist()}
                members[file] = pickle.dumps(batch, protocol=2)
            else:
                coarse = np.zeros((len(x), 0 if ten else 1), np.uint8)
                rows = [coarse, y[:, None].astype(np.uint8), planes(x)]
                members[file + ".bin"] = np.concatenate(rows, 1).tobytes()
    return members


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in members.items():
            info = tarfile.TarInfo(f"cifar-batches/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_published_cifar_files(tmp_path, name, kind):
    content = arrays((32, 32, 3), 25, 10, 10 if name == "cifar10" else 100)
    members = cifar_members(name, content, kind)
    archive = write_tar(tmp_path / "cifar.tar.gz", members)
    prepare(name, tmp_path / "one", [archive])
    assert_holds(load(name, tmp_path / "one"), content)
    folder = tmp_path / "batches"
    folder.mkdir()
    for file, raw in members.items():
        (folder / file).write_bytes(raw)
    prepare(name, tmp_path / "two", [folder])
    assert_holds(load(name, tmp_path / "two"), content)

    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cifar.tar.gz cannot be unpacked"):
        prepare(name, tmp_path / "three", [archive])
    last = sorted(members)[-1]
    (folder / last).write_bytes(members[last][:5000])
    with pytest.raises(ValueError, match=f"{last} .*truncated"):
        prepare(name, tmp_path / "three", [folder])
    (folder / last).unlink()
    with pytest.raises(FileNotFoundError, match="lacks the file"):
        prepare(name, tmp_path / "three", [folder])
    assert not (tmp_path / "three").exists()


def test_pickles_as_python_2_wrote_them(tmp_path):
    """The published CIFAR archives: byte strings, and NumPy 1 names."""
    content = arrays((32, 32, 3), 2, 2)
    members = {}
    for split in ("train", "test"):
        data = planes(content[f"x_{split}"]).tobytes()
        members[split] = (
            b"\x80\x02}(U\x04data"
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
            b"\x87R(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            + len(data).to_bytes(4, "little")
            + data
            + b"tbU\x0bfine_labels](K"
            + bytes([content[f"y_{split}"][0]])
            + b"K"
            + bytes([content[f"y_{split}"][1]])
            + b"eu."
        )
    archive = write_tar(tmp_path / "cifar-100-python.tar.gz", members)
    prepare("cifar100", tmp_path / "data", [archive])
    assert_holds(load("cifar100", tmp_path / "data"), content)


def test_a_pickle_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    members = dict.fromkeys(["test", "train"], pickle.dumps({b"data": Evil()}))
    archive = write_tar(tmp_path / "cifar.tar.gz", members)
    with pytest.raises(ValueError, match="it asks for"):
        prepare("cifar100", tmp_path / "data", [archive])
    assert not (tmp_path / "ran").exists()


def test_published_svhn_files(tmp_path):
    from scipy.io import savemat

    content = arrays((32, 32, 3), 20, 10)
    for split in ("train", "test"):
        x, y = content[f"x_{split}"], content[f"y_{split}"]
        labels = np.where(y == 0, 10, y)[:, None]  # the files call zero 10
        x = x.transpose(1, 2, 3, 0)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": labels})
    prepare("svhn_cropped", tmp_path / "data", [tmp_path])
    assert_holds(load("svhn_cropped", tmp_path / "data"), content)
    (tmp_path / "test_32x32.mat").write_bytes(b"no mat file")
    with pytest.raises(ValueError, match="test_32x32.mat cannot be read"):
        prepare(
            "svhn_cropped",
            tmp_path / "more",
            [tmp_path / "train_32x32.mat", tmp_path / "test_32x32.mat"],
        )


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="'imagenet'; known names: mnist"):
        prepare("imagenet", tmp_path)
    with pytest.raises(FileNotFoundError, match="no.npz does not exist"):
        prepare("mnist", tmp_path, [tmp_path / "no.npz"])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="looks like mnist. Wanted"):
        prepare("mnist", tmp_path, [tmp_path / "a.txt"])
    np.savez(tmp_path / "set.npz", **arrays((32, 32, 3), 5, 5))
    with pytest.raises(ValueError, match="is not MNIST"):
        prepare("mnist", tmp_path, [tmp_path / "set.npz"])


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None,
    reason="with TensorFlow installed it would download",
)
def test_without_files_and_tensorflow(tmp_path):
    with pytest.raises(ImportError, match="--from FILE"):
        prepare("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    content = arrays((28, 28, 1), 8, 5)
    np.savez(tmp_path / "set.npz", **content)
    call = ["mnist", "--data-dir", str(tmp_path), "--from", str(tmp_path / "set.npz")]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert "'train': 8, 'test': 5" in out and f"data_dir='{tmp_path}'" in out
    assert main(call) == 1
    assert "--overwrite" in capsys.readouterr().err
    content["y_test"] = 9 - content["y_test"]
    np.savez(tmp_path / "set.npz", **content)
    assert main([*call, "--overwrite"]) == 0
    assert_holds(load("mnist", tmp_path), content)
    with pytest.raises(SystemExit):
        main(["mnist", "--data_dir", "x"])


def test_the_script_runs_from_anywhere(tmp_path):
    run = subprocess.run(
        [ROOT / "scripts" / "prepare_data", "mnist", "--from", "absent.gz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.strip() == "prepare_data: absent.gz does not exist."
