"""A group's cells in rows of eight, and sums of numbers by cell over columns and over ranks.

A *cell* is the share of one column on one of its ranks; a group's cells are numbered by column,
then by rank. A *row* is up to ROW_CELLS cells of one column that follow each other. Numbers by cell
are tiles ``[R, 8]``, a line for each row; a number that belongs to a whole row or column is such a
tile too, with the same number all along a line, since the eight threads that share a line all need
it. Where a column has more than one row, its rows exchange their sums through memory.

A *rank vector* has a number for each rank. As a tuple of slices of up to 32 ranks each, [32], all
of it is in the registers of every warp, so that no warp has to wait for another.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.solve.levelling import RANK_CELLS

# Cells of a row.
ROW_CELLS = tl.constexpr(_layout.ROW_CELLS)
# Words of the table of rows for each row: the ranks of its cells, then four numbers.
ROW_WORDS = tl.constexpr(_layout.ROW_WORDS)


class Rows(NamedTuple):
    """A group's rows: tiles [R, 8]."""

    rank: Any
    """int32, rank of each cell, -1 in the padding."""
    real: Any
    """bool, False in the padding."""
    cell: Any
    """int32, number of each cell."""
    first: Any
    """int32, first row of the cell's column."""
    copies: Any
    """int32, how many cells that column has, 0 where there is no row."""
    weights: Any
    """float32, tokens of that column."""
    most_copies: Any
    """The most cells of a column of the group, a scalar."""


class RankCells(NamedTuple):
    """The table of each rank's cells."""

    first: Any
    """[G, RANK_CELLS] int32, the first cells of each rank, -1 after the last."""
    ptr: Any
    """[n, n_ranks] int32, the table in memory."""
    most: Any
    """The most cells of a rank, a scalar."""


@triton.jit
def number_rows(R: tl.constexpr):
    """Give each cell the number of its row, [R, 8] int32.

    The numbers come from a division. Otherwise Triton sees that they are contiguous along rows,
    gives what is loaded from there a layout to suit, and converts that to the layout of all other
    tiles.
    """
    entry = tl.arange(0, R)[:, None] * ROW_CELLS + tl.arange(0, ROW_CELLS)[None, :]
    return entry // ROW_CELLS


@triton.jit
def number_positions(R: tl.constexpr):
    """Give each cell its position in its row, [R, 8] int32."""
    return tl.broadcast_to(tl.arange(0, ROW_CELLS)[None, :], (R, ROW_CELLS))


@triton.jit
def load_rows(rows_ptr, weights_ptr, n_rows, most_copies, R: tl.constexpr):
    """Load `Rows` from the table [12 n_rows] int32 and the weights [n_columns] float32."""
    row = number_rows(R)
    position = number_positions(R)
    is_row = row < n_rows
    rank = tl.load(rows_ptr + row * ROW_CELLS + position, mask=is_row, other=-1)
    numbers_ptr = rows_ptr + n_rows * ROW_CELLS + row
    cell = tl.load(numbers_ptr, mask=is_row, other=0) + position
    first = tl.load(numbers_ptr + n_rows, mask=is_row, other=0)
    copies = tl.load(numbers_ptr + 2 * n_rows, mask=is_row, other=0)
    column = tl.load(numbers_ptr + 3 * n_rows, mask=is_row, other=0)
    weights = tl.load(weights_ptr + column, mask=copies > 0, other=0.0)
    return Rows(rank, rank >= 0, cell, first, copies, weights, most_copies)


@triton.jit
def load_at_cells(by_rank_ptr, rows):
    """Load at each cell the number of its rank, from [n_ranks] float32; 0 in the padding."""
    return tl.load(by_rank_ptr + rows.rank, mask=rows.real, other=0.0)


@triton.jit
def load_cells(by_cell_ptr, rows):
    """Load numbers by cell, [n_cells] float32 in memory, as a tile; 0 in the padding."""
    return tl.load(by_cell_ptr + rows.cell, mask=rows.real, other=0.0)


@triton.jit
def store_cells(by_cell_ptr, values, rows):
    """Store a tile of numbers by cell to [n_cells] float32, as `load_cells` loads them."""
    tl.store(by_cell_ptr + rows.cell, values, mask=rows.real)


@triton.jit
def sum_by_column(values, chosen, rows, by_row_ptr):
    """Sum the values of each column's cells that are ``chosen``, and count these cells.

    ``values`` and ``chosen`` are tiles of float32 and bool; ``by_row`` [2 R] float32 is scratch.
    Returns two tiles of float32.
    """
    R: tl.constexpr = values.shape[0]
    total = _sum_lines(tl.where(chosen, values, 0.0))
    n = _sum_lines(tl.where(chosen, 1.0, 0.0))
    if rows.most_copies > ROW_CELLS:
        row = number_rows(R)
        is_first = number_positions(R) == 0
        # Other threads may still be reading the sums of an earlier call.
        tl.debug_barrier()
        tl.store(by_row_ptr + row, total, mask=is_first)
        tl.store(by_row_ptr + R + row, n, mask=is_first)
        tl.debug_barrier()
        total *= 0.0
        n *= 0.0
        for i in range(tl.cdiv(rows.most_copies, ROW_CELLS)):
            # The barrier keeps this rare loop from being unrolled: long code is slow to fetch.
            tl.debug_barrier()
            is_row = i * ROW_CELLS < rows.copies
            total += tl.load(by_row_ptr + rows.first + i, mask=is_row, other=0.0)
            n += tl.load(by_row_ptr + R + rows.first + i, mask=is_row, other=0.0)
    return total, n


