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
      lower, upper: the box; either may be infinite, both: no box.

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
        norms = np.linalg.norm(slopes, DUAL[norm], axis=-1)
        drop = np.multiply(epsilon, norms, out=np.zeros_like(norms), where=norms > 0)
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

    Without a box `min_j m_j / |w_y - w_j|_q`; with one, or half of one (a bound is
    infinite), where `linear_margin` is 0, by bisection to the last bit (infinite where
    the box holds no other class).

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

    def broken(budget: np.ndarray) -> np.ndarray:
        return margins - _drop(slopes, room, norm, budget) <= 0

    far = _far(margins, slopes, room)
    reached = broken(far)
    # Floats >= 0 are ordered as their bits: 64 halvings from however far away.
    low, high = np.zeros(far.shape, np.int64), far.view(np.int64)
    for _ in range(64):
        middle = low + (high - low) // 2
        done = broken(middle.view(np.float64))
        low, high = np.where(done, low, middle), np.where(done, middle, high)
    distance = np.where(reached & ~is_label, high.view(np.float64), np.inf)
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


def _far(margins: np.ndarray, slopes: np.ndarray, room: np.ndarray) -> np.ndarray:
    """A budget `[N, K]` under any norm that reaches the boundary, if there is one."""
    finite = np.isfinite(room)
    all_of_it = np.where(finite, room, 0).sum(-1)
    # A coordinate without end does it alone; twice, so that rounding does not matter.
    need = 2 * np.maximum(margins, 0)[..., None]
    never = np.full(room.shape, np.inf)
    alone = np.divide(need, np.abs(slopes), out=never, where=~finite & (slopes != 0))
    alone = alone.min(-1)
    return np.where(np.isfinite(alone), alone, all_of_it) + 1


def _drop(slopes: np.ndarray, room: np.ndarray, norm: str, epsilon: Any) -> np.ndarray:
    """`max <|w|, d>` over `|d|_p <= epsilon, 0 <= d <= room`, `[N, K]`."""
    gain = np.abs(slopes)
    budget = np.broadcast_to(np.asarray(epsilon, np.float64), gain.shape[:2])[..., None]
    # No coordinate moves further than the budget; without an end `0 * inf` is NaN.
    room = np.where(gain > 0, np.minimum(room, budget), 0)
    # Under an infinite budget the box alone counts, in every norm.
    if norm == "Linf" or np.isinf(budget).all():
        return (gain * np.minimum(room, budget)).sum(-1)
    if norm == "L1":
        order = np.argsort(-gain, -1)
        gain = np.take_along_axis(gain, order, -1)
        room = np.take_along_axis(room, order, -1)
        before = np.cumsum(room, -1) - room
        return (gain * np.clip(budget - before, 0, room)).sum(-1)
    low = np.zeros(budget.shape)
    smallest = np.where(gain > 0, gain, np.inf).min(-1, keepdims=True)
    high = (room.max(-1, keepdims=True) + 1) / smallest
    for _ in range(200):
        middle = (low + high) / 2
        size = np.linalg.norm(np.minimum(middle * gain, room), axis=-1, keepdims=True)
        low = np.where(size <= budget, middle, low)
        high = np.where(size <= budget, high, middle)
    return (gain * np.minimum(low * gain, room)).sum(-1)
