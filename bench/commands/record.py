"""``lplb-bench record``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lplb_triton.bench import options, output
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output
from lplb_triton.traces import ranks
from lplb_triton.traces import trace as traces

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "record",
        run,
        help="check and merge the files of a recorder",
        description=(
            "Recording itself is done in your script, by lplb_triton.traces.record.Recorder.\n"
            "This command checks the files it wrote, says what is in them, and merges one file\n"
            "per rank into one trace."
        ),
        examples=(
            "  in your script:\n"
            "    with Recorder('trace.npz', n_experts=256, layers=58) as recorder:\n"
            "        ...\n"
            "        recorder.add(layer, topk_ids)   # in every MoE layer\n"
            "        recorder.step()                 # after every batch\n"
            "  then:\n"
            "    lplb-bench record --merge trace.npz trace.rank*.npz\n"
            "    lplb-bench balance --trace trace.npz"
        ),
    )
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help="traces (.npz or .json)")
    sub.add_argument(
        "--merge", type=Path, metavar="PATH", help="write the files of all ranks as one trace there"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Merge, and say what is in the files."""
    try:
        if args.merge is not None:
            for note in ranks.merge_into(args.merge, args.files):
                output.say(f"warning: {note}")
        for path in args.files if args.merge is None else [args.merge]:
            found = traces.load(path)
            out.write(
                f"{path}: {found.batches} batches (steps {found.steps[0]} to {found.steps[-1]}), "
                f"{found.layers} layers, {found.sources} sources, {found.experts} experts, "
                f"{int(found.totals().sum())} assignments\n"
            )
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    return OK