@triton.jit
def find_least_by_column(values, chosen, rows, by_row_ptr):
    """Find the least value of each column's cells that are ``chosen``; infinite where none is.

    Arguments are those of `sum_by_column`. Returns a tile of float32.
    """
    R: tl.constexpr = values.shape[0]
    least = tl.min(tl.where(chosen, values, float("inf")), 1, keep_dims=True)
    least = tl.broadcast_to(least, values.shape)
    if rows.most_copies > ROW_CELLS:
        tl.debug_barrier()
        tl.store(by_row_ptr + number_rows(R), least, mask=number_positions(R) == 0)
        tl.debug_barrier()
        for i in range(tl.cdiv(rows.most_copies, ROW_CELLS)):
            # The barrier keeps this rare loop from being unrolled: long code is slow to fetch.
            tl.debug_barrier()
            is_row = i * ROW_CELLS < rows.copies
            other = tl.load(by_row_ptr + rows.first + i, mask=is_row, other=float("inf"))
            least = tl.minimum(least, other)
    return least


@triton.jit
def _sum_lines(values):
    """Sum each line of a tile; returns a tile with the sum all along the line."""
    return tl.broadcast_to(tl.sum(values, 1, keep_dims=True), values.shape)


@triton.jit
def number_ranks(G: tl.constexpr):
    """Give each cell of a rank its rank, [G, 8] int32, by a division as in `number_rows`."""
    entry = tl.arange(0, G)[:, None] * RANK_CELLS + tl.arange(0, RANK_CELLS)[None, :]
    return entry // RANK_CELLS


@triton.jit
def store_by_rank(by_rank_ptr, values, n_ranks):
    """Store a tile [G, 8] with equal numbers along each line to [n_ranks] float32."""
    G: tl.constexpr = values.shape[0]
    rank = number_ranks(G)
    is_first = tl.arange(0, RANK_CELLS)[None, :] == 0
    tl.store(by_rank_ptr + rank, values, mask=(rank < n_ranks) & is_first)


@triton.jit
def _load_block_of_cells(rank_cells_ptr, first, n_ranks, G: tl.constexpr):
    """Load what `levelling.load_rank_cells` does, as a tile [G, RANK_CELLS]."""
    entry = tl.arange(0, G)[:, None] * RANK_CELLS + tl.arange(0, RANK_CELLS)[None, :]
    rank = entry // RANK_CELLS
    entry = (first + entry % RANK_CELLS) * n_ranks + rank
    return tl.load(rank_cells_ptr + entry, mask=rank < n_ranks, other=-1)


@triton.jit
def load_cells_of_ranks(rank_cells_ptr, most_cells, n_ranks, G: tl.constexpr):
    """Load `RankCells` from the table [n, n_ranks] int32."""
    first = _load_block_of_cells(rank_cells_ptr, 0, n_ranks, G)
    return RankCells(first, rank_cells_ptr, most_cells)


@triton.jit
def sum_by_rank(by_cell_ptr, rank_cells, n_ranks, G: tl.constexpr):
    """Sum [n_cells] float32 over the cells of each rank; a tile [G, 8], equal along each line."""
    cell = rank_cells.first
    values = tl.load(by_cell_ptr + cell, mask=cell >= 0, other=0.0)
    for first in range(RANK_CELLS, rank_cells.most, RANK_CELLS):
        # The barrier keeps this rare loop from being unrolled: long code is slow to fetch.
        tl.debug_barrier()
        cell = _load_block_of_cells(rank_cells.ptr, first, n_ranks, G)
        values += tl.load(by_cell_ptr + cell, mask=cell >= 0, other=0.0)
    return _sum_lines(values)


@triton.jit
def load_rank_vector(vector_ptr, n_ranks, G: tl.constexpr):
    """Load [n_ranks] float32 as a rank vector, 0 in the padding."""
    SLICE: tl.constexpr = min(G, 32)
    slices = ()
    for h in tl.static_range(G // SLICE):
        rank = h * SLICE + tl.arange(0, SLICE)
        slices += (tl.load(vector_ptr + rank, mask=rank < n_ranks, other=0.0),)
    return slices


@triton.jit
def store_rank_vector(vector_ptr, slices, n_ranks, G: tl.constexpr):
    """Store a rank vector to [n_ranks] float32."""
    SLICE: tl.constexpr = min(G, 32)
    for h in tl.static_range(G // SLICE):
        rank = h * SLICE + tl.arange(0, SLICE)
        tl.store(vector_ptr + rank, slices[h], mask=rank < n_ranks)


@triton.jit
def dot(a, b, G: tl.constexpr):
    """Compute the scalar product of two rank vectors."""
    total = a[0] * b[0]
    for h in tl.static_range(1, G // min(G, 32)):
        total += a[h] * b[h]
    return tl.sum(total)


@triton.jit
def add_scaled(a, scale, b, G: tl.constexpr):
    """Compute ``a + scale b`` of rank vectors."""
    result = ()
    for h in tl.static_range(G // min(G, 32)):
        result += (a[h] + b[h] * scale,)
    return result


@triton.jit
def subtract_scalar(a, b, G: tl.constexpr):
    """Subtract a scalar from every number of a rank vector."""
    result = ()
    for h in tl.static_range(G // min(G, 32)):
        result += (a[h] - b,)
    return result
