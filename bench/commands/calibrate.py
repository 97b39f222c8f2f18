"""``lplb-bench calibrate``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lplb_triton._layout import TIME_MOST_SLOTS
from lplb_triton.bench import advise, machine, options, output, tables
from lplb_triton.bench.advise.calibrate import calibrate, list_rows
from lplb_triton.bench.commands import gpu
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.bench.progress import progress
from lplb_triton.costs.files import lay_out_cost

__all__ = ["add", "run"]

DEFAULT_MODEL = "deepseek-v3"


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "calibrate",
        run,
        parents=(options.output_files(), options.progress_option()),
        help="measure a rank's expert products for plans by time, and save their cost",
        description=(
            "Measure torch's grouped products of one rank on this machine's GPU, for many numbers\n"
            "of rows of its experts, fit the model of lplb-bench advise to them, and write a cost\n"
            "for lplb_triton.TimeCost.load. It takes less than a minute."
        ),
        examples=(
            "  lplb-bench calibrate --model deepseek-v3 --slots 10 -o cost.json\n"
            "  lplb-bench calibrate --hidden 4096 --inner 1536 --slots 6 -o cost.json"
        ),
    )
    sub.add_argument(
        "--model", choices=tuple(advise.MODELS),
        help=f"sizes of a published model (default {DEFAULT_MODEL}); the following replace some",
    )  # fmt: skip
    for name, text in (("hidden", "width of the model"), ("inner", "inner width of an expert")):
        sub.add_argument(
            f"--{name}", type=partial(options.count, most=options.MOST_WIDTH), metavar="N",
            help=text,
        )  # fmt: skip
    sub.add_argument(
        "--slots", type=partial(options.count, most=TIME_MOST_SLOTS), required=True,
        metavar="N", help="slots of a rank, redundant ones too",
    )  # fmt: skip
    sub.add_argument(
        "--output", "-o", type=Path, required=True, metavar="PATH", help="file to write"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Measure, fit and save."""
    if str(args.output) == "-":
        raise UsageError("argument --output: give a path, not -")
    files = ("--json", args.json), ("--markdown", args.markdown), ("--output", args.output)
    output.check_files(files)
    device, timer = gpu.start(args)
    model = advise.MODELS[args.model or DEFAULT_MODEL]
    hidden, inner = args.hidden or model.hidden, args.inner or model.inner
    time_rank = advise.RankTimer(hidden, inner, args.slots, timer, device)
    name = machine.device_name()
    begin = time.perf_counter()
    with progress([(name, len(list_rows(args.slots)))], args.progress) as advance:

        def time_rows(rows: Sequence[int]) -> float:
            us = time_rank(rows)
            advance()
            return us

        cost, points, predicted = calibrate(
            hidden, inner, args.slots, time_rows, f"measured on this {name}", machine.pairs()
        )
    report = {
        "command": "calibrate",
        "hidden": hidden,
        "inner": inner,
        "slots": args.slots,
        "cost": {"wide_from": cost.wide_from, "source": cost.source, "digest": cost.digest},
        "environment": machine.environment("cuda"),
        "seconds": time.perf_counter() - begin,
        "rows": [
            {"rows": point.rows, "us": point.us, "predicted": us}
            for point, us in zip(points, predicted, strict=True)
        ],
    }
    written = output.Files()
    written.add("cost", args.output, lay_out_cost(cost))
    output.finish(args, out, report, [tables.make_calibration_grid(report)])
    written.close(out.console(args.json, args.markdown))
    return OK
