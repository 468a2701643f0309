"""The words that every room shares: names for types, no logic."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Key = jax.Array
PyTree = Any


class LogitsFn(Protocol):
    """The model as an attack sees it: inputs `[B, ...]` in, logits `[B, K]` out.

    `key` serves models that are random at prediction time; others ignore it.
    """

    def __call__(self, x: Array, key: Key | None = None) -> Array: ...


class Batch(NamedTuple):
    """Examples that are trained on or evaluated together.

    x:       `[B, ...]` float32 inputs in the model's box.
    y:       `[B]` int32 labels.
    index:   `[B]` int32, which example of its data set each row is: randomness
             per example comes from `example_keys(key, index)`. None: `0..B-1`.
    mask:    `[B]` bool, False for padding that must never count. None: all True.
    streams: further, named batches (generated or unlabeled data). None: none.
    """

    x: Array
    y: Array
    index: Array | None = None
    mask: Array | None = None
    streams: Mapping[str, "Batch"] | None = None


LossFn = Callable[[Array, Array], Array]
"""`(logits [B, K], labels [B]) -> [B]`: what an untargeted attack raises."""
