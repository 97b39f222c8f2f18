"""A placement's index tables in fixed device memory, rewritten in place."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lplb_triton.placement.programs import find_load_targets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

__all__ = ["DeviceTables"]

# Sections start on this many bytes, so that no kernel is compiled twice for alignment.
ALIGNMENT = 256
# Copies of a column of which each is joined with each.
FEW = 4
# Classes of edges that levelling goes through, at most, before steps by potentials take over.
MOST_CLASSES = 256
# Edges hold the numbers of their cells in 16 bits.
MOST_CELLS = 1 << 16
# Ranks up to which the kernels have a quicker way for columns that are pairs, how many of them a
# lane can be, and how many edges it may have: more don't stay in registers.
PAIR_RANKS = 64
PAIR_LANES = 32
PAIR_EDGES = 8
# 16 bits, all of them set: no such edge.
PAIR_FIELD = 0xFFFF
# Cells of a rank that the kernels sum at once. This and the next stand in
# kernels/solve/levelling.py too.
RANK_CELLS = 8
# Cells of a row; in kernels/solve/rows.py too.
ROW_CELLS = 8
# Copies of a column whose ranks have a table of their own.
COPIES_AT_ONCE = 4
# Members of a column that the kernels take at once, from a table of their own (a power of two).
MEMBERS = 4


def _lengths(starts: NDArray[np.int32]) -> NDArray[np.int32]:
    """Lengths of runs, along the last axis, from their starts and the last one's end."""
    lengths: NDArray[np.int32] = starts[..., 1:] - starts[..., :-1]
    return lengths


def _shared_copies(placement: Placement, per_expert: NDArray[np.int32]) -> NDArray[np.int32]:
    """[n_group, n] copies of replicated experts by group, padded with -1.

    Every redundant slot makes at most two of them, whatever the placement.
    """
    size = (placement.n_group, 2 * placement.redundant_per_group)
    shared = np.full(size, -1, dtype=np.int32)
    several = per_expert > 1
    copies = several.repeat(per_expert).nonzero()[0]
    group = placement.structure.cell_group[several].repeat(per_expert[several])
    shared[group, _nth(group)] = copies
    return shared


class _Cells(NamedTuple):
    """Pairs of a column and a rank that holds it, by group, column and rank."""

    group: NDArray[np.int64]
    column: NDArray[np.int64]
    rank: NDArray[np.int64]
    number: NDArray[np.int64]
    """Position in this order among the cells of the group."""
    copies: NDArray[np.int64]
    """[n_group, n_columns] ranks that hold each column."""
    start: NDArray[np.int64]
    """[n_group, n_columns] number of each column's first cell."""
    on_rank: NDArray[np.int64]
    """[n_group, n_ranks] cells of each rank."""


def _find_cells(placement: Placement) -> _Cells:
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
    return _Cells(group, column, rank, number, copies, start, on_rank)


def _nth(keys: NDArray[np.integer]) -> NDArray[np.int64]:
    """Count the earlier entries that have the same key."""
    order = keys.argsort(kind="stable")
    per_key = np.bincount(keys)
    nth = np.empty(keys.size, dtype=np.int64)
    nth[order] = np.arange(keys.size) - (per_key.cumsum() - per_key).repeat(per_key)
    return nth


