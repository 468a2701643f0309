"""Files of every format, damaged and hostile ones too; state_dicts that do not fit."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from robustjax.models.importers import (
    architecture,
    from_net_folder,
    from_state_dict,
    load,
    read_weights,
)
from robustjax.models.importers.architectures import leaves

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "importers"
SHARED = Path(__file__).resolve().parents[4] / "shared"
NET = architecture("wide_resnet_10_1", 3, width=2)
FORMATS = ("tiny.pt", "tiny_legacy.pt", "tiny.safetensors", "tiny.npz")


def state(net=NET, seed=0):
    numbers = np.random.default_rng(seed)
    return {
        name: numbers.normal(size=leaf.shape).astype("float32")
        for name, leaf in leaves(net).items()
    }


def test_all_formats_hold_the_same_weights():
    _, expected, statistics = load(GOLDEN / "tiny.npz", NET)
    for name in FORMATS:
        _, params, extra = load(GOLDEN / name, NET)
        for part in ("stem", "head"):
            np.testing.assert_array_equal(
                params[part]["kernel"], expected[part]["kernel"]
            )
        np.testing.assert_array_equal(
            extra["batch_stats"]["bn"]["var"], statistics["batch_stats"]["bn"]["var"]
        )
    arrays = read_weights(GOLDEN / "tiny.npz")
    np.testing.assert_array_equal(expected["head"]["kernel"], arrays["fc.weight"].T)
    nested = read_weights(GOLDEN / "tiny_legacy.pt")
    for name, array in arrays.items():
        np.testing.assert_array_equal(nested[f"module.{name}"], array)


def test_kinds_of_tensors():
    with pytest.raises(ValueError, match="several .* 'last', 'best': .* entry='last'"):
        read_weights(GOLDEN / "kinds.pt")
    with pytest.raises(ValueError, match="entry='ema': .* it has 'last', 'best'"):
        read_weights(GOLDEN / "kinds.pt", entry="ema")
    arrays = read_weights(GOLDEN / "kinds.pt", entry="last")
    view = np.arange(12.0, dtype="float32").reshape(3, 4).T[1:]
    np.testing.assert_array_equal(arrays["view"], view)
    assert arrays["empty"].shape == (0, 2) and arrays["flag"].dtype == bool
    np.testing.assert_array_equal(arrays["parameter"], np.ones(2, "float32"))
    weight = read_weights(GOLDEN / "tiny.npz")["fc.weight"]
    assert arrays["fc.weight"].dtype == np.float32  # bfloat16: 8 bits of precision
    np.testing.assert_allclose(arrays["fc.weight"], weight, rtol=2.0**-8)


def test_the_reader_agrees_with_pytorch():
    torch = pytest.importorskip("torch")
    for name in ("tiny.pt", "tiny_legacy.pt"):
        theirs = torch.load(GOLDEN / name, weights_only=True)["state_dict"]
        ours = read_weights(GOLDEN / name)
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            np.testing.assert_array_equal(ours[key], tensor.numpy())


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ("zip", "legacy"))
@pytest.mark.parametrize("protocol", (2, 4))
def test_a_pickle_that_runs_something_is_refused(tmp_path, form, protocol):
    target, path = tmp_path / "created", tmp_path / "model.pt"
    evil = pickle.dumps({"state_dict": Attack(target)}, protocol)
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
    else:
        start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + evil)
    with pytest.raises(ValueError, match="mkdir, which is no part of a tensor: refuse"):
        read_weights(path)
    assert not target.exists()
    pickle.loads(evil)  # it would have
    assert target.exists()


def test_whatever_is_no_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match="tiny_refused.pt asks for pathlib.*refused"):
        read_weights(GOLDEN / "tiny_refused.pt")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", (0.002, 0.5, 0.97))
def test_a_truncated_file_says_so(tmp_path, name, share):
    data = (GOLDEN / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="truncated or damaged .* download it again"):
        read_weights(path)


def zip_checkpoint(path, tensor, data=b"\0" * 16):
    """A .pt file whose pickle describes one tensor: (offset, shape, strides)."""
    offset, shape, strides = tensor

    class Storage:
        pass

    class FloatStorage:
        pass

    def rebuild():
        pass

    FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"

    class Tensor:
        def __reduce__(self):
            return rebuild, (Storage(), offset, shape, strides, False, None)

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return "storage", FloatStorage, "0", "cpu", 4
            return None

        def save_global(self, obj, name=None):  # torch need not be there
            self.write(
                pickle.GLOBAL
                + f"{obj.__module__}\n{obj.__qualname__}\n".encode("ascii")
            )

        save_type = save_global
        dispatch = {
            **pickle._Pickler.dispatch,
            type: save_global,
            type(rebuild): save_global,
        }

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"w": Tensor()})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", stream.getvalue())
        archive.writestr("a/data/0", data)
    return path


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    (
        ((0, (2, 2), (2, 1)), None),
        ((2, (2, 2), (2, 1)), "beyond its storage"),
        ((0, (2, 2), (4, 1)), "beyond its storage"),
        ((-1, (2,), (1,)), "impossible strides"),
        ((3, (4,), (-1,)), "impossible strides"),
        ((0, (1000, 1000), (0, 0)), "impossible strides"),
    ),
)
def test_tensors_stay_inside_their_storage(tmp_path, tensor, complaint):
    path = zip_checkpoint(tmp_path / "m.pt", tensor)
    if complaint is None:
        assert read_weights(path)["w"].shape == (2, 2)
    else:
        with pytest.raises(ValueError, match=complaint):
            read_weights(path)


def test_missing_numbers_and_other_files(tmp_path):
    short = zip_checkpoint(tmp_path / "m.pt", (0, (2, 2), (2, 1)), b"\0" * 12)
    with pytest.raises(ValueError, match="truncated .*12 bytes for the 4 numbers"):
        read_weights(short)
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    with pytest.raises(ValueError, match="no .pt, .pth, .safetensors or .npz"):
        read_weights(other)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(ValueError, match="neither a PyTorch checkpoint nor .npz"):
        read_weights(tmp_path / "x.zip")
    np.savez(tmp_path / "o.npz", w=np.array([{}], object))
    with pytest.raises(ValueError, match="w.npy: Object arrays"):
        read_weights(tmp_path / "o.npz")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pt")


def same(first, second):
    return all(
        np.array_equal(first[1][part]["kernel"], second[1][part]["kernel"])
        for part in ("stem", "head")
    )


def test_prefixes_counts_copies_and_unused_stages_are_left_out():
    arrays = state()
    plain = from_state_dict(NET, arrays)
    for prefix in ("module.", "model.", "module.model.", "net.0."):
        more = {prefix + name: array for name, array in arrays.items()}
        more[f"{prefix}bn1.num_batches_tracked"] = np.array(7)
        more[f"{prefix}sub_block1.layer.0.conv1.weight"] = np.ones((2, 2, 3, 3))
        more["module.attacker.model.conv1.weight"] = arrays["conv1.weight"]
        assert same(from_state_dict(NET, more), plain)


def test_normalization_is_the_files_own_and_no_other_is_taken_quietly():
    arrays, x = state(), np.full((1, 8, 8, 3), 0.75, "float32")
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 0.25)
    buffers = {
        "normalize.mean": np.array(mean).reshape(1, 3, 1, 1),
        "normalize.std": np.array(std).reshape(1, 3, 1, 1),
    }
    inside = {f"model.{name}": array for name, array in arrays.items()}
    found, params, extra = from_state_dict(NET, {**inside, **buffers})
    wanted = architecture("wide_resnet_10_1", 3, width=2, mean=mean, std=std)
    explicit, _, _ = from_state_dict(wanted, arrays)
    plain, _, _ = from_state_dict(NET, arrays)
    assert found.apply == explicit.apply and found.apply != plain.apply
    shifted = (x - np.array(mean, "float32")) / np.array(std, "float32")
    extra["batch_stats"] = {  # variances are positive
        place: {
            key: {name: np.abs(a) for name, a in value.items()}
            if isinstance(value, dict)
            else np.abs(value)
            for key, value in part.items()
        }
        for place, part in extra["batch_stats"].items()
    }
    np.testing.assert_allclose(
        found.apply(params, extra, x)[0],
        plain.apply(params, extra, shifted)[0],
        rtol=1e-4,
    )
    other = architecture("wide_resnet_10_1", 3, width=2, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"normalizes by mean=\(0.5, 0.25, 0.125\)"):
        from_state_dict(other, {**inside, **buffers})


def test_what_does_not_fit_is_listed_with_the_nearest_name():
    arrays = state()
    wrong = dict(arrays)
    wrong["block1.layer.0.convl.weight"] = wrong.pop("block1.layer.0.conv1.weight")
    wrong["fc.weight"] = np.zeros((5, 8))
    with pytest.raises(ValueError) as caught:
        from_state_dict(NET, wrong)
    text = str(caught.value)
    assert "1 missing: block1.layer.0.conv1.weight (the file has block1" in text
    assert "1 left over: block1.layer.0.convl.weight (wanted is block1" in text
    assert "1 of another shape: fc.weight has (5, 8), the architecture (3, 8)" in text
    extra = {**arrays, "head2.weight": np.arange(6.0)}
    with pytest.raises(ValueError, match="1 left over: head2.weight"):
        from_state_dict(NET, extra)
    assert same(from_state_dict(NET, extra, ignore=("head2.",)), (0, *plain(arrays)))
    # Of another family altogether: everything, but no endless list.
    with pytest.raises(
        ValueError, match=r"missing: .*; \.\.\. ?.*left over: .*; \.\.\."
    ):
        from_state_dict("resnet18", arrays)
    # A BatchNorm that nobody uses is no copy of another one.
    norm = {f"bn.{leaf}": np.ones(8) for leaf in ("weight", "running_var")}
    with pytest.raises(ValueError, match="2 left over: bn.running_var"):
        from_state_dict(NET, {**arrays, **norm})


def plain(arrays):
    return from_state_dict(NET, arrays)[1:]


def test_net_folders():
    folder = SHARED / "models" / "fast_mnist_pgd"
    if not folder.is_dir():
        pytest.skip("needs the third-party net fast_mnist_pgd in ../shared/models")
    model, params, extra = from_net_folder(folder)
    x = np.zeros((2, 28, 28, 1), "float32")
    assert model.apply(params, extra, x)[0].shape == (2, 10)


def test_a_net_folder_without_layers(tmp_path):
    (tmp_path / "net.json").write_text("[]")
    with pytest.raises(ValueError, match='has no "layers"'):
        from_net_folder(tmp_path)
