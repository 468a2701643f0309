"""How far a fraction that was counted may lie from the truth."""

import math
from statistics import NormalDist


def wilson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for the probability behind `successes` out of `total`.

    With `p = successes / total`, `n = total` and z the normal quantile of
    `(1 + confidence) / 2`, all `q` for which `|p - q| <= z * sqrt(q * (1 - q) / n)`.

    Args:
      successes: from 0 to `total`.
      total: at least 1.
      confidence: in (0, 1).

    Returns:
      `(low, high)`, within [0, 1]. It never shrinks to a point: 0 of 10 is up to 0.28.

    Raises:
      ValueError: counts or confidence outside of their range.

    Source: Wilson, Journal of the American Statistical Association 22 (1927) 209-212.

    >>> low, high = wilson(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(
            f"successes={successes}, total={total}: pass 0 <= successes <= total "
            "and total >= 1."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: pass a number inside (0, 1).")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    successes, total = int(successes), int(total)
    center = successes + z * z / 2
    half = z * math.sqrt(successes * (total - successes) / total + z * z / 4)
    low, high = (center - half) / (total + z * z), (center + half) / (total + z * z)
    # Exact at the ends, where rounding would leave 1e-17.
    return (0.0 if successes == 0 else low), (1.0 if successes == total else high)
