"""``lplb-bench solve``, ``pipeline`` and ``simulate``: times on a GPU."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lplb_triton.bench import options, output, simulate, tables, timing, traffic
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, say
from lplb_triton.bench.progress import progress
from lplb_triton.solver import DEFAULT_TOLERANCE
from lplb_triton.traces import trace as traces

__all__ = ["add", "check_gpu", "pipeline", "simulation", "solve", "start"]

# Of each load family, and of each stretch of the trace.
MOST_INSTANCES = 10**5
# Of the experts of a case of real traffic.
MOST_EXPERTS = 2**14
# Of the processes that prepare cases.
MOST_PROCESSES = 1024
# What `solve` takes where nothing is said, by what it is for.
FAMILY_DEFAULTS = {"shapes": timing.SOLVE_SHAPES, "per_family": 34, "peers": True}
CASE_DEFAULTS = {"ep": options.EP, "placement": ("eplb",), "slots": options.SLOTS}
TRAFFIC_OPTIONS = (
    *("trace", *CASE_DEFAULTS, "experts"),
    *("batches", "trials", "processes", "drawn"),
)
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
            "Time the LP, from counts by expert to a certified plan, by CUDA-graph replay. First\n"
            "on real traffic: every batch of recorded traces, and of seeded draws whose loads\n"
            "jitter, rotate and burst, under placements made from their history. Then on\n"
            "instances of six load families. Every plan is held against HiGHS first. Peers, on\n"
            "shapes with two copies per expert: primal affine scaling, coloured edge balancing,\n"
            "and DeepSeek's LPLB if it is installed."
        ),
        examples=(
            "  lplb-bench solve --json solve.json\n"
            "  lplb-bench solve --no-families --ep 32,64 --placement eplb,chain --slots 1,2\n"
            "  lplb-bench solve --no-families --trace trace.npz --no-drawn --ep 16\n"
            "  lplb-bench solve --no-traffic --shapes cube,eplb:32:2 --no-peers --markdown -"
        ),
    )
    sub.add_argument(
        "--seed", type=options.seed, default=timing.SEED, metavar="N",
        help="default %(default)s, that of the published figures",
    )  # fmt: skip
    _add_traffic(sub)
    group = sub.add_argument_group("the six load families")
    group.add_argument(
        "--families", action=argparse.BooleanOptionalAction, default=True,
        help="time the six load families too (default)",
    )  # fmt: skip
    group.add_argument(
        "--shapes", type=options.shapes, metavar="NAME[,NAME...]",
        help=f"default {','.join(timing.SOLVE_SHAPES)}",
    )  # fmt: skip
    group.add_argument(
        "--per-family", type=partial(options.count, most=MOST_INSTANCES), metavar="N",
        help=f"instances of each load family (default {FAMILY_DEFAULTS['per_family']})",
    )  # fmt: skip
    group.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=None,
        help="time the peers too (default)",
    )  # fmt: skip


def _add_traffic(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "real traffic",
        f"Without --ep, --placement, --slots and --experts: {len(traffic.CASES)} chosen cases of "
        "8 to 256 ranks. With any of them: all combinations.",
    )
    group.add_argument(
        "--traffic", action=argparse.BooleanOptionalAction, default=True,
        help="time real traffic (default)",
    )  # fmt: skip
    group.add_argument(
        "--trace", type=Path, action="append", metavar="PATH",
        help=".npz or .json, besides the packaged trace; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--drawn", action=argparse.BooleanOptionalAction, default=None,
        help="time seeded draws too, not only traces (default)",
    )  # fmt: skip
    group.add_argument(
        "--experts", type=options.integers(1, MOST_EXPERTS), metavar="N[,N...]",
        help="numbers of experts (default: those of every --trace, and 256, or 288 for 72, 96 and "
        "144 ranks); a trace is timed where the number is its own",
    )  # fmt: skip
    options.add_ep(group, None)
    options.add_placement(group)
    options.add_slots(group, 1, None)
    group.add_argument(
        "--batches", type=partial(options.count, most=MOST_INSTANCES), metavar="N",
        help="batches of each draw, and of each layer of a trace at most, evenly spread (default: "
        f"{traffic.BATCHES} of a draw, all of the second half of a trace)",
    )  # fmt: skip
    group.add_argument(
        "--trials", type=options.count, metavar="N",
        help=f"effort of place (default {traffic.TRIALS})",
    )  # fmt: skip
    group.add_argument(
        "--processes", type=partial(options.count, most=MOST_PROCESSES), metavar="N",
        help="processes that place and run HiGHS, before anything is timed (default: one for each "
        "core)",
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
        "--shapes", type=partial(options.shapes, make=timing.pipeline_placement),
        default=timing.PIPELINE_SHAPES, metavar="NAME[,NAME...]",
        help=f"default {','.join(timing.PIPELINE_SHAPES)}",
    )  # fmt: skip
    sub.add_argument(
        "--tokens", type=options.integers(1), default=timing.PIPELINE_TOKENS, metavar="N[,N...]",
        help=f"tokens of a batch (default {','.join(map(str, timing.PIPELINE_TOKENS))})",
    )  # fmt: skip
    sub.add_argument(
        "--traffic", action=argparse.BooleanOptionalAction, default=True,
        help="time the packaged trace too (default)",
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
    """Time the solve kernel on real traffic, then on the load families beside its peers."""
    if not args.families:
        if not args.traffic:
            raise UsageError("arguments --no-traffic, --no-families: nothing is left to time")
        options.refuse(args, FAMILY_DEFAULTS, "not with --no-families")
    if not args.traffic:
        options.refuse(args, TRAFFIC_OPTIONS, "not with --no-traffic")
    options.fill(args, FAMILY_DEFAULTS)
    output.check_files(
        [("--json", args.json), ("--markdown", args.markdown)],
        [("--trace", path) for path in args.trace or ()],
    )
    plan = _plan_traffic(args) if args.traffic else None
    device, timer = start(args)
    begin = time.perf_counter()
    measured = None if plan is None else _time_traffic(args, plan, device, timer)
    rows, peers, groups = _time_families(args, device, timer) if args.families else ([], [], None)
    report = {
        "command": "solve",
        "options": {
            "shapes": list(args.shapes),
            "per_family": args.per_family,
            "families": list(timing.PUBLISHED_FAMILIES) if args.families else [],
            "seed": args.seed,
            "tolerance": args.tolerance,
            "peers": args.peers,
        },
        "environment": environment(device.type),
        "seconds": time.perf_counter() - begin,
        "traffic": measured,
        "rows": rows,
        "groups": groups,
        "peers": peers if args.peers and args.families else None,
    }
    output.finish(args, out, report, tables.solve_grids(report))
    bad = 0 if measured is None else sum(row["uncertified"] for row in measured["rows"])
    if bad:
        say(f"{bad} batches were not certified within {args.tolerance:g}")
    return FAILED if bad else OK


def _time_families(
    args: argparse.Namespace, device: torch.device, timer: timing.Timer
) -> tuple[list[timing.Row], list[timing.Row], timing.Row | None]:
    """Return the rows of the shapes, those of their peers, and that of groups."""
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
    return rows, peers, groups


class _Traffic(NamedTuple):
    """What of real traffic to time."""

    jobs: list[tuple[traffic.Case, traffic.Loads]]
    left_out: list[tuple[traffic.Case, str]]


def _plan_traffic(args: argparse.Namespace) -> _Traffic:
    """Load traces, draw loads, and choose the cases that they are placed for."""
    paths: list[Path | None] = [None, *(args.trace or ())]
    known: dict[str, list[traffic.Loads]] = {}
    for path in paths:
        trace, source = options.load_trace(path)
        if source in known:
            raise UsageError(f"argument --trace: two files are named {source}")
        try:
            known[source] = traffic.recorded(trace, source, args.batches)
        except ValueError as error:
            raise UsageError(f"argument --trace: {error}") from error
    found = [each for loads in known.values() for each in loads]
    # Of traces that were asked for; the packaged one comes where its number of experts does.
    own = list(dict.fromkeys(loads[0].experts for loads in list(known.values())[1:]))
    cases, left_out = _cases(args, own)
    if args.drawn is not False:
        n_batches = args.batches or traffic.BATCHES
        for experts in dict.fromkeys(case.experts for case in cases):
            found += traffic.drawn(experts, n_batches, args.seed)
    jobs = [(case, each) for case in cases for each in found if each.experts == case.experts]
    for source, loads in list(known.items())[1:]:
        if not any(each in loads for _, each in jobs):
            raise UsageError(
                f"argument --trace: none of the cases has the {loads[0].experts} experts of "
                f"{source}"
            )
    if not jobs:
        raise UsageError("argument --no-drawn: none of the cases has the experts of a trace")
    return _Traffic(jobs, left_out)


def _cases(
    args: argparse.Namespace, own: list[int]
) -> tuple[list[traffic.Case], list[tuple[traffic.Case, str]]]:
    """Cases to time, and those that were asked for but can't be placed."""
    if not options.given(args, (*CASE_DEFAULTS, "experts")):
        shapes = dict.fromkeys((case.ep, case.placement, case.slots) for case in traffic.CASES)
        more = [traffic.Case(n, *shape) for n in own for shape in shapes]
        return list(
            dict.fromkeys([*traffic.CASES, *(case for case in more if case.refusal() is None)])
        ), []
    options.fill(args, CASE_DEFAULTS)
    if "none" in args.placement:
        raise UsageError("argument --placement: none has no copies, so there is nothing to solve")
    sizes = (args.ep, args.placement, args.slots)
    cases, left_out = traffic.product(args.experts, *sizes)
    if args.experts is None:
        also, _ = traffic.product(own, *sizes)
        cases = list(dict.fromkeys([*cases, *also]))
    if not cases:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in left_out))
        raise UsageError(f"arguments --ep, --placement, --slots, --experts: {reasons}")
    return cases, left_out


