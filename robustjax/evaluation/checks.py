"""Bad inputs raise here, early and by name; bad models are flagged and go on."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.attacks.base import check_attack_fn as check_attack_fn
from robustjax.models.canonical import count_convolutions
from robustjax.norms import AnyOf
from robustjax.threats import ThreatModel, too_wide
from robustjax.types import Array


class ModelWarning(UserWarning):
    """Something about the model makes its robust accuracy doubtful."""


class Flag(NamedTuple):
    """A finding about a model: a short `name`, and a `message` that says the fix."""

    name: str
    message: str


def check_inputs(
    x: Any,
    y: Any,
    threat: ThreatModel,
    index: Any = None,
    batch_size: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples, labels and indices as arrays that an evaluation can trust.

    Args:
      x: `[N, ...]` floats inside the box of `threat`.
      y: `[N]` integers, 0 or more.
      threat: its epsilon must not be negative; a scalar, or one for each example.
      index: `[N]` integers, or None for `0..N-1`.
      batch_size: at least 1.

    Returns:
      `x` float32 (float64 stays), `y` int32, `index` int32.

    Raises:
      TypeError: wrong kind: text, float labels, a number instead of a threat.
      ValueError: wrong value or shape. Each message names the argument and the fix.

    >>> from robustjax.threats import linf
    >>> check_inputs([[0.0, 255.0]], [0], linf(0.1))
    Traceback (most recent call last):
    ...
    ValueError: x lies in [0, 255], outside the box [0, 1]: divide by 255, ...
    """
    if not isinstance(threat, ThreatModel):
        raise TypeError(
            f"threat={threat!r} is no ThreatModel: build one, such as linf(8 / 255); "
            "for several, evaluate takes a dict such as {'Linf': linf(8 / 255)}."
        )
    if isinstance(threat.norm, AnyOf):
        raise TypeError(
            "threat is a stacked one: pass a dict of names and threats instead, such "
            "as {'Linf': linf(0.1), 'L2': l2(0.5)}."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise TypeError(f"batch_size={batch_size!r}: must be an integer, such as 256.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more.")
    x = _check_x(x, threat)
    y = _check_y(y, len(x))
    index = np.arange(len(x)) if index is None else np.asarray(index)
    if index.shape != (len(x),) or index.dtype.kind not in "iu":
        raise ValueError(
            f"index has shape {index.shape} and dtype {index.dtype}: "
            f"it must be integers, one for each of the {len(x)} examples."
        )
    _check_epsilon(threat, len(x))
    warn_of_width(threat)
    return x, y, index.astype(np.int32)


def _check_x(x: Any, threat: ThreatModel) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype.kind not in "fiub" and x.dtype != jnp.bfloat16:
        raise TypeError(f"x has dtype {x.dtype}: pass an array of floats.")
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {x.shape}: pass a batch [N, ...]; for one example x[None]."
        )
    if len(x) == 0:
        raise ValueError(f"x has shape {x.shape}: there is no example to evaluate.")
    x = x if x.dtype == np.float64 and jax.config.jax_enable_x64 else _float32(x)
    wrong = ~np.isfinite(x).reshape(len(x), -1).all(1)
    if wrong.any():
        raise ValueError(
            f"x holds NaN or infinite values in {wrong.sum()} of {len(x)} examples, "
            f"first in example {int(np.argmax(wrong))}: mend or drop them."
        )
    for name in ("lower", "upper"):
        _check_bound(name, np.shape(getattr(threat, name)), x.shape[1:])
    lower, upper = np.asarray(threat.lower), np.asarray(threat.upper)
    if np.isnan(lower).any() or np.isnan(upper).any() or (lower >= upper).any():
        raise ValueError(
            f"the box [{lower}, {upper}] is empty: lower must be below upper."
        )
    if (x < lower).any() or (x > upper).any():
        box = f"[{lower.min():g}, {upper.max():g}]"
        message = f"x lies in [{x.min():g}, {x.max():g}], outside the box {box}: "
        if 1.5 < x.max() <= 255 and x.min() >= 0 and upper.max() <= 1:
            raise ValueError(
                message + "divide by 255, images are [0, 1] here (or by the largest "
                "value your data can have: 16 for the embedded digits)."
            )
        raise ValueError(
            message + "scale x into the box and put normalization (mean, std) inside "
            "the model, or give the threat the box that your inputs have "
            "(lower=..., upper=...)."
        )
    return x


def _check_bound(name: str, shape: tuple[int, ...], example: tuple[int, ...]) -> None:
    """A bound of the box broadcasts to one example, as NumPy understands it."""
    lengths = zip(reversed(shape), reversed(example), strict=False)
    if len(shape) > len(example) or any(n not in (1, m) for n, m in lengths):
        per_channel = ", for CHW images [C, 1, 1]" if len(example) == 3 else ""
        raise ValueError(
            f"threat.{name} has shape {shape}, and one example of x {example}: the "
            "box is that of one example, without the batch. Give a number, or an "
            f"array of shape {example} or one that broadcasts to it{per_channel}."
        )


def _float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _check_y(y: Any, count: int) -> np.ndarray:
    y = np.asarray(y)
    if y.ndim == 0:
        raise ValueError(f"y={y} is one label: for one example pass x[None], y[None].")
    if y.ndim == 2 and y.shape[1] == 1:
        raise ValueError(f"y has shape {y.shape}: pass y[:, 0], one label each.")
    if y.ndim == 2 and y.shape[0] == count:
        raise ValueError(
            f"y has shape {y.shape}: one-hot labels? Pass integers, y.argmax(axis=-1)."
        )
    if y.shape != (count,):
        raise ValueError(
            f"y has shape {y.shape} but x has {count} examples: pass one label each."
        )
    if y.dtype.kind not in "iu":
        raise TypeError(
            f"y has dtype {y.dtype}: labels are integers, y.astype('int32')."
        )
    if y.min() < 0:
        raise ValueError(f"y holds {y.min()}: labels are 0, 1, ..., K - 1.")
    return y.astype(np.int32)


