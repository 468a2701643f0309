"""Optimised HLO text as values: instructions, loops with trip counts, FLOPs, bytes.

Pure functions of the text that `compiled.as_text()` gives. The format is the compiler's
own and promised to nobody, so what is not understood is refused by name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
    "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
COLLECTIVES = (
    "all-reduce",
    "reduce-scatter",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Shape(NamedTuple):
    """An array's element type and sizes."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.dims) * BYTES.get(self.dtype, 1))


class Instruction(NamedTuple):
    """One line of HLO.

    shapes: of what it gives; several for a tuple. cycles: the compiler's estimate for
    one execution, or None. calls: role -> names of computations ("calls", "body", ...).
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str
    op_name: str
    cycles: int | None
    calls: Mapping[str, tuple[str, ...]]
    is_root: bool


Computation = Mapping[str, Instruction]


class Program(NamedTuple):
    """All computations by name, and the name of the one where execution begins."""

    computations: Mapping[str, Computation]
    entry: str


class Work(NamedTuple):
    """An instruction that costs something, and how often the program executes it."""

    instruction: Instruction
    count: int
    loops: tuple[str, ...]  # the while instructions around it, outermost first

    @property
    def cycles(self) -> int:
        return self.count * (self.instruction.cycles or 0)


class Loop(NamedTuple):
    """A while loop: its name, where it comes from, trips of one execution."""

    name: str
    op_name: str
    trips: int


class UnknownTripCount(ValueError):
    """A loop whose number of trips the text does not tell."""


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_CALLS = re.compile(
    r"\b(calls|body|condition|to_apply|branch_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")


def parse(text: str) -> Program:
    """Read a module.

    Raises:
      ValueError: no entry computation: this is no HLO text.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module.")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = _LINE.match(line)
    if not start:
        return None
    # The type: an array or a parenthesized tuple, whose layouts have parentheses too.
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else _array_end(line, at)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    opened = opcode.end() - 1
    closed = _closing(line, opened)
    attributes = line[closed + 1 :]
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', attributes)
    inside = line[opened + 1 : closed]
    head = attributes.split("metadata=")[0].split("backend_config=")[0]
    calls = {
        role: tuple(_NAME.findall(names)) or (names,)
        for role, names in _CALLS.findall(head)
    }
    return Instruction(
        start[2],
        opcode[1],
        tuple(_shapes(line[at:end])),
        tuple(_NAME.findall(inside)),
        inside,
        attributes,
        op_name[1] if op_name else "",
        int(cycles[1]) if cycles else None,
        calls,
        bool(start[1]),
    )


def _array_end(line: str, at: int) -> int:
    """The end of `f32[2,3]{1,0:T(8,128)}`: the first blank outside of braces."""
    depth = 0
    for i in range(at, len(line)):
        depth += (line[i] in "{[(") - (line[i] in "}])")
        if line[i] == " " and depth == 0:
            return i
    return len(line)


