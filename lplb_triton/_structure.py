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

    Copies are numbered 0 .. n_physical - 1, sorted by logical expert, then by slot; so the
    copies of one expert are contiguous and ascend by rank. Columns and ranks are numbered
    within their group.
    """

    column_of: Int32Array
    """[n_logical] column of each expert, -1 if all its copies are on one rank."""
    cell_group: Int32Array
    """[n_logical] group of each expert."""
    mask: BoolArray
    """[n_group, group_size, max_columns] whether a rank holds a copy of a column."""
    fixed_experts: Int32Array
    """[n_group, group_size, slots_per_rank] experts that only this rank holds, padded with -1."""
    column_start: Int32Array
    """[n_group, max_columns + 1] start of each column's run in ``column_members``."""
    column_members: Int32Array
    """[n_logical] replicated experts, sorted by group and column (padded with -1)."""
    copy_start: Int32Array
    """[n_logical + 1] first copy of each expert."""
    copy_slot: Int32Array
    """[n_physical] slot of each copy."""
    copy_cell: Int32Array
    """[n_physical] flat index of the copy's share in [n_group, group_size, max_columns], or -1."""
    copy_index: Int32Array
    """[n_physical] index among the copies of one expert on one rank."""
    copy_multiplicity: Int32Array
    """[n_physical] number of copies of that expert on that rank."""

    def __repr__(self) -> str:
        """Sizes in one line."""
        groups, ranks, columns = self.mask.shape
        return (
            f"Structure({len(self.column_of)} experts in {len(self.copy_slot)} slots, "
            f"{groups} group(s) of {ranks} ranks and up to {columns} columns)"
        )


def build_structure(
    phy2log: _Int64Array, counts: _Int64Array, n_group: int, group_size: int, max_columns: int
) -> Structure:
    """Derive every index table from the slot map and the copies of each expert.

    Raises a ValueError that names ``phy2log`` or ``max_columns`` if the map doesn't fit groups or
    columns.
    """
    n_logical, n_physical, ep_size = len(counts), len(phy2log), n_group * group_size
    slots_per_rank = n_physical // ep_size
    order = np.argsort(phy2log, kind="stable")
    expert, rank = phy2log[order], order // slots_per_rank
    copies = np.zeros((n_logical, ep_size), dtype=np.int64)
    np.add.at(copies, (expert, rank), 1)
    held = copies > 0
    group = _group_of(held, n_group)
    column_of, mask = _columns(held, group, n_group, max_columns)
    column_start, members = _members(column_of, group, n_group, max_columns)

    start = np.zeros(n_logical + 1, dtype=np.int32)
    start[1:] = np.cumsum(counts)
    # Copies of one expert on one rank are neighbours in this order.
    fresh = np.ones(n_physical, dtype=np.bool_)
    fresh[1:] = (expert[1:] != expert[:-1]) | (rank[1:] != rank[:-1])
    run_start = np.maximum.accumulate(np.where(fresh, np.arange(n_physical), 0))
    cell = rank * max_columns + column_of[expert]
    structure = Structure(
        column_of=column_of,
        cell_group=group.astype(np.int32),
        mask=mask,
        fixed_experts=_fixed(column_of, held, slots_per_rank).reshape(n_group, group_size, -1),
        column_start=column_start,
        column_members=members,
        copy_start=start,
        copy_slot=order.astype(np.int32),
        copy_cell=np.where(column_of[expert] < 0, -1, cell).astype(np.int32),
        copy_index=(np.arange(n_physical) - run_start).astype(np.int32),
        copy_multiplicity=copies[expert, rank].astype(np.int32),
    )
    for array in structure:
        array.setflags(write=False)
    return structure


def _group_of(held: BoolArray, n_group: int) -> _Int64Array:
    """Group of each expert, ``[n_logical]``, from the ranks that hold it."""
    n_logical, ep_size = held.shape
    by_group = held.reshape(n_logical, n_group, -1).any(2)
    spanning = by_group.sum(1) > 1
    if spanning.any():
        raise ValueError(
            f"phy2log spreads expert {int(np.flatnonzero(spanning)[0])} over several of the "
            f"{n_group} groups"
        )
    group: _Int64Array = by_group.argmax(1)
    sizes = np.bincount(group, minlength=n_group)
    if (sizes * n_group != n_logical).any():
        raise ValueError(
            f"phy2log must give each of {n_group} groups equally many experts, "
            f"got {sizes.min()}..{sizes.max()}"
        )
    return group


def _columns(
    held: BoolArray, group: _Int64Array, n_group: int, max_columns: int
) -> tuple[Int32Array, BoolArray]:
    """Make ``column_of`` and ``mask``.

    Experts with the same set of ranks become one column: the optimum is the same.
    """
    n_logical, ep_size = held.shape
    group_size = ep_size // n_group
    column_of = np.full(n_logical, -1, dtype=np.int32)
    mask = np.zeros((n_group, group_size, max_columns), dtype=np.bool_)
    replicated = np.flatnonzero(held.sum(1) > 1)
    if not replicated.size:
        return column_of, mask
    sets, inverse = np.unique(held[replicated], axis=0, return_inverse=True)
    set_group = sets.argmax(1) // group_size
    n_columns = np.bincount(set_group, minlength=n_group)
    if n_columns.max() > max_columns:
        raise ValueError(f"max_columns is {max_columns}, but phy2log needs {n_columns.max()}")
    # np.unique sorts sets, not groups: number the sets within their group in order.
    by = np.argsort(set_group, kind="stable")
    within = np.empty(len(sets), dtype=np.int64)
    before = np.cumsum(n_columns) - n_columns
    within[by] = np.arange(len(sets)) - np.repeat(before, n_columns)
    column_of[replicated] = within[inverse.reshape(-1)]
    which, where = np.nonzero(sets)
    mask[set_group[which], where % group_size, within[which]] = True
    return column_of, mask


def _members(
    column_of: Int32Array, group: _Int64Array, n_group: int, max_columns: int
) -> tuple[Int32Array, Int32Array]:
    """Make ``column_start`` and ``column_members``."""
    replicated = np.flatnonzero(column_of >= 0)
    members = np.full(len(column_of), -1, dtype=np.int32)
    by_column = np.lexsort((column_of[replicated], group[replicated]))
    members[: replicated.size] = replicated[by_column]
    per_column = np.zeros((n_group, max_columns), dtype=np.int64)
    np.add.at(per_column, (group[replicated], column_of[replicated]), 1)
    ends = np.cumsum(per_column.reshape(-1)).reshape(per_column.shape)
    start = np.zeros((n_group, max_columns + 1), dtype=np.int32)
    if max_columns:
        start[:, 1:] = ends
        start[:, 0] = ends[:, 0] - per_column[:, 0]
    return start, members


def _fixed(column_of: Int32Array, held: BoolArray, slots_per_rank: int) -> Int32Array:
    """Experts that only one rank holds, ``[ep_size, slots_per_rank]``, padded with -1."""
    ep_size = held.shape[1]
    fixed = np.full((ep_size, slots_per_rank), -1, dtype=np.int32)
    single = np.flatnonzero(column_of < 0)
    rank = held[single].argmax(1)
    by_rank = np.argsort(rank, kind="stable")
    per_rank = np.bincount(rank, minlength=ep_size)
    place = np.arange(single.size) - np.repeat(np.cumsum(per_rank) - per_rank, per_rank)
    fixed[rank[by_rank], place] = single[by_rank]
    return fixed
