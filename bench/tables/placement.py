"""Make the tables of `lplb-bench placement` and `lplb-bench workloads`."""

from __future__ import annotations

from typing import Any

import numpy as np

from lplb_triton.bench.tables.grid import Grid

__all__ = [
    "make_place_grid",
    "make_placement_grids",
    "make_workloads_grids",
]


# Methods that choose the ranks of all experts, with their names in tables, and those that leave
# every expert at home.
_NAMES = {"eplb": "EPLB", "chain": "chain", "place": "place"}
_HOME_NAMES = {"home": "EPLB", "home-chain": "chain", "home-place": "place"}


def make_placement_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench placement``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    grids = [_make_excess_grid(report), _make_home_grid(report), _make_time_grid(report)]
    if report["moves"]:
        grids.append(_make_moves_grid(report["moves"]))
    if report["published"] is not None:
        grids.append(_make_published_grid(report["published"]))
    return grids


def make_place_grid(report: dict[str, Any]) -> Grid:
    """Lay out the report of ``lplb-bench place``."""
    rows, methods = report["rows"], list(report["rows"][0]["methods"])
    columns = [(method, kind) for method in methods for kind in ("even", "lp", "integer")]
    values = [
        [row["in_order"], *(row["methods"][method][kind] for method, kind in columns)]
        for row in rows
    ]
    lines = [
        (str(row["layer"]), *(f"{value:.3f}" for value in found))
        for row, found in zip(rows, values, strict=True)
    ]
    if len(rows) > 1:
        lines.append(("all", *(f"{value:.3f}" for value in np.mean(values, axis=0))))
    names = {"even": "even", "lp": "LP", "integer": "tokens"}
    header = [f"{'EPLB' if m == 'eplb' else m} {names[kind]}" for m, kind in columns]
    batches = report["batches"]
    written = "all of these batches" if report["all_batches"] else "the first ones"
    return Grid(
        f"Imbalance on {report['ep']} ranks, {report['slots']} redundant slots on each, "
        f"{report['source']}",
        ("layer", "in order", *header),
        lines,
        (
            f"Largest over mean rank load, mean over {batches['test']} batches that follow the "
            f"{batches['history']} which experts were placed by. in order: experts by id, without "
            "copies; even: split evenly; LP: the fractional optimum, certified to 1e-3; tokens: in "
            f"whole tokens. The placements in the file are made from {written}.",
        ),
    )


def make_place_traffic_grid(report: dict[str, Any]) -> Grid:
    """Lay out what leaves its node, of a report of ``lplb-bench place`` with nodes."""
    rows, methods = report["rows"], list(report["rows"][0]["methods"])
    columns = [(method, kind) for method in methods for kind in ("far_by_lp", "far")]
    lines = [
        (
            str(row["layer"]),
            *(_format_part(row["methods"][method][kind]) for method, kind in columns),
        )
        for row in rows
    ]
    names = {"far_by_lp": "LP", "far": "near"}
    header = [f"{'EPLB' if m == 'eplb' else m} {names[kind]}" for m, kind in columns]
    return Grid(
        f"Assignments that leave their node of {report['ranks_per_node']} ranks, "
        f"{report['source']}",
        ("layer", *header),
        lines,
        (
            "Parts of all assignments, mean over up to 20 of these batches: by the LP's plan with "
            "exact quotas, and by that of locality='node' with its default slack, n/a for sizes "
            "that it doesn't take.",
        ),
    )


def _format_part(part: float | None) -> str:
    return "n/a" if part is None else f"{part:.3f}"


def _format_percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _make_excess_grid(report: dict[str, Any]) -> Grid:
    lines = []
    for row in report["rows"]:
        mean = {
            name: {key: float(np.mean(found[key])) for key in ("even", "lp", "integer")}
            for name, found in row["methods"].items()
        }
        shown = [_format_percent(mean[name][key]) for name in _NAMES for key in ("lp", "integer")]
        base = mean["eplb"]["lp"]
        ratio = f"{mean['place']['lp'] / base:.2f}" if base >= 1e-4 else "n/a"
        even = _format_percent(mean["eplb"]["even"])
        lines.append((str(row["ep"]), str(row["slots"]), even, *shown, ratio))
    cases = len(report["rows"][0]["cases"])
    columns = [f"{name} {kind}" for name in _NAMES.values() for kind in ("LP", "tokens")]
    return Grid(
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
    )


