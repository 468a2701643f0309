"""The table, the picture and the claims of `compare_methods`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments import ideas
from experiments.contestants import CONTESTANTS, MULTINORM, SINGLE
from robustjax import plots

NORMS = ("Linf", "L2", "L1")
NEAR = 0.15  # of the best row's robust accuracy: what a panel of its own shows
MARK = ("color", "marker")


def summarize(name: str, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds; and how far from the yardstick, with a 95 % interval.

    With one seed in common the interval is over test images alone: what another
    training would give is not in it. From two on, `half = sqrt((1.96 s / sqrt(n))^2 +
    (t d / sqrt(m))^2)`: s is the deviation over the n images of the mean over seeds, d
    that of the difference over the m seeds, t Student's quantile for m - 1.
    """
    one, runs = CONTESTANTS[name], rows[name]
    aim, yardstick = ("union", "madry_linf") if one.union else ("Linf", "madry")
    right = {n: np.array([r["right"][n] for r in runs]) for n in runs[0]["right"]}
    found: dict[str, Any] = {
        "accuracy": {n: float(v.mean()) for n, v in right.items()},
        "per_seed": {n: v.mean(1) for n, v in right.items()},
        "robust": float(right[aim].mean()),
        "gradients_per_update": one.gradients,
        "expected": one.expect,
        "flags": sorted({flag for r in runs for flag in r["flags"]}),
    }
    for number in ("updates", "gradients", "group", "epochs", "collapsed"):
        found[number] = max(r[number] for r in runs)
    for number in ("seconds", "cpu_seconds"):
        found[number] = float(np.mean([r[number] for r in runs]))
    if yardstick in rows and name != yardstick:
        ours, theirs = (
            {r["seed"]: np.asarray(r["right"][aim], float) for r in rows[n]}
            for n in (name, yardstick)
        )
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            return found
        each = np.array([ours[seed] - theirs[seed] for seed in seeds])
        half = 1.96 * each.mean(0).std(ddof=1) / each.shape[1] ** 0.5
        if len(seeds) > 1:
            quantile = stats.t.ppf(0.975, len(seeds) - 1)
            by_seed = quantile * each.mean(1).std(ddof=1) / len(seeds) ** 0.5
            half = np.hypot(half, by_seed)
        found["minus_yardstick"] = float(each.mean())
        found["half_interval"] = float(half)
    return found


def claims_of(summary: Mapping[str, Any], budget: float) -> dict[str, ideas.Claim]:
    """Equal budgets; where the group is complete, that the union can be learned."""
    rest = max((budget - one["gradients"]) / one["group"] for one in summary.values())
    claims = {
        "equal_budget": ideas.Claim(
            "what is left of a budget, in updates, 0 to below 1 (of Free and CAT: "
            "groups of 8)",
            *(rest, 0.0, np.nextafter(1.0, 0.0)),
        )
    }
    if set(MULTINORM) <= set(summary):
        several = [n for n in MULTINORM if n not in SINGLE]
        best, single = (
            max(summary[n]["robust"] for n in group) for group in (several, SINGLE)
        )
        claims["union"] = ideas.Claim(
            "union accuracy, best multi-norm minus best single-norm method, above 0",
            *(best - single, 1e-9),
        )
    return claims


