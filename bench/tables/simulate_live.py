"""Make the tables of `lplb-bench simulate-live`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_us
from lplb_triton.bench.tables.grid import Grid

__all__ = ["make_simulate_live_grids"]

_WAYS = ("none", "lplb", "live")


def make_simulate_live_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench simulate-live``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    o = report["options"]
    lines: list[tuple[str, ...]] = []
    ends: list[tuple[str, ...]] = []
    for found in report["rows"]:
        head = (found["model"], str(found["ep"]), found["workload"])
        even = found["break_even"]
        best = min(row["us"]["live"] / row["us"]["lplb"] for row in found["rows"])
        ends.append((*head, "never" if even is None else str(even), f"{best:.3f}"))
        for row in found["rows"]:
            lines.append(
                (
                    *(*head, str(row["tokens"])),
                    *(format_us(row["us"][way]) for way in _WAYS),
                    f"{row['us']['live'] / row['us']['lplb']:.3f}",
                    "/".join(f"{row['imbalance'][way]:.2f}" for way in _WAYS),
                    f"{row['sent']:.1f}/{row['received']:.1f}",
                    format_us(row["fetch_us"]),
                )
            )
    passes = "forward and backward" if o["training"] else "forward"
    return [
        Grid(
            "Simulation: a layer's expert products and fetches, microseconds",
            (
                *("model", "EP", "workload", "tokens", *_WAYS, "live/lplb", "imbalance"),
                *("sent/received", "fetch"),
            ),
            lines,
            (
                f"A simulation on one GPU, {passes}: products of the busiest ranks, one after the "
                "other, measured"
                + (", three times the forward pass" if o["training"] else "")
                + f"; weights of live slots at {o['pull_rate']:g} GB/s, as measured, at the "
                "busiest port, as if nothing overlapped; no dispatch, no routing, no plan. live: "
                f"{o['live']} live slots a rank on {o['base']}, with their fetches; lplb: as many "
                f"slots, all static. Means over {o['batches']} batches. imbalance: of none, lplb "
                "and live. sent/received: experts at the busiest rank.",
            ),
        ),
        Grid(
            "Simulation: from how many tokens per rank live slots beat static ones",
            ("model", "EP", "workload", "tokens", "least live/lplb"),
            ends,
            (f"Of the tokens {', '.join(map(str, o['tokens']))}, from which on all are faster.",),
        ),
    ]
