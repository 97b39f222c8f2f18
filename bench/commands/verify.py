"""``lplb-bench verify``."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lplb_triton.bench import options, output, tables, verify
from lplb_triton.bench.commands.balance import choose_device
from lplb_triton.bench.instances import SHAPES
from lplb_triton.bench.machine import environment
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import FAILED, OK, Output
from lplb_triton.bench.progress import progress
from lplb_triton.solver import DEFAULT_TOLERANCE
from lplb_triton.solver import MIN_TOLERANCE_FLOAT32 as MIN_TOLERANCE

__all__ = ["add", "run"]

MOST_INSTANCES = 10**7


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "verify",
        run,
        parents=(options.solver_options(), options.progress_option()),
        help="hold the solver against HiGHS on random programs",
        description=(
            "Solve random programs of every shape and load family, and compare each with HiGHS:\n"
            "plan feasible, bound <= optimum <= largest load (to 1e-6), gap within the tolerance.\n"
            "The tolerance is --tolerance and a tenth of it. --out writes DIR/verify.json, --json\n"
            "a file of your own name."
        ),
        examples=(
            "  lplb-bench verify --instances 170 --device cpu\n"
            "  lplb-bench verify --tolerance 1e-4 --json -"
        ),
    )
    sub.add_argument(
        "--instances", type=partial(options.count, most=MOST_INSTANCES), default=2040,
        metavar="N", help="default %(default)s",
    )  # fmt: skip
    sub.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="default %(default)s"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Compare, and judge."""
    options.fill(args, {"tolerance": DEFAULT_TOLERANCE})
    tables.require("rich")
    device, backend = choose_device(args.device, args.backend)
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
    with progress([(shape, 1) for shape in SHAPES], args.progress) as advance:
        verdicts = verify.verify(
            args.instances,
            seed=args.seed,
            tolerances=tolerances,
            backend=backend,
            device=device,
            dtype=torch.float32 if backend == "triton" else torch.float64,
            progress=lambda shape, n: advance(),
        )
    report = {
        "command": "verify",
        "options": {"instances": args.instances, "seed": args.seed, "backend": backend},
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
    # One in a thousand may miss the tighter tolerance in float32; nothing may be unsound.
    good = all(
        v.sound and v.not_certified <= (v.instances / 1000 if v.tolerance < args.tolerance else 0)
        for v in verdicts
    )
    return OK if good else FAILED
