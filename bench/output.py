"""Write results: files first, then the terminal."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from lplb_triton.bench import tables
from lplb_triton.bench.machine import machine_line
from lplb_triton.bench.options import UsageError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "CLOSED",
    "FAILED",
    "INTERRUPTED",
    "OK",
    "USAGE",
    "Files",
    "Output",
    "Stream",
    "check_files",
    "finish",
    "is_silent",
    "json_text",
    "make_folder",
    "say",
    "silence",
    "tell",
    "write",
]

# 141 is what a shell reports for a command that a closed pipe ended, 130 for Ctrl-C.
OK, FAILED, USAGE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141


class Stream:
    """Standard output or error; the first write that fails is kept, and later ones are dropped.

    Parameters
    ----------
    name
        ``"stdout"`` or ``"stderr"``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.error: OSError | None = None

    @property
    def encoding(self) -> str:
        """Return the encoding of the stream."""
        return getattr(getattr(sys, self._name), "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Say whether the stream is a terminal."""
        stream = getattr(sys, self._name)
        return stream is not None and bool(stream.isatty())

    def write(self, text: str) -> int:
        """Write, or drop what can't be written."""
        stream = getattr(sys, self._name)
        if self.error is None:
            if stream is None:
                self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
                return len(text)
            try:
                # What the terminal can't show, such as half of a name in UTF-8, is escaped.
                encoding = self.encoding
                stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self._discard_rest(stream, error)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        stream = getattr(sys, self._name)
        if self.error is None and stream is not None:
            try:
                stream.flush()
            except OSError as error:
                self._discard_rest(stream, error)

    def _discard_rest(self, stream: IO[str], error: OSError) -> None:
        """Keep the error, and send what is still buffered to the null device when Python ends."""
        self.error = error
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except OSError:
            # The stream is no file of the system.
            return


class Output:
    """Standard output of one command: it may end early without ending the command."""

    def __init__(self) -> None:
        self._stdout = Stream("stdout")

    def console(self, *paths: str | None) -> Console:
        """Return the console for tables: standard error if a file goes to standard output."""
        stream = Stream("stderr") if "-" in paths else self._stdout
        return tables.console(file=cast("IO[str]", stream))

    def write(self, text: str) -> None:
        """Write to standard output."""
        self._stdout.write(text)
        self._stdout.flush()

    def exit_code(self, code: int) -> int:
        """Exit code of a command, given what it found and whether its output arrived.

        Parameters
        ----------
        code
            Of the command itself; one that isn't `OK` stays.

        Returns
        -------
        int
            `CLOSED` if the reader of a pipe went away, `USAGE` for any other failure, such as a
            full disk, which is reported.
        """
        self._stdout.flush()
        error = self._stdout.error
        if error is None or code != OK:
            return code
        if isinstance(error, BrokenPipeError):
            return CLOSED
        say(f"error: cannot write to stdout: {error.strerror}")
        return USAGE


_silent = False


@contextmanager
def silence(silent: bool) -> Iterator[None]:
    """Leave out, while the body runs, what `tell` writes and what shows progress."""
    global _silent
    before, _silent = _silent, silent
    try:
        yield
    finally:
        _silent = before


def is_silent() -> bool:
    """Whether progress is left out."""
    return _silent


def tell(text: str) -> None:
    """Write a line about progress to standard error, unless that is silenced."""
    if not _silent:
        say(text)


def say(text: str) -> None:
    """Write a line to standard error; a failure to write is ignored."""
    stream = Stream("stderr")
    stream.write(f"lplb-bench: {text}\n")
    stream.flush()


class Files:
    """Files of one command, each written at once; failures are reported at the end."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._error: UsageError | None = None

    def add(self, label: str, path: Path | str, content: str | bytes) -> None:
        """Write a file; if that fails, the others are still written and the tables printed."""
        data = content if isinstance(content, bytes) else content.encode(errors="replace")
        try:
            write(Path(path), data)
            self._lines.append(f"{label}: {path}")
        except UsageError as error:
            self._error = self._error or error

    def close(self, target: Console) -> None:
        """Print where the files are.

        Raises
        ------
        UsageError
            If one could not be written.
        """
        for line in self._lines:
            target.print(line, markup=False, soft_wrap=True)
        if self._error is not None:
            raise self._error


def finish(
    args: argparse.Namespace, out: Output, report: dict[str, Any], grids: Sequence[tables.Grid]
) -> None:
    """Write JSON and Markdown, then print the tables and the machine that they are of.

    Parameters
    ----------
    args
        With ``json`` and ``markdown``: paths, dashes or None.
    out
        Standard output.
    report
        What becomes JSON.
    grids
        Tables.

    Raises
    ------
    UsageError
        If a file could not be written; everything else has been by then.
    """
    machine, files = machine_line(report), Files()
    text = f"{machine}\n\n{tables.markdown(grids)}"
    if args.markdown not in (None, "-"):
        files.add("tables", args.markdown, text)
    if args.json not in (None, "-"):
        files.add("figures", args.json, json_text(report))
    target = out.console(args.json, args.markdown)
    if args.markdown == "-":
        out.write(text)
    else:
        target.print(machine, markup=False, soft_wrap=True)
        tables.show_grids(target, grids)
    if args.json == "-":
        out.write(json_text(report))
    files.close(target)


def json_text(report: dict[str, Any]) -> str:
    """Return a report as JSON that ends with a newline."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def check_files(
    outputs: Iterable[tuple[str, Path | str | None]],
    inputs: Iterable[tuple[str, Path | None]] = (),
) -> None:
    """Refuse, before any work, what can't be written, and make missing folders.

    Parameters
    ----------
    outputs
        Option and path of every file; a dash is standard output, None no file.
    inputs
        The same of the files that are read.

    Raises
    ------
    UsageError
        If a path is a folder or its folder can't be made or written to, two outputs are the same,
        or an output would replace an input.
    """
    seen: dict[Path | str, str] = {}
    folders: dict[Path, str] = {}
    reads = {_real_path(path): option for option, path in inputs if path is not None}
    for option, path in outputs:
        if path is None:
            continue
        if path == "-":
            if "-" in seen:
                raise UsageError(f"arguments {seen['-']} and {option} cannot both print to stdout")
            seen["-"] = option
            continue
        whole = _real_path(Path(path))
        for others, what in ((seen, "and {} would both write"), (reads, "would replace")):
            if whole in others:
                raise UsageError(f"argument {option} {what.format(others[whole])} {str(path)!r}")
        seen[whole] = option
        try:
            folder, device = whole.is_dir(), whole.exists() and not whole.is_file()
        except OSError as error:
            raise UsageError(f"argument {option}: {error.strerror}: {str(path)!r}") from error
        if folder:
            raise UsageError(f"argument {option}: expected a file, got the folder {str(path)!r}")
        if not device:
            folders.setdefault(whole.parent, option)
        elif not os.access(whole, os.W_OK):
            raise UsageError(f"argument {option}: {str(path)!r} may not be written")
    for parent, option in folders.items():
        make_folder(parent, option)
        if not os.access(parent, os.W_OK):
            raise UsageError(f"argument {option}: the folder {parent} may not be written to")


def _real_path(path: Path) -> Path:
    # Unlike Path.resolve, this can't fail on a loop of links.
    return Path(os.path.realpath(path))


def make_folder(path: Path, option: str) -> None:
    """Make a folder that isn't there, for a file that came by an option.

    Raises
    ------
    UsageError
        If it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"argument {option}: cannot make the folder {path}: {error.strerror}"
        ) from error


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that an interrupted run leaves the old one or none.

    Devices, pipes and links stay what they are: they are written to.

    Raises
    ------
    UsageError
        If it can't be written.
    """
    temporary = None
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(content)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
