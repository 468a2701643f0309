"""Adversarial weight perturbation: a wrapper on any method."""

from typing import Any

import jax
import jax.numpy as jnp

from robustjax.attacks.base import last
from robustjax.attacks.pgd import pgd
from robustjax.methods.base import Method
from robustjax.methods.madry import madry
from robustjax.methods.trades import trades
from robustjax.models.base import Model
from robustjax.threats import linf
from robustjax.types import Array, PyTree

TINY = 1e-20


def awp(method: Method, *, gamma: float = 0.01, warmup: int = 0) -> Method:
    """Take the gradient at the weights' own worst case: `grad L(w + v)`.

    `v = gamma ||w|| g / ||g||`, tensor by tensor, `g` the gradient of the method's loss
    at w; tensors of one dimension (biases, norm scales) stay.

    Args:
      method: any. One with `stages` attacks once, at w, and both losses are taken on
        that; another one runs twice, with the same key.
      gamma: how far, relative to a tensor's norm.
      warmup: steps without perturbation at the beginning.

    Returns:
      A `Method`. What it returns beside the gradient (running statistics, carry,
      metrics) comes from the pass at `w + v`.

    Raises:
      ValueError: gamma is negative.

    Reference: Wu et al. 2020, Adversarial Weight Perturbation Helps Robust
    Generalization, arXiv:2004.05884.

    Differs from the authors' code: their proxy's SGD step cancels out of the formula
    and is left out; tensors are chosen by their number of dimensions alone, theirs also
    by name; the optimizer sees w, theirs `w + v` (it matters to weight decay alone);
    the running statistics move as the method's do, theirs with their own order (TRADES:
    adversarial, natural, natural) and, on plain training, in the attack's passes and in
    one on the clean images after each update too.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; give 0 or more.")

    def worst_case(params: PyTree, ascent: PyTree, step: Array) -> PyTree:
        size = jnp.where(step < warmup, 0.0, gamma)

        def one(w: Array, g: Array) -> Array:
            if w.ndim <= 1:
                return w
            stretch = _norm(w) / (_norm(g) + TINY)
            return w + jnp.asarray(size * stretch, w.dtype) * g

        return jax.tree.map(one, params, ascent)

    stages = method.stages
    if stages is None:

        def plain(params, extra, carry, batch, step, key):
            inputs = (extra, carry, batch, step, key)
            ascent, _ = method.grads(params, *inputs)
            return method.grads(worst_case(params, ascent, step), *inputs)

        return method._replace(grads=plain)

    slope = jax.grad(stages.loss, has_aux=True)

    def slope_at_worst(params, extra, carry, batch, examples, step, key):
        inputs = (extra, carry, batch, examples, step, key)
        ascent, _ = slope(params, *inputs)
        return slope(worst_case(params, ascent, step), *inputs)

    def grads(params, extra, carry, batch, step, key):
        attack_key, loss_key = jax.random.split(key)
        examples = stages.attack(params, extra, carry, batch, step, attack_key)
        return slope_at_worst(params, extra, carry, batch, examples, step, loss_key)

    return Method(method.init, grads, method.repeats)


def cifar10(model: Model) -> Method:
    """The authors' AT-AWP on CIFAR-10: ten steps of 2/255 in mode batch, gamma 0.01."""
    attack_fn = pgd(10, 2 / 8, keep=last)
    return awp(madry(model, linf("8/255"), attack_fn, bn_mode="batch"), gamma=0.01)


def cifar10_trades(model: Model, warmup: int = 9 * 391) -> Method:
    """The authors' TRADES-AWP: ten steps of 2/255, beta 6, gamma 0.005.

    `warmup`: nine epochs of 50,000 images, 128 at once and the rest (theirs count from
    1 to 10).
    """
    attack_fn = pgd(10, 2 / 8, random_start=False, keep=last)
    method = trades(model, linf("8/255"), attack_fn, beta=6.0)
    return awp(method, gamma=0.005, warmup=warmup)


def _norm(w: Any) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(w)))
