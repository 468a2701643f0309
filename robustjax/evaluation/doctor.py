"""The doctor: what about a model makes its robust accuracy doubtful, on few points.

Bad models are flagged and the evaluation goes on. Each check has a name, which is its
flag's name; docs/checks.md says of each how it is measured, its threshold, and what to
do. At most 64 examples are looked at, chosen by index, so order does not matter.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import losses
from robustjax.evaluation import masking
from robustjax.evaluation.checks import Flag
from robustjax.evaluation.driver import Driver, Model, Rows
from robustjax.threats import ThreatModel
from robustjax.types import Key, LogitsFn

NUM_CHECKED = 64
# Logits that differ by less than this fraction of their range are the same logits.
SAME, SAME_COMPANY = 1e-4, 1e-3
# A clean margin of 5 keeps cross-entropy's gradient far from underflow and from 1 - p.
USUAL_MARGIN = 5.0
CHANCE = 1e-3  # how often a test that compares accuracies may alarm by luck
DEAD, SATURATED, MANY = 1e-6, 1e-12, 0.1


class Diagnosis(NamedTuple):
    """What the doctor found.

    flags:  the findings, by name and message.
    checks: for each check `{"result": "ok" | "flagged" | "not run", "value": a number
            or None, "message": str}`.
    passes: forward and backward passes, summed over examples.
    random: the model answers differently when asked again.
    scale:  a power of two; attacks see `scale * logits`, whose median clean margin is
            about 5, so that saturation costs nothing.
    """

    flags: list[Flag]
    checks: dict[str, dict[str, Any]]
    passes: int
    random: bool
    scale: float


class _Chart:
    """What is written down during an examination: checks and passes."""

    def __init__(self, passes: float):
        self.checks: dict[str, dict[str, Any]] = {}
        self.left, self.spent = passes, 0

    def note(self, name: str, bad: Any, value: Any, message: str) -> None:
        result = "flagged" if bad else "ok"
        value = None if value is None else float(value)
        self.checks[name] = {"result": result, "value": value, "message": message}

    def skip(self, name: str, reason: str) -> None:
        self.checks[name] = {"result": "not run", "value": None, "message": reason}

    def pay(self, passes: int) -> None:
        self.spent += passes
        self.left -= passes

    def flags(self) -> list[Flag]:
        return [
            Flag(name, check["message"])
            for name, check in self.checks.items()
            if check["result"] == "flagged"
        ]


def chosen(index: np.ndarray, count: int = NUM_CHECKED) -> np.ndarray:
    """Places of `count` examples, spread over the set by index alone.

    >>> chosen(np.array([5, 1, 3]), 2), chosen(np.array([1, 3, 5]), 2)
    (array([0, 1]), array([2, 0]))
    """
    # Multiplied by the golden ratio of 2**32: neighbors, often of one class, part.
    drawn = index.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return np.argsort(drawn, kind="stable")[:count]


@jax.jit
def _forward(f, x, key):
    return f(x, key).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _largest_slope(loss, f, x, y, key):
    """`[B]` the largest entry of the input gradient; what is not finite counts as 0."""

    def total(x):
        return jnp.sum(loss(f(x, key), y))

    grad = jax.grad(total)(x)
    grad = jnp.where(jnp.isfinite(grad), grad, 0.0)
    return jnp.max(jnp.abs(grad).reshape(len(x), -1), axis=-1)


def doctor(
    f: LogitsFn,
    x: np.ndarray,
    y: np.ndarray,
    threat: ThreatModel,
    index: np.ndarray,
    key: Key,
    *,
    image_axes: str = "HWC",
    passes: float = math.inf,
    looped: bool = False,
) -> Diagnosis:
    """Examine a model on at most 64 examples; nothing raises.

    Args:
      f: `f(x, key)`, a `jax.tree_util.Partial`.
      x, y, index: `[N, ...]`, `[N]`, `[N]`: the whole set.
      threat: norm, epsilon and box.
      key: for random starts, and for models that are random.
      image_axes: order of an example's axes, "HWC" or "CHW".
      passes: forward and backward passes that may be spent, over all examples. What
        does not fit is not run, and says so.
      looped: see `driver.Driver`.

    >>> from robustjax.norms import Linf
    >>> x, y = np.eye(4, dtype=np.float32), np.arange(4)
    >>> f = jax.tree_util.Partial(lambda x, key: jax.nn.softmax(3 * x))
    >>> threat = ThreatModel(Linf(), 0.1)
    >>> found = doctor(f, x, y, threat, y, jax.random.key(0))
    >>> [flag.name for flag in found.flags]
    ['probabilities']
    """
    chart = _Chart(passes)
    index = np.asarray(index)
    take = chosen(index)
    x, y = np.asarray(x)[take], np.asarray(y)[take]
    key_clean, key_other, key_noise, key_attacks = jax.random.split(key, 4)

    def answers(x: np.ndarray, key: Key = key_clean) -> np.ndarray:
        chart.pay(len(x))
        return np.asarray(_forward(f, jnp.asarray(x, jnp.float32), key))

    logits = answers(x)
    _look_at_logits(chart, logits, y)
    random = _look_at_repeats(chart, answers, logits, x, key_other)
    _look_at_precision(chart, answers, x, threat, key_noise)
    _look_at_scale(chart, answers, logits, x, y, threat, image_axes)
    _look_at_slopes(chart, f, logits, x, y, threat, key_clean)
    margin = np.asarray(losses.margin(jnp.asarray(logits), jnp.asarray(y)))
    scale = usual_scale(margin)
    asked = Model(f, jnp.float32(scale)), key_attacks, image_axes, looped
    epsilon = np.asarray(threat.epsilon, np.float32)
    epsilon = np.broadcast_to(epsilon, index.shape)[take]
    rows: Any = (x, y, index[take].astype(np.int32), y, epsilon)
    _look_at_attacks(chart, asked, random, scale * margin, Rows(*rows), threat)
    return Diagnosis(chart.flags(), chart.checks, chart.spent, random, scale)


def usual_scale(margin: Any) -> float:
    """The power of two that brings the median positive margin nearest to 5.

    >>> usual_scale([5.0, 6.0, -1.0]), usual_scale([5e4]), usual_scale([0.0])
    (1.0, 0.0001220703125, 1.0)
    """
    margin = np.asarray(margin)
    margin = margin[np.isfinite(margin) & (margin > 0)]
    if not margin.size:
        return 1.0
    ratio = USUAL_MARGIN / float(np.median(margin))
    return float(2.0 ** np.clip(round(math.log2(ratio)), -60, 60))


def _spread(logits: np.ndarray) -> float:
    """The largest range of a row: what a difference of logits is measured by."""
    usable = np.where(np.isfinite(logits), logits, 0)
    return max(float(np.ptp(usable, axis=1).max()), 1e-30)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two answers, NaN where both are NaN being none."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.where(same, 0, np.abs(np.nan_to_num(a) - np.nan_to_num(b)))
    return float(gap.max())


def _look_at_logits(chart: _Chart, logits: np.ndarray, y: np.ndarray) -> None:
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


def _look_at_repeats(
    chart: _Chart, answers: Callable, logits: np.ndarray, x: np.ndarray, other: Key
) -> bool:
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
            "suite='rand' (EOT): else robustness is overstated."
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


def _look_at_precision(
    chart: _Chart, answers: Callable, x: np.ndarray, threat: ThreatModel, key: Key
) -> None:
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


def _look_at_scale(
    chart: _Chart,
    answers: Callable,
    logits: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    threat: ThreatModel,
    image_axes: str,
) -> None:
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


def _look_at_slopes(
    chart: _Chart,
    f: LogitsFn,
    logits: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    threat: ThreatModel,
    key: Key,
) -> None:
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
            f" (median margin {np.median(margin):.3g}): logits are too large. The "
            "suites of evaluate rescale them; elsewhere attack with margin_loss or dlr."
            if drowned.mean() > MANY
            else ""
        ),
    )


ATTACK_CHECKS = ("gradient masked", "more restarts gain", "unbounded attack fails")
STEPS, FEWEST_POINTS = (40, 25), 12


def _look_at_attacks(
    chart: _Chart,
    asked: tuple[Model, Key, str, bool],
    random: bool,
    margin: np.ndarray,
    rows: Rows,
    threat: ThreatModel,
) -> None:
    """The checks that need attacks: on correct examples, as many as can be paid."""
    model, key, image_axes, looped = asked
    key_attacks, key_judge = jax.random.split(key)
    correct = np.flatnonzero(np.isfinite(margin) & (margin > 0))
    affordable = [(min(len(correct), chart.left / masking.cost(n)), n) for n in STEPS]
    count, steps = max(affordable)
    if random or count < FEWEST_POINTS:
        reason = f"{len(correct)} correctly classified examples are too few"
        if len(correct) >= FEWEST_POINTS:
            reason = f"{chart.left:.0f} passes are too few: give more examples"
        if random:
            reason = "the model is random: its suite is 'rand'"
        for name in ATTACK_CHECKS:
            chart.skip(name, reason)
        return
    take = correct[: int(count)]
    # Few shapes: by what can be paid, not by how many happen to be correct.
    shape = 16 if chart.left / masking.cost(steps) <= 16 else NUM_CHECKED
    driver = Driver(model, threat, (shape,), looped, None, key_judge[None])
    rows = Rows(*(leaf[take] for leaf in rows))
    found = masking.compare(driver, rows, margin[take], key_attacks, steps, image_axes)
    chart.pay(found.passes)
    _judge_evidence(chart, found)


def _judge_evidence(chart: _Chart, found: masking.Evidence) -> None:
    reasons = masking.reasons(found)
    chart.note(
        "gradient masked",
        reasons,
        found.disagree,
        "the gradient misleads attacks: "
        + "; ".join(reasons)
        + ". Robustness is overstated by gradient attacks: use suite='strong', an "
        "adaptive attack (attacks=...), or bpda."
        if reasons
        else f"of {found.points} examples APGD left {found.left}; no attack from "
        "elsewhere broke more than chance, and its runs agree",
    )
    more = found.restart
    share = more / max(found.left + more, 1)
    bad = more >= masking.LEAST_RESTART and share > masking.SHARE_RESTART
    chart.note(
        "more restarts gain",
        bad,
        share,
        f"a second start of the same attacks broke {more} of {found.left + more} "
        "examples that the first had left"
        + (": more steps and restarts will break more." if bad else ""),
    )
    left = found.unbroken
    bad = left >= 2 and left > masking.SHARE * found.points
    chart.note(
        "unbounded attack fails",
        bad,
        left / found.points,
        f"with the whole box allowed, {left} of {found.points} examples resist"
        + (
            ", where every attack must succeed: the gradient is of no use, or steps "
            "are too small."
            if bad
            else ""
        ),
    )


def after(
    broken_by: Mapping[str, np.ndarray], score_based: Sequence[str] = ("square",)
) -> list[Flag]:
    """What only a finished suite can tell: the flag "gradient masked", or nothing.

    Square breaks what every gradient attack before it missed: more than 0.2 % of the
    examples, at least 2, and more than a luck of 0.2 % explains (in one of a hundred
    evaluations).

    Args:
      broken_by: in the order of the suite, a name and `[N]` bool: what each attack
        broke that those before it had left.
      score_based: names of the attacks that use no gradient; a name in `broken_by`
        belongs to the one that it begins with.

    >>> broken = {"apgd-ce": np.arange(500) < 90, "square": np.arange(500) > 490}
    >>> [flag.name for flag in after(broken)]
    ['gradient masked']
    """
    flags = []
    before = None
    for name, broken in broken_by.items():
        broken = np.asarray(broken)
        before = np.zeros_like(broken) if before is None else before
        won = int((broken & ~before).sum())
        if name.startswith(tuple(score_based)) and before.any() | won:
            least = max(2, 0.002 * len(broken))
            if won >= least and _tail(won, len(broken), 0.002) < 0.01:
                flags.append(
                    Flag(
                        "gradient masked",
                        f"{name}, which uses no gradient, broke {won} of {len(broken)} "
                        "examples that every gradient attack before it had missed: "
                        "the gradient misleads. Use suite='strong' or an adaptive "
                        "attack (attacks=...).",
                    )
                )
        before = before | broken
    return flags


def _tail(count: int, trials: int, chance: float) -> float:
    """How likely `count` or more successes are, by the Poisson law.

    >>> round(_tail(3, 500, 0.002), 3), round(_tail(6, 500, 0.002), 4)
    (0.08, 0.0006)
    """
    mean = trials * chance
    below = sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(count))
    return max(0.0, 1.0 - below)
