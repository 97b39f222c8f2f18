"""``lplb-bench live``."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lplb_triton.bench import live, options, output, tables, workloads
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output, say
from lplb_triton.bench.progress import progress
from lplb_triton.bench.types import Row
from lplb_triton.live import MOST_ABOVE
from lplb_triton.placement.arguments import MOST_LIVE

__all__ = ["add", "run"]

MOST_BATCHES, MOST_DOMAIN = 10**4, 2**12
# Counts of so many tokens' ids are exact in float32, in which plans are compared.
MOST_TOKENS = 2**20
EXPERTS, SEED, ABOVE, TOKENS = 256, 0, 1.02, 4096
NO_WORKLOADS = "none"
# The adversarial workload is searched for one placement, and here there are several.
WORKLOADS = tuple(name for name in workloads.WORKLOADS if name != workloads.ADVERSARIAL)

_DESCRIPTION = """\
Compare live slots, which are filled for one batch, with static placements under the LP and with
UltraEP's planner (written anew here), which chooses all replicas anew for each batch. By the twin
of the plan in numpy, on the CPU, in whole tokens.

Columns of the first table, mean, p95 and max over the batches of the largest over the mean load:
  none     experts in order, as many on each rank, no copies
  EPLB:1   EPLB by the history with one redundant slot a rank, and the LP of each batch
  EPLB     the same with as many slots as the base placement and the live slots together
  chain    lplb_triton.chain with as many slots, and the LP
  UltraEP  UltraEP's planner with as many slots as live ones, every expert at home
  base     the base placement and its LP, without live slots
  live     the base placement, its LP, and live slots where the LP leaves too much
Columns of the second, of UltraEP's planner (U) and of live slots (L):
  pieces   experts fetched, mean per rank and batch
  fetch    part of the batches that fetch any
  leave    copies that leave the busiest home rank, mean/max over the batches
  bound    a largest load that no plan of live slots beats, over the mean load
  gap      relative distance of live from the bound, mean
The last table holds figures against targets that live slots are to reach, as far as this run has
them. Fails only if a plan is wrong: tokens lost, worse than the LP, an expert on a rank twice.

With --times it times on a GPU instead, in microseconds, without load sync. A rank's ids of each
batch are drawn in proportion to the batch's counts. Columns, median/p99/max over the batches:
  without  Balancer.run on the base placement
  with     Balancer.run with live slots
  again    without live slots once more, which shows how the GPU's speed changes meanwhile
  plan     the plan of live slots alone, from the shares of the run's LP, a launch of its own
The first three are given of batches that fetch (fetch) and of the others (level), the last of
batches that fetch. Each batch's plan and ids are first held against the twin: a wrong outcome
fails the command, and nothing is timed."""


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "live",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="slots filled for one batch against static placements and UltraEP's planner",
        description=_DESCRIPTION,
        examples=(
            "  lplb-bench live --ep 8,16,32,64 --json live.json\n"
            "  lplb-bench live --workload none --trace a.npz --trace b.npz --ep 8 --base home\n"
            "  lplb-bench live --workload rotating,burst --base chain:2 --cost 500 --domain 8\n"
            "  lplb-bench live --times --ep 8,64 --tokens 4096 --json times.json"
        ),
    )
    sub.add_argument(
        "--trace", type=Path, action="append", metavar="PATH",
        help=f"{options.TRACE_HELP} (default); may be given several times",
    )  # fmt: skip
    options.trace_options(sub)
    sub.add_argument(
        "--workload", "--workloads", type=options.names((NO_WORKLOADS, *WORKLOADS)),
        default=WORKLOADS, metavar="NAME[,NAME...]",
        help=f"some of {', '.join(WORKLOADS)} (default: all), or {NO_WORKLOADS}",
    )  # fmt: skip
    sub.add_argument(
        "--experts", type=partial(options.count, most=options.MOST_EXPERTS), metavar="N",
        help=f"logical experts of the workloads (default {EXPERTS})",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=options.seed, metavar="N",
        help=f"of the workloads, and of the ids of --times (default {SEED})",
    )  # fmt: skip
    sub.add_argument(
        "--batches", type=partial(options.count, most=MOST_BATCHES), default=8, metavar="N",
        help="test batches of a workload, and of each layer and stretch of a trace at most, evenly "
        "spread (default %(default)s)",
    )  # fmt: skip
    options.add_ep(sub)
    _add_rules(sub)
    sub.add_argument(
        "--times", action="store_true", default=None,
        help="time runs with and without live slots, and the plan alone, on a GPU; no comparison",
    )  # fmt: skip
    sub.add_argument(
        "--tokens", type=partial(options.count, most=MOST_TOKENS), metavar="N",
        help=f"with --times: tokens of this rank in a batch, top-8 (default {TOKENS})",
    )  # fmt: skip


def _add_rules(sub: argparse.ArgumentParser) -> None:
    """Add the options of the live slots."""
    sub.add_argument(
        "--live", type=options.integers(1, MOST_LIVE), default=(1,), metavar="N[,N...]",
        help="live slots per rank (default 1)",
    )  # fmt: skip
    sub.add_argument(
        "--base", type=_read_bases, default=live.Options().bases, metavar="NAME[,NAME...]",
        help="static placements: home, or eplb, chain or place with a number of redundant slots "
        "(default home,chain:2)",
    )  # fmt: skip
    sub.add_argument(
        "--above", type=_read_factor, default=ABOVE, metavar="FACTOR",
        help="fetch only where the LP leaves more than this times the mean load (default "
        "%(default)s)",
    )  # fmt: skip
    for name, most, text in (
        ("cost", options.MOST, "tokens that a fetched expert costs at the busiest port"),
        ("fanout", MOST_DOMAIN, "the most copies that leave a home rank, 0 for any number"),
        ("domain", MOST_DOMAIN, "consecutive ranks that fetch from each other only, 0 for all"),
    ):
        sub.add_argument(
            f"--{name}", type=partial(options.count, most=most, least=0), default=0, metavar="N",
            help=f"{text} (default %(default)s)",
        )  # fmt: skip


def _read_bases(text: str) -> tuple[live.Base, ...]:
    try:
        return tuple(dict.fromkeys(live.read_base(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read_factor(text: str) -> float:
    """Read a largest load as a factor of the mean."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite factor from 1 on, got {text!r}")
    return value


