"""Make the table of `lplb-bench nodes`."""

from __future__ import annotations

from typing import Any

import numpy as np

from lplb_triton.bench.tables.cells import format_spread
from lplb_triton.bench.tables.grid import Grid

__all__ = ["make_node_times_grid", "make_nodes_grid"]

_NAMES = {
    "eplb": "EPLB",
    "chain": "chain",
    "home-chain": "chain, at home",
    "hottest": "at home, hottest foreign",
    "node-chain": "chain, priced",
    "node-home-chain": "chain, at home, priced",
    "node-place": "place, priced",
    "node-home-place": "place, at home, priced",
}
_PARTS = ("local", "own", "slack 0", "slack 0.01", "slack 0.02")


def make_nodes_grid(report: dict[str, Any]) -> Grid:
    """Lay out the report of ``lplb-bench nodes``."""
    lines = []
    for row in report["rows"]:
        for method, name in _NAMES.items():
            mean = {key: float(np.mean(of)) for key, of in row["methods"][method].items()}
            lines.append(
                (
                    *(str(row["ep"]), str(row["slots"]), name, f"{mean['imbalance']:.4f}"),
                    *(f"{mean[part]:.3f}" for part in _PARTS),
                    *(f"{mean['balancer_imbalance']:.4f}", f"{mean['balancer']:.3f}"),
                    *(f"{mean['pairs_local']:.2f}", f"{mean['pairs']:.2f}"),
                    f"{1e3 * mean['seconds']:.0f}",
                )
            )
    cases = len(report["rows"][0]["cases"])
    parts = ("local quotas", "own node first", "optimal, +0", "+1%", "+2%")
    return Grid(
        f"Assignments that leave their node, {report['ranks_per_node']} ranks a node, "
        f"{report['source']}",
        (
            *("EP", "slots", "placement", "LP imbalance", *parts),
            *("balancer: imbalance", "balancer"),
            *("nodes, local", "nodes, +1%", "ms"),
        ),
        lines,
        (
            f"Mean over {cases} cases (layers, and parts of the trace without a gap), each placed "
            "by its first batches and judged by following ones. LP imbalance: largest over mean "
            "rank load at the optimum. Then parts of all assignments that leave their node: by the "
            "LP's plan with local quotas, and with tokens to copies in their own node first; by "
            "the plan that keeps most in their node at the LP's optimum, and with 1% and 2% more "
            "load (all by HiGHS). balancer: the plan of locality='node' with slack 0.01. nodes: "
            f"other nodes that a token is sent to, of {report['top_k']} simulated experts, by the "
            "LP's plan with local quotas and by the optimal plan at +1%. ms: to make the "
            "placement.",
        ),
    )


def make_node_times_grid(report: dict[str, Any]) -> Grid:
    """Lay out the report of ``lplb-bench nodes --times``."""
    lines = []
    for row in report["rows"]:
        us = row["us"]
        more = us["with"]["median"] - (us["without"]["median"] + us["again"]["median"]) / 2
        lines.append(
            (
                *(f"{row['ep']}/{row['slots']}", _NAMES[row["method"]], str(row["tokens"])),
                f"{row['saved']:.3f}",
                *("/".join(format_spread(us[name])) for name in ("without", "with")),
                f"{more:.1f}",
            )
        )
    batches = report["rows"][0]["batches"]
    return Grid(
        f"Times on a GPU, microseconds, {report['ranks_per_node']} ranks a node, "
        f"{report['source']}",
        ("EP/slots", "placement", "tokens", "saved", "without", "with", "more"),
        lines,
        (
            f"Balancer.run of one rank with exact quotas, median/p99/max over {batches} batches; a "
            "batch's time is the median of at least 20 replays of a CUDA graph. All ranks' counts "
            "are in its memory, and two small launches of torch stand for load sync. Every near "
            "plan was held against the twin, and every id is a copy of its expert. tokens: of a "
            "rank; saved: the part of the assignments that leave their node by the balancer's LP "
            "and stay by its near plan, mean; with: locality='node'; more: median with, less the "
            "mean of the medians of two timings without, one before and one after.",
        ),
    )
