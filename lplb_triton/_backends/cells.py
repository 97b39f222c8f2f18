"""A group's cells, and the tables that list them by column, row, rank and slot.

A *cell* is a column's share of one rank. A group's cells are numbered by column, then by rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lplb_triton._layout import (
    COPIES_AT_ONCE,
    MOST_CELLS,
    N_CELL_FIELDS,
    RANK_CELLS,
    ROW_CELLS,
    CellField,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

__all__ = [
    "Cells",
    "count_earlier",
    "find_cells",
    "make_cell_ends",
    "make_cell_tables",
    "make_rows",
    "make_slot_tables",
]


class Cells(NamedTuple):
    """All cells in order of group, column and rank; where nothing is said, one number for each."""

    group: NDArray[np.int64]
    column: NDArray[np.int64]
    rank: NDArray[np.int64]
    number: NDArray[np.int64]
    """Number of the cell in its group."""
    copies: NDArray[np.int64]
    """[n_group, n_columns] number of cells of each column."""
    start: NDArray[np.int64]
    """[n_group, n_columns] number of each column's first cell."""
    on_rank: NDArray[np.int64]
    """[n_group, n_ranks] number of cells of each rank."""


def find_cells(placement: Placement) -> Cells:
    """List the cells of a placement; a ValueError says that there are too many."""
    mask = placement.structure.mask
    n_group, n_ranks, n_columns = mask.shape
    by_column = mask.transpose(0, 2, 1).reshape(-1).nonzero()[0]
    at, rank = np.divmod(by_column, n_ranks)
    group, column = np.divmod(at, max(1, n_columns))
    copies = np.bincount(at, minlength=n_group * n_columns).reshape(n_group, n_columns)
    per_group = copies.sum(1)
    most = int(per_group.max())
    if most > MOST_CELLS:
        raise ValueError(
            f"placement must have at most {MOST_CELLS} pairs of a column and its rank in a group, "
            f"got {most}"
        )
    number = np.arange(rank.size) - (per_group.cumsum() - per_group)[group]
    start = copies.cumsum(1) - copies
    on_rank = np.bincount(group * n_ranks + rank, minlength=n_group * n_ranks)
    on_rank = on_rank.reshape(n_group, n_ranks)
    return Cells(group, column, rank, number, copies, start, on_rank)


def count_earlier(keys: NDArray[np.integer]) -> NDArray[np.int64]:
    """Count the earlier entries that have the same key."""
    order = keys.argsort(kind="stable")
    per_key = np.bincount(keys)
    nth = np.empty(keys.size, dtype=np.int64)
    nth[order] = np.arange(keys.size) - (per_key.cumsum() - per_key).repeat(per_key)
    return nth


