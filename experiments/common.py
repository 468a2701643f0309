"""What the experiments share: flags and presets, data, choosing checkpoints, results."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tyro

import robustjax as rj
from robustjax import data
from robustjax.logging import duration, provenance, write_json
from robustjax.models import Model, logits_fn

Config = TypeVar("Config")

# What neither changes the weights nor the course of a training.
NOT_TRAINING = ("preset", "out", "data_dir", "num_test", "batch_size_test")


def parse(
    presets: Mapping[str, Config],
    description: str | None = None,
    argv: Sequence[str] | None = None,
) -> Config:
    """Read typed flags; `--preset NAME` says which defaults they start from."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = next(iter(presets))
    for i, part in enumerate(argv):
        if part.startswith("--preset="):
            name = part.partition("=")[2]
        elif part == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
    default = presets.get(name, next(iter(presets.values())))
    return tyro.cli(type(default), default=default, args=argv, description=description)


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
    """Load a data set, hold `num_validation` training images out, cut the test set."""
    found = data.load(name, data_dir)
    train, held_out = data.split_validation(
        seed, found.x_train, found.y_train, num_validation
    )
    test = found.x_test[:num_test], found.y_test[:num_test]
    used = (
        f"{found.source}; {len(train[0]):,} trained on, {num_validation:,} held out "
        f"to choose the checkpoint, first {len(test[0]):,} test images"
    )
    return Splits(
        data.resident(*train, found.max_value),
        (_floats(held_out[0], found.max_value), held_out[1]),
        (_floats(test[0], found.max_value), test[1]),
        found.num_classes,
        used,
    )


def _floats(x: np.ndarray, max_value: int) -> np.ndarray:
    return np.asarray(data.to_float(x, max_value))


def training_part(config: Any) -> dict[str, Any]:
    """The fields of a config that decide what is trained: compared on resume."""
    fields = dataclasses.asdict(config)
    return {name: v for name, v in fields.items() if name not in NOT_TRAINING}


def validator(
    model: Model,
    examples: tuple[np.ndarray, np.ndarray],
    threat: rj.ThreatModel,
    attack_fn: rj.AttackFn,
    batch_size: int = 250,
) -> Callable[[Any, Any], dict[str, float]]:
    """`fit`'s `validate`: accuracy on clean and on attacked held-out images."""
    x, y = examples

    def validate(params: Any, extra: Any) -> dict[str, float]:
        f = logits_fn(model, params, extra)
        clean, robust = accuracies(f, x, y, threat, attack_fn, batch_size)
        return {"clean_accuracy": clean, "robust_accuracy": robust}

    return validate


def accuracies(f, x, y, threat, attack_fn, batch_size=250):
    clean = robust = 0
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        index = np.arange(len(x), dtype=np.int32)[rows]
        a, b = _attacked(f, x[rows], y[rows], threat, index, attack_fn)
        clean, robust = clean + int(a.sum()), robust + int(b.sum())
    return clean / len(x), robust / len(x)


@jax.jit(static_argnums=5)
def _attacked(f, x, y, threat, index, attack_fn):
    result = attack_fn(
        jax.random.key(0), rj.untargeted(f, x, y, threat, index=index)
    )
    clean = f(x).argmax(-1) == y
    return clean, clean & ~result.success


def save_results(out: str | Path, results: Mapping[str, Any], began: float) -> None:
    """Write `results.json` with seconds and provenance, and say where it is."""
    path = Path(out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = time.monotonic() - began
    write_json(path, {**results, "seconds": seconds, "provenance": provenance()})
    print(f"{path} ({duration(seconds)})")
