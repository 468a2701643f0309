"""What one compiled program costs, by the compiler's estimates; and how steps scale."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import hlo
from chips import Chip


class Cost(NamedTuple):
    """Per device, of one execution.

    cycles:      of everything, loop bodies as often as they run.
    loop_cycles: of what is inside of loops.
    flops:       of convolutions and matrix products.
    loops:       name, where it comes from, trips.
    collectives: rows {kind, bytes, count, what}.
    costly:      the ten costliest lines: {cycles, share, count, opcode, flops, result,
                 what}.
    """

    cycles: int
    loop_cycles: int
    flops: int
    loop_flops: int
    loops: list[dict[str, Any]]
    collectives: list[dict[str, Any]]
    costly: list[dict[str, Any]]


def cost_of(text: str, top: int = 10) -> Cost:
    """Sum an optimised HLO text.

    Raises:
      hlo.UnknownTripCount: a loop does not tell its trips.
    """
    program = hlo.parse(text)
    items = hlo.work(program)
    counted = [(item, hlo.flops(program, item.instruction)) for item in items]
    cycles = sum(item.cycles for item in items)
    costly = sorted(counted, key=lambda pair: -pair[0].cycles)[:top]
    return Cost(
        cycles,
        sum(item.cycles for item in items if item.loops),
        sum(item.count * each for item, each in counted),
        sum(item.count * each for item, each in counted if item.loops),
        [loop._asdict() for loop in hlo.loops(program)],
        [
            dict(zip(("kind", "bytes", "count", "what"), row, strict=True))
            for row in hlo.collectives(program)
        ],
        [
            {
                "cycles": item.cycles,
                "share": item.cycles / max(1, cycles),
                "count": item.count,
                "opcode": item.instruction.opcode,
                "flops": item.count * each,
                "result": " ".join(
                    f"{s.dtype}[{','.join(map(str, s.dims))}]"
                    for s in item.instruction.shapes[:2]
                ),
                "what": item.instruction.op_name,
            }
            for item, each in costly
        ],
    )


def utilization(flops: float, cycles: float, chip: Chip) -> float:
    """FLOPs over what the chip could have done in the time.

    >>> from chips import CHIPS
    >>> utilization(197e12, 1.5e9, CHIPS["v5e"])
    1.0
    """
    return flops / (cycles / chip.clock * chip.peak) if cycles else 0.0


def collective_seconds(
    rows: Sequence[Mapping[str, Any]], devices: int, chip: Chip
) -> float:
    """Time on the links: rings over all of them.

    An all-reduce of V bytes moves `2 (n - 1) / n V` through every device, the other
    kinds half of it; over the stated bandwidth. Latency is not counted.

    >>> from chips import CHIPS
    >>> row = {"kind": "all-reduce", "bytes": 100e9, "count": 1}
    >>> collective_seconds([row], 2, CHIPS["v5e"])
    0.5
    """
    if devices < 2:
        return 0.0
    share = (devices - 1) / devices
    moved = sum(
        (2 if row["kind"] == "all-reduce" else 1) * share * row["bytes"] * row["count"]
        for row in rows
    )
    return moved / chip.interconnect


class Point(NamedTuple):
    """One row of a scaling table; milliseconds."""

    devices: int
    per_device: int
    compute: float
    links: float
    step: float
    overlapped: float


def point(
    devices: int, per_device: int, cost: Cost, chip: Chip, of_links: Cost | None = None
) -> Point:
    """A step on `devices` devices: without overlap `compute + links`; with it, the
    links work while the device does what is outside of loops (the training pass)."""
    compute = cost.cycles / chip.clock
    outside = (cost.cycles - cost.loop_cycles) / chip.clock
    rows = (of_links or cost).collectives
    links = collective_seconds(rows, devices, chip)
    overlapped = compute + max(0.0, links - outside)
    ms = [1e3 * s for s in (compute, links, compute + links, overlapped)]
    return Point(devices, per_device, *ms)


def efficiency(first: Point, later: Point) -> tuple[float, float]:
    """Images per second and device of `later` over those of `first`: (plain, overlap).

    Serves weak and strong scaling alike.

    >>> one = Point(1, 8, 10.0, 0.0, 10.0, 10.0)
    >>> efficiency(one, Point(4, 2, 2.5, 2.5, 5.0, 2.5))
    (0.5, 1.0)
    """

    def rate(p: Point, time: float) -> float:
        return p.per_device / time

    plain = rate(later, later.step) / rate(first, first.step)
    overlap = rate(later, later.overlapped) / rate(first, first.overlapped)
    return plain, overlap