def _time_traffic(
    args: argparse.Namespace, plan: _Traffic, device: torch.device, timer: timing.Timer
) -> dict[str, Any]:
    """Check everything, then time it, so that nothing else wants the cores meanwhile."""
    steps = Counter(str(case) for case, _ in plan.jobs)
    names = [(f"{what} {name}", n) for what in ("check", "time") for name, n in steps.items()]
    trials, processes = args.trials or traffic.TRIALS, args.processes or traffic.cores()
    seconds = dict.fromkeys(("wait", "check", "time"), 0.0)
    checked: list[traffic.Checked] = []
    rows = []
    with progress(names, args.progress) as advance:
        with traffic.preparations(plan.jobs, trials, processes) as prepared:
            for _ in plan.jobs:
                begin = time.perf_counter()
                one = next(prepared)
                middle = time.perf_counter()
                try:
                    checked.append(traffic.check(one, device, args.tolerance))
                except ValueError as error:
                    raise UsageError(f"{one.case}: {error}") from error
                seconds["wait"] += middle - begin
                seconds["check"] += time.perf_counter() - middle
                advance()
        begin = time.perf_counter()
        for each in checked:
            rows.append(traffic.row(each, timer))
            advance()
        seconds["time"] = time.perf_counter() - begin
    return {
        "most": args.batches,
        "trials": trials,
        "seconds": seconds,
        "left_out": [{"case": str(case), "reason": reason} for case, reason in plan.left_out],
        "pooled": traffic.pooled(rows),
        "rows": rows,
    }


