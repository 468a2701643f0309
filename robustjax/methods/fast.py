"""Fast adversarial training: one step from a random start (RS-FGSM)."""

from robustjax.attacks.base import last
from robustjax.attacks.pgd import pgd
from robustjax.methods.base import BnMode, Method, label_loss
from robustjax.methods.madry import madry
from robustjax.models.base import Model
from robustjax.threats import ThreatModel, linf
from robustjax.types import LossFn


def fast(
    model: Model,
    threat: ThreatModel,
    *,
    step_size: float = 1.25,
    bn_mode: BnMode = "batch",
    outer: LossFn = label_loss,
) -> Method:
    """`delta = project(uniform + step_size * epsilon * steepest(grad))`, then Madry.

    Watch for catastrophic overfitting: within a few steps PGD's accuracy falls to 0
    while that of FGSM rises; likely at large epsilon.

    Args:
      model, threat: what is trained, against what.
      step_size: fraction of epsilon; above 1.25 it overfits earlier.
      bn_mode: BatchNorm inside the attack. The authors' "batch" collapsed in two of
        three short trainings here, "eval" in none of three (docs/results.md).
      outer: what the weights lower, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy`, both at the adversarial examples.

    Reference: Wong, Rice and Kolter 2020, Fast is better than free, arXiv:2001.03994.

    Differs from the authors' code: the attack's pass uses the statistics of the batch
    as theirs does, but does not move the running ones.
    """
    attack_fn = pgd(1, step_size, keep=last)
    return madry(model, threat, attack_fn, bn_mode=bn_mode, outer=outer)


def cifar10(model: Model) -> Method:
    """The authors' CIFAR-10: epsilon 8/255, one step of 10/255."""
    return fast(model, linf("8/255"), step_size=10 / 8)


def mnist(model: Model) -> Method:
    """The authors' MNIST: epsilon 0.3, one step of 0.375."""
    return fast(model, linf(0.3), step_size=0.375 / 0.3)


def imagenet(model: Model) -> Method:
    """The authors' ImageNet at epsilon 4/255: one step of 5/255."""
    return fast(model, linf("4/255"), step_size=5 / 4)
