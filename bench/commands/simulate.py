"""`lplb-bench simulate`."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

from lplb_triton.bench import options, output, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.commands.solve import MOST_INSTANCES
from lplb_triton.bench.machine import environment
from lplb_triton.bench.measure import simulate
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.bench.progress import progress
from lplb_triton.traces import trace as traces

__all__ = [
    "add",
    "run",
]


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "simulate",
        run,
        parents=gpu.timing_parents(),
        help="expert products of every simulated rank, timed on one GPU",
        description=(
            "A SIMULATION: the ranks of an EP group one after the other on one GPU, each with its\n"
            "real token counts of the packaged trace. The expert products of every rank are timed\n"
            "for real; the layer takes as long as its slowest rank. No communication, no routing."
        ),
        examples="  lplb-bench simulate --ep 8,16,32,64 --slots 1",
    )
    options.add_ep(sub)
    options.add_slots(sub)
    sub.add_argument(
        "--rows", "--tokens", dest="tokens", type=options.count, default=16384, metavar="N",
        help="rows of a rank's experts on average: its tokens times top-k (default %(default)s)",
    )  # fmt: skip
    for name, default, text in (
        ("hidden", 2048, "width of the model"),
        ("inner", 768, "inner width of an expert"),
    ):
        sub.add_argument(
            f"--{name}", type=partial(options.count, most=options.MOST_WIDTH), default=default,
            metavar="N", help=f"{text} (default %(default)s)",
        )  # fmt: skip
    sub.add_argument(
        "--batches", type=partial(options.count, most=MOST_INSTANCES), default=1, metavar="N",
        help="test batches of each layer in each stretch of the trace (default %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Time the expert products of every rank."""
    gpu.check_files(args)
    trace = traces.packaged()
    options.check_divides(args.ep, trace.experts)
    for ep in args.ep:
        most = trace.experts - trace.experts // ep
        if max(args.slots) > most:
            raise UsageError(f"argument --slots: expected at most {most} on {ep} ranks")
    device, timer = gpu.start(args)
    begin = time.perf_counter()
    sizes = {name: getattr(args, name) for name in ("tokens", "hidden", "inner")}
    steps = len(simulate.choose_batches(trace, args.batches))
    pairs = [(ep, slots) for ep in args.ep for slots in args.slots]
    names = [(f"EP {ep}, {slots} slots", steps) for ep, slots in pairs]
    with progress(names, args.progress) as advance:
        try:
            rows = [
                simulate.simulate_ep_size(
                    trace, ep, timer, device, slots=slots, **sizes,
                    per_stretch=args.batches, tolerance=args.tolerance, progress=advance,
                )
                for ep, slots in pairs
            ]  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from error
    report = {
        "command": "simulate",
        "options": {
            **sizes,
            "slots": list(args.slots),
            "batches": args.batches,
            "tolerance": args.tolerance,
        },
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    output.finish(args, out, report, tables.make_simulate_grids(report))
    return OK
