"""Two small nets on real digits, trained normally and against PGD: attack both.

scripts/quickstart
python -m experiments.quickstart --out runs/quickstart
"""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common
from robustjax import data, models
from robustjax.evaluation import plots
from robustjax.methods.base import Method
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.training import optimizers
from robustjax.training.loop import fit
from robustjax.training.step import ramped

GRID = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)  # of the budgets, for the curves


@dataclass(frozen=True)
class Config:
    out: str = "runs/quickstart"
    """Where the table, pictures and nets go. The same command there goes on."""
    seed: int = 0
    """Decides weights, order of the images and all noise."""
    dataset: str = "digits"
    """The embedded one: 1,437 training and 360 test images of 8x8 pixels."""
    model: str = "small_cnn"
    """Two convolutions, each pooled, and a hidden layer."""
    linf: float = 0.15
    """Largest change of any pixel (1: from black to white). `madry` learns with it."""
    l2: float = 0.5
    """Largest Euclidean length of a change."""
    l1: float = 1.5
    """Largest sum of all pixels' changes."""
    num_epochs: int = 60
    """Passes over the training images, for each net."""
    batch_size: int = 64
    """Images per step."""
    attack_steps: int = 7
    """PGD steps in training, each of 2.5 epsilon / steps."""
    test_steps: int = 50
    """PGD steps in the measurement."""
    num_restarts: int = 5
    """Random restarts of that PGD; the worst counts."""
    num_test: int = 360
    """How many of the test images."""


def train(config: Config, name: str, method: Method, model, splits) -> rj.LogitsFn:
    """One net, by one method: its logits function."""
    print(f"training {name}")
    per_epoch = data.steps_per_epoch(splits.train.x.shape[0], config.batch_size)
    steps = config.num_epochs * per_epoch
    trained = fit(
        jax.random.key(config.seed),
        model,
        method,
        optimizers.adam(common.learning_rate("one_cycle", 5e-3, steps)),
        splits.train,
        batch_size=config.batch_size,
        num_steps=steps,
        steps_per_dispatch=per_epoch,
        checkpoint_every=20 * per_epoch,
        out=Path(config.out) / name,
        config=common.training_part(config),
        ema_decay=ramped(0.995),
    )
    return models.logits_fn(model, trained.params, trained.extra)


@functools.partial(jax.jit, static_argnums=0)
def attack_all(attack_fn: rj.AttackFn, f, x, y, threats: rj.ThreatModel):
    """N stacked threats in one vmapped call: who resists `[N, B]`, and the Result."""
    attacked = rj.over_threats(attack_fn, threats, how="vmap")
    result = attacked(jax.random.key(0), rj.untargeted(f, x, y, rj.linf(0.0)))
    correct = rj.predictions(f(x)) == y
    return ~result.success & correct[None], result


def draw(out: Path, x, y, x_adv, sees, curves, budgets) -> None:
    """Write accuracy.png, examples.png, and quickstart.png with both."""
    examples = [  # three columns for each threat: the first nine test images
        plots.Attacked(
            x[i],
            str(y[i]),
            {net: found[i // 3, i] for net, found in x_adv.items()},
            {net: str(found[i // 3, i]) for net, found in sees.items()},
            f"{list(budgets)[i // 3]} {list(budgets.values())[i // 3]:g}",
        )
        for i in range(min(9, len(y)))
    ]
    both = plots.new_figure(9, 8.2)
    top, bottom = both.subfigures(2, 1, height_ratios=(3, 5.2))
    for name, upper, lower in (
        ("accuracy", plots.new_figure(9, 3), None),
        ("examples", None, plots.new_figure(9, 5.2)),
        ("quickstart", top, bottom),
    ):
        if upper is not None:
            plots.draw_curves(upper, curves, budgets)
        if lower is not None:
            plots.draw_examples(lower, examples)
        plots.save(both if upper is top else upper or lower, out / f"{name}.png")


def main(config: Config) -> dict[str, Any]:
    began = time.monotonic()
    splits = common.load_splits("digits", None, config.seed, 0, config.num_test)
    x, y = splits.test
    budgets = {"Linf": config.linf, "L2": config.l2, "L1": config.l1}
    threats = {name: rj.threat(name, epsilon) for name, epsilon in budgets.items()}
    model = common.build_model(config.model, config.dataset)
    inner = rj.pgd(config.attack_steps, keep=rj.last)
    methods = {
        "standard": standard(model),
        "madry": madry(model, threats["Linf"], inner),
    }
    nets = {n: train(config, n, m, model, splits) for n, m in methods.items()}

    attacks = {
        "random_noise": rj.noise(num_samples=20),
        "fgsm": rj.fgsm(),
        "robust_accuracy": rj.pgd(config.test_steps, num_restarts=config.num_restarts),
    }
    stacked = rj.stack(list(threats.values()))
    grid = rj.stack([rj.threat(n, b * s) for n, b in budgets.items() for s in GRID])
    curve_attack = rj.pgd(20)
    print(f"attacking both: PGD-{config.test_steps}, {config.num_restarts} restarts")
    results: dict[str, Any] = {}
    x_adv, sees = {}, {}
    curves: dict[str, dict[str, plots.Curve]] = {name: {} for name in budgets}
    for net, f in nets.items():
        clean = float((rj.predictions(f(jnp.asarray(x))) == y).mean())
        results[net] = {"clean_accuracy": clean}
        for name, attack_fn in attacks.items():
            robust, result = attack_all(attack_fn, f, x, y, stacked)
            found = np.asarray(robust).mean(-1).tolist()
            results[net][name] = dict(zip(budgets, found, strict=True))
        x_adv[net] = np.asarray(result.x_adv)
        sees[net] = np.asarray(
            jax.vmap(lambda x, f=f: rj.predictions(f(x)))(x_adv[net])
        )
        robust, _ = attack_all(curve_attack, f, x, y, grid)
        rows = np.asarray(robust).mean(-1).reshape(len(budgets), -1)
        for (name, budget), row in zip(budgets.items(), rows, strict=True):
            epsilons = [0.0, *(budget * s for s in GRID)]
            curves[name][net] = plots.Curve(epsilons, [clean, *row.tolist()])
    draw(Path(config.out), x, y, x_adv, sees, curves, budgets)
    print(table(results, budgets, config))
    return common.save_results(config.out, {**results, "data": splits.used}, began)


def table(results: dict[str, Any], budgets: dict[str, float], config: Config) -> str:
    """The measurement as text: a row per attack and threat, a column per net."""
    names = {
        "random_noise": "noise, worst of 20",
        "fgsm": "FGSM",
        "robust_accuracy": f"PGD-{config.test_steps}, {config.num_restarts} restarts",
    }
    nets = list(results)
    lines = [f"{'accuracy':34}" + "".join(f"{net:>10}" for net in nets)]
    lines.append("-" * len(lines[0]))
    clean = [results[net]["clean_accuracy"] for net in nets]
    lines.append(f"{'clean':34}" + "".join(f"{value:10.3f}" for value in clean))
    for threat, epsilon in budgets.items():
        for key, name in names.items():
            values = [results[net][key][threat] for net in nets]
            head = f"{threat + f' {epsilon:g}':12}{name:22}"
            lines.append(head + "".join(f"{value:10.3f}" for value in values))
    return "\n".join(lines)


if __name__ == "__main__":
    main(common.parse(Config(), __doc__))
