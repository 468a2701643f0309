"""Times robustjax beside bare JAX and plain PyTorch; scripts/bench --help says how.

Programs that are compared are timed in turn, round after round, so that whatever else
the machine does meets all of them. CPU time is that of the whole process; a ratio is
the median of the rounds' ratios, the "best" ratio that of each side's best round (on a
busy machine the steadier one: company only ever adds time).
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare import Worker, costs, groups, header, measure, show

HERE = Path(__file__).parent
SECTIONS = ("step", "loop", "train", "norms", "double", "torch")
QUICK: dict[str, Any] = {
    "nets": ["mlp"], "batch": 32, "train_batch": 32, "steps": 2, "inner_steps": 2,
    "double_batch": 8, "double_steps": 2, "repeats": 2,
}  # fmt: skip


def has_torch(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", "import torch"], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = os.cpu_count()
    return {"cpu": name, "cores": cores, "system": platform.platform()}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    add = parser.add_argument
    nets = ["madry_mnist", "preact_resnet18_w16"]
    add("--nets", nargs="+", default=nets, help="mlp, small_cnn, " + ", ".join(nets))
    add("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    add("--batch", type=int, default=256, help="rows of an attack")
    add("--train-batch", type=int, default=128, help="rows of a training step")
    add("--steps", type=int, default=10, help="iterations of a scan")
    add("--inner-steps", type=int, default=7, help="K of the PGD-K training step")
    add("--double-batch", type=int, default=32, help="rows of the double backward")
    add("--double-steps", type=int, default=2, help="its steps in the scan")
    add("--repeats", type=int, default=7, help="rounds; medians are reported")
    add("--threads", type=int, default=0, help="cores of each worker; 0: all")
    add("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    add("--out", type=Path, default=Path("runs/bench.json"))
    add("--quick", action="store_true", help="tiny sizes: does it all work?")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    return options


def main() -> None:
    options = arguments()
    if options.threads and hasattr(os, "sched_setaffinity"):
        # Workers inherit it, and size their thread pools by it.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    given = {k: v for k, v in vars(options).items() if k != "out"}
    given["sections"] = list(options.sections)
    here = [sys.executable, str(HERE / "jax_worker.py")]
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile seconds are measured
    }
    workers = {"jax": Worker(here, given, **env)}
    on_cpu = workers["jax"].about["platform"] == "cpu"
    if "torch" in options.sections and on_cpu:
        workers["onednn"] = Worker(here, given | {"onednn": True}, **env)
        if has_torch(options.torch_python):
            command = [options.torch_python, str(HERE / "torch_worker.py")]
            threads = {"OMP_NUM_THREADS": str(options.threads)}
            workers["torch"] = Worker(
                command, given, **(threads if options.threads else {})
            )
        else:
            print(f"bench: no PyTorch in {options.torch_python} (--torch-python PATH)")
    report: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/bench", *sys.argv[1:]]),
        "machine": machine(),
        "load_before": os.getloadavg(),
        "flags": {k: os.environ.get(k, "") for k in ("XLA_FLAGS", "GLIBC_TUNABLES")},
        "options": given | {"torch_python": None},
        "workers": {name: worker.about for name, worker in workers.items()},
        "programs": {},
        "comparisons": [],
    }
    header()
    for net in options.nets:
        check_size(net, workers)
        for section, comparisons in groups(net, given, workers):
            if section not in options.sections:
                continue
            measured, table = measure(comparisons, workers, options.repeats)
            show(net, table, measured)
            for name, values in measured.items():
                # The torch section times the jax programs anew: keep both.
                report["programs"].setdefault(name, {})[section] = values
            report["comparisons"] += [{"net": net, **row} for row in table]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    costs(report["programs"])
    for worker in workers.values():
        worker.close()
    print(f"bench: written to {options.out}")


def check_size(net: str, workers: dict[str, Worker]) -> None:
    """Both sides must run the same net: at least as many parameters each."""
    theirs = workers["torch"].about["programs"] if "torch" in workers else []
    if f"{net}/loop/nchw" in theirs:
        counts = [
            workers[worker].ask("prepare", f"{net}/{program}")["parameters"]
            for worker, program in (("jax", "parameters"), ("torch", "loop/nchw"))
        ]
        if len(set(counts)) > 1:
            raise SystemExit(f"bench: {net} has {counts} parameters in JAX and PyTorch")


if __name__ == "__main__":
    main()
