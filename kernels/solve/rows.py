"""A group's cells by rows, and how numbers get from ranks to cells and back.

A *cell* is a column's share of one rank. A group's cells are numbered by column, then by rank. A
*row* is up to eight cells of a column that follow each other: numbers by cell are tiles [R, 8], one
line for each row. What a whole row or column has is such a tile too, of equal numbers in a line:
eight threads share a line, and all of them need it. Where a column has more than one row, its rows
tell each other through memory.
"""

# Triton's tuples grow.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.solve.levelling import RANK_CELLS

# Cells of a row.
ROW_CELLS = tl.constexpr(_layout.ROW_CELLS)
# Words of the table of rows for each row.
ROW_WORDS = tl.constexpr(_layout.ROW_WORDS)


class Rows(NamedTuple):
    """A group's rows, tiles [R, 8]."""

    ranks: Any
    """A cell's rank, -1 for none; whether there is one; and its number."""
    there: Any
    cells: Any
    first: Any
    """The first row of a cell's column, how many cells that has, and its tokens."""
    copies: Any
    weights: Any
    most_copies: Any
    """The most cells of a column of the group."""


class RankCells(NamedTuple):
    """The table of each rank's cells."""

    first: Any
    """The numbers of the first RANK_CELLS cells, [G, RANK_CELLS], -1 for none."""
    ptr: Any
    """The table."""
    most: Any
    """The most cells of a rank."""


@triton.jit
def _row_numbers(R: tl.constexpr):
    """Give each cell the number of its row, [R, 8].

    By a division, or Triton sees that numbers follow each other along rows, gives what is loaded
    from there a layout to suit, and converts it to the one of all other tiles.
    """
    at = tl.arange(0, R)[:, None] * ROW_CELLS + tl.arange(0, ROW_CELLS)[None, :]
    return at // ROW_CELLS


@triton.jit
def _cell_numbers(R: tl.constexpr):
    """Give each cell its number within its row, [R, 8]."""
    return tl.broadcast_to(tl.arange(0, ROW_CELLS)[None, :], (R, ROW_CELLS))


@triton.jit
def _load_rows(rows_ptr, weights_ptr, n_rows, most_copies, R: tl.constexpr):
    """Load `Rows`; weights are by column."""
    row = _row_numbers(R)
    nth = _cell_numbers(R)
    on = row < n_rows
    ranks = tl.load(rows_ptr + row * ROW_CELLS + nth, mask=on, other=-1)
    numbers_ptr = rows_ptr + n_rows * ROW_CELLS + row
    cells = tl.load(numbers_ptr, mask=on, other=0) + nth
    first = tl.load(numbers_ptr + n_rows, mask=on, other=0)
    copies = tl.load(numbers_ptr + 2 * n_rows, mask=on, other=0)
    column = tl.load(numbers_ptr + 3 * n_rows, mask=on, other=0)
    weights = tl.load(weights_ptr + column, mask=copies > 0, other=0.0)
    return Rows(ranks, ranks >= 0, cells, first, copies, weights, most_copies)


@triton.jit
def _load_by_rank(values_ptr, rows):
    """Give each cell what its rank has, 0 where there is none."""
    return tl.load(values_ptr + rows.ranks, mask=rows.there, other=0.0)


@triton.jit
def _load_by_cell(values_ptr, rows):
    """Load what cells have, 0 where there is none."""
    return tl.load(values_ptr + rows.cells, mask=rows.there, other=0.0)


@triton.jit
def _store_by_cell(values_ptr, values, rows):
    """Store what `_load_by_cell` loads."""
    tl.store(values_ptr + rows.cells, values, mask=rows.there)


@triton.jit
def _sum_columns(values, on, rows, sums_ptr):
    """Sum what a column's cells hold where they are on, and count them; ``sums`` [2 R] is scratch.

    Returns two tiles.
    """
    R: tl.constexpr = values.shape[0]
    total = _sum_lines(tl.where(on, values, 0.0))
    n = _sum_lines(tl.where(on, 1.0, 0.0))
    if rows.most_copies > ROW_CELLS:
        row = _row_numbers(R)
        once = _cell_numbers(R) == 0
        # The last sums may still be read.
        tl.debug_barrier()
        tl.store(sums_ptr + row, total, mask=once)
        tl.store(sums_ptr + R + row, n, mask=once)
        tl.debug_barrier()
        total *= 0.0
        n *= 0.0
        for i in range(tl.cdiv(rows.most_copies, ROW_CELLS)):
            # Rare, and without it unrolled: long code takes its time to fetch.
            tl.debug_barrier()
            others = i * ROW_CELLS < rows.copies
            total += tl.load(sums_ptr + rows.first + i, mask=others, other=0.0)
            n += tl.load(sums_ptr + R + rows.first + i, mask=others, other=0.0)
    return total, n


