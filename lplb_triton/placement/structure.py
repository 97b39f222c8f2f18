"""The index tables of a placement, as the LP and the token kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Structure", "build_structure"]

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
_Int64Array = NDArray[np.int64]


class Structure(NamedTuple):
    """The placement as the LP and the token kernels read it; the arrays are read-only.

    Copies, in static slots, are numbered 0 .. n_copies - 1, sorted by logical expert, then by slot;
    so the copies of one expert are contiguous and ascend by rank. Columns and ranks are numbered
    within their group.
    """

    column_of: Int32Array
    """[n_logical] column of each expert, -1 if all its copies are on one rank."""
    cell_group: Int32Array
    """[n_logical] group of each expert."""
    mask: BoolArray
    """[n_group, group_size, max_columns] whether a rank holds a copy of a column."""
    fixed_experts: Int32Array
    """[n_group, group_size, static_per_rank] experts that only this rank holds, padded with -1."""
    column_start: Int32Array
    """[n_group, max_columns + 1] start of each column's run in ``column_members``."""
    column_members: Int32Array
    """[n_logical] replicated experts, sorted by group and column (padded with -1)."""
    copy_start: Int32Array
    """[n_logical + 1] first copy of each expert."""
    copy_slot: Int32Array
    """[n_copies] slot of each copy."""
    copy_cell: Int32Array
    """[n_copies] flat index of the copy's share in [n_group, group_size, max_columns], or -1."""
    copy_index: Int32Array
    """[n_copies] index among the copies of one expert on one rank."""
    copy_multiplicity: Int32Array
    """[n_copies] number of copies of that expert on that rank."""

    def __repr__(self) -> str:
        """Write the sizes in one line."""
        groups, ranks, columns = self.mask.shape
        return (
            f"Structure({len(self.column_of)} experts in {len(self.copy_slot)} slots, "
            f"{groups} group(s) of {ranks} ranks and up to {columns} columns)"
        )


