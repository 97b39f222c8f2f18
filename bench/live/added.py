"""What live slots would add to a comparison of ``lplb-bench balance``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lplb_triton.bench.balance import Cell
from lplb_triton.bench.live.plans import plan_batch, solve_batches
from lplb_triton.bench.types import Row
from lplb_triton.reference.live import LiveCase
from lplb_triton.traces.trace import Trace

__all__ = ["LIVE_ABOVE", "LIVE_SLOTS", "find_gain"]

LIVE_SLOTS, LIVE_ABOVE = 1, 1.02


def find_gain(trace: Trace, cells: Sequence[Cell]) -> Row | None:
    """Add live slots to the LP's plans of one layer.

    The layer is that of the batch that an even split leaves the most imbalanced, of the first
    combination that live slots are for.

    Parameters
    ----------
    trace
        As given to `lplb_triton.bench.balance.run`.
    cells
        Its results.

    Returns
    -------
    dict or None
        ``ep``, ``slots`` and ``placement`` of the combination, ``layer``, ``live`` (slots a rank),
        ``above``, ``pieces`` (experts fetched, mean per rank and batch), ``fetching`` (part of the
        batches that fetch any) and ``imbalance``: by ``lp`` and ``live`` of each test batch, in
        whole tokens over all ranks. None where every placement has several groups.
    """
    for cell in cells:
        if cell.reason is None and cell.results[0].placement.n_group == 1:
            return _find_gain_of(trace, cell)
    return None


def _find_gain_of(trace: Trace, cell: Cell) -> Row:
    layer = cell.worst().layer
    case = LiveCase(cell.ep, LIVE_SLOTS, LIVE_ABOVE)
    before, after, pieces = [], [], []
    for result in cell.results:
        if result.layer != layer:
            continue
        part = result.stretch
        counts = trace.totals()[part.split : part.stop, layer]
        # The comparison itself counts programs that were not certified.
        static = solve_batches(result.placement, counts, certified=False)
        for batch, row in enumerate(counts):
            # A batch without tokens is balanced.
            mean = max(row.sum(), 1) / cell.ep
            found = plan_batch(case, static, batch)
            empty = not row.any()
            before.append(1.0 if empty else static.find_loads(batch).max() / mean)
            after.append(1.0 if empty else found.loads.max() / mean)
            pieces.append(int((found.experts >= 0).sum()))
    return {
        **{"ep": cell.ep, "slots": cell.slots, "placement": cell.placement, "layer": layer},
        **{"live": LIVE_SLOTS, "above": LIVE_ABOVE},
        "pieces": float(np.mean(pieces)) / cell.ep,
        "fetching": float(np.mean(np.array(pieces) > 0)),
        "imbalance": {
            "lp": [round(float(value), 6) for value in before],
            "live": [round(float(value), 6) for value in after],
        },
    }
