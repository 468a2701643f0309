"""A worker process: prepares and times programs as the parent asks. Standard library
only, because it also runs in an interpreter that has PyTorch and nothing of ours.

One JSON object a line, each way: `{"prepare": name}`, `{"time": name}`, `{"drop":
name}`; the first line out says who the worker is.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A program that is ready to run.

    call:   runs it once and returns when the result is there.
    per:    how many units (iterations, training steps) one call makes.
    report: what preparing it cost.
    """

    call: Callable[[], object]
    per: int
    report: dict[str, Any]


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def serve(programs: dict[str, Callable[[], Prepared]], about: dict[str, Any]) -> None:
    # Whatever a library prints to the standard output must not break the protocol.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    ready: dict[str, Prepared] = {}
    answer(about)
    for line in sys.stdin:
        ((request, name),) = json.loads(line).items()
        if request == "prepare":
            ready[name] = programs[name]()
            ready[name].call()  # first-run costs are nobody's steady state
            answer({**ready[name].report, "process_peak_mb": peak_mb()})
        elif request == "time":
            cpu, wall = time.process_time(), time.perf_counter()
            ready[name].call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            per = ready[name].per
            answer({"cpu_ms": 1e3 * cpu / per, "wall_ms": 1e3 * wall / per})
        else:
            del ready[name]
            answer({})
