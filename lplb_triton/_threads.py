"""One thread for work whose operations are too small to share.

Torch's CPU operations end in a barrier of all its threads, which spin there. A program of the LP is
a few thousand numbers, so threads gain nothing; and where other processes want the same cores,
every barrier waits until the last thread has been given one, while the others burn theirs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["one_thread"]

# Names that builds of OpenBLAS give to a function: SciPy's builds have a prefix, 64-bit ones a
# suffix.
_BLAS_NAMES = tuple(
    f"{prefix}openblas_{{}}_num_threads{suffix}"
    for prefix in ("scipy_", "")
    for suffix in ("64_", "")
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch, and the OpenBLAS that numpy and SciPy came with, to one thread in the body.

    It holds for the whole process, and what was set before is set again at the end. Libraries that
    are loaded in the body, and processes that it starts, are not touched.
    """
    pools = [(torch.get_num_threads, torch.set_num_threads), *_openblas()]
    before = [(change, count()) for count, change in pools]
    try:
        for change, _ in before:
            change(1)
        yield
    finally:
        for change, threads in before:
            change(threads)


def _openblas() -> list[tuple[Callable[[], int], Callable[[int], object]]]:
    """Functions that read and set the threads of every OpenBLAS in this process."""
    found: list[tuple[Callable[[], int], Callable[[int], object]]] = []
    for path in _loaded("openblas"):
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
        except OSError:
            continue
        for name in _BLAS_NAMES:
            count = getattr(library, name.format("get"), None)
            change = getattr(library, name.format("set"), None)
            if count is not None and change is not None:
                found.append((count, change))
                break
    return found


def _loaded(word: str) -> list[str]:
    """Paths of the loaded libraries with this word in their name; none where /proc is missing."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    return [path for path in dict.fromkeys(paths) if word in Path(path).name.lower()]
