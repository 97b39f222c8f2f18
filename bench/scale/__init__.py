"""Simulate balancing on hundreds of ranks: quality, sizes, bytes on the wire, and solve times.

========================  ==========================================================================
``even``                  EPLB over all ranks, each expert's tokens split evenly over its copies
``one``                   `lplb_triton.chain` over all ranks, one LP of all ranks
``group``                 the copies of an expert within one group of ranks, an LP for each group
``levels``                copies anywhere, as for ``one``: an LP that divides the tokens among the
                          groups, then an LP in each group for what it got
========================  ==========================================================================
"""

from __future__ import annotations

from lplb_triton.bench.scale.loads import LOADS, ScaleLoads, choose_experts, draw_loads
from lplb_triton.bench.scale.plans import Outcome, plan_even, plan_levels, plan_programs
from lplb_triton.bench.scale.replay import Options, find_break_even, run
from lplb_triton.bench.scale.sizes import count_wire_bytes, explain_refusal, measure_sizes
from lplb_triton.bench.scale.times import time_plans

__all__ = [
    "LOADS",
    "Options",
    "Outcome",
    "ScaleLoads",
    "choose_experts",
    "count_wire_bytes",
    "draw_loads",
    "explain_refusal",
    "find_break_even",
    "measure_sizes",
    "plan_even",
    "plan_levels",
    "plan_programs",
    "run",
    "time_plans",
]
