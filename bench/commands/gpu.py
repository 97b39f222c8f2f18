"""Options and checks shared by the commands that time on a GPU."""

from __future__ import annotations

import argparse
import os

import torch

from lplb_triton.bench import options, output, tables
from lplb_triton.bench.measure.timer import GraphTimer, Timer
from lplb_triton.bench.options import UsageError
from lplb_triton.solver import DEFAULT_TOLERANCE

__all__ = [
    "check_files",
    "check_gpu",
    "start",
    "timing_parents",
]


def start(args: argparse.Namespace) -> tuple[torch.device, Timer]:
    """Check files and GPU before the work starts, and make the timer."""
    tables.require("rich")
    check_files(args)
    check_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    return device, GraphTimer(device)


def check_files(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written."""
    output.check_files([("--json", args.json), ("--markdown", args.markdown)])


def check_gpu() -> None:
    """Raise an error if kernels can't be timed here."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UsageError(
            "TRITON_INTERPRET is set: kernels would run in Triton's interpreter, whose times say "
            "nothing; unset it"
        )
    if not torch.cuda.is_available():
        raise UsageError("kernels can only be timed on a GPU, but torch finds none")


def timing_parents() -> tuple[argparse.ArgumentParser, ...]:
    """Make the options that every command which times kernels has."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--tolerance", type=options.tolerance, default=DEFAULT_TOLERANCE, metavar="GAP",
        help="certified relative gap asked of every LP (default %(default)g)",
    )  # fmt: skip
    return common, options.output_files(), options.progress_option()
