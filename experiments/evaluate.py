"""Attack any trained run: every norm; noise, FGSM, PGD, momentum, Adam.

    python -m experiments.evaluate --run runs/madry_cifar --data-dir DIR
    python -m experiments.evaluate --run runs/quickstart/madry
    python -m experiments.evaluate --run RUN --norms Linf L2 --epsilons 8/255 0.5

Writes into `--out`: `results.json` and `report.json` (every attack's accuracy),
`examples.npz` (per example: what broke it, and the worst point found). An attack's
success counts when a fresh forward pass confirms it. Measured: docs/reproduce.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common
from robustjax import data, models
from robustjax.training.loop import load_weights

# Budgets in input units; L0 counts coordinates (a color pixel has three).
BUDGETS = {
    "digits": {"Linf": "0.15", "L2": "0.6", "L1": "1.5", "L0": "3"},
    "mnist": {"Linf": "0.3", "L2": "2", "L1": "10", "L0": "12"},
    "fashion_mnist": {"Linf": "0.1", "L2": "1.5", "L1": "10", "L0": "12"},
    "cifar10": {"Linf": "8/255", "L2": "0.5", "L1": "12", "L0": "24"},
}
Norm = Literal["Linf", "L2", "L1", "L0"]
Name = Literal["noise", "FGSM", "PGD", "momentum", "Adam"]


@dataclass(frozen=True)
class Config:
    run: str = "runs/madry_cifar"
    """Folder of a training: of madry_cifar, madry_mnist or quickstart."""
    which: Literal["best", "last"] = "best"
    """Which of its checkpoints: the best by validation, or the last."""
    out: str | None = None
    """Where results go; absent: `evaluation` inside the run's folder."""
    data_dir: str | None = None
    """Where the data set lies (docs/data.md); absent: $ROBUSTJAX_DATA_DIR."""
    seed: int = 0
    """Decides the attacks' random starts."""
    norms: tuple[Norm, ...] = ("Linf", "L2", "L1", "L0")
    """Threat models, as in `--norms Linf L2`."""
    epsilons: tuple[str, ...] = ()
    """A budget for each of them, as in `--epsilons 8/255 0.5`; absent: the customary
    ones of the data set."""
    attacks: tuple[Name, ...] = ("noise", "FGSM", "PGD", "momentum", "Adam")
    """Which attacks."""
    num_steps: int = 20
    """Of PGD, momentum and Adam; and how many noise samples."""
    num_restarts: int = 1
    """Random restarts of PGD and Adam."""
    num_test: int = 1000
    """How many test images, from the first."""
    batch_size: int = 250
    """Images at once."""


def load_run(
    run: str | Path, which: str = "best"
) -> tuple[rj.LogitsFn, str, dict[str, Any]]:
    """The net of a run as a logits function, its data set's name and its config."""
    path = Path(run) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: --run is the folder of a training, such as "
            "runs/madry_cifar."
        )
    config = json.loads(path.read_text())
    dataset = config.get("dataset", "cifar10")
    shape = common.SHAPES[dataset]
    model = common.build_model(
        config["model"], dataset, width=config.get("width"), depth=config.get("depth")
    )
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *shape)))
    params, extra = load_weights(run, like, which)
    return models.logits_fn(model, params, extra), dataset, config


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    f, dataset, trained = load_run(config.run, config.which)
    found = data.load(dataset, config.data_dir)
    x = data.to_float(jnp.asarray(found.x_test[: config.num_test]), found.max_value)
    y = found.y_test[: config.num_test]
    budgets = config.epsilons or tuple(BUDGETS[dataset][n] for n in config.norms)
    if len(budgets) != len(config.norms):
        raise ValueError(
            f"epsilons={budgets} for norms={config.norms}: give one budget per norm."
        )
    steps, restarts = config.num_steps, config.num_restarts
    known = {
        "noise": rj.noise(num_samples=steps),
        "FGSM": rj.fgsm(),
        "PGD": rj.pgd(steps, num_restarts=restarts),
        "momentum": rj.momentum(steps),
        "Adam": rj.adam(steps, num_restarts=restarts),
    }
    report = rj.evaluate(
        f,
        np.asarray(x),
        y,
        {n: rj.threat(n, e) for n, e in zip(config.norms, budgets, strict=True)},
        attacks={name: known[name] for name in config.attacks},
        key=jax.random.key(config.seed),
        batch_size=config.batch_size,
    )
    used = f"{found.source}; first {len(y):,} test images"
    print(used, report, sep="\n")
    out = Path(config.out or Path(config.run) / "evaluation")
    report.save(out)
    return common.save_results(
        out,
        {**report.summary(), "config": config, "run": trained, "data": used},
        began,
    )


if __name__ == "__main__":
    main(common.parse(Config(), __doc__))
