"""``lplb-bench placement``."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lplb_triton.bench import options, output, placement, plots, tables
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output
from lplb_triton.bench.progress import progress

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "placement",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="EPLB's placement against those made for the LP",
        description=(
            "Place experts by the first batches of a trace, or of synthetic loads, by EPLB, by\n"
            "lplb_triton.chain and by lplb_triton.place, each also with every expert at home, and\n"
            "compare the LP's optimum, and its result in whole tokens, on the following batches;\n"
            "with the time that each takes, and the weights that a re-placement moves."
        ),
        examples=(
            "  lplb-bench placement --ep 8,16,32\n"
            "  lplb-bench placement --synthetic 256 --slots 1 --seeds 0-9\n"
            "  lplb-bench placement --trace trace.npz --ep 16 --layers 0,4-7 --png excess.png"
        ),
    )
    source = sub.add_mutually_exclusive_group()
    source.add_argument(
        "--trace", type=Path, metavar="PATH", help=f"{options.TRACE_HELP} (default)"
    )
    source.add_argument(
        "--synthetic", type=partial(options.count, most=options.MOST_EXPERTS), metavar="EXPERTS",
        help="lognormal(0, 1) loads with lognormal(0, 0.3) jitter instead of a trace",
    )  # fmt: skip
    sub.add_argument(
        "--seeds", type=options.layers, metavar="LIST",
        help="seeds of the synthetic loads, such as 0,2,4-7 (default 0-9)",
    )  # fmt: skip
    options.add_ep(sub)
    options.add_slots(sub)
    options.trace_options(sub)
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    sub.add_argument(
        "--trials", type=options.count, metavar="N",
        help="effort of place (default: its own, 2000 on a CPU)",
    )  # fmt: skip
    sub.add_argument(
        "--expert-bytes", type=options.count, metavar="N", default=placement.EXPERT_BYTES,
        help="bytes of one expert's weights (default %(default)s: DeepSeek-V3 in bfloat16)",
    )  # fmt: skip
    sub.add_argument(
        "--moves", type=options.penalty, metavar="PENALTY",
        help="count moves over drifting synthetic loads of 256 experts too, with this "
        "move_penalty, for the first of --slots",
    )  # fmt: skip
    sub.add_argument(
        "--published", type=Path, metavar="EPLB.PY",
        help="your copy of DeepSeek's eplb.py: time rebalance_experts against it and compare",
    )  # fmt: skip
    sub.add_argument("--png", type=Path, metavar="PATH", help="draw the excesses")


def run(args: argparse.Namespace, out: Output) -> int:
    """Compare the placements."""
    tables.require("rich")
    if args.png is not None:
        tables.require("matplotlib")
        if str(args.png) == "-":
            raise UsageError("argument --png: a picture can't be printed; give a path")
    if args.synthetic is None:
        options.refuse(args, ("seeds",), "only with --synthetic")
    else:
        options.refuse(args, ("history", "layers"), "not with --synthetic: they are for traces")
    options.fill(args, {"seeds": placement.SEEDS, "history": options.HISTORY})
    if args.moves is not None:
        options.check_divides(args.ep, placement.MOVES_EXPERTS)
    files = [("--json", args.json), ("--markdown", args.markdown), ("--png", args.png)]
    output.check_files(files, [("--trace", args.trace), ("--published", args.published)])
    device = torch.device(options.choose_device(args.device, None)[0])
    cases, source = _make_cases(args)
    possible, left_out = _find_combinations(args, cases[0].history.shape[1])
    begin = time.perf_counter()
    names = [(f"EP {ep}, {slots} slots", len(cases)) for ep, slots in possible]
    with progress(names, args.progress) as advance:
        rows = placement.run(cases, args.ep, args.slots, device, args.trials, advance)
    moves = []
    if args.moves is not None:
        common = (args.slots[0], args.moves, device, args.trials)
        moves = [placement.measure_moves(ep, *common) for ep in args.ep]
    published = None
    if args.published is not None:
        try:
            published = placement.time_published(args.published)
        except placement.PublishedError as error:
            raise UsageError(f"argument --published: {error}") from error
    report = {
        "command": "placement",
        "source": source,
        "trials": args.trials,
        "expert_bytes": args.expert_bytes,
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
        "left_out": left_out,
        "moves": moves,
        "published": published,
    }
    picture = None
    if args.png is not None:
        picture = output.Files()
        picture.add("picture", args.png, plots.placement_png(rows, title=source))
    output.finish(args, out, report, tables.make_placement_grids(report))
    if picture is not None:
        picture.close(out.console(args.json, args.markdown))
    return OK if published is None or published["same"] else FAILED


def _make_cases(args: argparse.Namespace) -> tuple[tuple[placement.Case, ...], str]:
    """Make the cases; return them with a description."""
    if args.synthetic is not None:
        return placement.synthetic_cases(args.synthetic, args.seeds), (
            f"{args.synthetic} experts, synthetic"
        )
    trace, source = options.load_trace(args.trace)
    try:
        return placement.trace_cases(trace, args.history, args.layers), source
    except (IndexError, ValueError) as error:
        raise UsageError(f"arguments --trace, --history, --layers: {error}") from error


def _find_combinations(
    args: argparse.Namespace, experts: int
) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
    """Find the combinations that can be laid out, and why the others can't."""
    possible: list[tuple[int, int]] = []
    left_out: list[dict[str, Any]] = []
    for ep in args.ep:
        for slots in args.slots:
            reason = placement.explain_impossible(experts, ep, slots)
            if reason is None:
                possible.append((ep, slots))
            else:
                left_out.append({"ep": ep, "slots": slots, "reason": reason})
    if not possible:
        reasons = "; ".join(dict.fromkeys(row["reason"] for row in left_out))
        raise UsageError(f"arguments --ep, --slots: {reasons}")
    return possible, left_out
