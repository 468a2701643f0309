"""Pictures inside a page: SVG charts and PNG data URIs, in plain text.

`robustjax.plots` draws figures for papers with matplotlib; here a chart takes its
colors from the page (light or dark) and a report is written without importing
matplotlib.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 26, 40


def png(image: np.ndarray) -> str:
    """An image as a data URI.

    Args:
      image: `[H, W]` or `[H, W, 3]`; [0, 1] is black to white, NaN is black.

    >>> png(np.zeros((2, 2)))[:22]
    'data:image/png;base64,'
    """
    image = np.nan_to_num(np.asarray(image, np.float64), posinf=1.0, neginf=0.0)
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    # Each line begins with its filter: 0, none.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    # 8 bits; color type 2 is RGB, 0 gray.
    head = struct.pack(">IIBBBBB", width, height, 8, 2 * (pixels.ndim == 3), 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    data += chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers within `[low, high]`.

    >>> ticks(0, 0.1)
    [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    """
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def curve(
    epsilon: Sequence[float],
    accuracy: Sequence[float],
    label: str,
    marked: tuple[float, float] | None = None,
) -> str:
    """Accuracy against epsilon as SVG; "" without a finite point.

    Args:
      epsilon, accuracy: `[E]` each, in any order.
      label: of the horizontal axis, HTML.
      marked: (epsilon, accuracy) that is shown as a dot with a dotted line.
    """
    points = [p for p in zip(epsilon, accuracy, strict=True) if _finite(*p)]
    points.sort()
    marked = marked if marked and _finite(*marked) else None
    if not points:
        return ""
    last = max([p[0] for p in points] + ([marked[0]] if marked else [])) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return _x(point[0] / last), _y(point[1])

    body = [_grid_x(value / last, f"{value:.4g}") for value in ticks(0, last)]
    body += [_grid_y(value / 5, f"{20 * value} %") for value in range(6)]
    body += [_axis_labels(label, "accuracy")]
    if marked:
        x, y = place(marked)
        body.append(f'<path class="mark" d="M{x:.1f} {_y(0):.1f}V{_y(1):.1f}"/>')
    steps = "L".join("{:.1f} {:.1f}".format(*place(point)) for point in points)
    body.append(f'<path class="line" d="M{steps}"/>')
    if len(points) <= 40:
        body += [
            '<circle cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(*map(float, place(p)))
            for p in points
        ]
    if marked:
        body.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    return _svg(body, "accuracy against epsilon")


def histogram(values: np.ndarray, label: str, most: int = 30) -> str:
    """How often which values occur, as SVG; "" without a finite value."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low, high = min(float(values.min()), 0.0), float(values.max())
    high = high if high > low else low + 1.0
    bins = int(np.clip(math.sqrt(len(values)) * 2, 5, most))
    counts = np.histogram(values, bins, (low, high))[0]
    top = int(counts.max())
    body = [_grid_x((v - low) / (high - low), f"{v:.4g}") for v in ticks(low, high)]
    heights = sorted({int(v) for v in ticks(0, top, 5)})
    body += [_grid_y(v / top, str(v)) for v in heights]
    body += [_axis_labels(label, "examples")]
    width = (WIDTH - LEFT - RIGHT) / bins
    for i, number in enumerate(counts):
        height = _y(0) - _y(number / top)
        body.append(
            f'<rect x="{_x(i / bins) + 0.5:.1f}" y="{_y(0) - height:.1f}" '
            f'width="{width - 1:.1f}" height="{height:.1f}"/>'
        )
    return _svg(body, "histogram")


def signed_bars(values: np.ndarray, most: int = 256) -> str:
    """A vector as bars up and down, as SVG; "" when it is longer than `most`."""
    values = np.nan_to_num(np.asarray(values, np.float64).ravel())
    if not 0 < len(values) <= most:
        return ""
    reach = float(np.abs(values).max()) or 1.0
    width = 240 / len(values)
    body = ['<path class="axis" d="M0 20H240"/>']
    for i, value in enumerate(values / reach):
        body.append(
            f'<rect x="{i * width:.2f}" y="{20 - 18 * max(value, 0):.2f}" '
            f'width="{max(0.8 * width, 0.5):.2f}" height="{18 * abs(value):.2f}"/>'
        )
    return (
        '<svg class="bars" viewBox="0 0 240 40" width="240" height="40" role="img" '
        f'aria-label="perturbation">{"".join(body)}</svg>'
    )


def _finite(*values: float) -> bool:
    return all(v is not None and math.isfinite(v) for v in values)


def _x(fraction: float) -> float:
    return LEFT + fraction * (WIDTH - LEFT - RIGHT)


def _y(fraction: float) -> float:
    return HEIGHT - BOTTOM - fraction * (HEIGHT - TOP - BOTTOM)


def _grid_x(fraction: float, text: str) -> str:
    x = _x(fraction)
    return (
        f'<path class="grid" d="M{x:.1f} {_y(0):.1f}V{_y(1):.1f}"/>'
        f'<text x="{x:.1f}" y="{_y(0) + 15:.1f}" text-anchor="middle">{text}</text>'
    )


def _grid_y(fraction: float, text: str) -> str:
    y = _y(fraction)
    return (
        f'<path class="grid" d="M{_x(0):.1f} {y:.1f}H{_x(1):.1f}"/>'
        f'<text x="{_x(0) - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _axis_labels(below: str, above: str) -> str:
    return (
        f'<text x="{_x(0.5):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{below}</text>'
        f'<text x="{_x(0) - 40:.1f}" y="12">{above}</text>'
    )


def _svg(body: list[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{label}">{"".join(body)}</svg>'
    )
