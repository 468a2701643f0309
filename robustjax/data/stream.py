"""Sets that do not fit on the device: batches from a random-access source by Grain.

As with resident sets, the batch at a step follows from (seed, step) alone. Reading and
decoding run ahead in Grain's threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from robustjax.types import Batch


class Source(Protocol):
    """What can be streamed: `tfds.data_source(...)`, or anything of this form."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def stream(
    source: Source | tuple[np.ndarray, np.ndarray],
    batch_size: int,
    seed: int,
    *,
    epochs: int | None = None,
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    max_value: int | None = 255,
    transform: Callable[[Any], tuple[Any, Any]] | None = None,
) -> Iterator[Batch]:
    """Stream shuffled batches.

    Each epoch is shuffled anew as a whole, then dealt out: shard s of S gets places
    s, s + S, ... of the order. So at the same global batch (`batch_size * shard_count`)
    the shards together see the same examples at a step, however many they are. What
    does not fill a batch on every shard is dropped at the end of an epoch.

    Args:
      source: random-access examples, dicts with "image" and "label" or pairs
        `(x, y)`; or a pair of arrays `[N, ...]`, `[N]`.
      batch_size: examples per batch of this shard.
      seed: of the shuffling.
      epochs: how many; None: without end.
      start_step: batches to skip, without reading them: resume from a step.
      shard_index: which shard this process reads; `jax.process_index()`, say.
      shard_count: how many shards there are; `jax.process_count()`, say.
      max_value: the pixel value that stands for 1.0: integer images become float32 in
        [0, 1]. None: images stay as they are, to be augmented as uint8.
      transform: from an example of the source to `(x, y)`, for decoding or resizing;
        all x of one shape.

    Returns:
      An iterator over batches of NumPy arrays, with `index` the place in the source.
      It has Grain's `get_state()` and `set_state(state)` (a state belongs to the
      start_step that it was taken with) and `close()`.

    Raises:
      ImportError: Grain is not installed.
      ValueError: sizes or shards do not fit.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            'Streaming needs Grain: pip install "robustjax[data]". Sets that fit into '
            "memory need none: use `resident`."
        ) from error
    if isinstance(source, tuple):
        if transform is not None:
            raise ValueError("transform is for sources of examples, not for arrays.")
        x, y = source
        if len(x) != len(y):
            raise ValueError(f"source has {len(x)} images and {len(y)} labels.")
        size, pick = len(x), lambda i: (x[i], y[i])
    else:
        examples, decode = source, transform or _image_and_label
        size, pick = len(source), lambda i: decode(examples[i])
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index is {shard_index} of shard_count {shard_count}; it must be 0 "
            "to shard_count - 1."
        )
    per_shard = size // shard_count
    if not 1 <= batch_size <= per_shard:
        raise ValueError(
            f"batch_size is {batch_size}, with {per_shard} examples per shard "
            f"({size} / {shard_count}); it must be 1 to that."
        )
    if start_step < 0 or (epochs is not None and epochs < 1):
        raise ValueError(
            f"start_step is {start_step} and epochs {epochs}; they must be at least 0 "
            "and 1."
        )

    def numbered(index: Any) -> tuple[np.ndarray, int, int]:
        image, label = pick(int(index))
        return np.asarray(image), int(label), int(index)

    def batch(rows: Sequence[tuple[np.ndarray, int, int]]) -> Batch:
        images, labels, indices = zip(*rows, strict=True)
        x = np.stack(images)
        if max_value is not None and np.issubdtype(x.dtype, np.integer):
            # The same bits as `to_float`.
            x = x.astype(np.float32) * (np.float32(1) / np.float32(max_value))
        y, index = np.array(labels, np.int32), np.array(indices, np.int32)
        # Batch is annotated with jax.Array; jit takes NumPy arrays just as well.
        return Batch(x, y, index)  # type: ignore[arg-type]

    batches = (
        grain.MapDataset.range(size)
        .shuffle(seed)
        .slice(slice(shard_index, per_shard * shard_count, shard_count))
        .map(numbered)
        .batch(batch_size, drop_remainder=True, batch_fn=batch)
        .repeat(epochs)
    )
    return iter(batches.slice(slice(start_step, None)).to_iter_dataset())


def _image_and_label(example: Any) -> tuple[Any, Any]:
    if isinstance(example, Mapping):
        return example["image"], example["label"]
    x, y = example
    return x, y
