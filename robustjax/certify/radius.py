"""Certified radii from margins and Lipschitz constants.

Which norm goes with which: the perturbation is measured in p. A logit is L-Lipschitz if
`|z_i(x) - z_i(x')| <= L |x - x'|_p`; the logit vector if `|z(x) - z(x')|_2` is. A
constant in one norm serves others: `|d|_2 <= |d|_1`, `|d|_2 <= sqrt(n) |d|_inf`, so a
radius R in L2 is R in L1 and `R / sqrt(n)` in Linf.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from robustjax.certify.evaluate import logits, rounding
from robustjax.certify.graph import Graph
from robustjax.certify.lipschitz import Constants, lipschitz
from robustjax.certify.operator_norms import OUTWARD

NORMS = ("Linf", "L2", "L1")


def logit_radius(margin: Any, constant: float) -> np.ndarray:
    """`margin / (2 L)`: within it no class passes, if each logit is L-Lipschitz.

    The label's logit falls by at most L R, any other rises by at most L R.

    Args:
      margin: `[N]`, label's logit minus the best other; negative ones give 0.
      constant: L, for the norm in which the radius is meant.

    >>> logit_radius(np.array([3.0, -1.0]), 2.0).tolist()
    [0.75, 0.0]
    """
    return np.maximum(np.asarray(margin, np.float64), 0) / (2 * constant)


def vector_radius(margin: Any, constant: float) -> np.ndarray:
    """`margin / (sqrt(2) L)`, if the logit vector is L-Lipschitz in L2.

    `(z_y - z_j)` is `<e_y - e_j, z>`, and `|e_y - e_j|_2 = sqrt(2)`.

    Args:
      margin: `[N]`.
      constant: L, `|z(x) - z(x')|_2 <= L |x - x'|_p`; the radius is in p.

    Reference: Tsuzuku, Sato & Sugiyama, arXiv:1802.04034.

    >>> vector_radius(np.array([2.0]), 1.0).round(4).tolist()
    [1.4142]
    """
    return np.maximum(np.asarray(margin, np.float64), 0) / (math.sqrt(2) * constant)


def pair_radius(margins: Any, constants: Any, y: Any) -> np.ndarray:
    """`min_j (z_y - z_j) / C_yj`, where each difference of logits has its constant.

    Args:
      margins: `[N, K]`, `z_y - z_j`; the label's own column is ignored.
      constants: `[N, K]`, C_yj; from pairs `[K, K]` it is `pairs[y]`.
      y: `[N]` labels.

    >>> pair_radius([[0.0, 3.0]], [[0.0, 2.0]], [0]).tolist()
    [1.5]
    """
    margins, y = np.asarray(margins, np.float64), np.asarray(y)
    constants = np.asarray(constants, np.float64)
    positive = np.maximum(margins, 0)
    never = np.where(positive > 0, np.inf, 0.0)
    radius = np.divide(positive, constants, out=never, where=constants > 0)
    radius[np.arange(len(y)), y] = np.inf
    return radius.min(1)


def weight(of: str, by: str, count: int) -> float:
    """The least c with `|d|_by <= c |d|_of` for vectors of `count` numbers.

    >>> weight("Linf", "L2", 4), weight("L1", "L2", 4)
    (2.0, 1.0)
    """
    powers = {"Linf": 0.0, "L2": 0.5, "L1": 1.0}
    return float(count) ** max(0.0, powers[by] - powers[of])


def all_constants(graph: Graph) -> dict[str, Constants]:
    """`lipschitz` for Linf, L2 and L1: measured once, used by every radius.

    >>> from robustjax.certify.trace import trace
    >>> sorted(all_constants(trace(lambda x: 2 * x, np.zeros((1, 2)))))
    ['L1', 'L2', 'Linf']
    """
    return {norm: lipschitz(graph, norm) for norm in NORMS}


def certified_radius(
    graph: Graph,
    x: Any,
    y: Any,
    norm: str,
    constants: Mapping[str, Constants] | None = None,
) -> np.ndarray:
    """A radius within which the float32 net keeps its answer, `[N]` float32.

    `max_p min_j (z_y - z_j - rho_yj) / (c_p C^p_yj)`: logits in float64; C^p the
    constants of the pairs in each norm p, c_p the price of measuring the perturbation
    in `norm` instead; rho what float32 arithmetic can move the difference by, here and
    anywhere within the radius (`rounding`). 0 where the net is wrong. The box is not
    used: the certificate holds outside of it too.

    The result is rounded down. It is about the net as JAX computes it in float32 on
    CPU, or elsewhere at matmul precision `highest`, without Winograd's convolutions.

    Args:
      graph: the net, from `trace`.
      x, y: `[N, ...]` float32, `[N]` labels.
      norm: "Linf", "L2" or "L1", of the radius.
      constants: `all_constants(graph)`; None: computed here.

    Raises:
      ValueError: another norm.

    >>> from robustjax.certify.trace import trace
    >>> net = trace(lambda x: x, np.zeros((1, 2)))
    >>> found = certified_radius(net, np.array([[0.75, 0.25]]), np.array([0]), "L2")
    >>> bool(0.3535 < found[0] < 0.125**0.5)
    True
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: radii are known for 'Linf', 'L2' and 'L1'.")
    constants = all_constants(graph) if constants is None else constants
    x, y = np.asarray(x, np.float32), np.asarray(y)
    count = math.prod(x.shape[1:])
    z = logits(graph, x)
    margins = z[np.arange(len(y)), y][:, None] - z

    def largest(margins: np.ndarray) -> np.ndarray:
        radii = [
            pair_radius(margins, found.pairs[y], y) / weight(norm, by, count)
            for by, found in constants.items()
        ]
        return np.max(radii, 0)

    # Without rho the radius is larger: what float32 does is bounded on a larger ball.
    reach = np.minimum(largest(margins), 1e30) * weight(norm, "L2", count)
    rho = rounding(graph, x, constants["L2"], reach)[np.arange(len(y)), y]
    radius = np.minimum(largest(margins - rho) / OUTWARD, np.finfo(np.float32).max)
    return np.nextafter(radius.astype(np.float32), np.float32(0))
