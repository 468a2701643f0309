"""What the experiments share: flags and presets, data, nets, measuring, results."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import robustjax as rj
from experiments import compilation_cache, machine, watching
from experiments.machine import Machine
from robustjax import data, models
from robustjax.logging import duration, provenance, write_json
from robustjax.methods.base import Method
from robustjax.parallel import is_writer
from robustjax.training import optimizers
from robustjax.training.arguments import check_counts
from robustjax.training.loop import FitResult

Config = TypeVar("Config")

SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion_mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
}
NETS: dict[str, Callable[..., models.Model]] = {
    "small_cnn": models.small_cnn,
    "madry_mnist": models.madry_mnist,
    "preact_resnet18": models.preact_resnet18,
    "resnet18": models.resnet18,
    "wide_resnet": models.wide_resnet,
}

# What a config says beside how the weights come about; may differ on resume.
NOT_TRAINING = (
    *("preset", "out", "data_dir"),
    *("num_test", "test_batch_size", "test_steps", "num_restarts", "suite"),
    "generated",  # a path; its images are compared
)
# Of a config's `Machine`, what may not.
ARITHMETIC = ("dtype", "microbatches")


def parse(
    default: Config | Mapping[str, Config],
    document: str | None,
    argv: Sequence[str] | None = None,
) -> Config:
    """Read typed flags, which begin at `default` or at that of `--preset NAME`.

    `document` is the experiment's docstring; `--help` shows its title and commands.
    Without `argv` this is a command of its own, whose compiled programs are kept.
    """
    import tyro  # slow to import

    is_command = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(default, Mapping):
        chosen = next(iter(default.values()))
        for flag, value in zip(argv, [*argv[1:], ""], strict=False):
            name, _, joined = flag.partition("=")
            if name == "--preset":  # an unknown one is refused by tyro below
                chosen = default.get(joined or value, chosen)
    else:
        chosen = default
    title, commands = (document or "").split("\n\n")[:2]
    lines = [line.strip() for line in commands.splitlines()]
    config = tyro.cli(
        type(chosen),
        default=chosen,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),  # a recipe's flags stand beside the rest
        prog=next(" ".join(n.split()[:3]) for n in lines if n.startswith("python -m")),
        description="\n\n".join([title, *lines]),
    )
    refuse_idle_epochs(config, argv)
    if is_command and machine.of(config).cache:
        compilation_cache.turn_on()
    return config


def refuse_idle_epochs(config: Any, argv: Sequence[str]) -> None:
    """Of a preset that counts steps, `--num-epochs` alone would change nothing.

    Raises:
      SystemExit: so it is.
    """
    given = {flag.partition("=")[0].replace("_", "-") for flag in argv}
    num_steps = getattr(getattr(config, "recipe", config), "num_steps", None)
    if num_steps and "--num-epochs" in given and "--num-steps" not in given:
        raise SystemExit(
            f"--num-epochs changes nothing: {config.preset!r} trains for "
            f"{num_steps:,} steps. Give --num-steps, or --num-steps None with it."
        )


def launch(
    main: Callable[[Any], Any],
    default: Any | Mapping[str, Any],
    document: str | None,
) -> None:
    """Run an experiment from the command line: flags, processes, `main(config)`."""
    config = parse(default, document)
    with machine.started(machine.of(config)):
        main(config)


class Start(NamedTuple):
    """When and from what an experiment was started."""

    seconds: float
    provenance: dict[str, Any]


def start() -> Start:
    """Call it first: the code may change while an experiment runs."""
    return Start(time.monotonic(), provenance())


class Workload(NamedTuple):
    """What an experiment trains and how, without its data: `scripts/plan_pod` compiles
    it for chips that are not there.

    attack_fn:        the attack in training, and `attack_steps` its gradient steps.
    evaluation:       the attack that tests, and `evaluation_steps` its steps.
    shape:            of one input.
    batch_size:       rows per step, all devices together.
    """

    model: models.Model
    method: Method
    tx: optax.GradientTransformation
    threat: rj.ThreatModel
    attack_fn: rj.AttackFn
    attack_steps: int
    evaluation: rj.AttackFn
    evaluation_steps: int
    shape: tuple[int, ...]
    batch_size: int
    num_steps: int
    ema_decay: float | None = None


class Splits(NamedTuple):
    """The training set on the device; validation and test images as float32 [0, 1]."""

    train: data.Resident
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    num_classes: int
    used: str


def load_splits(
    name: str, data_dir: str | None, seed: int, num_validation: int, num_test: int
) -> Splits:
    """Load a set, hold `num_validation` training images out, cut the test images."""
    found = data.load(name, data_dir)
    train, held_out = data.split_validation(
        seed, found.x_train, found.y_train, num_validation
    )
    test = found.x_test[:num_test], found.y_test[:num_test]
    used = f"{found.source}; {len(train[0]):,} learned from, "
    if num_validation:
        used += f"{num_validation:,} held out, "
    used += f"first {len(test[0]):,} test images"
    print(used)

    def floats(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(data.to_float(jnp.asarray(x), found.max_value)), y

    on_device = data.resident(*train, found.max_value)
    return Splits(on_device, floats(*held_out), floats(*test), found.num_classes, used)


def build_model(
    name: str,
    dataset: str,
    num_classes: int = 10,
    width: int | None = None,
    depth: int | None = None,
    activation: str = "relu",
    bn_momentum: float = 0.9,
    on: Machine = machine.HERE,
) -> models.Model:
    """The net of a config, one of `NETS`; it normalizes its inputs itself.

    `bn_momentum` is that of nets with BatchNorm.
    """
    mean, std = (0.0,), (1.0,)
    if dataset == "cifar10":
        mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    own: dict[str, Any] = {
        "preact_resnet18": {"width": width or 16, "activation": activation},
        "resnet18": {"width": width or 64},
        "wide_resnet": {
            "depth": depth or 34,
            "widen_factor": width or 10,
            "activation": activation,
        },
    }.get(name, {})
    if own:  # the nets with BatchNorm
        own["momentum"] = bn_momentum
    blocks = "activation" in own
    shared = {"mean": mean, "std": std, **machine.net_options(on, blocks)}
    return machine.net(on, NETS[name](num_classes=num_classes, **own, **shared))


def labeled(f: rj.LogitsFn, rows: data.Resident) -> data.Resident:
    """The images with a net's predictions as labels (self-training)."""
    predict = jax.jit(lambda f, x: rj.predictions(f(data.to_float(x, rows.scale))))
    parts = [predict(f, rows.x[i : i + 500]) for i in range(0, len(rows.x), 500)]
    return rows._replace(y=jnp.concatenate(parts).astype(rows.y.dtype))


