"""What the experiments of training methods on CIFAR-10 share: `Recipe` and `run`.

A `Recipe` holds everything but the method: data, net, budget, schedule, optimizer, what
is watched and what is measured. An experiment's config contains one, and its flags are
flat. `run` is `prepare`, `train`, `finish`; who needs more calls the three.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

import robustjax as rj
from experiments import common, machine, watching
from experiments.machine import Machine
from experiments.watching import Collapse
from robustjax import data, models
from robustjax.evaluation.ledger import code_digest
from robustjax.methods.base import Method
from robustjax.methods.standard import standard
from robustjax.training import monitors, optimizers
from robustjax.training.arguments import check_counts
from robustjax.training.loop import FitResult, Validate, fit


@dataclass(frozen=True)
class Recipe:
    out: str
    """The run's folder. The same command on the same folder goes on with the run."""
    data_dir: str | None = None
    """Where cifar10.npz or another form of the set lies (docs/data.md)."""
    seed: int = 0
    """Decides weights, order, augmentation, noise and the held-out images."""

    model: Literal["preact_resnet18", "resnet18", "wide_resnet"] = "preact_resnet18"
    """The net."""
    width: int = 16
    """Channels of a ResNet-18's first stage, or WideResNet's factor."""
    depth: int = 34
    """Of the WideResNet."""
    activation: Literal["relu", "silu"] = "relu"
    """Of PreActResNet-18 and WideResNet."""

    epsilon: str = "8/255"
    """Linf budget, in training and testing."""

    num_epochs: int = 10
    """Passes over the training images: their number by the batch size, in batches."""
    num_steps: int | None = None
    """Batches to learn from, instead of `num_epochs`."""
    batch_size: int = 128
    """Images per step."""
    schedule: Literal["one_cycle", "cosine_cycle", "cosine", "piecewise", "linear"] = (
        "one_cycle"
    )
    """One linear rise and fall; both along cosines, from 1/25 of the highest rate; a
    linear rise and a cosine to 0; a tenth at every boundary; linear between them."""
    warmup: float = 0.4
    """Fraction of the training in which the first three rise."""
    boundaries: tuple[int, ...] = ()
    """Epochs; absent: 1/2 and 3/4 of the training."""
    values: tuple[float, ...] = ()
    """Of `linear`: the rate at each boundary, as fractions of the highest."""
    learning_rate: float = 0.2
    """The highest one."""
    weight_decay: float = 5e-4
    """L2 penalty."""
    decay: Literal["all", "kernels"] = "all"
    """What is decayed: every weight, or no norm scales and biases."""
    momentum: tuple[float, ...] = (0.9,)
    """One value; or, with a cycle, two: at the lowest rate and at the highest."""
    nesterov: bool = True
    """Whether the momentum looks ahead."""
    bn_momentum: float = 0.9
    """Weight of BatchNorm's old running statistics."""
    ema_decay: float | None = None
    """Average the weights with this decay and use the averages."""

    num_validation: int = 1000
    """Training images held out."""
    num_attacked: int = 500
    """Of these, how many PGD-10 attacks after every epoch; the best epoch is kept."""
    monitors: bool = True
    """Watch training images, gradients and norms too (docs/methods.md)."""
    num_monitored: int = 200
    """How many training and held-out images the monitors look at."""

    num_test: int = 1000
    """How many test images, from the first."""
    suite: Literal["fast", "standard"] | None = None
    """Measure by this suite too; "standard" is AutoAttack."""
    machine: Machine = Machine()


class Prepared(NamedTuple):
    """What a training starts from: when, the data, the net and the threat."""

    began: common.Start
    splits: common.Splits
    model: models.Model
    threat: rj.ThreatModel


Build = Callable[[models.Model, rj.ThreatModel], Method]


def run(config: Any, build: Build, **options: Any) -> dict[str, Any]:
    """Train by the method that `build(model, threat)` makes, measure, save.

    Args:
      config: a frozen dataclass with a field `recipe`; decides what a resume compares.
      build: makes the method.
      options: see `train`.
    """
    ready = prepare(config.recipe)
    method = build(ready.model, ready.threat)
    return finish(config, ready, train(config, ready, method, **options))


