"""``lplb-bench nodes``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from lplb_triton.bench import node_placements, options, output, tables
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.bench.placement import explain_impossible
from lplb_triton.bench.progress import progress
from lplb_triton.placement.nodes import MOST_TRAFFIC_PRICE
from lplb_triton.traces.trace import Trace

__all__ = ["add", "add_traffic_price", "run"]


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
            "sources are divided among the nodes in order."
        ),
        examples=(
            "  lplb-bench nodes --ep 16,32,64 --ranks-per-node 8\n"
            "  lplb-bench nodes --trace trace.npz --ep 16 --ranks-per-node 4 --traffic-price 3"
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
        help="effort of place (default: its own, 2000 on a CPU)",
    )  # fmt: skip
    sub.add_argument(
        "--every", type=options.count, default=1, metavar="N",
        help="judge by one in N test batches (default: by all)",
    )  # fmt: skip
    sub.add_argument(
        "--top-k", type=options.count, metavar="K",
        help="experts of a token (default: as recorded)",
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
    options.fill(args, {"history": options.HISTORY})
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
    begin = time.perf_counter()
    names = [(f"EP {ep}, {slots} slots", len(cases)) for ep in args.ep for slots in args.slots]
    sizes = (args.ep, args.slots, args.ranks_per_node, top_k)
    with progress(names, args.progress) as advance:
        rows = node_placements.run(cases, *sizes, args.traffic_price, args.trials, advance)
    report = {
        "command": "nodes",
        "source": source,
        "ranks_per_node": args.ranks_per_node,
        "traffic_price": args.traffic_price,
        "trials": args.trials,
        "every": args.every,
        "top_k": top_k,
        "environment": environment("cpu"),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    output.finish(args, out, report, [tables.make_nodes_grid(report)])
    return OK


def _check_sizes(args: argparse.Namespace, trace: Trace) -> None:
    """Raise a `UsageError` unless every number of ranks makes nodes that the sources fit."""
    for ep in args.ep:
        for slots in args.slots:
            reason = explain_impossible(trace.experts, ep, slots)
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
