"""NAME: say in one line what this method does that others do not."""

from collections.abc import Sequence

from robustjax.attacks.base import AttackFn
from robustjax.methods.base import (
    Aux,
    BnMode,
    Method,
    Stages,
    branches,
    check_branches,
    from_stages,
    label_loss,
    total_loss,
)
from robustjax.methods.madry import cifar_code
from robustjax.methods.minimax import inner_attack, raise_loss
from robustjax.models.base import Model
from robustjax.threats import ThreatModel, linf
from robustjax.types import LossFn


def NAME(
    model: Model,
    threat: ThreatModel,
    attack_fn: AttackFn | None = None,
    *,
    weight: float = 0.5,
    bn_mode: BnMode = "eval",
    moved_by: Sequence[str] = ("natural", "adversarial"),
    outer: LossFn = label_loss,
) -> Method:
    """`mean (1 - weight) outer(f(x), y) + weight outer(f(x_adv), y)`: the loss in math.

    Args:
      model, threat: what is trained, against what.
      attack_fn: the inner maximization, of the cross-entropy; None: `cifar_code()`.
      weight: of the adversarial examples.
      bn_mode: BatchNorm inside the attack, "eval" or "batch".
      moved_by: which train-mode passes move the running statistics, in which order.
      outer: the loss, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss`, `accuracy` (at x_adv) and `clean_accuracy`.

    Reference: Authors, Title, arXiv NUMBER.

    Differs from the authors' code: say where, or "nothing".
    """
    check_branches(moved_by, ("natural", "adversarial"))
    attack = inner_attack(
        model,
        cifar_code() if attack_fn is None else attack_fn,
        threat,
        raise_loss(),
        bn_mode=bn_mode,
    )

    def loss(params, extra, carry, batch, x_adv, step, key):
        inputs = {"natural": batch.x, "adversarial": x_adv}
        logits, extra = branches(model, params, extra, inputs, moved_by, key)
        natural, adversarial = logits["natural"], logits["adversarial"]
        # Your idea goes here: one value per example; the mask is total_loss's business.
        values = (1 - weight) * outer(natural, batch.y)
        values += weight * outer(adversarial, batch.y)
        passes = {"accuracy": adversarial, "clean_accuracy": natural}
        total, metrics = total_loss(values, batch, passes)
        return total, Aux(extra, carry, metrics)

    return from_stages(Stages(attack, loss))


def cifar10(model: Model) -> Method:
    """The authors' CIFAR-10: say epsilon, steps, weights."""
    return NAME(model, linf("8/255"), weight=0.5)
