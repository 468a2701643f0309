"""Linear equations of a jaxpr as chains of operations in float64."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from robustjax.certify.operators import Chain, Op, Shape

Params = Mapping[str, Any]


def linear_chain(
    name: str, params: Params, source: Shape, constant: Any, place: int, target: Shape
) -> Chain | None:
    """The chain of one equation that is linear in one of its inputs.

    Args:
      name, params: of the primitive.
      source: shape of the input that depends on x.
      constant: the other input, or None.
      place: which of the inputs depends on x.
      target: shape of the result.

    Returns:
      Operations; None if the equation is not known as linear.

    >>> linear_chain("squeeze", {}, (1, 3), None, 0, (3,))[0].kind
    'reshape'
    """
    if source == target and name in ("reshape", "squeeze", "expand_dims"):
        return ()
    if name in ("reshape", "squeeze", "expand_dims"):
        return (Op("reshape", source, target),)
    if name not in _MAKERS or (constant is not None and name not in _WITH_CONSTANT):
        return None
    if name in _WITH_CONSTANT and constant is not None:
        constant = np.asarray(constant, np.float64)
    return _MAKERS[name](params, source, constant, place, target)


def scale(factor: Any, source: Shape, target: Shape) -> Chain:
    """The product with a constant that broadcasts.

    >>> scale(2.0, (3,), (3,))[0].data.tolist()
    [2.0, 2.0, 2.0]
    """
    factor = np.broadcast_to(np.asarray(factor, np.float64), target)
    return (*broadcast(source, target), Op("scale", target, target, factor))


def broadcast(source: Shape, target: Shape) -> Chain:
    """NumPy's broadcasting, as jaxprs use it between arrays of one rank.

    >>> broadcast((1, 3), (2, 3))[0].data
    (0, 1)
    """
    if source == target:
        return ()
    first = len(target) - len(source)
    return (Op("broadcast", source, target, tuple(range(first, len(target)))),)


def place(source: Shape, target: Shape, axis: int, start: int) -> Chain:
    """Zeros around an array, so that along one axis it begins at `start`.

    >>> place((2,), (5,), 0, 1)[0].data
    ((1, 2, 0),)
    """
    edges = tuple(
        (start, target[i] - size - start, 0) if i == axis else (0, 0, 0)
        for i, size in enumerate(source)
    )
    return (Op("pad", source, target, edges),)


def permute(source: Shape, order: Sequence[int]) -> Chain:
    """Axes in another order; nothing where the order is the same.

    >>> permute((2, 3), (1, 0))[0].target
    (3, 2)
    """
    order = tuple(int(axis) for axis in order)
    if order == tuple(range(len(source))):
        return ()
    return (Op("transpose", source, tuple(source[axis] for axis in order), order),)


def _transpose(params, source, constant, place, target) -> Chain:
    return permute(source, params["permutation"])


def _broadcast_in_dim(params, source, constant, place, target) -> Chain:
    dims = tuple(params["broadcast_dimensions"])
    return (Op("broadcast", source, target, dims),)


def _reduce_sum(params, source, constant, place, target) -> Chain:
    axes = tuple(sorted(params["axes"]))
    return (Op("sum", source, target, axes),) if axes else ()


def _slice(params, source, constant, place, target) -> Chain:
    steps = params["strides"] or (1,) * len(source)
    parts = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return (Op("slice", source, target, tuple(tuple(part) for part in parts)),)


def _rev(params, source, constant, place, target) -> Chain:
    parts = tuple(
        (None, None, -1) if axis in params["dimensions"] else (0, size, 1)
        for axis, size in enumerate(source)
    )
    return (Op("slice", source, target, parts),)


def _pad(params, source, constant, place, target) -> Chain | None:
    if place != 0 or np.any(constant != 0):
        return None
    edges = tuple(tuple(edge) for edge in params["padding_config"])
    if all(edge == (0, 0, 0) for edge in edges):
        return ()
    return (Op("pad", source, target, edges),)


def _dot_general(params, source, constant, place, target) -> Chain | None:
    contracted, batch = params["dimension_numbers"]
    if any(batch):
        return None
    mine, theirs = contracted if place == 0 else contracted[::-1]
    free = [axis for axis in range(len(source)) if axis not in mine]
    rest = [axis for axis in range(constant.ndim) if axis not in theirs]
    matrix = constant.transpose(*theirs, *rest)
    count = math.prod(source[axis] for axis in mine)
    matrix = matrix.reshape(count, -1)
    kept = tuple(source[axis] for axis in free)
    ops = list(permute(source, (*free, *mine)))
    flat = (*kept, count)
    shape = ops[-1].target if ops else source
    if shape != flat:
        ops.append(Op("reshape", shape, flat))
    out = (*kept, matrix.shape[1])
    ops.append(Op("dot", flat, out, matrix))
    wide = (*kept, *(constant.shape[axis] for axis in rest))
    if wide != out:
        ops.append(Op("reshape", out, wide))
    if place == 1:  # the constant's axes come first
        count = len(kept)
        ops += permute(wide, (*range(count, len(wide)), *range(count)))
    return tuple(ops)


def _conv(params, source, constant, place, target) -> Chain | None:
    spec = params["dimension_numbers"]
    if place != 0 or len(source) != 4 or params["batch_group_count"] != 1:
        return None
    batch, feature, *space = spec.lhs_spec
    features, channels, *window = spec.rhs_spec
    ops = list(permute(source, (batch, *space, feature)))
    shape = ops[-1].target if ops else source
    if any(d != 1 for d in params["lhs_dilation"]):
        inner = [d - 1 for d in params["lhs_dilation"]]
        edges = ((0, 0, 0), *((0, 0, i) for i in inner), (0, 0, 0))
        grown = [
            size + i * (size - 1) for size, i in zip(shape[1:3], inner, strict=True)
        ]
        wide = (shape[0], *grown, shape[3])
        ops.append(Op("pad", shape, wide, edges))
        shape = wide
    kernel = constant.transpose(*window, channels, features)
    kernel = _dilated(kernel, params["rhs_dilation"])
    kernel = _ungrouped(kernel, params["feature_group_count"])
    pads = tuple((int(low), int(high)) for low, high in params["padding"])
    order = (*spec.out_spec[:1], *spec.out_spec[2:], spec.out_spec[1])
    out = tuple(target[axis] for axis in order)
    data = (kernel, tuple(params["window_strides"]), pads)
    ops.append(Op("conv", shape, out, data))
    return (*ops, *permute(out, [order.index(axis) for axis in range(4)]))


def _dilated(kernel: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    down, right = dilation
    rows, columns = kernel.shape[:2]
    if (down, right) == (1, 1):
        return kernel
    shape = ((rows - 1) * down + 1, (columns - 1) * right + 1, *kernel.shape[2:])
    wide = np.zeros(shape)
    wide[::down, ::right] = kernel
    return wide


def _ungrouped(kernel: np.ndarray, groups: int) -> np.ndarray:
    """A grouped convolution's kernel with its zeros."""
    if groups == 1:
        return kernel
    rows, columns, channels, features = kernel.shape
    each = features // groups
    full = np.zeros((rows, columns, channels * groups, features))
    for g in range(groups):
        mine = slice(g * each, (g + 1) * each)
        full[:, :, g * channels : (g + 1) * channels, mine] = kernel[..., mine]
    return full


def _window_sum(params, source, constant, place, target) -> Chain | None:
    window = tuple(params["window_dimensions"])
    strides, pads = params["window_strides"], params["padding"]
    dilated = any(
        d != 1 for d in (*params["base_dilation"], *params["window_dilation"])
    )
    if len(source) != 4 or window[0] != 1 or window[3] != 1 or dilated:
        return None
    if strides[0] != 1 or strides[3] != 1 or any(pads[0]) or any(pads[3]):
        return None
    kernel = np.ones((*window[1:3], 1, 1)) * np.eye(source[3])
    data = (kernel, tuple(strides[1:3]), tuple(tuple(p) for p in pads[1:3]))
    return (Op("conv", source, target, data),)


_WITH_CONSTANT = ("dot_general", "conv_general_dilated", "pad")
_MAKERS: dict[str, Callable[..., Chain | None]] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast_in_dim,
    "reduce_sum": _reduce_sum,
    "slice": _slice,
    "rev": _rev,
    "pad": _pad,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "reduce_window_sum": _window_sum,
}
