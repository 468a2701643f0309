"""What is compared with what, how it is timed, and the table."""

import json
import os
import statistics
import subprocess
from typing import Any, NamedTuple

TORCH_LIMITS = {"madry_mnist": 0.85, "preact_resnet18_w16": 1.1}


class Comparison(NamedTuple):
    """One row of the table: `subject` over `baseline`, both "worker:program"."""

    what: str
    subject: str
    baseline: str
    limit: float | None = None


class Worker:
    """A process that prepares and times programs."""

    def __init__(self, command: list[str], options: dict[str, Any], **env: str):
        self.process = subprocess.Popen(
            [*command, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.close()
            raise SystemExit(f"bench: a worker ended with code {code}, see above")
        return json.loads(line)

    def ask(self, request: str, name: str) -> dict[str, Any]:
        assert self.process.stdin
        print(json.dumps({request: name}), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


def groups(net: str, options: dict[str, Any], workers: dict[str, Worker]):
    """Lists of comparisons; those of one list are timed in turn."""

    def rows(section: str, what: str) -> list[Comparison]:
        return [
            Comparison(
                f"{what}, {norm}",
                f"jax:{net}/{section}/{norm}",
                f"jax:{net}/{section}/bare",
                1.05 if norm != "l1" else None,
            )
            for norm in ("linf", "l2", "l1")
        ]

    k, steps = options["inner_steps"], options["steps"]
    yield "step", rows("step", "attack_step, jitted once / bare gradient step")
    loop = rows("loop", f"attack_step in a scan of {steps} / bare step in a scan")
    best = Comparison(
        f"pgd({steps}), best iterate kept, linf / bare step in a scan",
        f"jax:{net}/run/linf",
        f"jax:{net}/loop/bare",
    )
    yield "loop", [*loop, best]
    yield "train", rows("train", f"PGD-{k} training step / {k + 1} plain gradients")
    yield (
        "norms",
        [
            Comparison(
                f"over_threats of 3 norms, {how} / loop",
                f"jax:{net}/norms/{how}",
                f"jax:{net}/norms/loop",
            )
            for how in ("map", "vmap")
        ],
    )
    yield (
        "double",
        [
            Comparison(
                "input-gradient penalty in a scan: canonical / ordinary convolution",
                f"jax:{net}/double/canonical",
                f"jax:{net}/double/plain",
            )
        ],
    )
    for program in ("loop", "train"):
        found = []
        what = "one PGD iteration" if program == "loop" else f"PGD-{k} training step"
        for worker in ("jax", "onednn"):
            if worker not in workers:
                continue
            subject = f"{worker}:{net}/{program}/linf"
            if worker == "onednn":
                base = f"jax:{net}/{program}/linf"
                found.append(
                    Comparison(f"{what}: oneDNN calls / without", subject, base)
                )
            if "torch" in workers and net in TORCH_LIMITS:
                for layout in ("nchw", "channels_last"):
                    base = f"torch:{net}/{program}/{layout}"
                    name = f"{what}, {worker} / PyTorch {layout}"
                    found.append(Comparison(name, subject, base, TORCH_LIMITS[net]))
        if found:
            yield "torch", found


def measure(
    comparisons: list[Comparison], workers: dict[str, Worker], repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    names = list(dict.fromkeys(n for c in comparisons for n in (c.baseline, c.subject)))

    def ask(request: str, name: str) -> dict[str, Any]:
        worker, program = name.split(":", 1)
        return workers[worker].ask(request, program)

    measured: dict[str, Any] = {}
    for name in names:
        measured[name] = ask("prepare", name)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for i in range(repeats):
        shift = i % len(names)  # nobody always follows the same neighbor
        for name in names[shift:] + names[:shift]:
            rounds[name].append(ask("time", name))
    for name in names:
        ask("drop", name)
        for kind in ("cpu_ms", "wall_ms"):
            values = [r[kind] for r in rounds[name]]
            measured[name][kind] = round(statistics.median(values), 3)
            measured[name][f"{kind}_all"] = [round(v, 3) for v in values]
    table = []
    for c in comparisons:
        row: dict[str, Any] = c._asdict()
        for kind in ("cpu", "wall"):
            pairs = zip(rounds[c.subject], rounds[c.baseline], strict=True)
            ratios = [a[f"{kind}_ms"] / b[f"{kind}_ms"] for a, b in pairs]
            row[f"{kind}_ratio"] = round(statistics.median(ratios), 3)
        best = [min(r["cpu_ms"] for r in rounds[n]) for n in (c.subject, c.baseline)]
        row["best_ratio"] = round(best[0] / best[1], 3)
        table.append(row)
    return measured, best_layout(table)


def best_layout(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each side is judged by its better form: the other rows lose the limit."""
    torch = [row for row in table if row["baseline"].startswith("torch:")]
    if torch:
        # The layout that is hardest to beat, with the options that beat it best.
        subjects = {row["subject"] for row in torch}
        hardest = {
            subject: max(r["cpu_ratio"] for r in torch if r["subject"] == subject)
            for subject in subjects
        }
        judged = min(hardest.values())
        for row in torch:
            if row["cpu_ratio"] != judged:
                row["limit"] = None
    return table


def header() -> None:
    print(
        f"{'':93} {'CPU ms':>9} {'of the':>9} {'wall ms':>9} {'of the':>9} "
        f"{'CPU':>7} {'best':>7} {'wall':>7}\n{'net':20} {'comparison':72} {'':9} "
        f"{'latter':>9} {'':9} {'latter':>9} {'ratio':>7} {'ratio':>7} {'ratio':>7} "
        "limit"
    )


def show(net: str, table: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    for row in table:
        a, b = measured[row["subject"]], measured[row["baseline"]]
        limit = row["limit"]
        verdict = ""
        if limit:
            verdict = f"<= {limit} {'ok' if row['cpu_ratio'] <= limit else 'MISSED'}"
        print(
            f"{net:20} {row['what']:72} {a['cpu_ms']:9.2f} {b['cpu_ms']:9.2f} "
            f"{a['wall_ms']:9.2f} {b['wall_ms']:9.2f} {row['cpu_ratio']:7.3f} "
            f"{row['best_ratio']:7.3f} {row['wall_ratio']:7.3f} {verdict}",
            flush=True,
        )


def costs(programs: dict[str, Any]) -> None:
    print(
        f"\n{'':44} {'trace, lower':>15} {'compile':>15} {'temporaries':>12}\n"
        f"{'program':44} {'CPU s':>7} {'wall s':>7} {'CPU s':>7} {'wall s':>7} "
        f"{'MB':>12}"
    )
    for name, sections in programs.items():
        values = next(iter(sections.values()))
        if "compile_s" in values:
            memory = values["temporaries_mb"]
            print(
                f"{name:44} {values['lower_cpu_s']:7.2f} {values['lower_s']:7.2f} "
                f"{values['compile_cpu_s']:7.2f} {values['compile_s']:7.2f} "
                f"{memory if memory is not None else '-':>12}"
            )
    peaks: dict[str, float] = {}
    for name, sections in programs.items():
        worker = name.partition(":")[0]
        reached = [values["process_peak_mb"] for values in sections.values()]
        peaks[worker] = max(peaks.get(worker, 0.0), *reached)
    for worker, peak in peaks.items():
        print(f"peak memory of the process {worker}, all programs: {peak:.0f} MB")
