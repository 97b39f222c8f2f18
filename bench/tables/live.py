"""Make the tables of `lplb-bench live`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import format_percent, format_spread
from lplb_triton.bench.tables.grid import Grid

__all__ = ["make_live_grids"]

_WAYS = {
    "none": "none",
    "eplb_1": "EPLB:1",
    "eplb": "EPLB",
    "chain": "chain",
    "published": "UltraEP",
    "base": "base",
    "live": "live",
}
_RUNS = ("without", "with", "again")
_NOTE = (
    "Largest over mean rank load, in whole tokens, over the batches. none: experts in order; "
    "EPLB:1: one redundant slot a rank, and the LP; EPLB and chain: as many redundant slots as the "
    "base and the live slots together, and the LP; UltraEP: its planner written anew, experts at "
    "home, as many slots as live ones; base: its LP without live slots; live: with them."
)
_TRAFFIC_NOTE = (
    "U: UltraEP's planner; L: live slots. pieces: experts fetched, mean per rank and batch; fetch: "
    "part of the batches that fetch any; leave: copies that leave the busiest home rank, mean/max "
    "over the batches; bound: a largest load that no plan of live slots beats, over the mean load; "
    "gap: of live to the bound, mean."
)
_TIMES_NOTE = (
    "Median / p99 / max over the batches; a batch's time is the median of at least 20 replays of a "
    "CUDA graph. Every plan and every id was held against the twin first. kind: batches that fetch "
    "(fetch), and others (level); without: Balancer.run on the base placement; with: the same with "
    "live slots; again: without them once more, timed after, which shows how the GPU's speed "
    "changes; plan: of live slots alone, from the shares of the run's LP, a launch of its own."
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
        Two for each EP size, base placement and number of live slots, and one of the targets; or
        one of the times.
    """
    grids = []
    for row in report["rows"]:
        sources = [*row["sources"], {**row["all"], "name": "all"}]
        where = f"EP {row['ep']}, {row['live']} live slots a rank on {row['base']}"
        where += f", {row['all']['batches']} batches"
        lines = [
            (source["name"], statistic, *_format_ways(source["imbalance"], statistic))
            for source in sources
            for statistic in ("mean", "p95", "max")
        ]
        header = ("loads", "", *_WAYS.values())
        grids.append(Grid(f"Imbalance, {where}", header, lines, (_NOTE,)))
        grids.append(_make_traffic_grid(where, sources))
    if report["targets"]:
        grids.append(_make_target_grid(report["targets"]))
    if report["times"]:
        grids.append(_make_times_grid(report["times"], report["options"]["tokens"]))
    if grids and report["left_out"]:
        last = grids[-1]
        reasons = dict.fromkeys(
            f"n/a: {row['source']}, EP {row['ep']}, {row['base']}: {row['reason']}"
            for row in report["left_out"]
        )
        grids[-1] = Grid(last.title, last.header, last.rows, (*last.notes, *reasons))
    return grids


def _format_ways(imbalance: dict[str, dict[str, float] | None], statistic: str) -> tuple[str, ...]:
    found = (imbalance[way] for way in _WAYS)
    return tuple("n/a" if way is None else f"{way[statistic]:.3f}" for way in found)


def _make_traffic_grid(where: str, sources: list[dict[str, Any]]) -> Grid:
    lines = []
    for source in sources:
        both = (source["published"], source["live"])
        live = source["live"]
        lines.append(
            (
                source["name"],
                *(f"{found['pieces']:.2f}" for found in both),
                *(format_percent(found["fetching"]) for found in both),
                *(f"{found['leaving']['mean']:.1f}/{found['leaving']['max']}" for found in both),
                f"{live['bound']:.3f}",
                f"{live['gap']['mean']:.3f}",
            )
        )
    header = (
        *("loads", "pieces U", "pieces L", "fetch U", "fetch L"),
        *("leave U", "leave L", "bound", "gap"),
    )
    return Grid(f"What is fetched, {where}", header, lines, (_TRAFFIC_NOTE,))


def _make_target_grid(targets: list[dict[str, Any]]) -> Grid:
    return Grid(
        "What live slots are to reach",
        ("target", "EP", "live", "base", "figure", "less", "most", "holds"),
        [
            (
                *(row["what"], str(row["ep"]), str(row["live"]), row["base"]),
                f"{row['figure']:.4f}",
                "" if row["less_a_token"] is None else f"{row['less_a_token']:.4f}",
                *(f"{row['most']:g}", "yes" if row["holds"] else "NO"),
            )
            for row in targets
        ],
        (
            "less: the figure if the fullest rank of each batch had one token less, as rounding to "
            "whole tokens alone costs that; where it is given, it is what counts. fetch: part of "
            "the batches that fetch any.",
        ),
    )


def _make_times_grid(rows: list[dict[str, Any]], tokens: int) -> Grid:
    lines = []
    for row in rows:
        for kind, batches in (
            ("fetch", row["fetching"]),
            ("level", row["batches"] - row["fetching"]),
        ):
            runs = row["run_us"][kind]
            if runs is None:
                continue
            plan = row["plan_us"] if kind == "fetch" else None
            lines.append(
                (
                    *(str(row["ep"]), row["base"], str(row["live"]), kind, str(batches)),
                    *(" / ".join(format_spread(runs[name])) for name in _RUNS),
                    "" if plan is None else " / ".join(format_spread(plan)),
                )
            )
    return Grid(
        f"Times on a GPU without load sync, microseconds, {tokens} tokens, top-8",
        ("EP", "base", "live", "kind", "batches", *_RUNS, "plan"),
        lines,
        (_TIMES_NOTE,),
    )
