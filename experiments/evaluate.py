"""Evaluate a run on digits, (Fashion-)MNIST or CIFAR-10: a suite, or single attacks.

    python -m experiments.evaluate --run runs/madry_cifar --suite standard
    python -m experiments.evaluate --run runs/madry_cifar --suite fast --num-test 500
    python -m experiments.evaluate --run runs/madry_cifar --data-dir DIR
    python -m experiments.evaluate --run runs/quickstart/madry
    python -m experiments.evaluate --run RUN --norms Linf L2 --epsilons 8/255 0.5
    python -m experiments.evaluate --run OWN --net mynets:build --dataset digits

Writes into `--out`: `results.json`, `report.json` and `report.html` (docs/report.md),
`examples.npz` (per example: what broke it, and the worst point found), and a ledger
from which the same command goes on. An attack's success counts when a fresh forward
pass confirms it. Measured: docs/reproduce.md.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, machine
from experiments.machine import Machine
from robustjax import data, models
from robustjax.parallel import is_writer
from robustjax.training.loop import load_weights

# Budgets in input units; L0 counts coordinates (a color pixel has three).
BUDGETS = {
    "digits": {"Linf": "0.15", "L2": "0.6", "L1": "1.5", "L0": "3"},
    "mnist": {"Linf": "0.3", "L2": "2", "L1": "10", "L0": "12"},
    "fashion_mnist": {"Linf": "0.1", "L2": "1.5", "L1": "10", "L0": "12"},
    "cifar10": {"Linf": "8/255", "L2": "0.5", "L1": "12", "L0": "24"},
}
Norm = Literal["Linf", "L2", "L1", "L0"]
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1", "L0")
Name = Literal["noise", "FGSM", "PGD", "momentum", "Adam"]


@dataclass(frozen=True)
class Config:
    run: str = "runs/madry_cifar"
    """Folder of a training: of an experiment, or `out` of a `fit` of your own."""
    which: Literal["best", "last"] = "best"
    """Which of its checkpoints: the best by validation, or the last."""
    net: str | None = None
    """MODULE:FUNCTION, a function without arguments that gives the model of the run,
    where it is no experiment's."""
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] | None = None
    """The images of such a run."""
    out: str | None = None
    """Where results go; absent: `evaluation` inside the run's folder."""
    data_dir: str | None = None
    """Where the data set lies (docs/data.md); absent: $ROBUSTJAX_DATA_DIR."""
    seed: int = 0
    """Decides the attacks' random starts."""
    norms: tuple[Norm, ...] | None = None
    """Threat models, as in `--norms Linf L2`; absent: Linf for a suite, all without."""
    epsilons: tuple[str, ...] = ()
    """A budget for each of them, as in `--epsilons 8/255 0.5`; absent: the customary
    ones of the data set."""
    suite: Literal["standard", "fast", "strong", "plus", "rand"] | None = None
    """A suite of attacks: "standard" is AutoAttack, "fast" a cheap verdict of its kind,
    "strong" goes further. Absent: single attacks, each on its own."""
    checks: Literal["default", "full", "none"] = "default"
    """What to look at that makes a model's robustness doubtful."""
    resume: bool = True
    """Remember what a suite has finished (`--out`/ledger/SUITE_N_BUDGETS): the same
    command goes on."""
    attacks: tuple[Name, ...] | None = None
    """Which single attacks; absent: none beside a suite, all without one."""
    num_steps: int = 20
    """Of PGD, momentum and Adam; and how many noise samples."""
    num_restarts: int = 1
    """Random restarts of PGD and Adam."""
    num_test: int = 1000
    """How many test images, from the first."""
    batch_size: int = 250
    """Images at once, on each device."""
    machine: Machine = Machine()


