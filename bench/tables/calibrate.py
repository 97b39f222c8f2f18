"""The table of ``lplb-bench calibrate``."""

from __future__ import annotations

from typing import Any

import numpy as np

from lplb_triton.bench.tables.grid import Grid

__all__ = ["make_calibration_grid"]


def make_calibration_grid(report: dict[str, Any]) -> Grid:
    """Lay out the report of ``lplb-bench calibrate``."""
    rows = report["rows"]
    errors = [abs(row["predicted"] / row["us"] - 1) for row in rows]
    lines: list[tuple[str, ...]] = [
        (
            str(sum(row["rows"])),
            str(sum(n > 0 for n in row["rows"])),
            str(max(row["rows"])),
            f"{row['us']:.1f}",
            f"{row['predicted']:.1f}",
            f"{row['predicted'] / row['us'] - 1:+.1%}",
        )
        for row in rows
    ]
    return Grid(
        f"Expert products of one rank, {report['slots']} experts of "
        f"{report['hidden']}x{report['inner']}",
        ("rows", "active experts", "most rows", "measured us", "cost us", "off"),
        lines,
        (
            f"The cost is off by {float(np.median(errors)):.1%} in the median and {max(errors):.1%}"
            f" at worst; tiles are wide from {report['cost']['wide_from']} rows a slot on.",
        ),
    )
