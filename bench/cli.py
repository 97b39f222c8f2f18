"""The command ``lplb-bench``.

Exit codes: 0 done, 1 a check failed (an LP was not certified within the tolerance, an answer that
was to be timed is wrong), 2 the command was used wrongly or something it needs is missing (such as
a GPU), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lplb_triton import Status, __version__, topologies
from lplb_triton.bench import (
    advise,
    balance,
    placement,
    plots,
    ranks,
    run_ep,
    simulate,
    tables,
    timing,
    verify,
    workloads,
)
from lplb_triton.bench import report as reports
from lplb_triton.bench import trace as traces
from lplb_triton.bench.instances import SHAPES, shape_placement
from lplb_triton.bench.simulate import draw_experts
from lplb_triton.solver import DEFAULT_MAX_ITERATIONS, DEFAULT_TOLERANCE, resolve_backend
from lplb_triton.solver import MIN_TOLERANCE_FLOAT32 as MIN_TOLERANCE

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

DEFAULT_OUT = "lplb-bench-results"

_EXAMPLES = """examples:
  lplb-bench balance
      the packaged trace on 32 ranks, 1 and 2 redundant slots per rank, placed by EPLB
  lplb-bench balance --ep 8,16,32,64 --slots 1,2 --placement eplb,cube,torus:4x8
      a table of every combination; n/a where a topology does not fit
  lplb-bench balance --trace counts.npz --ep 16 --history 100 --layers 0,4-7
      own counts: an array `counts` [batches, experts], [batches, layers, experts] or
      [batches, layers, sources, experts]
  lplb-bench balance --device cuda --json -
      solve with the GPU kernel, print JSON to stdout and tables to stderr
  lplb-bench verify --instances 2040
      hold the solver against HiGHS on random programs
  lplb-bench solve --shapes cube,eplb:32:2 --json solve.json
      times of the solve kernel and of its peers on a GPU
  lplb-bench placement --synthetic 256 --ep 32 --slots 1
      EPLB's placement against those made for the LP, over ten seeds
  lplb-bench report trace.npz --ep 16
      the same for a trace, ending with one HTML page; also from balance.json
  lplb-bench advise --model qwen3-235b-a22b --ep 16 --tokens 2048
      a prediction: saving, overhead, break-even, recommended placement
  lplb-bench record --merge trace.npz trace.rank*.npz
      one trace from the files that a recorder wrote on each rank
  lplb-bench workloads --ep 8,16 --json workloads.json
      every workload under every placement, each held against HiGHS
  lplb-bench pipeline --markdown -
      times of the whole run on a GPU, as Markdown
  lplb-bench simulate --ep 8,64 --slots 2
      a simulation: expert products of every rank of EP 8 and 64, timed on one GPU
  lplb-bench ep --json ep.json --markdown ep.md
      load sync, whole runs and training on all GPUs of this host
