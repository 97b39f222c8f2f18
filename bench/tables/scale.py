"""Make the tables of `lplb-bench scale`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lplb_triton.bench.scale import find_break_even
from lplb_triton.bench.tables.grid import Grid
from lplb_triton.bench.types import Row

__all__ = ["make_scale_grids"]

NOT_MEASURED = "not measured"
# A part of the imbalance that is worth naming.
WORTH = 0.01


def make_scale_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench scale``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    o, rows = report["options"], report["rows"]
    grids = []
    for load in o["loads"]:
        here = [row for row in rows if row["load"] == load]
        if here:
            grids.append(_show_quality(load, here, o))
    grids += [_show_sizes(rows, o), _show_wire(report["wire"], o)]
    if any(row["us"] for row in rows):
        grids.append(_show_times(rows))
    left_out = [
        f"Left out: EP {each['ep']}, {each['slots']} slots, {each['load']}: {each['reason']}."
        for each in report["left_out"]
    ]
    refused = dict.fromkeys(row["refused"] for row in rows if row["refused"])
    notes = (*left_out, *(f"Refused on a GPU: {reason}." for reason in refused))
    if notes:
        last = grids[-1]
        grids[-1] = Grid(last.title, last.header, last.rows, (*last.notes, *notes))
    return grids


def _name_plan(row: Row) -> str:
    if row["plan"] in ("group", "levels"):
        return f"{'LPs' if row['plan'] == 'group' else 'two levels'} of {row['group']}"
    return {"even": "EPLB", "one": "one LP"}[row["plan"]]


def _list_plans(rows: Sequence[Row]) -> list[str]:
    """Names of the plans that some row has: those of all ranks, then by kind and group."""
    order = ["even", "one", "group", "levels"]
    found = {(order.index(row["plan"]), row["group"] * (row["plan"] in order[2:])) for row in rows}
    return [_name_plan({"plan": order[kind], "group": group}) for kind, group in sorted(found)]


def _by_sizes(rows: Sequence[Row]) -> dict[tuple[int, int, int], dict[str, Row]]:
    """Rows of each number of ranks, experts and slots, by name of the plan."""
    found: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        key = row["ep"], row["experts"], row["slots"]
        found.setdefault(key, {})[_name_plan(row)] = row
    return found


def _show_quality(load: str, rows: Sequence[Row], o: dict[str, Any]) -> Grid:
    plans = _list_plans(rows)
    lines = []
    for key, by_plan in _by_sizes(rows).items():
        across = by_plan["one LP"]["across"]
        lines.append(
            (
                *(str(key[0]), str(key[2])),
                *(
                    f"{by_plan[name]['imbalance']['mean']:.3f}" if name in by_plan else "-"
                    for name in plans
                ),
                *(f"{across[quotas]:.3f}" for quotas in ("local", "global")),
            )
        )
    worst = max(row["gap"] for row in rows)
    return Grid(
        f"Largest over mean rank load, load {load}, mean of {o['batches']} batches",
        ("EP", "slots", *plans, "leaves, local", "leaves, global"),
        lines,
        (
            "EPLB: copies share evenly. LPs of n: an expert's copies in one group of n ranks, an "
            "LP for each group. two levels: copies as for one LP, an LP between groups, then one "
            f"in each. leaves: part of one LP's assignments that leave their node of "
            f"{o['ranks_per_node']} ranks, by quotas. Largest certified gap: {worst:.1e}.",
            _say_better_groups(rows),
        ),
    )


def _say_better_groups(rows: Sequence[Row]) -> str:
    """Say where LPs of groups leave a lower imbalance than one LP of all ranks."""
    found = []
    for (ep, _, slots), by_plan in _by_sizes(rows).items():
        groups = [row for row in by_plan.values() if row["plan"] in ("group", "levels")]
        if not groups:
            continue
        best = min(groups, key=lambda row: row["imbalance"]["mean"])
        ours, one = (row["imbalance"]["mean"] for row in (best, by_plan["one LP"]))
        if ours < (1 - WORTH) * one:
            noun = "slot" if slots == 1 else "slots"
            name = _name_plan(best)
            found.append(f"EP {ep}, {slots} {noun} ({name}: {ours:.3f} instead of {one:.3f})")
    where = "; ".join(found) or "nowhere"
    return f"Groups better than one LP by {WORTH:.0%} or more: {where}."


def _show_sizes(rows: Sequence[Row], o: dict[str, Any]) -> Grid:
    first = o["loads"][0] if any(row["load"] == o["loads"][0] for row in rows) else rows[0]["load"]
    return Grid(
        "The solver's tables of a layer",
        ("EP", "experts", "slots", "plan", "columns", "most copies", "KiB"),
        [
            (
                *(str(row[name]) for name in ("ep", "experts", "slots")), _name_plan(row),
                str(row["columns"]), str(row["copies"]), f"{row['table_bytes'] / 1024:.0f}",
            )
            for row in rows
            if row["load"] == first and "table_bytes" in row
        ],
        (
            "Tables are in the GPU's memory, all groups of a plan together; columns are those of a "
            f"group. Load {first}; other loads differ in columns and most copies only.",
        ),
    )  # fmt: skip


def _show_wire(wire: Sequence[Row], o: dict[str, Any]) -> Grid:
    return Grid(
        "Counts on the wire for a layer and a batch, KiB",
        ("EP", "experts", "sync", "quotas", "rank sends", "across nodes", "node sends across"),
        [
            (
                *(str(row[name]) for name in ("ep", "experts", "sync", "quotas")),
                *(
                    ("refused",) * 3
                    if "reason" in row
                    else (f"{row[name] / 1024:.1f}" for name in ("sent", "across", "node"))
                ),
            )
            for row in wire
        ],
        (
            f"Computed, not measured; nodes of {o['ranks_per_node']} ranks; an all-gather as a "
            "ring. across nodes: by the rank that sends most. Groups need the same: a rank sends "
            "tokens to all groups, so it needs the shares of all.",
            *dict.fromkeys(f"{r['sync']}: {r['reason']}." for r in wire if "reason" in r),
        ),
    )


def _show_times(rows: Sequence[Row]) -> Grid:
    lines = []
    for load in dict.fromkeys(row["load"] for row in rows):
        for key, by_plan in _by_sizes([row for row in rows if row["load"] == load]).items():
            for name, row in by_plan.items():
                if row["plan"] not in ("one", "group"):
                    continue
                one = by_plan["one LP"]
                lines.append(
                    (
                        *map(str, key), load, name,
                        *(
                            (f"{row['us'][k]:.1f}" for k in ("median", "max"))
                            if row["us"]
                            else ("refused" if row["refused"] else NOT_MEASURED,) * 2
                        ),
                        _say_break_even(one, row) if row is not one else "",
                    )
                )  # fmt: skip
    return Grid(
        "Solve, microseconds, all groups in one launch",
        ("EP", "experts", "slots", "load", "plan", "median", "max", "faster for layers"),
        lines,
        (
            "Two levels take at least as long as LPs of as many ranks. faster for layers: those "
            "whose mean expert products of a rank take less (below) or more (above) than that; "
            "there products times imbalance, plus solve, are over before those of one LP.",
        ),
    )


def _say_break_even(one: Row, other: Row) -> str:
    if not one["us"] or not other["us"]:
        return "-"
    verdict, layer_us = find_break_even(one, other)
    return verdict if layer_us is None else f"{verdict} {layer_us:.0f} us"
