"""A placement's index tables in fixed device memory, rewritten in place."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

__all__ = ["DeviceTables"]

# Sections start on this many bytes, so that no kernel is compiled twice for alignment.
ALIGNMENT = 256
# Copies of a column of which each is joined with each.
FEW = 4
# Classes of edges that levelling goes through before the interior-point method takes over.
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
# Cells of a rank that the kernels sum at once. This and the next are in kernels/levelling.py too.
RANK_CELLS = 8
# Copies of a column whose ranks have a table of their own.
COPIES_AT_ONCE = 4
# Members of a column that the kernels take at once, from a table of their own (a power of two).
MEMBERS = 4


def _shared_copies(placement: Placement) -> NDArray[np.int32]:
    """[n_group, n] copies of replicated experts by group, padded with -1.

    Every redundant slot makes at most two of them, whatever the placement.
    """
    s = placement.structure
    size = (placement.n_group, 2 * placement.redundant_per_group)
    shared = np.full(size, -1, dtype=np.int32)
    per_expert = np.diff(s.copy_start)
    copies = np.flatnonzero(np.repeat(per_expert > 1, per_expert))
    group = np.repeat(s.cell_group, per_expert)[copies]
    for g in range(placement.n_group):
        mine = copies[group == g]
        shared[g, : mine.size] = mine
    return shared


def _cells(placement: Placement) -> dict[str, NDArray[np.int32]]:
    """Make the tables of a group's cells, numbered by column, then by rank; see `SolveTables`.

    ``cell_number`` is that number here by group, rank and column, -1 where no copy is.
    """
    mask = placement.structure.mask
    n_group, n_ranks, n_columns = mask.shape
    start = np.zeros((n_group, n_columns + 1), dtype=np.int32)
    start[:, 1:] = np.cumsum(mask.sum(1), 1)
    number = np.full(mask.shape, -1, dtype=np.int32)
    if mask.sum((1, 2)).max() > MOST_CELLS:
        raise ValueError(
            f"placement must have at most {MOST_CELLS} pairs of a column and its rank in a group, "
            f"got {mask.sum((1, 2)).max()}"
        )
    first_ranks = np.full((n_group, COPIES_AT_ONCE, n_columns), -1, dtype=np.int32)
    cells = np.full((n_group, 4, 2 * placement.redundant_per_group), -1, dtype=np.int32)
    most_on_a_rank = max(1, min(placement.slots_per_rank, n_columns))
    most_on_a_rank = -(-most_on_a_rank // RANK_CELLS) * RANK_CELLS
    on_rank = np.full((n_group, most_on_a_rank, n_ranks), -1, dtype=np.int32)
    for group in range(n_group):
        columns, ranks = np.nonzero(mask[group].T)
        number[group, ranks, columns] = np.arange(ranks.size)
        first, copies = start[group, columns], np.diff(start[group])[columns]
        cells[group, :, : ranks.size] = ranks, columns, first, copies
        nth = np.arange(ranks.size) - first
        early = nth < COPIES_AT_ONCE
        first_ranks[group, nth[early], columns[early]] = ranks[early]
        for r in range(n_ranks):
            mine = number[group, r, mask[group, r]]
            on_rank[group, : mine.size, r] = mine
    return {
        "cells": cells,
        "cell_start": start,
        "rank_cells": on_rank,
        "cell_number": number,
        "first_ranks": first_ranks,
    }


def _cell_ends(placement: Placement, number: NDArray[np.int32]) -> NDArray[np.int32]:
    """For each cell, the last copy there of its column's first expert, and the one before all.

    Copies of an expert ascend by rank, those on a rank are neighbours; -1 if none is before.
    ``number`` is ``cell_number`` of `_cells`.
    """
    s = placement.structure
    size = (placement.n_group, 2, 2 * placement.redundant_per_group)
    found = np.full(size, -1, dtype=np.int32)
    # The first expert of a column is written last.
    copies = np.flatnonzero(s.copy_cell >= 0)[::-1]
    at = s.copy_cell[copies]
    group, cell = at // number[0].size, number.reshape(-1)[at]
    index = s.copy_index[copies]
    last = index == s.copy_multiplicity[copies] - 1
    found[group[last], 0, cell[last]] = copies[last]
    before = (index == 0) & ~np.isin(copies, s.copy_start)
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


def _edges(
    placement: Placement, number: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Pairs of copies that the solver levels, in classes that name no rank twice.

    Up to FEW copies of a column are joined each with each, more of them as the corners of a
    hypercube are, so that few sweeps reach all. Returns [n_group, most_classes + 1, width] (cells,
    then ranks of an edge, the first before the second, 16 bits each; -1 for none, all of it in the
    class after the last) and the number of classes [n_group]; see docs/method.md, equation 18.
    """
    mask = placement.structure.mask
    n_group, n_ranks, n_columns = mask.shape
    most_edges = max(FEW - 1, (n_ranks - 1).bit_length())
    most_on_a_rank = min(placement.slots_per_rank, n_columns)
    most = min(2 * most_on_a_rank, placement.redundant_per_group) * most_edges
    table = np.full((n_group, most + 1, max(1, n_ranks // 2)), -1, dtype=np.int64)
    n_classes = np.zeros(n_group, dtype=np.int32)
    for group in range(n_group):
        edges = []
        for column in np.flatnonzero(mask[group].any(0)):
            ranks = np.flatnonzero(mask[group, :, column]).tolist()
            for i, j in itertools.combinations(range(len(ranks)), 2):
                if len(ranks) <= FEW or (i ^ j).bit_count() == 1:
                    edges.append((ranks[i], ranks[j], int(column)))
        degree = np.bincount([r for edge in edges for r in edge[:2]], minlength=n_ranks)
        # Greedily, crowded ranks first: fewer than twice the largest degree.
        edges.sort(key=lambda edge: -int(degree[edge[0]] + degree[edge[1]]))
        taken: list[set[int]] = []
        for first, second, at in edges:
            fits = (k for k, t in enumerate(taken) if first not in t and second not in t)
            k = next(fits, len(taken))
            if k == len(taken):
                taken.append(set())
            cells = int(number[group, first, at]) << 16 | int(number[group, second, at])
            edge = np.uint64(cells << 32 | first << 16 | second).astype(np.int64)
            table[group, k, len(taken[k]) // 2] = edge
            taken[k] |= {first, second}
        n_classes[group] = len(taken)
    return table, n_classes


def _pair_classes(placement: Placement, n_classes: int) -> int:
    """Classes of edges that a placement of pairs needs, ``n_classes``, or 0 if it isn't one.

    Its columns are single experts with two copies each, on different ranks.
    """
    s = placement.structure
    copies = s.mask.sum(1)
    several = np.diff(s.column_start, axis=1).max(initial=0) > 1 or s.copy_multiplicity.max() > 1
    if several or not (copies == 2)[copies > 0].all():
        return 0
    if placement.group_size > PAIR_RANKS or placement.n_physical >= PAIR_FIELD:
        return 0
    parts = -(-placement.group_size // PAIR_LANES)
    return n_classes if n_classes * parts <= PAIR_EDGES else 0


def _pairs(
    placement: Placement, edges: NDArray[np.int64], n_classes: int, room: int | None
) -> tuple[NDArray[np.int64], bool]:
    """[n_group, room, group_size] words as for `kernels.pairs._load_pairs`.

    ``room`` is for as many classes, by default for those that the placement needs. Also returns
    whether it is one of pairs for which there is room; otherwise no rank has a partner.
    """
    s = placement.structure
    needed = _pair_classes(placement, n_classes)
    room = needed if room is None else room
    fits = 0 < needed <= room
    n_group, n_ranks, _ = s.mask.shape
    fields = np.full((n_group, room, n_ranks, 4), PAIR_FIELD, dtype=np.uint16)
    fields[..., 0] = np.arange(n_ranks)
    for group, k, at in zip(*np.nonzero(edges[:, :room] != -1), strict=True) if fits else ():
        second, first, cell, _ = edges[group, k, at : at + 1].view(np.uint16).tolist()
        expert = s.column_members[s.column_start[group, cell // 2]]
        copy = s.copy_start[expert]
        fields[group, k, first] = second, expert, PAIR_FIELD, copy
        fields[group, k, second] = first, expert, PAIR_FIELD, copy + 1
    return fields.view(np.int64)[..., 0], fits


def _arrays(placement: Placement, pair_classes: int | None = None) -> dict[str, NDArray[Any]]:
    """Everything the kernels read of a placement.

    Shapes depend on its sizes alone, and on how many classes of edges there is room for in the
    table of pairs (as for `_pairs`).
    """
    s = placement.structure
    lengths = np.diff(s.column_start, axis=1)
    nth = np.arange(MEMBERS)
    at = np.where(nth < lengths[..., None], s.column_start[:, :-1, None] + nth, -1)
    first_members = np.where(at >= 0, np.append(s.column_members, -1)[at], np.int32(-1))
    first_members = np.ascontiguousarray(first_members.transpose(0, 2, 1))
    most_copies = int(np.diff(s.copy_start).max())
    shared = _shared_copies(placement)
    cells = _cells(placement)
    number = cells["cell_number"]
    edges, n_classes = _edges(placement, number)
    pairs, in_pairs = _pairs(placement, edges, int(n_classes.max()), pair_classes)
    shared_at = np.where(shared >= 0, s.copy_cell[shared], -1)
    extents = (
        s.mask.sum((1, 2)),
        lengths.max(axis=1, initial=0),
        s.mask.sum(1).max(axis=1, initial=0),
        s.mask.sum(2).max(axis=1, initial=0),
        np.full(placement.n_group, s.copy_multiplicity.max()),
        n_classes,
        np.where(n_classes > 0, -(-MOST_CLASSES // np.maximum(n_classes, 1)), 0),
        np.full(placement.n_group, in_pairs),
    )
    return {
        **cells,
        # Ranks are what threads read side by side.
        "cell_number": np.ascontiguousarray(number.transpose(0, 2, 1)),
        "cell_ends": _cell_ends(placement, number),
        **_rank_experts(placement, number),
        "first_members": first_members,
        "column_start": s.column_start,
        "column_members": s.column_members,
        "copy_cell": s.copy_cell,
        "shared_copies": shared,
        "shared_cells": np.append(number, np.int32(-1))[shared_at],
        "copy_index": s.copy_index,
        "copy_multiplicity": s.copy_multiplicity,
        "edges": edges,
        "extents": np.stack(extents, axis=1).astype(np.int32),
        "pairs": pairs,
        "copy_start": s.copy_start,
        "copy_slot": s.copy_slot,
        "search_steps": np.array([math.ceil(math.log2(most_copies))], dtype=np.int32),
    }


class DeviceTables:
    """One block of device memory with a typed view for every table.

    Captured CUDA graphs and launches hold the views' addresses, so the block lives as long as
    its owner and `write` only changes what is in it.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        arrays = _arrays(placement)
        # Kernels are compiled for these.
        self._pair_classes = arrays["pairs"].shape[1]
        self._offsets: dict[str, int] = {}
        size = 0
        for name, array in arrays.items():
            self._offsets[name] = size
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        # A table may be empty (no columns); its view must still have an address.
        self._block = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device=device)
        self.views = {
            name: self._view(self._offsets[name], array) for name, array in arrays.items()
        }
        self._sizes = {name: array.shape for name, array in arrays.items()}
        self._fill(arrays)

    @property
    def n_bytes(self) -> int:
        """Size of the block."""
        return self._block.numel()

    def _view(self, offset: int, array: NDArray[Any]) -> torch.Tensor:
        dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
        return self._block[offset : offset + array.nbytes].view(dtype).view(array.shape)

    def write(self, placement: Placement) -> None:
        """Copy another placement of the same sizes into the block, on the current stream."""
        arrays = _arrays(placement, self._pair_classes)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._sizes:
            raise ValueError(f"placement must have the sizes of the first one, got {placement}")
        self._fill(arrays)

    def _fill(self, arrays: dict[str, NDArray[Any]]) -> None:
        host = np.zeros(self._block.numel(), dtype=np.uint8)
        for name, array in arrays.items():
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            host[self._offsets[name] : self._offsets[name] + raw.size] = raw
        self._block.copy_(torch.from_numpy(host))
