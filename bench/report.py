"""One self-contained HTML page from the figures of ``lplb-bench balance``.

The page needs no network and no script: pictures are inline SVG, the heat map an inline PNG.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lplb_triton.bench import charts
from lplb_triton.bench.balance import Cell, Options
from lplb_triton.bench.measure.simulate import split_tokens
from lplb_triton.bench.plots import COLORS
from lplb_triton.bench.tables import LABELS
from lplb_triton.traces.trace import Trace, parse_json

__all__ = ["flows", "heat", "html", "read"]

HEAT_BINS = 64

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
    tokens = split_tokens(placement, totals, "lplb", options.tolerance).flatten()
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


class _OldReportError(ValueError):
    """The message is complete, so that nothing is added to it."""


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
    # Not in files of versions without live slots, nor where live slots are for no placement.
    if report.get("live") is not None:
        parts.append(_section("live", "Live slots", _live(report["live"])))
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
                charts.draw_lines(series, "test batch")),
        _figure(f"{name}-loads",
                f"Rank loads over their mean: layer {example['layer']}, batch {example['batch']}, "
                "the worst for an even split", charts.draw_bars(example["loads"])),
        _figure(f"{name}-placement",
                "Copies in that batch: a line joins an expert's first copy to another one, as "
                "thick as the tokens that the LP sends there; ranks coloured by load",
                charts.draw_copies(cell["ep"], example)),
    ]  # fmt: skip
    if cell["lps"]["count"]:
        figures.append(_figure(f"{name}-solver", "Solver: programs by iterations, and by gap",
                               _solver(cell)))  # fmt: skip
    body = '<div class="row">\n' + "\n".join(figures) + "\n</div>"
    return _section(name, _name(cell), body)


def _figure(name: str, title: str, body: str) -> str:
    head = f'<div id="{name}" style="max-width:{charts.WIDTH}px">'
    return f"{head}\n<h3>{escape(title)}</h3>\n{body}\n</div>"


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


def _heat(report: Mapping[str, Any]) -> str:
    found = report["heat"]
    tokens = np.array(found["tokens"], dtype=np.float64)
    ratio = tokens / np.maximum(tokens.mean(1, keepdims=True), 1e-12)
    image = charts.encode_png(charts.color_loads(ratio).transpose(1, 0, 2))
    steps = found["steps"]
    return (
        f'<img src="{image}" alt="load of each expert over batches">\n'
        f"<p>Rows: experts 0 to {tokens.shape[1] - 1}, from the top. Columns: {len(steps)} parts "
        f"of the trace, the first from step {steps[0]}, the last from step {steps[-1]}. White: the "
        "mean load; red: four times the mean or more; blue: a quarter or less.</p>"
    )


def _live(found: Mapping[str, Any]) -> str:
    lp, live = (found["imbalance"][name] for name in ("lp", "live"))
    series = {"LP": (COLORS["lp"], lp), "LP and live slots": ("#2e8b57", live)}
    return (
        f"<p>What {int(found['live'])} live slot(s) a rank would add, which are filled with an "
        f"expert where a batch needs it: {escape(_name(found))}, layer {int(found['layer'])}. "
        f"{100 * found['fetching']:.1f}% of the batches would fetch, those whose LP leaves more "
        f"than {found['above']:g} times the mean load; {found['pieces']:.2f} experts a rank and "
        f"batch. Mean imbalance {np.mean(lp):.3f} by the LP, {np.mean(live):.3f} with live slots, "
        f"largest {max(lp):.3f} and {max(live):.3f}, in whole tokens.</p>\n"
        + charts.draw_lines(series, "test batch")
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