def _cell_tables(placement: Placement, found: _Cells) -> dict[str, NDArray[np.int32]]:
    """Make the tables of a group's cells, numbered by column, then by rank; see `SolveTables`.

    ``cell_number`` is that number here by group, rank and column, -1 where no copy is.
    """
    n_group, n_ranks, n_columns = placement.structure.mask.shape
    group, column, rank, index, copies = found[:5]
    start = np.zeros((n_group, n_columns + 1), dtype=np.int32)
    start[:, 1:] = found.start + copies
    number = np.full((n_group, n_ranks, n_columns), -1, dtype=np.int32)
    number[group, rank, column] = index
    first = found.start[group, column]
    cells = np.full((n_group, 4, 2 * placement.redundant_per_group), -1, dtype=np.int32)
    for field, values in enumerate((rank, column, first, copies[group, column])):
        cells[group, field, index] = values
    first_ranks = np.full((n_group, COPIES_AT_ONCE, n_columns), -1, dtype=np.int32)
    nth = index - first
    early = nth < COPIES_AT_ONCE
    first_ranks[group[early], nth[early], column[early]] = rank[early]
    most_on_a_rank = max(1, min(placement.slots_per_rank, n_columns))
    most_on_a_rank = -(-most_on_a_rank // RANK_CELLS) * RANK_CELLS
    on_rank = np.full((n_group, most_on_a_rank, n_ranks), -1, dtype=np.int32)
    on_rank[group, _nth(group * n_ranks + rank), rank] = index
    return {
        "cells": cells,
        "cell_start": start,
        "rank_cells": on_rank,
        "cell_number": number,
        "first_ranks": first_ranks,
    }


def _rows(placement: Placement, found: _Cells) -> NDArray[np.int32]:
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
    # Once for each row of a column.
    group, column = n_rows.nonzero()
    times = n_rows[group, column]
    group, column = group.repeat(times), column.repeat(times)
    row, first = _nth(group), first_row[group, column]
    cell = found.start[group, column] + ROW_CELLS * (row - first)
    numbers = np.zeros((placement.n_group, 4, most), dtype=np.int32)
    for field, values in enumerate((cell, first, found.copies[group, column], column)):
        numbers[group, field, row] = values
    both = (ranks.reshape(placement.n_group, -1), numbers.reshape(placement.n_group, -1))
    return np.concatenate(both, axis=1)


def _cell_ends(placement: Placement, number: NDArray[np.int32]) -> NDArray[np.int32]:
    """For each cell, the last copy there of its column's first expert, and the one before all.

    Copies of an expert ascend by rank, those on a rank are neighbours; -1 if none is before.
    ``number`` is ``cell_number`` of `_cell_tables`.
    """
    s = placement.structure
    size = (placement.n_group, 2, 2 * placement.redundant_per_group)
    found = np.full(size, -1, dtype=np.int32)
    # The first expert of a column is written last.
    copies = (s.copy_cell >= 0).nonzero()[0][::-1]
    at = s.copy_cell[copies]
    group, cell = at // number[0].size, number.reshape(-1)[at]
    index = s.copy_index[copies]
    last = index == s.copy_multiplicity[copies] - 1
    found[group[last], 0, cell[last]] = copies[last]
    first = np.zeros(placement.n_physical + 1, dtype=np.bool_)
    first[s.copy_start] = True
    before = (index == 0) & ~first[copies]
    found[group[before], 1, cell[before]] = copies[before] - 1
    return found


def _rank_experts(placement: Placement, number: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """Keep one slot for an expert on a rank, the parts that even splits leave there, and its cell.

    One split is even over ranks, the other over copies. ``number`` is ``cell_number`` of `_cells`.
    """
    s = placement.structure
    once = s.copy_index == 0
    slot = s.copy_slot[once]
    n_copies = np.diff(s.copy_start)
    expert = np.repeat(np.arange(placement.n_logical), n_copies)[once]
    experts = np.full(placement.n_physical, -1, dtype=np.int32)
    parts = np.zeros((2, placement.n_physical), dtype=np.float32)
    cells = np.full(placement.n_physical, -1, dtype=np.int32)
    experts[slot] = expert
    parts[0, slot] = 1.0 / np.bincount(expert)[expert]
    parts[1, slot] = s.copy_multiplicity[once] / n_copies[expert]
    at = s.copy_cell[once]
    cells[slot] = np.where(at < 0, -1, np.append(number, np.int32(-1))[at])
    shape = placement.n_group, placement.group_size, placement.slots_per_rank
    return {
        "rank_experts": experts.reshape(shape),
        "rank_parts": parts[0].reshape(shape),
        "copy_parts": parts[1].reshape(shape),
        "slot_cells": cells.reshape(shape),
    }


@lru_cache(maxsize=64)
def _joins(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of n copies that are joined: each with each, or as the corners of a hypercube are."""
    i, j = np.triu_indices(n, 1)
    if n > FEW:
        between = i ^ j
        one_bit = (between & (between - 1)) == 0
        i, j = i[one_bit], j[one_bit]
    return i, j


def _joined(cells: _Cells) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the two cells of each edge, as positions in ``cells``, the one of the lower rank first.

    Up to FEW copies of a column are joined each with each, more of them as the corners of a
    hypercube are, so that few sweeps reach all. In order of the cells.
    """
    copies = cells.copies.reshape(-1)
    several = (copies > 1).nonzero()[0]
    copies, first = copies[several], (copies.cumsum() - copies)[several]
    # Pairs of every number of copies that there is, one number after the other.
    kinds = np.bincount(copies).nonzero()[0]
    pairs = [_joins(n) for n in kinds.tolist()] or [_joins(1)]
    sizes = np.zeros(int(copies.max(initial=0)) + 1, dtype=np.int64)
    begins = np.zeros_like(sizes)
    sizes[kinds] = [i.size for i, _ in pairs[: kinds.size]]
    begins[kinds] = sizes[kinds].cumsum() - sizes[kinds]
    per_column = sizes[copies]
    ends = per_column.cumsum()
    pair = np.arange(ends[-1] if ends.size else 0)
    pair += (begins[copies] - ends + per_column).repeat(per_column)
    at = first.repeat(per_column)
    low, high = (np.concatenate(side)[pair] + at for side in zip(*pairs, strict=True))
    return low, high


def _classes(first: list[int], second: list[int], n_ranks: int) -> list[int]:
    """Give each edge in turn the lowest class in which neither of its ranks is taken."""
    taken = [0] * n_ranks  # bit k: the rank has an edge of class k
    bits = []
    for a, b in zip(first, second, strict=True):
        free = ~(taken[a] | taken[b])
        lowest = free & -free
        taken[a] |= lowest
        taken[b] |= lowest
        bits.append(lowest)
    return [bit.bit_length() - 1 for bit in bits]


def _edges(placement: Placement, cells: _Cells) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Pairs of copies that the solver levels, in classes that name no rank twice.

    Returns [n_group, most_classes + 1, width] (cells, then ranks of an edge, the first before the
    second, 16 bits each; -1 for none, all of it in the class after the last) and the number of
    classes [n_group]; see docs/method.md, equation 18.
    """
    n_group, n_ranks, n_columns = placement.structure.mask.shape
    most_edges = max(FEW - 1, (n_ranks - 1).bit_length())
    most_on_a_rank = min(placement.slots_per_rank, n_columns)
    most = min(2 * most_on_a_rank, placement.redundant_per_group) * most_edges
    table = np.full((n_group, most + 1, max(1, n_ranks // 2)), -1, dtype=np.int64)
    low, high = _joined(cells)
    # Ranks of all groups, numbered one after the other.
    rank = cells.group * n_ranks + cells.rank
    first, second = rank[low], rank[high]
    degree = np.bincount(np.concatenate((first, second)), minlength=n_group * n_ranks)
    # Greedily, crowded ranks first: fewer than twice the largest degree.
    order = (-degree[first] - degree[second]).argsort(kind="stable")
    taken = _classes(first[order].tolist(), second[order].tolist(), n_group * n_ranks)
    classes = np.array(taken, dtype=np.int64)
    low, high = low[order], high[order]
    words = cells.number[low].astype(np.uint64)
    for field in (cells.number[high], cells.rank[low], cells.rank[high]):
        words <<= np.uint64(16)
        words |= field.astype(np.uint64)
    group = cells.group[low]
    key = group * (most + 1) + classes
    table.reshape(n_group * (most + 1), -1)[key, _nth(key)] = words.view(np.int64)
    n_classes = np.zeros(n_group, dtype=np.int32)
    np.maximum.at(n_classes, group, classes.astype(np.int32) + 1)
    return table, n_classes


def _pair_classes(placement: Placement, copies: NDArray[np.int64], n_classes: int) -> int:
    """Classes of edges that a placement of pairs needs, ``n_classes``, or 0 if it isn't one.

    Its columns are single experts with two copies each, on different ranks. ``copies`` is that of
    `_Cells`.
    """
    s = placement.structure
    if copies.max(initial=0) > 2 or s.copy_multiplicity.max() > 1:
        return 0
    if _lengths(s.column_start).max(initial=0) > 1:
        return 0
    if placement.group_size > PAIR_RANKS or placement.n_physical >= PAIR_FIELD:
        return 0
    parts = -(-placement.group_size // PAIR_LANES)
    return n_classes if n_classes * parts <= PAIR_EDGES else 0


def _pairs(
    placement: Placement,
    copies: NDArray[np.int64],
    edges: NDArray[np.int64],
    n_classes: int,
    room: int | None,
) -> tuple[NDArray[np.int64], bool]:
    """[n_group, room, group_size] words as for `kernels.pairs._load_pairs`.

    ``room`` is for as many classes, by default for those that the placement needs. Also returns
    whether it is one of pairs for which there is room; otherwise no rank has a partner.
    """
    s = placement.structure
    needed = _pair_classes(placement, copies, n_classes)
    room = needed if room is None else room
    fits = 0 < needed <= room
    n_group, n_ranks, _ = s.mask.shape
    fields = np.full((n_group, room, n_ranks, 4), PAIR_FIELD, dtype=np.uint16)
    fields[..., 0] = np.arange(n_ranks)
    if fits:
        group, k, at = np.nonzero(edges[:, :room] != -1)
        words = edges[group, k, at].view(np.uint64)
        second, first, cell = (words >> np.uint64(16 * i) & np.uint64(0xFFFF) for i in range(3))
        expert = s.column_members[s.column_start[group, cell // np.uint64(2)]]
        copy = s.copy_start[expert]
        nothing = np.full_like(copy, PAIR_FIELD)
        fields[group, k, first] = np.stack((second, expert, nothing, copy), axis=1)
        fields[group, k, second] = np.stack((first, expert, nothing, copy + 1), axis=1)
    return fields.view(np.int64)[..., 0], fits


def _copy_arrays(placement: Placement) -> dict[str, NDArray[Any]]:
    """List what the torch twin reads of a placement: where copies are, and their cells."""
    s = placement.structure
    return {
        "copy_start": s.copy_start,
        "copy_slot": s.copy_slot,
        "copy_cell": s.copy_cell,
        "copy_index": s.copy_index,
        "copy_multiplicity": s.copy_multiplicity,
    }


def _arrays(placement: Placement, pair_classes: int | None = None) -> dict[str, NDArray[Any]]:
    """Everything the kernels read of a placement.

    Shapes depend on its sizes alone, and on how many classes of edges there is room for in the
    table of pairs (as for `_pairs`).
    """
    s = placement.structure
    lengths = _lengths(s.column_start)
    first_members = np.full((placement.n_group, MEMBERS, lengths.shape[1]), -1, dtype=np.int64)
    members = s.column_members[s.column_members >= 0]
    group, column = s.cell_group[members], s.column_of[members]
    nth = np.arange(members.size) - s.column_start[group, column]
    early = nth < MEMBERS
    first_members[group[early], nth[early], column[early]] = members[early]
    per_expert = _lengths(s.copy_start)
    shared = _shared_copies(placement, per_expert)
    found = _find_cells(placement)
    cells = _cell_tables(placement, found)
    number = cells["cell_number"]
    edges, n_classes = _edges(placement, found)
    pairs, in_pairs = _pairs(placement, found.copies, edges, int(n_classes.max()), pair_classes)
    shared_at = np.where(shared >= 0, s.copy_cell[shared], -1)
    extents = np.empty((placement.n_group, 8), dtype=np.int32)
    extents[:, 0] = found.copies.sum(1)
    extents[:, 1] = lengths.max(axis=1, initial=0)
    extents[:, 2] = found.copies.max(axis=1, initial=0)
    extents[:, 3] = found.on_rank.max(axis=1, initial=0)
    extents[:, 4] = s.copy_multiplicity.max()
    extents[:, 5] = n_classes
    extents[:, 6] = np.where(n_classes > 0, -(-MOST_CLASSES // np.maximum(n_classes, 1)), 0)
    extents[:, 7] = in_pairs
    return {
        **cells,
        "rows": _rows(placement, found),
        # Ranks are what threads read side by side.
        "cell_number": np.ascontiguousarray(number.transpose(0, 2, 1)),
        "cell_ends": _cell_ends(placement, number),
        **_rank_experts(placement, number),
        "first_members": first_members,
        "column_start": s.column_start,
        "column_members": s.column_members,
        **_copy_arrays(placement),
        "shared_copies": shared,
        "shared_cells": np.append(number, np.int32(-1))[shared_at],
        "edges": edges,
        "extents": extents,
        "pairs": pairs,
        "search_steps": np.array([math.ceil(math.log2(int(per_expert.max())))], dtype=np.int32),
    }


def _fold_arrays(placement: Placement) -> dict[str, NDArray[Any]]:
    """List what `lplb_triton._backends.interior_point.solve_counts` reads besides."""
    s = placement.structure
    fixed_rank, column = find_load_targets(s)
    n_copies = _lengths(s.copy_start).astype(np.int64)
    nowhere = placement.ep_size * placement.max_columns
    return {
        # Fixed loads by rank, then weights by group and column.
        "fold_target": np.where(fixed_rank >= 0, fixed_rank, placement.ep_size + column),
        "mask": s.mask,
        "n_copies": n_copies,
        "copy_expert": np.arange(placement.n_logical).repeat(n_copies),
        "copy_target": np.where(s.copy_cell >= 0, s.copy_cell, nowhere).astype(np.int64),
    }


class DeviceTables:
    """One block of device memory with a typed view for every table.

    Captured CUDA graphs and launches hold the views' addresses, so the block lives as long as
    its owner and `write` only changes what is in it. ``kernels`` is whether Triton's kernels read
    the tables; the torch twin needs few of them. ``dense`` adds those of the interior-point kernel.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        *,
        kernels: bool = True,
        dense: bool = False,
    ) -> None:
        self._kernels, self._dense = kernels, dense
        # Kernels are compiled for as many classes of pairs as the first placement has.
        self._pair_classes: int | None = None
        arrays = self._arrays(placement)
        if kernels:
            self._pair_classes = arrays["pairs"].shape[1]
        self._offsets: dict[str, int] = {}
        size = 0
        for name, array in arrays.items():
            self._offsets[name] = size
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        # A table may be empty (no columns); its view must still have an address.
        self._block = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device=device)
        self._host = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        self.views = self._views(self._block, arrays)
        host = self._views(self._host, arrays)
        self._host_views = {name: view.numpy() for name, view in host.items()}
        self._sizes = {name: array.shape for name, array in arrays.items()}
        self._fill(arrays)
        self._holds = placement

    @property
    def n_bytes(self) -> int:
        """Size of the block."""
        return self._block.numel()

    def _views(
        self, block: torch.Tensor, arrays: dict[str, NDArray[Any]]
    ) -> dict[str, torch.Tensor]:
        """Typed view of every table in a block laid out by ``_offsets``."""
        views = {}
        for name, array in arrays.items():
            offset, dtype = self._offsets[name], torch.from_numpy(np.empty(0, array.dtype)).dtype
            views[name] = block[offset : offset + array.nbytes].view(dtype).view(array.shape)
        return views

    def _arrays(self, placement: Placement) -> dict[str, NDArray[Any]]:
        """Make all tables of a placement."""
        if not self._kernels:
            return _copy_arrays(placement)
        arrays = _arrays(placement, self._pair_classes)
        return {**arrays, **_fold_arrays(placement)} if self._dense else arrays

    def write(self, placement: Placement) -> None:
        """Copy another placement of the same sizes into the block, on the current stream.

        Does nothing if it is the one that is there.
        """
        if placement == self._holds:
            return
        arrays = self._arrays(placement)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._sizes:
            raise ValueError(f"placement must have the sizes of the first one, got {placement}")
        self._fill(arrays)
        self._holds = placement

    def _fill(self, arrays: dict[str, NDArray[Any]]) -> None:
        for name, array in arrays.items():
            self._host_views[name][...] = array
        self._block.copy_(self._host)
