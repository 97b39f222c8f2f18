"""Triton kernels and their launchers.

Each operation has its kernel and its launcher in one file. Of the package they import only the
numbers in `lplb_triton._layout`. Launchers take tensors whose sizes and devices the caller has
checked.
"""

from lplb_triton._layout import (
    COUNT_BITS,
    HEADER_WORDS,
    MAX_RANKS,
    NEAR_ROWS,
    STATUS_FIRST,
    TIME_PLANS,
)
from lplb_triton.kernels.count import count_by_program, sum_by_program
from lplb_triton.kernels.exchange import (
    FIRST_CHANNEL,
    Channel,
    Exchange,
    channel_words,
    sum_over_ranks,
)
from lplb_triton.kernels.exchange_rows import FAULTS, status_words
from lplb_triton.kernels.gathered import sum_gathered
from lplb_triton.kernels.launch import is_interpreted
from lplb_triton.kernels.live.arguments import live_scratch_words
from lplb_triton.kernels.live.launch import (
    Live,
    LiveCopies,
    LiveRules,
    LiveTables,
    plan_live,
)
from lplb_triton.kernels.loads import MOST_EXPERTS, record_loads
from lplb_triton.kernels.metrics import BatchMetrics
from lplb_triton.kernels.near.launch import NearPlan, NearTables, plan_near
from lplb_triton.kernels.pipeline import Pipeline
from lplb_triton.kernels.pull.copy import UNIT_BYTES, CopyTable, make_copy_table, pull_rows
from lplb_triton.kernels.pull.gradients import (
    add_gradients,
    exchange_returns,
    list_words,
    write_gradients,
)
from lplb_triton.kernels.pull.signals import Signals, meet
from lplb_triton.kernels.quotas import Quotas, divide_quotas
from lplb_triton.kernels.report import read_report
from lplb_triton.kernels.rows import add_rows, take_rows
from lplb_triton.kernels.select import SelectTables, select
from lplb_triton.kernels.solve.launch import (
    ExpandTables,
    Settings,
    SolveBuffers,
    SolveTables,
    expand_shares,
    solve,
    solve_counts,
    solve_scratch,
)
from lplb_triton.kernels.time.launch import TimePlan, TimeRules, TimeTables, plan_time

__all__ = [
    "COUNT_BITS",
    "FAULTS",
    "FIRST_CHANNEL",
    "HEADER_WORDS",
    "MAX_RANKS",
    "MOST_EXPERTS",
    "STATUS_FIRST",
    "TIME_PLANS",
    "UNIT_BYTES",
    "BatchMetrics",
    "Channel",
    "CopyTable",
    "Exchange",
    "ExpandTables",
    "Live",
    "LiveCopies",
    "LiveRules",
    "LiveTables",
    "NEAR_ROWS",
    "NearPlan",
    "NearTables",
    "Pipeline",
    "Quotas",
    "SelectTables",
    "Settings",
    "Signals",
    "SolveBuffers",
    "SolveTables",
    "TimePlan",
    "TimeRules",
    "TimeTables",
    "add_gradients",
    "add_rows",
    "channel_words",
    "count_by_program",
    "divide_quotas",
    "exchange_returns",
    "expand_shares",
    "is_interpreted",
    "list_words",
    "live_scratch_words",
    "make_copy_table",
    "meet",
    "plan_live",
    "plan_near",
    "plan_time",
    "pull_rows",
    "read_report",
    "record_loads",
    "select",
    "solve",
    "solve_counts",
    "solve_scratch",
    "status_words",
    "sum_by_program",
    "sum_gathered",
    "sum_over_ranks",
    "take_rows",
    "write_gradients",
]
