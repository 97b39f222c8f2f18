"""Replay recorded expert loads through placements and the solver; nothing here prints or plots.

For every combination of an EP size, a number of redundant slots and a placement, the experts are
placed by the first batches of the trace and the following ones are balanced. Five ways are
compared by their imbalance, the largest rank load over the mean rank load of a batch:

=============  =================================================================================
``none``       experts in order, as many on each rank, no replicas
``reordered``  EPLB by the history without replicas
``even``       the placement's copies, each expert's tokens split evenly over its copies
``lp``         the placement's copies, tokens split by the LP of that batch
``integer``    the same in whole tokens, as every source rank rounds its own quotas
=============  =================================================================================
"""

from __future__ import annotations

from lplb_triton.bench.balance.changes import (
    choose_shown,
    compare_batch_sizes,
    find_changes,
)
from lplb_triton.bench.balance.history import Stretch, find_stretches
from lplb_triton.bench.balance.placements import BY_HISTORY, make_placement
from lplb_triton.bench.balance.replay import Options, combinations, run
from lplb_triton.bench.balance.results import (
    VARIANTS,
    Cell,
    Example,
    LayerResult,
    find_typical,
    imbalance,
)
from lplb_triton.bench.balance.traffic import (
    RANKS_PER_NODE,
    divide_assignments,
    expand_shares,
    find_traffic,
    spread_sources,
)
from lplb_triton.bench.balance.whole_tokens import check_tokens, compute_token_loads, merge_sources

__all__ = [
    "BY_HISTORY",
    "RANKS_PER_NODE",
    "VARIANTS",
    "Cell",
    "Example",
    "LayerResult",
    "Options",
    "Stretch",
    "check_tokens",
    "choose_shown",
    "compare_batch_sizes",
    "divide_assignments",
    "expand_shares",
    "find_changes",
    "find_traffic",
    "combinations",
    "merge_sources",
    "imbalance",
    "compute_token_loads",
    "make_placement",
    "run",
    "find_stretches",
    "find_typical",
    "spread_sources",
]