def pipeline(args: argparse.Namespace, out: Output) -> int:
    """Time the whole run."""
    device, timer = start(args)
    begin = time.perf_counter()
    rows, first_calls = [], []
    bandwidth = timing.copy_bandwidth(timer, device)
    names = [(shape, len(args.tokens) + args.first_call) for shape in args.shapes]
    cases = traffic.RUN_CASES if args.traffic else ()
    measured = None
    with progress([*((str(case), 1) for case in cases), *names], args.progress) as advance:
        if cases:
            measured = _time_runs(args, cases, device, timer, advance)
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
        "traffic": measured,
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
    bad = 0 if measured is None else sum(row["uncertified"] for row in measured["rows"])
    if bad:
        say(f"{bad} batches were not certified within {args.tolerance:g}")
    return FAILED if wrong or bad else OK


def _time_runs(
    args: argparse.Namespace,
    cases: Sequence[traffic.Case],
    device: torch.device,
    timer: timing.Timer,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Check the packaged trace's batches, and time the whole run and the solve on each."""
    trace, source = options.load_trace(None)
    loads = traffic.recorded(trace, source, traffic.RUN_BATCHES)
    rows, solved = [], []
    for case in cases:
        for each in loads:
            checked = traffic.check(traffic.prepare(case, each), device, args.tolerance)
            rows.append(traffic.run_row(checked, timer, timing.SEED))
            solved.append(traffic.row(checked, timer))
        advance()
    return {
        "tokens": trace.totals()[0, 0].sum().item() // traffic.TOP_K,
        "pooled": traffic.pooled(rows),
        "solve": traffic.pooled(solved),
        "rows": rows,
    }


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
