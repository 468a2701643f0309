"""The tables of a report's page, as HTML."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax.evaluation import gallery
from robustjax.evaluation.table import count
from robustjax.logging import plain

if TYPE_CHECKING:
    from robustjax.evaluation.report import Report

# Beyond 2 * EDGE classes only the best and the worst are shown.
EDGE = 20


def percent(fraction: float, total: int) -> str:
    """A fraction of `total` examples with as many digits as it can have.

    >>> percent(0.5, 10), percent(0.98765, 10000)
    ('50.0 %', '98.77 %')
    """
    return f"{100 * fraction:.{1 if total <= 1000 else 2}f} %"


def rows_html(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    text: Iterable[int] = (0,),
    kind: str = "wide",
) -> str:
    """A table of cells that are HTML already; columns in `text` go to the left."""
    left = set(text)

    def line(cells: Sequence[str], tag: str) -> str:
        inside = "".join(
            f"<{tag}{' class=text' if i in left else ''}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="{kind}"><table>{line(head, "th")}{body}</table></div>'


def bar(*parts: tuple[str, float]) -> str:
    """Layers from the left, the longest first."""
    inside = "".join(
        f'<i class="{kind}" style="width:{100 * min(max(part, 0.0), 1.0):.1f}%"></i>'
        for kind, part in parts
    )
    return f'<span class="bar">{inside}</span>'


def attacks(report: "Report", name: str) -> str:
    """Which attack broke what, and what it cost."""
    found, total = report.threats[name], len(report.y)
    broken, first = int(found.broken.sum()), found.broken_by_name
    costs = bool(found.stages)
    head = ["attack" if found.individual else "attacks in sequence"]
    head += ["accuracy" if found.individual else "accuracy after it", "broken"]
    head += ["only by it"] if found.individual else []
    head += ["share of all broken"]
    if costs:
        head += ["run on", "forward", "backward", "executed", "passes per broken", "s"]
    times = np.sum([np.zeros(total, int), *found.broken_by.values()], axis=0)
    free = [s.name for s in found.stages if s.name not in found.broken_by]
    rows = []
    for attack in [*found.broken_by, *dict.fromkeys(free)]:
        known = attack in found.broken_by
        stages = [s for s in found.stages if s.name == attack]
        won = found.broken_by.get(attack, np.zeros(total, bool))
        number = int(won.sum() if found.individual else (first == attack).sum())
        number = number if known else sum(s.broken for s in stages)
        row = [escape(attack)]
        row += [percent(report.accuracy(name, attack), total) if known else ""]
        row += [str(number)]
        row += [str(int((won & (times == 1)).sum()))] if found.individual else []
        share = number / max(broken, 1)
        row += [f"{100 * share:.1f} % {bar(('broken', share))}"]
        rows.append(row + (_costs(stages, number) if costs else []))
    last = ["all", percent(found.robust_accuracy, total), str(broken)]
    last += [""] * (found.individual + 1)
    rows.append(last + (_costs(list(found.stages), broken) if costs else []))
    rows[-1] = [f"<b>{cell}</b>" if cell else "" for cell in rows[-1]]
    text = (
        "Every attack ran on every correctly classified example."
        if found.individual
        else "Each attack ran on what the earlier ones left."
    )
    if costs:
        text += (
            " A pass is one example once through the model; executed counts padding."
        )
    title = "Which attack broke what"
    note = f'<p class="soft">{text}</p>'
    return f"<h3>{title}</h3>{rows_html(head, rows, kind='wide attacks')}{note}"


def _costs(stages: list[Any], broken: int) -> list[str]:
    if not stages:
        return [""] * 6
    forward, backward = (
        sum(getattr(s, n) for s in stages) for n in ("forward", "backward")
    )
    executed = sum(s.executed_forward + s.executed_backward for s in stages)
    passes = ["-"] * 4  # those of a user's own attack are not known
    if executed:
        each = count((forward + backward) / broken) if broken else "-"
        passes = [count(forward), count(backward), count(executed), each]
    return [
        f"{max(s.points for s in stages):,}",
        *passes,
        f"{sum(s.seconds for s in stages):.1f}",
    ]


def classes(report: "Report") -> str:
    """Clean and robust accuracy of each class, or of the worst and the best."""
    numbers, place = np.unique(report.y, return_inverse=True)
    size, clean, robust = (
        np.bincount(place.ravel(), weights=part, minlength=len(numbers))
        for part in (np.ones(len(report.y)), report.correct, report.robust)
    )
    order = np.arange(len(numbers))
    cut = len(numbers) > 2 * EDGE
    if cut:
        # Worst first; among equals the lower clean accuracy, then the class number.
        order = np.lexsort((numbers, clean / size, robust / size))
        order = np.concatenate([order[:EDGE], order[-EDGE:]])
    rows = [
        [
            escape(gallery.class_name(report, numbers[c])),
            f"{int(size[c])}",
            f"{100 * clean[c] / size[c]:.1f} %",
            f"{100 * robust[c] / size[c]:.1f} %",
            bar(("clean", clean[c] / size[c]), ("robust", robust[c] / size[c])),
        ]
        for c in order
    ]
    if cut:
        rows.insert(EDGE, ["&hellip;", "", "", "", ""])
    every = ", under every threat" if len(report.threats) > 1 else ""
    text = (
        '<span class="key" style="background:var(--clean)"></span>clean &nbsp; '
        f'<span class="key" style="background:var(--robust)"></span>robust{every}'
    )
    if cut:
        text += f". The {EDGE} worst and the {EDGE} best of {len(numbers)} classes."
    head = ["class", "examples", "clean", "robust", ""]
    return f'<h2>Classes</h2><p class="soft">{text}</p>' + rows_html(head, rows)


def checks(report: "Report") -> str:
    """What each check of the model measured; "" where none was recorded."""
    if not report.checks:
        return ""
    cost = ""
    if report.check_passes:
        cost = f"They took {report.check_passes:,} passes, counted apart."
        cost = f'<p class="soft">{cost}</p>'
    rows = "".join(
        f"<tr><td class=text>{escape(name)}</td><td class=text>"
        f'<span class="badge {escape(str(check.get("result")).replace(" ", "-"))}">'
        f"{escape(str(check.get('result')))}</span></td>"
        f"<td>{escape(_value(check.get('value', ''), empty=''))}</td>"
        f"<td class=long>{escape(str(check.get('message') or ''))}</td></tr>"
        for name, check in report.checks.items()
    )
    return (
        f"<h2>Checks of the model</h2>{cost}"
        '<div class="wide"><table><tr><th class=text>check</th><th class=text>result'
        f"</th><th>value</th><th class=long>what it means</th></tr>{rows}</table></div>"
    )


def facts_table(title: str, facts: dict[str, Any]) -> str:
    """Names and values under a heading; nested ones as `outer: inner`."""
    rows = "".join(
        f"<tr><td class=text>{escape(name)}</td>"
        f"<td class=long>{escape(value)}</td></tr>"
        for name, value in _flat(plain(facts))
    )
    if not rows:
        return ""
    return f'<h2>{title}</h2><div class="wide"><table>{rows}</table></div>'


def _flat(facts: dict[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name}: ")
        else:
            yield before + name, _value(value)


def _value(value: Any, most: int = 400, empty: str = "not set") -> str:
    """A value in a cell: floats in six figures, long ones cut (report.json has all)."""
    value = plain(value)
    if value is None:
        return empty
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else text[:most] + " ... (all of it: report.json)"