def num_steps(config: Any, per_epoch: int) -> int:
    """`config.num_steps`, or those of its `num_epochs`.

    Raises:
      ValueError: the one that counts is below 1.
    """
    if config.num_steps is not None:
        check_counts(num_steps=config.num_steps)
        return config.num_steps
    check_counts(num_epochs=config.num_epochs)
    return config.num_epochs * per_epoch


def learning_rate(name: str, peak: float, num_steps: int) -> optimizers.Schedule:
    """`constant`, `one_cycle`, or `piecewise`: a tenth at 1/2 and at 3/4."""
    if name == "constant":
        return optimizers.constant(peak)
    if name == "one_cycle":
        return optimizers.one_cycle(peak, num_steps)
    return optimizers.piecewise(peak, [num_steps // 2, num_steps * 3 // 4])


def training_part(config: Any) -> dict[str, Any]:
    """The fields of a config that decide what is trained: compared on resume.

    Those of a dataclass inside stand beside the others, as the flags do.
    """
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in NOT_TRAINING:
            continue
        if isinstance(value, Machine):
            fields |= {name: getattr(value, name) for name in ARITHMETIC}
            continue
        inside = dataclasses.is_dataclass(value)
        fields.update(training_part(value) if inside else {field.name: value})
    return fields


def measure(
    out: str | Path,
    model: models.Model,
    trained: FitResult,
    splits: Splits,
    threat: rj.ThreatModel,
    attacks: Mapping[str, rj.AttackFn],
    began: Start,
    more: Mapping[str, Any] | None = None,
    learning_rate: optimizers.Schedule | None = None,
    mesh: Any = None,
) -> dict[str, Any]:
    """Evaluate the chosen checkpoint on the test images; print and save the results.

    `more` is written beside them. The training's curves, with the learning rate where
    it is given, go to `curves.png`.
    """
    watching.keep_curves(out, trained, learning_rate)
    f = models.logits_fn(model, trained.params, trained.extra)
    report = rj.evaluate(
        f,
        *(*splits.test, threat),
        suite=None,
        attacks=attacks,
        individual=True,
        batch_size=250,
        mesh=mesh,
    )
    print(report)
    found = next(iter(report.threats))
    results = {
        "clean_accuracy": report.clean_accuracy,
        "robust_accuracy": report.robust_accuracy,
        "accuracy": {name: report.accuracy(found, name) for name in attacks},
        "epsilon": float(threat.epsilon),
        "checkpoint": trained.metrics,
        "data": splits.used,
        "flags": [flag._asdict() for flag in report.flags],
        **(more or {}),
    }
    return save_results(out, results, began)


def save_results(
    out: str | Path, results: Mapping[str, Any], began: Start
) -> dict[str, Any]:
    """Write `results.json` and say where it is; seconds are this process's."""
    seconds = time.monotonic() - began.seconds
    times = {"seconds": seconds, "cpu_seconds": time.process_time()}
    results = {**results, **times}
    path = Path(out) / "results.json"
    if not is_writer():
        return results
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**results, "provenance": began.provenance})
    print(f"{path} ({duration(seconds)})")
    return results