def build_structure(
    phy2log: _Int64Array,
    counts: _Int64Array,
    n_group: int,
    group_size: int,
    max_columns: int,
    live_per_rank: int = 0,
) -> Structure:
    """Derive every index table from the map of static slots and the copies of each expert.

    ``copy_slot`` counts the ``live_per_rank`` live slots behind the static ones of each rank.

    Raises a ValueError that names ``phy2log`` or ``max_columns`` if the map doesn't fit groups or
    columns.
    """
    n_logical, n_physical, ep_size = len(counts), len(phy2log), n_group * group_size
    order = np.argsort(phy2log, kind="stable")
    expert, rank = phy2log[order], order // (n_physical // ep_size)
    start = np.zeros(n_logical + 1, dtype=np.int32)
    start[1:] = counts.cumsum()
    # An expert's copies ascend by rank.
    first_rank, last_rank = rank[start[:-1]], rank[start[1:] - 1]
    group = _find_groups(first_rank // group_size, last_rank // group_size, n_group)

    column_of = np.full(n_logical, -1, dtype=np.int32)
    replicated = (first_rank != last_rank).nonzero()[0]
    if replicated.size:
        held = np.zeros((n_logical, ep_size), dtype=np.bool_)
        held[expert, rank] = True
        column_of[replicated] = _assign_columns(
            held[replicated], group[replicated], n_group, max_columns
        )
    column = column_of[expert]
    cell = np.where(column < 0, -1, rank * max_columns + column)
    mask = np.zeros((n_group, group_size, max_columns), dtype=np.bool_)
    mask.reshape(-1)[cell[cell >= 0]] = True

    column_start, members = _list_members(column_of, group, n_group, max_columns)
    # Copies of one expert on one rank are neighbours in this order.
    is_first = np.ones(n_physical, dtype=np.bool_)
    is_first[1:] = (expert[1:] != expert[:-1]) | (rank[1:] != rank[:-1])
    runs = is_first.nonzero()[0]
    lengths = np.append(runs[1:], n_physical) - runs
    fixed = _list_fixed(column_of, first_rank, ep_size, n_physical // ep_size)
    structure = Structure(
        column_of=column_of,
        cell_group=group.astype(np.int32),
        mask=mask,
        fixed_experts=fixed.reshape(n_group, group_size, -1),
        column_start=column_start,
        column_members=members,
        copy_start=start,
        copy_slot=(order + rank * live_per_rank).astype(np.int32),
        copy_cell=cell.astype(np.int32),
        copy_index=(np.arange(n_physical) - np.repeat(runs, lengths)).astype(np.int32),
        copy_multiplicity=np.repeat(lengths, lengths).astype(np.int32),
    )
    for array in structure:
        array.setflags(write=False)
    return structure


def _find_groups(first: _Int64Array, last: _Int64Array, n_group: int) -> _Int64Array:
    """Find the group of each expert, ``[n_logical]``, from those of its first and last copy."""
    spanning = np.flatnonzero(first != last)
    if spanning.size:
        raise ValueError(
            f"phy2log spreads expert {int(spanning[0])} over several of the {n_group} groups"
        )
    sizes = np.bincount(first, minlength=n_group)
    if (sizes * n_group != len(first)).any():
        raise ValueError(
            f"phy2log must give each of {n_group} groups equally many experts, "
            f"got {sizes.min()}..{sizes.max()}"
        )
    return first


def _assign_columns(
    held: BoolArray, group: _Int64Array, n_group: int, max_columns: int
) -> _Int64Array:
    """Assign each replicated expert a column by the ranks that hold it and its group.

    Experts with the same set of ranks become one column, which leaves the optimum as it is. A
    group's columns are in the order of their sets, as rows of zeros and ones.
    """
    packed = np.packbits(held, axis=1)
    words = np.zeros((len(held), -(-packed.shape[1] // 8) * 8), dtype=np.uint8)
    words[:, : packed.shape[1]] = packed
    keys = words.view(">u8").astype(np.uint64)
    order = np.lexsort((*keys.T[::-1], group))
    keys, in_order = keys[order], group[order]
    is_first = np.ones(len(held), dtype=np.bool_)
    is_first[1:] = (keys[1:] != keys[:-1]).any(1)
    n_columns = np.bincount(in_order[is_first], minlength=n_group)
    if n_columns.max() > max_columns:
        raise ValueError(f"max_columns is {max_columns}, but phy2log needs {n_columns.max()}")
    before = np.cumsum(n_columns) - n_columns
    column = np.empty(len(held), dtype=np.int64)
    column[order] = np.cumsum(is_first) - 1 - before[in_order]
    return column


def _list_members(
    column_of: Int32Array, group: _Int64Array, n_group: int, max_columns: int
) -> tuple[Int32Array, Int32Array]:
    """Make ``column_start`` and ``column_members``."""
    members = np.full(len(column_of), -1, dtype=np.int32)
    replicated = (column_of >= 0).nonzero()[0]
    of = group[replicated] * max_columns + column_of[replicated]
    members[: replicated.size] = replicated[np.argsort(of, kind="stable")]
    per_column = np.bincount(of, minlength=n_group * max_columns).reshape(n_group, max_columns)
    ends = np.cumsum(per_column.reshape(-1)).reshape(per_column.shape)
    start = np.zeros((n_group, max_columns + 1), dtype=np.int32)
    if max_columns:
        start[:, 1:] = ends
        start[:, 0] = ends[:, 0] - per_column[:, 0]
    return start, members


def _list_fixed(
    column_of: Int32Array, first_rank: _Int64Array, ep_size: int, slots_per_rank: int
) -> Int32Array:
    """List the experts that only one rank holds, ``[ep_size, slots_per_rank]``, padded with -1."""
    fixed = np.full((ep_size, slots_per_rank), -1, dtype=np.int32)
    single = (column_of < 0).nonzero()[0]
    rank = first_rank[single]
    by_rank = rank.argsort(kind="stable")
    per_rank = np.bincount(rank, minlength=ep_size)
    place = np.arange(single.size) - (per_rank.cumsum() - per_rank).repeat(per_rank)
    fixed[rank[by_rank], place] = single[by_rank]
    return fixed
