"""Make the tables of `lplb-bench solve`."""

from __future__ import annotations

from typing import Any

from lplb_triton.bench.tables.cells import (
    format_at_most,
    format_case,
    format_percent,
    format_spread,
    format_us,
)
from lplb_triton.bench.tables.grid import Grid

__all__ = [
    "make_solve_grids",
    "make_traffic_grids",
]


def make_solve_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench solve``.

    Parameters
    ----------
    report
        Content of the JSON file that the command writes.

    Returns
    -------
    list of Grid
    """
    grids = [] if report["traffic"] is None else make_traffic_grids(report["traffic"])
    if report["rows"]:
        grids += _make_family_grids(report)
    groups = report["groups"]
    if groups is not None:
        lines = {
            f"{groups['groups']} groups in one launch": "together_us",
            "the slowest of them alone": "slowest_alone_us",
        }
        ratio = groups["ratio"]
        grids.append(
            Grid(
                "Groups of cube, microseconds",
                ("", "median", "p99", "max"),
                [(label, *format_spread(groups[key])) for label, key in lines.items()]
                + [("quotient", *(f"{ratio[name]:.2f}" for name in ("median", "p99", "max")))],
                (f"{groups['batches']} batches.",),
            )
        )
    if report["peers"] is not None:
        grids.append(_make_peers_grid(report))
    return grids


def make_traffic_grids(traffic: dict[str, Any]) -> list[Grid]:
    """Lay out times, stages and certificates of the solve on traces and drawn traffic.

    Parameters
    ----------
    traffic
        The entry ``traffic`` of the report.

    Returns
    -------
    list of Grid
        The times of recorded traces come first, then those of drawn traffic.
    """
    return [
        *_make_traffic_time_grids(traffic),
        _make_stages_grid(traffic),
        _make_certificates_grid(traffic),
    ]


def _make_traffic_time_grids(traffic: dict[str, Any]) -> list[Grid]:
    from lplb_triton.bench.measure.loads import DRAWN

    times: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for row in traffic["pooled"]:
        spread = (format_us(row["us"][name]) for name in ("median", "p95", "p99", "max"))
        line = (format_case(row), row["kind"], str(row["batches"]), *spread)
        times[row["kind"] in DRAWN].append(line)
    what = (
        "256/64 chain+1: 256 experts on 64 ranks with 1 redundant slot each, placed by chain. A "
        "batch's time is the median of at least 20 replays, from counts by expert to a certified "
        "plan; percentiles run over batches. "
    )
    notes = {
        False: (
            f"{what}Placed by the first half of a trace, layer by layer; of the second half every "
            f"batch is timed{format_at_most(traffic)}.",
        ),
        True: (
            f"{what}jitter: lognormal popularity (sigma 0.5, 0.8, 1.0), times lognormal jitter in "
            "every batch (0.2, 0.3, 0.5). rotating: popularity (sigma 1.0) that moves on by three "
            "experts in every batch. burst: popularity (sigma 0.5), three experts 5 to 30 times "
            "as popular in every batch. Placed by the popularity; batches are multinomial, 32,768 "
            "tokens with top-8.",
        ),
    }
    titles = {False: "recorded traces", True: "drawn traffic"}
    header = ("case", "loads", "batches", "median", "p95", "p99", "max")
    return [
        Grid(f"Solve on {titles[was_drawn]}, microseconds", header, found, notes[was_drawn])
        for was_drawn, found in times.items()
        if found
    ]


def _make_stages_grid(traffic: dict[str, Any]) -> Grid:
    from lplb_triton.bench.measure.cases import STEPS

    lines = []
    for row in traffic["pooled"]:
        cells = [format_case(row), row["kind"]]
        for name in STEPS:
            median = row["steps_us"][name]
            cells.append(format_percent(row["steps"][name]))
            cells.append("" if median is None else format_us(median))
        lines.append(tuple(cells))
    names = (f"{STEPS[0]} steps", "1 step", *(f"{name} steps" for name in STEPS[2:]))
    return Grid(
        "Stages of the solve on real traffic",
        ("case", "loads", *(text for name in names for text in (name, "us"))),
        lines,
        (
            "The share of the batches that needed so many steps by potentials after levelling "
            "along edges, and their median time in microseconds. 0 steps: levelling was "
            "enough.",
        ),
    )


def _make_certificates_grid(traffic: dict[str, Any]) -> Grid:
    return Grid(
        "Certificates on real traffic",
        ("case", "loads", "worst gap", "not certified"),
        [
            (format_case(row), row["kind"], f"{row['worst_gap']:.1e}", str(row["uncertified"]))
            for row in traffic["pooled"]
        ],
        (
            "Every plan and bound was held against HiGHS before it was timed.",
            *(f"Left out: {row['case']}: {row['reason']}." for row in traffic["left_out"]),
        ),
    )


def _make_family_grids(report: dict[str, Any]) -> list[Grid]:
    rows = report["rows"]
    return [
        Grid(
            "Solve, microseconds",
            ("shape", "ranks", "columns", "median", "p99", "max", "rotated", "as Problem"),
            [
                (
                    *(
                        row["shape"],
                        str(row["ranks"]),
                        str(row["columns"]),
                        *format_spread(row["us"]),
                    ),
                    *(format_us(row["rotated_us"]), format_us(row["problem_us"]["median"])),
                )
                for row in rows
            ],
            (
                f"{rows[0]['instances']} instances per shape, in equal parts of six load families; "
                "from counts by expert to a certified plan. rotated: mean over one graph of all "
                "instances. as Problem: median of lplb_triton.solve.",
            ),
        ),
        Grid(
            "Certificates, and HiGHS on the CPU",
            ("shape", "steps mean", "steps max", "worst gap", "HiGHS us"),
            [
                (
                    row["shape"],
                    f"{row['iterations']['mean']:.1f}",
                    str(row["iterations"]["max"]),
                    f"{row['worst_gap']:.1e}",
                    f"{row['highs_us']:.0f}",
                )
                for row in rows
            ],
            (
                "steps: by potentials; 0 where levelling along edges was enough. Every plan and "
                "bound was held against HiGHS before it was timed. HiGHS us: median wall time of "
                "scipy's linprog.",
            ),
        ),
        Grid(
            "Solve by load family, median microseconds",
            ("shape", *rows[0]["by_family_us"]),
            [(row["shape"], *map(format_us, row["by_family_us"].values())) for row in rows],
        ),
    ]


def _make_peers_grid(report: dict[str, Any]) -> Grid:
    names = {
        "affine_scaling": "affine scaling",
        "edge_balancing": "edge balancing",
        "lplb": "LPLB",
    }
    lines: list[tuple[str, ...]] = []
    notes: dict[str, None] = {}
    for solved, peers in zip(report["rows"], report["peers"], strict=True):
        shape = peers["shape"]
        lines.append((shape, "lplb_triton", *format_spread(solved["us"]), "0"))
        for key, label in names.items():
            found = peers[key]
            if isinstance(found, str):
                notes[f"{shape}, {label}: {found}"] = None
                continue
            times = ("n/a",) * 3 if found["us"] is None else format_spread(found["us"])
            kinds = ("infeasible", "inexact", "not_reached", "refused")
            bad = [f"{found[k]} {k.replace('_', ' ')}" for k in kinds if k in found]
            lines.append((shape, label, *times, ", ".join(bad)))
            if found.get("alike_us"):
                lines.append(
                    (shape, f"{label}, as often for all", *format_spread(found["alike_us"]), "")
                )
    options = report["options"]
    n_instances = report["rows"][0]["instances"]
    return Grid(
        "Peers on the same instances, microseconds",
        ("shape", "solver", "median", "p99", "max", "bad answers"),
        lines,
        (
            f"Bad answers of {n_instances}. infeasible: a constraint is off by more than 1e-3 of "
            "the largest number, or a share is negative. inexact: more than "
            f"{options['tolerance']:g} from the optimum. not reached: not so near within "
            "the limit of sweeps. Affine scaling takes five steps. Edge balancing is told how many "
            "sweeps are enough, for each instance or the largest such number for all; its times "
            "are of the instances that it can solve. Peers start from the loads of columns and "
            "ranks, lplb_triton from counts by expert.",
            *notes,
        ),
    )
