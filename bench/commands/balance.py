"""``lplb-bench balance``."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lplb_triton import Status
from lplb_triton.bench import balance, live, options, output, plots, tables
from lplb_triton.bench import report as reports
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output
from lplb_triton.bench.progress import progress
from lplb_triton.solver import DEFAULT_MAX_ITERATIONS
from lplb_triton.traces import trace as traces

__all__ = ["DEFAULT_OUT", "add", "add_nodes", "run"]

DEFAULT_OUT = "lplb-bench-results"

_EXAMPLES = """\
  lplb-bench balance
      the packaged trace on 32 ranks, 1 and 2 redundant slots per rank, placed by EPLB
  lplb-bench balance --ep 8,16,32,64 --slots 1,2 --placement eplb,cube,torus:4x8
      a table of every combination; n/a where a topology does not fit
  lplb-bench balance --trace counts.npz --ep 16 --history 100 --layers 0,4-7
      own counts: an array `counts` [batches, experts], [batches, layers, experts] or
      [batches, layers, sources, experts]
  lplb-bench balance --device cuda --json -
      solve with the GPU kernel, print JSON to stdout and tables to stderr"""


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "balance",
        run,
        parents=(options.solver_options(), options.progress_option()),
        help="imbalance of rank loads before and after, on a recorded trace",
        description=(
            "Place experts by the first batches of a trace, balance the following ones, and\n"
            "compare the imbalance (max/mean of rank loads) of five ways: no balancing, EPLB's\n"
            "order without replicas, replicas with an even split, replicas with the LP, and the\n"
            "LP in whole tokens. A trace with a gap in its steps is cut there; each part has its\n"
            f"own history. Files go to the folder --out (default {DEFAULT_OUT}; none if --json is\n"
            "given): balance.png, balance.json and report.html."
        ),
        examples=_EXAMPLES,
    )
    sub.add_argument("--trace", type=Path, metavar="PATH", help=f"{options.TRACE_HELP} (default)")
    options.add_balance(sub)
    add_nodes(sub)
    sub.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=None,
        help="write report.html beside the PNG (default, where there is a folder)",
    )  # fmt: skip


def add_nodes(sub: argparse.ArgumentParser) -> None:
    """Add the ranks of a node; None means `balance.RANKS_PER_NODE`."""
    sub.add_argument(
        "--ranks-per-node", type=options.count, metavar="N",
        help="consecutive ranks of a node, for what the report says of tokens kept near (default "
        f"{balance.RANKS_PER_NODE}; all ranks are on one node where that doesn't divide them)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output, option: str = "--trace") -> int:
    """Balance the trace that came by this option, write every file, print the tables."""
    default = "" if args.ep is not None else " (the default)"
    options.fill(args, {**options.BALANCE_DEFAULTS, "ranks_per_node": balance.RANKS_PER_NODE})
    folder, paths = _paths(args)
    tables.require("rich")
    if folder is not None:
        tables.require("matplotlib")
    device, backend = options.choose_device(args.device, args.backend)
    trace, source = options.load_trace(args.trace, option)
    chosen = balance.Options(
        ep=args.ep,
        slots=args.slots,
        placements=args.placement,
        history=args.history,
        layers=args.layers,
        tolerance=args.tolerance,
        max_iterations=DEFAULT_MAX_ITERATIONS,
        backend=backend,
        device=device,
    )
    options.check_batches(trace, source)
    parts, layers = _check(trace, chosen)
    labels = {"png": "--out", "html": "--out", "json": "--out" if args.json is None else "--json"}
    output.check_files([(labels[k], path) for k, path in paths.items()], [(option, args.trace)])

    begin = time.perf_counter()
    cells = _balance_trace(args, trace, chosen, layers, default)
    seconds = time.perf_counter() - begin
    time_label = _time_label(backend, device)
    shown = balance.choose_shown(cells)
    report = {
        "command": "balance",
        "options": _options_report(chosen, source, layers),
        "trace": _trace_report(trace, parts),
        "environment": environment(device),
        "seconds": seconds,
        "cells": [_cell_report(cell, time_label) for cell in cells],
        "shown": reports.describe_shown(trace, cells, shown, chosen, args.ranks_per_node),
        "heat": reports.heat(trace, cells[shown].worst().layer),
        "live": live.find_gain(trace, (cells[shown], *cells)),
    }
    tested = sum(part.stop - part.split for part in parts)
    title = f"{source}: {trace.experts} experts, {len(layers)} layers, {tested} test batches"
    files = _write_files(paths, report, cells, title)
    target = out.console(args.json)
    tables.show_balance(target, cells, title=title, time_label=time_label)
    if paths["json"] == "-":
        out.write(output.json_text(report))
    bad = sum(int((cell.status() != Status.CERTIFIED).sum()) for cell in cells if not cell.reason)
    if bad:
        output.say(f"{bad} LPs were not certified within {chosen.tolerance:g}")
    files.close(target)
    return FAILED if bad else OK


def _balance_trace(
    args: argparse.Namespace,
    trace: traces.Trace,
    chosen: balance.Options,
    layers: tuple[int, ...],
    default: str,
) -> tuple[balance.Cell, ...]:
    """Compare every combination, or raise a message that says why all of them are impossible."""
    names = [
        (f"EP {ep}, {name}" + (f", {slots} slots" if slots else ""), len(layers))
        for ep, name, slots in balance.combinations(chosen)
    ]
    with progress(names, args.progress) as advance:
        cells = balance.run(trace, chosen, advance)
    if all(cell.reason is not None for cell in cells):
        wrong = [ep for ep in chosen.ep if trace.experts % ep]
        if len(wrong) == len(chosen.ep):
            sizes = ", ".join(map(str, wrong))
            verb = "does" if len(wrong) == 1 else "do"
            raise UsageError(
                f"argument --ep: EP size {sizes}{default} {verb} not divide the {trace.experts} "
                f"experts; {options.name_divisors(trace.experts)}"
            )
        raise UsageError(
            "; ".join(dict.fromkeys(f"{cell.placement}: {cell.reason}" for cell in cells))
        )
    return cells


def _write_files(
    paths: Mapping[str, Path | str],
    report: dict[str, Any],
    cells: Sequence[balance.Cell],
    title: str,
) -> output.Files:
    """Write the files that are asked for; the JSON may go to standard output instead."""
    files = output.Files()
    if "png" in paths:
        files.add("picture", paths["png"], plots.balance_png(cells, title=title))
    if paths["json"] != "-":
        files.add("figures", paths["json"], output.json_text(report))
    if "html" in paths:
        files.add("report", paths["html"], reports.html(report))
    return files


def _paths(args: argparse.Namespace) -> tuple[Path | None, dict[str, Path | str]]:
    """Folder of the files, and path of each that is asked for."""
    folder = args.out
    if folder is None and args.json is None:
        folder = Path(DEFAULT_OUT)
    if folder is None:
        if args.report:
            raise UsageError("argument --report: needs --out beside --json")
        return None, {"json": args.json}
    paths: dict[str, Path | str] = {
        "png": folder / "balance.png",
        "json": folder / "balance.json" if args.json is None else args.json,
    }
    if args.report is not False:
        paths["html"] = folder / "report.html"
    return folder, paths


def _check(
    trace: traces.Trace, chosen: balance.Options
) -> tuple[tuple[balance.Stretch, ...], tuple[int, ...]]:
    """Stretches and layers of the trace, or a message that names the option."""
    try:
        parts = balance.find_stretches(trace.steps, chosen.history)
    except ValueError as error:
        raise UsageError(f"argument --history: {error}") from error
    layers = tuple(range(trace.layers)) if chosen.layers is None else chosen.layers
    if max(layers) >= trace.layers:
        raise UsageError(
            f"argument --layers: the trace has layers 0 to {trace.layers - 1}, got {max(layers)}"
        )
    return parts, layers


def _time_label(backend: str, device: str) -> str:
    what = {"torch": "batched torch twin", "triton": "Triton kernel"}[backend]
    where = {"cpu": "CPU", "cuda": "GPU"}[device]
    note = "throughput, not latency" if device == "cuda" else "not the GPU kernel's time"
    return f"{what} on the {where}, one call for all batches, divided by its LPs; {note}"


def _options_report(
    chosen: balance.Options, source: str, layers: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "trace": source,
        "ep": list(chosen.ep),
        "slots": list(chosen.slots),
        "placements": list(chosen.placements),
        "history": chosen.history,
        "layers": list(layers),
        "tolerance": chosen.tolerance,
        "max_iterations": chosen.max_iterations,
        "backend": chosen.backend,
        "device": chosen.device,
    }


def _trace_report(trace: traces.Trace, parts: tuple[balance.Stretch, ...]) -> dict[str, Any]:
    return {
        "batches": trace.batches,
        "layers": trace.layers,
        "sources": trace.sources,
        "experts": trace.experts,
        "stretches": [
            {
                "history": [part.start, part.split],
                "test": [part.split, part.stop],
                "steps": [int(trace.steps[part.start]), int(trace.steps[part.stop - 1])],
            }
            for part in parts
        ],
        "meta": trace.meta,
    }


def _cell_report(cell: balance.Cell, time_label: str) -> dict[str, Any]:
    head = {"ep": cell.ep, "slots": cell.slots, "placement": cell.placement}
    if cell.reason is not None:
        return {**head, "applicable": False, "reason": cell.reason}
    values = {variant: cell.imbalance(variant) for variant in (*balance.VARIANTS, "eplb")}
    status, iterations, gap = cell.status(), cell.iterations(), cell.gap()
    example = cell.typical()
    return {
        **head,
        "applicable": True,
        "imbalance": {
            variant: {
                "mean": float(v.mean()),
                "p95": float(np.percentile(v, 95)),
                "max": float(v.max()),
            }
            for variant, v in values.items()
        },
        "lps": {
            "count": len(status),
            "certified": int((status == Status.CERTIFIED).sum()),
            "max_gap": _finite(gap.max()) if len(gap) else None,
            "mean_iterations": float(iterations.mean()) if len(iterations) else None,
            "max_iterations": int(iterations.max()) if len(iterations) else None,
            "median_us_per_lp": cell.microseconds(),
            "time_is": time_label,
        },
        "by_layer": [
            {
                "layer": layer,
                "imbalance": {name: _rounded(v[at]) for name, v in values.items()},
                "bound": _rounded(cell.bound()[at]),
                **_solves(cell, layer),
            }
            for at, layer in enumerate(dict.fromkeys(r.layer for r in cell.results))
        ],
        "example": {
            "layer": example.layer,
            "batch": example.batch,
            "loads": {name: _rounded(loads) for name, loads in example.loads.items()},
        },
    }


def _solves(cell: balance.Cell, layer: int) -> dict[str, list[Any]]:
    """Return iterations and gap of each test batch of a layer, the largest of several groups."""
    found: dict[str, list[Any]] = {"iterations": [], "gap": []}
    for r in cell.results:
        if r.layer == layer and len(r.gap):
            batches = r.stretch.stop - r.stretch.split
            found["iterations"] += r.iterations.reshape(batches, -1).max(1).tolist()
            found["gap"] += [_finite(float(v)) for v in r.gap.reshape(batches, -1).max(1)]
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rounded(values: np.ndarray[Any, Any]) -> list[float | None]:
    return [_finite(round(float(value), 6)) for value in values]
