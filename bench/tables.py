"""Terminal output with rich, which is only imported when it is used."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from lplb_triton.solution import Status

if TYPE_CHECKING:
    from rich.console import Console

    from lplb_triton.bench.balance import Cell
    from lplb_triton.testing.verify import Verdict

__all__ = [
    "LABELS",
    "Grid",
    "MissingExtraError",
    "advice_check_grids",
    "advise_grids",
    "console",
    "ep_grids",
    "markdown",
    "pipeline_grids",
    "placement_grids",
    "require",
    "show_balance",
    "show_grids",
    "show_verdicts",
    "simulate_grids",
    "solve_grids",
    "workloads_grids",
]

LABELS = {
    "none": "no balancing",
    "reordered": "reorder only",
    "even": "split evenly",
    "lp": "LP",
    "integer": "LP, tokens",
}


# Parts of the corpus that answers are held against HiGHS on.
PARTS = {
    "random": "Random programs",
    "traffic": "Real traffic",
    "hard": "Hard placements",
}


class MissingExtraError(RuntimeError):
    """A package of the ``bench`` extra is not installed."""


def require(module: str) -> None:
    """Import a module of the ``bench`` extra, or say how to get it.

    Parameters
    ----------
    module
        Name of the module, such as ``"rich"``.

    Raises
    ------
    MissingExtraError
        If it isn't installed.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"lplb-bench needs {module}, which is not installed: pip install 'lplb_triton[bench]'"
        ) from error


def console(file: IO[str] | None = None) -> Console:
    """Return a console that writes to a file, by default to stdout."""
    require("rich")
    from rich.console import Console

    return Console(file=file, highlight=False)


