"""Make the tables of `lplb-bench advise`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.advise.objective import TIME_US
from lplb_triton.bench.tables.cells import format_us
from lplb_triton.bench.tables.grid import Grid

__all__ = [
    "make_advice_check_grids",
    "make_advise_grids",
    "make_objective_grid",
]

_NETWORK_TIMES = ("across", "within", "layer", "waiting", "total")
_WAYS = ("none", "even", "tokens", "time")
_LIVE_QUANTITIES = (
    *("pieces", "fetching", "sent/received", "fetch", "static", "with live"),
    *("break-even", "live_above", "live_cost", "live MiB", "static MiB"),
)


def make_advise_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench advise``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    return [
        _make_layer_grid(report),
        _make_cost_grid(report),
        *([] if report["network"] is None else [_make_network_grid(report)]),
        *([make_objective_grid(report)] if report["objective"] else []),
        _make_live_grid(report),
    ]


def _make_layer_grid(report: dict[str, Any]) -> Grid:
    """Lay out the times of the layer, and what the LP saves."""
    o, gemm = report["options"], report["gemm"]
    rows = []
    for row in report["rows"]:
        saving = row["saving_us"]
        rows.append(
            (
                *(row["placement"], str(row["slots"])),
                *(_format_time(row["layer_us"][name]) for name in ("in_order", "even", "lp")),
                f"{saving['mean']:.0f} ({saving['low']:.0f} .. {saving['high']:.0f})",
                _format_time(row["net_us"]["mean"]),
            )
        )
    per = "forward and backward" if o["training"] else "forward"
    nodes = " (below)" if report["network"] else ""
    left_out = f"communication{nodes}, routing, attention"
    return Grid(
        f"Predicted: expert products of the slowest of {o['ep']} ranks, microseconds",
        ("placement", "slots", "in order", "even", "LP", "saving", "net"),
        rows,
        (
            f"{_describe_layer(o)}, {o['tokens']} tokens per rank, {per}; loads: "
            f"{o['loads']}. even: EPLB with as many slots, split evenly. saving: of the LP "
            "over that, mean and range (10th to 90th percentile of the batches, widened by "
            "the fit's worst error).",
            f"Times of a rank's products: {gemm['source']}. Fit: {gemm['error']:.0%} rms, "
            f"{gemm['worst']:.0%} at worst. Predicted, not measured: every figure of this "
            f"table. Left out: {left_out}.",
        ),
    )


def _make_cost_grid(report: dict[str, Any]) -> Grid:
    """Lay out what balancing takes, in time and memory, and from where on it pays."""
    costs = []
    for row in report["rows"]:
        even = row["break_even"]
        shown = ["never" if even[k] is None else str(even[k]) for k in ("mean", "high", "low")]
        costs.append(
            (
                *(row["placement"], str(row["slots"])),
                *(_format_time(v) for v in row["overhead_us"].values()),
                f"{shown[0]} ({shown[1]} .. {shown[2]})",
                f"{row['replica_bytes'] / 2**20:.0f}",
            )
        )
    return Grid(
        "What it costs",
        ("placement", "slots", "sync", "run", "break-even", "MiB"),
        costs,
        (
            "Microseconds a batch, from figures measured on H100s (sync: two GPUs over NVLink; "
            "more GPUs or nodes take longer; run: count, solve and select). break-even: tokens "
            "per rank from which on it pays, by mean (high .. low) saving. MiB: replicas of "
            "one layer on a rank; in training as much again is sent and received "
            "for weights and for gradients each step.",
            _describe_recommendation(report),
            *(f"n/a: {slots} slots are more than copies can fill." for slots in report["left_out"]),
        ),
    )


def _make_network_grid(report: dict[str, Any]) -> Grid:
    """Lay out what dispatch and combine are predicted to cost, beside the products."""
    o, found = report["options"], report["network"]
    best = found["best"]
    rows = [
        (
            row["placement"],
            str(row["slots"]),
            row["quotas"],
            f"{row['across']:.3f}",
            f"{row['nodes']:.2f}",
            *(_format_time(row[f"{name}_us"]) for name in _NETWORK_TIMES),
        )
        for row in found["rows"]
    ]
    saved = found["saved_us"]
    verdict = (
        f"Least in all: {best['placement']}, {best['slots']} slots, {_describe_quotas(best)}: "
        f"{_format_time(best['total_us'])} us, "
        + (
            f"{_format_time(saved)} us less than EPLB's even split after the time of a run. "
            if saved > 0
            else "which with the time of a run is no less than EPLB's even split. "
        )
        + f"Rows to other nodes take {_format_time(best['across_us'])} us of it, and waiting for "
        f"the slowest rank {_format_time(best['waiting_us'])} us."
    )
    return Grid(
        "Predicted: with dispatch and combine across nodes, microseconds",
        ("placement", "slots", "quotas", "leave", "nodes", *_NETWORK_TIMES),
        rows,
        (
            f"Nodes of {o['ranks_per_node']} ranks; a rank moves {o['node_bandwidth']:g} GB/s "
            f"within and {o['network_bandwidth']:g} GB/s across nodes (assumed unless given). "
            "leave: part of the assignments to other nodes. nodes: other nodes that a token is "
            "sent to, once each, as if its experts were independent. across, within: both "
            "ways of bfloat16 rows of the busiest node and rank, at once, so that the slower "
            "counts. layer: products of the slowest rank. waiting: the part of it above the mean. "
            "total: layer, slower path, counts across nodes, and near plan. even: EPLB's copies "
            "share evenly. priced: chain with ranks_per_node and the default price"
            + _explain_near(found["rows"]),
            verdict,
        ),
    )


def _explain_near(rows: list[dict[str, Any]]) -> str:
    """Explain the rows of near plans, if there are any, and end the sentence."""
    us = max(row["plan_us"] for row in rows)
    near = f"; near: exact quotas by the plan of locality='node', taken to need {us:g} us"
    return f"{near if us else ''}."


def _describe_quotas(row: dict[str, Any]) -> str:
    """Say by which arguments of the balancer a row's quotas are made."""
    if row["quotas"] == "near":
        return "quotas='global', locality='node'"
    return f"quotas={row['quotas']!r}"


