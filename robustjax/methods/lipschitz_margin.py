"""Margin training for nets of known Lipschitz constant."""

import math

import jax

from robustjax.losses import cross_entropy
from robustjax.methods.base import Aux, Method, from_loss, hard_labels, total_loss
from robustjax.models.base import Model, require_model


def lipschitz_margin(
    model: Model,
    radius: float,
    *,
    constant: float = 1.0,
    temperature: float = 0.25,
) -> Method:
    """Train a Lipschitz net to a margin: `t CE((z - sqrt(2) L R 1_y) / t, y)`.

    A margin of `sqrt(2) L R` certifies the L2 radius R; the label's logit is lowered by
    that much, so that the loss is small only where the radius is reached, and the
    temperature says how sharply. For a net whose constant is not bounded (any but
    `lipschitz_net`) growing weights make the margin worthless.

    Args:
      model: its logit vector is L-Lipschitz in L2.
      radius: R, the certified distance that is wanted, in input units.
      constant: L.
      temperature: t, in logits.

    Returns:
      A `Method` with metrics `loss` and `accuracy`, both with the lowered logit: the
      accuracy is the certified one at radius R.

    Raises:
      TypeError: model is no `Model`.
      ValueError: a negative radius, or constant or temperature not above 0.

    Reference: Prach & Lampert, arXiv:2208.03160 (offset and temperature); Tsuzuku et
    al., arXiv:1802.04034 (margin training).
    """
    if radius < 0 or constant <= 0 or temperature <= 0:
        raise ValueError(
            f"radius={radius}, constant={constant}, temperature={temperature}: give a "
            "radius >= 0 and the other two above 0."
        )
    require_model(model)
    offset = math.sqrt(2) * constant * radius

    def loss(params, extra, carry, batch, step, key):
        logits, extra = model.apply(params, extra, batch.x, train=True, key=key)
        y = hard_labels(batch.y)
        label = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
        lowered = logits - offset * label
        values = temperature * cross_entropy(lowered / temperature, y)
        total, metrics = total_loss(values, batch, {"accuracy": lowered})
        return total, Aux(extra, carry, metrics)

    return from_loss(loss)
