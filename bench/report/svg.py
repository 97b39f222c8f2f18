"""Parts of pictures as SVG: text, axes, images, and the picture around them."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "NARROW",
    "PANEL",
    "WIDE",
    "Frame",
    "choose_ticks",
    "draw_text",
    "encode_png",
    "format_tick",
    "wrap_picture",
]

# Widths of a picture on a screen and on a phone, where letters keep their size, and of one of two
# pictures beside each other.
WIDE, NARROW, PANEL = 680, 328, 328
LETTER = 7.2  # width of a letter of a picture, in the mean


@dataclass(frozen=True)
class Frame:
    """The area between the axes of a picture, and the scales of both.

    Attributes
    ----------
    width, height
        Of the picture, with everything around the area.
    low, high
        Values at the ends of the y axis.
    first, last
        Values at the ends of the x axis.
    left, right, top, bottom
        Space around the area.
    """

    width: int
    height: int
    low: float
    high: float
    first: float
    last: float
    left: int = 46
    right: int = 10
    top: int = 26
    bottom: int = 40

    def x(self, value: float) -> float:
        """Place a value of the x axis."""
        span = max(self.last - self.first, 1e-9)
        return self.left + (self.width - self.left - self.right) * (value - self.first) / span

    def y(self, value: float) -> float:
        """Place a value of the y axis."""
        span = max(self.high - self.low, 1e-9)
        inner = self.height - self.top - self.bottom
        return self.top + inner * (1 - (value - self.low) / span)

    def draw_y_axis(self, name: str) -> list[str]:
        """Draw grid lines with their values, and the name of the axis above them."""
        body = [draw_text(0, 12, name, "start", "soft")]
        end = self.width - self.right
        for value in choose_ticks(self.low, self.high):
            y = self.y(value)
            body.append(f'<path class="grid" d="M{self.left} {y:.1f}H{end}"/>')
            body.append(draw_text(self.left - 6, y + 4, format_tick(value), "end"))
        return body

    def draw_x_axis(self, name: str, ticks: Sequence[tuple[float, str]]) -> list[str]:
        """Draw marks with their names below the area, and the name of the axis below them."""
        base = self.height - self.bottom
        body = [f'<path class="axis" d="M{self.left} {base}H{self.width - self.right}"/>']
        for value, text in ticks:
            x = self.x(value)
            half = LETTER * len(text) / 2
            # A name at an end of the axis stays inside of the picture.
            at = min(max(x, half), self.width - half - 2)
            body.append(f'<path class="axis" d="M{x:.1f} {base}v4"/>')
            body.append(draw_text(at, base + 17, text))
        middle = (self.left + self.width - self.right) / 2
        body.append(draw_text(middle, self.height - 5, name, "middle", "soft"))
        return body


def draw_text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    """Return a text of a picture."""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def wrap_picture(
    name: str, title: str, description: str, width: int, height: float, body: Sequence[str]
) -> str:
    """Return a whole picture with its alternative text.

    Parameters
    ----------
    name
        Id of the picture, unlike any other on the page.
    title, description
        What it is, and what can be seen, for those who don't see it.
    width, height
        In the units of the body.
    body
        Elements.

    Returns
    -------
    str
    """
    return (
        f'<svg role="img" aria-labelledby="{name}-t {name}-d" viewBox="0 0 {width} {height:.0f}" '
        f'style="max-width:{width}px">\n<title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(description)}</desc>\n' + "\n".join(body) + "\n</svg>"
    )


def choose_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Choose round numbers within a range, about as many as ``most``."""
    raw = max(high - low, 1e-9) / max(most - 1, 1)
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= 0.8 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first > 4 * most:
        raise ValueError(f"an axis from {low} to {high} has no round numbers")
    return [step * i for i in range(first, last + 1)]


def format_tick(value: float) -> str:
    """Return a value of an axis: thousands by a comma, no needless zeros."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{round(value, 9):.4g}"


def encode_png(pixels: NDArray[np.uint8]) -> str:
    """Encode ``[height, width, 4]``, red, green, blue and opacity, as the data URL of a PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = pixels.shape
    lines = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).astype(np.uint8)
    content = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    )
    content += chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(content).decode()
