"""Triton kernels and their launchers; imports nothing else of the package.

Launchers take tensors whose sizes and devices the caller has checked.
"""

from lplb_triton.kernels.launch import (
    Pipeline,
    SelectTables,
    Settings,
    SolveBuffers,
    SolveTables,
    count_by_program,
    is_interpreted,
    select,
    solve,
    solve_counts,
    sum_by_program,
)

__all__ = [
    "Pipeline",
    "SelectTables",
    "Settings",
    "SolveBuffers",
    "SolveTables",
    "count_by_program",
    "is_interpreted",
    "select",
    "solve",
    "solve_counts",
    "sum_by_program",
]
