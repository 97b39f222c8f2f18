"""Files that the package writes and reads: replaced in a single step, and JSON that may be bad."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["parse_json", "replace_file", "temporary_path"]


def temporary_path(target: Path) -> Path:
    """Return the path of a temporary file of this process beside the target."""
    # The file lies in the same folder, so that os.replace stays within one file system.
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


@contextmanager
def replace_file(target: Path) -> Iterator[IO[bytes]]:
    """Open a file beside the target, which replaces it in a single step where the body succeeds.

    A reader sees the old file or the whole new one, and a body that fails leaves nothing behind.
    """
    temporary = temporary_path(target)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON.

    Parameters
    ----------
    text
        What to parse; bytes are UTF-8.
    name
        What it is, for messages.

    Returns
    -------
    object
        What it says.

    Raises
    ------
    ValueError
        If it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError:
        # The parser's own stack; the files of this package have a few levels.
        raise ValueError(f"{name}: JSON is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from error
