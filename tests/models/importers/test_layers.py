"""The importer: against arithmetic by hand, and against published accuracies."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robustjax.models.base import logits_fn
from robustjax.models.importers import from_layers

SHARED = Path(__file__).resolve().parents[4] / "shared"


def load(name):
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"needs the third-party net {name} in ../shared/models")
    spec = json.loads((folder / "net.json").read_text())["layers"]
    with np.load(folder / "weights.npz") as arrays:
        model = from_layers(spec, dict(arrays))
    return logits_fn(model, *model.init(jax.random.key(0), jnp.zeros((1,))))


def images(name, count):
    if name == "cifar10":
        path = SHARED / "data" / "cifar10.npz"
        if not path.is_file():
            pytest.skip("needs ../shared/data/cifar10.npz")
        with np.load(path) as data:
            return data["x_test"][:count], data["y_test"][:count]
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"needs ../shared/data/{name}")
    pixels = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return x[:count], np.frombuffer(labels, np.uint8, offset=8)[:count]


# Correct ones among the first 1,000 test images, as published (ERAN), and among the
# first 250 or 500 as official AutoAttack's reference files count them.
@pytest.mark.parametrize(
    ("name", "data", "correct"),
    (
        ("eran_mnist_mlp_6_100", "mnist", 960),
        ("eran_cifar_convsmall_pgd", "cifar10", 630),
    ),
)
def test_published_clean_accuracy(name, data, correct):
    f = load(name)
    x, y = images(data, 1000)
    labels = jnp.argmax(jax.jit(lambda f, x: f(x))(f, x / np.float32(255)), 1)
    assert int(jnp.sum(labels == y)) == correct


@pytest.mark.parametrize(
    ("name", "data", "reference"),
    (
        ("vnncomp_cifar_resnet2b", "cifar10", "vnncomp_cifar_resnet2b_Linf_2over255"),
        ("fast_mnist_pgd", "mnist", "fast_mnist_pgd_Linf_0.3"),
        ("kw_fashion_eps01", "fashion_mnist", "kw_fashion_eps01_Linf_0.1"),
        ("sdp_mnist_cnn_a_adv", "mnist", "sdp_mnist_cnn_a_adv_Linf_0.3"),
    ),
)
def test_the_same_images_are_correct_as_in_the_reference(name, data, reference):
    f = load(name)
    with np.load(SHARED / "reference" / f"{reference}.npz") as arrays:
        expected, index = arrays["clean_correct"].astype(bool), arrays["index"]
    x, y = images(data, 1000)
    labels = jax.jit(lambda f, x: jnp.argmax(f(x), 1))(f, x[index] / np.float32(255))
    np.testing.assert_array_equal(np.asarray(labels) == y[index], expected)


def test_against_arithmetic_by_hand():
    numbers = np.random.default_rng(0)
    w = numbers.normal(size=(2, 1, 2, 2)).astype("float32")
    dense = numbers.normal(size=(3, 8)).astype("float32")
    spec = [
        {"op": "normalize", "mean": [0.5], "std": [0.25]},
        {
            "op": "residual",
            "main": [{"op": "conv", "w": "c", "b": None, "padding": [1, 0, 0, 1]}],
            "shortcut": [],
        },
        {"op": "relu"},
        {"op": "maxpool", "k": 2, "s": 2},
        {"op": "flatten"},
        {"op": "dense", "w": "d", "b": "e"},
    ]
    bias = np.arange(3, dtype="float32")
    model = from_layers(spec, {"c": w, "d": dense, "e": bias})
    x = numbers.uniform(size=(1, 4, 4, 1)).astype("float32")
    params, extra = model.init(jax.random.key(0), x)
    logits, _ = model.apply(params, extra, x)
    z = (x[0, :, :, 0] - 0.5) / 0.25
    padded = np.pad(z, ((1, 0), (0, 1)))  # one row on top, one column on the right
    planes = [
        z
        + sum(
            w[o, 0, u, v] * padded[u : u + 4, v : v + 4]
            for u in range(2)
            for v in range(2)
        )
        for o in range(2)
    ]
    pooled = [np.maximum(p, 0).reshape(2, 2, 2, 2).max((1, 3)) for p in planes]
    expected = dense @ np.stack(pooled).reshape(-1) + bias
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def test_bad_files_name_what_is_wrong():
    arrays = {"w": np.zeros((2, 4), "float32")}
    with pytest.raises(ValueError, match="'gelu'"):
        from_layers([{"op": "gelu"}], {})
    with pytest.raises(ValueError, match="'v'"):
        from_layers([{"op": "dense", "w": "v"}], arrays)
    with pytest.raises(ValueError, match="no layer names: w"):
        from_layers([{"op": "relu"}], arrays)
    with pytest.raises(ValueError, match="overlap"):
        from_layers([{"op": "maxpool", "k": 3, "s": 2}], {})