def load_run(
    run: str | Path,
    which: str = "best",
    on: Machine = machine.HERE,
    net: str | None = None,
    dataset: str | None = None,
) -> tuple[rj.LogitsFn, str, dict[str, Any]]:
    """The net of a run as a logits function, its data set's name and its config."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: --run is the folder of a training that was run "
            f"before{_nets_in(run)}."
        )
    config = json.loads(path.read_text())
    if net is not None:
        if dataset is None:
            raise ValueError(f"net is {net!r}: --dataset must say of which images.")
        model, config = _built(net), {**config, "net": net, "dataset": dataset}
    elif config.get("model") not in common.NETS or dataset is not None:
        raise ValueError(
            f"{path} has model {config.get('model')!r}: a run of an experiment needs "
            "neither --net nor --dataset, any other both. --net MODULE:FUNCTION gives "
            "its model; robustjax.models:small_cnn is the zoo's net with its defaults."
        )
    else:
        dataset = str(config.setdefault("dataset", "cifar10"))
        model = common.build_model(
            config["model"],
            dataset,
            width=config.get("width"),
            depth=config.get("depth"),
            activation=config.get("activation", "relu"),
            on=on,
        )
    shape = common.SHAPES[dataset]
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *shape)))
    params, extra = load_weights(run, like, which)
    return models.logits_fn(model, params, extra), dataset, config


def _built(net: str) -> models.Model:
    module, _, function = net.partition(":")
    try:
        model = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"net is {net!r}: {error}. Give MODULE:FUNCTION, importable from here."
        ) from error
    if not isinstance(model, models.Model):
        raise ValueError(f"net is {net!r}, which gives {model!r}, no robustjax Model.")
    return model


def _nets_in(run: str | Path) -> str:
    found = sorted(p.parent.name for p in Path(run).glob("*/config.json"))
    return f"; in {run} there are {', '.join(found)}" if found else ""


ASKED = ("which", "net", "seed", "attacks", "num_steps", "num_restarts", "batch_size")
ON = ("dtype", "num_devices")


def asked(config: Config, count: int, budgets: tuple[str, ...]) -> str:
    """The ledger's folder: another question has another, and is not refused.

    >>> asked(Config(suite="fast", seed=1), 100, ("8/255", "0.5"))
    'fast_100_8of255_0.5_seed_1'
    """
    parts = [str(config.suite), str(count), *budgets]
    given = {name: (getattr(config, name), getattr(Config, name)) for name in ASKED}
    on, usual = config.machine, machine.HERE
    given |= {name: (getattr(on, name), getattr(usual, name)) for name in ON}
    for name, (value, default) in given.items():
        if value != default:
            texts = value if isinstance(value, tuple) else (value,)
            parts += [name, *map(str, texts)]
    return "_".join(parts).replace("/", "of").replace(":", "_")


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    if config.machine.microbatches != 1 or config.machine.shard_params:
        raise ValueError(
            "microbatches and shard_params are for training: give a smaller batch_size."
        )
    f, dataset, trained = load_run(
        config.run, config.which, config.machine, config.net, config.dataset
    )
    learned = trained.get("dtype", "float32")
    if learned != config.machine.dtype:
        print(
            f"{config.run} was trained in {learned} and is judged in "
            f"{config.machine.dtype}: --dtype {learned} judges it as it was trained."
        )
    found = data.load(dataset, config.data_dir)
    x = data.to_float(jnp.asarray(found.x_test[: config.num_test]), found.max_value)
    y = found.y_test[: config.num_test]
    norms = config.norms or (("Linf",) if config.suite else tuple(NORMS))
    budgets = config.epsilons or tuple(BUDGETS[dataset][n] for n in norms)
    if len(budgets) != len(norms):
        raise ValueError(
            f"epsilons={budgets} for norms={norms}: give one budget per norm."
        )
    steps, restarts = config.num_steps, config.num_restarts
    known: dict[str, Callable[[], rj.AttackFn]] = {
        "noise": lambda: rj.noise(num_samples=steps),
        "FGSM": rj.fgsm,
        "PGD": lambda: rj.pgd(steps, num_restarts=restarts),
        "momentum": lambda: rj.momentum(steps),
        "Adam": lambda: rj.adam(steps, num_restarts=restarts),
    }
    single = () if config.suite else tuple(known)
    out = Path(config.out or Path(config.run) / "evaluation")
    ledger = out / "ledger" / asked(config, len(y), budgets)
    report = rj.evaluate(
        f,
        np.asarray(x),
        y,
        {n: rj.threat(n, e) for n, e in zip(norms, budgets, strict=True)},
        suite=config.suite,
        attacks={name: known[name]() for name in config.attacks or single},
        individual=True,
        key=jax.random.key(config.seed),
        batch_size=config.batch_size,
        checks=config.checks,
        resume=ledger if config.suite and config.resume else None,
        mesh=machine.mesh(config.machine),
    )
    used = f"{found.source}; first {len(y):,} test images"
    print(used, report, sep="\n")
    if is_writer():
        report.save(out)
    return common.save_results(
        out,
        {**report.summary(), "config": config, "run": trained, "data": used},
        began,
    )


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
