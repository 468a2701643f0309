"""N-FGSM: a step from strong noise, and no projection."""

import dataclasses

import jax

from robustjax import threats
from robustjax.attacks.base import AttackFn, Result, inform
from robustjax.gradients import score_and_grad
from robustjax.methods.base import BnMode, Method, label_loss
from robustjax.methods.madry import madry
from robustjax.models.base import Model
from robustjax.problems import Problem, example_keys
from robustjax.threats import ThreatModel, linf
from robustjax.types import Key, LossFn


def noisy_step(noise: float = 2.0, step_size: float = 1.0) -> AttackFn:
    """`x_adv = box(eta + step_size * epsilon * steepest(grad(eta)))`, for training.

    `eta = box(x + U(noise * epsilon ball))`. The result leaves the ball, by up to
    `noise` epsilon: no attack to evaluate with, so success is never claimed outside.

    Args:
      noise, step_size: in units of epsilon.
    """

    def attack_fn(key: Key, problem: Problem) -> Result:
        threat, x = problem.threat, problem.x
        start_key, step_key = jax.random.split(key)
        wide = dataclasses.replace(threat, epsilon=noise * threat.epsilon)
        eta = threats.sample(wide, example_keys(start_key, problem.index), x)
        noisy = threats.apply(threat, x, eta)
        score, logits, grad = score_and_grad(problem, noisy, step_key)
        move = threats.scale(threat, step_size * threats.steepest(threat, grad))
        x_adv = threats.apply(threat, noisy, move)
        info = inform(problem, noisy - x, score, logits)
        size = threats.size(threat, x_adv - x)
        return jax.lax.stop_gradient(Result(x_adv, info.success, size, info.score))

    return attack_fn


def nfgsm(
    model: Model,
    threat: ThreatModel,
    *,
    noise: float = 2.0,
    step_size: float = 1.0,
    bn_mode: BnMode = "batch",
    outer: LossFn = label_loss,
) -> Method:
    """Madry with `noisy_step`: as cheap as Fast, and it seldom overfits.

    Args:
      model, threat: what is trained, against what.
      noise: how far the uniform noise reaches, in units of epsilon.
      step_size: of the one step, in units of epsilon.
      bn_mode: BatchNorm inside the attack. The authors' "batch" collapsed in one of
        three short trainings here, "eval" in none of three (docs/results.md).
      outer: what the weights lower, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy`, both at the noisy examples.

    Reference: de Jorge et al. 2022, Make Some Noise: Reliable and Efficient Single-Step
    Adversarial Training, arXiv:2202.01181.

    Differs from the authors' code: any norm; the attack's pass uses the statistics of
    the batch as theirs does, but does not move the running ones.
    """
    attack_fn = noisy_step(noise, step_size)
    return madry(model, threat, attack_fn, bn_mode=bn_mode, outer=outer)


def cifar10(model: Model) -> Method:
    """The authors' CIFAR-10: epsilon 8/255, noise 2 epsilon, a step of epsilon."""
    return nfgsm(model, linf("8/255"))


def svhn(model: Model) -> Method:
    """The authors' SVHN at epsilon 12/255: noise 3 epsilon, a step of epsilon."""
    return nfgsm(model, linf("12/255"), noise=3.0)
