"""``lplb-bench scale``."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch

from lplb_triton.bench import options, output, scale, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.bench.progress import progress

__all__ = ["add", "run"]

EP, GROUPS, RANKS_PER_NODE = (128, 256, 512, 1024), (8, 64, 512), 8
MOST_RANKS, MOST_BATCHES = 2**12, 10**3


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "scale",
        run,
        parents=gpu.timing_parents(),
        help="hundreds of ranks: one LP of all against LPs of groups; sizes, wire and times",
        description=(
            "A SIMULATION of hundreds of ranks. Imbalance of EPLB with an even split, of one LP\n"
            "of all ranks, of an LP for each group of ranks, and of two levels of LPs, by the\n"
            "twins on the CPU; bytes of the solver's tables; counts on the wire, computed. Where\n"
            "there is a GPU each solve is checked and timed on it, and the last table says for\n"
            "which layers groups are faster. Loads: the packaged trace, its sources spread over\n"
            "the ranks and its layers side by side for more than 256 experts; lognormal(0, 1) and\n"
            "Zipf (exponent 1) popularity with jitter 0.3."
        ),
        examples=(
            "  lplb-bench scale                                  half a minute on a CPU\n"
            "  lplb-bench scale --ep 128 --slots 2 --groups 8,16,32,64\n"
            "  lplb-bench scale --markdown scale.md              on a GPU: with times"
        ),
    )
    sub.add_argument(
        "--ep", type=options.integers(2, MOST_RANKS), default=EP, metavar="N[,N...]",
        help=f"numbers of expert-parallel ranks (default {','.join(map(str, EP))})",
    )  # fmt: skip
    options.add_slots(sub)
    sub.add_argument(
        "--groups", type=options.integers(2, MOST_RANKS), default=GROUPS, metavar="N[,N...]",
        help="ranks of a group that has an LP of its own; those that don't divide an EP size into "
        f"several groups are left out there (default {','.join(map(str, GROUPS))})",
    )  # fmt: skip
    sub.add_argument(
        "--load", "--loads", dest="loads", type=options.names(scale.LOADS), default=scale.LOADS,
        metavar="NAME[,NAME...]", help=f"default {','.join(scale.LOADS)}",
    )  # fmt: skip
    sub.add_argument(
        "--experts", type=lambda text: options.count(text, options.MOST_EXPERTS), metavar="N",
        help="logical experts (default: the least multiple of the ranks from 256 on)",
    )  # fmt: skip
    sub.add_argument(
        "--ranks-per-node", type=options.count, default=RANKS_PER_NODE, metavar="N",
        help="consecutive ranks of a node (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--batches", type=lambda text: options.count(text, MOST_BATCHES), default=4, metavar="N",
        help="test batches of each load (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=options.seed, default=0, metavar="N",
        help="of synthetic loads (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--time", action=argparse.BooleanOptionalAction, default=None,
        help="time solves on a GPU (default: where there is one)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Simulate every combination, and time it where that is asked for."""
    tables.require("rich")
    gpu.check_files(args)
    chosen = scale.Options(
        ep=args.ep, slots=args.slots, groups=args.groups, loads=args.loads, experts=args.experts,
        ranks_per_node=args.ranks_per_node, batches=args.batches, seed=args.seed,
        tolerance=args.tolerance,
    )  # fmt: skip
    for ep in args.ep:
        if ep % args.ranks_per_node:
            raise UsageError(f"argument --ranks-per-node: {args.ranks_per_node} must divide {ep}")
        if args.experts is not None:
            options.check_divides((ep,), args.experts)
    timed = torch.cuda.is_available() if args.time is None else args.time
    device, timer = gpu.start(args) if timed else (torch.device("cpu"), None)
    begin = time.perf_counter()
    names = [(f"EP {ep}, {slots} slots", len(args.loads)) for ep in args.ep for slots in args.slots]
    with progress(names, args.progress) as advance:
        rows, left_out = scale.run(chosen, timer, device, advance)
    if not rows:
        raise UsageError("; ".join(dict.fromkeys(each["reason"] for each in left_out)))
    sizes = dict.fromkeys((row["ep"], row["experts"]) for row in rows)
    report = {
        "command": "scale",
        "options": dataclasses.asdict(chosen),
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
        "wire": [
            each for size in sizes for each in scale.count_wire_bytes(*size, args.ranks_per_node)
        ],
        "left_out": left_out,
    }
    output.finish(args, out, report, tables.make_scale_grids(report))
    return OK
