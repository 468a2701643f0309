"""Time to a stated robust accuracy: Fast-AT by robustjax and by plain PyTorch.

PreActResNet-18 on CIFAR-10 by Wong, Rice and Kolter's recipe (arXiv:2001.03994):
uniform start, one step of 1.25 epsilon (--step-size), batch statistics in the attack,
SGD with momentum 0.9, weight decay 5e-4, a learning rate that rises to 0.2 and falls
again, crops and flips, float32. Both sides start from the same weights and learn from
the same images; the noise is each side's own. They train one epoch each in turn, on the
same core (or cores: --core 0 1), while the other waits. PyTorch takes the gradient of
the attack for the input alone, crops a batch by one gather, and runs in the faster of
NCHW and channels_last, timed at the start.

A time is that of training and saving (ours with its compilation); imports, the
timing of layouts and all judging are left out. One judge, robustjax, attacks the
weights of both after every epoch, from the same noise.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
EPSILON = 8 / 255
SIDES = ("robustjax", "pytorch")
TRAINS = (
    *("epochs", "batch_size", "width", "learning_rate", "step_size", "seed"),
    *("num_train", "core"),
)
QUICK = {"epochs": 2, "batch_size": 32, "width": 1, "num_train": 96, "num_judged": 32}


def cores_here() -> int:
    """How many cores this process may use; one where that cannot be said."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return 1


