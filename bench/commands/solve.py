"""`lplb-bench solve`."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lplb_triton.bench import options, output, tables
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.machine import environment
from lplb_triton.bench.measure import cases as traffic_cases
from lplb_triton.bench.measure import loads as traffic_loads
from lplb_triton.bench.measure import preparation, traffic
from lplb_triton.bench.measure.compare import time_peers
from lplb_triton.bench.measure.solve import time_groups, time_solve
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.measure.workload import PUBLISHED_FAMILIES, SEED, SOLVE_SHAPES, draw_workload
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, say
from lplb_triton.bench.progress import progress
from lplb_triton.bench.types import Row

__all__ = [
    "MOST_INSTANCES",
    "add",
]


# Limit on instances of a load family, and on batches of a stretch of the trace.
MOST_INSTANCES = 10**5

# Limit on the processes that prepare cases.
MOST_PROCESSES = 1024

# Defaults of the options of `solve`, by what they apply to.
FAMILY_DEFAULTS = {"shapes": SOLVE_SHAPES, "per_family": 34, "peers": True}

CASE_DEFAULTS = {"ep": options.EP, "placement": ("eplb",), "slots": options.SLOTS}

TRAFFIC_OPTIONS = (
    *("trace", *CASE_DEFAULTS, "experts"),
    *("batches", "trials", "processes", "drawn"),
)


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "solve",
        run,
        parents=gpu.timing_parents(),
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
        "--seed", type=options.seed, default=SEED, metavar="N",
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
        help=f"default {','.join(SOLVE_SHAPES)}",
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
        "Without --ep, --placement, --slots and --experts: "
        f"{len(traffic_cases.CASES)} chosen cases of 8 to 256 ranks. With any of them: "
        "all combinations.",
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
        "--experts", type=options.integers(1, options.MOST_EXPERTS), metavar="N[,N...]",
        help="numbers of experts (default: those of every --trace, and 256, or 288 for 72, 96 and "
        "144 ranks); a trace is timed where the number is its own",
    )  # fmt: skip
    options.add_ep(group, None)
    options.add_placement(group)
    options.add_slots(group, 1, None)
    group.add_argument(
        "--batches", type=partial(options.count, most=MOST_INSTANCES), metavar="N",
        help="batches of each draw, and of each layer of a trace at most, evenly spread (default: "
        f"{traffic_loads.BATCHES} of a draw, all of the second half of a trace)",
    )  # fmt: skip
    group.add_argument(
        "--trials", type=options.count, metavar="N",
        help=f"effort of place (default {traffic_cases.TRIALS})",
    )  # fmt: skip
    group.add_argument(
        "--processes", type=partial(options.count, most=MOST_PROCESSES), metavar="N",
        help="processes that place and run HiGHS, before anything is timed (default: one for each "
        "core)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
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
    device, timer = gpu.start(args)
    begin = time.perf_counter()
    measured = None if plan is None else _time_traffic(args, plan, device, timer)
    rows, peers, groups = _time_families(args, device, timer) if args.families else ([], [], None)
    report = {
        "command": "solve",
        "options": {
            "shapes": list(args.shapes),
            "per_family": args.per_family,
            "families": list(PUBLISHED_FAMILIES) if args.families else [],
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
    output.finish(args, out, report, tables.make_solve_grids(report))
    bad = 0 if measured is None else sum(row["uncertified"] for row in measured["rows"])
    if bad:
        say(f"{bad} batches were not certified within {args.tolerance:g}")
    return FAILED if bad else OK


def _time_families(
    args: argparse.Namespace, device: torch.device, timer: Timer
) -> tuple[list[Row], list[Row], Row | None]:
    """Return the rows of the shapes, those of their peers, and that of groups."""
    rows, peers, groups = [], [], None
    names = [(shape, 6 * args.per_family + args.peers) for shape in args.shapes]
    with progress([*names, ("groups of cube", 1)], args.progress) as advance:
        for shape in args.shapes:
            workload = draw_workload(shape, args.per_family, args.seed)
            common = {"tolerance": args.tolerance, "progress": advance}
            rows.append(time_solve(workload, timer, device, **common))
            if args.peers:
                peers.append(time_peers(workload, timer, device, **common))
        if "cube" in args.shapes:
            groups = time_groups(
                timer,
                device,
                tolerance=args.tolerance,
                per_family=min(args.per_family, 5),
                seed=args.seed,
            )
        advance()
    return rows, peers, groups


class _Traffic(NamedTuple):
    """Load sets of real traffic to time, and cases that are left out."""

    jobs: list[tuple[traffic_cases.Case, traffic_loads.Loads]]
    left_out: list[tuple[traffic_cases.Case, str]]


def _plan_traffic(args: argparse.Namespace) -> _Traffic:
    """Load traces, draw loads, and choose the cases that they are placed for."""
    paths: list[Path | None] = [None, *(args.trace or ())]
    known: dict[str, list[traffic_loads.Loads]] = {}
    for path in paths:
        trace, source = options.load_trace(path)
        if source in known:
            raise UsageError(f"argument --trace: two files are named {source}")
        try:
            known[source] = traffic_loads.split_trace(trace, source, args.batches)
        except ValueError as error:
            raise UsageError(f"argument --trace: {error}") from error
    found = [each for loads in known.values() for each in loads]
    # Experts of the given traces; the packaged one is used by the cases that have as many experts.
    own = list(dict.fromkeys(loads[0].experts for loads in list(known.values())[1:]))
    cases, left_out = _choose_cases(args, own)
    if args.drawn is not False:
        n_batches = args.batches or traffic_loads.BATCHES
        for experts in dict.fromkeys(case.experts for case in cases):
            found += traffic_loads.draw_load_sets(experts, n_batches, args.seed)
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


def _choose_cases(
    args: argparse.Namespace, own: list[int]
) -> tuple[list[traffic_cases.Case], list[tuple[traffic_cases.Case, str]]]:
    """Choose the cases to time; return also those that were asked for but can't be placed."""
    if not options.given(args, (*CASE_DEFAULTS, "experts")):
        shapes = dict.fromkeys(
            (case.ep, case.placement, case.slots) for case in traffic_cases.CASES
        )
        more = [traffic_cases.Case(n, *shape) for n in own for shape in shapes]
        return list(
            dict.fromkeys(
                [
                    *traffic_cases.CASES,
                    *(case for case in more if case.explain_impossible() is None),
                ]
            )
        ), []
    options.fill(args, CASE_DEFAULTS)
    if "none" in args.placement:
        raise UsageError("argument --placement: none has no copies, so there is nothing to solve")
    sizes = (args.ep, args.placement, args.slots)
    cases, left_out = traffic_cases.combine_sizes(args.experts, *sizes)
    if args.experts is None:
        also, _ = traffic_cases.combine_sizes(own, *sizes)
        cases = list(dict.fromkeys([*cases, *also]))
    if not cases:
        reasons = "; ".join(dict.fromkeys(reason for _, reason in left_out))
        raise UsageError(f"arguments --ep, --placement, --slots, --experts: {reasons}")
    return cases, left_out


