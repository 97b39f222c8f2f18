"""Compare live slots with static placements and with replicas chosen for every batch.

For every source of loads (a workload or a trace), EP size, number of live slots and base placement,
the same batches are balanced in these ways, all in whole tokens over all ranks (docs/method.md,
equation 15):

=============  =================================================================================
``none``       experts in order, as many on each rank, no copies
``eplb_1``     EPLB by the history with one redundant slot a rank, and the LP
``eplb``       the same with as many slots as the base placement and the live slots together
``chain``      `lplb_triton.chain` with as many slots as ``eplb``, and the LP
``published``  UltraEP's planner with as many slots as there are live ones, experts at home
``base``       the base placement and its LP, without live slots
``live``       the base placement, its LP, and the plan of the live slots
=============  =================================================================================

On a GPU, `time_runs` times runs with and without live slots.
"""

from __future__ import annotations

from lplb_triton.bench.live.added import find_gain
from lplb_triton.bench.live.compare import WAYS, Options, run
from lplb_triton.bench.live.plans import (
    Base,
    BatchPlan,
    StaticPlan,
    make_static_plan,
    plan_batch,
    read_base,
)
from lplb_triton.bench.live.sources import Source, draw_workloads, take_trace
from lplb_triton.bench.live.targets import judge_targets
from lplb_triton.bench.live.times import RUNS, Timing, time_runs

__all__ = [
    "RUNS",
    "WAYS",
    "Base",
    "BatchPlan",
    "Options",
    "Source",
    "StaticPlan",
    "Timing",
    "draw_workloads",
    "find_gain",
    "judge_targets",
    "make_static_plan",
    "plan_batch",
    "read_base",
    "run",
    "take_trace",
    "time_runs",
]
