"""Which collectives a compiled program has, read from its optimised HLO."""

import re
from typing import NamedTuple

KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")
BODY = re.compile(r"while\(.*body=%?([\w.-]+)")
NAME = re.compile(r'op_name="([^"]*)"')
SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction: what it is, the shapes it moves, where the program asks for it,
    and whether it stands in the body of a loop."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    name: str
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    found, computation = [], ""
    bodies = set(BODY.findall(text))
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            computation = header[1]
        if not (hit := COLLECTIVE.search(line)):
            continue
        shapes = tuple(
            tuple(int(n) for n in dims.split(",") if n)
            for _, dims in SHAPE.findall(re.sub(r"/\*.*?\*/", "", hit[1]))
        )
        name = NAME.search(line)
        found.append(
            Collective(hit[2], shapes, name[1] if name else "", computation in bodies)
        )
    return found