class Clock:
    """Reports every epoch to the parent, and lets it decide when the next begins."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about = folder, about
        # Whatever a library prints to the standard output must not break the protocol.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.answer({"ready": True})
        self.wait()

    def answer(self, row: dict[str, Any]) -> None:
        print(json.dumps({**row, **self.about}), file=self.out, flush=True)

    def wait(self) -> None:
        if sys.stdin.readline() != "go\n":
            os._exit(0)  # the parent is gone
        self.began = time.perf_counter(), time.process_time()

    def epoch(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        seconds, cpu = self.began
        row = {
            "epoch": number,
            "seconds": time.perf_counter() - seconds,
            "cpu_seconds": time.process_time() - cpu,
        }
        np.savez(self.folder / f"epoch_{number}.npz", **arrays)
        self.answer(row)
        self.wait()


def train_robustjax(options: argparse.Namespace, folder: Path) -> None:
    import jax

    from experiments import machine
    from robustjax import data
    from robustjax.methods.fast import fast
    from robustjax.models import importers
    from robustjax.threats import linf
    from robustjax.training import optimizers
    from robustjax.training.loop import fit
    from robustjax.training.run_folder import last_step

    x, y = np.load(options.out / "x.npy"), np.load(options.out / "y.npy")
    model = importers.build(net(options))
    arrays = dict(np.load(options.out / "init.npz"))
    _, *start = importers.from_state_dict(net(options), arrays)
    steps = options.epochs * (len(x) // options.batch_size)
    rate = optimizers.one_cycle(options.learning_rate, steps, warmup_steps=steps // 2)
    clock = Clock(folder, {"jax": jax.__version__})
    done = (last_step(folder / "run") or 0) // (len(x) // options.batch_size)
    numbers = itertools.count(done + 1)

    def validate(params: Any, extra: Any) -> dict[str, float]:
        number = next(numbers)
        clock.epoch(number, exported(options, params, extra))
        return {"epoch": number}

    fit(
        jax.random.key(options.seed),
        model,
        fast(model, linf(EPSILON), step_size=options.step_size, bn_mode="batch"),
        optimizers.sgd(rate, momentum=0.9, nesterov=False, weight_decay=5e-4),
        data.resident(x, y),
        batch_size=options.batch_size,
        num_epochs=options.epochs,
        augment=data.compose(data.random_crop, data.random_flip),
        validate=validate,
        best_metric="epoch",
        out=folder / "run",
        **machine.step_options(),
        log=False,
        start=tuple(start),
    )


def train_pytorch(options: argparse.Namespace, folder: Path) -> None:
    import torch
    import torch_nets
    from torch.nn import functional as F

    torch.set_num_threads(cores_here())
    torch.manual_seed(options.seed)
    images = torch.from_numpy(np.load(options.out / "x.npy")).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.load(options.out / "y.npy")).long()
    padded, count = F.pad(images, [4] * 4), len(labels)
    step_size = options.step_size * EPSILON
    per_epoch = count // options.batch_size
    steps = options.epochs * per_epoch

    def rate(step: int) -> float:
        middle = steps // 2
        share = step / middle if step < middle else (steps - step) / (steps - middle)
        return options.learning_rate * share

    def build(layout: str) -> tuple[Any, Any, Any]:
        made = torch_nets.PreAct(options.width, 10, raw=False)
        found = np.load(options.out / "init.npz").items()
        known = {name: torch.from_numpy(array) for name, array in found}
        left = made.load_state_dict(known, strict=False).missing_keys
        assert all(name.endswith("num_batches_tracked") for name in left), left
        memory = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
        made = torch_nets.Normalized(made, MEAN, STD).to(memory_format=memory[layout])
        sgd = torch.optim.SGD(made.parameters(), 0.0, momentum=0.9, weight_decay=5e-4)
        return made.train(), sgd, memory[layout]

    def crops(rows: Any, memory: Any) -> Any:
        corner = torch.randint(9, (2, len(rows), 1))
        at = torch.arange(32)
        i, j = corner[0] + at, corner[1] + at
        j = torch.where(torch.rand(len(rows), 1) < 0.5, j.flip(1), j)
        x = padded[rows[:, None, None], :, i[:, :, None], j[:, None]]
        return (x.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=memory)

    def update(made: Any, sgd: Any, memory: Any, rows: Any, step: int) -> None:
        x, y = crops(rows, memory), labels[rows]
        noise = torch.empty_like(x).uniform_(-EPSILON, EPSILON)
        delta = (x + noise).clamp_(0, 1).sub_(x).requires_grad_()
        loss = F.cross_entropy(made(x + delta), y)
        (grad,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta = (delta + step_size * grad.sign()).clamp_(-EPSILON, EPSILON)
            x_adv = (x + delta).clamp_(0, 1)
        sgd.param_groups[0]["lr"] = rate(step)
        sgd.zero_grad()
        F.cross_entropy(made(x_adv), y).backward()
        sgd.step()

    def seconds(layout: str) -> float:
        built, rows, times = build(layout), torch.arange(options.batch_size), []
        for _ in range(options.layout_steps):
            began = time.perf_counter()
            update(*built, rows, 1)
            times.append(time.perf_counter() - began)
        return min(times)

    last = folder / "last.pt"
    saved = torch.load(last, weights_only=True) if last.exists() else {}
    if "layouts" not in saved:
        saved["layouts"] = {name: seconds(name) for name in ("nchw", "channels_last")}
    layout = min(saved["layouts"], key=lambda name: saved["layouts"][name])
    made, sgd, memory = build(layout)
    if "net" in saved:
        made.net.load_state_dict(saved["net"])
        sgd.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
    clock = Clock(
        folder,
        {
            "torch": torch.__version__,
            "layout": layout,
            "seconds_per_step": saved["layouts"],
        },
    )
    for epoch in range(saved.get("epoch", 0), options.epochs):
        order = torch.randperm(count)
        for step in range(per_epoch):
            rows = order[step * options.batch_size : (step + 1) * options.batch_size]
            update(made, sgd, memory, rows, epoch * per_epoch + step)
        state = made.net.state_dict()
        clock.epoch(epoch + 1, {k: v.contiguous().numpy() for k, v in state.items()})
        saved |= {
            "net": state,
            "optimizer": sgd.state_dict(),
            "random": torch.get_rng_state(),
            "epoch": epoch + 1,
        }
        torch.save(saved, folder / "saving.pt")
        os.replace(folder / "saving.pt", last)


def net(options: argparse.Namespace) -> Any:
    from robustjax.models import importers

    return importers.architecture(
        "preact_resnet18", mean=MEAN, std=STD, width=options.width
    )


def exported(options: argparse.Namespace, params: Any, extra: Any) -> Any:
    """Our weights under PyTorch's names and in its order of axes."""
    from robustjax.models.importers.architectures import leaves

    found, axes = {}, {4: (3, 2, 0, 1), 2: (1, 0)}
    for name, leaf in leaves(net(options)).items():
        array: Any = {"params": params, **extra}
        for part in leaf.path:
            array = array[part]
        array = np.asarray(array)
        found[name] = array.transpose(axes.get(array.ndim, range(array.ndim)))
    return found


