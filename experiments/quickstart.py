"""Two small nets on real digits, trained normally and against PGD: attack both.

    scripts/quickstart
    python -m experiments.quickstart --out runs/quickstart

The embedded UCI digits: 1,300 training and 360 test images of 8x8 pixels, averaged
weights, chosen after each ten epochs by 137 held-out images, one seed. PGD: 50 steps of
2.5 epsilon / 50, five random starts, any iterate counts; all three norms in one vmapped
call.

    accuracy         standard   madry (trained under Linf 0.2)
    clean               0.992   0.986
    Linf 0.15  PGD      0.175   0.753
    L2 0.6     PGD      0.453   0.686
    L1 1.5     PGD      0.422   0.442

206 seconds on one core of an AMD EPYC, the other one busy (177 CPU seconds), set-up not
counted.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common, watching
from robustjax import data, models, plots
from robustjax.methods.base import Method
from robustjax.methods.madry import madry
from robustjax.methods.standard import standard
from robustjax.training import monitors, optimizers
from robustjax.training.loop import fit
from robustjax.training.step import ramped

PGD20 = rj.pgd(20)  # for the curves
GRID = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)  # of the budgets
HELD_OUT = 137  # training images
CHOSEN_BY = {"standard": "clean_accuracy", "madry": "robust_accuracy"}  # of them

# Of the config, what is of the tests alone; a run goes on with others.
TESTED = ("linf", "l2", "l1")


@dataclass(frozen=True)
class Config:
    out: str = "runs/quickstart"
    """Where the table, pictures and nets go. The same command there goes on."""
    seed: int = 0
    """Decides weights, order of the images and all noise."""
    dataset: Literal["digits"] = "digits"
    """The embedded one: 1,437 training images, of which 137 are held out, and 360 test
    images of 8x8 pixels."""
    model: Literal["small_cnn"] = "small_cnn"
    """Two convolutions, each pooled, and a hidden layer."""
    linf: float = 0.15
    """Largest change of any pixel (1: from black to white)."""
    l2: float = 0.6
    """Largest Euclidean length of a change."""
    l1: float = 1.5
    """Largest sum of all pixels' changes."""
    train_linf: float = 0.2
    """The budget that `madry` learns with: a little more than it is tested with."""
    num_epochs: int = 50
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


def train(
    config: Config, name: str, method: Method, model, splits, watched: monitors.Monitor
) -> rj.LogitsFn:
    """One net, by one method: its logits function."""
    print(f"training {name}")
    per_epoch = data.steps_per_epoch(splits.train.x.shape[0], config.batch_size)
    steps = config.num_epochs * per_epoch
    decides = common.training_part(config)
    folder, rate = Path(config.out) / name, common.learning_rate
    trained = fit(
        jax.random.key(config.seed),
        model,
        monitors.with_norms(method),
        optimizers.adam(rate("one_cycle", 5e-3, steps)),
        splits.train,
        batch_size=config.batch_size,
        num_steps=steps,
        steps_per_dispatch=per_epoch,
        validate=watched,
        best_metric=CHOSEN_BY[name],
        checkpoint_every=10 * per_epoch,
        out=folder,
        config={k: v for k, v in decides.items() if k not in TESTED},
        ema_decay=ramped(0.995),
    )
    watching.keep_curves(folder, trained, rate("one_cycle", 5e-3, steps))
    return models.logits_fn(model, trained.params, trained.extra)


