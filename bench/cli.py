"""The command ``lplb-bench``.

Exit codes: 0 done, 1 a check failed (an LP was not certified within the tolerance, an answer that
was to be timed is wrong), 2 the command was used wrongly, something it needs is missing (such as
a GPU) or its results can't be written, 130 interrupted, 141 the reader of a pipe went away before
everything was printed (files are complete).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from lplb_triton import SolveError, __version__
from lplb_triton._threads import one_thread
from lplb_triton.bench import tables
from lplb_triton.bench.commands import (
    advise,
    balance,
    calibrate,
    completion,
    ep,
    frameworks,
    live,
    pipeline,
    place,
    placement,
    record,
    report,
    scale,
    simulate,
    simulate_live,
    simulate_time,
    solve,
    verify,
    workloads,
)
from lplb_triton.bench.measure.timer import WrongAnswerError
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import CLOSED, FAILED, INTERRUPTED, OK, USAGE, Output, say, silence
from lplb_triton.testing.verify import NoOptimumError

__all__ = ["CLOSED", "FAILED", "INTERRUPTED", "OK", "USAGE", "main"]

_EPILOG = """\
lplb-bench COMMAND --help has examples of each.

exit codes: 0 done, 1 a check failed, 2 wrong usage, something missing or unwritable results,
130 interrupted, 141 the output's pipe was closed early (files are complete)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Torch and numpy's OpenBLAS are kept to one thread meanwhile. Where standard output can't be
    written any more, its file descriptor is pointed at the null device.

    Parameters
    ----------
    argv
        Arguments after the command's name; by default those of the process.

    Returns
    -------
    int
        The exit code. Wrong options end in `SystemExit` with code 2, as argparse has it.
    """
    out = Output()
    try:
        return out.exit_code(_run(argv, out))
    except SystemExit as stop:
        # Help was printed, or an option is wrong.
        raise SystemExit(out.exit_code(int(stop.code or OK))) from None
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def _run(argv: Sequence[str] | None, out: Output) -> int:
    """Run a command, and turn what may go wrong into a line and an exit code."""
    try:
        args = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace, Output], int] = args.run
        if args.quiet and getattr(args, "progress", None):
            raise UsageError("argument --progress: not with --quiet")
        with one_thread(), silence(args.quiet):
            return command(args, out)
    except (UsageError, tables.MissingExtraError) as error:
        say(f"error: {error}")
        return USAGE
    except WrongAnswerError as error:
        say(f"wrong answer, not timed: {error}")
        return FAILED
    except (SolveError, NoOptimumError) as error:
        say(f"failed: {error}")
        return FAILED
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        say(f"error: not enough memory for these sizes: {error}")
        return USAGE


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lplb-bench",
        description="Measure what lplb_triton does for recorded expert loads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lplb_triton {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    timed = (solve, pipeline, simulate, simulate_live, simulate_time, ep, frameworks)
    rest = (place, placement, live, workloads, record, advise, calibrate, scale)
    for module in (balance, report, verify, *timed, *rest):
        module.add(commands)
    completion.add(commands, parser)
    return parser