def check_used(recipe: Recipe) -> None:
    """Raise ValueError for flags that change nothing beside the others.

    >>> check_used(Recipe("runs/x", schedule="cosine", boundaries=(5,)))
    Traceback (most recent call last):
    ...
    ValueError: boundaries is (5,), which the schedule 'cosine' does not use: ...
    """
    use = {"boundaries": ("piecewise", "linear"), "values": ("linear",)}
    for flag, schedules in use.items():
        value = getattr(recipe, flag)
        if value and recipe.schedule not in schedules:
            raise ValueError(
                f"{flag} is {value}, which the schedule {recipe.schedule!r} does not "
                f"use: give --{flag} without values, or --schedule {schedules[0]}."
            )
    if recipe.model == "resnet18" and recipe.activation != "relu":
        raise ValueError(
            f"activation is {recipe.activation!r}, but resnet18 has ReLU only."
        )


def prepare(recipe: Recipe) -> Prepared:
    """Load the data, build the net."""
    began = common.start()
    check_used(recipe)
    check_counts(
        num_validation=recipe.num_validation,
        num_attacked=recipe.num_attacked,
        num_monitored=recipe.num_monitored,
        num_test=recipe.num_test,
    )
    splits = common.load_splits(
        *("cifar10", recipe.data_dir, recipe.seed),
        *(recipe.num_validation, recipe.num_test),
    )
    model = common.build_model(
        *(recipe.model, "cifar10", splits.num_classes),
        *(recipe.width, recipe.depth, recipe.activation),
        bn_momentum=recipe.bn_momentum,
        on=recipe.machine,
    )
    return Prepared(began, splits, model, rj.linf(recipe.epsilon))


def train(
    config: Any,
    ready: Prepared,
    method: Method,
    *,
    on_collapse: Collapse | None = None,
    validate: Validate | None = None,
    **options: Any,
) -> FitResult:
    """`fit` as the config's recipe says.

    Args:
      config: a `Recipe`, or a dataclass with one as its field `recipe`.
      ready: of `prepare`.
      method: the training method.
      on_collapse: watch for catastrophic overfitting, and what to do about it.
      validate: what chooses the checkpoint; None: PGD-10 and the monitors.
      options: go to `fit` and win over what the recipe says.
    """
    recipe: Recipe = getattr(config, "recipe", config)
    num_steps, per_epoch = length(recipe, ready.splits.train.x.shape[0])
    sizes = num_steps * method.repeats, per_epoch * method.repeats
    rate = schedule(recipe, *sizes)
    method = machine.method(recipe.machine, method)
    if recipe.monitors:
        method = monitors.with_norms(method)
    if validate is None:
        validate = watch(recipe, ready, on_collapse)
    arguments = {
        "batch_size": recipe.batch_size,
        "num_steps": num_steps,
        "checkpoint_every": min(per_epoch, num_steps),
        "augment": data.compose(data.random_crop, data.random_flip),
        "validate": validate,
        "out": recipe.out,
        "config": common.training_part(config),
        "ema_decay": recipe.ema_decay,
        **machine.step_options(recipe.machine),
        **machine.fit_options(recipe.machine, recipe.batch_size),
    }
    tx = optimizers.sgd(
        rate,
        momentum=momentum(recipe, sizes[0], rate),
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        decay=recipe.decay,
    )
    key = jax.random.key(recipe.seed)
    inputs = (key, ready.model, method, tx, ready.splits.train)
    return fit(*inputs, **{**arguments, **options})


def standard_net(
    recipe: Recipe, ready: Prepared, name: str, num_epochs: int, **options: Any
) -> rj.LogitsFn:
    """A net like the recipe's, trained without attacks in the folder `out/name`.

    It goes on where it stopped; the checkpoint of the highest clean accuracy on
    held-out images is taken.
    """
    print(f"{name}: a net trained without attacks")
    own = {"out": f"{recipe.out}/{name}", "num_epochs": num_epochs, "num_steps": None}
    recipe = replace(recipe, **own, monitors=False)
    x, y = ready.splits.validation
    held_out = x[: recipe.num_attacked], y[: recipe.num_attacked]
    trained = train(
        recipe,
        ready,
        standard(ready.model),
        validate=monitors.accuracies(ready.model, ready.threat, held_out, rj.fgsm()),
        best_metric="clean_accuracy",
        **options,
    )
    return models.logits_fn(ready.model, trained.params, trained.extra)


def length(recipe: Recipe, num_train: int) -> tuple[int, int]:
    """Steps of the whole training, and of an epoch."""
    per_epoch = data.steps_per_epoch(num_train, recipe.batch_size)
    return common.num_steps(recipe, per_epoch), per_epoch


