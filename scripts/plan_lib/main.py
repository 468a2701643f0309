"""What an experiment would need and reach on TPUs, by the TPU compiler, without a TPU.

Compiles the experiment's own training step, its attack and its evaluation step for a
named topology and reads the result: memory, collectives, cycles, utilization. All
figures are the compiler's estimates; nothing runs on a TPU. Flags of the experiment
follow after `--`. docs/plan.md explains the figures.
"""

import argparse
import gzip
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import hlo
from chips import CHIPS, alone, chip_of
from compiling import (
    MISSING,
    ROOT,
    CompileError,
    compile_job,
    compiler_is_there,
)
from cost import Cost, cost_of, efficiency, point, utilization
from report import markdown

PROGRAMS = ("step", "attack", "evaluation")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/plan_pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: scripts/plan_pod madry_cifar --topology v5e:16x16 "
        "-- --preset pod",
    )
    add = parser.add_argument
    known = ", ".join(CHIPS)
    add("experiment", help="a file of experiments/ with a function workload(config)")
    add("--topology", default="v5e:16x16", help=f"generation ({known}) and grid")
    add("--batch-per-chip", type=int, help="rows; default: 128, or what --search finds")
    add("--microbatches", type=int, default=1, help="slices of each chip's rows")
    add("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    add("--global-batch", type=int, help="of strong scaling; default: the experiment's")
    add("--tables", nargs="*", default=("weak", "strong"), choices=("weak", "strong"))
    add("--chips", type=int, nargs="+", help="rows of the tables; default: powers of 2")
    add("--search", action="store_true", help="try batches per chip and microbatches")
    add("--search-batches", type=int, nargs="+", default=(8, 16, 32, 64, 128, 256))
    text = "compiler option NAME=VALUE beside those of training; NAME= takes one away"
    add("--option", action="append", default=[], help=text)
    add("--out", type=Path, help="default: runs/plan/EXPERIMENT_TOPOLOGY")
    add("--cache", type=Path, default=Path("~/.cache/robustjax/plans"))
    own, flags = argv, []
    if "--" in argv:
        own, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = parser.parse_args(own)
    options.flags = flags
    if options.out is None:
        name = f"{options.experiment}_{options.topology.replace(':', '_')}"
        options.out = Path("runs/plan") / name
    return options


class Planner:
    """Compiled programs of one experiment, read once each."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.chip = options, chip_of(options.topology)
        self.compiler_options = compiler_options(self.chip.kind, options.option)
        self.read: dict[tuple[Any, ...], dict[str, Any]] = {}

    def program(
        self, program: str, topology: str, per_device: int, pieces: int = 1
    ) -> dict[str, Any]:
        """Memory, cost and derived figures of one compiled program."""
        sizes = (program, topology, per_device, pieces)
        if sizes in self.read:
            return self.read[sizes]
        options = self.options
        job = {
            "experiment": options.experiment,
            "flags": options.flags,
            "program": program,
            "topology": topology,
            "per_device": per_device,
            "pieces": pieces,
            "options": self.compiler_options,
            "cache": str(options.cache.expanduser()),
        }
        label = f"{program} on {topology}, {per_device} per chip"
        if pieces > 1:
            label += f" in {pieces} pieces"
        began = time.monotonic()
        folder = compile_job(job, label)
        found = read_plan(folder, pieces)
        cost: Cost = found["cost"]
        seconds = cost.cycles / self.chip.clock
        found |= {
            "program": program,
            "topology": topology,
            "per_device": per_device,
            "pieces": pieces,
            "milliseconds": 1e3 * seconds,
            "images_per_second": per_device / seconds if seconds else 0.0,
            "utilization": utilization(cost.flops, cost.cycles, self.chip),
            "loop_utilization": utilization(
                cost.loop_flops, cost.loop_cycles, self.chip
            ),
            "fits": found["needed"] <= self.chip.memory,
        }
        self.read[sizes] = found
        took = time.monotonic() - began
        print(
            f"{label}: {found['milliseconds']:.1f} ms, utilization "
            f"{found['utilization']:.2f} ({took:.0f} s)",
            file=sys.stderr,
        )
        return found


def read_plan(folder: Path, pieces: int) -> dict[str, Any]:
    """What lies in a plan's folder, with its text summed.

    Raises:
      hlo.UnknownTripCount: a loop does not tell its trips, or none of them has the
        attack's number of steps.
    """
    figures = json.loads((folder / "figures.json").read_text())
    with gzip.open(folder / "program.hlo.gz", "rt") as file:
        cost = cost_of(file.read())
    program = figures["job"]["program"]
    steps = figures["attack_steps"]
    if program == "evaluation":
        steps = figures["evaluation_steps"]
    check_trips(cost, steps, pieces)
    memory = figures["memory"]
    needed = sum(memory[k] for k in ("argument", "output", "temp", "generated_code"))
    return {
        "cost": cost,
        "memory": memory,
        "needed": needed - memory["alias"],
        "compile_seconds": figures["compile_seconds"],
        "versions": figures["versions"],
        "batch_size": figures["batch_size"],
        "folder": str(folder),
    }


def check_trips(cost: Cost, steps: int, pieces: int) -> None:
    """Raise UnknownTripCount where loops contradict what the experiment states.

    A loop of one trip is none, and the compiler may unroll short ones; but loops of
    another length mean that this reading of the program is wrong.
    """
    trips = [loop["trips"] for loop in cost.loops]
    if trips and steps not in trips and pieces not in trips:
        raise hlo.UnknownTripCount(
            f"the compiled program has loops of {trips} trips, but the experiment's "
            f"attack takes {steps} steps: its cycles would be summed wrongly."
        )


def compiler_options(kind: str, given: list[str]) -> dict[str, str]:
    """Those that training on this kind of chip has, changed by what is given."""
    models = importlib.import_module("robustjax.models")
    options = models.tpu_options(kind) | dict(text.split("=", 1) for text in given)
    return {name: value for name, value in options.items() if value}


def powers(devices: int) -> list[int]:
    """1, 2, 4 ... up to the number of devices.

    >>> powers(8)
    [1, 2, 4, 8]
    """
    counts = []
    while 2 ** len(counts) < devices:
        counts.append(2 ** len(counts))
    return [*counts, devices]


def device_count(topology: str) -> int:
    """Of a topology such as "v5e:4x4".

    >>> device_count("v5e:4x4"), device_count("v4:2x2x1")
    (16, 8)
    """
    generation, _, grid = topology.partition(":")
    count = 1
    for side in grid.split("x"):
        if not side.isdigit() or int(side) < 1:
            raise ValueError(
                f"topology={topology!r}: write a generation and a grid, as in "
                "v5e:16x16 or v5p:2x2x1."
            )
        count *= int(side)
    return count * (2 if generation == "v4" else 1)


def counts(options: argparse.Namespace, devices: int) -> list[int]:
    """The numbers of chips that the tables show."""
    if not options.chips:
        return powers(devices)
    if bad := [n for n in options.chips if not 1 <= n <= devices]:
        raise ValueError(f"--chips {bad[0]}: {options.topology} has 1 to {devices}.")
    return sorted(options.chips)


def weak_table(planner: Planner, per_device: int, pieces: int) -> list[dict[str, Any]]:
    topology = planner.options.topology
    one = planner.program("step", alone(topology), per_device, pieces)
    pod = planner.program("step", topology, per_device, pieces)
    chip = planner.chip
    first = point(1, per_device, one["cost"], chip)
    rows = []
    for n in counts(planner.options, device_count(topology)):
        row = first if n == 1 else point(n, per_device, pod["cost"], chip)
        plain, overlap = efficiency(first, row)
        rows.append({**row._asdict(), "efficiency": plain, "with_overlap": overlap})
    return rows


def strong_table(planner: Planner, batch: int) -> list[dict[str, Any]]:
    """From the fewest chips with at most 128 rows each to all of them."""
    topology, chip = planner.options.topology, planner.chip
    rows, first = [], None
    for n in counts(planner.options, device_count(topology)):
        per_device, left = divmod(batch, n)
        if left or per_device > 128 or not per_device:
            continue
        found = planner.program("step", topology, per_device)
        row = point(n, per_device, found["cost"], chip)
        first = first or row
        plain, overlap = efficiency(first, row)
        rows.append({**row._asdict(), "efficiency": plain, "with_overlap": overlap})
    return rows


def search(planner: Planner) -> list[dict[str, Any]]:
    """Every batch per chip whole, and in pieces of 128 or less, best first."""
    options = planner.options
    tried = []
    for per_device in options.search_batches:
        for pieces in (1, 2, 4):
            size, left = divmod(per_device, pieces)
            if left or (pieces > 1 and size < 64):
                continue
            try:
                found = planner.program("step", options.topology, per_device, pieces)
            except CompileError as error:
                print(error, file=sys.stderr)
                tried.append({"per_device": per_device, "pieces": pieces})
                continue
            keys = ("milliseconds", "images_per_second", "utilization", "fits")
            row = {"per_device": per_device, "pieces": pieces}
            tried.append(row | {k: found[k] for k in keys})
    return sorted(tried, key=lambda row: -row.get("utilization", -1.0))


def main(argv: list[str]) -> int:
    options = arguments(argv)
    try:
        planner = Planner(options)
        devices = device_count(options.topology)
        if not compiler_is_there():
            raise ValueError(MISSING)
        check_flags(options)
        plan = make(planner, options, devices)
    except (ValueError, CompileError) as error:
        print(f"plan_pod: error: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(plan)
    (options.out / "plan.md").write_text(text)
    (options.out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    print(text)
    print(f"{options.out}/plan.md, plan.json", file=sys.stderr)
    return 0


def check_flags(options: argparse.Namespace) -> None:
    """Read the experiment's flags here already, where its messages are seen."""
    sys.path.insert(0, str(ROOT))
    name = options.experiment
    if not (ROOT / "experiments" / f"{name}.py").exists():
        raise ValueError(f"experiment={name!r}: there is no experiments/{name}.py.")
    module = importlib.import_module(f"experiments.{name}")
    if not hasattr(module, "workload"):
        raise ValueError(
            f"experiments/{name}.py has no function `workload(config)`, which says "
            "what it trains, without its data; experiments/madry_cifar.py has one."
        )
    common = importlib.import_module("experiments.common")
    common.parse(module.PRESETS, module.__doc__, options.flags)


def make(planner: Planner, options: argparse.Namespace, devices: int) -> dict[str, Any]:
    """Everything that is asked for; a program is compiled once."""
    plan: dict[str, Any] = {
        "experiment": options.experiment,
        "flags": options.flags,
        "topology": options.topology,
        "devices": devices,
        "chip": planner.chip._asdict(),
        "options": [
            f"{name}={value}" for name, value in planner.compiler_options.items()
        ],
    }
    per_device, pieces = options.batch_per_chip or 128, options.microbatches
    if options.search:
        plan["search"] = search(planner)
        best = next((row for row in plan["search"] if row.get("fits")), None)
        if best is None:
            raise ValueError(
                "nothing that was tried fits on a chip: give smaller --search-batches."
            )
        if options.batch_per_chip is None:
            per_device, pieces = best["per_device"], best["pieces"]
    plan["per_device"], plan["pieces"] = per_device, pieces
    plan["programs"] = [
        planner.program(
            name, options.topology, per_device, pieces if name == "step" else 1
        )
        for name in options.programs
    ]
    if "weak" in options.tables:
        plan["weak"] = weak_table(planner, per_device, pieces)
    if "strong" in options.tables:
        batch = options.global_batch or plan["programs"][0]["batch_size"]
        plan["global_batch"], plan["strong"] = batch, strong_table(planner, batch)
    for found in plan["programs"]:
        found["cost"] = found["cost"]._asdict()
    return plan


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
