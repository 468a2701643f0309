"""What every training experiment watches while it runs, and leaves at its end."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

import robustjax as rj
from robustjax import data, models, plots
from robustjax.data import Resident
from robustjax.parallel import is_writer
from robustjax.training import monitors
from robustjax.training.arguments import check_counts
from robustjax.training.curves import draw_run
from robustjax.training.loop import FitResult, Validate
from robustjax.training.optimizers import Schedule
from robustjax.training.tensorboard import to_tensorboard

Collapse = Literal["warn", "stop", "restore"]
Examples = tuple[np.ndarray, np.ndarray]
Threats = rj.ThreatModel | Mapping[str, rj.ThreatModel]


def watch(
    model: models.Model,
    threat: Threats,
    held_out: Examples,
    seen: Examples,
    *,
    num_attacked: int,
    num_monitored: int,
    everything: bool = True,
    on_collapse: Collapse | None = None,
    mesh: Any = None,
) -> Validate:
    """`fit`'s `validate`: accuracies on held-out and on training images and their gap,
    how steep and straight the loss is, and whether a single-step method collapsed.

    Of several threats: robust is who withstands every one; the rest is of the first.

    Args:
      model, threat: what is trained, against what.
      held_out: `(x, y)`, floats; they choose the checkpoint.
      seen: the same of training images.
      num_attacked: how many of the held-out ones PGD-10 attacks.
      num_monitored: how many of both the monitors look at.
      everything: False: only what chooses the checkpoint, and `on_collapse`.
      on_collapse: watch for catastrophic overfitting, and what to do about it.
      mesh: of the training.
    """
    check_counts(num_attacked=num_attacked, num_monitored=num_monitored)
    if min(len(held_out[0]), len(seen[0])) == 0:
        raise ValueError(
            f"{len(held_out[0])} held-out and {len(seen[0])} training images are "
            "watched: hold one or more out (num_validation), and leave some."
        )
    one = threat if isinstance(threat, rj.ThreatModel) else next(iter(threat.values()))
    seen, some = ((x[:num_monitored], y[:num_monitored]) for x, y in (seen, held_out))
    parts: list[monitors.Monitor] = [
        validator(model, held_out, threat, num_attacked, mesh)
    ]
    robust = "train_robust_accuracy"
    if on_collapse is not None:  # PGD-10 attacks the same images
        robust = "train_pgd_accuracy"
        collapse = monitors.catastrophic_overfitting
        parts.append(collapse(model, one, seen, on_collapse))
    elif everything:
        parts.append(validator(model, seen, threat, num_monitored, mesh, "train_"))
    if everything:
        parts.append(monitors.smoothness(model, one, some))
    watched = monitors.together(*parts)

    def validate(params: Any, extra: Any) -> dict[str, float]:
        found = dict(watched(params, extra))
        if everything:
            found["robust_gap"] = found[robust] - found["robust_accuracy"]
        return found

    return validate


def validator(
    model: models.Model,
    examples: Examples,
    threat: Threats,
    count: int,
    mesh: Any = None,
    prefix: str = "",
) -> Callable[[Any, Any], dict[str, float]]:
    """Accuracy on the first `count` examples, clean and by PGD-10.

    Of several threats: correct under every one.
    """
    attacks = {"PGD-10": rj.pgd(10)}
    x, y = examples[0][:count], examples[1][:count]

    def validate(params: Any, extra: Any) -> dict[str, float]:
        report = rj.evaluate(
            models.logits_fn(model, params, extra),
            *(x, y, threat),
            suite=None,
            attacks=attacks,
            batch_size=100,
            checks="none",
            progress=False,
            mesh=mesh,
        )
        return {
            f"{prefix}clean_accuracy": report.clean_accuracy,
            f"{prefix}robust_accuracy": report.robust_accuracy,
        }

    return validate


def first(train: Resident, count: int) -> Examples:
    """The first training images, as floats in the model's box."""
    x = np.asarray(data.to_float(train.x[:count], train.scale))
    return x, np.asarray(train.y[:count])


def keep_curves(
    out: str | Path, trained: FitResult, learning_rate: Schedule | None = None
) -> None:
    """`curves.png` in a run's folder; event files where TensorBoard is installed."""
    if not is_writer():
        return
    plots.save(draw_run(trained.history, learning_rate), Path(out) / "curves.png")
    with contextlib.suppress(ImportError):
        to_tensorboard(out)
