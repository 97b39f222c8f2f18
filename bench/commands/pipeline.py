"""`lplb-bench pipeline`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lplb_triton.bench import options, output, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.machine import environment
from lplb_triton.bench.measure import cases as traffic_cases
from lplb_triton.bench.measure import loads as traffic_loads
from lplb_triton.bench.measure import preparation, traffic
from lplb_triton.bench.measure.first_call import time_first_calls
from lplb_triton.bench.measure.pipeline import (
    PIPELINE_SHAPES,
    PIPELINE_TOKENS,
    make_pipeline_placement,
    measure_copy_bandwidth,
    time_run,
)
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.measure.workload import SEED
from lplb_triton.bench.output import FAILED, OK, Output, say
from lplb_triton.bench.progress import progress

__all__ = [
    "add",
    "run",
]


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "pipeline",
        run,
        parents=gpu.timing_parents(),
        help="times of the whole run on a GPU",
        description=(
            "Time Balancer.run and its parts by CUDA-graph replay, for 256 experts and top-8\n"
            "routing, without load sync; the host's time of an eager call, its allocations, and\n"
            "the first call of a fresh process. The whole run is timed batch by batch on the\n"
            "packaged trace too, under placements made from its first half."
        ),
        examples=(
            "  lplb-bench pipeline --markdown -\n"
            "  lplb-bench pipeline --shapes eplb:32:2 --tokens 128,4096 --no-first-call\n"
            "  lplb-bench pipeline --no-traffic --json pipeline.json"
        ),
    )
    sub.add_argument(
        "--shapes", type=partial(options.shapes, make=make_pipeline_placement),
        default=PIPELINE_SHAPES, metavar="NAME[,NAME...]",
        help=f"default {','.join(PIPELINE_SHAPES)}",
    )  # fmt: skip
    sub.add_argument(
        "--tokens", type=options.integers(1), default=PIPELINE_TOKENS, metavar="N[,N...]",
        help=f"tokens of a batch (default {','.join(map(str, PIPELINE_TOKENS))})",
    )  # fmt: skip
    sub.add_argument(
        "--traffic", action=argparse.BooleanOptionalAction, default=True,
        help="time the packaged trace too (default)",
    )  # fmt: skip
    sub.add_argument(
        "--first-call", action=argparse.BooleanOptionalAction, default=True,
        help="time the first call in fresh processes too (default)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Time the whole run."""
    device, timer = gpu.start(args)
    begin = time.perf_counter()
    rows, first_calls = [], []
    bandwidth = measure_copy_bandwidth(timer, device)
    names = [(shape, len(args.tokens) + args.first_call) for shape in args.shapes]
    cases = traffic_cases.RUN_CASES if args.traffic else ()
    measured = None
    with progress([*((str(case), 1) for case in cases), *names], args.progress) as advance:
        if cases:
            measured = _time_runs(args, cases, device, timer, advance)
        for shape in args.shapes:
            for tokens in args.tokens:
                rows.append(
                    time_run(
                        shape,
                        tokens,
                        timer,
                        device,
                        tolerance=args.tolerance,
                        bandwidth=bandwidth,
                    )
                )
                advance()
            if args.first_call:
                first_calls.append(time_first_calls(shape))
                advance()
    report = {
        "command": "pipeline",
        "options": {
            "shapes": list(args.shapes),
            "tokens": list(args.tokens),
            "tolerance": args.tolerance,
        },
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "bandwidth": bandwidth,
        "traffic": measured,
        "rows": rows,
        "first_calls": first_calls,
    }
    output.finish(args, out, report, tables.make_pipeline_grids(report))
    wrong = [row for row in rows if row["allocations_per_call"] not in (None, 1)]
    for row in wrong:
        say(
            f"{row['shape']}, {row['tokens']} tokens: run allocates "
            f"{row['allocations_per_call']:g} times per call, expected once"
        )
    bad = 0 if measured is None else sum(row["uncertified"] for row in measured["rows"])
    if bad:
        say(f"{bad} batches were not certified within {args.tolerance:g}")
    return FAILED if wrong or bad else OK


def _time_runs(
    args: argparse.Namespace,
    cases: Sequence[traffic_cases.Case],
    device: torch.device,
    timer: Timer,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Check the packaged trace's batches, and time the whole run and the solve on each."""
    trace, source = options.load_trace(None)
    loads = traffic_loads.split_trace(trace, source, traffic_cases.RUN_BATCHES)
    rows, solved = [], []
    for case in cases:
        for each in loads:
            checked = traffic.check_plans(preparation.prepare(case, each), device, args.tolerance)
            rows.append(traffic.time_runs(checked, timer, SEED))
            solved.append(traffic.time_solves(checked, timer))
        advance()
    return {
        "tokens": trace.totals()[0, 0].sum().item() // traffic_loads.TOP_K,
        "pooled": traffic.pool_rows(rows),
        "solve": traffic.pool_rows(solved),
        "rows": rows,
    }