def show_balance(target: Console, cells: Sequence[Cell], *, title: str, time_label: str) -> None:
    """Print imbalances and certificates of every combination.

    Parameters
    ----------
    target
        Where to print.
    cells
        Results of `lplb_triton.bench.balance.run`.
    title
        Line above the first table.
    time_label
        What the solve time is a time of.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    # Lines between the columns would not fit 80 characters.
    imbalance = Table(
        title=escape(title),
        caption="imbalance = max/mean of rank loads; LP, tokens = the LP's plan in whole tokens",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("EP", "slots"):
        imbalance.add_column(name, justify="right", no_wrap=True)
    imbalance.add_column("placement", no_wrap=True)
    imbalance.add_column("")
    for label in LABELS.values():
        imbalance.add_column(label.replace(" ", "\n"), justify="right", no_wrap=True)
    certificates = Table(
        title="Certificates", caption=escape(f"time per LP: {time_label}"), box=SIMPLE_HEAD
    )
    for name in ("EP", "slots"):
        certificates.add_column(name, justify="right", no_wrap=True)
    certificates.add_column("placement", no_wrap=True)
    for name in ("certified", "largest gap", "iterations\nmean, max", "time per LP"):
        certificates.add_column(name, justify="right")

    for cell in cells:
        head = (str(cell.ep), str(cell.slots), cell.placement)
        if cell.reason is not None:
            imbalance.add_row(*head, "", *["n/a"] * len(LABELS), end_section=True)
            certificates.add_row(*head, *["n/a"] * 4)
            continue
        values = [cell.imbalance(variant) for variant in LABELS]
        imbalance.add_row(*head, "mean", *[f"{v.mean():.3f}" for v in values], style="bold")
        imbalance.add_row("", "", "", "p95", *[f"{np.percentile(v, 95):.3f}" for v in values])
        imbalance.add_row("", "", "", "max", *[f"{v.max():.3f}" for v in values], end_section=True)
        certificates.add_row(*head, *_certificate(cell))
    target.print(imbalance)
    target.print(certificates)
    for cell in cells:
        if cell.reason is not None:
            target.print(
                f"n/a: EP {cell.ep}, slots {cell.slots}: {escape(cell.reason)}", soft_wrap=True
            )


def _certificate(cell: Cell) -> list[str]:
    status, microseconds = cell.status(), cell.microseconds()
    if microseconds is None:
        return ["no LP", "", "", ""]
    iterations = cell.iterations()
    certified = int((status == Status.CERTIFIED).sum())
    text = f"{certified} of {len(status)}"
    return [
        text if certified == len(status) else f"[bold red]{text}[/]",
        f"{cell.gap().max():.1e}",
        f"{iterations.mean():.1f}, {iterations.max()}",
        f"{microseconds:.0f} us" if microseconds >= 10 else f"{microseconds:.2f} us",
    ]


def show_verdicts(target: Console, verdicts: Sequence[Verdict], *, title: str) -> None:
    """Print what a comparison with HiGHS found, a table for each part of the corpus.

    Parameters
    ----------
    target
        Where to print.
    verdicts
        Results of `lplb_triton.testing.verify.verify`.
    title
        Line above the tables.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    rows: dict[str, Callable[[Verdict], str]] = {
        "instances": lambda v: str(v.instances),
        "infeasible plans": lambda v: str(v.infeasible),
        "bounds above the optimum": lambda v: str(v.bound_above_optimum),
        "loads below the optimum": lambda v: str(v.load_below_optimum),
        "not certified": lambda v: str(v.not_certified),
        "certified": lambda v: _share(v.certified),
        "worst gap": lambda v: f"{v.worst_gap:.2e}",
    }
    # What the kernel of `Balancer` counts is something else than what `lplb_triton.solve` does.
    for word, from_counts in (("iterations", False), ("steps", True)):
        for label, value in (
            ("mean", lambda v: f"{v.total_iterations / max(v.instances, 1):.1f}"),
            ("max", lambda v: str(v.max_iterations)),
        ):
            rows[f"{word}, {label}"] = partial(_only, value, from_counts)
    for part in dict.fromkeys(v.part for v in verdicts):
        here = [v for v in verdicts if v.part == part]
        table = Table(title=escape(f"{PARTS[part]}, {title}"), box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("tolerance")
        for v in here:
            way = ", from counts" if v.from_counts else ""
            table.add_column(f"{v.tolerance:g}{way}", justify="right")
        for label, value in rows.items():
            cells = [value(v) for v in here]
            if any(cells):
                table.add_row(label, *cells)
        target.print(table)


def _only(value: Callable[[Verdict], str], from_counts: bool, verdict: Verdict) -> str:
    return value(verdict) if verdict.from_counts == from_counts else ""


def _share(part: float) -> str:
    """Percents, never rounded up to all."""
    return f"{math.floor(1e4 * part + 1e-9) / 100:.2f}%"


@dataclass(frozen=True)
class Grid:
    """A table of strings, for the terminal and for Markdown alike.

    Attributes
    ----------
    title : str
        What the table is of.
    header : tuple of str
        Names of the columns; the first holds text, the others numbers.
    rows : list of tuple of str
        One cell per column.
    notes : tuple of str
        Lines below the table.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def show_grids(target: Console, grids: Sequence[Grid]) -> None:
    """Print tables.

    Parameters
    ----------
    target
        Where to print.
    grids
        In order.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    for grid in grids:
        table = Table(
            title=escape(grid.title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for index, name in enumerate(grid.header):
            header = name.replace(" ", "\n")
            table.add_column(header, justify="right" if index else "left", no_wrap=True)
        for row in grid.rows:
            table.add_row(*(escape(cell) for cell in row))
        target.print(table)
        for note in grid.notes:
            target.print(escape(note), soft_wrap=True)


def markdown(grids: Sequence[Grid]) -> str:
    """Write tables in Markdown.

    Parameters
    ----------
    grids
        In order.

    Returns
    -------
    str
        Ends with a newline.
    """
    parts = []
    for grid in grids:
        lines = [grid.header, ("---",) * len(grid.header), *grid.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n\n".join([f"### {grid.title}", table, *grid.notes]))
    return "\n\n".join(parts) + "\n"


def _us(value: float) -> str:
    return f"{value:.1f}"


def _times(statistics: dict[str, float]) -> tuple[str, ...]:
    return tuple(_us(statistics[name]) for name in ("median", "p99", "max"))


def solve_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench solve``.

    Parameters
    ----------
    report
        What the command writes as JSON.

    Returns
    -------
    list of Grid
    """
    grids = [] if report["traffic"] is None else _traffic_grids(report["traffic"])
    if report["rows"]:
        grids += _family_grids(report)
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
                [(label, *_times(groups[key])) for label, key in lines.items()]
                + [("quotient", *(f"{ratio[name]:.2f}" for name in ("median", "p99", "max")))],
                (f"{groups['batches']} batches.",),
            )
        )
    if report["peers"] is not None:
        grids.append(_peers_grid(report))
    return grids


def _traffic_grids(traffic: dict[str, Any]) -> list[Grid]:
    """Lay out recorded traces first, then what was drawn; load sets of a kind together."""
    from lplb_triton.bench.traffic import DRAWN, STEPS

    times: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    stages: list[tuple[str, ...]] = []
    lines: list[tuple[str, ...]] = []
    for row in traffic["pooled"]:
        head = (_case_name(row), row["kind"])
        spread = (_us(row["us"][name]) for name in ("median", "p95", "p99", "max"))
        times[row["kind"] in DRAWN].append((*head, str(row["batches"]), *spread))
        medians = row["steps_us"]
        stages.append(
            (
                *head,
                *(
                    text
                    for name in STEPS
                    for text in (
                        _percent(row["steps"][name]),
                        "" if medians[name] is None else _us(medians[name]),
                    )
                ),
            )
        )
        lines.append((*head, f"{row['worst_gap']:.1e}", str(row["uncertified"])))
    what = (
        "256/64 chain+1: 256 experts on 64 ranks with 1 redundant slot each, placed by chain. A "
        "batch's time is the median of at least 20 replays, from counts by expert to a certified "
        "plan; percentiles run over batches. "
    )
    notes = {
        False: (
            f"{what}Placed by the first half of a trace, layer by layer; of the second half every "
            f"batch is timed{_at_most(traffic)}.",
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
    grids = [
        Grid(f"Solve on {titles[was_drawn]}, microseconds", header, found, notes[was_drawn])
        for was_drawn, found in times.items()
        if found
    ]
    names = (f"{STEPS[0]} steps", "1 step", *(f"{name} steps" for name in STEPS[2:]))
    grids.append(
        Grid(
            "Stages of the solve on real traffic",
            ("case", "loads", *(text for name in names for text in (name, "us"))),
            stages,
            (
                "The share of the batches that needed so many steps by potentials after levelling "
                "along edges, and their median time in microseconds. 0 steps: levelling was "
                "enough.",
            ),
        )
    )
    grids.append(
        Grid(
            "Certificates on real traffic",
            ("case", "loads", "worst gap", "not certified"),
            lines,
            (
                "Every plan and bound was held against HiGHS before it was timed.",
                *(f"Left out: {row['case']}: {row['reason']}." for row in traffic["left_out"]),
            ),
        )
    )
    return grids


def _case_name(row: dict[str, Any]) -> str:
    return f"{row['experts']}/{row['ep']} {row['placement']}+{row['slots']}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < share < 0.01 else f"{100 * share:.0f}%"


def _at_most(traffic: dict[str, Any]) -> str:
    most = traffic["most"]
    return "" if most is None else f", at most {most} of a layer, evenly spread"


def _family_grids(report: dict[str, Any]) -> list[Grid]:
    rows = report["rows"]
    return [
        Grid(
            "Solve, microseconds",
            ("shape", "ranks", "columns", "median", "p99", "max", "rotated", "as Problem"),
            [
                (
                    *(row["shape"], str(row["ranks"]), str(row["columns"]), *_times(row["us"])),
                    *(_us(row["rotated_us"]), _us(row["problem_us"]["median"])),
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
            [(row["shape"], *map(_us, row["by_family_us"].values())) for row in rows],
        ),
    ]


def _peers_grid(report: dict[str, Any]) -> Grid:
    names = {
        "affine_scaling": "affine scaling",
        "edge_balancing": "edge balancing",
        "lplb": "LPLB",
    }
    lines: list[tuple[str, ...]] = []
    notes: dict[str, None] = {}
    for solved, peers in zip(report["rows"], report["peers"], strict=True):
        shape = peers["shape"]
        lines.append((shape, "lplb_triton", *_times(solved["us"]), "0"))
        for key, label in names.items():
            found = peers[key]
            if isinstance(found, str):
                notes[f"{shape}, {label}: {found}"] = None
                continue
            times = ("n/a",) * 3 if found["us"] is None else _times(found["us"])
            kinds = ("infeasible", "inexact", "not_reached", "refused")
            bad = [f"{found[k]} {k.replace('_', ' ')}" for k in kinds if k in found]
            lines.append((shape, label, *times, ", ".join(bad)))
            if found.get("alike_us"):
                lines.append((shape, f"{label}, as often for all", *_times(found["alike_us"]), ""))
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


def pipeline_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench pipeline``.

    Parameters
    ----------
    report
        What the command writes as JSON.

    Returns
    -------
    list of Grid
    """
    rows = report["rows"]
    parts = ("count", "solve", "select", "floor", "host")
    spread = ("median", "p99", "max")
    grids = [] if report["traffic"] is None else [_run_grid(report["traffic"])]
    grids.append(
        Grid(
            "Whole run without load sync, microseconds",
            (
                *("shape", "tokens", "run, median", "p99", "max"),
                *(*parts, "steps, median / max", "KiB moved", "allocations"),
            ),
            [
                (
                    row["shape"],
                    str(row["tokens"]),
                    *(_us(row["run_us"][s]) for s in spread),
                    *(_us(row[f"{p}_us"]) for p in parts),
                    f"{row['iterations']['median']:g} / {row['iterations']['max']:g}",
                    f"{row['bytes'] / 1024:.0f}",
                    "n/a"
                    if row["allocations_per_call"] is None
                    else f"{row['allocations_per_call']:g}",
                )
                for row in rows
            ],
            (
                f"{rows[0]['experts']} experts, top-8, the same batches of all six load families "
                "for every shape; the solve's time is a median too. floor: the ids, read twice and "
                f"written once, at {report['bandwidth'] / 1e9:.0f} GB/s, the speed of a large copy "
                "in the same run (small batches stay in the cache). host: wall time of an eager "
                "call. steps: by potentials, of the solve.",
            ),
        )
    )
    if report["first_calls"]:
        grids.append(
            Grid(
                "First call of a new shape, seconds",
                ("shape", "empty kernel cache", "full kernel cache"),
                [
                    (row["shape"], f"{row['cold_s']:.2f}", f"{row['warm_s']:.2f}")
                    for row in report["first_calls"]
                ],
                ("In a fresh process; imports, placement, start of CUDA and Triton left out.",),
            )
        )
    return grids


def _run_grid(traffic: dict[str, Any]) -> Grid:
    return Grid(
        "Whole run on a recorded trace, without load sync, microseconds",
        (
            *("case", "loads", "batches", "median", "p95", "p99", "max"),
            *("solve, median", "p99"),
        ),
        [
            (
                *(_case_name(row), row["kind"], str(row["batches"])),
                *(_us(row["us"][name]) for name in ("median", "p95", "p99", "max")),
                *(_us(solved["us"][name]) for name in ("median", "p99")),
            )
            for row, solved in zip(traffic["pooled"], traffic["solve"], strict=True)
        ],
        (
            f"Batches of {traffic['tokens']} tokens, top-8, their ids in random order: count, "
            "solve and select; solve: of the same batches, from counts. Placed by the first half "
            "of the trace, layer by layer; the batches are of the second half, evenly spread. A "
            "batch's time is the median of at least 20 replays; percentiles run over batches.",
        ),
    )


def placement_grids(report: dict[str, Any]) -> list[Grid]:
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


def simulate_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench simulate``.

    Parameters
    ----------
    report
        What the command writes as JSON.

    Returns
    -------
    list of Grid
    """
    o = report["options"]
    rows = report["rows"]
    return [
        Grid(
            "Simulation: expert products of the slowest rank, microseconds",
            ("EP", "slots", "balance", "slowest rank", "mean rank", "imbalance", "over even"),
            [
                (
                    *(str(row["ep"]), str(row["slots"]), name, _us(row[name]["slowest_us"])),
                    *(_us(row[name]["mean_us"]), f"{row[name]['imbalance']:.3f}"),
                    f"{row[name]['over_even']:.3f}",
                )
                for row in rows
                for name in ("none", "eplb", "lplb", "even")
            ],
            (
                f"A simulation on one GPU: ranks one after the other, {o['tokens']} rows per rank "
                f"on average, hidden {o['hidden']}, inner {o['inner']}, bfloat16, forward pass of "
                f"the two grouped products; no communication, no routing. Medians over "
                f"{rows[0]['batches']} batches of the packaged trace. imbalance: largest over mean "
                "tokens. even: as many tokens for every expert, the ceiling.",
            ),
        )
    ]


def workloads_grids(report: dict[str, Any]) -> list[Grid]:
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


def advise_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench advise``.

    Parameters
    ----------
    report
        What the command writes as JSON.

    Returns
    -------
    list of Grid
    """
    o, gemm = report["options"], report["gemm"]
    model = o["model"]
    said = ", ".join(f"{name} from {source}" for name, source in o["sizes_from"].items())
    rows, costs = [], []
    for row in report["rows"]:
        head = (row["placement"], str(row["slots"]))
        layer, saving, even = row["layer_us"], row["saving_us"], row["break_even"]
        rows.append(
            (
                *head,
                *(_us(layer[name]) for name in ("in_order", "even", "lp")),
                f"{saving['mean']:.0f} ({saving['low']:.0f} .. {saving['high']:.0f})",
                _us(row["net_us"]["mean"]),
            )
        )
        shown = ["never" if even[k] is None else str(even[k]) for k in ("mean", "high", "low")]
        costs.append(
            (
                *head,
                *(_us(v) for v in row["overhead_us"].values()),
                f"{shown[0]} ({shown[1]} .. {shown[2]})",
                f"{row['replica_bytes'] / 2**20:.0f}",
            )
        )
    per = "forward and backward" if o["training"] else "forward"
    return [
        Grid(
            f"Predicted: expert products of the slowest of {o['ep']} ranks, microseconds",
            ("placement", "slots", "in order", "even", "LP", "saving", "net"),
            rows,
            (
                f"Hidden {model['hidden']}, inner {model['inner']}, {model['experts']} experts, "
                f"top-{model['top_k']} ({said}), {o['tokens']} tokens per rank, {per}; loads: "
                f"{o['loads']}. even: EPLB with as many slots, split evenly. saving: of the LP "
                "over that, mean and range (10th to 90th percentile of the batches, widened by "
                "the fit's worst error).",
                f"Times of a rank's products: {gemm['source']}. Fit: {gemm['error']:.0%} rms, "
                f"{gemm['worst']:.0%} at worst. Predicted, not measured: every figure of this "
                "table. Left out: communication, routing, attention.",
            ),
        ),
        Grid(
            "What it costs",
            ("placement", "slots", "sync", "run", "break-even", "MiB"),
            costs,
            (
                "Microseconds a batch, from figures measured on H100s (sync: two GPUs over NVLink; "
                "more GPUs or nodes take longer; run: count, solve and select). break-even: tokens "
                "per rank from which on it pays, by mean (high .. low) saving. MiB: replicas of "
                "one layer on a rank; in training as much again is sent and received "
                "for weights and for gradients each step.",
                _verdict(report),
                *(
                    f"n/a: {slots} slots are more than copies can fill."
                    for slots in report["left_out"]
                ),
            ),
        ),
    ]


def _verdict(report: dict[str, Any]) -> str:
    """Whether balancing pays, and what follows."""
    best = f"{report['best']['placement']}, {report['best']['slots']} slots per rank"
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


def advice_check_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench advise --check``.

    Parameters
    ----------
    report
        What the command writes as JSON.

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
                    *(_us(row[split][k]) for k in ("measured_us", "predicted_us")),
                    f"{row[split]['error']:+.1%}",
                )
                for row in report["rows"]
                for split in ("even", "lp")
            ],
            ("Fitted to other splits of the same sizes on the same GPU. EPLB, one slot per rank.",),
        )
    ]