"""


class _UsageError(Exception):
    """Reported as one line, with exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments after the command's name; by default those of the process.

    Returns
    -------
    int
        The exit code. Wrong options end in `SystemExit` with code 2, as argparse has it.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        return command(args)
    except (_UsageError, tables.MissingExtraError) as error:
        print(f"lplb-bench: error: {error}", file=sys.stderr)
        return USAGE
    except timing.WrongAnswerError as error:
        print(f"lplb-bench: wrong answer, not timed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("lplb-bench: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="lplb-bench",
        description="Measure what lplb_triton does for recorded expert loads.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"lplb_triton {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    group = shared.add_argument_group("solver and output")
    group.add_argument(
        "--backend", choices=("torch", "triton"),
        help="default: the Triton kernel on cuda, its torch twin on cpu; never replaced silently",
    )  # fmt: skip
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    group.add_argument(
        "--tolerance", type=_tolerance, default=DEFAULT_TOLERANCE, metavar="GAP",
        help="certified relative gap asked of every LP (default %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--out", type=Path, metavar="DIR",
        help=f"folder for PNG, JSON and report (default {DEFAULT_OUT}; none if --json is given)",
    )  # fmt: skip
    group.add_argument(
        "--json", metavar="PATH|-",
        help="write the JSON there; - prints it to stdout and everything else to stderr",
    )  # fmt: skip

    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sub = commands.add_parser(
        "balance",
        parents=[shared],
        help="imbalance of rank loads before and after, on a recorded trace",
        description=(
            "Place experts by the first batches of a trace, balance the following ones, and\n"
            "compare the imbalance (max/mean of rank loads) of five ways: no balancing, EPLB's\n"
            "order without replicas, replicas with an even split, replicas with the LP, and the\n"
            "LP in whole tokens. A trace with a gap in its steps is cut there; each part has its\n"
            "own history."
        ),
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    sub.set_defaults(run=_balance)
    sub.add_argument(
        "--trace", type=Path, metavar="PATH", help=".npz or .json (default: the packaged trace)"
    )
    _add_balance_options(sub)
    sub = commands.add_parser(
        "report",
        parents=[shared],
        help="one HTML page from a trace or from what balance wrote",
        description=(
            "Write report.html, one page that needs no network: imbalance over time, rank loads,\n"
            "experts over time, copies, solver and timing. From the JSON of balance at once; a\n"
            "trace is balanced first, as by lplb-bench balance with the same options."
        ),
        epilog=(
            "examples:\n"
            "  lplb-bench report lplb-bench-results/balance.json\n"
            "  lplb-bench report trace.npz --ep 16 --slots 1 --out results"
        ),
        formatter_class=raw,
    )
    sub.set_defaults(run=_report)
    sub.add_argument("file", type=Path, metavar="FILE", help="trace, or balance.json")
    _add_balance_options(sub)
    sub = commands.add_parser(
        "verify",
        parents=[shared],
        help="hold the solver against HiGHS on random programs",
        description=(
            "Solve random programs of every shape and load family, and compare each with HiGHS:\n"
            "plan feasible, bound <= optimum <= largest load (to 1e-6), gap within the tolerance.\n"
            "The tolerance is --tolerance and a tenth of it."
        ),
        formatter_class=raw,
    )
    sub.set_defaults(run=_verify)
    sub.add_argument(
        "--instances", type=_count, default=2040, metavar="N", help="default %(default)s"
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    _add_timed_commands(commands)
    _add_ep_command(commands)
    _add_placement_command(commands)
    _add_workloads_command(commands)
    _add_record_command(commands)
    _add_advise_command(commands)
    return parser


def _add_ep_command(commands: Any) -> None:
    sub = commands.add_parser(
        "ep",
        parents=[_files()],
        help="load sync, whole runs and training on the GPUs of this host",
        description=(
            "Verify and time load sync against NCCL, whole runs with sync, a killed rank, and\n"
            "training with and without balancing, one process per GPU. Each section has processes\n"
            "of its own and a bound; one that fails doesn't keep the others from running. Nothing\n"
            "is timed before its answers have been held against the LP."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=_ep)
    sub.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: gloo and small sizes, which tests the sections, not the speed",
    )  # fmt: skip
    sub.add_argument(
        "--ranks", type=_count, metavar="N", help="GPUs to use (default: all; 2 on a cpu)"
    )
    sub.add_argument(
        "--sections", type=_names(run_ep.SECTIONS), default=tuple(run_ep.SECTIONS),
        metavar="NAME[,NAME...]", help=f"default {','.join(run_ep.SECTIONS)}",
    )  # fmt: skip
    sub.add_argument(
        "--kinds", type=_names(run_ep.KINDS), metavar="NAME[,NAME...]",
        help=f"back ends (default {','.join(run_ep.KINDS)}; distributed on a cpu)",
    )  # fmt: skip
    for name, text in (
        ("epochs", "sums to verify, eagerly and again under graph replay"),
        ("tokens", "tokens of a whole run on each rank"),
        ("replays", "timed replays of each graph"),
    ):
        standard = ", ".join(f"{getattr(s, name)} on {on}" for on, s in run_ep.SIZES.items())
        sub.add_argument(f"--{name}", type=_count, metavar="N", help=f"{text} (default {standard})")
    sub.add_argument(
        "--seconds", type=_seconds, default=570.0, metavar="S",
        help="bound on the whole run (default %(default)g)",
    )  # fmt: skip


def _files() -> argparse.ArgumentParser:
    """Options of the files that a command writes."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("output")
    group.add_argument("--json", metavar="PATH|-", help="as in balance")
    group.add_argument("--markdown", metavar="PATH|-", help="as in solve")
    return parent


def _add_record_command(commands: Any) -> None:
    sub = commands.add_parser(
        "record",
        help="check and merge the files of a recorder",
        description=(
            "Recording itself is done in your script, by lplb_triton.bench.record.Recorder.\n"
            "This command checks the files it wrote, says what is in them, and merges one file\n"
            "per rank into one trace."
        ),
        epilog=(
            "in your script:\n"
            "  with Recorder('trace.npz', n_experts=256, layers=58) as recorder:\n"
            "      ...\n"
            "      recorder.add(layer, topk_ids)   # in every MoE layer\n"
            "      recorder.step()                 # after every batch\n"
            "then:\n"
            "  lplb-bench record --merge trace.npz trace.rank*.npz\n"
            "  lplb-bench balance --trace trace.npz"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=_record)
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help="traces (.npz or .json)")
    sub.add_argument(
        "--merge", type=Path, metavar="PATH", help="write the files of all ranks as one trace there"
    )


def _add_advise_command(commands: Any) -> None:
    sub = commands.add_parser(
        "advise",
        parents=[_files()],
        help="whether balancing pays for a model and a batch: a prediction",
        description=(
            "PREDICT the time of a layer's expert products on its slowest rank, what balancing\n"
            "each batch saves over EPLB's even split, what it costs, and from how many tokens per\n"
            "rank on it pays. Times of a rank's products are measured on this machine's GPU, or\n"
            "come from a packaged table of one H100. Communication is left out."
        ),
        epilog=(
            "examples:\n"
            "  lplb-bench advise --model deepseek-v3 --ep 32 --tokens 4096\n"
            "  lplb-bench advise --trace trace.npz --hidden 4096 --inner 1536 --top-k 8 --ep 16\n"
            "  lplb-bench advise --check       on a GPU: hold predictions against measured times"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=_advise)
    sub.add_argument(
        "--model", choices=tuple(advise.MODELS), default="deepseek-v3",
        help="sizes of a published model (default %(default)s); the following replace some",
    )  # fmt: skip
    for name, text in (
        ("hidden", "width of the model"),
        ("inner", "inner width of an expert"),
        ("experts", "logical experts (a trace has its own)"),
        ("top-k", "experts of a token"),
    ):
        sub.add_argument(f"--{name}", type=_count, metavar="N", help=text)
    sub.add_argument(
        "--trace", type=Path, metavar="PATH",
        help="recorded loads (default: synthetic, lognormal(0, 1) with jitter 0.3: an assumption)",
    )  # fmt: skip
    sub.add_argument("--ep", type=_count, default=8, metavar="N", help="ranks (default 8)")
    sub.add_argument(
        "--tokens", type=_count, default=4096, metavar="N",
        help="tokens of a rank in a batch (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--slots", type=_integers(1), default=(1, 2), metavar="N[,N...]",
        help="redundant slots per rank to compare (default 1,2)",
    )  # fmt: skip
    sub.add_argument(
        "--training", action="store_true", help="count the backward pass too: three times the work"
    )
    sub.add_argument(
        "--history", type=_history, default=0.5, metavar="PART|N", help="as in balance"
    )
    sub.add_argument(
        "--gemm", choices=("gpu", "table"), help="where times come from (default: a GPU, if any)"
    )
    sub.add_argument(
        "--check", action="store_true",
        help="on a GPU: measure the slowest rank for the three models, --ep 8 and four batch "
        "sizes; fails if a prediction is more than 15%% off",
    )  # fmt: skip


def _add_workloads_command(commands: Any) -> None:
    listing = "\n".join(f"  {name}: {w.about}" for name, w in workloads.WORKLOADS.items())
    sub = commands.add_parser(
        "workloads",
        parents=[_files()],
        help="every workload under every placement, each held against HiGHS",
        description=(
            "Place experts by a workload's history, balance its test batches, and compare\n"
            "the even split, the LP and HiGHS. Fails if on any batch the LP is worse than the\n"
            "even split or further than the tolerance from HiGHS's optimum. On the CPU.\n"
            "Workloads:\n" + listing
        ),
        epilog="example:\n  lplb-bench workloads --workload zipf,burst --placement chain --ep 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=_workloads)
    sub.add_argument(
        "--workload", type=_names(workloads.WORKLOADS), default=tuple(workloads.WORKLOADS),
        metavar="NAME[,NAME...]", help="default: all",
    )  # fmt: skip
    sub.add_argument(
        "--placement", type=_any_placements, default=workloads.PLACEMENTS,
        metavar="NAME[,NAME...]", help=f"default {','.join(workloads.PLACEMENTS)}",
    )  # fmt: skip
    _add_sizes(
        sub,
        ("slots", 2, "redundant slots per rank"),
        ("experts", 256, "logical experts"),
        ("batches", 4, "test batches"),
        ("trials", 10, "effort of place: little, hardly more than its start"),
    )
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    sub.add_argument(
        "--tolerance", type=_tolerance, default=DEFAULT_TOLERANCE, metavar="GAP",
        help="as in balance",
    )  # fmt: skip


def _add_balance_options(sub: argparse.ArgumentParser) -> None:
    """Add what ``balance`` and ``report`` have in common."""
    sub.add_argument(
        "--ep", type=_integers(1), default=(32,), metavar="N[,N...]",
        help="numbers of expert-parallel ranks (default 32)",
    )  # fmt: skip
    sub.add_argument(
        "--placement", type=_placements, default=("eplb",), metavar="NAME[,NAME...]",
        help=f"eplb, none, {', '.join(topologies.available())} (default eplb)",
    )  # fmt: skip
    sub.add_argument(
        "--slots", type=_integers(0), default=(1, 2), metavar="N[,N...]",
        help="redundant slots per rank (default 1,2)",
    )  # fmt: skip
    sub.add_argument(
        "--history", type=_history, default=0.5, metavar="PART|N",
        help="batches to place experts by: a part in (0, 1) or a number (default 0.5)",
    )  # fmt: skip
    sub.add_argument(
        "--layers", type=_layers, metavar="LIST", help="such as 0,2,4-7 (default: all)"
    )
    sub.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=None,
        help="write report.html beside the PNG (default, where there is a folder)",
    )  # fmt: skip


def _add_placement_command(commands: Any) -> None:
    sub = commands.add_parser(
        "placement",
        help="EPLB's placement against those made for the LP",
        description=(
            "Place experts by the first batches of a trace, or of synthetic loads, by EPLB, by\n"
            "lplb_triton.chain and by lplb_triton.place, and compare the LP's optimum, and its\n"
            "result in whole tokens, on the following batches; with the time that each takes."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=_placement)
    source = sub.add_mutually_exclusive_group()
    source.add_argument(
        "--trace", type=Path, metavar="PATH", help=".npz or .json (default: the packaged trace)"
    )
    source.add_argument(
        "--synthetic", type=_count, metavar="EXPERTS",
        help="lognormal(0, 1) loads with lognormal(0, 0.3) jitter instead of a trace",
    )  # fmt: skip
    sub.add_argument(
        "--seeds", type=_layers, default=placement.SEEDS, metavar="LIST",
        help="seeds of the synthetic loads (default 0-9)",
    )  # fmt: skip
    for name, default in (("ep", (8, 16, 32)), ("slots", (1, 2))):
        sub.add_argument(
            f"--{name}", type=_integers(1), default=default, metavar="N[,N...]",
            help=f"as in balance (default {','.join(map(str, default))})",
        )  # fmt: skip
    sub.add_argument(
        "--history", type=_history, default=0.5, metavar="PART|N", help="as in balance"
    )
    sub.add_argument("--layers", type=_layers, metavar="LIST", help="as in balance")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    sub.add_argument(
        "--trials", type=_count, metavar="N", help="effort of place (default: its own)"
    )
    sub.add_argument(
        "--moves", type=_tolerance, metavar="PENALTY",
        help="count moves over drifting synthetic loads too, with this move_penalty",
    )  # fmt: skip
    sub.add_argument(
        "--published", type=Path, metavar="EPLB.PY",
        help="your copy of DeepSeek's eplb.py: time rebalance_experts against it and compare",
    )  # fmt: skip
    sub.add_argument("--png", type=Path, metavar="PATH", help="draw the excesses")
    sub.add_argument("--json", metavar="PATH|-", help="as in balance")
    sub.add_argument("--markdown", metavar="PATH|-", help="as in solve")


def _add_timed_commands(commands: Any) -> None:
    """Add ``solve`` and ``pipeline``, which need a GPU."""
    shared = argparse.ArgumentParser(add_help=False)
    group = shared.add_argument_group("solver and output")
    group.add_argument(
        "--tolerance", type=_tolerance, default=DEFAULT_TOLERANCE, metavar="GAP",
        help="certified relative gap asked of every LP (default %(default)g)",
    )  # fmt: skip
    group.add_argument(
        "--json", metavar="PATH|-",
        help="write the JSON there; - prints it to stdout and everything else to stderr",
    )  # fmt: skip
    group.add_argument(
        "--markdown", metavar="PATH|-",
        help="write the tables as Markdown there; - prints them to stdout instead of the others",
    )  # fmt: skip
    raw = argparse.RawDescriptionHelpFormatter
    sub = commands.add_parser(
        "solve",
        parents=[shared],
        help="times of the solve kernel and of its peers on a GPU",
        description=(
            "Time the LP, from counts by expert to a certified plan, by CUDA-graph replay, on\n"
            "instances of six load families. Every plan is held against HiGHS first. Peers, on\n"
            "shapes with two copies per expert: primal affine scaling, coloured edge balancing,\n"
            "and DeepSeek's LPLB if it is installed."
        ),
        formatter_class=raw,
    )
    sub.set_defaults(run=_solve)
    sub.add_argument(
        "--shapes", type=_shapes, default=timing.SOLVE_SHAPES, metavar="NAME[,NAME...]",
        help=f"default {','.join(timing.SOLVE_SHAPES)}",
    )  # fmt: skip
    sub.add_argument(
        "--per-family", type=_count, default=34, metavar="N",
        help="instances of each of the six load families (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True,
        help="time the peers too (default)",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=int, default=timing.SEED, metavar="N", help="default %(default)s"
    )
    sub = commands.add_parser(
        "pipeline",
        parents=[shared],
        help="times of the whole run on a GPU",
        description=(
            "Time Balancer.run and its parts by CUDA-graph replay, for 256 experts and top-8\n"
            "routing, without load sync; the host's time of an eager call, its allocations, and\n"
            "the first call of a fresh process."
        ),
        formatter_class=raw,
    )
    sub.set_defaults(run=_pipeline)
    sub.add_argument(
        "--shapes", type=_pipeline_shapes, default=timing.PIPELINE_SHAPES,
        metavar="NAME[,NAME...]", help=f"default {','.join(timing.PIPELINE_SHAPES)}",
    )  # fmt: skip
    sub.add_argument(
        "--tokens", type=_integers(1), default=timing.PIPELINE_TOKENS, metavar="N[,N...]",
        help=f"tokens of a batch (default {','.join(map(str, timing.PIPELINE_TOKENS))})",
    )  # fmt: skip
    sub.add_argument(
        "--first-call", action=argparse.BooleanOptionalAction, default=True,
        help="time the first call in fresh processes too (default)",
    )  # fmt: skip
    sub = commands.add_parser(
        "simulate",
        parents=[shared],
        help="expert products of 8 to 64 simulated ranks, timed on one GPU",
        description=(
            "A SIMULATION: the ranks of an EP group one after the other on one GPU, each with its\n"
            "real token counts of the packaged trace. The expert products of every rank are timed\n"
            "for real; the layer takes as long as its slowest rank. No communication, no routing."
        ),
        formatter_class=raw,
    )
    sub.set_defaults(run=_simulate)
    _add_sizes(
        sub,
        ("slots", 1, "redundant slots per rank"),
        ("tokens", 16384, "rows of a rank's experts on average: its tokens times top-k"),
        ("hidden", 2048, "width of the model"),
        ("inner", 768, "inner width of an expert"),
        ("batches", 1, "test batches of each layer in each stretch of the trace"),
    )


def _add_sizes(sub: argparse.ArgumentParser, *sizes: tuple[str, int, str]) -> None:
    """Add EP sizes, and options that take one number: name, default, text."""
    sub.add_argument(
        "--ep", type=_integers(1), default=(8, 16, 32, 64), metavar="N[,N...]",
        help="EP sizes (default 8,16,32,64)",
    )  # fmt: skip
    for name, default, text in sizes:
        sub.add_argument(
            f"--{name}", type=_count, default=default, metavar="N",
            help=f"{text} (default %(default)s)",
        )  # fmt: skip


def _shapes(text: str, *, make: Callable[..., object] = shape_placement) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        try:
            make(name, np.random.default_rng(0))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name!r}: {error}") from error
    return names


def _pipeline_shapes(text: str) -> tuple[str, ...]:
    return _shapes(text, make=timing.pipeline_placement)


def _count(text: str) -> int:
    values = _integers(1)(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"expected one number, got {text!r}")
    return values[0]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds


def _integers(least: int) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        except ValueError:
            values = ()
        if not values or min(values) < least:
            raise argparse.ArgumentTypeError(
                f"expected integers from {least} on, separated by commas, got {text!r}"
            )
        return values

    return parse


def _layers(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(
                f"expected layers such as 0,2,4-7, got {part!r} in {text!r}"
            )
        upper = int(last) if dash else int(first)
        if upper < int(first) or upper > 10**6:
            raise argparse.ArgumentTypeError(f"no such range of layers: {part!r}")
        found.extend(range(int(first), upper + 1))
    return tuple(dict.fromkeys(found))


def _placements(text: str, named: Sequence[str] = ("eplb", "none")) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name in named:
            continue
        try:
            topologies.from_name(name)
        except ValueError as error:
            known = ", ".join((*named, *topologies.available()))
            raise argparse.ArgumentTypeError(f"{error} (placements: {known})") from error
    return names


def _any_placements(text: str) -> tuple[str, ...]:
    return _placements(text, ("none", *placement.METHODS))


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(known)}, got {name!r}"
                )
        return names

    return parse


def _history(text: str) -> float | int:
    value: float | int
    try:
        value = int(text) if text.isdecimal() else float(text)
    except ValueError:
        value = 0
    if value < 1 if isinstance(value, int) else not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a part in (0, 1) or a number of batches from 1 on, got {text!r}"
        )
    return value


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not MIN_TOLERANCE <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a gap in [{MIN_TOLERANCE:g}, 1), got {text!r}")
    return value


def _balance(args: argparse.Namespace) -> int:
    # Whatever can be refused is refused before the work starts.
    folder = args.out
    if folder is None and args.json is None:
        folder = Path(DEFAULT_OUT)
    if folder is None and args.report:
        raise _UsageError("argument --report: needs --out beside --json")
    json_path = args.json
    if json_path is None and folder is not None:
        json_path = str(folder / "balance.json")
    tables.require("rich")
    if folder is not None:
        tables.require("matplotlib")
    device, backend = _device(args.device, args.backend)
    trace, source = _load(args.trace)
    options = balance.Options(
        ep=args.ep,
        slots=args.slots,
        placements=args.placement,
        history=args.history,
        layers=args.layers,
        tolerance=args.tolerance,
        max_iterations=DEFAULT_MAX_ITERATIONS,
        backend=backend,
        device=device,
    )
    try:
        parts = balance.stretches(trace.steps, options.history)
    except ValueError as error:
        raise _UsageError(f"argument --history: {error}") from error
    layers = tuple(range(trace.layers)) if args.layers is None else args.layers
    if max(layers) >= trace.layers:
        raise _UsageError(
            f"argument --layers: the trace has layers 0 to {trace.layers - 1}, got {max(layers)}"
        )
    for path in (folder, Path(json_path).parent if json_path not in (None, "-") else None):
        _make_folder(path)

    begin = time.perf_counter()
    total = len(balance.combinations(options)) * len(layers)
    with tables.progress_bar("layers", total) as advance:
        cells = balance.run(trace, options, advance)
    seconds = time.perf_counter() - begin
    if all(cell.reason is not None for cell in cells):
        raise _UsageError(
            "; ".join(dict.fromkeys(f"{cell.placement}: {cell.reason}" for cell in cells))
        )

    tested = sum(part.stop - part.split for part in parts)
    title = f"{source}: {trace.experts} experts, {len(layers)} layers, {tested} test batches"
    time_label = _time_label(backend, device)
    target = tables.console(stderr=json_path == "-")
    tables.show_balance(target, cells, title=title, time_label=time_label)
    report = {
        "command": "balance",
        "options": {
            "trace": source,
            "ep": list(options.ep),
            "slots": list(options.slots),
            "placements": list(options.placements),
            "history": options.history,
            "layers": list(layers),
            "tolerance": options.tolerance,
            "max_iterations": options.max_iterations,
            "backend": backend,
            "device": device,
        },
        "trace": {
            "batches": trace.batches,
            "layers": trace.layers,
            "sources": trace.sources,
            "experts": trace.experts,
            "stretches": [
                {
                    "history": [part.start, part.split],
                    "test": [part.split, part.stop],
                    "steps": [int(trace.steps[part.start]), int(trace.steps[part.stop - 1])],
                }
                for part in parts
            ],
            "meta": trace.meta,
        },
        "environment": _environment(device),
        "seconds": seconds,
        "cells": [_cell_report(trace, options, cell, time_label) for cell in cells],
        "heat": reports.heat(
            trace, next(cell for cell in cells if cell.reason is None).worst().layer
        ),
    }
    if folder is not None:
        png = folder / "balance.png"
        _write(png, plots.balance_png(cells, title=title))
        target.print(f"picture: {png}", markup=False, soft_wrap=True)
    _write_report(report, json_path, target)
    if folder is not None and args.report is not False:
        page = folder / "report.html"
        _write(page, reports.html(report).encode())
        target.print(f"report: {page}", markup=False, soft_wrap=True)
    bad = sum(int((cell.status() != Status.CERTIFIED).sum()) for cell in cells if not cell.reason)
    if bad:
        print(
            f"lplb-bench: {bad} LPs were not certified within {options.tolerance:g}",
            file=sys.stderr,
        )
        return FAILED
    return OK


def _report(args: argparse.Namespace) -> int:
    found = None
    if args.file.suffix == ".json":
        try:
            found = json.loads(args.file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _UsageError(f"argument FILE: {error}") from error
    if not isinstance(found, dict) or "command" not in found:
        args.trace = args.file
        return _balance(args)
    folder = args.file.parent if args.out is None else args.out
    _make_folder(folder)
    try:
        page = reports.html(found)
    except (KeyError, TypeError, ValueError) as error:
        raise _UsageError(f"argument FILE: {args.file}: {error}") from error
    _write(folder / "report.html", page.encode())
    print(f"report: {folder / 'report.html'}")
    return OK


def _verify(args: argparse.Namespace) -> int:
    tables.require("rich")
    device, backend = _device(args.device, args.backend)
    tolerances = (args.tolerance, args.tolerance / 10)
    if backend == "triton" and tolerances[1] < MIN_TOLERANCE:
        raise _UsageError(
            f"argument --tolerance: a tenth of it must be at least {MIN_TOLERANCE:g} for the "
            f"Triton kernel, got {args.tolerance:g}"
        )
    json_path = args.json
    if json_path is None and args.out is not None:
        json_path = str(args.out / "verify.json")
    if json_path not in (None, "-"):
        _make_folder(Path(json_path).parent)
    with tables.progress_bar("shapes", len(SHAPES)) as advance:
        begin = time.perf_counter()
        verdicts = verify.verify(
            args.instances,
            seed=args.seed,
            tolerances=tolerances,
            backend=backend,
            device=device,
            dtype=torch.float32 if backend == "triton" else torch.float64,
            progress=lambda shape, n: advance(),
        )
        seconds = time.perf_counter() - begin
    target = tables.console(stderr=args.json == "-")
    tables.show_verdicts(target, verdicts, title=f"against HiGHS, {backend} on {device}")
    report = {
        "command": "verify",
        "options": {"instances": args.instances, "seed": args.seed, "backend": backend},
        "environment": _environment(device),
        "seconds": seconds,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }
    if json_path is not None:
        _write_report(report, json_path, target)
    # One in a thousand may miss the tighter tolerance in float32; nothing may be unsound.
    good = all(
        v.sound and v.not_certified <= (v.instances / 1000 if v.tolerance < args.tolerance else 0)
        for v in verdicts
    )
    return OK if good else FAILED


def _solve(args: argparse.Namespace) -> int:
    device, timer = _start_timed(args)
    begin = time.perf_counter()
    rows, peers, groups = [], [], None
    total = len(args.shapes) * (6 * args.per_family + args.peers) + 1
    with tables.progress_bar("instances", total) as advance:
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
        "environment": _environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
        "groups": groups,
        "peers": peers if args.peers else None,
    }
    _finish_timed(args, report, tables.solve_grids(report))
    return OK


def _pipeline(args: argparse.Namespace) -> int:
    device, timer = _start_timed(args)
    begin = time.perf_counter()
    rows, first_calls = [], []
    bandwidth = timing.copy_bandwidth(timer, device)
    total = len(args.shapes) * (len(args.tokens) + args.first_call)
    with tables.progress_bar("rows", total) as advance:
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
        "environment": _environment(device.type),
        "seconds": time.perf_counter() - begin,
        "bandwidth": bandwidth,
        "rows": rows,
        "first_calls": first_calls,
    }
    _finish_timed(args, report, tables.pipeline_grids(report))
    wrong = [row for row in rows if row["allocations_per_call"] not in (None, 1)]
    for row in wrong:
        print(
            f"lplb-bench: {row['shape']}, {row['tokens']} tokens: run allocates "
            f"{row['allocations_per_call']:g} times per call, expected once",
            file=sys.stderr,
        )
    return FAILED if wrong else OK


def _simulate(args: argparse.Namespace) -> int:
    trace = traces.packaged()
    _check_divides(args.ep, trace.experts)
    device, timer = _start_timed(args)
    begin = time.perf_counter()
    options = {name: getattr(args, name) for name in ("slots", "tokens", "hidden", "inner")}
    total = len(args.ep) * len(simulate.chosen_batches(trace, args.batches))
    with tables.progress_bar("batches", total) as advance:
        rows = [
            simulate.simulate_row(
                trace, ep, timer, device, **options,
                per_stretch=args.batches, tolerance=args.tolerance, progress=advance,
            )
            for ep in args.ep
        ]  # fmt: skip
    report = {
        "command": "simulate",
        "options": {**options, "batches": args.batches, "tolerance": args.tolerance},
        "environment": _environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    _finish_timed(args, report, tables.simulate_grids(report))
    return OK


def _ep(args: argparse.Namespace) -> int:
    tables.require("rich")
    _check_outputs(args)
    on_gpu = args.device == "cuda"
    if on_gpu:
        _check_gpu()
    ranks = args.ranks or (torch.cuda.device_count() if on_gpu else 2)
    if ranks < 2 or run_ep.N_COUNTS % ranks:
        raise _UsageError(
            f"argument --ranks: expected at least 2, and a divisor of the {run_ep.N_COUNTS} "
            f"experts, got {ranks}"
        )
    if on_gpu and ranks > torch.cuda.device_count():
        raise _UsageError(f"argument --ranks: {ranks}, but torch finds fewer GPUs")
    given = {n: getattr(args, n) for n in ("epochs", "tokens", "replays") if getattr(args, n)}
    sizes = dataclasses.replace(run_ep.SIZES[args.device], **given)
    kinds = args.kinds or (run_ep.KINDS if on_gpu else ("distributed",))
    begin = time.perf_counter()
    report: dict[str, Any] = {
        "command": "ep",
        "options": {
            "ranks": ranks,
            "device": args.device,
            "kinds": list(kinds),
            **{name: getattr(sizes, name) for name in ("epochs", "tokens", "replays")},
        },
        "environment": {**_environment(args.device), **_communication(args.device)},
        "seconds": 0.0,
        "sections": {},
    }
    sections: dict[str, Any] = report["sections"]

    def after(name: str, figures: dict[str, Any]) -> None:
        print(f"{name}: {run_ep.outcome(figures)}", file=sys.stderr, flush=True)
        sections[name] = figures
        report["seconds"] = time.perf_counter() - begin
        # A run that is cut short keeps the figures of the sections before.
        if args.json not in (None, "-"):
            _write(Path(args.json), _json(report).encode())

    run_ep.run(
        ranks, args.device, sizes, sections=args.sections, kinds=kinds, seconds=args.seconds,
        after=after,
    )  # fmt: skip
    _finish_timed(args, report, tables.ep_grids(report))
    return FAILED if any("failed" in row for row in sections.values()) else OK


def _placement(args: argparse.Namespace) -> int:
    tables.require("rich")
    if args.png is not None:
        tables.require("matplotlib")
    _check_outputs(args)
    device = torch.device(_device(args.device, None)[0])
    if args.synthetic is not None:
        cases = placement.synthetic_cases(args.synthetic, args.seeds)
        source = f"{args.synthetic} experts, synthetic"
    else:
        trace, source = _load(args.trace)
        try:
            cases = placement.trace_cases(trace, args.history, args.layers)
        except (IndexError, ValueError) as error:
            raise _UsageError(f"arguments --history, --layers: {error}") from error
    begin = time.perf_counter()
    total = len(cases) * len(args.ep) * len(args.slots)
    with tables.progress_bar("cases", total) as advance:
        rows = placement.run(cases, args.ep, args.slots, device, args.trials, advance)
    if not rows:
        raise _UsageError("argument --ep: none of the sizes divides the number of experts")
    moves = []
    if args.moves is not None:
        common = (args.slots[0], args.moves, device, args.trials)
        moves = [placement.moves_row(ep, *common) for ep in args.ep]
    published = None
    if args.published is not None:
        try:
            published = placement.published_row(args.published)
        except (OSError, AttributeError, ImportError, SyntaxError) as error:
            raise _UsageError(f"argument --published: {error}") from error
    report = {
        "command": "placement",
        "source": source,
        "trials": args.trials,
        "environment": _environment(device.type),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
        "moves": moves,
        "published": published,
    }
    _finish_timed(args, report, tables.placement_grids(report))
    if args.png is not None:
        _make_folder(args.png.parent)
        _write(args.png, plots.placement_png(rows, title=source))
    return OK if published is None or published["same"] else FAILED


def _record(args: argparse.Namespace) -> int:
    try:
        if args.merge is not None:
            for note in ranks.merge_into(args.merge, args.files):
                print(f"lplb-bench: warning: {note}", file=sys.stderr)
        for path in args.files if args.merge is None else [args.merge]:
            found = traces.load(path)
            print(
                f"{path}: {found.batches} batches (steps {found.steps[0]} to {found.steps[-1]}), "
                f"{found.layers} layers, {found.sources} sources, {found.experts} experts, "
                f"{int(found.totals().sum())} assignments"
            )
    except (OSError, ValueError) as error:
        raise _UsageError(str(error)) from error
    return OK


CHECK_TOKENS, CHECK_ERROR = (256, 1024, 4096, 8192), 0.15


def _advise(args: argparse.Namespace) -> int:
    tables.require("rich")
    _check_outputs(args)
    if args.check:
        return _check_advice(args)
    found = advise.MODELS[args.model]
    replaced = {name: getattr(args, name) for name in ("hidden", "inner", "experts", "top_k")}
    try:
        trace = None
        if args.trace is not None:
            trace, source = _load(args.trace)
            if args.experts not in (None, trace.experts):
                raise _UsageError(f"argument --experts: the trace has {trace.experts}")
            replaced["experts"] = trace.experts
        model = found._replace(**{k: v for k, v in replaced.items() if v is not None})
        if trace is None:
            cases = placement.synthetic_cases(model.experts, (0, 1))
            source = "synthetic loads, lognormal(0, 1), jitter 0.3 (an assumption)"
        else:
            cases = placement.trace_cases(trace, args.history)
        begin = time.perf_counter()
        gpu = torch.cuda.is_available() if args.gemm is None else args.gemm == "gpu"
        if gpu:
            device, timer = _start_timed(args)
            widest = max(1, model.experts // args.ep) + min(args.slots)
            name = torch.cuda.get_device_name()
            weights = draw_experts(model.hidden, model.inner, widest, device)
            gemm, points = advise.measure(model, weights, timer, device, name, _pairs())
        else:
            points = []
            gemm = advise.packaged(model.hidden, model.inner)
        advice = advise.advise(
            model, gemm, cases, args.ep, args.tokens, args.slots, training=args.training
        )
    except ValueError as error:
        raise _UsageError(str(error)) from error
    report = {
        "command": "advise",
        "options": {
            "model": model._asdict(),
            "loads": source,
            "ep": args.ep,
            "tokens": args.tokens,
            "slots": list(args.slots),
            "training": args.training,
        },
        "gemm": dataclasses.asdict(gemm),
        "points": [p._asdict() for p in points],
        "environment": _environment("cuda" if gpu else "cpu"),
        "seconds": time.perf_counter() - begin,
        **advice,
    }
    _finish_timed(args, report, tables.advise_grids(report))
    return OK


def _pairs() -> int:
    """Pairs of SMs of the GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.multi_processor_count) // 2


def _check_advice(args: argparse.Namespace) -> int:
    device, timer = _start_timed(args)
    name = torch.cuda.get_device_name()
    begin = time.perf_counter()
    rows, fits = [], {}
    with tables.progress_bar("configurations", len(advise.MODELS) * len(CHECK_TOKENS)) as advance:
        for key, model in advise.MODELS.items():
            (case,) = placement.synthetic_cases(model.experts, (0,))
            widest = model.experts // args.ep + 1
            _check_divides((args.ep,), model.experts)
            weights = draw_experts(model.hidden, model.inner, widest, device)
            gemm, points = advise.measure(model, weights, timer, device, name, _pairs())
            fits[key] = {"gemm": dataclasses.asdict(gemm), "points": [p._asdict() for p in points]}
            for tokens in CHECK_TOKENS:
                rows.append(
                    advise.check_row(
                        key, model, gemm, case, args.ep, tokens, weights, timer, device
                    )
                )
                advance()
    report = {
        "command": "advise",
        "check": True,
        "environment": _environment("cuda"),
        "seconds": time.perf_counter() - begin,
        "fits": fits,
        "rows": rows,
    }
    _finish_timed(args, report, tables.advice_check_grids(report))
    far = [row for row in rows for k in ("even", "lp") if abs(row[k]["error"]) > CHECK_ERROR]
    if far:
        print(
            f"lplb-bench: {len(far)} of {2 * len(rows)} predictions are more than "
            f"{CHECK_ERROR:.0%} off",
            file=sys.stderr,
        )
    return FAILED if far else OK


def _workloads(args: argparse.Namespace) -> int:
    tables.require("rich")
    _check_outputs(args)
    _check_divides(args.ep, args.experts)
    options = {
        name: getattr(args, name)
        for name in ("slots", "experts", "batches", "trials", "seed", "tolerance")
    }
    begin = time.perf_counter()
    with tables.progress_bar("workloads", len(args.ep) * len(args.workload)) as advance:
        try:
            rows = workloads.run(
                args.workload, args.placement, args.ep, **options, progress=advance
            )
        except ValueError as error:
            raise _UsageError(str(error)) from error
    report = {
        "command": "workloads",
        "options": options,
        "about": {name: workloads.WORKLOADS[name].about for name in args.workload},
        "environment": _environment("cpu"),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }
    _finish_timed(args, report, tables.workloads_grids(report))
    judged = [row for row in rows if "reason" not in row]
    if not judged:
        raise _UsageError("; ".join(dict.fromkeys(row["reason"] for row in rows)))
    bad = [row for row in judged if not row["passed"]]
    for row in bad:
        print(
            f"lplb-bench: EP {row['ep']}, {row['workload']}, {row['placement']}: "
            f"{row['worse_than_even']} batches worse than the even split, distance from HiGHS "
            f"{row['distance']:.1e}",
            file=sys.stderr,
        )
    return FAILED if bad else OK


def _check_divides(sizes: Sequence[int], experts: int) -> None:
    for ep in sizes:
        if experts % ep:
            raise _UsageError(f"argument --ep: {ep} does not divide the {experts} experts")


def _check_outputs(args: argparse.Namespace) -> None:
    if args.json == "-" and args.markdown == "-":
        raise _UsageError("arguments --json and --markdown cannot both print to stdout")
    for path in (args.json, args.markdown):
        if path not in (None, "-"):
            _make_folder(Path(path).parent)


def _start_timed(args: argparse.Namespace) -> tuple[torch.device, timing.Timer]:
    """Refuse what can be refused before the work starts, and make the timer."""
    tables.require("rich")
    _check_outputs(args)
    _check_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    return device, timing.GraphTimer(device)


def _check_gpu() -> None:
    """Refuse to time kernels where that says nothing."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise _UsageError(
            "TRITON_INTERPRET is set: kernels would run in Triton's interpreter, whose times say "
            "nothing; unset it"
        )
    if not torch.cuda.is_available():
        raise _UsageError("kernels can only be timed on a GPU, but torch finds none")


def _finish_timed(
    args: argparse.Namespace, report: dict[str, Any], grids: Sequence[tables.Grid]
) -> None:
    """Print or write the tables, the machine that they are of, and the JSON."""
    target = tables.console(stderr="-" in (args.json, args.markdown))
    machine = _machine_line(report)
    if args.markdown == "-":
        sys.stdout.write(f"{machine}\n\n{tables.markdown(grids)}")
        sys.stdout.flush()
    else:
        target.print(machine, markup=False, soft_wrap=True)
        tables.show_grids(target, grids)
    if args.markdown not in (None, "-"):
        _write(Path(args.markdown), f"{machine}\n\n{tables.markdown(grids)}".encode())
        target.print(f"tables: {args.markdown}", markup=False, soft_wrap=True)
    if args.json is not None:
        _write_report(report, args.json, target)


def _machine_line(report: dict[str, Any]) -> str:
    """Hardware and versions in one line."""
    e = report["environment"]
    if report["command"] in ("advise", "placement", "workloads"):
        where = f"{e['gpu']}, {e['cpu']}" if e["gpu"] else e["cpu"]
        return (
            f"{where}, {e['torch_threads']} threads, torch {e['torch']}; "
            f"{report['seconds']:.0f} s in all"
        )
    if report["command"] == "ep":
        ranks, names = report["options"]["ranks"], ("torch", "triton", "nccl", "nvshmem4py")
        where = f"{ranks} x {e['gpu']}, driver {e['driver'] or 'unknown'}, " if e["gpu"] else ""
        versions = ", ".join(f"{name} {e[name]}" for name in names if e[name])
        return f"{where}{versions}, {e['cpu']}; {ranks} processes, {report['seconds']:.0f} s in all"
    return (
        f"{e['gpu']}, driver {e['driver'] or 'unknown'}, torch {e['torch']}, triton {e['triton']}, "
        f"{e['cpu']}; CUDA-graph replays, gap {report['options']['tolerance']:g}, "
        f"{report['seconds']:.0f} s in all"
    )


def _device(device: str | None, backend: str | None) -> tuple[str, str]:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise _UsageError("argument --device: cuda was asked for, but torch finds no GPU")
    try:
        return device, resolve_backend(backend, torch.device(device))
    except (ImportError, ValueError) as error:
        raise _UsageError(f"argument --backend: {error}") from error


def _load(path: Path | None) -> tuple[traces.Trace, str]:
    try:
        if path is None:
            return traces.packaged(), "packaged trace"
        return traces.load(path), path.name
    except (OSError, ValueError) as error:
        raise _UsageError(f"argument --trace: {error}") from error


def _make_folder(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _UsageError(f"cannot make the folder {path}: {error.strerror}") from error


def _write_report(report: dict[str, Any], path: str, target: Console) -> None:
    """Write the JSON to a file, or to stdout for a dash."""
    text = _json(report)
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        _write(Path(path), text.encode())
        target.print(f"figures: {path}", markup=False, soft_wrap=True)


def _json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that an interrupted run leaves the old one or none.

    Devices, pipes and links stay what they are: they are written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(content)
            return
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _time_label(backend: str, device: str) -> str:
    what = {"torch": "batched torch twin", "triton": "Triton kernel"}[backend]
    where = {"cpu": "CPU", "cuda": "GPU"}[device]
    note = "throughput, not latency" if device == "cuda" else "not the GPU kernel's time"
    return f"{what} on the {where}, one call for all batches, divided by its LPs; {note}"


def _environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "lplb_triton": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda,
    }
    found.update({name: _version(name) for name in ("torch", "triton", "numpy", "scipy")})
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = _driver_version()
    return found


def _communication(device: str) -> dict[str, Any]:
    """Versions of what GPUs talk through."""
    on_gpu = device == "cuda"
    return {
        "nccl": _nccl_version() if on_gpu else None,
        "nvshmem4py": _version("nvshmem4py-cu13") or _version("nvshmem4py-cu12"),
    }


def _nccl_version() -> str:
    # Untyped in torch.
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    """Version of the NVIDIA driver, if nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def _cell_report(
    trace: traces.Trace, options: balance.Options, cell: balance.Cell, time_label: str
) -> dict[str, Any]:
    head = {"ep": cell.ep, "slots": cell.slots, "placement": cell.placement}
    if cell.reason is not None:
        return {**head, "applicable": False, "reason": cell.reason}
    values = {variant: cell.imbalance(variant) for variant in balance.VARIANTS}
    status, iterations, gap = cell.status(), cell.iterations(), cell.gap()
    example = cell.worst()
    return {
        **head,
        "applicable": True,
        "imbalance": {
            variant: {
                "mean": float(v.mean()),
                "p95": float(np.percentile(v, 95)),
                "max": float(v.max()),
            }
            for variant, v in values.items()
        },
        "lps": {
            "count": len(status),
            "certified": int((status == Status.CERTIFIED).sum()),
            "max_gap": _finite(gap.max()) if len(gap) else None,
            "mean_iterations": float(iterations.mean()) if len(iterations) else None,
            "max_iterations": int(iterations.max()) if len(iterations) else None,
            "median_us_per_lp": cell.microseconds(),
            "time_is": time_label,
        },
        "by_layer": [
            {
                "layer": layer,
                "imbalance": {name: _rounded(v[at]) for name, v in values.items()},
                "bound": _rounded(cell.bound()[at]),
                **_solves(cell, layer),
            }
            for at, layer in enumerate(dict.fromkeys(r.layer for r in cell.results))
        ],
        "example": {
            "layer": example.layer,
            "batch": example.batch,
            "loads": {name: _rounded(loads) for name, loads in example.loads.items()},
            "flows": reports.flows(trace, options, cell),
        },
    }


def _solves(cell: balance.Cell, layer: int) -> dict[str, list[Any]]:
    """Return iterations and gap of each test batch of a layer, the largest of several groups."""
    found: dict[str, list[Any]] = {"iterations": [], "gap": []}
    for r in cell.results:
        if r.layer == layer and len(r.gap):
            batches = r.stretch.stop - r.stretch.split
            found["iterations"] += r.iterations.reshape(batches, -1).max(1).tolist()
            found["gap"] += [_finite(float(v)) for v in r.gap.reshape(batches, -1).max(1)]
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rounded(values: np.ndarray[Any, Any]) -> list[float | None]:
    return [_finite(round(float(value), 6)) for value in values]