def schedule(recipe: Recipe, num_steps: int, per_epoch: int) -> optimizers.Schedule:
    """The learning rate at each of `num_steps` updates."""
    peak, rise = recipe.learning_rate, round(recipe.warmup * num_steps)
    if recipe.schedule == "one_cycle":
        return optimizers.one_cycle(peak, num_steps, warmup_steps=rise)
    if recipe.schedule == "cosine_cycle":
        return optimizers.cosine_cycle(peak, num_steps, warmup_steps=rise)
    if recipe.schedule == "cosine":
        return optimizers.cosine(peak, num_steps, warmup_steps=rise)
    steps = [epoch * per_epoch for epoch in recipe.boundaries]
    if recipe.schedule == "piecewise":
        halves = [num_steps // 2, num_steps * 3 // 4]
        return optimizers.piecewise(peak, steps or halves)
    return optimizers.linear([peak * value for value in recipe.values], steps)


def momentum(
    recipe: Recipe, num_steps: int, rate: optimizers.Schedule
) -> float | optimizers.Schedule:
    """SGD's, at each update where it changes.

    Raises:
      ValueError: neither one nor two values, or two without a cycle.
    """
    if len(recipe.momentum) == 1:
        return recipe.momentum[0]
    if len(recipe.momentum) != 2 or "cycle" not in recipe.schedule:
        raise ValueError(
            f"momentum is {recipe.momentum} with the schedule {recipe.schedule!r}; "
            "give one value, or two with one_cycle or cosine_cycle."
        )
    high, low = recipe.momentum
    if recipe.schedule == "one_cycle":
        return optimizers.against(rate, recipe.learning_rate, high, low)
    return optimizers.cosine_cycle(  # the rate's own phases, upside down
        low,
        num_steps,
        warmup_steps=round(recipe.warmup * num_steps),
        first=high / low,
        final=high / low,
    )


def watch(
    recipe: Recipe,
    ready: Prepared,
    on_collapse: Collapse | None = None,
    threat: watching.Threats | None = None,
) -> Validate:
    """What is measured after every epoch, on held-out and on training images.

    `threat`, one or several, instead of that of `ready`.
    """
    return watching.watch(
        *(ready.model, threat or ready.threat, ready.splits.validation),
        watching.first(ready.splits.train, recipe.num_monitored),
        num_attacked=recipe.num_attacked,
        num_monitored=recipe.num_monitored,
        everything=recipe.monitors,
        on_collapse=on_collapse,
        mesh=machine.mesh(recipe.machine, recipe.batch_size),
    )


def finish(
    config: Any, ready: Prepared, trained: FitResult, **more: Any
) -> dict[str, Any]:
    """Measure the chosen checkpoint by FGSM, PGD-20 and the recipe's suite; save.

    `more` stands in the results too.
    """
    recipe: Recipe = config.recipe
    more = {"config": config, **ending(trained.history), **more}
    more |= by_suite(recipe, ready, trained, ready.threat)
    mesh = machine.mesh(recipe.machine, recipe.batch_size)
    attacks = {"FGSM": rj.fgsm(), "PGD-20": rj.pgd(20)}
    inputs = (ready.model, trained, ready.splits, ready.threat, attacks, ready.began)
    return common.measure(recipe.out, *inputs, more=more, mesh=mesh)


def by_suite(
    recipe: Recipe, ready: Prepared, trained: FitResult, threat: Any
) -> dict[str, Any]:
    """What the recipe's suite says of the chosen checkpoint; {} without one.

    Killed, it goes on from its ledger in the run's folder.
    """
    if recipe.suite is None:
        return {}
    mesh = machine.mesh(recipe.machine, recipe.batch_size)
    question = {
        "step": trained.metrics["step"],
        "images": len(ready.splits.test[1]),
        "devices": 1 if mesh is None else mesh.size,
        "code": f"{code_digest()[:8]}_{jax.__version__}",  # others judge anew
    }
    name = "_".join([recipe.suite, *(f"{n}_{v}" for n, v in question.items())])
    report = rj.evaluate(
        models.logits_fn(ready.model, trained.params, trained.extra),
        *(*ready.splits.test, threat),
        suite=recipe.suite,
        batch_size=250,
        resume=Path(recipe.out) / "ledger" / name,
        mesh=mesh,
    )
    print(report)
    return {"suite": report.summary()}


def ending(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the last epoch's monitors said, and the step of the first collapse.

    >>> row = {"kind": "validate", "step": 8, "collapsed": 1.0}
    >>> ending([row])["collapsed_after"]
    8
    """
    rows = [row for row in history if row["kind"] == "validate"]
    collapsed = [row["step"] for row in rows if row.get("collapsed")]
    return {
        "last": rows[-1] if rows else None,
        "collapsed_after": collapsed[0] if collapsed else None,
    }