def ep_grids(report: dict[str, Any]) -> list[Grid]:
    """Lay out the report of ``lplb-bench ep``.

    Parameters
    ----------
    report
        What the command writes as JSON.

    Returns
    -------
    list of Grid
        The last says how every section ended.
    """
    options, found = report["options"], report["sections"]
    # Sections by name, then back end or routing. One that failed may have no figures.
    by_name: dict[str, dict[str, Any]] = {}
    for name, row in found.items():
        section, variant = name.split(":")
        by_name.setdefault(section, {})[variant] = row
    layouts = {
        "verify": _ep_sums,
        "time": _ep_sync,
        "pipeline": _ep_pipeline,
        "kill": _ep_killed,
        "train": _ep_training,
    }
    grids: list[Grid] = []
    for section, rows in by_name.items():
        done = {k: row for k, row in rows.items() if not {"failed", "skipped"} & set(row)}
        if section == "train":
            done = {k: row for k, row in rows.items() if "runs" in row}
        if done:
            grids += layouts[section](done, options)
    ends: list[tuple[str, ...]] = []
    notes = []
    for name, row in found.items():
        word = next((word for word in ("failed", "skipped") if word in row), "done")
        ends.append((name, word, f"{row['seconds']:.0f}" if "seconds" in row else ""))
        if word != "done":
            notes.append(f"{name} {word}: {row[word]}")
    return [*grids, Grid("Sections", ("section", "end", "seconds"), ends, tuple(notes))]


