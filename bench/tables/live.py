"""Make the tables of `lplb-bench live`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_percent
from lplb_triton.bench.tables.grid import Grid

__all__ = ["make_live_grids"]

_WAYS = {
    "none": "none",
    "eplb_1": "EPLB+LP, 1",
    "eplb": "EPLB+LP",
    "chain": "chain+LP",
    "published": "published",
    "base": "base+LP",
    "live": "live",
}
_NOTE = (
    "Largest over mean rank load, in whole tokens: mean/p95/max over the batches. none: experts in "
    "order; EPLB+LP, 1: one redundant slot a rank; EPLB+LP and chain+LP: as many redundant slots "
    "as the base and the live slots together; published: UltraEP's planner, experts at home, as "
    "many slots as live ones; base+LP: without live slots; live: with them."
)
_TRAFFIC_NOTE = (
    "pieces: experts fetched into live slots, mean per rank and batch; fetch: part of the batches "
    "that fetch any; leaving: copies that leave the busiest home rank, mean/max over the batches; "
    "bound: a largest load that no plan beats, over the mean load; gap: of live to the bound, "
    "mean/max."
)


def make_live_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench live``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
        Two for each EP size, base placement and number of live slots, and one of the targets.
    """
    grids = []
    for row in report["rows"]:
        sources = [*row["sources"], {**row["all"], "name": "all"}]
        where = f"EP {row['ep']}, {row['live']} live slots a rank on {row['base']}"
        lines = [
            (source["name"], str(source["batches"]), *_format_ways(source["imbalance"]))
            for source in sources
        ]
        header = ("loads", "batches", *_WAYS.values())
        grids.append(Grid(f"Imbalance, {where}", header, lines, (_NOTE,)))
        grids.append(_make_traffic_grid(where, sources))
    if report["targets"]:
        grids.append(_make_target_grid(report["targets"]))
    if grids and report["left_out"]:
        last = grids[-1]
        reasons = dict.fromkeys(
            f"n/a: {row['source']}, EP {row['ep']}, {row['base']}: {row['reason']}"
            for row in report["left_out"]
        )
        grids[-1] = Grid(last.title, last.header, last.rows, (*last.notes, *reasons))
    return grids


def _format_ways(imbalance: dict[str, dict[str, float] | None]) -> list[str]:
    cells = []
    for way in _WAYS:
        found = imbalance[way]
        cells.append(
            "n/a" if found is None else f"{found['mean']:.3f}/{found['p95']:.2f}/{found['max']:.2f}"
        )
    return cells


def _make_traffic_grid(where: str, sources: list[dict[str, Any]]) -> Grid:
    lines = []
    for source in sources:
        live, published = source["live"], source["published"]
        lines.append(
            (
                source["name"],
                f"{published['pieces']:.2f}",
                f"{live['pieces']:.2f}",
                format_percent(published["fetching"]),
                format_percent(live["fetching"]),
                *(f"{v['leaving']['mean']:.1f}/{v['leaving']['max']}" for v in (published, live)),
                f"{live['bound']:.3f}",
                f"{live['gap']['mean']:.3f}/{live['gap']['max']:.2f}",
            )
        )
    header = (
        *("loads", "pieces, published", "pieces, live", "fetch, published", "fetch, live"),
        *("leaving, published", "leaving, live", "bound", "gap"),
    )
    return Grid(f"What is fetched, {where}", header, lines, (_TRAFFIC_NOTE,))


def _make_target_grid(targets: list[dict[str, Any]]) -> Grid:
    return Grid(
        "What live slots are to reach",
        ("target", "EP", "live", "base", "figure", "at most", "holds"),
        [
            (
                *(row["what"], str(row["ep"]), str(row["live"]), row["base"]),
                *(f"{row['figure']:.4f}", f"{row['most']:g}", "yes" if row["holds"] else "NO"),
            )
            for row in targets
        ],
    )
