"""Every training method at one budget: same net, same data, same number of gradients.

    python -m experiments.compare_methods
    python -m experiments.compare_methods --dataset fashion_mnist --data-dir DIR
    python -m experiments.compare_methods --dataset cifar10 --data-dir DIR --seeds 0 1 2
    python -m experiments.compare_methods --methods multinorm --gradients-per-image 24

A gradient is a forward and a backward pass of one image, of weights or of input; what a
method spends on one update decides how many updates it gets. One recipe for all: SGD,
one cycle, weight decay 5e-4, gradients clipped at norm 3, last weights, no choice by
validation. The rows, their strengths and what the literature leads one to expect:
experiments/contestants.py.
Helpers (HAT's standard net, the net that labels `madry_pseudo`'s stream) are not in the
budget, as in their papers. Killed, the same command goes on; nothing is computed twice,
and further methods and seeds join the table.

Measured on one core of an AMD EPYC, 7 to 20 minutes a net: docs/results.md has the
tables, the revisions, and what was not run. On CIFAR-10 at 6 gradients per image
`madry` has 0.413 clean, 0.250 robust, the two-step attack 0.483 and 0.293.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import robustjax as rj
from experiments import common, ideas, machine, watching
from experiments.comparison import NORMS, claims_of, draw, summarize, table
from experiments.contestants import CONTESTANTS, Setting, chosen
from experiments.evaluate import BUDGETS
from robustjax import data, models, plots
from robustjax.logging import duration, replacing
from robustjax.training import monitors, optimizers, run_folder
from robustjax.training.arguments import check_counts
from robustjax.training.loop import fit
from robustjax.training.weights import weights_of


class Recipe(NamedTuple):
    """What is the same for all methods on a data set."""

    model: str
    batch_size: int
    peak: float
    gradients_per_image: float
    augmented: bool = False
    clip_norm: float | None = None


RECIPES = {
    "digits": Recipe("small_cnn", 64, 0.1, 120),
    "fashion_mnist": Recipe("madry_mnist", 64, 0.1, 24),
    "cifar10": Recipe("preact_resnet18", 128, 0.2, 20, augmented=True),
}


@dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "fashion_mnist", "cifar10"] = "digits"
    """Embedded digits and a small net at Linf 0.15; Fashion-MNIST and Madry's net at
    0.1; CIFAR-10 and PreActResNet-18 of width 16 at 8/255."""
    methods: tuple[str, ...] = ()
    """Rows of experiments/contestants.py; `multinorm`: that group; absent: all."""
    seeds: tuple[int, ...] = (0,)
    """Each decides weights, order, augmentation and noise of its nets."""
    gradients_per_image: float | None = None
    """The budget of each net; absent: 120, 24 or 20, by data set."""
    batch_size: int | None = None
    """Images per update; absent: 64, of cifar10 128."""
    clip_norm: float | None = 3.0
    """Largest norm of a gradient, for every method: without it MART on Fashion-MNIST
    and the gradient penalty on the digits end as constants. None: not clipped."""
    num_train: int | None = None
    """How many of the training images, at most; absent: all."""
    num_monitored: int = 100
    """Training images held out to draw curves, and as many of the others."""
    num_seen: int = 300
    """Of the others, how many are attacked to see whether a net collapsed."""
    num_test: int = 1000
    """How many test images, from the first."""
    out: str | None = None
    """Where nets, table, picture and results go; absent: runs/compare_DATASET."""
    data_dir: str | None = None
    """Where other sets than the digits lie (docs/data.md)."""


class Task(NamedTuple):
    """What all trainings of a run share."""

    out: Path
    recipe: Recipe
    model: models.Model
    threats: Mapping[str, rj.ThreatModel]
    splits: common.Splits
    watched: monitors.Monitor
    budget: float
    decides: Mapping[str, Any]


def main(config: Config) -> dict[str, Any]:
    began = common.start()
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"seeds is {config.seeds}; give each once.")
    task = prepare(config)
    names = chosen(config.methods)
    for name in names:
        updates(name, task)  # a budget that is too small is refused before it is spent
    threats = ", ".join(f"{n} {float(t.epsilon):.4g}" for n, t in task.threats.items())
    told = [
        f"{task.recipe.model}, {task.budget:,.0f} gradients for each net; {threats}.",
        f"{task.splits.used}.",
    ]
    count = len(task.splits.test[1])
    todo = [(name, seed) for seed in config.seeds for name in names]
    new = {pair for pair in todo if not judged(task, *pair, config.num_test).exists()}
    rows, failed, fitted, summary, spent, done = {}, {}, {}, {}, 0.0, 0
    for number, (name, seed) in enumerate(todo):
        left = duration(spent / done * (len(new) - done)) if done else "?"
        print(f"net {number + 1} of {len(todo)}: {name}, seed {seed}; ETA {left}")
        started = time.monotonic()
        try:
            f, run = train(task, name, seed, fitted)
        except FloatingPointError as error:  # that, too, is a result
            print(f"{name}, seed {seed}: {error}")
            failed[f"{name}, seed {seed}"] = str(error)
            continue
        wanted = NORMS if CONTESTANTS[name].union else NORMS[:1]
        found = judge(task, name, seed, f, wanted, config.num_test)
        rows.setdefault(name, []).append(run | found)
        if (name, seed) in new:
            spent, done = spent + time.monotonic() - started, done + 1
        summary = {n: summarize(n, rows) for n in names if n in rows}
        # If this is killed there is a table of what was finished.
        (task.out / "table.md").write_text(table(summary, failed, told, count))
    if not summary:
        raise FloatingPointError(f"no training came to its end: {failed}")
    text = table(summary, failed, told, count)
    (task.out / "table.md").write_text(text)
    print(text)
    plots.save(draw(summary), task.out / "compare_methods.png")
    return ideas.save(
        task.out,
        config,
        claims_of(summary, task.budget),
        {
            "methods": summary,
            "failed": failed,
            "budget": task.budget,
            "data": task.splits.used,
        },
        ["compare_methods.png"],
        began,
    )


def prepare(config: Config) -> Task:
    """Data, net, threat models and budget."""
    recipe = RECIPES[config.dataset]._replace(clip_norm=config.clip_norm)
    check_counts(
        batch_size=config.batch_size,
        num_seen=config.num_seen,
        num_train=config.num_train,
        num_test=config.num_test,
        num_monitored=config.num_monitored,
    )
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ValueError(f"clip_norm is {config.clip_norm}; give more than 0 or None.")
    if config.batch_size is not None:
        recipe = recipe._replace(batch_size=config.batch_size)
    splits = common.load_splits(
        *(config.dataset, config.data_dir, 0, config.num_monitored, config.num_test)
    )
    x, y = (part[: config.num_train] for part in splits.train[:2])
    used = splits.used
    if len(y) < len(splits.train.y):
        used += f"; of the training images the first {len(y):,}"
    splits = splits._replace(train=splits.train._replace(x=x, y=y), used=used)
    budget = config.gradients_per_image
    if budget is None:
        budget = recipe.gradients_per_image
    if not 0 < budget < math.inf:
        raise ValueError(f"gradients_per_image is {budget:g}; give a positive number.")
    threats = {n: rj.threat(n, BUDGETS[config.dataset][n]) for n in NORMS}
    model = common.build_model(recipe.model, config.dataset, splits.num_classes)
    held_out, linf = splits.validation, threats["Linf"]

    def seen(count: int) -> monitors.Examples:
        return np.asarray(data.to_float(x[:count], splits.train.scale)), y[:count]

    watched = monitors.together(  # compiled once, for all nets
        monitors.overfitting(model, linf, seen(len(held_out[0])), held_out),
        monitors.catastrophic_overfitting(model, linf, seen(config.num_seen)),
        monitors.smoothness(model, linf, held_out),
    )
    decides = recipe._replace(gradients_per_image=budget)._asdict()
    return Task(
        Path(config.out or f"runs/compare_{config.dataset}"),
        *(recipe, model, threats, splits, watched),
        budget * len(x),
        {"dataset": config.dataset}
        | {name: value for name, value in decides.items() if value is not None},
    )


def updates(name: str, task: Task) -> int:
    """As many as the budget pays for, in whole groups."""
    one = CONTESTANTS[name]
    per_group = one.gradients * one.multiple * task.recipe.batch_size
    groups = int(task.budget // per_group)
    if groups < 1:
        more = math.ceil(100 * per_group / task.budget) / 100
        raise ValueError(
            f"gradients_per_image is {task.decides['gradients_per_image']:g}: "
            f"{task.budget:g} gradients, but {name} takes {per_group:g} at once; give "
            f"{more:g} times as many, or leave it out of methods."
        )
    return groups * one.multiple


def train(
    task: Task, name: str, seed: int, fitted: dict[tuple[str, int], Any]
) -> tuple[rj.LogitsFn, dict[str, Any]]:
    """The net of a row and what it cost; `fitted` remembers those of this process."""
    if (name, seed) in fitted:
        return fitted[name, seed]
    one, recipe, splits = CONTESTANTS[name], task.recipe, task.splits
    helper = train(task, one.helper, seed, fitted)[0] if one.helper else None
    num_updates = updates(name, task)
    half_diagonal = splits.train.x[0].size ** 0.5 / 2
    setting = Setting(task.model, task.threats, num_updates, half_diagonal, helper)
    rows, streams, own = splits.train, None, recipe.batch_size
    if one.half:
        middle = len(rows.x) // 2
        rest = rows._replace(x=rows.x[middle:], y=rows.y[middle:])
        rows = rows._replace(x=rows.x[:middle], y=rows.y[:middle])
        if one.stream:
            assert helper is not None
            own //= 2
            streams = {
                "generated": (common.labeled(helper, rest), recipe.batch_size - own)
            }
    method = monitors.with_norms(one.build(setting))
    repeats = method.repeats
    steps = num_updates // repeats
    rate = common.learning_rate("one_cycle", recipe.peak, num_updates)
    optimizer = optimizers.sgd(rate, weight_decay=5e-4, clip_norm=recipe.clip_norm)
    augment = None
    if recipe.augmented:
        augment = data.compose(data.random_crop, data.random_flip)
    folder = folder_of(task, name, seed)
    found = fit(
        jax.random.key(seed),
        *(task.model, method, optimizer, rows),
        batch_size=own,
        num_steps=steps,
        streams=streams,
        augment=augment,
        validate=watch(task.watched),
        checkpoint_every=-(-steps // 8),
        out=folder,
        config={**task.decides, "method": versioned(name)},
        ema_decay=one.ema_decay(setting) if one.ema_decay else None,
        **machine.step_options() | compiled_with(folder, steps),
    )
    watching.keep_curves(folder, found, lambda step: rate(step * repeats))
    f = models.logits_fn(task.model, *weights_of(found.state))
    learned = [row for row in found.history if row["kind"] == "train"]
    watched = [row for row in found.history if row["kind"] == "validate"]
    fitted[name, seed] = (
        f,
        {
            "seed": seed,
            "updates": num_updates,
            "gradients": num_updates * one.gradients * recipe.batch_size,
            "group": one.gradients * one.multiple * recipe.batch_size,
            "epochs": steps * own / len(rows.x),
            "seconds": learned[-1]["seconds"],
            "cpu_seconds": sum(row["cpu_seconds"] for row in watched),
            "collapsed": watched[-1]["collapsed"],
        },
    )
    return fitted[name, seed]


def compiled_with(folder: Path, steps: int) -> dict[str, Any]:
    """The compiler's options of a net that is finished: nothing is compiled any more,
    and a net that an earlier version made with others stays in the table."""
    remembered = run_folder.remembered_of(folder)
    if remembered is None or remembered["step"] != steps:
        return {}
    print(
        f"{folder} is trained already and taken as it is: if its method has changed, "
        "raise the row's version in experiments/contestants.py."
    )
    return {"compiler_options": remembered["settings"]["compiler_options"]}


def watch(watched: monitors.Monitor) -> Callable[[Any, Any], dict[str, float]]:
    """`fit`'s `validate`: monitors, and the CPU seconds of the stretch before it.

    They choose nothing. A stretch begins where the last one was validated, or where
    this process began to train: after a kill the seconds of resumes add up; after
    SIGTERM, which keeps the steps of its stretch, those steps' seconds are missing.
    """
    cpu = [time.process_time()]

    def validate(params: Any, extra: Any) -> dict[str, float]:
        jax.block_until_ready(params)
        passed = time.process_time() - cpu[0]
        found = {**watched(params, extra), "cpu_seconds": passed}
        cpu[0] = time.process_time()
        return found

    return validate


def folder_of(task: Task, name: str, seed: int) -> Path:
    """Where a net is."""
    return task.out / "nets" / f"{versioned(name)}_{seed}"


def versioned(name: str) -> str:
    """The row's name, from its second version on with the number, as its helper's.

    >>> versioned("madry"), versioned("free")
    ('madry', 'free_v2')
    """
    one = CONTESTANTS[name]
    helper = versioned(one.helper) if one.helper else ""
    by = f"_by_{helper}" if helper != (one.helper or "") else ""
    return name + by if one.version == 1 else f"{name}_v{one.version}{by}"


def judged(task: Task, name: str, seed: int, count: int) -> Path:
    """Where it is written who of the test images resists."""
    return folder_of(task, name, seed) / f"judged_{count}.npz"


def judge(
    task: Task, name: str, seed: int, f: rj.LogitsFn, norms: Sequence[str], count: int
) -> dict[str, Any]:
    """Who of the test images is right, and who resists under each norm.

    What was found is kept beside the net and not computed again.
    """
    path = judged(task, name, seed, count)
    known: dict[str, Any] = dict(np.load(path)) if path.exists() else {}
    threats = {n: task.threats[n] for n in norms if n not in known}
    if threats:
        report = rj.evaluate(
            *(f, *task.splits.test, threats),
            suite="fast",
            batch_size=250,
            resume=path.parent / f"ledger_{count}_{'_'.join(threats)}",
        )
        flags = [flag.name for flag in report.flags] + list(known.get("flags", ()))
        known |= {n: found.robust for n, found in report.threats.items()}
        known |= {"clean": report.correct, "flags": np.array(sorted(set(flags)), str)}
        with replacing(path) as whole, open(whole, "wb") as file:
            np.savez(file, **known)
    right = {n: known[n] for n in ("clean", *norms)}
    if len(norms) > 1:
        right["union"] = np.logical_and.reduce([known[n] for n in norms])
    return {"right": right, "flags": known["flags"].tolist()}


if __name__ == "__main__":
    common.launch(main, Config(), __doc__)