class Worker:
    """One side, trained in a process of its own."""

    def __init__(self, options: argparse.Namespace, side: str):
        python = options.torch_python if side == "pytorch" else sys.executable
        self.process = subprocess.Popen(
            [python, __file__, "--side", side, *sys.argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.side = side
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"fast_at_torch: the side {self.side} stopped; see above.")
        return json.loads(line)

    def epoch(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()


def prepare(options: argparse.Namespace) -> Any:
    """Write what both sides learn from, and return what the judge needs."""
    import jax
    import jax.numpy as jnp

    from robustjax import data
    from robustjax.models import importers

    out, trains = options.out, {name: getattr(options, name) for name in TRAINS}
    found = data.load("cifar10", options.data_dir)
    train, held_out = data.split_validation(
        options.seed, found.x_train, found.y_train, options.num_judged
    )
    began = out / "options.json"
    if began.exists() and json.loads(began.read_text()) != trains:
        sys.exit(
            f"fast_at_torch: {out} was begun with {json.loads(began.read_text())}, "
            f"not {trains}; take these, or another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "x.npy", train[0][: options.num_train])
    np.save(out / "y.npy", train[1][: options.num_train])
    model = importers.build(net(options))
    example = jnp.zeros((1, 32, 32, 3))
    weights = model.init(jax.random.key(options.seed), example)
    np.savez(out / "init.npz", **exported(options, *weights))
    for side in SIDES:
        (out / side).mkdir(exist_ok=True)
    began.write_text(json.dumps(trains))
    test = found.x_test[: options.num_test], found.y_test[: options.num_test]
    return {
        name: (np.asarray(data.to_float(jnp.asarray(x), found.max_value)), y)
        for name, (x, y) in {"held_out": held_out, "test": test}.items()
    }


def judge(
    options: argparse.Namespace, side: str, epoch: int, examples: Any, steps: list[int]
) -> dict[str, float]:
    """Clean accuracy, and that under PGD of so many steps of 2.5 epsilon / steps."""
    import robustjax as rj
    from robustjax import models
    from robustjax.models import importers

    arrays = dict(np.load(options.out / side / f"epoch_{epoch}.npz"))
    weights = importers.from_state_dict(net(options), arrays)
    report = rj.evaluate(
        models.logits_fn(*weights),
        *(*examples, rj.linf(EPSILON)),
        suite=None,
        attacks={f"PGD-{n}": rj.pgd(n) for n in steps},
        individual=True,
        batch_size=min(options.batch_size, 250),
        checks="none",
        progress=False,
    )
    found = next(iter(report.threats))
    robust = {f"PGD-{n}": report.accuracy(found, f"PGD-{n}") for n in steps}
    return {"clean": report.clean_accuracy, **robust}


def summary(rows: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Time in all, and until held-out PGD-10 accuracy first reached the target."""
    times = {n: np.cumsum([row[n] for row in rows]) for n in ("seconds", "cpu_seconds")}
    reached = [i for i, row in enumerate(rows) if row["held_out"]["PGD-10"] >= target]
    return {
        **{name: float(total[-1]) for name, total in times.items()},
        "reached": {
            "epoch": rows[reached[0]]["epoch"],
            **{name: float(total[reached[0]]) for name, total in times.items()},
        }
        if reached
        else None,
    }


def compare(options: argparse.Namespace, sides: list[str]) -> None:
    from robustjax.logging import duration, provenance, write_json

    report: dict[str, Any] = {"rows": {side: {} for side in sides}}
    saved = options.out / "report.json"
    if saved.exists():
        report["rows"] |= json.loads(saved.read_text())["rows"]
    rows = report["rows"]
    report |= {"provenance": provenance(), "target": options.target}
    report["options"] = {name: getattr(options, name) for name in TRAINS}
    examples = prepare(options)
    workers: dict[str, Worker] = {}
    began, made = time.monotonic(), 0
    while left := [side for side in sides if str(options.epochs) not in rows[side]]:
        side = min(left, key=lambda side: len(rows[side]))
        if side not in workers:
            workers[side] = Worker(options, side)
        row = workers[side].epoch()
        epoch = row["epoch"]
        row["held_out"] = judge(options, side, epoch, examples["held_out"], [10])
        rows[side][str(epoch)] = row
        write_json(saved, report)
        made += 1
        to_go = sum(options.epochs - len(rows[side]) for side in sides)
        print(
            f"{side:10} epoch {epoch:>2} of {options.epochs}  {row['seconds']:7.1f} s"
            f"  held out: clean {row['held_out']['clean']:.3f}, PGD-10"
            f" {row['held_out']['PGD-10']:.3f}  about"
            f" {duration((time.monotonic() - began) / made * to_go)} to go",
            flush=True,
        )
    for worker in workers.values():
        worker.process.stdin.close()  # type: ignore[union-attr]
        worker.process.wait()
    report["sides"] = {}
    for side in sides:
        ordered = [rows[side][str(n + 1)] for n in range(options.epochs)]
        test = judge(options, side, options.epochs, examples["test"], [10, 20])
        found = {**summary(ordered, options.target), "test": test}
        report["sides"][side] = found
        reached = found["reached"]
        print(
            f"{side:10} {found['seconds']:.0f} s ({found['cpu_seconds']:.0f} CPU s); "
            + ", ".join(f"{name} {value:.3f}" for name, value in test.items())
            + f" on {len(examples['test'][1])} test images; PGD-10 {options.target:g} "
            + (
                f"after {reached['seconds']:.0f} s ({reached['cpu_seconds']:.0f} CPU s,"
                f" epoch {reached['epoch']})"
                if reached
                else "not reached"
            )
        )
    write_json(saved, report)
    for name in ("x.npy", "y.npy"):
        (options.out / name).unlink()
    for side in sides:
        shutil.rmtree(options.out / side / "run", ignore_errors=True)
    print(saved)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fast_at_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    add("--data-dir", help="where CIFAR-10 lies (docs/data.md)")
    add("--out", type=Path, default=Path("runs/fast_at_torch"))
    add("--target", type=float, default=0.30, help="held-out PGD-10 accuracy to reach")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=128)
    add("--width", type=int, default=16, help="of PreActResNet-18")
    add("--learning-rate", type=float, default=0.2, help="the highest one")
    add("--step-size", type=float, default=1.25, help="of the one step, over epsilon")
    add("--seed", type=int, default=0)
    add("--num-train", type=int, default=50_000, help="at most so many images")
    add("--num-judged", type=int, default=500, help="training images held out")
    add("--num-test", type=int, default=1000)
    add("--layout-steps", type=int, default=6, help="of PyTorch, to time a layout")
    add("--core", type=int, nargs="+", help="which core or cores; absent: the last")
    add("--quick", action="store_true", help="tiny sizes: does it run?")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK, num_test=32, layout_steps=1)
    if not 0 < options.target < 1:
        parser.error(f"--target is {options.target}; give an accuracy from 0 to 1.")
    if options.epochs < 1:
        parser.error(f"--epochs is {options.epochs}; give 1 or more.")
    return options


def has_torch(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", "import torch"], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def main() -> None:
    options = parse()
    if options.side:
        train = train_robustjax if options.side == "robustjax" else train_pytorch
        train(options, options.out / options.side)
        return
    if hasattr(os, "sched_setaffinity"):
        # The workers inherit it, and size their thread pools by it.
        cores = os.sched_getaffinity(0)
        wanted = set(options.core or [max(cores)])
        if not wanted <= cores:
            sys.exit(f"fast_at_torch: --core is {options.core}; there are {cores}.")
        os.sched_setaffinity(0, wanted)
    elif options.core is not None:
        sys.exit("fast_at_torch: --core: this system cannot hold a process to cores.")
    sides = list(SIDES)
    if not has_torch(options.torch_python):
        if not options.quick:
            sys.exit(
                f"fast_at_torch: no PyTorch in {options.torch_python}; name an "
                "interpreter that has it: --torch-python PATH."
            )
        print("no PyTorch here (--torch-python PATH): robustjax alone")
        sides.remove("pytorch")
    compare(options, sides)


if __name__ == "__main__":
    main()
