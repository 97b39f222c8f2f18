"""Draw the charts of a report: bars, lines, maps of loads, and marks by layer, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lplb_triton.bench.report.svg import (
    NARROW,
    PANEL,
    WIDE,
    Frame,
    choose_ticks,
    draw_text,
    encode_png,
    format_tick,
    wrap_picture,
)
from lplb_triton.bench.types import Floats

__all__ = [
    "COLD",
    "HOT",
    "Bar",
    "Line",
    "color_loads",
    "draw_bars",
    "draw_layers",
    "draw_lines",
    "draw_map",
    "draw_scale",
    "draw_swatch",
    "thin_out",
]

# Colours of a map: more than the mean, and less. Both are told apart with any colour vision, and
# their opacity says how much, so that the mean is the page's own background, light or dark.
HOT, COLD = (224, 92, 0), (0, 118, 196)
MOST_POINTS = 240
# The first of several lines is drawn first and widest, so that equal ones all stay visible.
LINE_WIDTHS = (4.4, 3.0, 1.8, 1.2)
DASHES = {"eplb": "9 4", "size1": "9 4", "size2": "3 3", "size3": "12 3 3 3"}


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its parts as (kind, value), the text at its end, and a mark or None."""

    name: str
    parts: Sequence[tuple[str, float]]
    text: str
    mark: float | None = None


@dataclass(frozen=True)
class Line:
    """One line: its kind, which is its colour, and its values."""

    kind: str
    values: Sequence[float]


def draw_swatch(kind: str, shape: str) -> str:
    """Draw the sign of a legend: ``line0`` to ``line3``, ``box``, ``mark``, or a layer's mark."""
    if shape.startswith("line"):
        body = _draw_path(kind, int(shape[4:]), "M1 6H27")
    elif shape == "box":
        body = f'<rect class="fill {kind}" x="4" y="1" width="20" height="10"/>'
    elif shape == "mark":
        body = '<path class="mark" d="M14 0V12"/>'
    else:
        body = _draw_mark(kind, 14, 6)
    return f'<svg class="swatch" aria-hidden="true" viewBox="0 0 28 12">{body}</svg>'


def _draw_path(kind: str, order: int, path: str) -> str:
    dash = f' stroke-dasharray="{DASHES[kind]}"' if kind in DASHES else ""
    width = LINE_WIDTHS[min(order, len(LINE_WIDTHS) - 1)]
    return f'<path class="line {kind}" stroke-width="{width}"{dash} d="{path}"/>'