@functools.partial(jax.jit, static_argnums=0)
def attack_all(attack_fn: rj.AttackFn, f, x, y, threats: rj.ThreatModel):
    """N stacked threats in one vmapped call: who resists `[N, B]`, and `x_adv`."""
    attacked = rj.over_threats(attack_fn, threats, how="vmap")
    result = attacked(jax.random.key(0), rj.untargeted(f, x, y, rj.linf(0.0)))
    correct = rj.predictions(f(x)) == y
    return ~result.success & correct[None], result.x_adv


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    splits = common.load_splits("digits", None, config.seed, HELD_OUT, config.num_test)
    x, y = splits.test
    budgets = {"Linf": config.linf, "L2": config.l2, "L1": config.l1}
    threats = rj.stack([rj.threat(name, budget) for name, budget in budgets.items()])
    grid = rj.stack([rj.threat(n, b * s) for n, b in budgets.items() for s in GRID])
    attacks = {
        "noise": rj.noise(num_samples=20),
        "fgsm": rj.fgsm(),
        "robust_accuracy": rj.pgd(config.test_steps, num_restarts=config.num_restarts),
    }
    model = common.build_model(config.model, config.dataset)
    inner = rj.pgd(config.attack_steps, keep=rj.last)
    threat = rj.linf(config.train_linf)
    methods = {
        "standard": standard(model),
        "madry": madry(model, threat, inner),
    }
    held_out = splits.validation
    seen = watching.first(splits.train, HELD_OUT)
    watched = monitors.together(
        monitors.overfitting(model, threat, seen, held_out),
        monitors.smoothness(model, threat, held_out),
    )
    nets = {n: train(config, n, m, model, splits, watched) for n, m in methods.items()}

    print(f"attacking both: PGD-{config.test_steps}, {config.num_restarts} restarts")
    results: dict[str, Any] = {}
    curves: dict[str, dict[str, plots.Curve]] = {name: {} for name in budgets}
    x_adv, answers = {}, {}
    for net, f in nets.items():
        clean = float((rj.predictions(f(jnp.asarray(x))) == y).mean())
        results[net] = {"clean_accuracy": clean}
        for name, attack_fn in attacks.items():
            robust, x_adv[net] = attack_all(attack_fn, f, x, y, threats)
            found = robust.mean(-1).tolist()
            results[net][name] = dict(zip(budgets, found, strict=True))
        answers[net] = jax.vmap(lambda x, f=f: rj.predictions(f(x)))(x_adv[net])
        robust, _ = attack_all(PGD20, f, x, y, grid)
        rows = robust.mean(-1).reshape(len(budgets), -1).tolist()
        for (name, budget), row in zip(budgets.items(), rows, strict=True):
            epsilon = [0.0, *(budget * s for s in GRID)]
            curves[name][net] = plots.Curve(epsilon, [clean, *row])

    examples = [  # the first nine test images, three for each threat
        plots.Attacked(
            x[i],
            str(y[i]),
            {net: np.asarray(x_adv[net][i // 3, i]) for net in nets},
            {net: str(answers[net][i // 3, i]) for net in nets},
            f"{list(budgets)[i // 3]} {list(budgets.values())[i // 3]:g}",
        )
        for i in range(9)
    ]
    for name, figure in {
        "accuracy": plots.draw_curves(curves, budgets, attack="PGD-20"),
        "examples": plots.draw_examples(examples),
        "quickstart": plots.draw_both(curves, examples, budgets, attack="PGD-20"),
    }.items():
        plots.save(figure, Path(config.out) / f"{name}.png")
    print(table(results, budgets))
    results = {**results, "config": config, "data": splits.used}
    return common.save_results(config.out, results, began)


def table(results: dict[str, Any], budgets: dict[str, float]) -> str:
    """The measurement as text: a row per threat and attack, a column per net."""
    rows = [["accuracy", *results], ["clean"]]
    rows[1] += [f"{found['clean_accuracy']:.3f}" for found in results.values()]
    names = {"noise": "random noise", "fgsm": "FGSM", "robust_accuracy": "PGD"}
    for threat, epsilon in budgets.items():
        for key, name in names.items():
            values = [f"{found[key][threat]:.3f}" for found in results.values()]
            rows.append([f"{threat} {epsilon:g}".ljust(10) + name, *values])
    return "\n".join(f"{head:24}{one:>10}{two:>10}" for head, one, two in rows)


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
