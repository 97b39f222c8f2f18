"""Numbers by copy in two forms: a dense tile, or cells.

Newton's method has one number for each copy of each column. For any mask that is a tile [G, C], and
numbers by column are [1, C]. From counts, where placements have tables, it is cells [N], as many
numbers as there are copies, and numbers by column are [C]. By rank they are [G] in either form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton.kernels.tiles import _column_sum


class Tile(NamedTuple):
    """The dense form."""

    there: Any
    """Whether there is such a copy."""
    rank_on: Any
    """By rank, whether there is such a one."""
    n_ranks: Any


class Cells(NamedTuple):
    """The other one; tables as in `SolveTables`."""

    there: Any
    """Whether there is such a cell."""
    rank_on: Any
    """By rank, whether there is such a one."""
    n_ranks: Any
    rank: Any
    """By cell, its rank and its column."""
    column: Any
    start: Any
    """By column, its first cell."""
    n_copies: Any
    """By column, how many cells it has."""
    most_copies: Any
    """The largest of these."""
    rank_cells_ptrs: Any
    """By rank, into ``rank_cells``."""
    most_cells: Any
    """Most cells of a rank."""
    cell_number_ptr: Any
    n_columns: Any
    factor_ptr: Any
    """Scratch for a matrix [G, G],"""
    vectors_ptr: Any
    """for two numbers by rank [2, G],"""
    values_ptr: Any
    """and by cell."""


@triton.jit
def _of_columns(values, form, BY_CELL: tl.constexpr):
    """Give each copy what its column has."""
    if BY_CELL:
        values = tl.gather(values, form.column, 0)
    return values


@triton.jit
def _of_ranks(values, form, BY_CELL: tl.constexpr):
    """Give each copy what its rank has."""
    if BY_CELL:
        values = tl.gather(values, form.rank, 0)
    else:
        values = values[:, None]
    return values


@triton.jit
def _of_cells(values, cell, none):
    """Find what cells hold; ``none`` for -1."""
    return tl.where(cell >= 0, tl.gather(values, tl.maximum(cell, 0), 0), none)


@triton.jit
def _sum_columns(values, form, BY_CELL: tl.constexpr):
    """Sum by column."""
    if BY_CELL:
        total = tl.zeros(form.start.shape, tl.float32)
        for k in range(form.most_copies):
            total += _of_cells(values, tl.where(k < form.n_copies, form.start + k, -1), 0.0)
    else:
        total = _column_sum(values)
    return total


@triton.jit
def _least_of_columns(values, none, form, BY_CELL: tl.constexpr):
    """Least by column, or ``none`` in a column without copies; no value is larger than that."""
    if BY_CELL:
        least = tl.zeros(form.start.shape, tl.float32) + none
        for k in range(form.most_copies):
            cell = tl.where(k < form.n_copies, form.start + k, -1)
            least = tl.minimum(least, _of_cells(values, cell, none))
    else:
        least = tl.min(tl.where(form.there, values, none), 0, keep_dims=True)
    return least


@triton.jit
def _sum_ranks(values, form, BY_CELL: tl.constexpr):
    """Sum by rank."""
    if BY_CELL:
        ptrs = form.rank_cells_ptrs
        total = tl.zeros(ptrs.shape, tl.float32)
        for _ in range(form.most_cells):
            total += _of_cells(values, tl.load(ptrs, mask=form.rank_on, other=-1), 0.0)
            ptrs += form.n_ranks
    else:
        total = tl.sum(values, 1)
    return total


@triton.jit
def _largest(values, by_rank, BY_CELL: tl.constexpr):
    """Largest of numbers by copy and by rank."""
    if BY_CELL:
        largest = tl.maximum(tl.max(values), tl.max(by_rank))
    else:
        largest = tl.max(tl.maximum(values, by_rank[:, None]))
    return largest


@triton.jit
def _as_row(values, BY_CELL: tl.constexpr):
    """Numbers by column as [1, C]."""
    if BY_CELL:
        values = values[None, :]
    return values