def make_objective_grid(report: dict[str, Any]) -> Grid:
    """Lay out the layer's time under each objective, by tokens of a rank."""
    rows = report["objective"]
    (here,) = (row for row in rows if row["tokens"] == report["options"]["tokens"])
    return Grid(
        "Predicted: objectives, slowest rank, microseconds",
        ("tokens", *_WAYS, "time on", "best"),
        [
            (
                str(row["tokens"]),
                *(_format_time(row["layer_us"][way]) for way in _WAYS),
                _format_placed(row["placed"]["time"]),
                row["best"],
            )
            for row in rows
        ],
        (
            "tokens: of a rank in a batch, whole ones, with exact quotas. none: experts in order, "
            "no copies. even, tokens, time: an even split, and objective= of Balancer, each on its "
            "best placement, EPLB or chain. best: the least, where tokens adds the time of sync "
            f"and run, and time about {TIME_US:g} microseconds more.",
            _describe_objective(here),
        ),
    )


def _format_placed(placed: dict[str, Any]) -> str:
    """Return a placement with its slots, such as ``chain 1``."""
    return f"{placed['placement']} {placed['slots']}"


def _describe_objective(row: dict[str, Any]) -> str:
    """Say which way is the best one for batches of the size asked for."""
    head = f"With {row['tokens']} tokens per rank: "
    if row["best"] in ("none", "even"):
        least = "no copies" if row["best"] == "none" else "an even split"
        return f"{head}{least}; no plan of a batch pays."
    said = f"{head}objective={row['best']!r} on {_format_placed(row['placed'][row['best']])}"
    more = "; lplb_triton.place(objective='time') may find a better placement"
    return said + (more if row["best"] == "time" else "") + "."


