"""The live line of an evaluation."""

import sys
import time

from robustjax.evaluation.board import Progress
from robustjax.logging import LiveLine, duration
from robustjax.parallel import is_writer


class Live:
    """The evaluation's live line: which stage, how far, how many are left, how long.

    To go: what the suite takes where nothing else breaks, at the speed so far.
    """

    def __init__(self, progress: bool):
        self.line = LiveLine(sys.stderr if progress and is_writer() else None)
        self.began = time.monotonic()

    def stage(self, threat: str, began: float, news: Progress) -> None:
        """Tell of one threat's evaluation, which began at `began` (monotonic)."""
        now = time.monotonic()
        text = f"{threat} {news.name} {news.part:.0%}, {news.alive} robust".strip()
        if news.left is not None and news.done:
            seconds = (now - began) / news.done * news.left
            text += f", about {duration(seconds)} to go"
        self.line.update(f"{text} ({duration(now - self.began)} so far)")

    def note(self, text: str) -> None:
        """Print a line that stays, with the time since the beginning."""
        self.line.note(f"{text}, took {duration(time.monotonic() - self.began)}")
