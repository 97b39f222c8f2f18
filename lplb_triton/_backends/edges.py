"""Pairs of copies that levelling moves tokens between, in classes; see docs/method.md, equation 18.

An edge joins two cells of a column. The edges of a class name no rank twice, so that a solver can
level all of them at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from lplb_triton._backends.cells import count_earlier
from lplb_triton._layout import (
    FIELD_BITS,
    FIELD_MASK,
    PAIR_EDGES,
    PAIR_FIELD,
    PAIR_LANES,
    PAIR_RANKS,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton._backends.cells import Cells
    from lplb_triton.placement import Placement

__all__ = ["MAX_COPIES_ALL_JOINED", "make_edges", "make_pairs"]

# Up to so many copies of a column are joined each with each.
MAX_COPIES_ALL_JOINED = 4


@lru_cache(maxsize=64)
def _join_copies(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the pairs of n copies that are joined: all, or the edges of a hypercube."""
    i, j = np.triu_indices(n, 1)
    if n > MAX_COPIES_ALL_JOINED:
        between = i ^ j
        one_bit = (between & (between - 1)) == 0
        i, j = i[one_bit], j[one_bit]
    return i, j


def _join_cells(cells: Cells) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the two cells of each edge, as positions in ``cells``, the one of the lower rank first.

    Up to MAX_COPIES_ALL_JOINED copies of a column are joined each with each. More of them are
    joined as the corners of a hypercube are, so that tokens get from any copy to any other in few
    sweeps. Edges are in order of the cells.
    """
    copies = cells.copies.reshape(-1)
    several = (copies > 1).nonzero()[0]
    copies, first = copies[several], (copies.cumsum() - copies)[several]
    # The pairs for each number of copies that occurs, one number after the other.
    kinds = np.bincount(copies).nonzero()[0]
    pairs = [_join_copies(n) for n in kinds.tolist()] or [_join_copies(1)]
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


def _choose_classes(first: list[int], second: list[int], n_ranks: int) -> list[int]:
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


def make_edges(placement: Placement, cells: Cells) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Make the table of edges, int64, and count the classes of each group.

    The table is [n_group, most_classes + 1, width]; the counts are [n_group]. A word holds, from
    the highest field to the lowest, an edge's first and second cell and its first and second rank;
    -1 is no edge. There is none in the class after the last.
    """
    n_group, n_ranks, n_columns = placement.structure.mask.shape
    most_edges = max(MAX_COPIES_ALL_JOINED - 1, (n_ranks - 1).bit_length())
    most_on_a_rank = min(placement.static_per_rank, n_columns)
    most = min(2 * most_on_a_rank, placement.redundant_per_group) * most_edges
    table = np.full((n_group, most + 1, max(1, n_ranks // 2)), -1, dtype=np.int64)
    low, high = _join_cells(cells)
    # Ranks of all groups, numbered one after the other.
    rank = cells.group * n_ranks + cells.rank
    first, second = rank[low], rank[high]
    degree = np.bincount(np.concatenate((first, second)), minlength=n_group * n_ranks)
    # Classes are given greedily, edges of crowded ranks first. There are fewer than twice the
    # largest degree.
    order = (-degree[first] - degree[second]).argsort(kind="stable")
    taken = _choose_classes(first[order].tolist(), second[order].tolist(), n_group * n_ranks)
    classes = np.array(taken, dtype=np.int64)
    low, high = low[order], high[order]
    words = cells.number[low].astype(np.uint64)
    for field in (cells.number[high], cells.rank[low], cells.rank[high]):
        words <<= np.uint64(FIELD_BITS)
        words |= field.astype(np.uint64)
    group = cells.group[low]
    key = group * (most + 1) + classes
    table.reshape(n_group * (most + 1), -1)[key, count_earlier(key)] = words.view(np.int64)
    n_classes = np.zeros(n_group, dtype=np.int32)
    np.maximum.at(n_classes, group, classes.astype(np.int32) + 1)
    return table, n_classes


def _count_pair_classes(placement: Placement, copies: NDArray[np.int64], n_classes: int) -> int:
    """Return ``n_classes`` for a placement of pairs, or 0 if it isn't one that kernels take.

    The columns of a placement of pairs are single experts with two copies each, on different
    ranks. ``copies`` is that of `Cells`.
    """
    s = placement.structure
    if copies.max(initial=0) > 2 or s.copy_multiplicity.max() > 1:
        return 0
    if np.diff(s.column_start).max(initial=0) > 1:
        return 0
    if placement.group_size > PAIR_RANKS or placement.n_copies >= PAIR_FIELD:
        return 0
    parts = -(-placement.group_size // PAIR_LANES)
    return n_classes if n_classes * parts <= PAIR_EDGES else 0


def make_pairs(
    placement: Placement,
    copies: NDArray[np.int64],
    edges: NDArray[np.int64],
    n_classes: int,
    max_classes: int | None,
) -> tuple[NDArray[np.int64], bool]:
    """Make the table of pairs: a word for each rank's edge in each class.

    The table is [n_group, max_classes, group_size] int64; ``max_classes`` is by default as many as
    the placement needs. A word holds, from the lowest field to the highest, partner, expert,
    nothing and copy; a rank without an edge is its own partner. Also returns whether this is a
    placement of pairs whose classes fit; otherwise no rank has a partner.
    """
    s = placement.structure
    needed = _count_pair_classes(placement, copies, n_classes)
    max_classes = needed if max_classes is None else max_classes
    fits = 0 < needed <= max_classes
    n_group, n_ranks, _ = s.mask.shape
    fields = np.full((n_group, max_classes, n_ranks, 4), PAIR_FIELD, dtype=np.uint16)
    fields[..., 0] = np.arange(n_ranks)
    if fits:
        group, k, at = np.nonzero(edges[:, :max_classes] != -1)
        words = edges[group, k, at].view(np.uint64)
        second, first, cell = (
            words >> np.uint64(FIELD_BITS * i) & np.uint64(FIELD_MASK) for i in range(3)
        )
        expert = s.column_members[s.column_start[group, cell // np.uint64(2)]]
        copy = s.copy_start[expert]
        nothing = np.full_like(copy, PAIR_FIELD)
        fields[group, k, first] = np.stack((second, expert, nothing, copy), axis=1)
        fields[group, k, second] = np.stack((first, expert, nothing, copy + 1), axis=1)
    return fields.view(np.int64)[..., 0], fits
