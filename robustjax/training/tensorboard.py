"""A run's rows as TensorBoard scalars, where the package `tensorboard` is installed.

A function of the run's folder and no hook in the loop: `metrics.jsonl` is cut back when
a run is resumed, event files are not; so they are written anew from what it says.
"""

from pathlib import Path
from typing import Any

from robustjax.training.curves import read_rows

EVENTS = "events.out.tfevents."
NOT_NUMBERS = ("kind", "step")


def to_tensorboard(folder: str | Path) -> Path:
    """Write `metrics.jsonl` of a run as event files to its folder `tensorboard`.

    Every number of a row becomes the scalar `kind/name` at its step; the wall time is
    the training's seconds. Event files there are replaced: call it as often as you
    like, at the end or from `fit`'s `validate`. Then: `tensorboard --logdir FOLDER`.

    Args:
      folder: what was `out` of a training.

    Returns:
      The folder of the event files.

    Raises:
      ImportError: `tensorboard` is not installed.
      FileNotFoundError: the folder has no `metrics.jsonl`.
    """
    rows = read_rows(folder)
    try:
        from tensorboard.compat.proto import (  # pyright: ignore
            event_pb2,
            summary_pb2,
        )
        from tensorboard.summary.writer.event_file_writer import (  # pyright: ignore
            EventFileWriter,
        )
    except ImportError as error:
        raise ImportError(
            "the package tensorboard is not installed: pip install tensorboard, or "
            "draw the run with robustjax.training.curves.draw_run."
        ) from error
    out = Path(folder) / "tensorboard"
    out.mkdir(exist_ok=True)
    for old in out.glob(EVENTS + "*"):
        old.unlink()
    writer: Any = EventFileWriter(str(out))
    seconds = 0.0
    for row in rows:
        seconds = row.get("seconds") or seconds
        values = [
            summary_pb2.Summary.Value(tag=f"{row['kind']}/{name}", simple_value=number)
            for name, number in row.items()
            if name not in NOT_NUMBERS and isinstance(number, int | float)
        ]
        summary = summary_pb2.Summary(value=values)
        writer.add_event(
            event_pb2.Event(wall_time=seconds, step=row["step"], summary=summary)
        )
    writer.close()
    return out
