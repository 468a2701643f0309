"""Prove several processes: the same numbers, a loss, a preemption, the continuation.

Runs real processes on this machine, each with its own devices (CPU, gloo), and prints
what it finds:

    numbers   20 steps of PGD training in float64, plain training and one PGD step in
              float32, and an evaluation: 1, 2, 4 and 8 devices, and 4 devices as 2 and
              as 4 processes, against one device
    kill      one of two processes is killed, or hangs, in the middle of a training:
              what the other says, after how long, with which exit code; the same
              command again
    sigterm   SIGTERM to both, and to one: the step that is saved, the exit codes, and
              the same command again
    fewer     a run of two processes goes on in one, on one device

Continued runs are compared with an unbroken one by the hash of their final state.
Exit code 0: all as it should be.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from prove_resume import state_hash

STEPS, EVERY = 400, 20
WIDTHS = (17, 13, 10, 10)
PARTS = ("numbers", "kill", "sigterm", "fewer")


def net():
    """A dense net in the type of its input, with one leaf that devices can share."""
    import jax
    import jax.numpy as jnp

    from robustjax.models.base import Model

    def init(key, x):
        first, second = jax.random.split(key)
        hidden = 0.3 * jax.random.normal(first, (x[0].size, 64), x.dtype)
        out = 0.3 * jax.random.normal(second, (64, 10), x.dtype)
        return {"hidden": hidden, "out": out}, {}

    def apply(params, extra, x, *, train=False, key=None):
        hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ params["hidden"])
        return hidden @ params["out"], extra

    return Model(init, apply)


def images(dtype: str = "float32"):
    import numpy as np

    from robustjax.data.sources import load

    digits = load("digits")
    x = digits.x_train.astype(dtype) / digits.max_value
    return x, digits.y_train.astype(np.int32)


def train(out: Path, mesh: Any) -> None:
    """The training that is killed; ends by writing the hash of its final state."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from robustjax.attacks.base import last
    from robustjax.attacks.pgd import pgd
    from robustjax.data import augment
    from robustjax.data.resident import resident
    from robustjax.data.sources import load
    from robustjax.methods.madry import madry
    from robustjax.parallel import fetch, is_writer
    from robustjax.threats import linf
    from robustjax.training import optimizers
    from robustjax.training.loop import fit

    digits, model = load("digits"), net()
    x, y = (a[:256] for a in images())

    @jax.jit
    def correct(params, extra, x, y):
        return jnp.mean(jnp.argmax(model.apply(params, extra, x)[0], -1) == y)

    result = fit(
        jax.random.key(3),
        model,
        madry(model, linf(0.1), pgd(5, 0.3, keep=last)),
        optimizers.sgd(optimizers.one_cycle(0.1, STEPS), weight_decay=5e-4),
        resident(digits.x_train, digits.y_train, digits.max_value),
        batch_size=64,
        num_steps=STEPS,
        augment=lambda key, x, index: augment.random_crop(key, x, index, padding=1),
        validate=lambda *weights: {"clean_accuracy": correct(*weights, x, y)},
        best_metric="clean_accuracy",
        checkpoint_every=EVERY,
        ema_decay=0.98,
        out=out,
        mesh=mesh,
        shard_params=True,
    )
    found = state_hash(result)  # all processes fetch their parts
    weights = fetch(result.params)
    if is_writer():
        np.savez(out / "weights.npz", **weights)
        write(out / "final.json", {"sha256": found})


def numbers(out: Path, mesh: Any) -> None:
    """Weights after a few steps, three times, and what an evaluation finds."""
    import jax
    import numpy as np

    import robustjax as rj
    from robustjax.methods.madry import madry
    from robustjax.methods.standard import standard
    from robustjax.parallel import fetch, is_writer, process_rows
    from robustjax.training.loop import fit
    from robustjax.training.optimizers import sgd
    from robustjax.types import Batch

    model = net()
    attack = rj.pgd(5, 0.3, keep=rj.last)
    adversarial = madry(model, rj.linf(0.1), attack)
    found = {}
    for name, method, dtype, steps in (
        ("pgd_float64", adversarial, "float64", 20),
        ("plain_float32", standard(model), "float32", 20),
        ("pgd_float32", adversarial, "float32", 1),
        ("pgd_float32_20", adversarial, "float32", 20),
    ):
        x, y = images(dtype)

        def batch(step, x=x, y=y):
            index = np.arange(32 * step, 32 * step + 32, dtype=np.int32)
            index = index[process_rows(32)]
            return Batch(x[index], y[index], index)

        result = fit(
            *(jax.random.key(0), model, method, sgd(0.1), batch),
            batch_size=32,
            num_steps=steps,
            log=False,
            mesh=mesh,
        )
        for leaf, value in fetch(result.params).items():
            found[f"{name}/{leaf}"] = value
    x, y = images()
    params = {
        name.partition("/")[2]: value
        for name, value in found.items()
        if name.startswith("pgd_float32_20/")
    }
    report = rj.evaluate(
        rj.models.logits_fn(model, params, {}),
        *(x[:64], y[:64], rj.linf(0.15)),
        suite=("apgd-ce", "square"),
        batch_size=8,
        mesh=mesh,
        progress=False,
    )
    threat = next(iter(report.threats.values()))
    found["verdict/prediction"] = report.prediction
    found["verdict/margin"] = threat.margin
    found["verdict/x_adv"] = threat.x_adv
    for name, broken in threat.broken_by.items():
        found[f"verdict/{name}"] = broken
    if is_writer():
        np.savez(out, **found)


