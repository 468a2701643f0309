"""The doctor's checks that ask the model and attack nothing: one function each.

Every function writes what it found onto a `Chart`, under the names of docs/checks.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import losses
from robustjax.evaluation.checks import Flag
from robustjax.threats import ThreatModel
from robustjax.types import Key, LogitsFn

# Logits that differ by less than this fraction of their range are the same logits.
SAME, SAME_COMPANY = 1e-4, 1e-3
CHANCE = 1e-3  # how often a test that compares accuracies may alarm by luck
DEAD, SATURATED, MANY = 1e-6, 1e-12, 0.1


class Chart:
    """What is written down during an examination: checks and passes."""

    def __init__(self, passes: float):
        self.checks: dict[str, dict[str, Any]] = {}
        self.left, self.spent = passes, 0

    def note(self, name: str, bad: Any, value: Any, message: str) -> None:
        """A check was made: what it measured, and whether that is bad."""
        result = "flagged" if bad else "ok"
        value = None if value is None else float(value)
        self.checks[name] = {"result": result, "value": value, "message": message}

    def skip(self, name: str, reason: str) -> None:
        """A check was not made."""
        self.checks[name] = {"result": "not run", "value": None, "message": reason}

    def pay(self, passes: int) -> None:
        """Passes were spent."""
        self.spent += passes
        self.left -= passes

    def flags(self) -> list[Flag]:
        """The checks that came out bad."""
        return [
            Flag(name, check["message"])
            for name, check in self.checks.items()
            if check["result"] == "flagged"
        ]


@functools.partial(jax.jit, static_argnums=0)
def _largest_slope(loss, f, x, y, key):
    """`[B]` the largest entry of the input gradient; what is not finite counts as 0."""

    def total(x):
        return jnp.sum(loss(f(x, key), y))

    grad = jax.grad(total)(x)
    grad = jnp.where(jnp.isfinite(grad), grad, 0.0)
    return jnp.max(jnp.abs(grad).reshape(len(x), -1), axis=-1)


def _spread(logits: np.ndarray) -> float:
    """The largest range of a row: what a difference of logits is measured by."""
    usable = np.where(np.isfinite(logits), logits, 0)
    return max(float(np.ptp(usable, axis=1).max()), 1e-30)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two answers, NaN where both are NaN being none."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(same, 0, np.abs(np.nan_to_num(a) - np.nan_to_num(b)))
    return float(gap.max())


def look_at_logits(chart: Chart, logits: np.ndarray, y: np.ndarray) -> None:
    """Clean logits: finite, not probabilities, better than chance, how many classes."""
    count, classes = logits.shape
    rows = (~np.isfinite(logits)).any(1)
    chart.note(
        "non-finite logits",
        rows.any(),
        rows.mean(),
        f"{rows.sum()} of {count} clean examples get NaN or infinite logits. Examples "
        "with NaN count as broken; attacks see no gradient there.",
    )
    clean = logits[~rows]
    inside = clean.size and clean.min() >= 0 and clean.max() <= 1
    sums = bool(inside and np.allclose(clean.sum(1), 1, atol=1e-3))
    message = "no row of outputs sums to 1"
    if sums:
        message = (
            "the model returns probabilities (rows sum to 1, all in [0, 1]). Their "
            "cross-entropy saturates and attacks stall: robustness is overstated. "
            "Return the logits, before softmax."
        )
    elif clean.size and np.abs(np.logaddexp.reduce(clean, axis=1)).max() < 1e-4:
        message = (
            "the outputs are log-probabilities (log-softmax): attacks work on them as "
            "on logits"
        )
    chart.note("probabilities", sums, None, message)
    accuracy = float(np.mean(logits.argmax(1) == y))
    luck = 1 / classes + 2 * math.sqrt(1 / classes / count)
    if count < 32:
        chart.skip("clean accuracy at chance", f"{count} examples are too few")
    else:
        chart.note(
            "clean accuracy at chance",
            accuracy <= luck,
            accuracy,
            f"clean accuracy on {count} examples is {accuracy:.2f} with {classes} "
            "classes: are labels, input scale and axes what the model wants?",
        )
    message = f"{classes} classes: every loss is defined"
    if classes == 2:
        message = "2 classes: DLR and targeted DLR fall back to the margin"
    if classes == 3:
        message = "3 classes: targeted DLR divides by z_(1) - z_(3), there is no z_(4)"
    chart.note("few classes", False, classes, message)


def look_at_repeats(
    chart: Chart, answers: Callable, logits: np.ndarray, x: np.ndarray, other: Key
) -> bool:
    """Ask again, with another key, in other company; returns whether it is random."""
    spread = _spread(logits)
    again = _difference(answers(x), logits) / spread
    otherwise = _difference(answers(x, other), logits) / spread
    random = max(again, otherwise) > SAME
    how = "with the same key" if again > SAME else "with another key"
    message = "the same answer again, with the same key and with another"
    if random:
        message = (
            f"the model answers differently when asked again {how} (by "
            f"{max(again, otherwise):.2g} of the logits' range): noise, or dropout "
            "left on? Switch it off; or, if it is the defense, evaluate with "
            "suite='rand' (EOT). Other suites follow one draw's gradient, and take "
            "every new draw as another chance: their numbers mean little."
        )
        if again > SAME:
            message += (
                " Noise must come from the key: another source breaks repeatability."
            )
    chart.note("random", random, max(again, otherwise), message)
    name = "depends on the batch"
    if len(x) < 2:
        chart.skip(name, "one example has no company")
    elif again > SAME:
        chart.skip(name, "the model is random with the same key")
    else:
        # The same shape, so nothing compiles: one example as the whole batch, and every
        # second row exchanged. Rows stay in place, so noise drawn by place stays too.
        alone = answers(np.repeat(x[:1], len(x), axis=0))[:1]
        mixed = x.copy()
        mixed[1::2] = x[::-1][1::2] if len(x) > 2 else x[:1]
        gap = _difference(alone, logits[:1])
        gap = max(gap, _difference(answers(mixed)[::2], logits[::2])) / spread
        chart.note(
            name,
            gap > SAME_COMPANY,
            gap,
            f"an example's logits change by {gap:.2g} of their range with the other "
            "examples of its batch"
            + (
                ": BatchNorm in train mode? Evaluate in inference mode."
                if gap > SAME_COMPANY
                else ""
            ),
        )
    return random


def look_at_precision(
    chart: Chart, answers: Callable, x: np.ndarray, threat: ThreatModel, key: Key
) -> None:
    """Whether the logits of slightly noisy inputs have fewer digits than float32."""
    # Noise: images of few gray values may have few logits without any fault.
    low, high = np.asarray(threat.lower), np.asarray(threat.upper)
    noise = np.asarray(jax.random.uniform(key, x.shape, minval=-0.5, maxval=0.5))
    x = np.clip(x + 0.01 * (high - low) * noise, low, high)
    values = answers(x).ravel()
    values = values[np.isfinite(values) & (values != 0)]
    kind, distinct = None, 1.0
    if values.size:
        distinct = len(np.unique(values)) / values.size
        kinds = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}
        for name, dtype in kinds.items():
            rounded = np.asarray(jnp.asarray(values).astype(dtype), np.float32)
            if (rounded == values).all():
                kind = name
    bad = kind is not None or distinct < 0.5
    what = f"logits have no more digits than {kind}" if kind else "logits repeat"
    chart.note(
        "low precision",
        bad,
        distinct,
        f"{what} ({distinct:.0%} of {values.size} are distinct): ties hide gradients "
        "and small margins. Compute the last layers in float32, without rounding."
        if bad
        else f"{distinct:.0%} of {values.size} logits are distinct",
    )


def look_at_scale(
    chart: Chart,
    answers: Callable,
    logits: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    threat: ThreatModel,
    image_axes: str,
) -> None:
    """Whether accuracy rises on inputs of another scale, or normalized outside."""
    low, high = np.asarray(threat.lower), np.asarray(threat.upper)
    unit = (x - low) / (high - low)
    channels = image_axes.index("C") + 1 if x.ndim == 4 and image_axes else None
    axes = tuple(a for a in range(x.ndim) if a != channels)
    mean, std = unit.mean(axes, keepdims=True), unit.std(axes, keepdims=True) + 1e-6
    tried = {
        "input scale": {"[0, 255]": 255 * unit, "[0, 1]": unit},
        "normalization outside": {
            "mean 0 and deviation 1": (unit - mean) / std,
            "[-1, 1]": 2 * unit - 1,
        },
    }
    fixes = {
        "input scale": "let the model scale its inputs itself",
        "normalization outside": "put the normalization inside the model",
    }
    if len(x) < 16:
        for name in tried:
            chart.skip(name, f"{len(x)} examples are too few")
        return
    correct = logits.argmax(1) == y
    best: dict[str, tuple[float, bool, str]] = {}
    for name, variants in tried.items():
        for what, inputs in variants.items():
            now = answers(inputs).argmax(1) == y
            won, lost = int((now & ~correct).sum()), int((correct & ~now).sum())
            gain = (won - lost) / len(y)
            bad = gain >= 0.05 and _luck(won, won + lost) < CHANCE
            if name not in best or gain > best[name][0]:
                best[name] = (gain, bad, what)
    # At a tie (255 is as good as infinity to a ReLU net) it is the milder change.
    leader = max(reversed(best), key=lambda name: best[name][0])
    for name, (gain, bad, what) in best.items():
        bad = bad and name == leader
        chart.note(
            name,
            bad,
            gain,
            f"clean accuracy is {correct.mean():.2f}, and {correct.mean() + gain:.2f} "
            f"on the same inputs brought to {what}"
            + (f": {fixes[name]}, and keep x in its box." if bad else ""),
        )


def _luck(heads: int, tosses: int) -> float:
    """How likely so many heads or more are with a fair coin.

    >>> _luck(2, 2), _luck(0, 0)
    (0.25, 1.0)
    """
    return sum(math.comb(tosses, k) for k in range(heads, tosses + 1)) / 2**tosses


def note_opaque(chart: Chart, reason: str) -> None:
    """The model has no gradient at all: nothing that needs one can be checked."""
    chart.note(
        "vanishing gradient",
        True,
        None,
        f"the model cannot be differentiated ({reason}). Gradient attacks do not run "
        "on it; score-based ones such as square do, and alone they overstate "
        "robustness. Give what has no gradient one by bpda, or attack a surrogate.",
    )
    chart.skip("saturated loss", "the model cannot be differentiated")


def look_at_slopes(
    chart: Chart,
    f: LogitsFn,
    logits: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    threat: ThreatModel,
    key: Key,
) -> None:
    """Whether the margin's or the cross-entropy's input gradient vanishes."""
    arrays = jnp.asarray(x, jnp.float32), jnp.asarray(y)
    of_margin = np.asarray(_largest_slope(losses.margin_loss, f, *arrays, key))
    of_entropy = np.asarray(_largest_slope(losses.cross_entropy, f, *arrays, key))
    chart.pay(4 * len(x))
    width = float(np.max(np.asarray(threat.upper) - np.asarray(threat.lower)))
    margin = np.abs(np.asarray(losses.margin(jnp.asarray(logits), arrays[1])))
    # Across the whole box the linear model would not move the margin by a millionth.
    dead = of_margin * width <= DEAD * margin
    chart.note(
        "vanishing gradient",
        dead.mean() > MANY,
        dead.mean(),
        f"the margin's input gradient is 0, negligible or not finite for {dead.sum()} "
        f"of {len(x)} examples"
        + (
            ": rounding, a step, saturation or stop_gradient hides it. Attack with "
            "bpda where a step has no gradient, and trust score-based attacks only."
            if dead.mean() > MANY
            else ""
        ),
    )
    drowned = ~dead & (of_entropy <= SATURATED * of_margin)
    chart.note(
        "saturated loss",
        drowned.mean() > MANY,
        drowned.mean(),
        f"cross-entropy's gradient underflows where the margin's does not for "
        f"{drowned.sum()} of {len(x)} examples"
        + (
            f" (median margin {np.median(margin):.3g}): logits are too large. "
            "suite='fast' and 'strong' rescale them; 'standard' follows its authors "
            "and does not. Attacks of your own: margin_loss or dlr."
            if drowned.mean() > MANY
            else ""
        ),
    )
