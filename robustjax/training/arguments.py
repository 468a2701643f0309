"""What `fit` refuses, with what to give instead, before anything is compiled."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax.data.dataset import Dataset
from robustjax.data.resident import Resident, steps_per_epoch
from robustjax.methods.base import Method
from robustjax.models.base import Model, require_model
from robustjax.training.state import TrainState
from robustjax.training.step import Decay
from robustjax.types import Array, Batch


def check_kinds(key: Any, model: Any, method: Any, tx: Any, data: Any) -> None:
    """Raise TypeError for the first argument of `fit` that is of another kind.

    >>> check_kinds(7, None, None, None, None)
    Traceback (most recent call last):
    ...
    TypeError: key is 7, no JAX key: give jax.random.key(7).
    """
    if isinstance(key, int | float | np.integer | np.floating):
        raise TypeError(f"key is {key}, no JAX key: give jax.random.key({int(key)}).")
    if not isinstance(key, jax.Array) or jnp.ndim(key) != _axes_of_a_key(key):
        shape = f" of shape {np.shape(key)}" if isinstance(key, jax.Array) else ""
        raise TypeError(
            f"key is a {type(key).__name__}{shape}, not one JAX key: give "
            "jax.random.key(0)."
        )
    require_model(model)
    if not isinstance(method, Method):
        raise TypeError(
            f"method is {_named(method)}, no Method: give one such as "
            'standard(model) or madry(model, linf("8/255")).'
        )
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"tx is {_named(tx)}, no optax transformation: give one such as "
            "training.optimizers.sgd(0.1)."
        )
    if isinstance(data, Resident) or callable(data):
        return
    if isinstance(data, Dataset):
        raise TypeError(
            "data is a Dataset, which has a training and a test set: give "
            "resident(d.x_train, d.y_train, d.max_value)."
        )
    raise TypeError(
        f"data is {_named(data)}: put uint8 images and their labels on the device, "
        "resident(x, y, max_value), or give a function step -> Batch."
    )


def check_labels(
    model: Model, weights: Any, example: Array, sets: Mapping[str, Any]
) -> None:
    """Raise ValueError where a `Resident` set has a label without a logit.

    Args:
      model: what is trained.
      weights: `(params, extra)`, or their shapes.
      example: a batch's `x`, or its shape.
      sets: by name, each a set or a function, which is not asked.
    """
    logits, _ = jax.eval_shape(model.apply, *weights, example)
    if len(logits.shape) != 2:
        return
    for name, found in sets.items():
        if not isinstance(found, Resident):
            continue
        largest = int(np.asarray(found.y).max())  # on the host: this may be in a trace
        if largest >= logits.shape[1]:
            raise ValueError(
                f"{name} has the label {largest}, but the model has {logits.shape[1]} "
                f"classes (0 to {logits.shape[1] - 1})."
            )


def check_floats(batch: Batch) -> None:
    """Raise TypeError where the inputs, or those of a stream, are no floats.

    >>> check_floats(Batch(np.zeros((1, 2), np.uint8), np.zeros(1, int)))
    Traceback (most recent call last):
    ...
    TypeError: the batch has x of uint8: attacks want floats in the threat's box. ...
    """
    for name, rows in {"the batch": batch, **(batch.streams or {})}.items():
        if not jnp.issubdtype(rows.x.dtype, jnp.floating):
            raise TypeError(
                f"{name} has x of {rows.x.dtype}: attacks want floats in the threat's "
                "box. Scale it in `mix` (data.to_float), or give stream its max_value."
            )


def check_streams(streams: Any, resident: bool) -> None:
    """Raise where `streams` is not name -> (`Resident`, rows), or cannot be served.

    Raises:
      TypeError: an entry of another kind.
      ValueError: no rows, or the data is a function (it gives its streams itself).
    """
    for name, entry in (streams or {}).items():
        if not resident:
            raise ValueError(
                "streams go with a Resident set; a function `step -> Batch` gives its "
                "own: Batch(x, y, streams={...})."
            )
        if not (
            isinstance(entry, tuple)
            and not isinstance(entry, Resident)
            and len(entry) == 2
            and isinstance(entry[0], Resident)
            and isinstance(entry[1], int)
        ):
            raise TypeError(
                f"streams[{name!r}] is {_named(entry)}; give (resident(x, y), rows)."
            )
        if entry[1] < 1:
            raise ValueError(f"streams[{name!r}] has {entry[1]} rows; give 1 or more.")


def check_streams_read(method: Method, state: TrainState, batch: Batch) -> None:
    """Raise ValueError where the batch has streams that the method does not look at.

    It does not where it takes the batch without them just as well.
    """
    if not batch.streams:
        return
    weights = state.params, state.extra, state.carry
    try:
        bare = batch._replace(streams=None)
        jax.eval_shape(method.grads, *weights, bare, state.step, state.key)
    except Exception:  # it misses them, in words that are its own
        return
    raise ValueError(
        f"streams are {', '.join(batch.streams)}, which the method does not read: wrap "
        "it, with_stream(method), or leave them out."
    )


def check_counts(**counts: int | None) -> None:
    """Raise where a number of things is no integer, or below 1; None is left alone.

    >>> check_counts(num_steps=0)
    Traceback (most recent call last):
    ...
    ValueError: num_steps is 0; give 1 or more.
    """
    for name, number in counts.items():
        if number is None:
            continue
        if not isinstance(number, int | np.integer):
            raise TypeError(f"{name} is {number!r}; give an integer.")
        if number < 1:
            raise ValueError(f"{name} is {number}; give 1 or more.")


def length(
    data: Any, batch_size: int, num_steps: int | None, num_epochs: int | None
) -> tuple[int, int | None]:
    """How many steps there are, and how many in an epoch of a `Resident` set.

    Raises:
      ValueError: both or none of `num_steps` and `num_epochs`, or epochs of a function.
    """
    if (num_steps is None) == (num_epochs is None):
        raise ValueError(
            f"num_steps is {num_steps} and num_epochs {num_epochs}; give one of them."
        )
    per_epoch = None
    if isinstance(data, Resident):
        per_epoch = steps_per_epoch(data.x.shape[0], batch_size)
    if num_epochs is not None:
        if per_epoch is None:
            raise ValueError(
                "num_epochs needs a Resident set; with a function give num_steps."
            )
        num_steps = num_epochs * per_epoch
    assert num_steps is not None
    return num_steps, per_epoch


def fingerprint(data: Any, streams: Any = None) -> dict[str, Any]:
    """What tells one training set from another: shape and checksum."""
    if streams:
        more = {n: {**fingerprint(d), "rows": k} for n, (d, k) in streams.items()}
        return {**fingerprint(data), "streams": more}
    if not isinstance(data, Resident):
        return {"from": "a function of the step"}
    x, y = np.asarray(data.x), np.asarray(data.y)
    crc = zlib.crc32(np.ascontiguousarray(y), zlib.crc32(np.ascontiguousarray(x)))
    return {"shape": list(x.shape), "crc32": crc, "scale": float(data.scale)}


def averaging_at(decay: Decay | None, num_steps: int) -> Any:
    """What tells one `ema_decay` from another: False, a number, or values at steps.

    >>> averaging_at(0.5, 8), averaging_at(None, 8)
    (0.5, False)
    >>> averaging_at(lambda step: step / 8, 9)
    {'0': 0.0, '1': 0.125, '2': 0.25, '4': 0.5, '6': 0.75, '8': 1.0}
    """
    if decay is None:
        return False
    if not callable(decay):
        return float(decay)
    last = num_steps - 1
    steps = sorted({0, min(1, last), *(last * i // 4 for i in range(1, 5))})
    return {str(t): float(decay(jnp.int32(t))) for t in steps}


def _axes_of_a_key(key: jax.Array) -> int:
    """0 for `jax.random.key`; 1 for the older `jax.random.PRNGKey`."""
    return 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1


def _named(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return f"the function {name}" if name else f"a {type(value).__name__}"
