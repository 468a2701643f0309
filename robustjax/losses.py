"""Losses of logits: `(logits [B, K], labels [B]) -> [B]`, each one the attacker RAISES.

Logits are cast to float32 and made finite first: NaN becomes 0, and what is
beyond 1e12 in magnitude, infinities too, becomes that. So a loss and its gradient are
finite for every input, and the gradient with respect to such a logit is 0.
"""

import jax
import jax.numpy as jnp

from robustjax.types import Array

# Far enough below float32's 3.4e38 for DLR's gradient at a tie, a division by 1e-24.
_LARGEST = 1e12


def finite(logits: Array) -> Array:
    """Logits as finite float32 numbers (float64 stays float64).

    >>> import jax.numpy as jnp
    >>> finite(jnp.array([jnp.nan, 2.0])).tolist()
    [0.0, 2.0]
    """
    logits = jnp.asarray(logits)
    if logits.dtype != jnp.float64:
        logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), 0.0, logits)
    return jnp.clip(logits, -_LARGEST, _LARGEST)


def classes(logits: Array) -> Array:
    """`[1, K]` class numbers, to compare with `labels[:, None]`.

    >>> classes(jnp.zeros((5, 3))).tolist()
    [[0, 1, 2]]
    """
    return jnp.arange(logits.shape[-1])[None]


def _at(logits: Array, labels: Array) -> Array:
    # A one-hot sum would turn an infinite *other* logit into NaN; an indexed gather
    # `logits[arange(B), labels]` brings a collective under sharding. This does neither.
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def _best_other(logits: Array, labels: Array) -> Array:
    is_label = labels[:, None] == classes(logits)
    return jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)


def _largest(logits: Array, count: int) -> list[Array]:
    """The `count` largest logits of each row, largest first, each `[B]`.

    Batched `top_k` and `sort` are replicated under sharding; `count` rounds of
    "take the first maximum out" are not, and `count` is at most 4.
    """
    taken = []
    for _ in range(count):
        taken.append(jnp.max(logits, axis=-1))
        first = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
        logits = jnp.where(first[:, None] == classes(logits), -jnp.inf, logits)
    return taken


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy with integer labels: `logsumexp(z) - z_y`, `[B]`.

    >>> import jax.numpy as jnp
    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
    Array([1.386...], dtype=float32)
    """
    logits = finite(logits)
    return jax.nn.logsumexp(logits, axis=-1) - _at(logits, labels)


def soft_cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross-entropy with target distributions `[B, K]`: `-sum_k p_k log q_k`, `[B]`.

    Serves label smoothing and mixed labels.

    >>> import jax.numpy as jnp
    >>> soft_cross_entropy(jnp.zeros((1, 2)), jnp.full((1, 2), 0.5))
    Array([0.693...], dtype=float32)

    Raises:
      ValueError: targets has another shape than logits (a column of labels `[B, 1]`
        would be taken for probabilities of every class).
    """
    if jnp.shape(targets) != jnp.shape(logits):
        raise ValueError(
            f"targets has shape {jnp.shape(targets)}, logits {jnp.shape(logits)}; give "
            "[B] integer labels (y[:, 0] of a column) or [B, K] probabilities."
        )
    return -jnp.sum(targets * jax.nn.log_softmax(finite(logits), axis=-1), axis=-1)


def margin(logits: Array, labels: Array) -> Array:
    """Logit of the label minus the best other logit, `[B]`: positive = correct.

    A measure, not a loss: the loss to raise is `margin_loss`.

    >>> import jax.numpy as jnp
    >>> margin(jnp.array([[3.0, 1.0, 2.5]]), jnp.array([0])).tolist()
    [0.5]
    """
    logits = finite(logits)
    return _at(logits, labels) - _best_other(logits, labels)


def margin_loss(logits: Array, labels: Array) -> Array:
    """`-margin`, `[B]`: positive once the label has lost.

    >>> import jax.numpy as jnp
    >>> margin_loss(jnp.array([[3.0, 1.0, 2.5]]), jnp.array([0])).tolist()
    [-0.5]
    """
    return -margin(logits, labels)


def cw(logits: Array, labels: Array, confidence: float = 50.0) -> Array:
    """Carlini and Wagner's loss `-max(margin + confidence, 0)`, `[B]`.

    It stops growing once the label has lost by `confidence` (in logits).
    Reference: Carlini and Wagner, Towards Evaluating the Robustness of Neural
    Networks, arXiv 1608.04644; `confidence` 50 is Madry et al.'s, arXiv 1706.06083.

    >>> import jax.numpy as jnp
    >>> cw(jnp.array([[3.0, 1.0, 2.5]]), jnp.array([0])).tolist()
    [-50.5]
    """
    return -jnp.maximum(margin(logits, labels) + confidence, 0.0)


def dlr(logits: Array, labels: Array) -> Array:
    """Difference of logits ratio: `-margin / (z_(1) - z_(3))`, `[B]`.

    Invariant to shift and scale of the logits. With 2 classes there is no third
    logit: the loss is then `-margin`.
    Reference: Croce and Hein, Reliable Evaluation of Adversarial Robustness,
    arXiv 2003.01690.

    >>> import jax.numpy as jnp
    >>> dlr(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])).tolist()
    [-0.5]
    """
    logits = finite(logits)
    if logits.shape[-1] < 3:
        return -margin(logits, labels)
    first, _, third = _largest(logits, 3)
    return -margin(logits, labels) / (first - third + 1e-12)


def dlr_targeted(logits: Array, labels: Array, targets: Array) -> Array:
    """Targeted DLR: `-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`, `[B]`.

    With 3 classes the denominator is `z_(1) - z_(3)`, with 2 classes it is 1.
    Reference: Croce and Hein, arXiv 2003.01690.

    >>> import jax.numpy as jnp
    >>> z = jnp.array([[4.0, 3.0, 1.0, 1.0]])
    >>> dlr_targeted(z, jnp.array([0]), jnp.array([1]))
    Array([-0.333...], dtype=float32)
    """
    logits = finite(logits)
    difference = _at(logits, labels) - _at(logits, targets)
    num_classes = logits.shape[-1]
    if num_classes < 3:
        return -difference
    largest = _largest(logits, min(num_classes, 4))
    low = largest[2] if num_classes == 3 else 0.5 * (largest[2] + largest[3])
    return -difference / (largest[0] - low + 1e-12)


def difference(logits: Array, labels: Array, targets: Array) -> Array:
    """`z_t - z_y`, `[B]`: whose zero is the boundary to class t (targeted FAB).

    >>> import jax.numpy as jnp
    >>> z = jnp.array([[4.0, 3.0, 1.0]])
    >>> difference(z, jnp.array([0]), jnp.array([1])).tolist()
    [-1.0]
    """
    logits = finite(logits)
    return _at(logits, targets) - _at(logits, labels)


def kl(logits: Array, reference_logits: Array) -> Array:
    """`KL(reference || prediction)` of two logit arrays `[B, K]`, `[B]`.

    What TRADES raises, with the clean logits as reference (Zhang et al.,
    arXiv 1901.08573). Both sides by log-softmax: no logarithm of 0.

    >>> import jax.numpy as jnp
    >>> kl(jnp.zeros((1, 3)), jnp.zeros((1, 3))).tolist()
    [0.0]
    """
    log_p = jax.nn.log_softmax(finite(reference_logits), axis=-1)
    log_q = jax.nn.log_softmax(finite(logits), axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
