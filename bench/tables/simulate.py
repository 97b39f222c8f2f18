"""Make the tables of `lplb-bench simulate`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_us
from lplb_triton.bench.tables.grid import Grid

__all__ = [
    "make_simulate_grids",
]


def make_simulate_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench simulate``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    o = report["options"]
    rows = report["rows"]
    return [
        Grid(
            "Simulation: expert products of the slowest rank, microseconds",
            ("EP", "slots", "balance", "slowest rank", "mean rank", "imbalance", "over even"),
            [
                (
                    *(str(row["ep"]), str(row["slots"]), name, format_us(row[name]["slowest_us"])),
                    *(format_us(row[name]["mean_us"]), f"{row[name]['imbalance']:.3f}"),
                    f"{row[name]['over_even']:.3f}",
                )
                for row in rows
                for name in ("none", "eplb", "lplb", "even")
            ],
            (
                f"A simulation on one GPU: ranks one after the other, {o['tokens']} rows per rank "
                f"on average, hidden {o['hidden']}, inner {o['inner']}, bfloat16, forward pass of "
                f"the two grouped products; no communication, no routing. Medians over "
                f"{rows[0]['batches']} batches of the packaged trace. imbalance: largest over mean "
                "tokens. even: as many tokens for every expert, the ceiling.",
            ),
        )
    ]
