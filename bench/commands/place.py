"""``lplb-bench place``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lplb_triton import Placement, TimeCost, place
from lplb_triton._locality import explain_near_limits
from lplb_triton.bench import options, output, placement, tables
from lplb_triton.bench.balance import Stretch, find_stretches
from lplb_triton.bench.commands.nodes import add_traffic_price
from lplb_triton.bench.machine import environment
from lplb_triton.bench.near_plans import LocalityTwin
from lplb_triton.bench.node_placements import sum_sources
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.bench.progress import progress
from lplb_triton.placement.files import lay_out_placements
from lplb_triton.traces.trace import Trace

__all__ = ["add", "run"]

BASE = "eplb"
# Methods for ``objective="time"``.
BY_TIME = ("time", "home-time")
# Test batches whose traffic between nodes is measured, at most, evenly spread.
MOST_NEAR = 20


class _Loads(NamedTuple):
    """The batches of one layer that follow one another without a gap."""

    layer: int
    history: torch.Tensor
    """``[batches, experts]`` that the placement is made from."""
    test: torch.Tensor
    """``[batches, sources, experts]`` that it is judged by."""
    by_source: torch.Tensor
    """``[batches, sources, experts]``, the history by source."""


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "place",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="make placements from a trace, and save them in a file",
        description=(
            "Place the experts of every layer by the first batches of a trace, judge the\n"
            "placements by the batches that follow, beside EPLB's with as many slots, and write\n"
            "them to a file for lplb_triton.Placement.load or lplb_triton.load_placements. Of a\n"
            "trace with a gap in its steps the last part is used."
        ),
        examples=(
            "  lplb-bench place trace.npz --ep 32 --slots 2 -o placement.json\n"
            "  lplb-bench place packaged --ep 32 --slots 2 -o placement.json\n"
            "  lplb-bench place trace.npz --ep 32 --slots 2 --method home-chain -o placement.json\n"
            "  lplb-bench place trace.npz --ep 16 --slots 1 --layers 0,4-7 --all-batches -o p.json"
        ),
    )
    sub.add_argument("trace", type=Path, metavar="TRACE", help=options.TRACE_HELP)
    sub.add_argument(
        "--output", "-o", type=Path, required=True, metavar="PATH", help="file to write, .json"
    )
    sub.add_argument(
        "--ep", type=options.count, required=True, metavar="N", help="expert-parallel ranks"
    )
    sub.add_argument(
        "--slots", type=options.slots, required=True, metavar="N", help="redundant slots per rank"
    )
    sub.add_argument(
        "--method", choices=(*placement.METHODS, *BY_TIME), default="chain",
        help="how to place: EPLB, lplb_triton.chain or lplb_triton.place, time for plans by time; "
        "those with home leave experts at home and choose copies only (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--cost", type=Path, metavar="PATH",
        help="what a rank's products take, from lplb-bench calibrate; for time and home-time",
    )  # fmt: skip
    sub.add_argument(
        "--rows", type=options.count, metavar="N",
        help="tokens of a rank in a batch, times top-k; for time and home-time",
    )  # fmt: skip
    options.trace_options(sub)
    sub.add_argument(
        "--all-batches", action="store_true",
        help="write placements made from all batches of that part; the figures remain those of "
        "placements made from the first ones",
    )  # fmt: skip
    sub.add_argument(
        "--ranks-per-node", type=options.count, metavar="N",
        help="ranks of a node: tokens that leave their node have a price, for the methods of "
        "chain and place; the recorded sources are divided among the nodes in order",
    )  # fmt: skip
    add_traffic_price(sub)
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    sub.add_argument(
        "--trials", type=options.count, metavar="N",
        help="effort of place and home-place (default: its own, 2000 on a CPU)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Place, judge and save."""
    tables.require("rich")
    if not args.method.endswith("place"):
        options.refuse(args, ("trials",), "only for the methods place and home-place")
    _check_time_options(args)
    options.fill(args, {"history": options.HISTORY})
    if str(args.output) == "-":
        raise UsageError("argument --output: give a path, not -")
    files = ("--json", args.json), ("--markdown", args.markdown), ("--output", args.output)
    output.check_files(files, [("TRACE", args.trace), ("--cost", args.cost)])
    if args.output.suffix != ".json":
        raise UsageError(f"argument --output: must end in .json, got {str(args.output)!r}")
    device = torch.device(options.choose_device(args.device, None)[0])
    trace, source = options.load_trace(args.trace, "TRACE")
    reason = placement.explain_impossible(trace.experts, args.ep, args.slots)
    if reason is not None:
        if trace.experts % args.ep:
            reason += f"; {options.name_divisors(trace.experts)}"
        raise UsageError(f"arguments --ep, --slots: {reason}")
    _check_nodes(args, trace)
    stretch, layers = _cut_trace(args, trace, source)
    begin = time.perf_counter()
    made: dict[int, Placement] = {}
    rows = []
    with progress([(f"layer {loads.layer}", 1) for loads in layers], args.progress) as advance:
        for loads in layers:
            made[loads.layer], row = _place_layer(args, loads, device)
            rows.append(row)
            advance()
    first = int(trace.steps[stretch.start])
    last = int(trace.steps[(stretch.stop if args.all_batches else stretch.split) - 1])
    report = {
        "command": "place",
        "source": source,
        "method": args.method,
        "ep": args.ep,
        "slots": args.slots,
        "trials": args.trials,
        "ranks_per_node": args.ranks_per_node,
        "traffic_price": args.traffic_price,
        "rows_per_rank": args.rows,
        "all_batches": args.all_batches,
        "placed_by_steps": [first, last],
        "batches": {"history": stretch.split - stretch.start, "test": stretch.stop - stretch.split},
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    note = (
        f"{args.method} by steps {first} to {last} of {source}: {args.ep} ranks, {args.slots} "
        "redundant slots on each"
    )
    written = output.Files()
    written.add("placements", args.output, lay_out_placements(made, note=note))
    grids = [tables.make_place_grid(report)]
    if args.ranks_per_node is not None:
        grids.append(tables.make_place_traffic_grid(report))
    output.finish(args, out, report, grids)
    written.close(out.console(args.json, args.markdown))
    return OK


def _check_time_options(args: argparse.Namespace) -> None:
    """Refuse options of placements by time where there is none, and none where there is."""
    if args.method not in BY_TIME:
        options.refuse(args, ("cost", "rows"), f"only for the methods {' and '.join(BY_TIME)}")
    elif args.cost is None or args.rows is None:
        raise UsageError(f"argument --method: {args.method} needs --cost and --rows")


def _place(
    args: argparse.Namespace,
    method: str,
    history: torch.Tensor,
    by_source: torch.Tensor,
    device: torch.device,
) -> Placement:
    """Make a placement of a layer by a method, for nodes by the history by source."""
    if method not in BY_TIME:
        trials = args.trials if method.endswith("place") else None
        nodes = _choose_nodes(args) if method == args.method else None
        return placement.make_by_history(
            *(method, by_source if nodes else history, args.ep, args.slots, device, trials),
            nodes=nodes,
        )
    try:
        return place(
            history, args.ep, redundant_per_rank=args.slots, keep_home=method == "home-time",
            objective="time", cost=TimeCost.load(args.cost), rows_per_rank=args.rows,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --cost: {error}") from error


def _cut_trace(args: argparse.Namespace, trace: Trace, source: str) -> tuple[Stretch, list[_Loads]]:
    """Cut the layers' batches since the last gap into history and test."""
    layers = range(trace.layers) if args.layers is None else sorted(args.layers)
    if max(layers) >= trace.layers:
        raise UsageError(
            f"argument --layers: the trace has layers 0 to {trace.layers - 1}, got {max(layers)}"
        )
    options.check_batches(trace, source)
    try:
        stretch = find_stretches(trace.steps, args.history)[-1]
    except ValueError as error:
        raise UsageError(f"argument --history: {error}") from error
    found = []
    for layer in layers:
        test = torch.from_numpy(trace.counts[stretch.split : stretch.stop, layer]).long()
        if not bool(test.any()):
            raise UsageError(f"argument --history: no test batch of layer {layer} has tokens")
        by_source = torch.from_numpy(trace.counts[stretch.start : stretch.split, layer]).long()
        history = trace.loads(layer)[stretch.start : stretch.split]
        found.append(_Loads(layer, history, test, by_source))
    return stretch, found


def _place_layer(
    args: argparse.Namespace, loads: _Loads, device: torch.device
) -> tuple[Placement, dict[str, Any]]:
    """Return the placement to write, and the figures of its method and of EPLB's."""
    figures: dict[str, dict[str, float | None]] = {}
    chosen = None
    for method in dict.fromkeys((BASE, args.method)):
        chosen = _place(args, method, loads.history, loads.by_source, device)
        excess = placement.judge(chosen, loads.test, device)
        figures[method] = {name: 1 + value for name, value in excess.items()}
        if args.ranks_per_node is not None:
            figures[method] |= _measure_traffic(chosen, loads.test, args.ranks_per_node)
    if chosen is None or args.all_batches:
        everything = torch.cat([loads.history, loads.test.sum(1).double()])
        by_source = torch.cat([loads.by_source, loads.test])
        chosen = _place(args, args.method, everything, by_source, device)
    counts = loads.test.sum(1)
    in_order = Placement.from_phy2log(torch.arange(counts.shape[1]), args.ep).even_loads(counts)
    some = counts.sum(1) > 0
    ratio = in_order[some].amax(1) / in_order[some].mean(1)
    return chosen, {"layer": loads.layer, "in_order": float(ratio.mean()), "methods": figures}


def _measure_traffic(
    chosen: Placement, test: torch.Tensor, ranks_per_node: int
) -> dict[str, float | None]:
    """Measure what leaves its node by the LP's and the near plan of test batches, mean parts.

    A placement of one node has nothing that leaves. None for sizes that near plans don't take.
    """
    nodes = chosen.ep_size // ranks_per_node
    if nodes == 1:
        return {"far_by_lp": 0.0, "far": 0.0}
    if explain_near_limits(chosen.ep_size, chosen.slots_per_rank) is not None:
        return {"far_by_lp": None, "far": None}
    some = test[test.sum((1, 2)) > 0].numpy()
    at = np.unique(np.linspace(0, len(some) - 1, min(len(some), MOST_NEAR)).astype(np.int64))
    twin = LocalityTwin(chosen, ranks_per_node)
    judged = [twin.plan(counts) for counts in sum_sources(some[at], nodes)]
    return {
        "far_by_lp": float(np.mean([one.far_by_lp for one in judged])),
        "far": float(np.mean([one.far for one in judged])),
    }


def _choose_nodes(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the options of nodes for `chain` and `place`, or None without nodes."""
    if args.ranks_per_node is None:
        return None
    return {"ranks_per_node": args.ranks_per_node, "traffic_price": args.traffic_price}


def _check_nodes(args: argparse.Namespace, trace: Trace) -> None:
    """Raise a `UsageError` unless the ranks make nodes that the method and the sources fit."""
    if args.ranks_per_node is None:
        options.refuse(args, ("traffic_price",), "only with --ranks-per-node")
        return
    if args.method in ("eplb", "home", *BY_TIME):
        raise UsageError("argument --ranks-per-node: only for the methods of chain and place")
    if args.ep % args.ranks_per_node:
        raise UsageError(f"argument --ranks-per-node: must divide the {args.ep} ranks")
    nodes = args.ep // args.ranks_per_node
    if trace.sources % nodes:
        raise UsageError(
            f"argument --ranks-per-node: the trace's {trace.sources} sources can't be divided "
            f"among {nodes} nodes"
        )