def _ep_sums(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    modes = ("eager", "graph")
    return [
        Grid(
            "Sums held against what they must be, with random delays",
            ("back end", "eager epochs", "wrong", "seconds", "graph epochs", "wrong", "seconds"),
            [
                (
                    kind,
                    *(str(row[f"{m}_{k}"]) for m in modes for k in ("epochs", "wrong", "seconds")),
                )
                for kind, row in rows.items()
            ],
            tuple(f"{kind}: {row['sync']}" for kind, row in rows.items()),
        )
    ]


_EP_SPREAD = ("rank 0 median", "p99", "slowest median", "p99")


def _by_rank(times: dict[str, dict[str, float]]) -> tuple[str, ...]:
    return tuple(_us(times[who][name]) for who in times for name in ("median", "p99"))


def _ep_sync(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    lines = []
    for kind, row in rows.items():
        gather, plain = (row[key]["slowest"]["median"] for key in ("sum and gather", "all-reduce"))
        ratio = plain / row["sum"]["slowest"]["median"]
        lines.append((kind, *_by_rank(row["sum"]), _us(gather), _us(plain), f"{ratio:.2f}"))
    return [
        Grid(
            "Load sync, 256 counts, microseconds",
            ("back end", *_EP_SPREAD, "with gather", "all-reduce", "speed-up"),
            lines,
            (
                f"{_ep_replays(options, rows)} with gather: every rank's counts too. all-reduce: "
                "torch.distributed's of 256 int32. These and the speed-up are medians of the "
                "slowest.",
            ),
        )
    ]


def _ep_replays(options: dict[str, Any], rows: dict[str, Any]) -> str:
    how = "CUDA-graph replays" if options["device"] == "cuda" else "Repetitions on a CPU"
    calls = next(iter(rows.values()))["calls_per_replay"]
    counted = options["replays"] - options["replays"] // 10
    return (
        f"{how} of {calls} calls each, time per call; p99 over {counted} of them; slowest: of "
        "each the rank that took longest."
    )


def _ep_pipeline(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    runs: list[tuple[str, ...]] = []
    hosts: list[tuple[str, ...]] = []
    for kind, row in rows.items():
        for name, found in row["placements"].items():
            alone = _us(found["without_sync_us"]["slowest"]["median"])
            for quotas in ("local", "global"):
                head, times = (name, kind, quotas), found[quotas]
                runs.append((*head, *_by_rank(times["run_us"]), alone))
                hosts.append((*head, *_by_rank(times["host_us"])))
    header = ("shape", "back end", "quotas", *_EP_SPREAD)
    grids = [
        Grid(
            "Whole run with load sync, microseconds",
            (*header, "without sync"),
            runs,
            (
                f"{options['tokens']} tokens x top-8 per rank, 256 experts. "
                f"{_ep_replays(options, rows)} without sync: each rank by itself, median of the "
                "slowest.",
            ),
        ),
        Grid(
            "Host, microseconds",
            header,
            hosts,
            ("Wall time of an eager call of the whole run that isn't waited for.",),
        ),
    ]
    first, row = next(iter(rows.items()))
    loads = [
        (
            name,
            quotas,
            *(f"{found[quotas]['imbalance'][k]:.4f}" for k in ("mean", "max")),
            f"{found[quotas]['over_bound']:.4f}",
            f"{found[quotas]['kept_on_rank']:.4f}",
        )
        for name, found in row["placements"].items()
        for quotas in ("local", "global")
    ]
    grids.append(
        Grid(
            "Loads over all ranks, in whole tokens",
            ("shape", "quotas", "imbalance mean", "max", "over bound", "kept on rank"),
            loads,
            (
                f"From the ids of all ranks with {first}; every id, quota and largest load of "
                "every back end was held against the LP before it was timed. over bound: largest "
                "load over the LP's lower bound, at most. kept on rank: part of the tokens that "
                "stay where they are.",
            ),
        )
    )
    return grids


def _ep_killed(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    return [
        Grid(
            "The last rank killed",
            ("back end", "seconds"),
            [(kind, f"{row['took_seconds']:.2f}") for kind, row in rows.items()],
            (
                "seconds: until the others name it.",
                *(f"{kind}: {row['error']}" for kind, row in rows.items()),
            ),
        )
    ]


def _or_na(value: float | None, spec: str) -> str:
    return "n/a" if value is None else format(value, spec)


def _ep_training(rows: dict[str, Any], options: dict[str, Any]) -> list[Grid]:
    even = rows["even"]["runs"][0]["moe_ms"] if "even" in rows else None
    times: list[tuple[str, ...]] = []
    losses: list[tuple[str, ...]] = []
    for routing, row in rows.items():
        for made in row["runs"]:
            head = (routing, made["balance"])
            over = "n/a" if even is None else f"{made['moe_ms'] / even:.3f}"
            values = (f"{made[key]:.3f}" for key in ("unbalanced", "imbalance"))
            steps = (f"{made[key]:.2f}" for key in ("step_ms", "moe_ms"))
            times.append((*head, *values, *steps, over))
            part = made["certified"]
            losses.append(
                (
                    *head,
                    _or_na(made["final_loss"], ".4f"),
                    _or_na(made["loss_difference"], ".1e"),
                    "no LP" if part is None else f"{part:.2%}",
                )
            )
        noise = _or_na(row["reversed_difference"], ".1e")
        losses.append((routing, "reversed", "", noise, ""))
    s = next(iter(rows.values()))["settings"]
    return [
        Grid(
            "Training, milliseconds",
            ("routing", "run", "in order", "imbalance", "step", "layers", "over even"),
            times,
            (
                f"examples/train_moe_ep.py: layers {s['layers']}, experts {s['experts']}, "
                f"top-{s['top_k']}, hidden {s['hidden']}, expert hidden {s['expert_hidden']}, "
                f"{s['tokens']} tokens per rank, {s['redundant']} redundant slots per rank, "
                f"{s['dtype']}; medians of steps {s['skip'] + 1} to {s['steps']} on the slowest "
                "rank. layers: MoE layers, forward and backward. in order: imbalance if experts "
                "lay in order. over even: layers over those of none with even routing.",
            ),
        ),
        Grid(
            "Losses of the same runs",
            ("routing", "run", "last loss", "difference", "certified"),
            losses,
            (
                "difference: of the losses from those of none, root of the mean square over "
                "the steps. reversed: none with its gradients summed over tokens in the opposite "
                "order.",
            ),
        ),
    ]
