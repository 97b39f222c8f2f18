"""Validation of r2o matrices, and their inverses."""

from __future__ import annotations

from collections import Counter

import torch

from lplb_triton._checks import on_host

_INTEGER_DTYPES = frozenset(
    {
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    }
)
_MAX_LISTED = 4


def validate(r2o: object) -> torch.Tensor:
    """Check a redundant-to-original matrix and return it in canonical form.

    Parameters
    ----------
    r2o : torch.Tensor or array
        ``[group_size, num_redundants]``, any integer dtype, any device. Arrays are objects with
        ``__array__``, such as NumPy's.

    Returns
    -------
    torch.Tensor
        A contiguous int32 copy on the CPU, never sharing memory with the input.

    Raises
    ------
    TypeError
        If `r2o` is neither a tensor nor an array, or its dtype is not an integer type.
    ValueError
        If `r2o` is not 2-D or empty, or if a column has an entry that is not a rank of the group,
        is not a permutation, or maps a rank to itself. The message names the column.
    """
    return checked_topology("r2o", r2o)


def checked_topology(name: str, r2o: object) -> torch.Tensor:
    """Validate an argument of any name as `validate` does."""
    if isinstance(r2o, torch.Tensor):
        matrix = r2o.detach()
    elif hasattr(r2o, "__array__"):
        try:
            matrix = torch.tensor(r2o, device="cpu")
        except TypeError as error:
            raise TypeError(f"{name} must have an integer dtype: {error}") from None
    else:
        raise TypeError(f"{name} must be a tensor or an array, got {type(r2o).__name__}")
    if matrix.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {matrix.dtype}")
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} must have 2 dimensions [group_size, num_redundants], "
            f"got {matrix.ndim}: shape {list(matrix.shape)}"
        )
    if matrix.numel() == 0:
        raise ValueError(
            f"{name} must have at least one rank (row) and one redundant slot (column), "
            f"got shape {list(matrix.shape)}"
        )
    columns = on_host(name, matrix).T.tolist()
    for d, column in enumerate(columns):
        _check_column(f"{name} column {d}", column)
    return torch.tensor(columns, dtype=torch.int32, device="cpu").T.contiguous()


def inverse(r2o: object) -> torch.Tensor:
    """Return the original-to-redundant matrix of a topology.

    Parameters
    ----------
    r2o : torch.Tensor or array
        ``[group_size, num_redundants]``, as for :func:`validate`.

    Returns
    -------
    torch.Tensor
        `o2r`, ``[group_size, num_redundants]`` int32 on the CPU: the copy of the ``d``-th
        replicated expert of rank ``i`` is on rank ``o2r[i, d]``, in its slot ``d``. Each column
        is the inverse permutation of the same column of `r2o`.

    Raises
    ------
    TypeError, ValueError
        As :func:`validate`.
    """
    return validate(r2o).argsort(dim=0).to(torch.int32).contiguous()


def _check_column(which: str, column: list[int]) -> None:
    """Raise naming the column unless it is a permutation of the ranks without fixed points."""
    size = len(column)
    for rank, source in enumerate(column):
        if not 0 <= source < size:
            raise ValueError(f"{which} must hold ranks 0..{size - 1}, got {source} for rank {rank}")
    missing = sorted(set(range(size)).difference(column))
    if missing:
        repeated = sorted(source for source, times in Counter(column).items() if times > 1)
        raise ValueError(
            f"{which} must be a permutation of the ranks 0..{size - 1}: "
            f"{_list_ranks(repeated)} more than once, {_list_ranks(missing)} missing"
        )
    fixed = [rank for rank, source in enumerate(column) if rank == source]
    if fixed:
        raise ValueError(
            f"{which} must not map a rank to itself (its copy would be on the rank that "
            f"has the original), got {_list_ranks(fixed)} unmoved"
        )


def _list_ranks(ranks: list[int]) -> str:
    """List some ranks for a message."""
    word = "rank" if len(ranks) == 1 else "ranks"
    more = f" and {len(ranks) - _MAX_LISTED} more" if len(ranks) > _MAX_LISTED else ""
    return f"{word} {', '.join(map(str, ranks[:_MAX_LISTED]))}{more}"
