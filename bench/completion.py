"""Write what a shell needs to complete the options of ``lplb-bench``, by the package shtab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lplb_triton.bench.options import UsageError

__all__ = ["SHELLS", "PrintCompletion", "make_completion"]

SHELLS = ("bash", "zsh", "tcsh")
# Options whose path is no Path, since a dash means standard output.
PATHS = ("json", "markdown")


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
            "argument --print-completion: needs shtab, which is not installed: "
            "pip install 'lplb_triton[completion]'"
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


class PrintCompletion(argparse.Action):
    """Print the completion script and exit, whatever else is on the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Print the script for the shell that was given."""
        print(make_completion(parser, str(values)))
        parser.exit()
