"""A report as text, for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from robustjax.evaluation.intervals import wilson

if TYPE_CHECKING:
    from robustjax.evaluation.report import Report, ThreatReport


def render(report: "Report") -> str:
    """What `print(report)` shows: accuracies, costs, and the warnings last."""
    found = report.threats
    kinds = {t.individual for t in found.values()}
    lines = [f"suite {report.suite}"] if report.suite else []
    if len(kinds) > 1 or any(t.stages for t in found.values()):
        lines += _blocks(report)
    else:
        lines += _columns(report)
    if len(found) > 1:
        lines.append(f"robust under every threat: {report.robust_accuracy:.3f}")
    low, high = wilson(report.robust.sum(), len(report.y))
    many = f"{len(report.y)} example" + "s" * (len(report.y) != 1)
    lines.append(f"{many}; 95 % interval {low:.3f} to {high:.3f}")
    if report.randomized:
        r = report.randomized
        lines.append(
            f"random model, {r['passes']} passes: {r['robust_accuracy_mean']:.3f} on "
            f"average, {r['low']:.3f} to {r['high']:.3f}"
        )
    for name, t in found.items():
        at = f"{name}: " if len(found) > 1 else ""
        lines += [f"{at}{note}" for note in t.notes]
    return "\n".join(lines + [f"!! {title}: {text}" for title, text in alerts(report)])


def alerts(report: "Report") -> list[tuple[str, str]]:
    """What makes the numbers doubtful: flags of the checks, verdicts that moved."""
    found = [(flag.name, flag.message) for flag in report.flags]
    for name, t in report.threats.items():
        at = f" ({name})" if len(report.threats) > 1 else ""
        if t.flipped:
            found.append(
                (
                    f"verdicts flipped{at}",
                    "The last pass classifies these broken examples correctly again: "
                    f"{listed(t.flipped)}.",
                )
            )
        if t.unconfirmed:
            found.append(
                (
                    f"unconfirmed successes{at}",
                    "An attack claimed to have broken the examples "
                    f"{listed(t.unconfirmed)}, and the judge did not confirm it.",
                )
            )
    return found


def listed(index: Sequence[int], most: int = 12) -> str:
    """The first few of many numbers.

    >>> listed(range(100), most=3)
    '0, 1, 2 and 97 more'
    """
    text = ", ".join(str(int(i)) for i in index[:most])
    return text + (f" and {len(index) - most} more" if len(index) > most else "")


def count(number: float) -> str:
    """A count in about three figures.

    >>> [count(n) for n in (0, 999, 12345, 2_500_000)]
    ['0', '999', '12.3k', '2.5M']
    """
    for unit in ("", "k", "M", "G"):
        if number < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if number < 1000 else f"{number:.0f}{unit}"


def _columns(report: "Report") -> list[str]:
    """A row for each attack, a column for each threat model."""
    found = report.threats
    attacks = list(dict.fromkeys(a for t in found.values() for a in t.broken_by))
    rows = [["accuracy", *(f"{n} {t.epsilon:.4g}" for n, t in found.items())]]
    rows.append(["clean", *[f"{report.clean_accuracy:.3f}"] * len(found)])
    for attack in attacks:
        own = [
            f"{report.accuracy(n, attack):.3f}" if attack in t.broken_by else "-"
            for n, t in found.items()
        ]
        rows.append([_label(next(iter(found.values())), attack), *own])
    if len(attacks) > 1:
        worst = [f"{t.robust_accuracy:.3f}" for t in found.values()]
        rows.append(["all attacks", *worst])
    return _aligned(rows)


def _blocks(report: "Report") -> list[str]:
    """A table for each threat model, with what each attack cost."""
    lines = []
    for name, t in report.threats.items():
        title = name if t.norm in ("", name) else f"{name}, {t.norm}"
        head = [f"{title} {t.epsilon:.4g}", "accuracy", "broken", "of"]
        rows = [[*head, "forward", "backward", "executed", "s"]]
        rows.append(["clean", f"{report.clean_accuracy:.3f}", *[""] * 6])
        for attack in dict.fromkeys([*t.broken_by, *(s.name for s in t.stages)]):
            label, accuracy = attack, ""
            broken = sum(s.broken for s in t.stages if s.name == attack)
            if attack in t.broken_by:
                label, accuracy = _label(t, attack), report.accuracy(name, attack)
                accuracy, broken = f"{accuracy:.3f}", int(t.broken_by[attack].sum())
            rows.append([label, accuracy, str(broken), *_costs(t, attack)])
        worst = [f"{t.robust_accuracy:.3f}", str(int(t.broken.sum()))]
        rows.append(["all attacks", *worst, *_costs(t, None)])
        lines += [*_aligned(rows), ""]
    return lines[:-1] if len(report.threats) == 1 else lines


BOTH_WAYS = ("forward", "backward")


def _costs(found: "ThreatReport", attack: str | None) -> list[str]:
    """Points, passes and seconds of one attack's stages; None: of all."""
    stages = [s for s in found.stages if attack in (None, s.name)]
    if not stages:
        return [""] * 5
    forward, backward = (sum(getattr(s, n) for s in stages) for n in BOTH_WAYS)
    executed = sum(s.executed_forward + s.executed_backward for s in stages)
    # The passes of a user's own attack are not known.
    passes = (forward, backward, executed) if executed else (None, None, None)
    return [
        str(max(s.points for s in stages)),
        *("-" if n is None else count(n) for n in passes),
        f"{sum(s.seconds for s in stages):.1f}",
    ]


def _label(found: "ThreatReport", attack: str) -> str:
    return attack if found.individual else f"after {attack}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines: the first column to the left, a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
