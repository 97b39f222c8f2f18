"""Show on standard error what is being worked on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, cast

from lplb_triton.bench import tables
from lplb_triton.bench.output import Stream, is_silent, tell

__all__ = ["progress"]


@contextmanager
def progress(
    parts: Sequence[tuple[str, int]], show: bool | None = None
) -> Iterator[Callable[[], None]]:
    """Show which part of how many is being worked on while the body runs, and since when.

    A terminal gets a bar that moves with every step, anything else a line for each part.

    Parameters
    ----------
    parts
        Name of each part, and its number of steps.
    show
        Whether to; by default only where standard error is a terminal. Where
        `lplb_triton.bench.output.silence` holds nothing is shown.

    Yields
    ------
    callable
        To call after every step, part by part.
    """
    stream = Stream("stderr")
    if is_silent() or (not show and (show is not None or not stream.isatty())):
        yield lambda: None
    elif stream.isatty():
        with _show_bar(parts, stream) as advance:
            yield advance
    else:
        yield _report_by_lines(parts)


def _step_labels(parts: Sequence[tuple[str, int]]) -> list[str]:
    """Return the line to show during each step."""
    return [
        f"{number} of {len(parts)}: {name}"
        for number, (name, steps) in enumerate(parts, 1)
        for _ in range(steps)
    ]


def _report_by_lines(parts: Sequence[tuple[str, int]]) -> Callable[[], None]:
    names, begun, done = _step_labels(parts), time.monotonic(), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done < len(names) and names[done] != names[done - 1]:
            tell(f"{time.monotonic() - begun:.0f} s, {names[done]}")

    if names:
        tell(f"0 s, {names[0]}")
    return advance


@contextmanager
def _show_bar(parts: Sequence[tuple[str, int]], stream: Stream) -> Iterator[Callable[[], None]]:
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    names = [escape(name) for name in _step_labels(parts)]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    target = tables.console(file=cast("IO[str]", stream))
    # Redirected output would be written to the same stream again, in a loop.
    with Progress(
        *columns, console=target, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task(names[0] if names else "", total=len(names))
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            bar.update(task, advance=1, description=names[min(done, len(names) - 1)])

        yield advance
