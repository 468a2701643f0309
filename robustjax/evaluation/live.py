"""The live line of an evaluation."""

import sys
import time

from robustjax.logging import LiveLine, duration
from robustjax.parallel import is_writer


class Live:
    """The evaluation's live line: which stage, how far, how many are left, how long."""

    def __init__(self, progress: bool):
        self.line = LiveLine(sys.stderr if progress and is_writer() else None)
        self.began, self.last = time.monotonic(), ("", 0.0, 0)

    def stage(self, threat: str, name: str, done: int, steps: int, alive: int) -> None:
        now = time.monotonic()
        if self.last[0] != name or done < self.last[2]:
            self.last = (name, now, 0)
        began = self.last[1]
        self.last = (name, began, done)
        left = (now - began) / max(done, 1) * max(steps - done, 0)
        text = f"{threat} {name}: step {done} of {steps}, {alive} left".strip()
        spent = duration(now - self.began)
        self.line.update(
            f"{text}, about {duration(left)} for this run ({spent} so far)"
        )

    def note(self, text: str) -> None:
        self.line.note(f"{text}, took {duration(time.monotonic() - self.began)}")
