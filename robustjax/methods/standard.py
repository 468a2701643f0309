"""Ordinary training on clean examples."""

from robustjax.methods.base import Aux, Method, batch_loss, from_loss, label_loss
from robustjax.models.base import Model, require_model
from robustjax.types import LossFn


def standard(model: Model, *, outer: LossFn = label_loss) -> Method:
    """Train on the batch as it is: `mean outer(model(x), y)`.

    Args:
      model: the model that is trained.
      outer: what the weights lower, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy`.

    Raises:
      TypeError: model is no `Model`.
    """
    require_model(model)

    def loss(params, extra, carry, batch, step, key):
        logits, extra = model.apply(params, extra, batch.x, train=True, key=key)
        total, metrics = batch_loss(logits, batch, outer)
        return total, Aux(extra, carry, metrics)

    return from_loss(loss)
