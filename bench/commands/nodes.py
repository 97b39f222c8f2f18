"""``lplb-bench nodes``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lplb_triton._locality import explain_near_limits
from lplb_triton.bench import near_times, node_placements, options, output, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.bench.placement import explain_impossible
from lplb_triton.bench.progress import progress
from lplb_triton.bench.types import Row
from lplb_triton.placement.nodes import MOST_TRAFFIC_PRICE
from lplb_triton.traces.trace import Trace

__all__ = ["add", "add_traffic_price", "run"]

Cases = Sequence[tuple[str, node_placements.Ints, node_placements.Ints]]

MOST_TOKENS, MOST_ASSIGNMENTS = 2**20, 2**31 - 1
# With --times, and what doesn't go with it.
TIMED, NOT_TIMED = ("tokens", "batches"), ("every", "trials")
TOKENS, BATCHES, EVERY = (4096,), 8, 1


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "nodes",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="tokens that leave their node, by placement and plan",
        description=(
            "Place experts by the first batches of a trace, without and with a price on tokens\n"
            "that leave their node, and compare the LP's optimum and the least traffic between\n"
            "nodes, by linear programs on the host, on the following batches. The recorded\n"
            "sources are divided among the nodes in order.\n\n"
            "With --times it times Balancer.run of one rank with exact quotas on a GPU instead,\n"
            "without and with locality='node', on placements of chain without and with a price.\n"
            "Every plan is first held against the twin: a wrong one fails the command."
        ),
        examples=(
            "  lplb-bench nodes --ep 16,32,64 --ranks-per-node 8\n"
            "  lplb-bench nodes --trace trace.npz --ep 16 --ranks-per-node 4 --traffic-price 3\n"
            "  lplb-bench nodes --times --ep 16,32,64 --tokens 64,4096"
        ),
    )
    sub.add_argument("--trace", type=Path, metavar="PATH", help=f"{options.TRACE_HELP} (default)")
    options.add_ep(sub)
    options.add_slots(sub)
    sub.add_argument(
        "--ranks-per-node", type=options.count, default=8, metavar="N",
        help="ranks of a node (default %(default)s)",
    )  # fmt: skip
    add_traffic_price(sub)
    options.trace_options(sub)
    sub.add_argument(
        "--trials", type=options.count, metavar="N",
        help="effort of place (default: its own, 2000 on a CPU); not with --times",
    )  # fmt: skip
    sub.add_argument(
        "--every", type=options.count, metavar="N",
        help="judge by one in N test batches (default: by all); not with --times",
    )  # fmt: skip
    sub.add_argument(
        "--top-k", type=options.count, metavar="K",
        help="experts of a token (default: as recorded)",
    )  # fmt: skip
    sub.add_argument(
        "--times", action="store_true", default=None, help="time runs on a GPU; no comparison"
    )
    sub.add_argument(
        "--tokens", type=options.integers(1, MOST_TOKENS), metavar="N[,N...]",
        help=f"with --times: tokens of each rank, times top-k assignments (default {TOKENS[0]})",
    )  # fmt: skip
    sub.add_argument(
        "--batches", type=options.count, metavar="N",
        help=f"with --times: batches of each case, evenly spread (default {BATCHES})",
    )  # fmt: skip


def add_traffic_price(sub: argparse.ArgumentParser) -> None:
    """Add the price of `lplb_triton.chain` and `lplb_triton.place`."""

    def price(text: str) -> float:
        value = options.penalty(text)
        if value > MOST_TRAFFIC_PRICE:
            raise argparse.ArgumentTypeError(f"must be at most {MOST_TRAFFIC_PRICE:g}, got {text}")
        return value

    sub.add_argument(
        "--traffic-price", type=price, metavar="PRICE",
        help="tokens of load that a token sent to another node is worth (default 1)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Compare the placements."""
    tables.require("rich")
    if args.times:
        options.refuse(args, NOT_TIMED, "not with --times")
    else:
        options.refuse(args, TIMED, "only with --times")
    given = {"history": options.HISTORY, "every": EVERY, "tokens": TOKENS, "batches": BATCHES}
    options.fill(args, given)
    files = [("--json", args.json), ("--markdown", args.markdown)]
    output.check_files(files, [("--trace", args.trace)])
    trace, source = options.load_trace(args.trace)
    _check_sizes(args, trace)
    top_k = args.top_k or trace.meta.get("top_k")
    if not isinstance(top_k, int):
        raise UsageError("argument --top-k: needed, since the trace doesn't say it")
    if not 1 <= top_k <= trace.experts:
        raise UsageError(f"argument --top-k: a token has 1 to {trace.experts} experts, got {top_k}")
    try:
        cases = node_placements.split_cases(trace, args.history, args.layers, args.every)
    except ValueError as error:
        raise UsageError(f"arguments --trace, --history, --layers: {error}") from error
    if args.times:
        _check_assignments(args, top_k)
    begin = time.perf_counter()
    compute = _time_runs if args.times else _compare
    rows, device = compute(args, cases, top_k)
    report = {
        "command": "nodes",
        "source": source,
        "ranks_per_node": args.ranks_per_node,
        "traffic_price": args.traffic_price,
        "trials": args.trials,
        "every": args.every,
        "top_k": top_k,
        "times": bool(args.times),
        "environment": environment(device),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    make = tables.make_node_times_grid if args.times else tables.make_nodes_grid
    output.finish(args, out, report, [make(report)])
    return OK


def _compare(args: argparse.Namespace, cases: Cases, top_k: int) -> tuple[list[Row], str]:
    """Compare all methods by linear programs; returns rows, and the device they were made on."""
    names = [(f"EP {ep}, {slots} slots", len(cases)) for ep in args.ep for slots in args.slots]
    sizes = (args.ep, args.slots, args.ranks_per_node, top_k)
    with progress(names, args.progress) as advance:
        rows = node_placements.run(cases, *sizes, args.traffic_price, args.trials, advance)
    return rows, "cpu"


def _time_runs(args: argparse.Namespace, cases: Cases, top_k: int) -> tuple[list[Row], str]:
    """Time runs with and without near plans; returns rows, and the device they were made on."""
    device, timer = gpu.start(args)
    sizes = [(ep, slots) for ep in args.ep for slots in args.slots]
    steps = len(node_placements.TIMED) * len(args.tokens)
    rows = []
    with progress([(f"EP {ep}, {n} slots", steps) for ep, n in sizes], args.progress) as advance:
        for ep, slots in sizes:
            for method in node_placements.TIMED:
                for tokens in args.tokens:
                    sized = (ep, slots, args.ranks_per_node, args.traffic_price)
                    drawn = (tokens, top_k, args.batches)
                    row = near_times.time_cases(cases, method, sized, drawn, timer, device)
                    rows.append({"ep": ep, "slots": slots, **row})
                    advance()
    return rows, device.type


def _check_assignments(args: argparse.Namespace, top_k: int) -> None:
    """Raise a `UsageError` if a timed batch had more assignments than counts can hold."""
    most = max(args.ep) * max(args.tokens) * top_k
    if most > MOST_ASSIGNMENTS:
        raise UsageError(
            f"arguments --tokens, --ep: {most} assignments of all ranks, at most {MOST_ASSIGNMENTS}"
        )


def _check_sizes(args: argparse.Namespace, trace: Trace) -> None:
    """Raise a `UsageError` unless every number of ranks makes nodes that the sources fit."""
    for ep in args.ep:
        for slots in args.slots:
            reason = explain_impossible(trace.experts, ep, slots)
            if reason is None and args.times:
                reason = explain_near_limits(ep, trace.experts // ep + slots)
            if reason is not None:
                raise UsageError(f"arguments --ep, --slots: {reason}")
        if ep % args.ranks_per_node or ep == args.ranks_per_node:
            raise UsageError(
                f"argument --ranks-per-node: must divide {ep} ranks into several nodes, "
                f"got {args.ranks_per_node}"
            )
        nodes = ep // args.ranks_per_node
        if trace.sources % nodes:
            raise UsageError(
                f"argument --ep: the {trace.sources} recorded sources can't be divided among "
                f"{nodes} nodes"
            )
