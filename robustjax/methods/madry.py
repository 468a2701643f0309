"""Adversarial training on PGD examples (Madry et al.), and the published presets."""

from robustjax.attacks.base import AttackFn, last
from robustjax.attacks.pgd import pgd
from robustjax.methods.base import (
    BnMode,
    Method,
    from_stages,
    label_loss,
)
from robustjax.methods.minimax import minimax_stages
from robustjax.models.base import Model
from robustjax.threats import ThreatModel
from robustjax.types import LossFn


def madry(
    model: Model,
    threat: ThreatModel,
    attack_fn: AttackFn | None = None,
    *,
    bn_mode: BnMode = "eval",
    inner: LossFn = label_loss,
    outer: LossFn = label_loss,
) -> Method:
    """Train on adversarial examples only: `min_w E max_delta loss(w, x + delta, y)`.

    Args:
      model: the model that is trained.
      threat: norm, epsilon and box of the inner maximization.
      attack_fn: the inner maximization; None: `cifar_code()`, 10 steps.
      bn_mode: BatchNorm inside the attack, "eval" or "batch"; see `minimax_loss`.
      inner: what the attack raises.
      outer: what the weights lower; `smoothed(0.1)` smooths the labels.

    Returns:
      A `Method` with metrics `loss` and `accuracy`, both at the adversarial examples.

    Raises:
      TypeError, ValueError: see `minimax_loss`.

    Reference: Madry et al. 2018, arXiv:1706.06083.

    Differs from the authors' code: there the attack runs BatchNorm in train mode and
    its passes also move the running statistics; here they never do (`bn_mode="batch"`
    is the nearest), and only the pass at the adversarial examples updates them.
    """
    if attack_fn is None:
        attack_fn = cifar_code()
    return from_stages(
        minimax_stages(
            model, attack_fn, threat, bn_mode=bn_mode, inner=inner, outer=outer
        )
    )


def cifar_paper() -> AttackFn:
    """7 steps of 2/255 at epsilon 8/255, random start: the paper's CIFAR-10 attack."""
    return pgd(7, 2 / 8, keep=last)


def cifar_code() -> AttackFn:
    """10 steps of 2/255 at epsilon 8/255, random start: cifar10_challenge's config."""
    return pgd(10, 2 / 8, keep=last)


def mnist() -> AttackFn:
    """40 steps of 0.01 at epsilon 0.3, random start: paper and mnist_challenge."""
    return pgd(40, 0.01 / 0.3, keep=last)


def one_step() -> AttackFn:
    """One step of 1.25 epsilon from a random start, projected back.

    Reference: Wong et al. 2020, Fast is better than free, arXiv:2001.03994.
    """
    return pgd(1, 1.25, keep=last)
