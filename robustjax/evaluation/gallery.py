"""The examples on a report's page: clean, perturbation, adversarial, predictions."""

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from robustjax.evaluation import inline

if TYPE_CHECKING:
    from robustjax.evaluation.report import Report, ThreatReport

MOST = 12
# A larger image is shown by every second, third, ... pixel.
PIXELS = 128


def class_name(report: "Report", number: Any) -> str:
    """The name of a class, or its number; -1 is a NaN answer."""
    names = report.config.get("class_names") or ()
    number = int(number)
    if number < 0:
        return "NaN"
    return str(names[number]) if number < len(names) else str(number)


def threat_title(name: str, found: "ThreatReport") -> str:
    """The name of a threat model, with its norm where the name is another."""
    if found.norm in ("", name):
        return name
    return found.norm if name == "threat" else f"{name} ({found.norm})"


def budget(found: "ThreatReport") -> str:
    """Epsilon as people write it.

    A small whole number of 255ths under Linf is written as such; where each example
    has an epsilon of its own: the mean and the range.
    """
    text = f"{found.epsilon:.4g}"
    if found.epsilons is not None:
        low, high = np.min(found.epsilons), np.max(found.epsilons)
        return f"{low:.4g} to {high:.4g} (one per example, mean {text})"
    steps = found.epsilon * 255
    usual = 0.9 < steps < 33 and abs(steps - round(steps)) < 1e-4
    if found.norm == "Linf" and usual:
        text += f" = {round(steps)}/255"
    return text


def chosen(report: "Report", name: str) -> tuple[np.ndarray, str]:
    """Which rows are worth a look, and why.

    The broken ones with the smallest perturbations (in hundredths of epsilon; among
    equals the smallest index); without any, the robust ones with the smallest margin.
    """
    found = report.threats[name]
    rows = np.flatnonzero(found.broken)
    if len(rows):
        unit = (found.epsilon or 1.0) / 100
        value = np.rint(np.nan_to_num(found.size[rows] / unit, nan=np.inf))
        why = "The broken examples with the smallest perturbations."
    else:
        rows = np.flatnonzero(found.robust)
        value, why = np.zeros(len(rows)), "Nothing was broken: the first examples."
        if found.margin is not None:
            value = np.nan_to_num(found.margin[rows], nan=np.inf)
            why = "Nothing was broken: the examples with the smallest margin."
    order = np.lexsort((report.index[rows], value))
    return rows[order[:MOST]], why


def examples(report: "Report", name: str) -> str:
    """The gallery of one threat as HTML; "" where there is nothing to show."""
    found = report.threats[name]
    rows, why = chosen(report, name)
    if not len(rows):
        return ""
    if report.x is None:
        why += " The clean inputs were not kept, so there are no pictures."
        return f'<h3>Examples</h3><p class="soft">{why}</p>' + _listed(
            report, name, rows
        )
    axes = report.config.get("image_axes")
    clean = [as_image(report.x[row], axes) for row in rows]
    if any(image is None for image in clean):
        why += (
            " The inputs are no images: bars show the perturbation of each coordinate."
        )
        return f'<h3>Examples</h3><p class="soft">{why}</p>' + _listed(
            report, name, rows
        )
    low, high = min(0.0, float(report.x.min())), max(1.0, float(report.x.max()))
    if (low, high) != (0.0, 1.0):
        why += f" Black is {low:.3g}, white {high:.3g}."
    step = max(1, -(-max(report.x.shape[1:]) // PIXELS))
    if step > 1:
        why += f" Of {step} pixels one is shown, in each direction."
    why += " Gray in the middle picture is no change."
    items = []
    first = found.broken_by_name
    for row, image in zip(rows, clean, strict=True):
        attacked = as_image(found.x_adv[row], axes)
        assert image is not None and attacked is not None
        change = np.nan_to_num(attacked - image)
        reach = float(np.abs(change).max())
        factor = max(1.0, (high - low) / reach) if reach > 0 else 1.0
        pictures = [
            (image - low) / (high - low),
            0.5 + 0.5 * factor * change / (high - low),
            (attacked - low) / (high - low),
        ]
        height, width = image.shape[:2]
        tags = [
            f'<img alt="" src="{inline.png(p[::step, ::step])}" '
            f'style="--shape:{width}/{height}">'
            for p in pictures
        ]
        before, after = _answers(report, name, row)
        by = f", broken by {first[row]}" if first[row] else ", robust"
        label = class_name(report, report.y[row])
        head = f"example {int(report.index[row])}, class {label}{by}"
        magnified = f"&times; {factor:.3g}" if reach > 0 else "no change"
        size = f"size {found.size[row]:.3g}"
        items.append(
            f'<div class="example"><div class="head">{escape(head)}</div>'
            f'<div class="three"><div>{tags[0]}{before}</div>'
            f"<div>{tags[1]}{magnified}<br>{size}</div><div>{tags[2]}{after}</div></div></div>"
        )
    return (
        f'<h3>Examples</h3><p class="soft">{escape(why)}</p>'
        f'<div class="gallery">{"".join(items)}</div>'
    )


def as_image(x: np.ndarray, axes: str | None) -> np.ndarray | None:
    """One input as `[H, W]` or `[H, W, 3]`; None where it is no picture.

    >>> as_image(np.zeros((3, 4, 5)), "CHW").shape, as_image(np.zeros(7), None)
    ((4, 5, 3), None)
    """
    x = np.asarray(x, np.float64)
    if x.ndim == 3:
        if axes == "CHW" or (
            axes != "HWC" and x.shape[0] in (1, 3) and x.shape[2] not in (1, 3)
        ):
            x = np.moveaxis(x, 0, -1)
        if x.shape[-1] == 1:
            return x[..., 0]
        return x if x.shape[-1] == 3 else None
    return x if x.ndim == 2 and min(x.shape) > 1 else None


def _answers(report: "Report", name: str, row: int) -> tuple[str, str]:
    """What the model sees before and after, colored by right and wrong."""
    found = report.threats[name]
    seen = found.adv_prediction

    def told(answer: int) -> str:
        kind = "right" if answer == report.y[row] else "wrong"
        return f'<span class="{kind}">sees {escape(class_name(report, answer))}</span>'

    if seen is not None:
        return told(report.prediction[row]), told(seen[row])
    other = '<span class="wrong">sees another class</span>'
    after = other if found.broken[row] else told(report.y[row])
    return told(report.prediction[row]), after


def _listed(report: "Report", name: str, rows: np.ndarray) -> str:
    """A table instead of pictures."""
    found = report.threats[name]
    first = found.broken_by_name
    lines = []
    for row in rows:
        bars = ""
        if report.x is not None:
            bars = inline.signed_bars(found.x_adv[row] - report.x[row])
        before, after = _answers(report, name, row)
        cells = [str(int(report.index[row])), escape(class_name(report, report.y[row]))]
        cells += [
            before,
            after,
            escape(str(first[row])),
            f"{found.size[row]:.4g}",
            bars,
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = ["example", "class", "clean", "attacked", "broken by", "size", ""]
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{"".join(lines)}</table></div>'
