"""The live line and the training rows: rate, loss, accuracy, time to go."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from robustjax.logging import LiveLine, duration


class Progress:
    """Counts steps and seconds of training, validation and compilation left out."""

    def __init__(
        self,
        line: LiveLine,
        step: int,
        num_steps: int,
        per_epoch: int | None,
        images: int,
        seconds: float,
    ):
        self.line = line
        self.num_steps, self.per_epoch = num_steps, per_epoch
        self.images = images  # per step, those of streams too
        self.seconds = seconds
        self.row_step, self.row_began = step, time.monotonic()
        self.shown = 0.0
        self.rate = 0.0
        self.last_text = ""

    def note(self, text: str) -> None:
        """Write a line that stays."""
        self.line.note(text)
        self.go_on()

    def go_on(self) -> None:
        """Training goes on now: what happened since the last row is not counted."""
        self.row_began = time.monotonic()

    def finished(self) -> None:
        """Write the last state of the live line, where it would be lost."""
        if self.last_text:
            self.line.note(self.last_text)

    def row(
        self,
        step: int,
        means: Mapping[str, float],
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        """Finish a training row."""
        passed = max(time.monotonic() - self.row_began, 1e-9)
        self.seconds += passed
        self.rate = (step - self.row_step) * self.images / passed
        write(
            {
                "kind": "train",
                "step": step,
                **({"epoch": step / self.per_epoch} if self.per_epoch else {}),
                **means,
                "images_per_second": round(self.rate, 1),
                "seconds": round(self.seconds, 3),
            }
        )
        self.row_step, self.row_began = step, time.monotonic()
        self.last_text = self._text(step, means)
        self.line.update(self.last_text)

    def show(self, step: int, peek: Callable[[], Mapping[str, float]]) -> None:
        """Refresh the line, at most once a second: peeking waits for the device."""
        if self.line.stream is not None and time.monotonic() - self.shown >= 1:
            means = peek()
            passed = max(time.monotonic() - self.row_began, 1e-9)
            self.rate = (step - self.row_step) * self.images / passed
            self.line.update(self._text(step, means))
            self.shown = time.monotonic()

    def validated(
        self, step: int, metrics: Mapping[str, float], is_best: bool, seconds: float
    ) -> None:
        """Write what validation said."""
        numbers = "  ".join(f"{name} {number:.4f}" for name, number in metrics.items())
        mark = "  best so far" if is_best else ""
        self.note(f"step {step}  validation: {numbers}{mark}  {seconds:.1f} s")

    def _text(self, step: int, means: Mapping[str, float]) -> str:
        epoch = f"  epoch {step / self.per_epoch:.2f}" if self.per_epoch else ""
        numbers = "".join(f"  {name} {number:.4f}" for name, number in means.items())
        left = (self.num_steps - step) * self.images
        eta = duration(left / self.rate) if self.rate else "?"
        return (
            f"step {step}/{self.num_steps}{epoch}{numbers}  "
            f"{self.rate:,.0f} images/s  ETA {eta}"
        )
