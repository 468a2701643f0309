"""Networks published as a list of layers and plain arrays in PyTorch's layouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.models.base import Model
from robustjax.models.convolution import Convolution, conv2d
from robustjax.models.layers import average_pool, max_pool, normalize
from robustjax.types import Array, Key, PyTree

PARAMETERS = ("w", "b")
OPERATIONS = (
    "normalize",
    "conv",
    "dense",
    "relu",
    "flatten",
    "maxpool",
    "avgpool",
    "residual",
)


class Layer(NamedTuple):
    """One operation, hashable: `settings` are its constants, `weights` the names of its
    arrays, `branches` the layers of a residual's two paths."""

    op: str
    settings: tuple[tuple[str, Any], ...] = ()
    weights: tuple[tuple[str, str], ...] = ()
    branches: tuple[tuple["Layer", ...], ...] = ()


def from_layers(
    spec: Sequence[Mapping[str, Any]],
    weights: Mapping[str, np.ndarray],
    *,
    convolution: Convolution = "auto",
) -> Model:
    """A `Model` of a list of layers with PyTorch's array layouts.

    Operations: `normalize(mean, std)`, `conv(w, b, stride, padding)` with padding an
    int or [top, left, bottom, right], `dense(w, b)`, `relu`, `flatten` (in channel,
    row, column order), `maxpool(k, s)`, `avgpool(k, s)` with s = k, and
    `residual(main, shortcut)`, the sum of two paths (an empty one is the identity).

    Args:
        spec: one mapping per layer, with "op" and its fields; "w" and "b" are names.
        weights: name -> array; convolutions OIHW, dense [out, in].
        convolution: "auto", "plain" (needed for forward mode) or "canonical".

    Returns:
        A model on `[B, H, W, C]`. `init` returns the given weights (converted to HWIO
        and [in, out], by name), whatever the key.

    Raises:
        ValueError: on an unknown operation, a missing array or one that is not used.

    >>> spec = [{"op": "flatten"}, {"op": "dense", "w": "w", "b": "b"}]
    >>> arrays = {"w": np.ones((3, 4), "float32"), "b": np.zeros(3, "float32")}
    >>> model = from_layers(spec, arrays)
    >>> params, extra = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
    >>> model.apply(params, extra, jnp.ones((1, 2, 2, 1)))[0].tolist()
    [[4.0, 4.0, 4.0]]
    """
    layers = tuple(_layer(entry) for entry in spec)
    params: dict[str, Array] = {}
    _collect(layers, weights, params)
    unused = sorted(set(weights) - set(params))
    if unused:
        raise ValueError(
            f"weights has arrays that no layer names: {', '.join(unused)}. Name them "
            "in the spec, or leave them out."
        )

    def init(key: Key, x: Array) -> tuple[PyTree, PyTree]:
        del key, x
        return dict(params), {}

    return Model(init, _Apply(layers, convolution))


@dataclass(frozen=True)
class _Apply:
    layers: tuple[Layer, ...]
    convolution: Convolution

    def __call__(
        self,
        params: PyTree,
        extra: PyTree,
        x: Array,
        *,
        train: bool = False,
        key: Key | None = None,
    ) -> tuple[Array, PyTree]:
        del train, key
        return _run(self.layers, params, x, self.convolution), extra


def _layer(entry: Mapping[str, Any]) -> Layer:
    op = entry.get("op")
    if op not in OPERATIONS:
        raise ValueError(
            f"spec has the operation {op!r}; known are {', '.join(OPERATIONS)}."
        )
    settings = tuple(
        (name, tuple(value) if isinstance(value, Sequence) else value)
        for name, value in sorted(entry.items())
        if name not in ("op", "main", "shortcut", *PARAMETERS)
    )
    named = tuple(
        (name, entry[name]) for name in PARAMETERS if entry.get(name) is not None
    )
    branches = ()
    if op == "residual":
        branches = tuple(
            tuple(_layer(inner) for inner in entry.get(path, ()))
            for path in ("main", "shortcut")
        )
    if op in ("maxpool", "avgpool") and entry.get("s", entry["k"]) != entry["k"]:
        raise ValueError(
            f"{op} with k={entry['k']} and s={entry['s']}: windows must not overlap."
        )
    return Layer(op, settings, named, branches)


def _collect(
    layers: Sequence[Layer],
    weights: Mapping[str, np.ndarray],
    params: dict[str, Array],
) -> None:
    for layer in layers:
        for field, name in layer.weights:
            if name not in weights:
                raise ValueError(
                    f"the {layer.op} layer names the array {name!r}, which weights "
                    "does not hold."
                )
            array = np.asarray(weights[name], np.float32)
            if field == "w":
                array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
            params[name] = jnp.asarray(array)
        for branch in layer.branches:
            _collect(branch, weights, params)


def _run(
    layers: Sequence[Layer],
    params: Mapping[str, Array],
    x: Array,
    convolution: Convolution,
) -> Array:
    for layer in layers:
        settings = dict(layer.settings)
        arrays = {field: params[name] for field, name in layer.weights}
        if layer.op == "normalize":
            x = normalize(x, settings["mean"], settings["std"])
        elif layer.op == "conv":
            stride = settings.get("stride", 1)
            pads = settings.get("padding", 0)
            top, left, bottom, right = (pads,) * 4 if isinstance(pads, int) else pads
            x = conv2d(
                x,
                arrays["w"],
                (stride, stride),
                ((top, bottom), (left, right)),
                convolution=convolution,
            )
            if "b" in arrays:
                x = x + arrays["b"].reshape(1, 1, 1, -1)
        elif layer.op == "dense":
            x = x @ arrays["w"]
            if "b" in arrays:
                x = x + arrays["b"].reshape(1, -1)
        elif layer.op == "relu":
            x = jax.nn.relu(x)
        elif layer.op == "flatten":
            if x.ndim == 4:
                x = jnp.transpose(x, (0, 3, 1, 2))
            x = x.reshape(x.shape[0], -1)
        elif layer.op == "maxpool":
            x = max_pool(x, settings["k"], convolution=convolution)
        elif layer.op == "avgpool":
            x = average_pool(x, settings["k"])
        else:
            main, shortcut = (
                _run(branch, params, x, convolution) for branch in layer.branches
            )
            x = main + shortcut
    return x
