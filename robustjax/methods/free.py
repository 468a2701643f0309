"""Free adversarial training: every backward pass serves weights and perturbation."""

import jax
import jax.numpy as jnp

from robustjax import threats
from robustjax.methods.base import Aux, Method, batch_loss, label_loss
from robustjax.models.base import Model, require_model
from robustjax.threats import ThreatModel, linf
from robustjax.types import Batch, LossFn, PyTree


def free(
    model: Model,
    threat: ThreatModel,
    *,
    repeats: int = 8,
    step_size: float = 1.0,
    outer: LossFn = label_loss,
) -> Method:
    """`repeats` updates on a batch, each also a step of the perturbation.

    One pass at `x' = box(x + delta)` gives both gradients: `w <- tx(grad_w)`,
    `delta <- project(x' - x + step_size * epsilon * steepest(grad_x'))`, on ball and
    box; coordinates that would leave the box are left out of the gradient. `delta`
    `[B, ...]` is the carry: it belongs to the row, and the next batch begins with it.
    The schedule of the optimizer counts updates: divide the epochs by `repeats`.

    Args:
      model, threat: what is trained, against what.
      repeats: updates per batch, the authors' m.
      step_size: fraction of epsilon.
      outer: what the weights lower and the perturbation raises, `(logits, y) -> [B]`.

    Returns:
      A `Method` with metrics `loss` and `accuracy` at the perturbed inputs.

    Raises:
      ValueError: repeats is below 1.

    Reference: Shafahi et al. 2019, Adversarial Training for Free!, arXiv:1904.12843.
    The replayed pass is the training pass, so it moves the running statistics, in train
    mode, as in the authors' code. Differs from it: any norm; the gradient is the one at
    x', as in the paper's algorithm, and delta stays in the box, as in the Free of Wong
    et al., arXiv:2001.03994. The authors' code derives through the clipping to the box:
    where `x + delta` lies outside it the gradient is 0, so that a black pixel once
    pushed below black is never attacked again. On pictures with a black ground that is
    most of them.
    """
    require_model(model)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give 1 or more.")

    def init(params: PyTree, batch: Batch) -> PyTree:
        return jnp.zeros(batch.x.shape, jnp.promote_types(batch.x.dtype, jnp.float32))

    def loss(params, x_adv, extra, batch, key):
        logits, extra = model.apply(params, extra, x_adv, train=True, key=key)
        total, metrics = batch_loss(logits, batch, outer)
        return total, (extra, metrics)

    def grads(params, extra, carry, batch, step, key):
        x_adv = threats.apply(threat, batch.x, carry)
        both = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (found, slope), (extra, metrics) = both(params, x_adv, extra, batch, key)
        slope = jnp.where(jnp.isfinite(slope), slope, 0)
        # As in PGD: no move is spent on what the box would take back.
        slope = threats.free_gradient(threat, x_adv, slope)
        move = threats.scale(threat, step_size * threats.steepest(threat, slope))
        delta = threats.project(threat, batch.x, x_adv - batch.x + move)
        return found, Aux(extra, delta, metrics)

    return Method(init, grads, repeats)


def cifar10(model: Model) -> Method:
    """The authors' CIFAR-10: epsilon 8/255, m = 8, steps of epsilon."""
    return free(model, linf("8/255"))


def imagenet(model: Model) -> Method:
    """The authors' ImageNet: epsilon 4/255, m = 4, steps of epsilon."""
    return free(model, linf("4/255"), repeats=4)
