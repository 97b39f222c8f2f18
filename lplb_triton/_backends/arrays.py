"""What the back ends read of a placement, as numpy arrays; tables.py puts them in memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lplb_triton._backends.cells import (
    Cells,
    count_earlier,
    find_cells,
    make_cell_ends,
    make_cell_tables,
    make_rows,
    make_slot_tables,
)
from lplb_triton._backends.edges import make_edges, make_pairs
from lplb_triton._layout import LIVE_LANES, MEMBERS, N_EXTENTS, Extent
from lplb_triton.placement.programs import find_load_targets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

__all__ = ["make_copy_arrays", "make_dense_arrays", "make_kernel_arrays", "make_live_arrays"]

# Classes of edges that levelling goes through, at most, before steps by potentials take over: a
# sweep goes through all classes of a group.
MAX_FIRST_CLASSES = 256


def _run_lengths(starts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the lengths of runs, along the last axis, from their starts and the last one's end."""
    lengths: NDArray[np.int32] = starts[..., 1:] - starts[..., :-1]
    return lengths


def _list_shared_copies(placement: Placement, per_expert: NDArray[np.int32]) -> NDArray[np.int32]:
    """List the copies of replicated experts by group, [n_group, n], padded with -1.

    Every redundant slot makes at most two of them, whatever the placement.
    """
    size = (placement.n_group, 2 * placement.redundant_per_group)
    shared = np.full(size, -1, dtype=np.int32)
    several = per_expert > 1
    copies = several.repeat(per_expert).nonzero()[0]
    group = placement.structure.cell_group[several].repeat(per_expert[several])
    shared[group, count_earlier(group)] = copies
    return shared


def _list_first_members(placement: Placement) -> NDArray[np.int64]:
    """List the first MEMBERS members of each column, [n_group, MEMBERS, n_columns], -1 for none."""
    s = placement.structure
    size = (placement.n_group, MEMBERS, s.column_start.shape[1] - 1)
    first_members = np.full(size, -1, dtype=np.int64)
    members = s.column_members[s.column_members >= 0]
    group, column = s.cell_group[members], s.column_of[members]
    nth = np.arange(members.size) - s.column_start[group, column]
    early = nth < MEMBERS
    first_members[group[early], nth[early], column[early]] = members[early]
    return first_members


