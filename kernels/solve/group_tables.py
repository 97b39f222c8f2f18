"""A group's tables: their addresses, and what is loaded of them before the counts are there.

A *cell* is the share of one column on one of its ranks; a group's cells are numbered by column,
then by rank. The padded sizes are G ranks, C columns, S slots of a rank and COPIES copies of
replicated experts, of which there are at least as many as cells. LANES is the number of threads.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.solve.levelling import COPIES_AT_ONCE, load_rank_cells

# Rows of the table of cells, and columns of the table of extents.
CELL_COLUMN = tl.constexpr(int(_layout.CellField.COLUMN))
CELL_FIRST = tl.constexpr(int(_layout.CellField.FIRST))
CELL_COPIES = tl.constexpr(int(_layout.CellField.COPIES))
N_CELLS = tl.constexpr(int(_layout.Extent.N_CELLS))
MOST_MEMBERS = tl.constexpr(int(_layout.Extent.MOST_MEMBERS))
MOST_COPIES = tl.constexpr(int(_layout.Extent.MOST_COPIES))
MOST_CELLS = tl.constexpr(int(_layout.Extent.MOST_CELLS))
MULTIPLICITY = tl.constexpr(int(_layout.Extent.MULTIPLICITY))
N_CLASSES = tl.constexpr(int(_layout.Extent.N_CLASSES))
MOST_SWEEPS = tl.constexpr(int(_layout.Extent.MOST_SWEEPS))
IN_PAIRS = tl.constexpr(int(_layout.Extent.IN_PAIRS))


class Tables(NamedTuple):
    """Addresses of a group's tables, which `SolveTables` describes."""

    rank_experts: Any
    rank_parts: Any
    copy_parts: Any
    slot_cells: Any
    cells: Any
    cell_start: Any
    rows: Any
    rank_cells: Any
    first_members: Any
    first_ranks: Any
    column_start: Any
    column_members: Any
    shared_copies: Any
    shared_cells: Any
    edges: Any
    extents: Any
    copy_index: Any
    copy_multiplicity: Any


class Sizes(NamedTuple):
    """Sizes of the tables, the same for all groups, as in `SolveTables`."""

    n_ranks: Any
    n_columns: Any
    n_slots: Any
    n_shared: Any
    width: Any
    """Most edges of a class."""


class Extents(NamedTuple):
    """Numbers of a group, the first seven of `SolveTables.extents`."""

    n_cells: Any
    most_members: Any
    most_copies: Any
    most_cells: Any
    multiplicity: Any
    n_classes: Any
    most_sweeps: Any


class LoadedTables(NamedTuple):
    """What is loaded of a group's tables before the counts are there; int32."""

    cell_column: Any
    """[COPIES] column of each cell."""
    cell_first: Any
    """[COPIES] first cell of that column."""
    cell_copies: Any
    """[COPIES] how many cells that column has."""
    shared: Any
    """[COPIES] copies of replicated experts, -1 in the padding."""
    shared_cell: Any
    """[COPIES] cells of these copies, -1 if one rank holds all copies of the expert."""
    members: Any
    """Tuple of [C], the first members of each column, -1 after its last."""
    start: Any
    """[C] first cell of each column."""
    n_copies: Any
    """[C] how many cells each column has."""
    first_ranks: Any
    """Tuple of [C], the ranks of the first cells of each column, -1 after its last."""
    first_cells: Any
    """[G RANK_CELLS] first cells of each rank, by `load_rank_cells`."""
    extents: Extents


@triton.jit
def _prefetch(ptr, n, STRIDE: tl.constexpr, LANES: tl.constexpr):
    """Load one of every STRIDE words, of ``n`` in all, in each thread."""
    word = STRIDE * tl.arange(0, LANES)
    return tl.load(ptr + word, mask=word < n, other=0)


