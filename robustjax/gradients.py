"""The attacker's map: gradients of a problem's score, and wrappers that mend them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from robustjax.problems import Problem
from robustjax.types import Array, Key


def score_and_grad(
    problem: Problem, x_adv: Array, key: Key | None
) -> tuple[Array, Array, Array]:
    """Score `[B]`, logits `[B, K]` and the gradient of the score, `[B, ...]`.

    The sum over the batch is differentiated, so a row's gradient is its own. What is
    not finite in the gradient becomes 0, a NaN score `-inf`: a model's NaN never
    becomes a NaN perturbation, and never counts as progress.

    >>> import jax, jax.numpy as jnp
    >>> from robustjax.problems import maximize
    >>> from robustjax.threats import linf
    >>> p = maximize(lambda x: x**2, jnp.ones((1, 2)), linf(.1), lambda z: z.sum(-1))
    >>> score_and_grad(p, p.x, None)[2].tolist()
    [[2.0, 2.0]]
    """

    def total(x_adv: Array) -> tuple[Array, tuple[Array, Array]]:
        score, logits = problem.score(x_adv, key)
        return jnp.sum(score), (score, logits)

    (_, (score, logits)), grad = jax.value_and_grad(total, has_aux=True)(x_adv)
    score = jnp.where(jnp.isnan(score), -jnp.inf, score)
    return score, logits, jnp.where(jnp.isfinite(grad), grad, 0.0)


def eot(problem: Problem, num_samples: int) -> Problem:
    """Expectation over transformation: the mean score over `num_samples` keys.

    For models that are random at prediction time. The score is the mean of the
    scores and success is judged on the mean of the logits, both over all samples.
    Reference: Athalye et al., arXiv 1707.07397.
    Differs from AutoAttack's code: there the loss and the verdict come from the last
    sample alone.

    >>> import jax, jax.numpy as jnp
    >>> from robustjax.problems import maximize
    >>> from robustjax.threats import linf
    >>> f = lambda x, key: x + jax.random.normal(key, x.shape)
    >>> p = maximize(f, jnp.zeros((1, 2)), linf(.1), lambda z: z.sum(-1))
    >>> s, _ = eot(p, 4000).score(p.x, jax.random.key(0))
    >>> bool(abs(s[0]) < .1)
    True
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: eot needs at least one sample.")

    def score(x_adv: Array, key: Key | None) -> tuple[Array, Array]:
        if key is None:
            raise ValueError("eot draws samples: call the problem's score with a key.")

        # A scan of checkpoints, not a vmap: memory stays that of one pass, gradients
        # included, however many samples.
        @jax.checkpoint
        def body(total, key):
            s, z = problem.score(x_adv, key)
            return (total[0] + s, total[1] + z), None

        shapes = jax.eval_shape(problem.score, x_adv, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (s, z), _ = jax.lax.scan(body, zeros, jax.random.split(key, num_samples))
        return s / num_samples, z / num_samples

    return problem._replace(score=score)


def bpda(
    forward: Callable[[Array], Array],
    backward: Callable[[Array], Array] = lambda x: x,
) -> Callable[[Array], Array]:
    """`forward(x)`, differentiated as if it were `backward(x)`.

    For defenses whose gradient is useless: quantization, JPEG, a purifier. Wrap the
    step that breaks the gradient, not the whole model:
    `logits_fn = lambda x: classifier(bpda(quantize)(x))`.
    Reference: Athalye, Carlini and Wagner, Obfuscated Gradients Give a False Sense of
    Security, arXiv 1802.00420.

    Args:
      forward: what the model really computes; its shape and dtype are the result's.
      backward: a differentiable stand-in; the identity by default.

    >>> import jax, jax.numpy as jnp
    >>> rounded = bpda(jnp.round)
    >>> float(rounded(jnp.array(.7))), float(jax.grad(rounded)(jnp.array(.7)))
    (1.0, 1.0)
    """

    @jax.custom_vjp
    def call(x: Array) -> Array:
        return forward(x)

    def fwd(x: Array) -> tuple[Array, Array]:
        return forward(x), x

    def bwd(x: Array, cotangent: Array) -> tuple[Array]:
        value, pullback = jax.vjp(backward, x)
        if value.shape != cotangent.shape:
            raise ValueError(
                f"backward(x) has shape {value.shape}, forward(x) {cotangent.shape}: "
                "bpda's stand-in must return the shape of what it stands in for."
            )
        return pullback(cotangent.astype(value.dtype))

    call.defvjp(fwd, bwd)
    return call