def _closing(line: str, opened: int) -> int:
    depth = 0
    for i in range(opened, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {line[:200]!r}.")


def _shapes(text: str) -> Iterator[Shape]:
    text = re.sub(r"\{[^{}]*\}", "", text)  # layouts
    for dtype, dims in _SHAPE.findall(text):
        yield Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a while loop runs: what the compiler notes, or what its text says.

    Read from the text: the condition compares an element of the carry with a constant,
    the body adds a constant to it, and it begins at a constant.

    Raises:
      UnknownTripCount: none of it; nothing is guessed.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    (condition,), (body,) = loop.calls["condition"], loop.calls["body"]
    test = _root(program, condition)
    compare = re.search(r"direction=(\w+)", test.attributes)
    if test.opcode == "compare" and compare and compare[1] in ("LT", "LE", "NE"):
        here = program.computations[condition]
        slot = _slot(here, test.operands[0])
        bound = _constant(here, test.operands[1])
        if slot is not None and bound is not None:
            stride = _stride(program.computations[body], _root(program, body), slot)
            start = _start(program, loop, slot)
            if stride and start is not None:
                return max(0, -(-(bound - start + (compare[1] == "LE")) // stride))
    raise UnknownTripCount(
        f"the loop %{loop.name} ({loop.op_name or 'of unknown origin'}) does not tell "
        "how often it runs: its cycles cannot be summed. Write it with a fixed number "
        "of steps (scan, or fori_loop with constants)."
    )


def _root(program: Program, name: str) -> Instruction:
    return next(i for i in program.computations[name].values() if i.is_root)


def _resolve(computation: Computation, name: str) -> Instruction:
    """Follow copies to where a value comes from."""
    found = computation[name]
    while found.opcode in ("copy", "bitcast", "convert") and found.operands:
        found = computation[found.operands[0]]
    return found


def _constant(computation: Computation, name: str) -> int | None:
    found = _resolve(computation, name)
    if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.inside):
        return int(found.inside)
    return None


def _slot(computation: Computation, name: str) -> int | None:
    """Which element of the computation's parameter a value is."""
    found = _resolve(computation, name)
    if found.opcode != "get-tuple-element":
        return None
    if computation[found.operands[0]].opcode != "parameter":
        return None
    index = re.search(r"index=(\d+)", found.attributes)
    return int(index[1]) if index else None


def _stride(body: Computation, root: Instruction, slot: int) -> int | None:
    moved = _resolve(body, root.operands[slot])
    if moved.opcode != "add" or len(moved.operands) != 2:
        return None
    for one, other in (moved.operands, moved.operands[::-1]):
        if _slot(body, one) == slot:
            return _constant(body, other)
    return None


def _start(program: Program, loop: Instruction, slot: int) -> int | None:
    for computation in program.computations.values():
        if computation.get(loop.name) is loop:
            carry = _resolve(computation, loop.operands[0])
            if carry.opcode == "tuple":
                return _constant(computation, carry.operands[slot])
    return None


def loops(program: Program) -> list[Loop]:
    """Every while loop that is reached, with its trips."""
    found: dict[str, Loop] = {}
    for _, instruction, _, _ in _walk(program, program.entry, 1, ()):
        if instruction.opcode == "while":
            trips = trip_count(program, instruction)
            found[instruction.name] = Loop(instruction.name, instruction.op_name, trips)
    return list(found.values())


def work(program: Program) -> list[Work]:
    """What the program executes, loop bodies as often as they run.

    Of a conditional's branches the one with the most cycles counts.

    Raises:
      UnknownTripCount: see `trip_count`.
    """
    return [
        Work(instruction, count, around)
        for _, instruction, count, around in _walk(program, program.entry, 1, ())
    ]


Step = tuple[str, Instruction, int, tuple[str, ...]]


def _walk(
    program: Program, name: str, count: int, around: tuple[str, ...]
) -> Iterator[Step]:
    for instruction in program.computations[name].values():
        yield name, instruction, count, around
        calls = instruction.calls
        if instruction.opcode == "while":
            trips = trip_count(program, instruction)
            inner = (*around, instruction.name)
            yield from _walk(program, calls["body"][0], count * trips, inner)
        elif instruction.opcode == "conditional":
            names = [n for role in calls.values() for n in role]
            branches = [list(_walk(program, n, count, around)) for n in names]
            yield from max(
                branches, key=lambda b: sum(c * (i.cycles or 0) for _, i, c, _ in b)
            )
        elif instruction.opcode in ("call", "async-start"):
            for role in calls.values():
                yield from _walk(program, role[0], count, around)


def flops(program: Program, instruction: Instruction) -> int:
    """FLOPs of the convolutions and matrix products in one execution (2 per product).

    Padding counts and holes of dilation do not, and on no axis more than the product of
    the two smallest of input, window and output: so the gradients of a convolution
    count as much as the convolution, whichever of the three the compiler makes of what.
    """
    computation = next(
        c
        for c in program.computations.values()
        if c.get(instruction.name) is instruction
    )
    return _flops(program, computation, instruction)


def _flops(program: Program, here: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.calls["calls"][0]]
        return sum(_flops(program, inner, i) for i in inner.values())
    if instruction.opcode == "convolution":
        lhs, rhs = (here[name].shapes[0] for name in instruction.operands)
        return convolution_flops(
            lhs.dims, rhs.dims, instruction.shapes[0].dims, instruction.attributes
        )
    if instruction.opcode == "dot":
        lhs = here[instruction.operands[0]].shapes[0].dims
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [lhs[int(a)] for a in axes[1].split(",") if a] if axes else []
        return 2 * math.prod(instruction.shapes[0].dims) * math.prod(contracted)
    return 0


def convolution_flops(
    lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> int:
    """FLOPs of one convolution; `attributes` hold its window and dim_labels.

    Raises:
      ValueError: there are no dim_labels.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        raise ValueError(f"a convolution without dim_labels: {attributes[:200]!r}.")
    of_lhs, of_rhs, of_out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    taps = 1
    for axis, label in enumerate(sorted(c for c in of_out if c.isdigit())):

        def at(name: str, default: str, axis: int = axis) -> int:
            values = fields.get(name, "").split("x")
            value = values[axis] if fields.get(name) else default
            return int(value.split("_")[0])

        size, window_size = lhs[of_lhs.index(label)], rhs[of_rhs.index(label)]
        outputs = out[of_out.index(label)]
        moves = (at("stride", "1"), at("rhs_dilate", "1"), at("pad", "0"))
        taps *= min(
            _pairs(outputs, window_size, *moves, at("lhs_dilate", "1")),
            size * window_size,
            size * outputs,
        )
    # Groups need no care: `i` of the kernel is the size of one.
    rows = out[of_out.index("b")] * out[of_out.index("f")]
    return 2 * rows * taps * rhs[of_rhs.index("i")]


def _pairs(out: int, taps: int, stride: int, step: int, low: int, holes: int) -> int:
    """Outputs and taps that meet on one axis, but for those that meet a hole.

    Matrix products of many pairs of matrices are written as convolutions with such
    holes, where every output meets one tap.
    """
    residues: dict[int, int] = {}
    for tap in range(taps):
        residue = (low - tap * step) % holes
        residues[residue] = residues.get(residue, 0) + 1
    return sum(residues.get(i * stride % holes, 0) for i in range(out))


def collectives(program: Program) -> list[tuple[str, int, int, str]]:
    """(kind, bytes per chip, executions, op_name) of everything that crosses chips.

    An asynchronous pair counts once, at its start.
    """
    found = []
    for item in work(program):
        opcode = item.instruction.opcode
        kind = opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        shapes = item.instruction.shapes
        if opcode.endswith("-start") and kind != "all-reduce":
            shapes = shapes[len(shapes) // 2 :]  # (operands, results)
        size = sum(shape.bytes for shape in shapes)
        found.append((kind, size, item.count, item.instruction.op_name))
    return found