def _time_traffic(
    args: argparse.Namespace, plan: _Traffic, device: torch.device, timer: Timer
) -> dict[str, Any]:
    """Check everything before timing anything, so that nothing else uses the cores then."""
    steps = Counter(str(case) for case, _ in plan.jobs)
    names = [(f"{what} {name}", n) for what in ("check", "time") for name, n in steps.items()]
    trials, processes = (
        args.trials or traffic_cases.TRIALS,
        args.processes or preparation.count_cores(),
    )
    seconds = dict.fromkeys(("wait", "check", "time"), 0.0)
    checked: list[traffic.Checked] = []
    rows = []
    with progress(names, args.progress) as advance:
        with preparation.prepare_all(plan.jobs, trials, processes) as prepared:
            for _ in plan.jobs:
                begin = time.perf_counter()
                one = next(prepared)
                middle = time.perf_counter()
                try:
                    checked.append(traffic.check_plans(one, device, args.tolerance))
                except ValueError as error:
                    raise UsageError(f"{one.case}: {error}") from error
                seconds["wait"] += middle - begin
                seconds["check"] += time.perf_counter() - middle
                advance()
        begin = time.perf_counter()
        for each in checked:
            rows.append(traffic.time_solves(each, timer))
            advance()
        seconds["time"] = time.perf_counter() - begin
    return {
        "most": args.batches,
        "trials": trials,
        "seconds": seconds,
        "left_out": [{"case": str(case), "reason": reason} for case, reason in plan.left_out],
        "pooled": traffic.pool_rows(rows),
        "rows": rows,
    }
