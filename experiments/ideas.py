"""What the experiments on ideas share: claims with bounds, results, small trainings.

Every experiment ends with `save(...)`: one `results.json` in the one schema of
docs/results.md, and one printed line for each claim, held or not.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import robustjax as rj
from experiments import common
from robustjax import data, models
from robustjax.methods.base import Method
from robustjax.training import optimizers
from robustjax.training.loop import Validate, fit
from robustjax.types import Batch


class Claim(NamedTuple):
    """A sentence, the number it is about, and the bounds between which it holds.

    says:  the claim in words, with the expected value.
    value: what was measured.
    low, high: the claim holds if `low <= value <= high`.
    """

    says: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether the value lies between the bounds; NaN never does."""
        return self.low <= self.value <= self.high


def save(
    out: str | Path,
    config: Any,
    claims: Mapping[str, Claim],
    measurements: Mapping[str, Any],
    figures: Sequence[str],
    began: common.Start,
) -> dict[str, Any]:
    """Print the claims and write `results.json`.

    Args:
      out: the folder.
      config: the frozen dataclass of the experiment.
      claims: name -> `Claim`.
      measurements: everything else that was measured: numbers, lists, dicts of them.
      figures: the file names of the pictures in `out`, the page's first one first.
      began: `common.start()`.

    Returns:
      What was written, beside the provenance.

    Raises:
      FileNotFoundError: a figure is not in `out`.
    """
    for name in figures:
        if not (Path(out) / name).is_file():
            raise FileNotFoundError(f"figure {name} is not in {out}: save it first.")
    rows = {}
    for name, one in claims.items():
        print(f"{'holds' if one.holds else 'FAILS':6} {one.says}: {one.value:.4g}")
        bounds = [None if math.isinf(b) else b for b in (one.low, one.high)]
        rows[name] = {
            "says": one.says,
            "value": one.value,
            "bounds": bounds,
            "holds": one.holds,
        }
    results = {
        "config": dataclasses.asdict(config),
        "claims": rows,
        "measurements": dict(measurements),
        "figures": list(figures),
    }
    return common.save_results(out, results, began)


def train(
    out: str | Path,
    name: str,
    model: models.Model,
    method: Method,
    train_set: data.Resident,
    config: Mapping[str, Any],
    *,
    num_epochs: int,
    batch_size: int = 64,
    peak: float = 5e-3,
    seed: int = 0,
    validate: Validate | None = None,
    epochs_per_checkpoint: int = 20,
) -> tuple[rj.LogitsFn, Any]:
    """One small net by one method: Adam, one cycle; goes on where it stopped.

    Args:
      out, name: the run's folder is `out/name`.
      model, method, train_set: what is trained, how, and on what.
      config: what decides the training, compared on resume.
      num_epochs, batch_size, peak, seed: the recipe; `peak` is the learning rate.
      validate, epochs_per_checkpoint: what is measured on the way, and how often. The
        weights of the end are returned, not those that `validate` likes best.

    Returns:
      Its logits function and `fit`'s result.
    """
    print(f"training {name}")
    per_epoch = data.steps_per_epoch(train_set.x.shape[0], batch_size)
    steps = num_epochs * per_epoch
    found = fit(
        jax.random.key(seed),
        model,
        method,
        optimizers.adam(common.learning_rate("one_cycle", peak, steps)),
        train_set,
        batch_size=batch_size,
        num_steps=steps,
        steps_per_dispatch=per_epoch,
        checkpoint_every=epochs_per_checkpoint * per_epoch,
        validate=validate,
        out=Path(out) / name,
        config={**config, "name": name, "peak": peak},
    )
    return models.logits_fn(model, found.state.params, found.state.extra), found


def step_seconds(
    model: models.Model,
    method: Method,
    train_set: data.Resident,
    *,
    batch_size: int = 64,
    repeats: int = 30,
) -> float:
    """Median seconds that a method's gradient of one batch takes, compiled."""
    index = jnp.arange(batch_size, dtype=jnp.int32)
    x = data.to_float(train_set.x[:batch_size], train_set.scale)
    batch = Batch(x, train_set.y[:batch_size], index)
    key = jax.random.key(0)
    params, extra = model.init(key, batch.x)
    carry = method.init(params, batch)
    grads = jax.jit(method.grads)
    times = []
    for _ in range(1 + repeats):  # the first one compiles
        began = time.monotonic()
        jax.block_until_ready(grads(params, extra, carry, batch, jnp.int32(0), key))
        times.append(time.monotonic() - began)
    return float(np.median(times[1:]))
