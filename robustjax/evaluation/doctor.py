"""The doctor: what about a model makes its robust accuracy doubtful, on few points.

Bad models are flagged and the evaluation goes on. Each check has a name, which is its
flag's name; docs/checks.md says of each how it is measured, its threshold, and what to
do. At most 64 examples are looked at, chosen by index, so order does not matter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from robustjax import losses
from robustjax.evaluation import masking, symptoms
from robustjax.evaluation.checks import Flag
from robustjax.evaluation.judge import Driver, Model
from robustjax.evaluation.prepare import no_gradient
from robustjax.evaluation.stage import Rows
from robustjax.evaluation.symptoms import Chart
from robustjax.norms import L0
from robustjax.threats import ThreatModel
from robustjax.types import Key, LogitsFn

NUM_CHECKED = 64
# A clean margin of 5 keeps cross-entropy's gradient far from underflow and from 1 - p.
USUAL_MARGIN = 5.0


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
      threat: norm, epsilon and box; where it is infinite see `finite_box`.
      key: for random starts, and for models that are random.
      image_axes: order of an example's axes, "HWC" or "CHW".
      passes: forward and backward passes that may be spent, over all examples. What
        does not fit is not run, and says so.
      looped: see `judge.Driver`.

    >>> from robustjax.norms import Linf
    >>> x, y = np.eye(4, dtype=np.float32), np.arange(4)
    >>> f = jax.tree_util.Partial(lambda x, key: jax.nn.softmax(3 * x))
    >>> threat = ThreatModel(Linf(), 0.1)
    >>> found = doctor(f, x, y, threat, y, jax.random.key(0))
    >>> [flag.name for flag in found.flags]
    ['probabilities']
    """
    chart = Chart(passes)
    index = np.asarray(index)
    take = chosen(index)
    x, y = np.asarray(x)[take], np.asarray(y)[take]
    box = finite_box(threat, x)
    key_clean, key_other, key_noise, key_attacks = jax.random.split(key, 4)

    def answers(x: np.ndarray, key: Key = key_clean) -> np.ndarray:
        chart.pay(len(x))
        return np.asarray(_forward(f, jnp.asarray(x, jnp.float32), key))

    logits = answers(x)
    symptoms.look_at_logits(chart, logits, y)
    random = symptoms.look_at_repeats(chart, answers, logits, x, key_other)
    symptoms.look_at_precision(chart, answers, x, box, key_noise)
    symptoms.look_at_scale(chart, answers, logits, x, y, box, image_axes)
    opaque = no_gradient(f, x)
    if opaque is None:
        symptoms.look_at_slopes(chart, f, logits, x, y, box, key_clean)
    else:
        symptoms.note_opaque(chart, opaque)
    margin = np.asarray(losses.margin(jnp.asarray(logits), jnp.asarray(y)))
    scale = usual_scale(margin)
    asked = Model(f, jnp.float32(scale)), key_attacks, image_axes, looped
    epsilon = np.asarray(threat.epsilon, np.float32)
    epsilon = np.broadcast_to(epsilon, index.shape)[take]
    rows: Any = (x, y, index[take].astype(np.int32), y, epsilon)
    if opaque is None:
        _look_at_attacks(chart, asked, random, scale * margin, Rows(*rows), threat)
    else:
        for name in ATTACK_CHECKS:
            chart.skip(name, "the model cannot be differentiated")
    return Diagnosis(chart.flags(), chart.checks, chart.spent, random, scale)