def _make_home_grid(report: dict[str, Any]) -> Grid:
    """Lay out the methods with experts at home beside those that move them."""
    lines = []
    for row in report["rows"]:
        for name in (*_NAMES, *_HOME_NAMES):
            found = {key: float(np.mean(values)) for key, values in row["methods"][name].items()}
            gigabytes = found["moved"] * report["expert_bytes"] / 1e9
            lines.append(
                (
                    *(str(row["ep"]), str(row["slots"])),
                    f"{_HOME_NAMES[name]}, at home" if name in _HOME_NAMES else _NAMES[name],
                    *(_format_percent(found[key]) for key in ("even", "lp", "integer")),
                    f"{found['remote']:.2f}",
                    f"{found['moved']:.1f}",
                    f"{gigabytes:.2f}",
                )
            )
    return Grid(
        f"Experts at home, {report['source']}",
        ("EP", "slots", "placement", "even", "LP", "tokens", "remote slots", "moved", "GB moved"),
        lines,
        (
            "remote slots: slots of a rank whose expert has its home (experts in order) elsewhere. "
            "moved: weights that all ranks of a layer receive when the placement made from the "
            "test batches replaces this one, originals and copies; place starts from the one "
            f"before. GB: at {report['expert_bytes']} bytes of weights an expert; states of the "
            "optimizer, which follow originals, are not counted.",
        ),
    )


def _make_time_grid(report: dict[str, Any]) -> Grid:
    lines = []
    for row in report["rows"]:
        methods = row["methods"]
        mean = {name: float(np.mean(found["seconds"])) for name, found in methods.items()}
        lines.append(
            (
                *(str(row["ep"]), str(row["slots"])),
                *(f"{1e3 * mean[name]:.1f}" for name in ("eplb", "chain")),
                f"{mean['place']:.2f}",
                f"{max(methods['place']['seconds']):.2f}",
                f"{float(np.mean(methods['place']['cpu_seconds'])):.2f}",
                *(f"{1e3 * mean[name]:.1f}" for name in ("home", "home-chain")),
                f"{mean['home-place']:.2f}",
            )
        )
    return Grid(
        "Time of one placement",
        (
            *("EP", "slots", "EPLB ms", "chain ms", "place s", "place max s", "place CPU s"),
            *("home: EPLB ms", "chain ms", "place s"),
        ),
        lines,
        (),
    )


def _make_moves_grid(moves: list[dict[str, Any]]) -> Grid:
    return Grid(
        "Weights moved by a re-placement over drifting loads, and mean excess",
        ("EP", "slots", "placement", "moved", "excess"),
        [
            (
                *(str(row["ep"]), str(row["slots"]), name),
                *(f"{found['moved']:.1f}", _format_percent(found["lp"])),
            )
            for row in moves
            for name, found in row["methods"].items()
        ],
        (
            "256 experts; every mean load drifts by lognormal(0, 0.1) between placements. "
            f"free: no penalty; priced: move_penalty {moves[0]['penalty']:g}.",
        ),
    )


def _make_published_grid(published: dict[str, Any]) -> Grid:
    own, theirs = published["seconds"], published["published_seconds"]
    return Grid(
        f"rebalance_experts, {published['layers']} layers of {published['experts']} experts, "
        "seconds",
        ("", "seconds"),
        [
            ("lplb_triton", f"{own:.4f}"),
            ("published", f"{theirs:.4f}"),
            ("quotient", f"{theirs / own:.1f}"),
        ],
        ("Same results." if published["same"] else "RESULTS DIFFER.",),
    )


def make_workloads_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench workloads``: one table an EP size.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

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