def make_cell_tables(placement: Placement, found: Cells) -> dict[str, NDArray[np.int32]]:
    """Make the tables that list cells by number, column and rank; see `SolveTables`.

    ``cell_number`` here is [n_group, n_ranks, n_columns], -1 where no copy is.
    """
    n_group, n_ranks, n_columns = placement.structure.mask.shape
    group, column, rank, index, copies = found[:5]
    start = np.zeros((n_group, n_columns + 1), dtype=np.int32)
    start[:, 1:] = found.start + copies
    number = np.full((n_group, n_ranks, n_columns), -1, dtype=np.int32)
    number[group, rank, column] = index
    first = found.start[group, column]
    size = (n_group, N_CELL_FIELDS, 2 * placement.redundant_per_group)
    cells = np.full(size, -1, dtype=np.int32)
    cells[group, CellField.RANK, index] = rank
    cells[group, CellField.COLUMN, index] = column
    cells[group, CellField.FIRST, index] = first
    cells[group, CellField.COPIES, index] = copies[group, column]
    first_ranks = np.full((n_group, COPIES_AT_ONCE, n_columns), -1, dtype=np.int32)
    nth = index - first
    early = nth < COPIES_AT_ONCE
    first_ranks[group[early], nth[early], column[early]] = rank[early]
    most_on_a_rank = max(1, min(placement.static_per_rank, n_columns))
    most_on_a_rank = -(-most_on_a_rank // RANK_CELLS) * RANK_CELLS
    on_rank = np.full((n_group, most_on_a_rank, n_ranks), -1, dtype=np.int32)
    on_rank[group, count_earlier(group * n_ranks + rank), rank] = index
    return {
        "cells": cells,
        "cell_start": start,
        "rank_cells": on_rank,
        "cell_number": number,
        "first_ranks": first_ranks,
    }


def make_rows(placement: Placement, found: Cells) -> NDArray[np.int32]:
    """Make the table of rows, up to ROW_CELLS cells of a column each; see `SolveTables`.

    A column of k copies takes at least k - 1 redundant slots and has fewer rows than that, or one:
    there are never more rows than redundant slots.
    """
    n_rows = -(-found.copies // ROW_CELLS)
    first_row = n_rows.cumsum(1) - n_rows
    most = max(1, placement.redundant_per_group)
    ranks = np.full((placement.n_group, most, ROW_CELLS), -1, dtype=np.int32)
    nth = found.number - found.start[found.group, found.column]
    at = first_row[found.group, found.column] + nth // ROW_CELLS
    ranks[found.group, at, nth % ROW_CELLS] = found.rank
    # Group and column of each row.
    group, column = n_rows.nonzero()
    times = n_rows[group, column]
    group, column = group.repeat(times), column.repeat(times)
    row, first = count_earlier(group), first_row[group, column]
    cell = found.start[group, column] + ROW_CELLS * (row - first)
    numbers = np.zeros((placement.n_group, 4, most), dtype=np.int32)
    for field, values in enumerate((cell, first, found.copies[group, column], column)):
        numbers[group, field, row] = values
    both = (ranks.reshape(placement.n_group, -1), numbers.reshape(placement.n_group, -1))
    return np.concatenate(both, axis=1)


def make_cell_ends(placement: Placement, number: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return [n_group, 2, n_shared] the last and the last earlier copy for each cell.

    These are copies of the column's first expert: its last one on the cell's rank, and the one
    before its first one there, -1 if there is none. Copies of an expert ascend by rank. ``number``
    is ``cell_number`` of `make_cell_tables`.
    """
    s = placement.structure
    size = (placement.n_group, 2, 2 * placement.redundant_per_group)
    found = np.full(size, -1, dtype=np.int32)
    # Copies in descending order: the first expert of a column overwrites the others.
    copies = (s.copy_cell >= 0).nonzero()[0][::-1]
    at = s.copy_cell[copies]
    group, cell = at // number[0].size, number.reshape(-1)[at]
    index = s.copy_index[copies]
    last = index == s.copy_multiplicity[copies] - 1
    found[group[last], 0, cell[last]] = copies[last]
    first = np.zeros(placement.n_copies + 1, dtype=np.bool_)
    first[s.copy_start] = True
    before = (index == 0) & ~first[copies]
    found[group[before], 1, cell[before]] = copies[before] - 1
    return found


def make_slot_tables(placement: Placement, number: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """Make the tables by slot: expert, the parts that two even splits leave there, cell and home.

    An expert is in one slot of a rank only. ``rank_parts`` are of the split that is even over
    ranks, ``copy_parts`` of the one that is even over copies. ``number`` is ``cell_number`` of
    `make_cell_tables`. ``home_experts`` are the experts that are at home in a slot, -1 elsewhere.
    """
    s = placement.structure
    once = s.copy_index == 0
    # Slots are numbered here as if there were no live ones.
    slot = (
        s.copy_slot[once] - s.copy_slot[once] // placement.slots_per_rank * placement.live_per_rank
    )
    n_copies = np.diff(s.copy_start)
    expert = np.repeat(np.arange(placement.n_logical), n_copies)[once]
    experts = np.full(placement.n_copies, -1, dtype=np.int32)
    parts = np.zeros((2, placement.n_copies), dtype=np.float32)
    cells = np.full(placement.n_copies, -1, dtype=np.int32)
    experts[slot] = expert
    home = placement.log2phy[:, 0].numpy() // placement.slots_per_rank
    is_home = home[expert] == s.copy_slot[once] // placement.slots_per_rank
    at_home = np.full(placement.n_copies, -1, dtype=np.int32)
    at_home[slot[is_home]] = expert[is_home]
    parts[0, slot] = 1.0 / np.bincount(expert)[expert]
    parts[1, slot] = s.copy_multiplicity[once] / n_copies[expert]
    at = s.copy_cell[once]
    cells[slot] = np.where(at < 0, -1, np.append(number, np.int32(-1))[at])
    shape = placement.n_group, placement.group_size, placement.static_per_rank
    return {
        "rank_experts": experts.reshape(shape),
        "home_experts": at_home.reshape(shape),
        "rank_parts": parts[0].reshape(shape),
        "copy_parts": parts[1].reshape(shape),
        "slot_cells": cells.reshape(shape),
    }