def _check_epsilon(threat: ThreatModel, count: int) -> None:
    epsilon = np.asarray(threat.epsilon)
    if epsilon.shape not in ((), (count,)):
        raise ValueError(
            f"threat.epsilon has shape {epsilon.shape}: pass a number, or one for each "
            f"of the {count} examples."
        )
    if np.isnan(epsilon).any() or (epsilon < 0).any():
        raise ValueError(f"threat.epsilon={epsilon}: must be 0 or more.")


class CostWarning(UserWarning):
    """Something makes an attack slower than it need be; results are not affected."""


CONSTANT_LIMIT = 2**20


def note_costs(logits_fn: Callable[..., Array], x: Any) -> bool:
    """Warn of what makes attacks on this function slow to compile or to run.

    Returns whether its gradients may run in a compiled loop at full speed.

    Args:
      logits_fn: `f(x, key)`.
      x: `[B, ...]`, an array or its shape and dtype.

    >>> note_costs(lambda x, key: x, jax.ShapeDtypeStruct((1, 2), jnp.float32))
    True
    """
    closed = jax.make_jaxpr(logits_fn)(x, jax.random.key(0))
    size = sum(getattr(c, "nbytes", 0) for c in closed.consts)
    # The leaves of a Partial come in as constants here, but travel as data.
    size -= sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(logits_fn))
    if size > CONSTANT_LIMIT:
        warnings.warn(
            f"logits_fn closes over {size / 2**20:.0f} MB of weights: they become "
            "constants of every compiled program, and another checkpoint compiles "
            "anew. Pass them as data: jax.tree_util.Partial(f, params).",
            CostWarning,
            stacklevel=4,
        )
    _, left = count_convolutions(lambda x: logits_fn(x, jax.random.key(0)), x)
    slow = bool(left) and jax.default_backend() == "cpu"
    if slow:
        warnings.warn(
            f"{left} of the model's convolutions lie where they cannot be rewritten "
            "(in scan, while, cond, a custom derivative, or with groups): on CPU their "
            "gradients run 10 to 15 times slower in a compiled loop. The suites of "
            "evaluate step from the host instead; attacks of your own do not. See "
            "docs/models.md.",
            CostWarning,
            stacklevel=4,
        )
    return not slow


def check_unique(index: np.ndarray) -> None:
    """Raise ValueError where an example is named twice.

    >>> check_unique(np.array([3, 1, 3]))
    Traceback (most recent call last):
    ...
    ValueError: index names 1 examples twice: give each example a number of its own.
    """
    twice = len(index) - len(np.unique(index))
    if twice:
        raise ValueError(
            f"index names {twice} examples twice: give each example a number of its "
            "own."
        )


def check_key(key: Any) -> Array:
    """The key, or `jax.random.key(0)` for None; an int or a float is refused.

    >>> check_key(7)
    Traceback (most recent call last):
    ...
    TypeError: key=7 is no JAX key: pass jax.random.key(7).
    """
    if key is None:
        return jax.random.key(0)
    if isinstance(key, int | float):
        raise TypeError(f"key={key} is no JAX key: pass jax.random.key({int(key)}).")
    if not isinstance(key, jax.Array) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    ):
        raise TypeError(f"key={key!r} is no JAX key: pass one, jax.random.key(0).")
    if key.ndim != (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1):
        raise ValueError(
            f"key has shape {key.shape}: pass one key, such as keys[0], not several."
        )
    return key


def check_logits(logits: Any, y: np.ndarray, count: int) -> None:
    """The model's answer has a row per example and a column per class.

    Args:
      logits: an array or its shape and dtype (`jax.eval_shape`).
      y: `[N]` labels, all below the number of columns.
      count: rows expected.

    Raises:
      ValueError: another shape, or a label without a column.

    >>> check_logits(np.zeros((2, 3)), np.array([0, 3]), 2)
    Traceback (most recent call last):
    ...
    ValueError: y holds label 3, but the model has 3 classes (0 to 2).
    """
    if not hasattr(logits, "shape"):
        raise TypeError(
            f"logits_fn returned a {type(logits).__name__}, not an array: return the "
            "logits [B, K] alone, such as lambda x: f(x)[0] of (logits, state)."
        )
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != count:
        raise ValueError(
            f"logits_fn returned shape {shape} for {count} examples: it must return "
            f"logits [B, K], one row for each example."
        )
    if shape[1] < 2:
        raise ValueError(
            f"logits_fn returned {shape[1]} column: for two classes with one logit z, "
            "return stack([-z, z], axis=-1) / 2."
        )
    if y.max() >= shape[1]:
        raise ValueError(
            f"y holds label {y.max()}, but the model has {shape[1]} classes "
            f"(0 to {shape[1] - 1})."
        )


def warn(flags: list[Flag]) -> None:
    """Say each flag loudly, as a `ModelWarning`."""
    for flag in flags:
        # The line of who called `evaluate`, which calls this.
        warnings.warn(f"{flag.name}: {flag.message}", ModelWarning, stacklevel=3)


def warn_of_width(threat: ThreatModel) -> None:
    """Warn where a Linf budget is wider than the box: `linf(8)` for `linf("8/255")`.

    >>> from robustjax.threats import linf
    >>> warn_of_width(linf("8/255"))
    """
    message = too_wide(threat)
    if message is not None:
        warnings.warn(message, UserWarning, stacklevel=4)