@triton.jit
def _least_of_columns(values, on, rows, sums_ptr):
    """Least of what a column's cells hold where they are on, a tile; infinite where none is."""
    R: tl.constexpr = values.shape[0]
    least = tl.min(tl.where(on, values, float("inf")), 1, keep_dims=True)
    least = tl.broadcast_to(least, values.shape)
    if rows.most_copies > ROW_CELLS:
        tl.debug_barrier()
        tl.store(sums_ptr + _row_numbers(R), least, mask=_cell_numbers(R) == 0)
        tl.debug_barrier()
        for i in range(tl.cdiv(rows.most_copies, ROW_CELLS)):
            # Rare, and without it unrolled: long code takes its time to fetch.
            tl.debug_barrier()
            others = i * ROW_CELLS < rows.copies
            other = tl.load(sums_ptr + rows.first + i, mask=others, other=float("inf"))
            least = tl.minimum(least, other)
    return least


@triton.jit
def _sum_lines(values):
    """Sum each line of a tile; a tile."""
    return tl.broadcast_to(tl.sum(values, 1, keep_dims=True), values.shape)


@triton.jit
def _rank_numbers(G: tl.constexpr):
    """Give each cell of ranks the number of its rank, [G, 8]; by a division, as `_row_numbers`."""
    at = tl.arange(0, G)[:, None] * RANK_CELLS + tl.arange(0, RANK_CELLS)[None, :]
    return at // RANK_CELLS


@triton.jit
def _store_by_rank(values_ptr, values, n_ranks):
    """Store what a tile [G, 8] has by rank, the first of each line, to [n_ranks]."""
    G: tl.constexpr = values.shape[0]
    rank = _rank_numbers(G)
    first = tl.arange(0, RANK_CELLS)[None, :] == 0
    tl.store(values_ptr + rank, values, mask=(rank < n_ranks) & first)


@triton.jit
def _load_cells_at(rank_cells_ptr, first, n_ranks, G: tl.constexpr):
    """Load the numbers of RANK_CELLS cells of each rank from its ``first`` one on, -1 for none."""
    at = tl.arange(0, G)[:, None] * RANK_CELLS + tl.arange(0, RANK_CELLS)[None, :]
    rank = at // RANK_CELLS
    at = (first + at % RANK_CELLS) * n_ranks + rank
    return tl.load(rank_cells_ptr + at, mask=rank < n_ranks, other=-1)


@triton.jit
def _load_cells_of_ranks(rank_cells_ptr, most_cells, n_ranks, G: tl.constexpr):
    """Load `RankCells`."""
    return RankCells(_load_cells_at(rank_cells_ptr, 0, n_ranks, G), rank_cells_ptr, most_cells)


@triton.jit
def _sum_of_ranks(values_ptr, rank_cells, n_ranks, G: tl.constexpr):
    """Sum what the cells of each rank hold, a tile [G, 8] of equal numbers in a line."""
    cell = rank_cells.first
    values = tl.load(values_ptr + cell, mask=cell >= 0, other=0.0)
    for first in range(RANK_CELLS, rank_cells.most, RANK_CELLS):
        # Rare, and without it unrolled: long code takes its time to fetch.
        tl.debug_barrier()
        cell = _load_cells_at(rank_cells.ptr, first, n_ranks, G)
        values += tl.load(values_ptr + cell, mask=cell >= 0, other=0.0)
    return _sum_lines(values)


@triton.jit
def _load_vector(vector_ptr, n_ranks, G: tl.constexpr):
    """Load a vector by rank as a tuple of [32]: every warp has all of it; 0 after the last rank."""
    LANES: tl.constexpr = min(G, 32)
    parts = ()
    for h in tl.static_range(G // LANES):
        rank = h * LANES + tl.arange(0, LANES)
        parts += (tl.load(vector_ptr + rank, mask=rank < n_ranks, other=0.0),)
    return parts


@triton.jit
def _store_vector(vector_ptr, parts, n_ranks, G: tl.constexpr):
    """Store what `_load_vector` loads."""
    LANES: tl.constexpr = min(G, 32)
    for h in tl.static_range(G // LANES):
        rank = h * LANES + tl.arange(0, LANES)
        tl.store(vector_ptr + rank, parts[h], mask=rank < n_ranks)
