"""``lplb-bench report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lplb_triton.bench import options, output
from lplb_triton.bench import report as reports
from lplb_triton.bench.commands import balance
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output

__all__ = ["add", "run"]

# Options for balancing a trace; they do not apply to a finished report of ``balance``.
_FOR_TRACES = (
    *("ep", "placement", "slots", "history", "layers", "progress", "ranks_per_node"),
    *("backend", "device", "tolerance", "json"),
)


def add(commands: Any) -> None:
    """Add the parser."""
    sub = options.add_command(
        commands,
        "report",
        run,
        parents=(options.solver_options(), options.progress_option()),
        help="one HTML page from a trace or from what balance wrote",
        description=(
            "Write report.html, one page that needs no network: what balancing gains, from which\n"
            "batch size on, and what to change; rank loads over time and by layer, and where the\n"
            "rest comes from. From the JSON of balance at once, into its folder or --out; a trace\n"
            "is balanced first, as by lplb-bench balance with the same options."
        ),
        examples=(
            "  lplb-bench report lplb-bench-results/balance.json\n"
            "  lplb-bench report trace.npz --ep 16 --slots 1 --out results\n"
            "  lplb-bench report packaged"
        ),
    )
    sub.add_argument(
        "file", type=Path, metavar="FILE", help=f"trace ({options.TRACE_HELP}), or balance.json"
    )
    options.add_balance(sub)
    balance.add_nodes(sub)


def run(args: argparse.Namespace, out: Output) -> int:
    """Lay out a report, or balance a trace first."""
    try:
        found = reports.read(args.file)
    except (OSError, ValueError) as error:
        raise UsageError(f"argument FILE: {options.describe_error(error, args.file)}") from error
    if found is None:
        if args.json is not None and args.out is None:
            raise UsageError("argument --json: needs --out beside it, for report.html")
        args.trace, args.report = args.file, None
        return balance.run(args, out, "FILE")
    options.refuse(args, _FOR_TRACES, f"{args.file} is a report, which is only laid out")
    path = (args.file.parent if args.out is None else args.out) / "report.html"
    output.check_files([("--out", path)], [("FILE", args.file)])
    try:
        page = reports.html(found)
    except ValueError as error:
        raise UsageError(f"argument FILE: {args.file}: {error}") from error
    files = output.Files()
    files.add("report", path, page)
    files.close(out.console())
    return OK
