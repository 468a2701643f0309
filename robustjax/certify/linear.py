"""Linear models: the worst case and the distance to the boundary, exactly.

`z = x W + b`. Between the classes y and j the margin is linear with the weights
`w_y - w_j`, so within an epsilon-ball it falls to `m_j - epsilon |w_y - w_j|_q`, q the
dual norm, and no further. Arithmetic is float64.
"""

from typing import Any

import numpy as np

DUAL = {"Linf": 1, "L2": 2, "L1": np.inf}


def linear_margin(
    weights: Any,
    bias: Any,
    x: Any,
    y: Any,
    norm: str,
    epsilon: float,
    lower: float = -np.inf,
    upper: float = np.inf,
) -> np.ndarray:
    """The least margin in ball and box, `[N]`: below 0, the example can be broken.

    Without a box `min_j m_j - epsilon |w_y - w_j|_q` (Linf: q = 1, L2: 2, L1: inf).
    With one, for each class j: Linf coordinate by coordinate; L2 by `clip(-t w)`, t by
    bisection; L1 greedily, the steepest coordinates first.

    Args:
      weights, bias: `[d, K]`, `[K]`.
      x, y: `[N, ...]` with d numbers each, `[N]` labels.
      norm: "Linf", "L2" or "L1".
      epsilon: the budget, in input units.
      lower, upper: the box; infinite: none.

    Raises:
      ValueError: another norm, or a negative epsilon.

    >>> w = np.array([[2.0, 0.0], [1.0, 0.0]])
    >>> linear_margin(w, np.zeros(2), np.ones((1, 2)), [0], "Linf", 0.5).tolist()
    [1.5]
    """
    if epsilon < 0 or np.isnan(epsilon):
        raise ValueError(f"epsilon={epsilon}: a budget is a number >= 0.")
    margins, slopes, flat, is_label = _differences(weights, bias, x, y, norm)
    if np.isinf(lower) and np.isinf(upper):
        drop = epsilon * np.linalg.norm(slopes, DUAL[norm], axis=-1)
    else:
        drop = _drop(slopes, _room(slopes, flat, lower, upper), norm, epsilon)
    return np.where(is_label, np.inf, margins - drop).min(1)


def linear_distance(
    weights: Any,
    bias: Any,
    x: Any,
    y: Any,
    norm: str,
    lower: float = -np.inf,
    upper: float = np.inf,
) -> np.ndarray:
    """The exact distance to the nearest boundary, `[N]`; 0 where it is wrong already.

    Without a box `min_j m_j / |w_y - w_j|_q`; with one, where `linear_margin` is 0, by
    bisection (infinite where the box holds no other class).

    Args:
      weights, bias, x, y, norm, lower, upper: see `linear_margin`.

    >>> w = np.array([[2.0, 0.0], [1.0, 0.0]])
    >>> linear_distance(w, np.zeros(2), np.ones((1, 2)), [0], "Linf").tolist()
    [1.0]
    """
    margins, slopes, flat, is_label = _differences(weights, bias, x, y, norm)
    if np.isinf(lower) and np.isinf(upper):
        norms = np.linalg.norm(slopes, DUAL[norm], axis=-1)
        # Equal weights: the margin is the same everywhere.
        never = np.where(margins > 0, np.inf, 0.0)
        distance = np.divide(margins, norms, out=never, where=norms > 0)
        return np.maximum(np.where(is_label, np.inf, distance).min(1), 0)
    room = _room(slopes, flat, lower, upper)
    far = float(np.sum(np.broadcast_to(np.abs(upper - lower), flat.shape[1:]))) + 1
    low, high = np.zeros(margins.shape), np.full(margins.shape, far)
    reached = margins - _drop(slopes, room, norm, high) <= 0
    for _ in range(80):
        middle = (low + high) / 2
        broken = margins - _drop(slopes, room, norm, middle) <= 0
        low, high = np.where(broken, low, middle), np.where(broken, middle, high)
    distance = np.where(reached & ~is_label, high, np.inf)
    return np.where((margins <= 0) & ~is_label, 0, distance).min(1)


def _differences(weights: Any, bias: Any, x: Any, y: Any, norm: str):
    """Margins `[N, K]` to each class, their weights `[N, K, d]`, x, and the label."""
    if norm not in DUAL:
        raise ValueError(f"norm={norm!r}: linear models know 'Linf', 'L2' and 'L1'.")
    weights, bias = np.asarray(weights, np.float64), np.asarray(bias, np.float64)
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    y = np.asarray(y)
    slopes = weights.T[y][:, None] - weights.T[None]
    margins = np.einsum("nd,nkd->nk", flat, slopes) + bias[y][:, None] - bias
    return margins, slopes, flat, y[:, None] == np.arange(len(bias))


def _room(slopes: np.ndarray, flat: np.ndarray, lower: Any, upper: Any) -> np.ndarray:
    """How far each coordinate can go downhill."""
    down, up = flat - lower, upper - flat
    return np.where(slopes > 0, down[:, None], up[:, None])


def _drop(slopes: np.ndarray, room: np.ndarray, norm: str, epsilon: Any) -> np.ndarray:
    """`max <|w|, d>` over `|d|_p <= epsilon, 0 <= d <= room`, `[N, K]`."""
    gain = np.abs(slopes)
    budget = np.broadcast_to(np.asarray(epsilon, np.float64), gain.shape[:2])[..., None]
    if norm == "Linf":
        return (gain * np.minimum(room, budget)).sum(-1)
    if norm == "L1":
        order = np.argsort(-gain, -1)
        gain = np.take_along_axis(gain, order, -1)
        room = np.take_along_axis(room, order, -1)
        before = np.cumsum(room, -1) - room
        return (gain * np.clip(budget - before, 0, room)).sum(-1)
    low = np.zeros(budget.shape)
    smallest = np.where(gain > 0, gain, np.inf).min(-1, keepdims=True)
    widest = np.where(np.isfinite(room), room, budget).max(-1, keepdims=True)
    high = (widest + 1) / smallest
    for _ in range(200):
        middle = (low + high) / 2
        size = np.linalg.norm(np.minimum(middle * gain, room), axis=-1, keepdims=True)
        low = np.where(size <= budget, middle, low)
        high = np.where(size <= budget, high, middle)
    return (gain * np.minimum(low * gain, room)).sum(-1)