def finite_box(threat: ThreatModel, x: Any, ball: bool = False) -> ThreatModel:
    """The threat with the data's range, and a little more, where its box is infinite.

    Checks measure in widths of the box, and look for points anywhere in it.

    Args:
      threat: a finite box stays as it is.
      x: `[N, ...]` the data that are looked at.
      ball: with room for every example's ball too, so that this box cuts none.

    >>> from robustjax.threats import linf
    >>> found = finite_box(linf(0.5, 0.0, np.inf), np.array([[0.0, 2.0]]), ball=True)
    >>> float(found.lower), float(found.upper)
    (0.0, 2.5)
    """
    lower, upper = np.asarray(threat.lower), np.asarray(threat.upper)
    if np.isfinite(lower).all() and np.isfinite(upper).all():
        return threat
    low, high = float(np.min(x)), float(np.max(x))
    # A thousandth: data that do not vary still have a box with a width.
    more = 1e-3 * ((high - low) or 1.0)
    epsilon = np.asarray(threat.epsilon)
    if ball and not isinstance(threat.norm, L0):
        more = float(np.max(epsilon[np.isfinite(epsilon)], initial=more))
    lower = np.where(np.isfinite(lower), lower, low - more)
    upper = np.where(np.isfinite(upper), upper, high + more)
    return ThreatModel(threat.norm, threat.epsilon, lower, upper)


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


ATTACK_CHECKS = ("gradient masked", "more restarts gain", "unbounded attack fails")
STEPS, FEWEST_POINTS = (40, 25), 12


def _look_at_attacks(
    chart: Chart,
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
    # Half is kept for long runs, where that pays for enough of them.
    kept = chart.left / 2
    kept = kept if kept >= masking.FEWEST * masking.long_cost() else 0
    spare = chart.left - kept if math.isfinite(chart.left) else math.inf
    affordable = [(min(len(correct), spare / masking.cost(n)), n) for n in STEPS]
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
    shape = 16 if spare / masking.cost(steps) <= 16 else NUM_CHECKED
    wide = finite_box(threat, rows.x, ball=True)
    driver = Driver(model, wide, (shape,), looped, None, key_judge[None])
    rows = Rows(*(leaf[take] for leaf in rows))
    found = masking.compare(
        *(driver, rows, margin[take], key_attacks, steps, image_axes, chart.left)
    )
    chart.pay(found.passes)
    whole = "box" if wide is threat else "range of these data"
    _judge_evidence(chart, found, whole)


def _misleads(reasons: Sequence[str], found: masking.Evidence) -> str:
    advice = "use suite='strong', an adaptive attack (attacks=...), or bpda."
    if found.one_step + found.far + found.search or (found.lower or 0) > masking.LOWER:
        return (
            f"the gradient misleads attacks: {'; '.join(reasons)}. Robustness is "
            f"overstated by gradient attacks: {advice}"
        )
    return (
        f"the gradient may mislead attacks: {'; '.join(reasons)}, so that there are "
        f"many maxima; no attack from elsewhere broke more. To be sure {advice}"
    )


def _agreement(found: masking.Evidence) -> str:
    if (found.disagree or 0) <= masking.DISAGREE:
        return "its runs agree"
    if found.settled is not None:
        return f"its runs agree after {masking.LONG} steps"
    return (
        f"its short runs end {found.disagree:.1%} apart, which may be slow "
        "convergence: give more examples to tell"
    )


def _judge_evidence(chart: Chart, found: masking.Evidence, whole: str) -> None:
    reasons = masking.reasons(found)
    chart.note(
        "gradient masked",
        reasons,
        found.disagree,
        _misleads(reasons, found)
        if reasons
        else f"of {found.points} examples APGD left {found.left}; no attack from "
        f"elsewhere broke more than chance, and {_agreement(found)}",
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
        f"with the whole {whole} allowed, {left} of {found.points} examples resist"
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
    evaluations). Where no gradient attack came before it, it tells nothing.

    Args:
      broken_by: in the order of the suite, a name and `[N]` bool: what each attack
        broke that those before it had left.
      score_based: names of the attacks that use no gradient; a name in `broken_by`
        belongs to the one that it begins with.

    >>> broken = {"apgd-ce": np.arange(500) < 90, "square": np.arange(500) > 490}
    >>> [flag.name for flag in after(broken)], after({"square": broken["square"]})
    (['gradient masked'], [])
    """
    flags = []
    before, followed = None, False
    for name, broken in broken_by.items():
        broken = np.asarray(broken)
        before = np.zeros_like(broken) if before is None else before
        won = int((broken & ~before).sum())
        if not name.startswith(tuple(score_based)):
            followed = True  # some attack has followed the gradient by now
        elif followed:
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