def table(
    summary: Mapping[str, Any],
    failed: Mapping[str, str],
    told: Sequence[str],
    count: int,
) -> str:
    """Markdown: a table of the methods against Linf, and one of the multi-norm ones.

    Args:
      summary, failed: name -> `summarize`, and what came to no end.
      told: lines to begin with: net, budget, threats, data.
      count: how many test images.
    """
    text = [
        *told,
        'Robust: `evaluate(suite="fast")`. One standard error of '
        f"one net's accuracy at 0.5 is {0.5 / count**0.5:.3f}; the column +- is the "
        "95 % interval of the difference to the yardstick, over images (of several "
        "seeds over these, too; of one, another training may part by more), of the "
        "seeds that both have. !: an "
        "attack or check found signs of masked gradients; *: FGSM and PGD parted on "
        "training images (catastrophic overfitting). Seconds are those of training: "
        "CPU with compiling, wall without.",
    ]
    text += [f"No end: {run}: {error}" for run, error in failed.items()]
    for union in (False, True):
        names = [n for n in summary if CONTESTANTS[n].union == union]
        if not names:
            continue
        robust = [*NORMS, "union"] if union else ["Linf"]
        yardstick = "madry_linf" if union else "madry"
        head = ["method", "gradients / update", "updates", "epochs", "clean", *robust]
        head += [f"{robust[-1]} - {yardstick}", "CPU s", "wall s", "expected"]
        text += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name in names:
            one = summary[name]
            mark = "!" * bool(one["flags"]) + "*" * bool(one["collapsed"])
            cells = [name + mark, f"{one['gradients_per_update']:g}"]
            cells += [f"{one['updates']:,}", f"{one['epochs']:.1f}"]
            cells += [spread(one["per_seed"][n]) for n in ("clean", *robust)]
            minus = "-"
            if "half_interval" in one:
                minus = f"{one['minus_yardstick']:+.3f} +- {one['half_interval']:.3f}"
            cells += [minus, f"{one['cpu_seconds']:.0f}", f"{one['seconds']:.0f}"]
            cells += [one["expected"]]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def spread(values: np.ndarray) -> str:
    """The mean, and of several seeds the smallest and the largest."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def draw(summary: Mapping[str, Any]):
    """Clean against robust accuracy, a number for each row.

    A panel for each group; beside it what lies near the best row, where there is more.
    """
    panels = []
    for union in (False, True):
        names = [n for n in summary if CONTESTANTS[n].union == union]
        if not names:
            continue
        best = max(summary[n]["robust"] for n in names)
        near = [n for n in names if summary[n]["robust"] > best - NEAR]
        closer = 5 <= len(near) < len(names)
        told = [n for n in names if n not in near] if closer else names
        panels.append((names, names, told))
        if closer:
            panels.append((names, near, near))
    figure, marked = plots.new_figure(5.5 * len(panels), 4.6), []
    for axes, (names, shown, told) in zip(
        np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels, strict=True
    ):
        aim = "union" if CONTESTANTS[names[0]].union else "Linf"
        points = []
        for number, name in enumerate(names):
            if name not in shown:
                continue
            per_seed, look = summary[name]["per_seed"], plots.style(number)
            for clean, robust in zip(per_seed["clean"], per_seed[aim], strict=True):
                axes.plot(
                    *(clean, robust),
                    color=look["color"],
                    marker=look["marker"],
                    markersize=7,
                    linestyle="",
                )
                points.append((clean, robust, str(number + 1) if name in told else ""))
        label = "union of Linf, L2, L1" if aim == "union" else "Linf"
        axes.set(xlabel="clean accuracy", ylabel=f"robust accuracy, {label}")
        plots.tidy(axes)
        if told is shown:  # the last panel of the group
            legend(axes, names)
        marked.append((axes, points))
    figure.draw_without_rendering()  # settles where the points lie
    for axes, points in marked:
        annotate(axes, points)
    return figure


def annotate(axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's text where points and texts so far leave room."""
    at = axes.transData.transform([point[:2] for point in points])
    at = at * 72 / axes.figure.dpi  # in typographic points
    texts: list[np.ndarray] = []
    for index, (x, y, text) in enumerate(points):
        if not text:
            continue
        others = np.delete(at, index, axis=0)

        def room(shift: np.ndarray, here=at[index], others=others) -> float:
            """Up to 8 nearer to its point than to another, 10 away from each text."""
            spot, own = here + shift, float(np.hypot(*shift))
            marks = min((np.hypot(*(spot - one)) for one in others), default=99.0)
            words = min((np.hypot(*(spot - one)) for one in texts), default=99.0)
            return min(marks - own, 8.0) + min(words, 10.0) - own / 10

        shifts = [
            np.array([far * np.cos(angle), far * np.sin(angle)])
            for far in (9, 14, 20)
            for angle in np.arange(12) * np.pi / 6
        ]
        shift = max(shifts, key=room)
        texts.append(at[index] + shift)
        axes.annotate(
            *(text, (x, y)),
            textcoords="offset points",
            xytext=shift,
            fontsize=8,
            ha="center",
            va="center",
        )


def legend(axes, names: Sequence[str]) -> None:
    """All rows of a group, beside the panel."""
    marks = [
        axes.plot([], [], linestyle="", **{k: plots.style(i)[k] for k in MARK})[0]
        for i in range(len(names))
    ]
    axes.legend(
        *(marks, [f"{i + 1} {name}" for i, name in enumerate(names)]),
        frameon=False,
        fontsize=8,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
