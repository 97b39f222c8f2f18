"""Compare objectives on simulated ranks: predicted and measured times; nothing here prints."""

from lplb_triton.bench.objectives.batches import LOADS, PLACEMENTS, Batch, Grid, draw_batches
from lplb_triton.bench.objectives.plans import WAYS, WayPlan, choose_way, plan_batch
from lplb_triton.bench.objectives.results import make_row, summarize_rows
from lplb_triton.bench.objectives.runs import RUNS, time_runs
from lplb_triton.bench.objectives.timing import (
    MOST_RANKS,
    NEAR,
    ROUNDS,
    choose_ranks,
    select_ranks,
    time_plans,
)

__all__ = [
    "LOADS",
    "MOST_RANKS",
    "NEAR",
    "PLACEMENTS",
    "ROUNDS",
    "RUNS",
    "WAYS",
    "Batch",
    "Grid",
    "WayPlan",
    "choose_ranks",
    "choose_way",
    "draw_batches",
    "make_row",
    "plan_batch",
    "select_ranks",
    "summarize_rows",
    "time_plans",
    "time_runs",
]
