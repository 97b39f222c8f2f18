"""Draw benchmark results with matplotlib, without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lplb_triton.bench.balance import find_typical
from lplb_triton.bench.tables import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lplb_triton.bench.balance import Cell, Example

__all__ = ["LINES", "balance_png", "placement_png"]

# What is drawn, with its colour, width and dashes: equal lines stay visible on top of each other,
# and are told apart without colours.
LINES: dict[str, tuple[str, str, float, str]] = {
    "none": ("no balancing", "#878e98", 3.2, "-"),
    "eplb": ("EPLB", "#c84f00", 2.2, "--"),
    "integer": ("LP, tokens", "#0067ab", 1.5, "-"),
}


def balance_png(cells: Sequence[Cell], *, title: str) -> bytes:
    """Draw each combination: sorted rank loads of a typical batch, and imbalance over the batches.

    All rows show the same batch, the one whose mean gain over EPLB is the median.

    Parameters
    ----------
    cells
        Results of `lplb_triton.bench.balance.run`; impossible combinations are left out.
    title
        Text above the picture.

    Returns
    -------
    bytes
        A PNG file.

    Raises
    ------
    MissingExtraError
        If matplotlib isn't installed.
    ValueError
        If no combination has results.
    """
    drawn = [cell for cell in cells if cell.reason is None]
    if not drawn:
        raise ValueError("cells must hold at least one combination with results")
    figure = _figure(12, 0.7 + 3.7 * len(drawn))
    # A file name may hold dollar signs, which start a formula in matplotlib.
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(len(drawn), 2, squeeze=False)
    for (left, right), cell, example in zip(axes, drawn, find_typical(drawn), strict=True):
        _draw_loads(left, cell, example)
        _draw_batches(right, cell)
    return _png(figure)


def placement_png(rows: Sequence[dict[str, Any]], *, title: str) -> bytes:
    """Draw the mean excess of each placement under the LP, one group of bars a combination.

    Parameters
    ----------
    rows
        Results of `lplb_triton.bench.placement.run`.
    title
        Text above the picture.

    Returns
    -------
    bytes
        A PNG file.

    Raises
    ------
    MissingExtraError
        If matplotlib isn't installed.
    """
    figure = _figure(2 + 1.5 * len(rows), 4)
    ax = figure.subplots()
    at = np.arange(len(rows))
    methods = list(rows[0]["methods"])
    width = 0.84 / len(methods)
    for number, name in enumerate(methods):
        excess = [100 * float(np.mean(row["methods"][name]["lp"])) for row in rows]
        offset = width * (number - (len(methods) - 1) / 2)
        ax.bar(at + offset, excess, width=width, color=f"C{number}", label=f"{name} + LP")
    ax.set_xticks(at, [f"EP {row['ep']}, {row['slots']} a rank" for row in rows])
    ax.set_ylabel("mean excess imbalance, %")
    ax.set_title(title, fontsize=10, parse_math=False)
    ax.legend(fontsize=8, frameon=False)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches."""
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface keeps pyplot's global state, and its choice of backend, out of this.
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _name(cell: Cell) -> str:
    if cell.slots == 0:
        return f"EP {cell.ep}, {cell.placement}, no slots"
    slots = "slot" if cell.slots == 1 else "slots"
    return f"EP {cell.ep}, {cell.placement}, {cell.slots} redundant {slots} per rank"


def _draw_loads(ax: Axes, cell: Cell, example: Example) -> None:
    """Draw the ranks of one batch, the most loaded first."""
    mean = max(float(example.loads["none"].mean()), 1e-12)
    ranks = np.arange(1, cell.ep + 1)
    for name, (label, color, width, style) in LINES.items():
        loads = np.sort(example.loads[name])[::-1] / mean
        ax.plot(ranks, loads, color=color, linewidth=width, linestyle=style, marker="o",
                markersize=width + 1, label=f"{label}: {loads[0]:.2f}")  # fmt: skip
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("ranks, the most loaded first, for which all wait (each line in its own order)")
    ax.set_ylabel("load of a rank / mean load")
    title = f"{_name(cell)}: one batch (layer {example.layer}, batch {example.batch})"
    _add_title_and_legend(ax, title)


def _draw_batches(ax: Axes, cell: Cell) -> None:
    """Draw the most loaded rank over the test batches, and what no split can get below."""
    for name, (label, color, width, style) in LINES.items():
        values = cell.imbalance(name).mean(0)
        text = f"{label}: {values.mean():.3f}"
        ax.plot(values, color=color, linewidth=width, linestyle=style, label=text)
    bound = cell.bound().mean(0)
    text = f"out of reach: {bound.mean():.3f}"
    ax.fill_between(np.arange(len(bound)), bound, color="#cdd4db", linewidth=0, label=text)
    seen = recordings = 0
    first = cell.results[0].layer
    for result in cell.results:
        if result.layer == first:
            if seen:
                ax.axvline(seen - 0.5, color="black", linestyle=":", linewidth=0.8)
            recordings += 1
            seen += result.stretch.stop - result.stretch.split
    ax.set_ylim(bottom=0.8)
    ax.set_xlabel("test batch (dotted: another recording)" if recordings > 1 else "test batch")
    ax.set_ylabel("load of the most loaded rank / mean load")
    _add_title_and_legend(ax, f"{_name(cell)}: mean over layers")


def _add_title_and_legend(ax: Axes, title: str) -> None:
    """Add a title, and the legend in one line under it, where it hides no data."""
    ax.set_title(title, fontsize=10, pad=22)
    ax.legend(
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(LINES) + 1,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.2,
    )
