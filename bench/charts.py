"""Draw the charts of a report as text: SVG, and PNG in a data URL."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lplb_triton.bench.plots import COLORS
from lplb_triton.bench.tables import LABELS

__all__ = [
    "COLD",
    "HOT",
    "MEAN",
    "WIDTH",
    "color_loads",
    "draw_bars",
    "draw_copies",
    "draw_lines",
    "encode_png",
]

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 260, 52, 14, 34
# The heat map's colours from a quarter of the mean load, or less, to four times and more.
COLD, MEAN, HOT = (36, 82, 148), (245, 245, 245), (180, 30, 45)


def _svg(body: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}">\n' + "\n".join(body) + "\n</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Choose about five round numbers within a range."""
    raw = max(high - low, 1e-9) / 4
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    return [step * i for i in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def _axes(low: float, high: float) -> list[str]:
    """Draw grid lines with labels, for values from ``low`` to ``high``."""
    body = []
    for value in _ticks(low, high):
        y = _height_of(value, low, high)
        body.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH}" stroke="#ddd"/>')
        body.append(_text(LEFT - 5, y + 4, f"{value:.4g}", "end"))
    return body


def _height_of(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / max(high - low, 1e-9))


def _legend(entries: Mapping[str, str]) -> list[str]:
    body, x = [], float(LEFT)
    for label, color in entries.items():
        body.append(f'<rect x="{x:.0f}" y="{HEIGHT - 10}" width="9" height="9" fill="{color}"/>')
        body.append(_text(x + 13, HEIGHT - 2, label, "start"))
        x += 26 + 6.2 * len(label)
    return body


def draw_lines(series: Mapping[str, tuple[str, list[float]]], below: str) -> str:
    """Draw lines as SVG.

    Parameters
    ----------
    series
        By label, colour and values.
    below
        What the values are numbered by.

    Returns
    -------
    str
    """
    high = max(max(values) for _, values in series.values())
    low = 1.0 if high > 1 else high - 1
    length = max(len(values) for _, values in series.values())
    body = _axes(low, high)
    for label, (color, values) in series.items():
        step = (WIDTH - LEFT - 8) / max(length - 1, 1)
        points = " ".join(f"{LEFT + i * step:.1f},{_height_of(v, low, high):.1f}"
                          for i, v in enumerate(values))  # fmt: skip
        body.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4">'
            f"<title>{escape(label)}</title></polyline>"
        )
    body.append(_text(WIDTH, HEIGHT - 20, f"{below} 0 to {length - 1}", "end"))
    return _svg(body + _legend({label: color for label, (color, _) in series.items()}))


def draw_bars(loads: Mapping[str, list[float]]) -> str:
    """Draw rank loads over their mean as SVG.

    Parameters
    ----------
    loads
        By variant, tokens of each rank.

    Returns
    -------
    str
    """
    shown = ("none", "even", "lp")
    mean = max(float(np.mean(loads["none"])), 1e-12)
    high = max(max(loads[name]) for name in shown) / mean
    ranks = len(loads["none"])
    wide = (WIDTH - LEFT) / ranks
    body = _axes(0.0, high)
    for rank in range(ranks):
        for at, name in enumerate(shown):
            value = loads[name][rank] / mean
            y = _height_of(value, 0.0, high)
            body.append(
                f'<rect x="{LEFT + (rank + 0.1 + 0.28 * at) * wide:.2f}" y="{y:.1f}" '
                f'width="{0.27 * wide:.2f}" height="{HEIGHT - BOTTOM - y:.1f}" '
                f'fill="{COLORS[name]}"><title>rank {rank}, {LABELS[name]}: {value:.3f}'
                "</title></rect>"
            )
    one = _height_of(1.0, 0.0, high)
    body.append(f'<path d="M{LEFT} {one:.1f}H{WIDTH}" stroke="#222"/>')
    body.append(_text(WIDTH, HEIGHT - 20, f"ranks 0 to {ranks - 1}", "end"))
    return _svg(body + _legend({LABELS[name]: COLORS[name] for name in shown}))


def color_loads(ratio: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the colours of loads over their mean, with one more axis of red, green and blue."""
    level = np.clip(np.log(np.maximum(ratio, 1e-9)) / np.log(4), -1, 1)[..., None]
    mean, hot, cold = (np.array(color, dtype=np.float64) for color in (MEAN, HOT, COLD))
    mixed = mean + np.abs(level) * (np.where(level > 0, hot, cold) - mean)
    colors: NDArray[np.uint8] = mixed.round().astype(np.uint8)
    return colors


def draw_copies(ep: int, example: Mapping[str, Any]) -> str:
    """Draw the ranks on a circle, and the copies of experts as lines between them, as SVG.

    Parameters
    ----------
    ep
        Ranks.
    example
        ``loads`` by variant and ``flows``, as in the JSON of ``lplb-bench balance``.

    Returns
    -------
    str
    """
    size, loads = 520, example["loads"]["lp"]
    mean = max(float(np.mean(loads)), 1e-12)
    radius, center = size / 2 - 24, (WIDTH / 2, size / 2)
    at = [
        (center[0] + radius * math.sin(angle), center[1] - radius * math.cos(angle))
        for angle in (2 * math.pi * rank / ep for rank in range(ep))
    ]
    colors = color_loads(np.array(loads) / mean).tolist()
    most = max([flow["tokens"] for flow in example["flows"]], default=0) or 1
    body = []
    for flow in example["flows"]:
        (x, y), (u, v) = at[flow["from"]], at[flow["to"]]
        width = 0.4 + 4 * flow["tokens"] / most
        color = COLORS["lp"] if flow["tokens"] else "#bbb"
        body.append(
            f'<path class="flow" d="M{x:.1f} {y:.1f}Q{(x + u + center[0]) / 3:.1f} '
            f'{(y + v + center[1]) / 3:.1f} {u:.1f} {v:.1f}" fill="none" stroke="{color}" '
            f'stroke-width="{width:.2f}" stroke-opacity="0.6"><title>expert {flow["expert"]}: '
            f"{flow['tokens']} tokens from rank {flow['from']} to {flow['to']}</title></path>"
        )
    for rank, (x, y) in enumerate(at):
        body.append(
            f'<circle class="rank" cx="{x:.1f}" cy="{y:.1f}" r="{11 if ep <= 32 else 8}" '
            f'fill="rgb({",".join(map(str, colors[rank]))})" stroke="#222"><title>rank {rank}: '
            f"{loads[rank] / mean:.3f} of the mean load</title></circle>"
        )
        body.append(_text(x, y + 4, str(rank)))
    return _svg(body, size)


def encode_png(pixels: NDArray[np.uint8]) -> str:
    """Encode ``[height, width, 3]`` as the data URL of a PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = pixels.shape
    lines = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).astype(np.uint8)
    content = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )
    content += chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(content).decode()