def _make_extents(
    placement: Placement, cells: Cells, n_classes: NDArray[np.int32], in_pairs: bool
) -> NDArray[np.int32]:
    """Make the table of each group's `Extent`; ``n_classes`` [n_group] are its classes of edges."""
    s = placement.structure
    n_members = _run_lengths(s.column_start)
    n_sweeps = -(-MAX_FIRST_CLASSES // np.maximum(n_classes, 1))
    extents = np.empty((placement.n_group, N_EXTENTS), dtype=np.int32)
    extents[:, Extent.N_CELLS] = cells.copies.sum(1)
    extents[:, Extent.MOST_MEMBERS] = n_members.max(axis=1, initial=0)
    extents[:, Extent.MOST_COPIES] = cells.copies.max(axis=1, initial=0)
    extents[:, Extent.MOST_CELLS] = cells.on_rank.max(axis=1, initial=0)
    extents[:, Extent.MULTIPLICITY] = s.copy_multiplicity.max()
    extents[:, Extent.N_CLASSES] = n_classes
    extents[:, Extent.MOST_SWEEPS] = np.where(n_classes > 0, n_sweeps, 0)
    extents[:, Extent.IN_PAIRS] = in_pairs
    return extents


def make_copy_arrays(placement: Placement) -> dict[str, NDArray[Any]]:
    """Make what the torch twin reads of a placement: where copies are, their cells, and homes."""
    s = placement.structure
    return {
        "home_rank": placement.log2phy[:, 0].numpy() // np.int32(placement.slots_per_rank),
        "copy_start": s.copy_start,
        "copy_slot": s.copy_slot,
        "copy_cell": s.copy_cell,
        "copy_index": s.copy_index,
        "copy_multiplicity": s.copy_multiplicity,
    }


def make_kernel_arrays(
    placement: Placement, pair_classes: int | None = None
) -> dict[str, NDArray[Any]]:
    """Make everything that the kernels read of a placement.

    Shapes depend on its sizes alone, and on ``pair_classes``, the classes of edges that the table
    of pairs holds, by default as many as the placement needs (see `make_pairs`).
    """
    s = placement.structure
    per_expert = _run_lengths(s.copy_start)
    shared = _list_shared_copies(placement, per_expert)
    found = find_cells(placement)
    cells = make_cell_tables(placement, found)
    number = cells["cell_number"]
    edges, n_classes = make_edges(placement, found)
    pairs, in_pairs = make_pairs(placement, found.copies, edges, int(n_classes.max()), pair_classes)
    shared_at = np.where(shared >= 0, s.copy_cell[shared], -1)
    return {
        **cells,
        "rows": make_rows(placement, found),
        # Threads that follow each other read ranks that do.
        "cell_number": np.ascontiguousarray(number.transpose(0, 2, 1)),
        "cell_ends": make_cell_ends(placement, number),
        **make_slot_tables(placement, number),
        "first_members": _list_first_members(placement),
        "column_start": s.column_start,
        "column_members": s.column_members,
        **make_copy_arrays(placement),
        "shared_copies": shared,
        "shared_cells": np.append(number, np.int32(-1))[shared_at],
        "edges": edges,
        "extents": _make_extents(placement, found, n_classes, in_pairs),
        "pairs": pairs,
        "search_steps": np.array([math.ceil(math.log2(int(per_expert.max())))], dtype=np.int32),
    }


def make_live_arrays(placement: Placement) -> dict[str, NDArray[Any]]:
    """Make what planning live slots reads besides; see `LiveTables` of the kernels."""
    s, n_ranks = placement.structure, placement.ep_size
    rank, place = np.divmod(s.copy_slot, placement.slots_per_rank)
    n_copies = np.diff(s.copy_start)
    expert = np.arange(placement.n_logical).repeat(n_copies)
    is_first = np.zeros(placement.n_copies, dtype=np.bool_)
    is_first[s.copy_start[:-1]] = True
    words, experts = np.zeros((2, placement.static_per_rank, n_ranks), dtype=np.int32)
    is_shared = n_copies.repeat(n_copies) > 1
    words[place, rank] = np.arange(placement.n_copies) << 2 | is_shared << 1 | is_first
    experts[place, rank] = expert
    held = np.zeros((placement.n_logical, -(-n_ranks // LIVE_LANES)), dtype=np.uint32)
    bits = np.uint32(1) << (rank % LIVE_LANES).astype(np.uint32)
    np.bitwise_or.at(held, (expert, rank // LIVE_LANES), bits)
    homes = placement.log2phy[:, 0].numpy() // np.int32(placement.slots_per_rank)
    return {
        "slot_words": words,
        "slot_experts": experts,
        "slot_holders": held[experts].view(np.int32),
        "slot_homes": homes[experts],
        "most_copies": np.array([n_copies.max()], dtype=np.int32),
    }


def make_dense_arrays(placement: Placement) -> dict[str, NDArray[Any]]:
    """Make what `lplb_triton._backends.interior_point.solve_counts` reads besides."""
    s = placement.structure
    fixed_rank, column = find_load_targets(placement.structure)
    n_copies = _run_lengths(s.copy_start).astype(np.int64)
    nowhere = placement.ep_size * placement.max_columns
    return {
        # Places in a vector of fixed loads by rank, then weights by group and column.
        "fold_target": np.where(fixed_rank >= 0, fixed_rank, placement.ep_size + column),
        "mask": s.mask,
        "n_copies": n_copies,
        "copy_expert": np.arange(placement.n_logical).repeat(n_copies),
        "copy_target": np.where(s.copy_cell >= 0, s.copy_cell, nowhere).astype(np.int64),
    }
