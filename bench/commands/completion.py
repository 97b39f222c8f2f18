"""``lplb-bench completion``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lplb_triton.bench import options
from lplb_triton.bench.options import UsageError
from lplb_triton.bench.output import OK, Output

__all__ = ["SHELLS", "add", "make_completion", "run"]

SHELLS = ("bash", "zsh", "tcsh")
# Options whose path is no Path, since a dash means standard output.
PATHS = ("json", "markdown")


def add(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add the parser; ``parser`` is that of all commands."""
    sub = options.add_command(
        commands,
        "completion",
        run,
        help="print a script by which a shell completes commands and options",
        description=(
            "Print what a shell needs to complete commands, options and files. It needs the\n"
            "package shtab: pip install 'lplb_triton[completion]'."
        ),
        examples=(
            "  source <(lplb-bench completion bash)      in ~/.bashrc, say\n"
            "  lplb-bench completion zsh"
        ),
    )
    sub.add_argument("shell", choices=SHELLS, help="for which shell")
    sub.set_defaults(parser=parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the script."""
    out.write(make_completion(args.parser, args.shell) + "\n")
    return OK


def make_completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of one of `SHELLS`.

    Raises
    ------
    UsageError
        If shtab isn't installed.
    """
    try:
        import shtab  # an extra of its own, needed here only
    except ModuleNotFoundError as error:
        raise UsageError(
            "completion needs shtab, which is not installed: pip install 'lplb_triton[completion]'"
        ) from error
    for action in _list_actions(parser):
        if action.type is Path or action.dest in PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell=shell)
    return script


def _list_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """List the actions of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _list_actions(command)
