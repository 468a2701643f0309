"""The bracket: certified radius <= true distance <= smallest perturbation found."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import plots
from robustjax.attacks.pgd import pgd
from robustjax.certify.radius import certified_radius
from robustjax.certify.trace import trace
from robustjax.evaluation.attack import attack
from robustjax.evaluation.checks import check_inputs, warn
from robustjax.evaluation.curves import examined, middle, minimal_norm_curve
from robustjax.evaluation.prepare import answers, prepare_model
from robustjax.losses import margin_loss
from robustjax.norms import L1, L2, Linf
from robustjax.threats import ThreatModel
from robustjax.types import Array, Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

PGD = pgd(40)
ORDERS = {Linf: np.inf, L2: 2, L1: 1}
SLACK = 1e-5
"""FAB measures its distances in float32."""


class CrossingError(Exception):
    """A certificate was broken by an attack: one of the two is wrong."""


class Bracket(NamedTuple):
    """What is known of each example's distance to the nearest adversarial one.

    norm:      "Linf", "L2" or "L1".
    correct:   `[N]` bool, the clean prediction.
    certified: `[N]` no perturbation up to here changes the answer; 0 where it is wrong.
    found:     `[N]` the smallest adversarial perturbation found; 0 where it is wrong,
               infinite where none was found.
    """

    norm: str
    correct: np.ndarray
    certified: np.ndarray
    found: np.ndarray

    def accuracies(self, epsilon: Any) -> tuple[np.ndarray, np.ndarray]:
        """Certified and empirical accuracy within each epsilon, `[E]` each.

        The true robust accuracy lies between them.
        """
        epsilon = np.atleast_1d(np.asarray(epsilon, np.float64))
        proven = self.correct & (self.certified[None] >= epsilon[:, None])
        standing = self.correct & (self.found[None] > epsilon[:, None])
        return proven.mean(1), standing.mean(1)

    def table(self, epsilon: Sequence[float]) -> str:
        """A row for each epsilon: certified, unknown and empirical accuracy."""
        lines = [f"{self.norm:>9}  certified  unknown  empirical"]
        for e, low, high in zip(epsilon, *self.accuracies(epsilon), strict=True):
            lines.append(f"{e:9.4g}  {low:9.3f}  {high - low:7.3f}  {high:9.3f}")
        return "\n".join(lines)


def bracket(
    logits_fn: Callable[..., Array],
    x: Any,
    y: Any,
    threat: ThreatModel,
    radius: Any = None,
    *,
    num_bisections: int = 8,
    fab_steps: int = 50,
    key: Key | None = None,
    batch_size: int = 256,
    index: Any = None,
    checks: str = "default",
    image_axes: str | None = "HWC",
    mesh: Any = None,
) -> Bracket:
    """Per example: certified radius, and the smallest adversarial perturbation found.

    `certified <= true distance <= found`. Found by PGD-40 on the margin at budgets that
    are bisected for each example, and by targeted FAB (`minimal_norm_curve`); every
    PGD point is judged by another pass at matmul precision `highest`.

    Args:
      logits_fn: inputs `[B, ...]` to logits `[B, K]`.
      x, y: `[N, ...]` in the box of `threat`, `[N]` labels.
      threat: norm and box; its epsilon is the largest budget that PGD tries.
      radius: certified radii `[N]` of any method; None: `certified_radius`, from the
        net's global Lipschitz constants.
      num_bisections: PGD runs after the first one, at the largest budget.
      fab_steps: steps of FAB for each of the best other classes; 0: no FAB.
      checks: as of `minimal_norm_curve`: whether `found` can be trusted. Here one draw
        judges a random model in any case.
      key, batch_size, index, image_axes, mesh: see `evaluate`. The certified radii are
        computed on one device.

    Returns:
      `Bracket`.

    Raises:
      CrossingError: an attack succeeded inside of a certified radius.
      ValueError: a norm other than Linf, L2 and L1; a radius of another shape.

    >>> import robustjax as rj
    >>> f = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = jnp.array([[0.6, 0.5], [0.9, 0.1]]), jnp.array([0, 0])
    >>> found = bracket(f, x, y, rj.linf(0.6), num_bisections=2, fab_steps=5)
    >>> found.certified.round(3).tolist(), found.found.round(2).tolist()
    ([0.05, 0.4], [0.05, 0.4])
    """
    x, y, index = check_inputs(x, y, threat, index, batch_size)
    x = x.astype(np.float32)
    order = ORDERS.get(type(threat.norm))
    name = type(threat.norm).__name__
    if order is None:
        raise ValueError(f"threat has the norm {name}; brackets know Linf, L2 and L1.")
    if radius is None:
        radius = certified_radius(trace(logits_fn, x), x, y, name)
    radius = np.asarray(radius, np.float64)
    if radius.shape != y.shape:
        raise ValueError(f"radius has shape {radius.shape}; give one for each of y.")
    key = jax.random.key(0) if key is None else key
    key_pgd, key_fab, key_judge = jax.random.split(key, 3)
    if checks != "none":
        own_key = jax.random.fold_in(key, 3)
        asked = (own_key, batch_size, index, checks, image_axes, mesh)
        warn(examined(logits_fn, x, y, threat, middle(threat, x), *asked)[1])
    f, _ = prepare_model(logits_fn, x, y, batch_size)

    def judge(points: np.ndarray) -> np.ndarray:
        return answers(f, points, key_judge, batch_size, mesh) != y

    wrong = judge(x)
    limit = np.broadcast_to(np.asarray(threat.epsilon, np.float64), y.shape)

    found = np.where(wrong, 0.0, np.inf)
    low, high = np.zeros(y.shape), limit.copy()
    for i in range(num_bisections + 1):
        budget = high if i == 0 else (low + high) / 2
        here = dataclasses.replace(threat, epsilon=jnp.asarray(budget, jnp.float32))
        x_adv = attack(
            *(logits_fn, x, y, here, PGD),
            loss=margin_loss,
            key=jax.random.fold_in(key_pgd, i),
            batch_size=batch_size,
            index=index,
            mesh=mesh,
        ).x_adv
        x_adv = np.asarray(x_adv)
        broken = judge(x_adv)
        delta = (x_adv.astype(np.float64) - x).reshape(len(x), -1)
        size = np.linalg.norm(delta, order, axis=1)
        found = np.where(broken, np.minimum(found, size), found)
        high = np.where(broken, np.minimum(budget, size), high if i else limit)
        low = np.where(broken, low, budget if i else 0.0)
    if fab_steps:
        curve = minimal_norm_curve(
            *(logits_fn, x, y, threat),
            num_steps=fab_steps,
            key=key_fab,
            batch_size=batch_size,
            index=index,
            checks="none",
            mesh=mesh,
        )
        found = np.minimum(found, curve.distance)
    found = np.where(wrong, 0.0, found)
    result = Bracket(name, ~wrong, np.where(wrong, 0.0, radius), found)
    check_crossing(result)
    return result


def check_crossing(found: Bracket) -> None:
    """Nothing, where every certified radius is at most the distance found.

    Raises:
      CrossingError: naming the examples, with both numbers.

    >>> one = np.ones(1)
    >>> check_crossing(Bracket("L2", one > 0, 0.5 * one, one))
    """
    rows = found.correct & (found.certified > found.found * (1 + SLACK))
    if rows.any():
        i = int(np.flatnonzero(rows)[0])
        raise CrossingError(
            f"{int(rows.sum())} certified radii are larger than an adversarial "
            f"perturbation that was found ({found.norm}), first example {i}: certified "
            f"{found.certified[i]:.6g}, found {found.found[i]:.6g}. One of the two is "
            "wrong: is the certificate about this very model, at this precision?"
        )


def draw_bracket(
    found: Bracket, title: str = "", figure: "Figure | SubFigure | None" = None
) -> "Figure | SubFigure":
    """Certified and empirical accuracy against epsilon; between them it is unknown.

    Args:
      found: from `bracket`.
      title: above the panel.
      figure: to draw into; None: a new one.

    Returns:
      The figure; `robustjax.plots.save` writes it.
    """
    finite = found.found[np.isfinite(found.found)]
    top = float(max(finite.max(initial=0), found.certified.max(initial=0))) * 1.05
    epsilon = np.linspace(0, top or 1.0, 400)
    low, high = found.accuracies(epsilon)
    # The two may cross by the rounding that `check_crossing` allows.
    return plots.draw_bracket(
        *(epsilon, np.minimum(low, high), high, figure),
        x=f"{found.norm} budget epsilon",
        title=title,
    )
