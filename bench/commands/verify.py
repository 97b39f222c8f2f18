"""``lplb-bench verify``."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lplb_triton.bench import corpus, options, output, tables
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output
from lplb_triton.bench.progress import progress
from lplb_triton.solver import DEFAULT_TOLERANCE
from lplb_triton.solver import MIN_TOLERANCE_FLOAT32 as MIN_TOLERANCE
from lplb_triton.testing import verify

__all__ = ["add", "run"]

MOST_INSTANCES = 10**7
MOST_BATCHES = 10**4
TRAFFIC_OPTIONS = ("batches", "most_ranks")


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "verify",
        run,
        parents=(options.solver_options(), options.progress_option()),
        help="hold the solver against HiGHS on random programs, real traffic and hard placements",
        description=(
            "Solve random programs of every shape and load family; then the packaged trace and\n"
            "drawn traffic on placements of 8 to 256 ranks made from their history, experts with\n"
            "5 to 60 copies, and copies that join a few ranks each. Compare each with HiGHS:\n"
            "plan feasible, bound <= optimum <= largest load (to 1e-6), gap within the tolerance.\n"
            "The tolerance is --tolerance and a tenth of it; all must be certified at the former.\n"
            "At a tenth, one random program in a thousand may not be; of the others the share is\n"
            "told. --out writes DIR/verify.json, --json a file of your own name."
        ),
        examples=(
            "  lplb-bench verify --instances 170 --most-ranks 64 --device cpu\n"
            "  lplb-bench verify --instances 170 --no-traffic\n"
            "  lplb-bench verify --tolerance 1e-4 --json -"
        ),
    )
    sub.add_argument(
        "--instances", type=partial(options.count, most=MOST_INSTANCES), default=2040,
        metavar="N", help="random programs (default %(default)s)",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="default %(default)s"
    )
    sub.add_argument(
        "--traffic", action=argparse.BooleanOptionalAction, default=True,
        help="real traffic and hard placements too (default)",
    )  # fmt: skip
    sub.add_argument(
        "--batches", type=partial(options.count, most=MOST_BATCHES), metavar="N",
        help="of each load set on each placement, a quarter from 128 ranks on (default "
        f"{corpus.BATCHES})",
    )  # fmt: skip
    sub.add_argument(
        "--most-ranks", type=options.count, metavar="N",
        help="leave out real traffic and hard placements of more ranks",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> int:
    """Compare, and judge."""
    options.fill(args, {"tolerance": DEFAULT_TOLERANCE})
    if not args.traffic:
        options.refuse(args, TRAFFIC_OPTIONS, "not with --no-traffic")
    elif args.most_ranks is not None and args.most_ranks < corpus.FEWEST_RANKS:
        raise UsageError(
            f"argument --most-ranks: no placement has fewer than {corpus.FEWEST_RANKS} ranks, "
            f"got {args.most_ranks}; --no-traffic leaves all of them out"
        )
    options.fill(args, {"batches": corpus.BATCHES})
    tables.require("rich")
    device, backend = options.choose_device(args.device, args.backend)
    tolerances = (args.tolerance, args.tolerance / 10)
    if backend == "triton" and tolerances[1] < MIN_TOLERANCE:
        raise UsageError(
            f"argument --tolerance: a tenth of it must be at least {MIN_TOLERANCE:g} for the "
            f"Triton kernel, got {args.tolerance:g}"
        )
    path: Path | str | None = args.json
    if args.out is not None:
        if path is not None:
            raise UsageError("arguments --out and --json both say where the JSON goes: give one")
        path = args.out / "verify.json"
    output.check_files([("--out" if args.json is None else "--json", path)])
    begin = time.perf_counter()
    parts = corpus.make_parts(
        args.instances, args.seed, args.batches if args.traffic else 0, args.most_ranks
    )
    with progress([step for part in parts for step in part.steps], args.progress) as advance:
        verdicts = verify.compare(
            parts,
            tolerances=tolerances,
            backend=backend,
            device=device,
            dtype=torch.float32 if backend == "triton" else torch.float64,
            progress=lambda shape, n: advance(),
        )
    report = {
        "command": "verify",
        "options": {
            "instances": args.instances,
            "seed": args.seed,
            "backend": backend,
            "traffic": args.traffic,
            "batches": args.batches if args.traffic else None,
            "most_ranks": args.most_ranks,
        },
        "environment": environment(device),
        "seconds": time.perf_counter() - begin,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }
    files = output.Files()
    if path not in (None, "-"):
        files.add("figures", path, output.json_text(report))
    target = out.console(args.json)
    tables.show_verdicts(target, verdicts, title=f"against HiGHS, {backend} on {device}")
    if path == "-":
        out.write(output.json_text(report))
    files.close(target)
    return OK if all(_is_good(v, args.tolerance) for v in verdicts) else FAILED


def _is_good(verdict: verify.Verdict, tolerance: float) -> bool:
    """Whether nothing is unsound, and enough was certified.

    Of random programs one in a thousand may miss the tighter tolerance in float32.
    """
    if verdict.tolerance >= tolerance:
        allowed = 0.0
    else:
        allowed = verdict.instances / 1000 if verdict.part == "random" else float("inf")
    return verdict.sound and verdict.not_certified <= allowed
