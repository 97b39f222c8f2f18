"""Represent tables, draw them on a terminal with rich, and write them as Markdown."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


__all__ = [
    "Grid",
    "MissingExtraError",
    "console",
    "markdown",
    "require",
    "show_grids",
]


class MissingExtraError(RuntimeError):
    """A package of the ``bench`` extra is not installed."""


def require(module: str) -> None:
    """Import a module of the ``bench`` extra, or raise an error that says how to install it.

    Parameters
    ----------
    module
        Name of the module, such as ``"rich"``.

    Raises
    ------
    MissingExtraError
        If it isn't installed.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"lplb-bench needs {module}, which is not installed: pip install 'lplb_triton[bench]'"
        ) from error


def console(file: IO[str] | None = None) -> Console:
    """Return a console that writes to a file, by default to stdout."""
    require("rich")
    from rich.console import Console

    return Console(file=file, highlight=False)


@dataclass(frozen=True)
class Grid:
    """A table of strings, for the terminal and for Markdown alike.

    Attributes
    ----------
    title : str
        Title of the table.
    header : tuple of str
        Names of the columns; the first holds text, the others numbers.
    rows : list of tuple of str
        One cell per column.
    notes : tuple of str
        Lines below the table.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def show_grids(target: Console, grids: Sequence[Grid]) -> None:
    """Print tables.

    Parameters
    ----------
    target
        Console to print to.
    grids
        Tables in order.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    for grid in grids:
        table = Table(
            title=escape(grid.title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for index, name in enumerate(grid.header):
            header = name.replace(" ", "\n")
            table.add_column(header, justify="right" if index else "left", no_wrap=True)
        for row in grid.rows:
            table.add_row(*(escape(cell) for cell in row))
        target.print(table)
        for note in grid.notes:
            target.print(escape(note), soft_wrap=True)


def markdown(grids: Sequence[Grid]) -> str:
    """Write tables in Markdown.

    Parameters
    ----------
    grids
        Tables in order.

    Returns
    -------
    str
        Ends with a newline.
    """
    parts = []
    for grid in grids:
        lines = [grid.header, ("---",) * len(grid.header), *grid.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append("\n\n".join([f"### {grid.title}", table, *grid.notes]))
    return "\n\n".join(parts) + "\n"
