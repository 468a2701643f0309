"""TRADES: clean cross-entropy plus the divergence of the adversarial prediction."""

from collections.abc import Sequence

from robustjax.attacks.base import AttackFn, last
from robustjax.attacks.pgd import adam, pgd
from robustjax.losses import kl
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
from robustjax.methods.minimax import Raise, inner_attack
from robustjax.models.base import Model
from robustjax.threats import ThreatModel, linf
from robustjax.types import LossFn


def raise_divergence() -> Raise:
    """Raise `KL(p(x) || p(x_adv))`; the clean prediction is a constant."""

    def raised(frozen, batch, key):
        reference = frozen(batch.x, key)
        return lambda logits: kl(logits, reference)

    return raised


def trades(
    model: Model,
    threat: ThreatModel,
    attack_fn: AttackFn | None = None,
    *,
    beta: float = 6.0,
    bn_mode: BnMode = "eval",
    moved_by: Sequence[str] = ("natural", "adversarial", "natural"),
    start_noise: float | None = 1e-3,
    outer: LossFn = label_loss,
) -> Method:
    """`mean outer(f(x), y) + beta KL(p(x) || p(x_adv))`, x_adv raising that KL.

    The gradient flows through both sides of the divergence.

    Args:
      model: the model that is trained.
      threat: norm, epsilon and box.
      attack_fn: the inner maximization; None: `cifar_attack()`.
      beta: weight of the divergence (the papers' 1 / lambda).
      bn_mode: BatchNorm inside the attack, for the clean prediction there too.
      moved_by: which train-mode passes move the running statistics, in which order.
        Each pass uses the statistics of its own batch.
      start_noise: the attack begins at `x + start_noise * N(0, 1)`; None: at its own
        start.
      outer: the loss of the clean pass, `(logits, y) -> [B]`; see `smoothed`.

    Returns:
      A `Method` with metrics `loss`, `accuracy` (at x_adv) and `clean_accuracy`.

    Reference: Zhang et al. 2019, Theoretically Principled Trade-off between Robustness
    and Accuracy, arXiv:1901.08573.

    Differs from the authors' code: the noisy start is put inside the box before its
    first gradient. Their two clean passes move the statistics twice; so here.
    """
    check_branches(moved_by, ("natural", "adversarial"))
    attack = inner_attack(
        model,
        cifar_attack() if attack_fn is None else attack_fn,
        threat,
        raise_divergence(),
        bn_mode=bn_mode,
        start_noise=start_noise,
    )

    def loss(params, extra, carry, batch, x_adv, step, key):
        inputs = {"natural": batch.x, "adversarial": x_adv}
        logits, extra = branches(model, params, extra, inputs, moved_by, key)
        natural, adversarial = logits["natural"], logits["adversarial"]
        values = outer(natural, batch.y) + beta * kl(adversarial, natural)
        passes = {"accuracy": adversarial, "clean_accuracy": natural}
        total, metrics = total_loss(values, batch, passes)
        return total, Aux(extra, carry, metrics)

    return from_stages(Stages(attack, loss))


def cifar_attack() -> AttackFn:
    """10 steps of 0.007 at epsilon 0.031, no start of its own."""
    return pgd(10, 0.007 / 0.031, random_start=False, keep=last)


def cifar10(model: Model) -> Method:
    """The authors' CIFAR-10: epsilon 0.031, beta 6 (train_trades_cifar10.py)."""
    return trades(model, linf(0.031), cifar_attack(), beta=6.0)


def mnist(model: Model) -> Method:
    """The authors' MNIST: epsilon 0.3, 40 steps of 0.01, beta 1."""
    attack_fn = pgd(40, 0.01 / 0.3, random_start=False, keep=last)
    return trades(model, linf(0.3), attack_fn, beta=1.0)


def deepmind(model: Model) -> Method:
    """Gowal et al.'s: 10 steps of Adam from a uniform start, beta 6, epsilon 8/255.

    Only the adversarial pass moves the running statistics, and the attack sees those of
    the batch. arXiv:2010.03593; Adam's rate 0.1, 0.01 after step 5 in their units.
    """
    epsilon = 8 / 255

    def rate(step):
        return (0.1 - 0.09 * (step >= 5)) / epsilon

    attack_fn = adam(10, rate, keep=last)
    return trades(
        model,
        linf(epsilon),
        attack_fn,
        bn_mode="batch",
        moved_by=("adversarial",),
        start_noise=None,
    )
