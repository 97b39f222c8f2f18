"""Options that commands share: types of arguments, defaults, limits; no work."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from lplb_triton import topologies
from lplb_triton.bench.balance.placements import BY_HISTORY
from lplb_triton.solver import DEFAULT_TOLERANCE, resolve_backend
from lplb_triton.solver import MIN_TOLERANCE_FLOAT32 as MIN_TOLERANCE
from lplb_triton.testing.instances import named_topology, shape_placement
from lplb_triton.traces import trace as traces

__all__ = [
    "BALANCE_DEFAULTS",
    "EP",
    "HISTORY",
    "PACKAGED",
    "SLOTS",
    "TRACE_HELP",
    "UsageError",
    "add_balance",
    "add_command",
    "add_ep",
    "add_placement",
    "add_slots",
    "check_batches",
    "check_divides",
    "describe_error",
    "choose_device",
    "count",
    "fill",
    "given",
    "history",
    "integers",
    "layers",
    "load_trace",
    "names",
    "name_divisors",
    "output_files",
    "penalty",
    "placements",
    "progress_option",
    "rate",
    "refuse",
    "seconds",
    "seed",
    "shapes",
    "slots",
    "solver_options",
    "tolerance",
    "trace_options",
]

# Defaults that the commands share.
EP, SLOTS, HISTORY = (32,), (1, 2), 0.5
BALANCE_DEFAULTS: Mapping[str, Any] = {
    "ep": EP,
    "placement": ("eplb",),
    "slots": SLOTS,
    "history": HISTORY,
    "tolerance": DEFAULT_TOLERANCE,
}
# The word for the packaged trace; every file of a trace has an ending.
PACKAGED = "packaged"
TRACE_HELP = f".npz or .json, or {PACKAGED!r}: the trace that comes with the package"
# Largest integer of an option: sizes are int32, as tokens are.
MOST = 2**31 - 1
# Numbers of layers and of seeds that a range may have.
MOST_LAYERS = 10**6

# Limits on the experts of a layer, and on the widths of the model and of an expert.
MOST_EXPERTS, MOST_WIDTH = 2**14, 2**17


# A parser, or a group of its options.
Arguments: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup


class UsageError(Exception):
    """Wrong usage, reported in one line with exit code 2."""


def add_command(
    commands: Any,
    name: str,
    run: Callable[..., int],
    *,
    help: str,
    description: str,
    examples: str,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add a subcommand, with examples of its own below its help.

    Parameters
    ----------
    commands
        What `argparse.ArgumentParser.add_subparsers` returned.
    name, help, description, parents
        As for its ``add_parser``.
    run
        Called with the parsed arguments and the `lplb_triton.bench.output.Output`; returns the
        exit code.
    examples
        Lines for the end of its help.

    Returns
    -------
    argparse.ArgumentParser
    """
    sub: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=list(parents),
        help=help,
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument(
        "--quiet", "-q", action="store_true",
        help="show no progress: results, warnings and errors only",
    )  # fmt: skip
    sub.set_defaults(run=run)
    return sub


def output_files() -> argparse.ArgumentParser:
    """Return the options of the files that most commands write."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("output")
    group.add_argument(
        "--json", metavar="PATH|-",
        help="write the JSON there; - prints it to stdout and everything else to stderr",
    )  # fmt: skip
    group.add_argument(
        "--markdown", metavar="PATH|-",
        help="write the tables as Markdown there; - prints them to stdout instead of the others",
    )  # fmt: skip
    return parent


def progress_option() -> argparse.ArgumentParser:
    """Return the option that decides whether progress is shown."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None,
        help="show on stderr what is being worked on, which of how many, and the time since the "
        "start (default: where stderr is a terminal; otherwise a line for each)",
    )  # fmt: skip
    return parent


