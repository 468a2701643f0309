"""A plan as Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CAVEAT = (
    "Every figure is an estimate of the TPU compiler (libtpu), made without a TPU: "
    "nothing was run on one. Cycles are the compiler's `estimated_cycles`, loop bodies "
    "as often as they run; copies between memories that the compiler means to hide "
    "behind them, latencies, the host and the input pipeline are not in them."
)


def markdown(plan: Mapping[str, Any]) -> str:
    """The whole plan."""
    chip = plan["chip"]
    flags = " ".join(plan["flags"])
    parts = [
        f"# {plan['experiment']} {flags} on {plan['topology']}".replace("  ", " "),
        CAVEAT,
        f"{plan['devices']} devices ({chip['kind']}): {chip['peak'] / 1e12:g} TFLOP/s "
        f"bfloat16 at {chip['clock'] / 1e9:g} GHz, {chip['memory'] / 1e9:g} GB at "
        f"{chip['bandwidth'] / 1e9:g} GB/s, links {chip['interconnect'] / 1e9:g} GB/s "
        f"out. {chip['note']}".strip(),
    ]
    if plan["options"]:
        parts.append("Compiler options: " + ", ".join(plan["options"]))
    if "search" in plan:
        parts += ["## Search", _search(plan["search"])]
    programs = plan["programs"]
    per = f"{plan['per_device']} images per chip"
    if plan["pieces"] > 1:
        per += f", the step in {plan['pieces']} pieces"
    parts += [f"## Programs, {per}", _programs(programs)]
    for name, title in (("weak", "Weak scaling"), ("strong", "Strong scaling")):
        if name not in plan:
            continue
        fixed = f"{plan['per_device']} images per chip"
        if name == "strong":
            fixed = f"{plan['global_batch']} images per step"
        parts += [f"## {title}, {fixed}", _scaling(plan[name])]
    for program in programs:
        title = f"## The ten costliest operations of the {program['program']}"
        rows = program["cost"]["costly"]
        parts += [title, _costly(rows, chip)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a"], [["1"]]))
    | a |
    | --- |
    | 1 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _programs(programs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for p in programs:
        memory, cost = p["memory"], p["cost"]
        loops = ", ".join(str(loop["trips"]) for loop in cost["loops"]) or "none"
        crossing = _crossing(cost["collectives"])
        rows.append(
            [
                p["program"],
                f"{p['milliseconds']:.1f}",
                f"{p['images_per_second']:.0f}",
                f"{p['utilization']:.2f}",
                f"{p['loop_utilization']:.2f}" if cost["loop_cycles"] else "-",
                loops,
                f"{memory['argument'] / 1e6:.0f}",
                f"{memory['temp'] / 1e6:.0f}",
                f"{p['needed'] / 1e6:.0f}" + ("" if p["fits"] else ", DOES NOT FIT"),
                crossing,
                f"{p['compile_seconds']:.0f}",
            ]
        )
    header = [
        *("program", "ms", "images/s/chip", "utilization", "in loops", "trips"),
        *("arguments MB", "temporaries MB", "in all MB", "collectives", "compile s"),
    ]
    return table(header, rows)


def _crossing(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kind = kinds.setdefault(row["kind"], [0, 0.0])
        kind[0] += row["count"]
        kind[1] += row["count"] * row["bytes"]
    if not kinds:
        return "none"
    return ", ".join(f"{n} {k} ({size / 1e6:.2f} MB)" for k, (n, size) in kinds.items())


def _scaling(rows: Sequence[Mapping[str, Any]]) -> str:
    header = [
        *("chips", "images per chip", "compute ms", "links ms", "step ms"),
        *("efficiency", "step ms, overlapped", "efficiency, overlapped"),
    ]
    return table(
        header,
        [
            [
                f"{row['devices']}",
                f"{row['per_device']}",
                f"{row['compute']:.2f}",
                f"{row['links']:.2f}",
                f"{row['step']:.2f}",
                f"{100 * row['efficiency']:.1f} %",
                f"{row['overlapped']:.2f}",
                f"{100 * row['with_overlap']:.1f} %",
            ]
            for row in rows
        ],
    )


def _search(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "utilization" not in row:
            figures = ["-", "-", "-", "does not compile"]
        else:
            figures = [
                f"{row['milliseconds']:.1f}",
                f"{row['images_per_second']:.0f}",
                f"{row['utilization']:.2f}",
                "yes" if row["fits"] else "no",
            ]
        lines.append([str(row["per_device"]), str(row["pieces"]), *figures])
    header = ["images per chip", "pieces", "ms", "images/s/chip", "utilization", "fits"]
    return table(header, lines) + "\n\nBest first."


def _costly(rows: Sequence[Mapping[str, Any]], chip: Mapping[str, Any]) -> str:
    lines = []
    for row in rows:
        possible = row["cycles"] / chip["clock"] * chip["peak"]
        used = row["flops"] / possible if possible else 0.0
        lines.append(
            [
                f"{100 * row['share']:.1f} %",
                f"{row['cycles'] / row['count']:.0f} x {row['count']}",
                f"{used:.2f}" if row["flops"] else "-",
                f"`{row['result']}`",
                f"`{shortened(row['what'])}`" if row["what"] else row["opcode"],
                advice(row, used),
            ]
        )
    header = ["share", "cycles x times", "utilization", "result", "what", "to change"]
    return table(header, lines)


def shortened(what: str) -> str:
    """An op's name without the wrappers that all of them have.

    >>> shortened("jit(step)/jvp()/while/body/eval_jaxpr/jvp(Net)/conv1/conv")
    'while/body/jvp(Net)/conv1/conv'
    """
    parts = [p for p in what.split("/") if p not in ("jvp()", "eval_jaxpr")]
    return "/".join(parts[1:] if parts[0].startswith("jit(") else parts)


def advice(row: Mapping[str, Any], used: float) -> str:
    """What usually helps an operation of this kind."""
    what = row["what"]
    sizes = [int(n) for n in re.findall(r"\d+", row["result"].partition("[")[2])]
    if "conv_general_dilated" in what or "dot_general" in what:
        if used >= 0.75:
            return "near the peak: nothing"
        if "transpose(" in what and "patch" in what:
            return "write the patch embedding as reshape and dense"
        width = sizes[-1] if sizes else 0
        if width % 128 and width > 16:
            padded = -(-width // 128) * 128
            return f"{width} channels fill {padded} lanes: a multiple of 128"
        if 0 < width <= 16:
            return "few channels: cannot fill the matrix unit"
        return "more images per chip"
    if row["opcode"] in ("copy", "transpose", "convert", "reshape"):
        return "moves or casts data: keep one layout and dtype, cast once"
    if "dynamic" in what or "scan" in what:
        return "unroll the scan over layers"
    return "bound by memory: fewer passes over it, bfloat16, fusion"