def draw_bars(
    name: str,
    title: str,
    description: str,
    bars: Sequence[Bar],
    axis: str,
    line: float | None = None,
) -> str:
    """Draw horizontal bars of several parts, each under its name.

    Parameters
    ----------
    name, title, description
        Of the picture; the description is its alternative text.
    bars
        From the top.
    axis
        Name of the x axis, with its unit.
    line
        Value of a line across all bars, or None.

    Returns
    -------
    str
        The picture for a screen and the one for a phone.
    """

    def draw(width: int, name: str) -> str:
        ends = [max(sum(v for _, v in bar.parts), bar.mark or 0.0) for bar in bars]
        row, last = 44, max([*ends, line or 0.0, 1e-9])
        height = row * len(bars) + 46
        frame = Frame(width, height, 0, 1, 0, last, left=2, right=8, top=0)
        body = []
        for value in (ticks := choose_ticks(0, last, width // 62)):
            body.append(f'<path class="grid" d="M{frame.x(value):.1f} 0V{height - 40}"/>')
        for at, bar in enumerate(bars):
            top = row * at
            # The page's own colour behind the letters keeps lines from crossing them.
            body.append(f'<rect class="ground" x="0" y="{top}" width="{width}" height="20"/>')
            body.append(draw_text(2, top + 14, bar.name, "start"))
            body.append(draw_text(width - 2, top + 14, bar.text, "end", "strong"))
            start = 0.0
            for kind, value in bar.parts:
                x, end = frame.x(start), frame.x(start + max(value, 0.0))
                start += max(value, 0.0)
                body.append(
                    f'<rect class="fill {kind}" x="{x:.1f}" y="{top + 20}" '
                    f'width="{end - x:.1f}" height="18"/>'
                )
            if bar.mark is not None:
                x = frame.x(bar.mark)
                body.append(f'<path class="mark" d="M{x:.1f} {top + 17}v24"/>')
            if line is not None:
                body.append(f'<path class="level" d="M{frame.x(line):.1f} {top + 20}v18"/>')
        body += frame.draw_x_axis(axis, [(v, format_tick(v)) for v in ticks])
        return wrap_picture(name, title, description, width, height, body)

    return _draw_twice(name, draw)


def _draw_twice(name: str, draw: Callable[[int, str], str]) -> str:
    """Draw for a screen and for a phone; the page's style shows one of them."""
    return (
        f'<div class="wide">{draw(WIDE, name)}</div>\n'
        f'<div class="narrow">{draw(NARROW, name + "-small")}</div>'
    )


def thin_out(values: Floats) -> tuple[Floats, int]:
    """Take means of successive values where they are more than a line shows.

    Parameters
    ----------
    values
        float64 ``[..., n]``.

    Returns
    -------
    tuple of numpy.ndarray and int
        ``[..., about n / k]`` and ``k``, how many values each is the mean of.
    """
    each = -(-values.shape[-1] // MOST_POINTS)
    parts = [values[..., i : i + each].mean(-1) for i in range(0, values.shape[-1], each)]
    return np.stack(parts, -1), each


def draw_lines(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    x: Sequence[float],
    x_axis: str,
    y_axis: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_range: tuple[float, float] | None = None,
    below: Sequence[float] | None = None,
    level: tuple[float, str] | None = None,
    cuts: Sequence[float] = (),
) -> str:
    """Draw lines over a common x axis.

    Parameters
    ----------
    name, title, description
        Of the picture; the description is its alternative text.
    lines
        The first is drawn first and widest, so that later ones on top of it don't hide it.
    x
        Places of the values.
    x_axis, y_axis
        Names of the axes, with units.
    x_ticks
        Places and names on the x axis, or None for round numbers.
    y_range
        Ends of the y axis, or None for those of the values. Values beyond are cut off.
    below
        Values under which the area is shaded, or None.
    level
        A value with a horizontal line, and the text on it.
    cuts
        Places of vertical lines.

    Returns
    -------
    str
        The picture for a screen and the one for a phone.
    """
    if len(x) == 1:
        # A single value becomes a level line.
        x = (x[0] - 0.5, x[0] + 0.5)
        lines = [Line(line.kind, (line.values[0],) * 2) for line in lines]
        below = None if below is None else (below[0],) * 2
    shown = [line.values for line in lines] + ([below] if below is not None else [])
    values = np.array(shown, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("lines must have finite values")
    low, high = y_range or (float(values.min()), float(values.max()))
    pad = 0.0 if y_range else 0.04 * max(high - low, 1e-3)

    def draw(width: int, name: str) -> str:
        frame = Frame(width, 250, low - pad, high + pad, x[0], x[-1])
        body, base = frame.draw_y_axis(y_axis), frame.height - frame.bottom
        if below is not None:
            bottom = frame.y(frame.low)
            edge = _join(frame, x, below).replace("M", "L", 1)
            body.append(
                f'<path class="fill limit" d="M{frame.x(x[0]):.1f} {bottom:.1f}{edge}'
                f'L{frame.x(x[-1]):.1f} {bottom:.1f}Z"/>'
            )
        for cut in cuts:
            body.append(f'<path class="cut" d="M{frame.x(cut):.1f} {frame.top}V{base}"/>')
        if level is not None:
            y = frame.y(level[0])
            body.append(f'<path class="level" d="M{frame.left} {y:.1f}H{width - frame.right}"/>')
            body.append(draw_text(width - frame.right - 4, y - 5, level[1], "end", "halo"))
        for order, line in enumerate(lines):
            body.append(_draw_path(line.kind, order, _join(frame, x, line.values)))
        ticks = x_ticks or [(v, format_tick(v)) for v in choose_ticks(x[0], x[-1], width // 62)]
        body += frame.draw_x_axis(x_axis, ticks)
        return wrap_picture(name, title, description, width, frame.height, body)

    return _draw_twice(name, draw)


def _join(frame: Frame, x: Sequence[float], values: Sequence[float]) -> str:
    """Return the path through values, which stay within the frame."""
    inside = [min(max(float(v), frame.low), frame.high) for v in values]
    points = [f"{frame.x(at):.1f} {frame.y(v):.1f}" for at, v in zip(x, inside, strict=True)]
    return "M" + "L".join(points)


def draw_layers(
    name: str,
    title: str,
    description: str,
    layers: Sequence[int],
    values: Mapping[str, Sequence[float]],
    axis: str,
) -> str:
    """Draw a row of marks for each layer, on a logarithmic axis that starts at 1.

    Parameters
    ----------
    name, title, description
        Of the picture; the description is its alternative text.
    layers
        Their numbers, from the top.
    values
        By kind of mark (``none``, ``eplb``, ``lp`` or ``bound``) a value of each layer.
    axis
        Name of the x axis, with its unit.

    Returns
    -------
    str
        The picture for a screen and the one for a phone.
    """
    logs = {kind: np.log(np.maximum(v, 1.0)).tolist() for kind, v in values.items()}
    last = max(max(max(v) for v in logs.values()), 0.05)

    def draw(width: int, name: str) -> str:
        row, height = 24, 24 * len(layers) + 48
        frame = Frame(width, height, 0, 1, 0.0, last, left=66, right=12, top=0)
        body, ticks = [], _choose_log_ticks(frame)
        for value, _ in ticks:
            body.append(f'<path class="grid" d="M{frame.x(value):.1f} 2V{height - 40}"/>')
        for at, layer in enumerate(layers):
            y = row * at + 14
            body.append(draw_text(0, y + 4, f"layer {int(layer)}", "start"))
            body.append(f'<path class="grid" d="M{frame.left} {y}H{width - frame.right}"/>')
            body += [_draw_mark(kind, frame.x(v[at]), y) for kind, v in logs.items()]
        body += frame.draw_x_axis(axis, ticks)
        return wrap_picture(name, title, description, width, height, body)

    return _draw_twice(name, draw)


def _choose_log_ticks(frame: Frame) -> list[tuple[float, str]]:
    """Choose round numbers from 1 on that are far enough from each other on a logarithmic axis."""
    ticks: list[tuple[float, str]] = []
    for scale in (1, 10, 100, 1000, 10000):
        for value in (1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 7.0):
            at, text = math.log(value * scale), format_tick(value * scale)
            if at <= frame.last and (not ticks or frame.x(at) >= frame.x(ticks[-1][0]) + 42):
                ticks.append((at, text))
    return ticks


def _draw_mark(kind: str, x: float, y: float) -> str:
    """Draw a mark whose shape says what it is, as its colour does."""
    if kind == "none":
        return f'<circle class="ring none" cx="{x:.1f}" cy="{y}" r="4.5"/>'
    if kind == "eplb":
        return f'<rect class="fill eplb" x="{x - 4.5:.1f}" y="{y - 4.5}" width="9" height="9"/>'
    if kind == "lp":
        return f'<path class="fill lp" d="M{x:.1f} {y - 6}l6 6l-6 6l-6 -6Z"/>'
    return f'<path class="mark" d="M{x:.1f} {y - 10}v20"/>'


def color_loads(ratio: Floats, most: float) -> NDArray[np.uint8]:
    """Colour loads over their mean.

    Parameters
    ----------
    ratio
        float64 ``[...]``.
    most
        Ratio that is opaque, as its inverse is; above 1.

    Returns
    -------
    numpy.ndarray
        uint8 ``[..., 4]``, red, green, blue and opacity.
    """
    level = np.clip(np.log(np.maximum(ratio, 1e-9)) / np.log(most), -1, 1)[..., None]
    color = np.where(level > 0, HOT, COLD).astype(np.float64)
    # A root makes small differences from the mean visible.
    opacity = 255 * np.sqrt(np.abs(level))
    colors: NDArray[np.uint8] = np.concatenate([color, opacity], -1).round().astype(np.uint8)
    return colors


def draw_map(
    name: str,
    title: str,
    description: str,
    colors: NDArray[np.uint8],
    y_axis: str,
    x_axis: str,
    x_ticks: tuple[str, str],
    first: int = 0,
    width: int = PANEL,
    height: int = 190,
) -> str:
    """Draw a map of coloured cells.

    Parameters
    ----------
    name, title, description
        Of the picture; the description is its alternative text.
    colors
        uint8 ``[rows, columns, 4]``, the first row at the top.
    y_axis, x_axis
        Names of the axes.
    x_ticks
        Names of the first and of the last column.
    first
        Number of the first row.
    width, height
        Of the picture.

    Returns
    -------
    str
    """
    rows, columns = colors.shape[:2]
    frame = Frame(width, height, 0, 1, 0, columns, left=36)
    inner = (width - frame.left - frame.right, height - frame.top - frame.bottom)
    body = [
        draw_text(0, 12, y_axis, "start", "soft"),
        f'<image x="{frame.left}" y="{frame.top}" width="{inner[0]}" height="{inner[1]}" '
        f'preserveAspectRatio="none" href="{encode_png(colors)}"/>',
        f'<rect class="border" x="{frame.left}" y="{frame.top}" width="{inner[0]}" '
        f'height="{inner[1]}"/>',
        draw_text(frame.left - 5, frame.top + 10, str(first), "end"),
        draw_text(frame.left - 5, frame.top + inner[1], str(first + rows - 1), "end"),
    ]
    ends = [(0.5, x_ticks[0]), (columns - 0.5, x_ticks[1])]
    body += frame.draw_x_axis(x_axis, ends if columns > 1 else ends[:1])
    return wrap_picture(name, title, description, width, height, body)


def draw_scale(name: str, most: float) -> str:
    """Draw the scale of the colours of maps whose loads are opaque from ``most`` on."""
    steps, width, left = 41, PANEL, 36
    each = (width - left - 10) / steps
    ratios = most ** np.linspace(-1, 1, steps)
    body = []
    for at, (*color, opacity) in enumerate(color_loads(ratios, most).tolist()):
        body.append(
            f'<rect x="{left + at * each:.2f}" y="2" width="{each + 0.3:.2f}" height="12" '
            f'fill="rgb({",".join(map(str, color))})" fill-opacity="{opacity / 255:.2f}"/>'
        )
    body.append(f'<rect class="border" x="{left}" y="2" width="{each * steps:.1f}" height="12"/>')
    places = ((left, f"1/{most:g} or less", "start"), (width - 10, f"{most:g} or more", "end"))
    body += [draw_text(x, 30, text, anchor) for x, text, anchor in places]
    body.append(draw_text((left + width - 10) / 2, 30, "mean load = 1"))
    return wrap_picture(
        name, "Scale of the colours", "Blue is less than the mean load, orange more.", width, 36,
        body,
    )  # fmt: skip
