"""Make the tables of `lplb-bench pipeline`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_case, format_us
from lplb_triton.bench.tables.grid import Grid

__all__ = [
    "make_pipeline_grids",
]


def make_pipeline_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench pipeline``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    rows = report["rows"]
    parts = ("count", "solve", "select", "floor", "host")
    spread = ("median", "p99", "max")
    grids = [] if report["traffic"] is None else [_make_run_grid(report["traffic"])]
    grids.append(
        Grid(
            "Whole run without load sync, microseconds",
            (
                *("shape", "tokens", "run, median", "p99", "max"),
                *(*parts, "steps, median / max", "KiB moved", "allocations"),
            ),
            [
                (
                    row["shape"],
                    str(row["tokens"]),
                    *(format_us(row["run_us"][s]) for s in spread),
                    *(format_us(row[f"{p}_us"]) for p in parts),
                    f"{row['iterations']['median']:g} / {row['iterations']['max']:g}",
                    f"{row['bytes'] / 1024:.0f}",
                    "n/a"
                    if row["allocations_per_call"] is None
                    else f"{row['allocations_per_call']:g}",
                )
                for row in rows
            ],
            (
                f"{rows[0]['experts']} experts, top-8, the same batches of all six load families "
                "for every shape; the solve's time is a median too. floor: the ids, read twice and "
                f"written once, at {report['bandwidth'] / 1e9:.0f} GB/s, the speed of a large copy "
                "in the same run (small batches stay in the cache). host: wall time of an eager "
                "call. steps: by potentials, of the solve.",
            ),
        )
    )
    if report["first_calls"]:
        grids.append(
            Grid(
                "First call of a new shape, seconds",
                ("shape", "empty kernel cache", "full kernel cache"),
                [
                    (row["shape"], f"{row['cold_s']:.2f}", f"{row['warm_s']:.2f}")
                    for row in report["first_calls"]
                ],
                ("In a fresh process; imports, placement, start of CUDA and Triton left out.",),
            )
        )
    return grids


def _make_run_grid(traffic: dict[str, Any]) -> Grid:
    return Grid(
        "Whole run on a recorded trace, without load sync, microseconds",
        (
            *("case", "loads", "batches", "median", "p95", "p99", "max"),
            *("solve, median", "p99"),
        ),
        [
            (
                *(format_case(row), row["kind"], str(row["batches"])),
                *(format_us(row["us"][name]) for name in ("median", "p95", "p99", "max")),
                *(format_us(solved["us"][name]) for name in ("median", "p99")),
            )
            for row, solved in zip(traffic["pooled"], traffic["solve"], strict=True)
        ],
        (
            f"Batches of {traffic['tokens']} tokens, top-8, their ids in random order: count, "
            "solve and select; solve: of the same batches, from counts. Placed by the first half "
            "of the trace, layer by layer; the batches are of the second half, evenly spread. A "
            "batch's time is the median of at least 20 replays; percentiles run over batches.",
        ),
    )
