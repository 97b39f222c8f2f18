"""Figures that a report shows beside those of the comparison, and the reading of its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lplb_triton.bench.balance import (
    RANKS_PER_NODE,
    Cell,
    Options,
    compare_batch_sizes,
    find_changes,
    find_traffic,
)
from lplb_triton.bench.report.saving import predict_saving
from lplb_triton.bench.types import Row
from lplb_triton.traces.trace import Trace, parse_json

__all__ = ["describe_shown", "heat", "rank_loads", "read"]

HEAT_BINS = 64
# Layers and batches of the maps of rank loads.
MOST_LAYERS, MOST_BATCHES = 8, 48


def describe_shown(
    trace: Trace,
    cells: tuple[Cell, ...],
    shown: int,
    options: Options,
    ranks_per_node: int = RANKS_PER_NODE,
) -> Row:
    """Collect what a report says of one combination and not of the others.

    Parameters
    ----------
    trace, options
        As given to `lplb_triton.bench.balance.run`.
    cells
        Its results.
    shown
        Index of the combination.
    ranks_per_node
        Consecutive ranks of a node.

    Returns
    -------
    dict
        ``cell`` (the index), ``ranks`` (`rank_loads`), ``changes``, ``batch_sizes``, ``traffic``
        and ``saving`` (see `find_changes`, `compare_batch_sizes`, `find_traffic` and
        `predict_saving`).
    """
    cell = cells[shown]
    return {
        "cell": shown,
        "ranks": rank_loads(cell),
        "changes": find_changes(trace, cell, options),
        "batch_sizes": compare_batch_sizes(trace, cell, options),
        "traffic": find_traffic(trace, cell, options, ranks_per_node),
        "saving": predict_saving(trace, cell, options.tolerance),
    }


def rank_loads(cell: Cell) -> Row:
    """Collect rank loads over the test batches.

    Parameters
    ----------
    cell
        A result of `lplb_triton.bench.balance.run`.

    Returns
    -------
    dict
        ``batches`` (numbers of the test batches that are shown, at most 48, evenly spread) and
        ``layers``, at most 8 and evenly spread: ``layer``, and by ``eplb`` and ``integer`` the
        load of each rank in each of the batches, in percent of the mean load with one decimal
        ``[batches][ranks]``.
    """
    by_layer: dict[int, dict[str, list[Any]]] = {}
    for result in cell.results:
        found = by_layer.setdefault(result.layer, {"eplb": [], "integer": []})
        for name, values in found.items():
            values.append(result.loads[name])
    layers = list(by_layer)
    at = np.linspace(0, len(layers) - 1, min(MOST_LAYERS, len(layers))).round().astype(int)
    batches = cell.imbalance("integer").shape[1]
    chosen = np.linspace(0, batches - 1, min(MOST_BATCHES, batches)).round().astype(int)
    rows = []
    for layer in (layers[i] for i in at):
        percent = {}
        for name, parts in by_layer[layer].items():
            loads = np.concatenate(parts)[chosen]
            mean = np.maximum(loads.mean(1, keepdims=True), 1e-12)
            percent[name] = (100 * loads / mean).round(1).tolist()
        rows.append({"layer": layer, **percent})
    return {"batches": chosen.tolist(), "layers": rows}


def heat(trace: Trace, layer: int) -> Row:
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
