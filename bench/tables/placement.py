"""Tables of `lplb-bench placement` and `workloads`."""

from __future__ import annotations

from typing import Any

import numpy as np

from lplb_triton.bench.tables.grid import Grid

__all__ = [
    "make_placement_grids",
    "make_workloads_grids",
]


def make_placement_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench placement``.

    Parameters
    ----------
    report
        What the command writes as JSON.

    Returns
    -------
    list of Grid
    """

    def percent(value: float) -> str:
        return f"{100 * value:.2f}%"

    lines, seconds = [], []
    for row in report["rows"]:
        head = (str(row["ep"]), str(row["slots"]))
        mean = {
            name: {key: float(np.mean(values)) for key, values in found.items()}
            for name, found in row["methods"].items()
        }
        shown = [percent(m[key]) for m in mean.values() for key in ("lp", "integer")]
        base = mean["eplb"]["lp"]
        ratio = f"{mean['place']['lp'] / base:.2f}" if base >= 1e-4 else "n/a"
        lines.append((*head, percent(mean["eplb"]["even"]), *shown, ratio))
        place = row["methods"]["place"]
        seconds.append(
            (
                *head,
                *(f"{1e3 * mean[name]['seconds']:.1f}" for name in ("eplb", "chain")),
                f"{mean['place']['seconds']:.2f}",
                f"{max(place['seconds']):.2f}",
                f"{mean['place']['cpu_seconds']:.2f}",
            )
        )
    cases = len(report["rows"][0]["cases"])
    columns = [f"{name} {kind}" for name in ("EPLB", "chain", "place") for kind in ("LP", "tokens")]
    grids = [
        Grid(
            f"Mean excess imbalance on unseen batches, {report['source']}",
            ("EP", "slots", "EPLB even", *columns, "place/EPLB"),
            lines,
            (
                f"Largest over mean rank load, minus 1, mean over {cases} cases (layers or seeds). "
                "even: split evenly; LP: the fractional optimum, certified to 1e-3; tokens: in "
                "whole tokens. place/EPLB: quotient of the LP columns.",
                *(
                    f"n/a: EP {row['ep']}, {row['slots']} slots: {row['reason']}"
                    for row in report["left_out"]
                ),
            ),
        ),
        Grid(
            "Time of one placement",
            ("EP", "slots", "EPLB ms", "chain ms", "place s", "place max s", "place CPU s"),
            seconds,
            (),
        ),
    ]
    if report["moves"]:
        grids.append(
            Grid(
                "Weights moved by a re-placement over drifting loads, and mean excess",
                ("EP", "slots", "placement", "moved", "excess"),
                [
                    (
                        *(str(row["ep"]), str(row["slots"]), name),
                        *(f"{found['moved']:.1f}", percent(found["lp"])),
                    )
                    for row in report["moves"]
                    for name, found in row["methods"].items()
                ],
                (
                    "256 experts; every mean load drifts by lognormal(0, 0.1) between placements. "
                    f"free: no penalty; priced: move_penalty {report['moves'][0]['penalty']:g}.",
                ),
            )
        )
    if report["published"] is not None:
        p = report["published"]
        grids.append(
            Grid(
                f"rebalance_experts, {p['layers']} layers of {p['experts']} experts, seconds",
                ("", "seconds"),
                [
                    ("lplb_triton", f"{p['seconds']:.4f}"),
                    ("published", f"{p['published_seconds']:.4f}"),
                    ("quotient", f"{p['published_seconds'] / p['seconds']:.1f}"),
                ],
                ("Same results." if p["same"] else "RESULTS DIFFER.",),
            )
        )
    return grids


def make_workloads_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench workloads``: one table an EP size.

    Parameters
    ----------
    report
        What the command writes as JSON.

    Returns
    -------
    list of Grid
    """
    grids = []
    for ep in dict.fromkeys(row["ep"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["ep"] == ep and "reason" not in row]
        if not rows:
            continue
        grids.append(
            Grid(
                f"EP {ep}, mean imbalance",
                (
                    *("workload", "placement", "slots", "in order"),
                    *("even", "LP", "HiGHS", "tokens", "distance"),
                ),
                [
                    (
                        *(row["workload"], row["placement"], str(row["slots"])),
                        *(f"{row[k]:.3f}" for k in ("unbalanced", "even", "lp", "highs", "tokens")),
                        f"{row['distance']:.1e}",
                    )
                    for row in rows
                ],
            )
        )
    if grids:
        o = report["options"]
        last = grids[-1]
        note = (
            f"{o['experts']} experts, {o['batches']} batches. slots: redundant ones per rank; "
            "in order: experts in order, no copies; even: copies, split evenly; tokens: the LP "
            "in whole tokens; distance: largest of LP over HiGHS, relative. "
            f"place with {o['trials']} trials. The adversary's batches are each placement's own."
        )
        grids[-1] = Grid(last.title, last.header, last.rows, (note,))
    return grids
