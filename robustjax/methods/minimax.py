"""The inner maximization, and the outer loss on what it finds.

`inner_attack` is the first half of every method that attacks with one attack and sees
frozen weights; methods differ in what is raised and in what is done with the result.
"""

import warnings
from collections.abc import Callable

import jax

from robustjax.attacks.base import AttackFn, check_attack_fn
from robustjax.methods.base import (
    Aux,
    BnMode,
    Loss,
    Stages,
    batch_loss,
    hard_labels,
    joined,
    label_loss,
)
from robustjax.models.base import Model, logits_fn, require_model
from robustjax.problems import Problem, example_keys, maximize, predictions
from robustjax.threats import ThreatModel, too_wide
from robustjax.types import Array, Batch, Key, LogitsFn, LossFn, PyTree


def check_inner(
    model: Model, attack_fn: AttackFn, threat: ThreatModel, bn_mode: str
) -> None:
    """Refuse what is no model, attack, threat or BatchNorm mode; doubt wide budgets.

    Raises:
      TypeError: no model, threat model or attack where one is due.
      ValueError: bn_mode is neither "eval" nor "batch".
    """
    require_model(model)
    check_attack_fn(attack_fn)
    if not isinstance(threat, ThreatModel):
        raise TypeError(
            f'threat is {threat!r}, no ThreatModel: give one such as linf("8/255").'
        )
    if (message := too_wide(threat)) is not None:
        warnings.warn(message, UserWarning, stacklevel=4)
    if bn_mode not in ("eval", "batch"):
        raise ValueError(
            f'bn_mode is {bn_mode!r}; give "eval" (the attack sees the running '
            'statistics) or "batch" (it sees the statistics of the batch).'
        )


Raise = Callable[[LogitsFn, Batch, Key], Callable[[Array], Array]]
"""`(frozen model, batch, key) -> (logits -> [B])`: what an inner attack raises."""


def raise_loss(inner: LossFn = label_loss) -> Raise:
    """Raise a loss of the labels."""
    return lambda frozen, batch, key: lambda logits: inner(logits, batch.y)


def inner_problem(
    model: Model,
    threat: ThreatModel,
    raised: Raise,
    bn_mode: BnMode = "eval",
    start_noise: float | None = None,
) -> Callable[[PyTree, PyTree, Batch, Key], Problem]:
    """`(params, extra, batch, key) -> Problem`: what an inner attack maximizes.

    Success is a prediction other than the (most probable) label. See `inner_attack`.
    """

    def problem_of(params: PyTree, extra: PyTree, batch: Batch, key: Key) -> Problem:
        frozen = logits_fn(model, params, extra, train=bn_mode == "batch")
        labels = hard_labels(batch.y)
        problem = maximize(
            frozen,
            batch.x,
            threat,
            raised(frozen, batch, jax.random.fold_in(key, 1)),
            lambda logits: predictions(logits) != labels,
            index=batch.index,
            y=labels,
        )
        if start_noise is None:
            return problem
        keys = example_keys(jax.random.fold_in(key, 2), problem.index)
        noise = jax.vmap(lambda k, x: jax.random.normal(k, x.shape, x.dtype))
        start = problem.x + start_noise * noise(keys, problem.x)
        return problem._replace(start=start)

    return problem_of


def inner_attack(
    model: Model,
    attack_fn: AttackFn,
    threat: ThreatModel,
    raised: Raise,
    *,
    bn_mode: BnMode = "eval",
    start_noise: float | None = None,
) -> Callable[..., Array]:
    """The inner maximization as a first stage; it sees frozen weights.

    Args:
      model, attack_fn, threat, bn_mode: see `minimax_loss`.
      raised: what the attack raises.
      start_noise: begin at `x + start_noise * N(0, 1)`; None: where the attack does.

    Returns:
      `(params, extra, carry, batch, step, key) -> x_adv [B, ...]`.
    """
    check_inner(model, attack_fn, threat, bn_mode)
    problem_of = inner_problem(model, threat, raised, bn_mode, start_noise)

    def attack(params, extra, carry, batch, step, key):
        return attack_fn(key, problem_of(params, extra, batch, key)).x_adv

    return attack


def minimax_stages(
    model: Model,
    attack_fn: AttackFn,
    threat: ThreatModel,
    *,
    bn_mode: BnMode = "eval",
    inner: LossFn = label_loss,
    outer: LossFn = label_loss,
) -> Stages:
    """Adversarial training in its two halves; see `minimax_loss`."""

    def loss(params, extra, carry, batch, x_adv, step, key):
        logits, extra = model.apply(params, extra, x_adv, train=True, key=key)
        total, metrics = batch_loss(logits, batch, outer)
        return total, Aux(extra, carry, metrics)

    attack = inner_attack(model, attack_fn, threat, raise_loss(inner), bn_mode=bn_mode)
    return Stages(attack, loss)


def minimax_loss(
    model: Model,
    attack_fn: AttackFn,
    threat: ThreatModel,
    *,
    bn_mode: BnMode = "eval",
    inner: LossFn = label_loss,
    outer: LossFn = label_loss,
) -> Loss:
    """The loss of adversarial training: attack the batch, then learn from the result.

    `mean outer(model(x_adv), y)`, `x_adv = attack_fn` maximizing `inner` in `threat`.
    No gradient flows through the attack, which sees frozen weights.

    Args:
      model: the model that is trained.
      attack_fn: `(key, problem) -> Result`. Build it with `keep=last`: then the
        evaluation of the final iterate is dead code and costs nothing.
      threat: norm, epsilon and box.
      bn_mode: how BatchNorm runs *inside the attack*: "eval" (running statistics) or
        "batch" (the batch's own). The attack never changes the running statistics;
        the one forward pass at `x_adv` does.
      inner: what the attack raises, `(logits, y) -> [B]`; y is the batch's.
      outer: what the weights lower, `(logits, y) -> [B]`: see `smoothed`.

    Returns:
      A loss for `from_loss`, with metrics `loss` and `accuracy`, both at `x_adv`.

    Raises:
      TypeError: no model, threat model or attack where one is due.
      ValueError: bn_mode is neither "eval" nor "batch".

    Reference: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial
    Attacks, arXiv:1706.06083.
    """
    return joined(
        minimax_stages(
            model, attack_fn, threat, bn_mode=bn_mode, inner=inner, outer=outer
        )
    )
