"""Triton kernels and their launchers; imports nothing else of the package.

Launchers take tensors whose sizes and devices the caller has checked.
"""

from lplb_triton.kernels.launch import (
    FIRST_CHANNEL,
    Channel,
    Exchange,
    SelectTables,
    Settings,
    SolveBuffers,
    SolveTables,
    SpreadTables,
    count_by_program,
    is_interpreted,
    select,
    solve,
    solve_counts,
    solve_scratch,
    spread_shares,
    sum_by_program,
)
from lplb_triton.kernels.launch_sync import (
    COUNT_BITS,
    FAULTS,
    HEADER_WORDS,
    MAX_RANKS,
    STATUS_FIRST,
    Quotas,
    channel_words,
    divide_quotas,
    status_words,
    sum_gathered,
    sum_over_ranks,
)
from lplb_triton.kernels.pipeline import Pipeline

__all__ = [
    "COUNT_BITS",
    "FAULTS",
    "FIRST_CHANNEL",
    "HEADER_WORDS",
    "MAX_RANKS",
    "STATUS_FIRST",
    "Channel",
    "Exchange",
    "Pipeline",
    "Quotas",
    "SelectTables",
    "Settings",
    "SolveBuffers",
    "SolveTables",
    "SpreadTables",
    "channel_words",
    "count_by_program",
    "divide_quotas",
    "is_interpreted",
    "select",
    "solve",
    "solve_counts",
    "solve_scratch",
    "spread_shares",
    "status_words",
    "sum_by_program",
    "sum_gathered",
    "sum_over_ranks",
]