@triton.jit
def prefetch_tables(tables, extents, sizes, scratch_ptr, n_scratch, LANES: tl.constexpr):
    """Prefetch into the cache the tables that later steps read piece by piece.

    Each thread loads one word of each table. The sums of these words are stored in the LANES words
    of scratch after the first ``n_scratch``, since the compiler removes loads that nobody uses.
    """
    n_edges = extents.n_classes * sizes.width
    n_rank_cells = sizes.n_ranks * extents.most_cells
    sums_ptr = scratch_ptr + n_scratch
    loaded = _prefetch(tables.edges, n_edges, 4, LANES).to(tl.int32)
    loaded += _prefetch(tables.rank_cells, n_rank_cells, 8, LANES)
    loaded += _prefetch(tables.cells, extents.n_cells, 8, LANES)
    tl.store(sums_ptr + tl.arange(0, LANES), loaded)


@triton.jit
def load_tables(
    tables, sizes, G: tl.constexpr, C: tl.constexpr, COPIES: tl.constexpr, MEMBERS: tl.constexpr
):
    """Load `LoadedTables`."""
    cell = tl.arange(0, COPIES)
    col = tl.arange(0, C)
    is_cell = cell < sizes.n_shared
    is_col = col < sizes.n_columns
    start = tl.load(tables.cell_start + col, mask=is_col, other=0)
    members, first_ranks = (), ()
    for k in tl.static_range(MEMBERS):
        ptrs = tables.first_members + k * sizes.n_columns + col
        members += (tl.load(ptrs, mask=is_col, other=-1),)
    for k in tl.static_range(COPIES_AT_ONCE):
        ptrs = tables.first_ranks + k * sizes.n_columns + col
        first_ranks += (tl.load(ptrs, mask=is_col, other=-1),)
    extents_ptr = tables.extents
    return LoadedTables(
        tl.load(tables.cells + CELL_COLUMN * sizes.n_shared + cell, mask=is_cell, other=0),
        tl.load(tables.cells + CELL_FIRST * sizes.n_shared + cell, mask=is_cell, other=0),
        tl.load(tables.cells + CELL_COPIES * sizes.n_shared + cell, mask=is_cell, other=1),
        tl.load(tables.shared_copies + cell, mask=is_cell, other=-1),
        tl.load(tables.shared_cells + cell, mask=is_cell, other=-1),
        members,
        start,
        tl.load(tables.cell_start + col + 1, mask=is_col, other=0) - start,
        first_ranks,
        load_rank_cells(tables.rank_cells, 0, sizes.n_ranks, G),
        Extents(
            tl.load(extents_ptr + N_CELLS),
            tl.load(extents_ptr + MOST_MEMBERS),
            tl.load(extents_ptr + MOST_COPIES),
            tl.load(extents_ptr + MOST_CELLS),
            tl.load(extents_ptr + MULTIPLICITY),
            tl.load(extents_ptr + N_CLASSES),
            tl.load(extents_ptr + MOST_SWEEPS),
        ),
    )  # fmt: skip


@triton.jit
def load_rank_experts(tables, sizes, G: tl.constexpr, S: tl.constexpr):
    """Load the experts of each rank's slots, -1 for none, and their parts of the even split.

    Returns [G S] int32 and float32, the slots of a rank side by side.
    """
    index = tl.arange(0, G * S)
    rank = index // S
    slot = index % S
    entry = rank * sizes.n_slots + slot
    is_slot = (rank < sizes.n_ranks) & (slot < sizes.n_slots)
    expert = tl.load(tables.rank_experts + entry, mask=is_slot, other=-1)
    return expert, tl.load(tables.rank_parts + entry, mask=is_slot, other=0.0)


@triton.jit
def load_copy_parts(tables, sizes, G: tl.constexpr, S: tl.constexpr):
    """Load the parts of the split that is even over copies, [G S] float32, by rank and slot."""
    index = tl.arange(0, G * S)
    rank = index // S
    slot = index % S
    is_slot = (rank < sizes.n_ranks) & (slot < sizes.n_slots)
    ptrs = tables.copy_parts + rank * sizes.n_slots + slot
    return tl.load(ptrs, mask=is_slot, other=0.0)