def run(args: argparse.Namespace, out: Output) -> int:
    """Compare all ways, or time runs."""
    tables.require("rich")
    names = () if args.workload == (NO_WORKLOADS,) else args.workload
    if NO_WORKLOADS in names:
        raise UsageError(f"argument --workload: {NO_WORKLOADS} stands alone")
    if not names:
        options.refuse(
            args, ("experts",) if args.times else ("experts", "seed"), "only for workloads"
        )
    if not args.times:
        options.refuse(args, ("tokens",), "only with --times")
    elif args.above > MOST_ABOVE:
        raise UsageError(f"argument --above: with --times at most {MOST_ABOVE:g}")
    defaults = {"experts": EXPERTS, "seed": SEED, "history": options.HISTORY, "tokens": TOKENS}
    options.fill(args, defaults)
    files = [("--json", args.json), ("--markdown", args.markdown)]
    output.check_files(files, [("--trace", path) for path in args.trace or ()])
    timing = None
    if args.times:
        device, timer = gpu.start(args)
        timing = live.Timing(timer, device, args.tokens, args.seed)
    traced = _load_traces(args)
    chosen = live.Options(
        args.ep, args.live, args.base, args.above, args.cost, args.fanout, args.domain
    )
    _check_sizes(args, names, traced)
    begin = time.perf_counter()
    rows, left_out = _compute_rows(args, names, traced, chosen, timing)
    if not rows:
        reasons = "; ".join(dict.fromkeys(row["reason"] for row in left_out))
        raise UsageError(f"arguments --ep, --base: {reasons}")
    compared = [] if timing else rows
    report = {
        "command": "live",
        "options": _describe_options(args, chosen, names, traced),
        "environment": environment("cpu" if timing is None else timing.device.type),
        "seconds": time.perf_counter() - begin,
        "rows": compared,
        "left_out": left_out,
        "targets": live.judge_targets(compared) if _has_default_rules(chosen) else [],
        "times": rows if timing else [],
    }
    output.finish(args, out, report, tables.make_live_grids(report))
    wrong = sum(row["all"]["live"]["wrong"] for row in compared)
    if wrong:
        say(f"{wrong} plans lose tokens, are worse than the LP, or copy an expert twice to a rank")
    return FAILED if wrong else OK


def _compute_rows(
    args: argparse.Namespace,
    names: Sequence[str],
    traced: Sequence[live.Source],
    chosen: live.Options,
    timing: live.Timing | None,
) -> tuple[list[Row], list[Row]]:
    """Compare, or time if ``timing`` is given; returns rows, and what can't be laid out."""
    labels = [
        (f"EP {ep}, {n_live} live slots on {base}", len(names) + len(traced))
        for ep in args.ep
        for base in args.base
        for n_live in args.live
    ]

    def make_sources(ep: int) -> Sequence[live.Source]:
        return [*_draw(args, names, ep), *traced]

    with progress(labels, args.progress) as advance:
        if timing is None:
            return live.run(make_sources, chosen, advance)
        return live.time_runs(make_sources, chosen, timing, advance)


def _load_traces(args: argparse.Namespace) -> list[live.Source]:
    """Load the traces, cut into cases."""
    found = []
    for path in args.trace or (None,):
        trace, name = options.load_trace(path)
        try:
            found.append(live.take_trace(trace, name, args.history, args.layers, args.batches))
        except (IndexError, ValueError) as error:
            raise UsageError(f"arguments --trace, --history, --layers: {error}") from error
    return found


def _draw(args: argparse.Namespace, names: Sequence[str], ep: int) -> list[live.Source]:
    """Draw the workloads for as many source ranks as there are ranks."""
    sizes = workloads.Settings(ep, args.experts, args.batches, seed=args.seed)
    return live.draw_workloads(names, sizes)


def _check_sizes(
    args: argparse.Namespace, names: Sequence[str], traced: Sequence[live.Source]
) -> None:
    """Raise before any work if a workload can't be drawn."""
    if names:
        options.check_divides(args.ep, args.experts)
    for ep in args.ep:
        if args.domain and ep % args.domain:
            raise UsageError(f"argument --domain: {args.domain} does not divide EP size {ep}")
        try:
            _draw(args, names, ep)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _has_default_rules(chosen: live.Options) -> bool:
    """Say whether the rules are those that the targets are for."""
    return (chosen.above, chosen.cost, chosen.fanout, chosen.domain) == (ABOVE, 0, 0, 0)


def _describe_options(
    args: argparse.Namespace,
    chosen: live.Options,
    names: Sequence[str],
    traced: Sequence[live.Source],
) -> dict[str, Any]:
    return {
        "ep": list(chosen.ep),
        "live": list(chosen.live),
        "base": [str(base) for base in chosen.bases],
        "above": chosen.above,
        "cost": chosen.cost,
        "fanout": chosen.fanout,
        "domain": chosen.domain,
        "workloads": list(names),
        "traces": [source.name for source in traced],
        "experts": args.experts if names else None,
        "seed": args.seed if names or args.times else None,
        "tokens": args.tokens if args.times else None,
        "batches": args.batches,
        "history": args.history,
        "layers": None if args.layers is None else list(args.layers),
    }
