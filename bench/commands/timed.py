"""``lplb-bench solve``, ``pipeline`` and ``simulate``: times on a GPU."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from typing import Any

import torch

from lplb_triton.bench import options, output, simulate, tables, timing
from lplb_triton.bench import trace as traces
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, say
from lplb_triton.bench.progress import progress
from lplb_triton.solver import DEFAULT_TOLERANCE

__all__ = ["add", "check_gpu", "pipeline", "simulation", "solve", "start"]

# Of each load family, and of each stretch of the trace.
MOST_INSTANCES = 10**5
# Of the experts of a simulation: wider ones fill no GPU's memory twice.
MOST_WIDTH = 2**17


def add(commands: Any) -> None:
    """Add the three parsers."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--tolerance", type=options.tolerance, default=DEFAULT_TOLERANCE, metavar="GAP",
        help="certified relative gap asked of every LP (default %(default)g)",
    )  # fmt: skip
    parents = (common, options.output_files(), options.progress_option())
    _add_solve(commands, parents)
    _add_pipeline(commands, parents)
    _add_simulate(commands, parents)


def _add_solve(commands: Any, parents: tuple[argparse.ArgumentParser, ...]) -> None:
    sub = options.add_command(
        commands,
        "solve",
        solve,
        parents=parents,
        help="times of the solve kernel and of its peers on a GPU",
        description=(
            "Time the LP, from counts by expert to a certified plan, by CUDA-graph replay, on\n"
            "instances of six load families. Every plan is held against HiGHS first. Peers, on\n"
            "shapes with two copies per expert: primal affine scaling, coloured edge balancing,\n"
            "and DeepSeek's LPLB if it is installed."
        ),
        examples=(
            "  lplb-bench solve --shapes cube,eplb:32:2 --json solve.json\n"
            "  lplb-bench solve --no-peers --shapes chain:32:1 --markdown -"
        ),
    )
    sub.add_argument(
        "--shapes", type=options.shapes, default=timing.SOLVE_SHAPES, metavar="NAME[,NAME...]",
        help=f"default {','.join(timing.SOLVE_SHAPES)}",
    )  # fmt: skip
    sub.add_argument(
        "--per-family", type=partial(options.count, most=MOST_INSTANCES), default=34, metavar="N",
        help="instances of each of the six load families (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True,
        help="time the peers too (default)",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=options.seed, default=timing.SEED, metavar="N",
        help="default %(default)s, that of the published figures",
    )  # fmt: skip


def _add_pipeline(commands: Any, parents: tuple[argparse.ArgumentParser, ...]) -> None:
    sub = options.add_command(
        commands,
        "pipeline",
        pipeline,
        parents=parents,
        help="times of the whole run on a GPU",
        description=(
            "Time Balancer.run and its parts by CUDA-graph replay, for 256 experts and top-8\n"
            "routing, without load sync; the host's time of an eager call, its allocations, and\n"
            "the first call of a fresh process."
        ),
        examples=(
            "  lplb-bench pipeline --markdown -\n"
            "  lplb-bench pipeline --shapes eplb:32:2 --tokens 128,4096 --no-first-call"
        ),
    )
    sub.add_argument(
        "--shapes", type=partial(options.shapes, make=timing.pipeline_placement),
        default=timing.PIPELINE_SHAPES, metavar="NAME[,NAME...]",
        help=f"default {','.join(timing.PIPELINE_SHAPES)}",
    )  # fmt: skip
    sub.add_argument(
        "--tokens", type=options.integers(1), default=timing.PIPELINE_TOKENS, metavar="N[,N...]",
        help=f"tokens of a batch (default {','.join(map(str, timing.PIPELINE_TOKENS))})",
    )  # fmt: skip
    sub.add_argument(
        "--first-call", action=argparse.BooleanOptionalAction, default=True,
        help="time the first call in fresh processes too (default)",
    )  # fmt: skip


def _add_simulate(commands: Any, parents: tuple[argparse.ArgumentParser, ...]) -> None:
    sub = options.add_command(
        commands,
        "simulate",
        simulation,
        parents=parents,
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
            f"--{name}", type=partial(options.count, most=MOST_WIDTH), default=default,
            metavar="N", help=f"{text} (default %(default)s)",
        )  # fmt: skip
    sub.add_argument(
        "--batches", type=partial(options.count, most=MOST_INSTANCES), default=1, metavar="N",
        help="test batches of each layer in each stretch of the trace (default %(default)s)",
    )  # fmt: skip


