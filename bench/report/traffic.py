"""The section of a report about what stays on a rank, stays on its node, and leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lplb_triton.bench.report import charts
from lplb_triton.bench.report.sections import draw_figure, draw_legend, draw_table

__all__ = ["show_traffic"]

NAMES = {
    "home": "no balancing",
    "local": "linear program, local quotas",
    "global": "linear program, global quotas",
}
# Kind of a part, which is its colour, its key and its name.
PARTS = (
    ("work", "rank", "kept on the rank"),
    ("lp", "node", "to another rank of the node"),
    ("eplb", "across", "sent to other nodes"),
)


def show_traffic(found: Mapping[str, Any]) -> str:
    """Show the parts of the assignments that are kept near, before and after balancing.

    Parameters
    ----------
    found
        From `lplb_triton.bench.balance.find_traffic`.
    """
    bars, rows = [], []
    for row in found["rows"]:
        percent = [100 * float(row[key]) for _, key, _ in PARTS]
        parts = [(kind, value) for (kind, *_), value in zip(PARTS, percent, strict=True)]
        name = NAMES[row["way"]]
        bars.append(charts.Bar(name, parts, f"{percent[-1]:.1f}% across"))
        rows.append([name, *(f"{value:.1f}%" for value in percent)])
    told = "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
    size, nodes = int(found["ranks_per_node"]), int(found["nodes"])
    where = f"Nodes of {size} consecutive ranks" if nodes > 1 else f"All {size} ranks on one node"
    # The command takes several nodes.
    advice = (
        "Where ranks span nodes, <code>lplb-bench advise --trace FILE --ranks-per-node "
        f"{size}</code> prices it."
        if nodes > 1
        else "Another <code>--ranks-per-node</code> divides them."
    )
    title = "Where tokens go, once for each of their experts"
    picture = draw_figure(
        "traffic", title,
        f"{where}, whoever sends as recorded; means over at most about "
        "128 batches. With local quotas each rank divides its own tokens by the plan's shares. "
        "With <code>quotas=&quot;global&quot;</code> ranks, then nodes, first keep what their "
        f"own copies take; loads are the same. {advice}",
        charts.draw_bars(
            "traffic-picture", title, f"Parts that leave their node. {told}.", bars,
            "part of the assignments, %",
        ),
        draw_legend([(kind, "box", name) for kind, _, name in PARTS]),
    )  # fmt: skip
    return picture + "\n" + draw_table(["", *(name for *_, name in PARTS)], rows)
