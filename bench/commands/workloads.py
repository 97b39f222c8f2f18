"""``lplb-bench workloads``."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

from lplb_triton.bench import options, output, tables, workloads
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, say
from lplb_triton.bench.progress import progress
from lplb_triton.solver import DEFAULT_TOLERANCE

__all__ = ["add", "run"]

MOST_EXPERTS, MOST_BATCHES = 2**16, 10**4
TRIALS = 10


def add(commands: Any) -> None:
    """Add the parser."""
    listing = "\n".join(f"  {name}: {w.about}" for name, w in workloads.WORKLOADS.items())
    sub = options.add_command(
        commands,
        "workloads",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="every workload under every placement, each held against HiGHS",
        description=(
            "Place experts by a workload's history, balance its test batches, and compare\n"
            "the even split, the LP and HiGHS. Fails if on any batch the LP is worse than the\n"
            "even split or further than the tolerance from HiGHS's optimum. On the CPU.\n"
            "Workloads:\n" + listing
        ),
        examples=(
            "  lplb-bench workloads --workload zipf,burst --placement chain --ep 8\n"
            "  lplb-bench workloads --ep 8,16,32,64 --slots 2 --json workloads.json"
        ),
    )
    sub.add_argument(
        "--workload", "--workloads", type=options.names(workloads.WORKLOADS),
        default=tuple(workloads.WORKLOADS), metavar="NAME[,NAME...]", help="default: all",
    )  # fmt: skip
    sub.add_argument(
        "--placement", "--placements", type=options.placements, default=workloads.PLACEMENTS,
        metavar="NAME[,NAME...]", help=f"default {','.join(workloads.PLACEMENTS)}",
    )  # fmt: skip
    options.add_ep(sub)
    options.add_slots(sub)
    for name, default, most, text in (
        ("experts", 256, MOST_EXPERTS, "logical experts"),
        ("batches", 4, MOST_BATCHES, "test batches"),
    ):
        sub.add_argument(
            f"--{name}", type=partial(options.count, most=most), default=default, metavar="N",
            help=f"{text} (default %(default)s)",
        )  # fmt: skip
    sub.add_argument(
        "--trials", type=options.count, metavar="N",
        help=f"effort of place (default {TRIALS}: little, hardly more than its start)",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="default %(default)s"
    )
    sub.add_argument(
        "--tolerance", type=options.tolerance, default=DEFAULT_TOLERANCE, metavar="GAP",
        help="certified relative gap asked of every LP (default %(default)g)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Judge every combination."""
    tables.require("rich")
    if "place" not in args.placement:
        options.refuse(args, ("trials",), "only for the placement place")
    options.fill(args, {"trials": TRIALS})
    output.check_files([("--json", args.json), ("--markdown", args.markdown)])
    options.check_divides(args.ep, args.experts)
    sizes = {
        name: getattr(args, name)
        for name in ("slots", "experts", "batches", "trials", "seed", "tolerance")
    }
    begin = time.perf_counter()
    names = [(f"EP {ep}, {name}", 1) for ep in args.ep for name in args.workload]
    with progress(names, args.progress) as advance:
        try:
            rows = workloads.run(args.workload, args.placement, args.ep, **sizes, progress=advance)
        except ValueError as error:
            raise UsageError(str(error)) from error
    report = {
        "command": "workloads",
        "options": {**sizes, "slots": list(args.slots)},
        "about": {name: workloads.WORKLOADS[name].about for name in args.workload},
        "environment": environment("cpu"),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    judged = [row for row in rows if "reason" not in row]
    if not judged:
        raise UsageError("; ".join(dict.fromkeys(row["reason"] for row in rows)))
    output.finish(args, out, report, tables.make_workloads_grids(report))
    bad = [row for row in judged if not row["passed"]]
    for row in bad:
        say(
            f"EP {row['ep']}, {row['slots']} slots, {row['workload']}, {row['placement']}: "
            f"{row['worse_than_even']} batches worse than the even split, distance from HiGHS "
            f"{row['distance']:.1e}"
        )
    return FAILED if bad else OK
