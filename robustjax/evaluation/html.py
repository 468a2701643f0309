"""A report as one page: no script, no file beside it, light and dark."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax.evaluation import gallery, inline
from robustjax.evaluation import html_tables as tables
from robustjax.evaluation.intervals import wilson
from robustjax.evaluation.table import alerts, count

if TYPE_CHECKING:
    from robustjax.evaluation.report import Report, ThreatReport

STYLE = (Path(__file__).parent / "report.css").read_text(encoding="ascii")


def render(report: "Report", origin: dict[str, Any] | None = None) -> str:
    """The page, as ASCII text.

    Args:
      report: what `evaluate` returned.
      origin: where it comes from, as `robustjax.logging.provenance` tells it.

    Returns:
      HTML that needs nothing but itself; every text in it is escaped.
    """
    total = len(report.y)
    title = "Robustness report" + (f": suite {report.suite}" if report.suite else "")
    budgets = ", ".join(
        f"{gallery.threat_title(name, t)}, epsilon {gallery.budget(t)}"
        for name, t in report.threats.items()
    )
    written = (origin or {}).get("written")
    about = f"{total:,} {_plural(total, 'example')}; {budgets}"
    about += f"; written {written}" if written else ""
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(about)}</p>',
        _alerts(report),
        _cards(report),
        '<p class="soft">Intervals are 95 % Wilson intervals for examples drawn at '
        "random. They say nothing about attacks that were not run: a robust accuracy "
        "is an upper bound.</p>",
        _threats(report) if len(report.threats) > 1 else "",
        *(_threat(report, name) for name in report.threats),
        tables.classes(report),
        tables.checks(report),
        tables.facts_table("What was asked for", report.config),
        tables.facts_table("Where it comes from", origin or {}),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE}</style></head><body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _plural(number: int, word: str) -> str:
    return word if number == 1 else word + "s"


def _alerts(report: "Report") -> str:
    found = [
        f'<div class="alert" role="alert"><b>{escape(name)}</b>'
        f"<p>{escape(message)}</p></div>"
        for name, message in alerts(report)
    ]
    if found:
        return "".join(found)
    if not report.checks:
        return '<div class="calm unknown">No warning, but no check was recorded.</div>'
    ran = sum(c.get("result") != "not run" for c in report.checks.values())
    text = f"{ran} {_plural(ran, 'check')} ran and found nothing suspicious."
    return f'<div class="calm">{text}</div>'


def _cards(report: "Report") -> str:
    total = len(report.y)
    names = list(report.threats)

    def fraction(title: str, good: np.ndarray) -> str:
        low, high = wilson(good.sum(), total)
        return _card(
            title,
            tables.percent(good.mean(), total),
            f"{tables.percent(low, total)} to {tables.percent(high, total)}",
            f"{good.sum():,} of {total:,}",
        )

    every = "under every threat" if len(names) > 1 else ""
    cards = [
        fraction("Clean accuracy", report.correct),
        fraction(f"Robust accuracy {every}", report.robust),
    ]
    if len(names) > 1:
        cards += [fraction(f"Robust, {n}", report.threats[n].robust) for n in names]
    if report.randomized:
        r = report.randomized
        mean, low, high = (
            tables.percent(r[part], total)
            for part in ("robust_accuracy_mean", "low", "high")
        )
        passes = f"mean over {r['passes']} random passes"
        cards.append(
            _card("Robust accuracy, random model", mean, f"{low} to {high}", passes)
        )
    for name, t in report.threats.items():
        if t.further is not None:
            low, high = (tables.percent(part, total) for part in t.further)
            low = low.removesuffix(" %")
            which = f", {name}" if len(names) > 1 else ""
            cards.append(
                _card(
                    f"Might still fall{which}",
                    f"{low} to {high}",
                    "of the examples",
                    "by a sample: see what the suite leaves out",
                )
            )
    stages = [s for t in report.threats.values() for s in t.stages]
    asked = sum(s.forward + s.backward for s in stages)
    if asked:  # the passes of a user's own attacks are not known
        executed = sum(s.executed_forward + s.executed_backward for s in stages)
        cards.append(
            _card(
                "Cost",
                f"{count(asked / total)} passes",
                f"per example; executed: {executed / asked:.2f} times that",
                f"{sum(s.seconds for s in stages):,.1f} s",
            )
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(title: str, big: str, *below: str) -> str:
    lines = "".join(f'<div class="of">{escape(line)}</div>' for line in below)
    return (
        f'<div class="card"><div>{escape(title)}</div>'
        f'<div class="big">{escape(big)}</div>{lines}</div>'
    )


def _threats(report: "Report") -> str:
    total = len(report.y)
    rows = []
    parts = {
        n: (t.robust, t.norm, gallery.budget(t)) for n, t in report.threats.items()
    }
    for name, (good, norm, budget) in {**parts, "": (report.robust, "", "")}.items():
        low, high = wilson(good.sum(), total)
        rows.append(
            [
                escape(name or "every threat at once"),
                escape(norm),
                escape(budget),
                tables.percent(good.mean(), total),
                f"{tables.percent(low, total)} to {tables.percent(high, total)}",
                str(int((report.correct & ~good).sum())),
                tables.bar(("robust", good.mean())),
            ]
        )
    head = [
        "threat",
        "norm",
        "epsilon",
        "robust accuracy",
        "95 % interval",
        "broken",
        "",
    ]
    return "<h2>Threats and their union</h2>" + tables.rows_html(head, rows, (0, 1))


def _threat(report: "Report", name: str) -> str:
    found = report.threats[name]
    heading = f"{gallery.threat_title(name, found)}, epsilon {gallery.budget(found)}"
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    return "".join(
        [
            f"<h2>{escape(heading)}</h2>",
            tables.attacks(report, name),
            f"<h3>What the suite leaves out</h3><ul>{notes}</ul>" if notes else "",
            _charts(found),
            gallery.examples(report, name),
        ]
    )


def _charts(found: "ThreatReport") -> str:
    figures = []
    if found.curve:
        chart = inline.curve(
            found.curve["epsilon"],
            found.curve["accuracy"],
            escape(f"epsilon, {found.norm}".rstrip(", ")),
            None
            if found.epsilons is not None
            else (found.epsilon, found.robust_accuracy),
        )
        text = "Accuracy against the budget. The dot is this report's verdict."
        figures.append((chart, text))
    if found.margin is not None:
        kept = found.margin[found.robust]
        known = kept[np.isfinite(kept)]
        text = f"Margins of the {len(kept)} robust examples; 0 is broken."
        if len(kept) > len(known):
            text += f" Unknown for {len(kept) - len(known)}."
        figures.append((inline.histogram(known, "smallest margin reached"), text))
    shown = "".join(
        f"<figure>{chart}<figcaption>{text}</figcaption></figure>"
        for chart, text in figures
        if chart
    )
    return (
        f'<h3>Budget and margins</h3><div class="charts">{shown}</div>' if shown else ""
    )