def solver_options() -> argparse.ArgumentParser:
    """Return the options of the solver, and of the files that ``balance`` writes."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("solver and output")
    group.add_argument(
        "--backend", choices=("torch", "triton"),
        help="default: the Triton kernel on cuda, its torch twin on cpu; never replaced silently",
    )  # fmt: skip
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    group.add_argument(
        "--tolerance", type=tolerance, metavar="GAP",
        help=f"certified relative gap asked of every LP (default {DEFAULT_TOLERANCE:g})",
    )  # fmt: skip
    group.add_argument("--out", type=Path, metavar="DIR", help="folder for the files")
    group.add_argument(
        "--json", metavar="PATH|-",
        help="write the JSON there; - prints it to stdout and everything else to stderr",
    )  # fmt: skip
    return parent


def add_ep(sub: Arguments, default: tuple[int, ...] | None = EP) -> None:
    """Add ``--ep``, the same for every command that takes several sizes."""
    sub.add_argument(
        "--ep", type=integers(1), default=default, metavar="N[,N...]",
        help=f"numbers of expert-parallel ranks (default {_listed(EP)})",
    )  # fmt: skip


def add_slots(sub: Arguments, least: int = 1, default: tuple[int, ...] | None = SLOTS) -> None:
    """Add ``--slots``, the same for every command."""
    sub.add_argument(
        "--slots", type=integers(least), default=default, metavar="N[,N...]",
        help=f"redundant slots per rank (default {_listed(SLOTS)})",
    )  # fmt: skip


def add_placement(sub: Arguments) -> None:
    """Add ``--placement``, None where it isn't given."""
    sub.add_argument(
        "--placement", "--placements", type=placements, metavar="NAME[,NAME...]",
        help=f"none, {', '.join((*BY_HISTORY, *topologies.available()))} (default eplb)",
    )  # fmt: skip


def trace_options(sub: argparse.ArgumentParser) -> None:
    """Add ``--history`` and ``--layers``, which say what of a trace is used."""
    sub.add_argument(
        "--history", type=history, metavar="PART|N",
        help=f"batches to place experts by: a part in (0, 1) or a number (default {HISTORY:g})",
    )  # fmt: skip
    sub.add_argument("--layers", type=layers, metavar="LIST", help="such as 0,2,4-7 (default: all)")


def add_balance(sub: argparse.ArgumentParser) -> None:
    """Add what ``balance`` and ``report`` have in common; None means `BALANCE_DEFAULTS`."""
    add_ep(sub, None)
    add_placement(sub)
    add_slots(sub, 0, None)
    trace_options(sub)


def _listed(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def given(args: argparse.Namespace, candidates: Iterable[str]) -> list[str]:
    """Which of these were given, by attribute; for options whose default is None.

    Parameters
    ----------
    args
        Parsed arguments.
    candidates
        Attributes.

    Returns
    -------
    list of str
        As written on a command line.
    """
    return [_option(name) for name in candidates if getattr(args, name) is not None]


def refuse(args: argparse.Namespace, candidates: Iterable[str], why: str) -> None:
    """Raise if an option was given that would have no effect.

    Parameters
    ----------
    args
        Parsed arguments.
    candidates
        Attributes that don't apply, None where they were not given.
    why
        Ends the message.

    Raises
    ------
    UsageError
        Naming every option that was given.
    """
    found = given(args, candidates)
    if found:
        plural = "s" if len(found) > 1 else ""
        raise UsageError(f"argument{plural} {', '.join(found)}: {why}")


def fill(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Set the options that were not given."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def integers(least: int, most: int = MOST) -> Callable[[str], tuple[int, ...]]:
    """Return a type of argument: integers separated by commas, repeated ones once."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            values = tuple(dict.fromkeys(int(part) for part in text.split(",")))
        except ValueError:
            values = ()
        if not values or min(values) < least or max(values) > most:
            raise argparse.ArgumentTypeError(
                f"expected integers from {least} to {most}, separated by commas, got {text!r}"
            )
        return values

    return parse


def count(text: str, most: int = MOST, least: int = 1) -> int:
    """Read one integer."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(
            f"expected one number, an integer from {least} to {most}, got {text!r}"
        )
    return value


def slots(text: str) -> int:
    """Read a number of slots, which may be none."""
    return count(text, least=0)


def seed(text: str) -> int:
    """Read a seed of random numbers."""
    return count(text, 2**63 - 1, 0)


def seconds(text: str) -> float:
    """Read a bound on time."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def rate(text: str) -> float:
    """Read a rate, such as gigabytes per second."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive finite rate, got {text!r}")
    return value