def solve(args: argparse.Namespace, out: Output) -> int:
    """Time the solve kernel and its peers."""
    device, timer = start(args)
    begin = time.perf_counter()
    rows, peers, groups = [], [], None
    names = [(shape, 6 * args.per_family + args.peers) for shape in args.shapes]
    with progress([*names, ("groups of cube", 1)], args.progress) as advance:
        for shape in args.shapes:
            workload = timing.draw_workload(shape, args.per_family, args.seed)
            common = {"tolerance": args.tolerance, "progress": advance}
            rows.append(timing.solve_row(workload, timer, device, **common))
            if args.peers:
                peers.append(timing.peer_row(workload, timer, device, **common))
        if "cube" in args.shapes:
            groups = timing.groups_row(
                timer,
                device,
                tolerance=args.tolerance,
                per_family=min(args.per_family, 5),
                seed=args.seed,
            )
        advance()
    report = {
        "command": "solve",
        "options": {
            "shapes": list(args.shapes),
            "per_family": args.per_family,
            "families": list(timing.PUBLISHED_FAMILIES),
            "seed": args.seed,
            "tolerance": args.tolerance,
            "peers": args.peers,
        },
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
        "groups": groups,
        "peers": peers if args.peers else None,
    }
    output.finish(args, out, report, tables.solve_grids(report))
    return OK


def pipeline(args: argparse.Namespace, out: Output) -> int:
    """Time the whole run."""
    device, timer = start(args)
    begin = time.perf_counter()
    rows, first_calls = [], []
    bandwidth = timing.copy_bandwidth(timer, device)
    names = [(shape, len(args.tokens) + args.first_call) for shape in args.shapes]
    with progress(names, args.progress) as advance:
        for shape in args.shapes:
            for tokens in args.tokens:
                rows.append(
                    timing.pipeline_row(
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
                first_calls.append(timing.first_call_row(shape))
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
        "rows": rows,
        "first_calls": first_calls,
    }
    output.finish(args, out, report, tables.pipeline_grids(report))
    wrong = [row for row in rows if row["allocations_per_call"] not in (None, 1)]
    for row in wrong:
        say(
            f"{row['shape']}, {row['tokens']} tokens: run allocates "
            f"{row['allocations_per_call']:g} times per call, expected once"
        )
    return FAILED if wrong else OK


def simulation(args: argparse.Namespace, out: Output) -> int:
    """Time the expert products of every rank."""
    _check_files(args)
    trace = traces.packaged()
    options.check_divides(args.ep, trace.experts)
    for ep in args.ep:
        most = trace.experts - trace.experts // ep
        if max(args.slots) > most:
            raise UsageError(f"argument --slots: expected at most {most} on {ep} ranks")
    device, timer = start(args)
    begin = time.perf_counter()
    sizes = {name: getattr(args, name) for name in ("tokens", "hidden", "inner")}
    steps = len(simulate.chosen_batches(trace, args.batches))
    pairs = [(ep, slots) for ep in args.ep for slots in args.slots]
    names = [(f"EP {ep}, {slots} slots", steps) for ep, slots in pairs]
    with progress(names, args.progress) as advance:
        try:
            rows = [
                simulate.simulate_row(
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
    output.finish(args, out, report, tables.simulate_grids(report))
    return OK


def start(args: argparse.Namespace) -> tuple[torch.device, timing.Timer]:
    """Refuse what can be refused before the work starts, and make the timer."""
    tables.require("rich")
    _check_files(args)
    check_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    return device, timing.GraphTimer(device)


def _check_files(args: argparse.Namespace) -> None:
    output.check_files([("--json", args.json), ("--markdown", args.markdown)])


def check_gpu() -> None:
    """Refuse to time kernels where that says nothing."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError(
            "TRITON_INTERPRET is set: kernels would run in Triton's interpreter, whose times say "
            "nothing; unset it"
        )
    if not torch.cuda.is_available():
        raise UsageError("kernels can only be timed on a GPU, but torch finds none")
