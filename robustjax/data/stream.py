"""Sets that do not fit on the device: batches from a random-access source by Grain.

As with resident sets, the batch at a step follows from (seed, step) alone, however many
processes share it. Reading and decoding run ahead in Grain's threads.
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
    read_ahead: int = 8,
) -> Iterator[Batch]:
    """Stream shuffled batches.

    Each epoch is shuffled anew as a whole and cut into global batches of
    `batch_size * shard_count` rows, of which shard s reads rows
    `s * batch_size .. (s + 1) * batch_size - 1` and no others. So the shards' batches,
    one after the other, are the batch that one process alone would read at that step.
    What does not fill a global batch is dropped at the end of an epoch.

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
      read_ahead: batches that are read at once and kept ready, each by one thread.

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
        size, pick = len(x), lambda rows: [(x[i], y[i]) for i in rows]
    else:
        examples, decode = source, transform or _image_and_label
        size, pick = len(source), lambda rows: map(decode, _examples(examples, rows))
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
    if read_ahead < 1:
        raise ValueError(f"read_ahead is {read_ahead}; it must be at least 1.")
    if start_step < 0 or (epochs is not None and epochs < 1):
        raise ValueError(
            f"start_step is {start_step} and epochs {epochs}; they must be at least 0 "
            "and 1."
        )

    def batch(index: np.ndarray) -> Batch:
        images, labels = zip(*pick(index.tolist()), strict=True)
        x = np.stack([np.asarray(image) for image in images])
        if max_value is not None and np.issubdtype(x.dtype, np.integer):
            # The same bits as `to_float`.
            x = x.astype(np.float32) * (np.float32(1) / np.float32(max_value))
        y = np.array([int(label) for label in labels], np.int32)
        # Batch is annotated with jax.Array; jit takes NumPy arrays just as well.
        return Batch(x, y, index.astype(np.int32))  # type: ignore[arg-type]

    first = shard_index * batch_size
    batches = (
        grain.MapDataset.range(size)
        .shuffle(seed)
        .batch(batch_size * shard_count, drop_remainder=True, batch_fn=np.array)
        .map(lambda index: index[first : first + batch_size])
        .map(batch)
        .repeat(epochs)
        .slice(slice(start_step, None))
    )
    # Grain's default keeps 500 elements ready, which here are whole batches.
    options = grain.ReadOptions(num_threads=read_ahead, prefetch_buffer_size=read_ahead)
    return iter(batches.to_iter_dataset(options))


def by_step(
    source: Source | tuple[np.ndarray, np.ndarray],
    batch_size: int,
    seed: int,
    **options: Any,
) -> Callable[[int], Batch]:
    """`stream` as `fit` takes it: a function of the step.

    `by_step(...)(t)` is batch t of `stream(...)`. Asked for one step after the other it
    reads ahead; asked for any other step it begins there, so a run goes on with the
    exact example after a resume, also with another number of processes.

    Args:
      source, batch_size, seed: as of `stream`.
      options: the others of `stream`, but for `start_step`.

    Returns:
      `step -> Batch` of this shard's rows.

    Raises:
      ImportError, ValueError: as `stream`, at once.

    >>> x, y = np.arange(12, dtype=np.uint8).reshape(6, 2), np.zeros(6, np.int32)
    >>> batch_at = by_step((x, y), 2, seed=0)
    >>> later = batch_at(5)
    >>> [bool((batch_at(t).index == later.index).all()) for t in (4, 5)]
    [False, True]
    """
    iterator, following = stream(source, batch_size, seed, **options), 0
    first: list[Batch] = []  # `fit` asks for it again and again, for its shapes

    def batch(step: int) -> Batch:
        nonlocal iterator, following
        if step == 0 and first:
            return first[0]
        if step != following:
            iterator.close()  # type: ignore[attr-defined]
            iterator = stream(source, batch_size, seed, start_step=step, **options)
        following = step + 1
        found = next(iterator)
        if step == 0:
            first.append(found)
        return found

    return batch


def _examples(source: Source, rows: Sequence[int]) -> Sequence[Any]:
    """Several examples at once where the source can: ArrayRecord is faster so."""
    together = getattr(source, "__getitems__", None)
    return [source[row] for row in rows] if together is None else together(rows)


def _image_and_label(example: Any) -> tuple[Any, Any]:
    if isinstance(example, Mapping):
        return example["image"], example["label"]
    x, y = example
    return x, y