def penalty(text: str) -> float:
    """Read a price in mean rank loads."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number from 0 on, got {text!r}")
    return value


def tolerance(text: str) -> float:
    """Read a relative gap."""
    value = _number(text)
    if not MIN_TOLERANCE <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a gap in [{MIN_TOLERANCE:g}, 1), got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def history(text: str) -> float | int:
    """Read a part of a trace's batches, or their number."""
    value: float | int = 0
    try:
        value = int(text) if text.isdecimal() else float(text)
    except ValueError:
        pass
    if not 1 <= value <= MOST if isinstance(value, int) else not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a part in (0, 1) or a number of batches from 1 on, got {text!r}"
        )
    return value


def layers(text: str) -> tuple[int, ...]:
    """Read numbers and ranges, such as 0,2,4-7."""
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise argparse.ArgumentTypeError(
                f"expected numbers and ranges such as 0,2,4-7, got {part!r} in {text!r}"
            )
        upper = int(last) if dash else int(first)
        if upper < int(first) or upper > MOST_LAYERS:
            raise argparse.ArgumentTypeError(
                f"expected ranges that ascend, up to {MOST_LAYERS}, got {part!r}"
            )
        found.update(dict.fromkeys(range(int(first), upper + 1)))
    return tuple(found)


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a type of argument: some of these names."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"expected some of {', '.join(known)}, got {name!r}"
                )
        return found

    return parse


def placements(text: str) -> tuple[str, ...]:
    """Read names of placements and of topologies."""
    found = tuple(dict.fromkeys(text.split(",")))
    named = ("none", *BY_HISTORY)
    for name in found:
        if name in named:
            continue
        try:
            named_topology(name)
        except ValueError as error:
            known = ", ".join((*named, *topologies.available()))
            raise argparse.ArgumentTypeError(f"{error} (placements: {known})") from error
    return found


def shapes(text: str, *, make: Callable[..., object] = shape_placement) -> tuple[str, ...]:
    """Read names of shapes that ``make`` can make."""
    found = tuple(dict.fromkeys(text.split(",")))
    for name in found:
        try:
            make(name, np.random.default_rng(0))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name!r}: {error}") from error
    return found


def check_divides(sizes: Sequence[int], experts: int) -> None:
    """Raise unless every EP size divides the experts."""
    for ep in sizes:
        if experts % ep:
            what = f"{ep} does not divide the {experts} experts"
            raise UsageError(f"argument --ep: {what}; {name_divisors(experts)}")


def name_divisors(experts: int) -> str:
    """Say which EP sizes divide the experts."""
    found = [str(ep) for ep in range(2, experts + 1) if experts % ep == 0] or ["1"]
    return f"{', '.join(found)} would do" if len(found) < 16 else "give one of its divisors"


def describe_error(error: OSError | ValueError, path: Path) -> str:
    """Say why a file can't be read, without the name of an argument that users don't see."""
    if isinstance(error, OSError) and error.strerror is not None:
        missing = isinstance(error, FileNotFoundError)
        return f"{'no such file' if missing else error.strerror}: {str(path)!r}"
    return str(error).removeprefix("path: ")


def load_trace(path: Path | None, option: str = "--trace") -> tuple[traces.Trace, str]:
    """Load the trace of an option, or the packaged one; return it with its name."""
    try:
        if path is None or str(path) == PACKAGED:
            return traces.packaged(), "packaged trace"
        # Bytes of the name that are no text are shown as question marks.
        return traces.load(path), path.name.encode(errors="replace").decode()
    except (OSError, ValueError) as error:
        text = str(error) if path is None else describe_error(error, path)
        raise UsageError(f"argument {option}: {text}") from error


def check_batches(trace: traces.Trace, name: str) -> None:
    """Raise unless a trace has a batch to place by and another one to balance."""
    if trace.batches < 2:
        raise UsageError(
            f"{name} has 1 batch; at least 2 are needed, one to place by and one to balance"
        )


def choose_device(device: str | None, backend: str | None) -> tuple[str, str]:
    """Choose the device and the back end of the solver.

    Parameters
    ----------
    device, backend
        As given, or None.

    Returns
    -------
    tuple of str
        Device and backend.

    Raises
    ------
    UsageError
        If what was asked for isn't there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UsageError("argument --device: cuda was asked for, but torch finds no GPU")
    try:
        return device, resolve_backend(backend, torch.device(device))
    except (ImportError, ValueError) as error:
        raise UsageError(f"argument --backend: {error}") from error