def write(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def work(job: str, out: Path, devices: int, where: list[str]) -> None:
    """What one process does."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", job == "numbers")
    from robustjax import parallel

    given = (where[0], int(where[1]), int(where[2])) if where else ()
    with parallel.joined(*given):
        mesh = parallel.data_mesh()
        train(out, mesh) if job == "train" else numbers(out, mesh)


class Worker(NamedTuple):
    """A process, and the file with what it says."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def start(job: str, out: Path, devices: int, processes: int = 1) -> list[Worker]:
    """Start `processes` processes of `devices` devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for i in range(processes):
        command = [sys.executable, __file__, "--work", job, str(out), str(devices)]
        if processes > 1:
            command += [f"127.0.0.1:{port}", str(processes), str(i)]
        log = Path(f"{out}.{i}.log")
        with open(log, "wb") as file:
            workers.append(
                Worker(subprocess.Popen(command, stdout=file, stderr=file), log)
            )
    return workers


def finish(workers: list[Worker]) -> list[int]:
    return [worker.process.wait() for worker in workers]


def whole(job: str, out: Path, devices: int, processes: int = 1) -> None:
    """Run to the end, or end with what was said."""
    workers = start(job, out, devices, processes)
    if any(finish(workers)):
        sys.exit("\n".join(worker.said() for worker in workers))


def furthest(one: dict, other: dict, part: str) -> float:
    """The largest difference of the leaves named `part/...`, relative to the leaf."""
    import numpy as np

    return max(
        float(np.abs(one[n] - other[n]).max() / np.abs(one[n]).max())
        for n in one
        if n.startswith(part + "/")
    )


def same_verdicts(one: dict, other: dict) -> bool:
    """Whether predictions are equal, and who was broken by which attack."""
    import numpy as np

    names = [n for n in one if n.startswith("verdict/") and one[n].dtype.kind != "f"]
    assert len(names) == 3, names
    return all(np.array_equal(one[name], other[name]) for name in names)


def prove_numbers(folder: Path, most: int) -> bool:
    import numpy as np

    ways = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (1, 4)]
    runs = {}
    print(f"{'processes x devices':<22}{'float64 PGD, 20':>17}{'float32, 20':>13}"
          f"{'PGD, 1':>10}{'PGD, 20':>10}  verdicts")  # fmt: skip
    good = True
    for devices, processes in ways:
        if devices * processes > most:
            continue
        out = folder / f"numbers_{devices}_{processes}.npz"
        whole("numbers", out, devices, processes)
        with np.load(out) as file:
            runs[devices, processes] = found = dict(file)
        names = ("pgd_float64", "plain_float32", "pgd_float32", "pgd_float32_20")
        gaps = [furthest(runs[1, 1], found, name) for name in names]
        good &= gaps[0] <= 1e-8 and gaps[1] <= 1e-5 and gaps[2] <= 1e-5
        same = same_verdicts(runs[1, 1], found)
        good &= same
        numbers = "".join(f"{g:{w}.1e}" for g, w in zip(gaps, WIDTHS, strict=True))
        print(
            f"{f'{processes} x {devices}':<22}{numbers}  {'equal' if same else 'NOT'}"
        )
    return good


def checkpoints(out: Path) -> list[int]:
    names = os.listdir(out / "checkpoints") if (out / "checkpoints").exists() else []
    return sorted(int(n[5:]) for n in names if n.startswith("step_"))


def reach(workers: list[Worker], out: Path, step: int) -> None:
    """Wait for the checkpoint of a step, and a little into the steps after it."""
    while not checkpoints(out) or checkpoints(out)[-1] < step:
        if any(worker.process.poll() is not None for worker in workers):
            sys.exit("\n".join(worker.said() for worker in workers))
        time.sleep(0.001)
    time.sleep(0.05)


def last_lines(worker: Worker, count: int = 3) -> str:
    lines = [re.sub(r"\s+", " ", line)[:200] for line in worker.said().splitlines()]
    # Of a program that JAX aborts: its reason, without the stack.
    lines = [n for n in lines if re.match(r"F\d{4} |Process \d", n)] or lines
    return "\n".join(f"      | {line}" for line in lines[-count:])


def hash_of(out: Path) -> str:
    return json.loads((out / "final.json").read_text())["sha256"]


def go_on(out: Path, unbroken: Path) -> bool:
    began = checkpoints(out)[-1]
    whole("train", out, 1, 2)
    same = hash_of(out) == hash_of(unbroken)
    print(f"    again: went on from step {began}, {hash_of(out)[:16]}, equal: {same}")
    return same


def prove_kill(folder: Path, unbroken: Path) -> bool:
    good = True
    # A stopped process keeps its connections: the others can only miss it.
    cases = (("kill -9", "SIGKILL", 1), ("kill -9", "SIGKILL", 0))
    for name, sent, victim in (*cases, ("kill -STOP", "SIGSTOP", 1)):
        out = folder / f"{sent}_{victim}"
        workers = start("train", out, 1, 2)
        reach(workers, out, 3 * EVERY)
        lost, other = workers[victim], workers[1 - victim]
        lost.process.send_signal(getattr(signal, sent))
        began = time.monotonic()
        code = other.process.wait()
        seconds = time.monotonic() - began
        lost.process.kill()
        lost.process.wait()
        print(f"  {name} of process {victim}: the other ends after {seconds:.1f} s, "
              f"exit code {code}, and says")  # fmt: skip
        print(last_lines(other, 2))
        good &= code != 0 and seconds < 60
        good &= go_on(out, unbroken)
    return good


def prove_sigterm(folder: Path, unbroken: Path) -> bool:
    good = True
    for who in ([0, 1], [1]):
        out = folder / f"preempted_{len(who)}"
        workers = start("train", out, 1, 2)
        reach(workers, out, 3 * EVERY)
        began = time.monotonic()
        for i in who:
            workers[i].process.send_signal(signal.SIGTERM)
        codes = finish(workers)
        seconds = time.monotonic() - began
        step = checkpoints(out)[-1]
        print(f"  SIGTERM to {who}: both end after {seconds:.1f} s, exit codes "
              f"{codes}, checkpoints {checkpoints(out)}; process 0 says")  # fmt: skip
        print(last_lines(workers[0]))
        good &= codes == [143, 143] and step < STEPS
        good &= go_on(out, unbroken)
    return good


def prove_fewer(folder: Path, unbroken: Path) -> bool:
    """What two processes began, one ends."""
    import numpy as np

    out = folder / "fewer"
    workers = start("train", out, 1, 2)
    reach(workers, out, 3 * EVERY)
    workers[0].process.send_signal(signal.SIGTERM)
    finish(workers)
    began = checkpoints(out)[-1]
    whole("train", out, 1)
    with np.load(out / "weights.npz") as one, np.load(unbroken / "weights.npz") as two:
        gap = max(float(np.abs(one[n] - two[n]).max()) for n in one)
    print(f"  two processes until step {began}, then one: ends at {STEPS}; weights "
          f"differ from the unbroken run's by {gap:.1e} at most")  # fmt: skip
    return (out / "final.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--most", type=int, default=8, help="devices in `numbers`")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        job, out, devices, *where = arguments.work
        work(job, Path(out), int(devices), where)
        return
    began, good = time.monotonic(), True
    with tempfile.TemporaryDirectory() as name:
        folder, unbroken = Path(name), Path(name) / "unbroken"
        if "numbers" in arguments.parts:
            good &= prove_numbers(folder, arguments.most)
        if set(arguments.parts) - {"numbers"}:
            whole("train", unbroken, 1, 2)
            print(f"unbroken run of two processes: {hash_of(unbroken)[:16]}")
        for part in ("kill", "sigterm", "fewer"):
            if part in arguments.parts:
                good &= globals()[f"prove_{part}"](folder, unbroken)
    print(f"{'all as it should be' if good else 'NOT AS IT SHOULD BE'}, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    sys.exit(not good)


if __name__ == "__main__":
    main()
