"""A single CPU thread for work whose operations are too small to be divided among threads.

Torch's CPU operations end in a barrier at which all its threads spin. An instance of the LP is a
few thousand numbers, so more threads gain nothing. If other processes use the same cores, every
barrier waits until the last thread has got a core, while the other threads keep theirs busy.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["one_thread"]

# Names of one function in different builds of OpenBLAS: SciPy's builds add a prefix, 64-bit builds
# a suffix.
_BLAS_NAMES = tuple(
    f"{prefix}openblas_{{}}_num_threads{suffix}"
    for prefix in ("scipy_", "")
    for suffix in ("64_", "")
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch, and the OpenBLAS of numpy and SciPy, to one thread within the context.

    The limit holds for the whole process. At the end the earlier settings are restored. Libraries
    that are loaded within the context, and processes that it starts, keep their own settings.
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
    """Return functions that read and set the threads of every OpenBLAS in this process."""
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
    """Return paths of loaded libraries with this word in their name; none if /proc is missing."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    return [path for path in dict.fromkeys(paths) if word in Path(path).name.lower()]
