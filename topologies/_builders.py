"""The usual topologies, by function and by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# The limit keeps a mistyped size from taking all memory; entries are int32.
MAX_RANKS = 1 << 20


def ring(n: int) -> torch.Tensor:
    """Return a ring: every rank holds one copy, from the next rank.

    Parameters
    ----------
    n : int
        Ranks, from 2 to 2**20.

    Returns
    -------
    torch.Tensor
        `r2o`, ``[n, 1]`` int32 on the CPU, ``r2o[i, 0] = (i + 1) % n``.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer or out of range.
    """
    n = _check_size("n", n)
    return torch.arange(1, n + 1, dtype=torch.int32, device="cpu").remainder_(n).unsqueeze(1)


def cube(n: int = 8) -> torch.Tensor:
    """Return the cube of 8 ranks with two copies each: two rings of four, joined crosswise.

    Every rank can exchange tokens with four others, and no two ranks are more than two steps
    apart. Meant for the 8 GPUs of one host.

    Parameters
    ----------
    n : int
        Ranks; only 8 is possible.

    Returns
    -------
    torch.Tensor
        `r2o`, ``[8, 2]`` int32 on the CPU.

    Raises
    ------
    TypeError, ValueError
        If `n` is not the integer 8.

    Notes
    -----
    The matrix is the one in the README and the tests of DeepSeek's LPLB,
    https://github.com/deepseek-ai/LPLB (MIT licence).
    """
    if _check_size("n", n) != 8:
        raise ValueError(f"n must be 8 for a cube, got {n}")
    return _from_columns(
        [3, 0, 1, 2, 7, 4, 5, 6],
        [6, 7, 4, 5, 0, 1, 2, 3],
    )


def hypercube(n: int = 16) -> torch.Tensor:
    """Return the four-dimensional hypercube of 16 ranks with two copies each.

    The graph is that of a 4 x 4 torus, and of a 4-cube: four neighbours per rank, at most four
    steps between any two.

    Parameters
    ----------
    n : int
        Ranks; only 16 is possible.

    Returns
    -------
    torch.Tensor
        `r2o`, ``[16, 2]`` int32 on the CPU.

    Raises
    ------
    TypeError, ValueError
        If `n` is not the integer 16.

    Notes
    -----
    The matrix is the one in the tests of DeepSeek's LPLB, https://github.com/deepseek-ai/LPLB
    (MIT licence).
    """
    if _check_size("n", n) != 16:
        raise ValueError(f"n must be 16 for a hypercube, got {n}")
    return _from_columns(
        [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
        [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    )


def torus(m: int, n: int) -> torch.Tensor:
    """Return an ``m`` x ``n`` torus: one copy from the next row, one from the next column.

    Rank ``i * n + j`` is at row ``i``, column ``j``. With `m` hosts of `n` GPUs, slot 0 holds a
    copy from another host and slot 1 one from the same host.

    Parameters
    ----------
    m, n : int
        Rows and columns, each at least 2; at most 2**20 ranks.

    Returns
    -------
    torch.Tensor
        `r2o`, ``[m * n, 2]`` int32 on the CPU, ``r2o[i * n + j] = (((i + 1) % m) * n + j,
        i * n + (j + 1) % n)``.

    Raises
    ------
    TypeError, ValueError
        If `m` or `n` is not an integer or out of range.
    """
    m, n = _check_size("m", m), _check_size("n", n)
    if m * n > MAX_RANKS:
        raise ValueError(f"m and n must give at most {MAX_RANKS} ranks, got {m} x {n}")
    grid = torch.arange(m * n, dtype=torch.int32, device="cpu").view(m, n)
    return torch.stack((grid.roll(-1, 0).flatten(), grid.roll(-1, 1).flatten()), dim=1)


def available() -> tuple[str, ...]:
    """Return the names that :func:`from_name` knows; capital letters stand for sizes.

    Returns
    -------
    tuple of str
        One form for each builder, such as ``"cube"`` or ``"torus:MxN"``.
    """
    return tuple(entry.form for entry in _REGISTRY.values())


def from_name(name: str) -> torch.Tensor:
    """Build a topology from its name, such as ``"cube"``, ``"ring:8"`` or ``"torus:4x8"``.

    Parameters
    ----------
    name : str
        One of the forms in :func:`available`, with numbers for the capital letters.

    Returns
    -------
    torch.Tensor
        `r2o`, ``[group_size, num_redundants]`` int32 on the CPU.

    Raises
    ------
    TypeError
        If `name` is not a string.
    ValueError
        If `name` has none of the forms, or a size is out of range.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    kind, colon, sizes = name.partition(":")
    entry = _REGISTRY.get(kind)
    if entry is None:
        raise ValueError(f"name must be one of {', '.join(available())}; got {name!r}")
    parts = sizes.split("x") if colon else []
    if len(parts) != entry.n_sizes or not all(p.isascii() and p.isdigit() for p in parts):
        raise ValueError(
            f"name must have the form {entry.form!r}, got {name!r} "
            f"(available: {', '.join(available())})"
        )
    numbers = [int(part) for part in parts if len(part) <= len(str(MAX_RANKS))]
    sound = len(numbers) == len(parts) and all(number >= 2 for number in numbers)
    if not sound or entry.count_ranks(*numbers) > MAX_RANKS:
        raise ValueError(
            f"name must give sizes of at least 2 and at most {MAX_RANKS} ranks, got {name!r}"
        )
    return entry.build(*numbers)


def _check_size(name: str, value: Any) -> int:
    """Return an int from 2 to `MAX_RANKS`, or raise naming ``name``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if number < 2:
        raise ValueError(f"{name} must be at least 2, got {number}")
    if number > MAX_RANKS:
        raise ValueError(f"{name} must be at most {MAX_RANKS}, got {number}")
    return number


def _from_columns(*columns: list[int]) -> torch.Tensor:
    """Make a matrix of its columns."""
    return torch.tensor(columns, dtype=torch.int32, device="cpu").T.contiguous()


@dataclass(frozen=True)
class _Entry:
    """A topology with a name: its form, how many sizes follow it, its builder and its ranks."""

    form: str
    n_sizes: int
    build: Callable[..., torch.Tensor]
    # The ranks follow from the sizes, so that their limit is checked before the table is made.
    count_ranks: Callable[..., int]


_REGISTRY = {
    "ring": _Entry("ring:N", 1, ring, lambda n: n),
    "cube": _Entry("cube", 0, cube, lambda: 8),
    "hypercube": _Entry("hypercube", 0, hypercube, lambda: 16),
    "torus": _Entry("torus:MxN", 2, torus, lambda m, n: m * n),
}
