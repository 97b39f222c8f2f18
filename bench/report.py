"""One self-contained HTML page from the figures of ``lplb-bench balance``.

The page needs no network and no script: pictures are inline SVG, the heat map an inline PNG.
"""

from __future__ import annotations

import base64
import math
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.bench.balance import Cell, Options
from lplb_triton.bench.measure.simulate import slot_tokens
from lplb_triton.bench.plots import COLORS
from lplb_triton.bench.tables import LABELS
from lplb_triton.traces.trace import Trace, parse_json

__all__ = ["flows", "heat", "html", "read"]

HEAT_BINS = 64
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 260, 52, 14, 34
# The heat map's colours from a quarter of the mean load, or less, to four times and more.
COLD, MEAN, HOT = (36, 82, 148), (245, 245, 245), (180, 30, 45)

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1360px; padding: 0 1em;
       color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-top: 1px solid #ccc;
     padding-top: 1em } h3 { font-size: 1em; margin-bottom: .3em }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
.row { display: flex; flex-wrap: wrap; gap: 1.5em } p { max-width: 70em }
svg text { font: 11px system-ui, sans-serif; fill: #333 }
img { image-rendering: pixelated; width: 640px; height: 420px; border: 1px solid #ccc }
"""


def flows(trace: Trace, options: Options, cell: Cell) -> list[dict[str, int]]:
    """Tokens that the LP gives to copies in the batch that `Cell.worst` shows.

    Parameters
    ----------
    trace, options
        As given to `lplb_triton.bench.balance.run`.
    cell
        One of its results.

    Returns
    -------
    list of dict
        For every copy but an expert's first (`Placement.log2phy`; under a topology the original):
        ``expert``, ``from`` (rank of the first copy), ``to`` (its own rank) and ``tokens``.
    """
    example = cell.worst()
    placement = next(
        result.placement
        for result in cell.results
        if result.layer == example.layer
        and result.stretch.split <= example.batch < result.stretch.stop
    )
    totals = torch.from_numpy(trace.totals()[example.batch, example.layer])
    tokens = slot_tokens(placement, totals, "lplb", options.tolerance).flatten()
    ranks = placement.rank_of_slot.tolist()
    found = []
    for expert, (home, *others) in enumerate(placement.log2phy.tolist()):
        for slot in others:
            if slot >= 0:
                ends = {"from": ranks[home], "to": ranks[slot]}
                found.append({"expert": expert, **ends, "tokens": int(tokens[slot])})
    return found


def heat(trace: Trace, layer: int) -> dict[str, Any]:
    """Mean tokens of each expert over successive parts of a trace.

    Parameters
    ----------
    trace
        Recorded counts.
    layer
        Index in the trace.

    Returns
    -------
    dict
        ``layer``, ``steps`` (first step of each part) and ``tokens`` [parts][experts].
    """
    parts = np.array_split(np.arange(trace.batches), min(HEAT_BINS, trace.batches))
    totals = trace.totals()[:, layer]
    return {
        "layer": layer,
        "steps": [int(trace.steps[part[0]]) for part in parts],
        "tokens": [[round(float(v), 2) for v in totals[part].mean(0)] for part in parts],
    }


def read(path: Path) -> dict[str, Any] | None:
    """Read what a command of ``lplb-bench`` wrote as JSON.

    Parameters
    ----------
    path
        Any file.

    Returns
    -------
    dict or None
        None where the file is something else, such as a trace.

    Raises
    ------
    OSError
        If the file can't be read.
    ValueError
        If its name says JSON, but it isn't or is nested too deeply.
    """
    if path.suffix != ".json":
        return None
    found = parse_json(path.read_bytes(), str(path))
    return found if isinstance(found, dict) and "command" in found else None


def html(report: Mapping[str, Any]) -> str:
    """Lay out a page.

    Parameters
    ----------
    report
        What ``lplb-bench balance`` writes as JSON.

    Returns
    -------
    str
        A whole HTML document.

    Raises
    ------
    ValueError
        If the report is of another command, of a version without what the page shows, or was
        changed into something else.
    """
    if report.get("command") != "balance":
        raise ValueError("report must be what lplb-bench balance wrote")
    try:
        # A mean of nothing or an overflow is no figure for a page.
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error", RuntimeWarning)
            return _page(report)
    except _OldReportError:
        raise
    except (
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        ValueError,
        RuntimeWarning,
    ) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"report is not as lplb-bench balance writes it ({what})") from error


# What a value of another kind, or one that is missing, leads to.
_BAD_FIGURES = (
    *(LookupError, TypeError, AttributeError, ArithmeticError, ValueError),
    RuntimeWarning,
)


class _OldReportError(ValueError):
    """Already says everything."""


def _page(report: Mapping[str, Any]) -> str:
    cells = [cell for cell in report["cells"] if cell["applicable"]]
    if not cells or "heat" not in report:
        raise _OldReportError(
            "report has no results, or was written by an older version: run it again"
        )
    source = escape(str(report["options"]["trace"]))
    trace = report["trace"]
    parts = [
        f"<h1>Load balance: {source}</h1>",
        f"<p>{trace['experts']} experts, {trace['layers']} layers, {trace['batches']} batches, "
        f"{trace['sources']} sources. Experts were placed by the first batches and the following "
        "ones balanced. Imbalance is the largest over the mean rank load of a batch: 1 is perfect. "
        "Everything on this page is load in tokens; see timing for what was timed.</p>",
        _section("summary", "Summary", _summary(report["cells"])),
        _section("heat", f"Experts over time, layer {report['heat']['layer']}", _heat(report)),
    ]
    for number, cell in enumerate(cells):
        parts.append(_cell(f"cell{number}", cell))
    parts.append(_section("timing", "Timing", _timing(report, cells)))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>Load balance: {source}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _name(cell: Mapping[str, Any]) -> str:
    return f"EP {cell['ep']}, {cell['placement']}, {cell['slots']} redundant slots per rank"


def _summary(cells: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for cell in cells:
        if not cell["applicable"]:
            rows.append([_name(cell), f"n/a: {cell['reason']}", *[""] * len(LABELS)])
            continue
        for statistic in ("mean", "p95", "max"):
            values = [f"{cell['imbalance'][name][statistic]:.3f}" for name in LABELS]
            rows.append([_name(cell), statistic, *values])
    return _table(["placement", "imbalance", *LABELS.values()], rows)


def _cell(name: str, cell: Mapping[str, Any]) -> str:
    layers = cell["by_layer"]
    series = {
        LABELS[variant]: (
            color,
            np.mean([layer["imbalance"][variant] for layer in layers], axis=0).tolist(),
        )
        for variant, color in COLORS.items()
    }
    bound = np.mean([layer["bound"] for layer in layers], axis=0).tolist()
    series["bound of any split"] = ("#222222", bound)
    example = cell["example"]
    figures = [
        _figure(f"{name}-imbalance", "Imbalance over test batches, mean over layers",
                _lines(series, "test batch")),
        _figure(f"{name}-loads",
                f"Rank loads over their mean: layer {example['layer']}, batch {example['batch']}, "
                "the worst for an even split", _bars(example["loads"])),
        _figure(f"{name}-placement",
                "Copies in that batch: a line joins an expert's first copy to another one, as "
                "thick as the tokens that the LP sends there; ranks coloured by load",
                _graph(cell["ep"], example)),
    ]  # fmt: skip
    if cell["lps"]["count"]:
        figures.append(_figure(f"{name}-solver", "Solver: programs by iterations, and by gap",
                               _solver(cell)))  # fmt: skip
    body = '<div class="row">\n' + "\n".join(figures) + "\n</div>"
    return _section(name, _name(cell), body)


def _figure(name: str, title: str, body: str) -> str:
    return (
        f'<div id="{name}" style="max-width:{WIDTH}px">\n<h3>{escape(title)}</h3>\n{body}\n</div>'
    )


def _svg(body: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}">\n' + "\n".join(body) + "\n</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    raw = max(high - low, 1e-9) / 4
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    return [step * i for i in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def _axes(low: float, high: float) -> list[str]:
    """Grid lines with labels, for values from ``low`` to ``high``."""
    body = []
    for value in _ticks(low, high):
        y = _y(value, low, high)
        body.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH}" stroke="#ddd"/>')
        body.append(_text(LEFT - 5, y + 4, f"{value:.4g}", "end"))
    return body


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / max(high - low, 1e-9))


def _legend(entries: Mapping[str, str]) -> list[str]:
    body, x = [], float(LEFT)
    for label, color in entries.items():
        body.append(f'<rect x="{x:.0f}" y="{HEIGHT - 10}" width="9" height="9" fill="{color}"/>')
        body.append(_text(x + 13, HEIGHT - 2, label, "start"))
        x += 26 + 6.2 * len(label)
    return body


def _lines(series: Mapping[str, tuple[str, list[float]]], below: str) -> str:
    high = max(max(values) for _, values in series.values())
    low = 1.0 if high > 1 else high - 1
    length = max(len(values) for _, values in series.values())
    body = _axes(low, high)
    for label, (color, values) in series.items():
        step = (WIDTH - LEFT - 8) / max(length - 1, 1)
        points = " ".join(f"{LEFT + i * step:.1f},{_y(v, low, high):.1f}"
                          for i, v in enumerate(values))  # fmt: skip
        body.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4">'
            f"<title>{escape(label)}</title></polyline>"
        )
    body.append(_text(WIDTH, HEIGHT - 20, f"{below} 0 to {length - 1}", "end"))
    return _svg(body + _legend({label: color for label, (color, _) in series.items()}))


def _bars(loads: Mapping[str, list[float]]) -> str:
    shown = ("none", "even", "lp")
    mean = max(float(np.mean(loads["none"])), 1e-12)
    high = max(max(loads[name]) for name in shown) / mean
    ranks = len(loads["none"])
    wide = (WIDTH - LEFT) / ranks
    body = _axes(0.0, high)
    for rank in range(ranks):
        for at, name in enumerate(shown):
            value = loads[name][rank] / mean
            y = _y(value, 0.0, high)
            body.append(
                f'<rect x="{LEFT + (rank + 0.1 + 0.28 * at) * wide:.2f}" y="{y:.1f}" '
                f'width="{0.27 * wide:.2f}" height="{HEIGHT - BOTTOM - y:.1f}" '
                f'fill="{COLORS[name]}"><title>rank {rank}, {LABELS[name]}: {value:.3f}'
                "</title></rect>"
            )
    one = _y(1.0, 0.0, high)
    body.append(f'<path d="M{LEFT} {one:.1f}H{WIDTH}" stroke="#222"/>')
    body.append(_text(WIDTH, HEIGHT - 20, f"ranks 0 to {ranks - 1}", "end"))
    return _svg(body + _legend({LABELS[name]: COLORS[name] for name in shown}))


def _colors(ratio: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Colours, one more axis of red, green and blue, of loads over their mean."""
    level = np.clip(np.log(np.maximum(ratio, 1e-9)) / np.log(4), -1, 1)[..., None]
    mean, hot, cold = (np.array(color, dtype=np.float64) for color in (MEAN, HOT, COLD))
    mixed = mean + np.abs(level) * (np.where(level > 0, hot, cold) - mean)
    colors: NDArray[np.uint8] = mixed.round().astype(np.uint8)
    return colors


def _graph(ep: int, example: Mapping[str, Any]) -> str:
    size, loads = 520, example["loads"]["lp"]
    mean = max(float(np.mean(loads)), 1e-12)
    radius, center = size / 2 - 24, (WIDTH / 2, size / 2)
    at = [
        (center[0] + radius * math.sin(angle), center[1] - radius * math.cos(angle))
        for angle in (2 * math.pi * rank / ep for rank in range(ep))
    ]
    colors = _colors(np.array(loads) / mean).tolist()
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


def _solver(cell: Mapping[str, Any]) -> str:
    lps = cell["lps"]
    iterations = np.concatenate([layer["iterations"] for layer in cell["by_layer"]]).astype(int)
    gaps = np.concatenate([layer["gap"] for layer in cell["by_layer"]]).astype(float)
    counts = np.bincount(iterations)
    decades = np.clip(np.floor(np.log10(np.maximum(gaps, 1e-9))), -9, 0).astype(int)
    rows = [(str(i), str(n)) for i, n in enumerate(counts)]
    by_gap = [(f"under 1e{d + 1}", str((decades == d).sum())) for d in sorted(set(decades))]
    return (
        f"<p>{lps['certified']} of {lps['count']} programs certified, largest gap "
        f"{lps['max_gap'] or 0:.1e}. Of several groups of a batch the largest is counted.</p>\n"
        '<div class="row">\n'
        + _table(["iterations", "batches"], rows)
        + _table(["gap", "batches"], by_gap)
        + "\n</div>"
    )


def _png(pixels: NDArray[np.uint8]) -> str:
    """Encode ``[height, width, 3]`` as the address of an inline PNG."""

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


def _heat(report: Mapping[str, Any]) -> str:
    found = report["heat"]
    tokens = np.array(found["tokens"], dtype=np.float64)
    ratio = tokens / np.maximum(tokens.mean(1, keepdims=True), 1e-12)
    image = _png(_colors(ratio).transpose(1, 0, 2))
    steps = found["steps"]
    return (
        f'<img src="{image}" alt="load of each expert over batches">\n'
        f"<p>Rows: experts 0 to {tokens.shape[1] - 1}, from the top. Columns: {len(steps)} parts "
        f"of the trace, the first from step {steps[0]}, the last from step {steps[-1]}. White: the "
        "mean load; red: four times the mean or more; blue: a quarter or less.</p>"
    )


def _timing(report: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            _name(cell),
            "no LP" if lps["median_us_per_lp"] is None else f"{lps['median_us_per_lp']:.2f} us",
            "" if lps["mean_iterations"] is None else f"{lps['mean_iterations']:.2f}",
        ]
        for cell, lps in ((cell, cell["lps"]) for cell in cells)
    ]
    environment = {k: v for k, v in report["environment"].items() if v is not None}
    return (
        _table(["placement", "time per LP", "mean iterations"], rows)
        + f"\n<p>Time per LP: {escape(cells[0]['lps']['time_is'])}. The whole comparison took "
        f"{report['seconds']:.1f} s.</p>\n"
        + _table(["environment", ""], [[k, str(v)] for k, v in environment.items()])
    )