def _make_live_grid(report: dict[str, Any]) -> Grid:
    """Lay out what live slots are predicted to save over the best static placement."""
    o = report["options"]
    columns = []
    for row in report["live"]:
        layer, sizes = row["layer_us"], row["bytes"]
        columns.append(
            (
                *(f"{row['pieces']:.1f}", f"{row['fetching']:.0%}"),
                f"{row['sent']:.1f}/{row['received']:.1f}",
                *(_format_time(us) for us in (row["fetch_us"], layer["static"], layer["live"])),
                "never" if row["break_even"] is None else str(row["break_even"]),
                "none" if row["above"] is None else f"{row['above']:.3f}",
                str(row["cost"]),
                *(f"{sizes[k] / 2**20:.0f}" for k in ("live", "static")),
            )
        )
    # A row for each quantity: so many columns would be cut on a terminal of 80 characters.
    lines = list(zip(_LIVE_QUANTITIES, *columns, strict=True))
    first = report["live"][0]
    return Grid(
        "Predicted: live slots on top of the best static placement, microseconds",
        ("live", *(str(row["live"]) for row in report["live"])),
        lines,
        (
            f"On {first['placement']}, {first['slots']} slots per rank, without a price on "
            "traffic, by the twin of the plan, means over the batches. live: live slots per rank. "
            "pieces: those filled on all ranks. fetching: part of the "
            "batches that fetch any. sent/received: experts at the busiest rank. fetch: their time "
            f"at {o['pull_rate']:g} GB/s, in training for weights twice and for gradients; with "
            "live includes it, as if nothing overlapped. break-even: tokens per rank from which on "
            "live slots save time on such loads. live_above, live_cost: suggested for Balancer; "
            "none: no fetch can pay in so small a batch. live MiB: live slots of a rank, once for "
            "all layers, in training with gradients on their way; static MiB: as many "
            f"static slots, in {'one layer' if o['layers'] is None else 'all layers'}.",
        ),
    )


def _describe_layer(options: dict[str, Any]) -> str:
    """Say the sizes of a layer, where each comes from, and how many such layers there are."""
    model, layers = options["model"], options["layers"]
    said = ", ".join(f"{name} from {source}" for name, source in options["sizes_from"].items())
    some = "" if layers is None else f", one of {layers} such layers"
    return (
        f"Hidden {model['hidden']}, inner {model['inner']}, {model['experts']} experts, "
        f"top-{model['top_k']} ({said}){some}"
    )


def _describe_recommendation(report: dict[str, Any]) -> str:
    """Say whether balancing pays, and what is recommended."""
    best = f"{report['best']['placement']}, {report['best']['slots']} slots per rank"
    if report["network"] is not None:
        return "What is recommended with the network stands below."
    if report["pays"] == "no":
        return (
            "It does not pay here: nothing is recommended but EPLB's even split or no copies. "
            f"Least is lost by {best}."
        )
    pays = "It pays" if report["pays"] == "yes" else "Whether it pays is uncertain"
    return (
        f"{pays} here. Recommended: {best}; lplb_triton.place, which is slower, may find a better "
        "placement."
    )


def _format_time(value: float) -> str:
    """Return microseconds, with a decimal below 10,000: more digits would not fit the columns."""
    return format_us(value) if abs(value) < 10_000 else f"{value:.0f}"


def make_advice_check_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench advise --check``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    return [
        Grid(
            "Predictions against measured times, slowest rank, microseconds",
            ("model", "EP", "tokens", "split", "measured", "predicted", "error"),
            [
                (
                    *(row["model"], str(row["ep"]), str(row["tokens"]), split),
                    *(format_us(row[split][k]) for k in ("measured_us", "predicted_us")),
                    f"{row[split]['error']:+.1%}",
                )
                for row in report["rows"]
                for split in ("even", "lp")
            ],
            ("Fitted to other splits of the same sizes on the same GPU. EPLB, one slot per rank.",),
        )
    ]
