"""Moves along the edges between cells, for all candidates at once (equation 29 of docs/method.md).

A warp is a candidate and a lane is a rank, or two or more. A cell belongs to one rank, and so only
its lane reads and writes it. Both ends of an edge compute the same decision from the same numbers:
every expression is the same whichever of the two comes first.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.time.cost import count_tiles, find_times

RANK_BITS = tl.constexpr(_layout.TIME_RANK_BITS)
RANK_MASK = tl.constexpr(_layout.TIME_RANK_MASK)
# Weight of both ranks' times beside that of the slower one, and what a split must win by.
SUM_WEIGHT = tl.constexpr(0.1)
KEEP = tl.constexpr(0.999999)
# Places whose rows are loaded at once.
PLACES_AT_ONCE = tl.constexpr(4)
# Ranks of a slice, where there are two slices.
LANES = tl.constexpr(32)


@triton.jit
def count_ranks(rows_ptr, inside, n_ranks, n_places, NARROW: tl.constexpr, WIDE: tl.constexpr):
    """Sum up cells by rank: active ones, narrow and wide tiles, and rows (equation 28).

    ``rows_ptr`` are the addresses of the ranks' first places.
    """
    zero = inside.to(tl.int32) * 0
    active, narrow, wide, total = zero, zero, zero, zero
    for first in range(0, n_places, PLACES_AT_ONCE):
        # Loads of a block are under way at the same time.
        loaded = ()
        for i in tl.static_range(PLACES_AT_ONCE):
            there = inside & (first + i < n_places)
            loaded += (tl.load(rows_ptr + (first + i) * n_ranks, mask=there, other=0),)
        for i in tl.static_range(PLACES_AT_ONCE):
            active += (loaded[i] > 0).to(tl.int32)
            narrow += count_tiles(loaded[i], NARROW)
            wide += count_tiles(loaded[i], WIDE)
            total += loaded[i]
    return active, narrow, wide, total


@triton.jit
def _take(values, partner, SLICES: tl.constexpr):
    """Return the value of each rank's partner, from the same candidate.

    With two slices, ranks 32 and up are in the second one.
    """
    if SLICES == 2:
        low, high = tl.split(values)
        one, two = tl.split(partner)
        first = tl.gather(low, one & (LANES - 1), 1)
        first = tl.where(one < LANES, first, tl.gather(high, one & (LANES - 1), 1))
        second = tl.gather(low, two & (LANES - 1), 1)
        second = tl.where(two < LANES, second, tl.gather(high, two & (LANES - 1), 1))
        found = tl.join(first, second)
    else:
        found = tl.gather(values, partner, 1)
    return found


@triton.jit
def _cut_last_tile(rows, is_wide, MARGIN: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr):
    """Return the rows that are left without the last tile, which may be a part of one."""
    before = tl.maximum(rows - 1 + MARGIN, 0)
    narrow = (before >> NARROW) << NARROW
    whole = tl.where(is_wide, (before >> WIDE) << WIDE, narrow) - MARGIN
    return tl.minimum(tl.maximum(whole, 0), rows)


@triton.jit
def _weigh(mine, other):
    """Return what a split of two ranks is judged by, smaller being better."""
    return tl.maximum(mine, other) + (mine + other) * SUM_WEIGHT


@triton.jit
def improve_cells(
    rows_ptr,  # addresses of the ranks' first places, in all candidates
    words_ptr,  # addresses of the ranks' words of the first step
    ranks,  # active cells, narrow tiles, wide tiles and rows of all ranks
    rank,  # number of each
    inside,  # whether there is such a rank
    table,
    slopes,
    wide_rows,
    n_ranks,
    n_steps,
    SLICES: tl.constexpr,
    MARGIN: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Let every edge take the best of four splits, class by class; returns the ranks' new sums.

    Rows of cells change in memory. A split is judged by the slower of both ranks, and with a small
    weight by both: that closes cells which the slowest rank doesn't need.
    """
    active, narrow, wide, total = ranks
    t = find_times(active, narrow, wide, total, table, slopes, wide_rows, ACTIVE, TILES)
    word = tl.load(words_ptr, mask=inside & (n_steps > 0), other=0)
    for step in range(0, n_steps):
        # The next step's word is under way while this one is made.
        ahead = inside & (step + 1 < n_steps)
        next_word = tl.load(words_ptr + (step + 1) * n_ranks, mask=ahead, other=0)
        partner = tl.where(inside, word & RANK_MASK, rank)
        is_edge = partner != rank
        cell_ptr = rows_ptr + (word >> RANK_BITS) * n_ranks
        x = tl.load(cell_ptr, mask=is_edge, other=0)
        other_x = _take(x, partner, SLICES)
        other_t = _take(t, partner, SLICES)
        is_wide = total + _take(total, partner, SLICES) >= 2 * wide_rows
        both = x + other_x
        # The slower rank gives its last tile; of equal ones the higher rank does.
        slower = (t > other_t) | ((t == other_t) & (rank > partner))
        cut = _cut_last_tile(tl.where(slower, x, other_x), is_wide, MARGIN, NARROW, WIDE)
        active -= (x > 0).to(tl.int32)
        narrow -= count_tiles(x, NARROW)
        wide -= count_tiles(x, WIDE)
        total -= x
        best, new, new_t = _weigh(t, other_t) * KEEP, x, t
        for split in tl.static_range(3):
            if split == 2:
                tried = tl.where(slower, cut, both - cut)
            else:
                tried = tl.where((rank < partner) == (split == 0), both, 0)
            tried_t = find_times(
                active + (tried > 0).to(tl.int32), narrow + count_tiles(tried, NARROW),
                wide + count_tiles(tried, WIDE), total + tried, table, slopes, wide_rows,
                ACTIVE, TILES,
            )  # fmt: skip
            value = _weigh(tried_t, _take(tried_t, partner, SLICES))
            is_better = is_edge & (value < best)
            new = tl.where(is_better, tried, new)
            new_t = tl.where(is_better, tried_t, new_t)
            best = tl.minimum(best, value)
        t = new_t
        active += (new > 0).to(tl.int32)
        narrow += count_tiles(new, NARROW)
        wide += count_tiles(new, WIDE)
        total += new
        tl.store(cell_ptr, new, mask=is_edge)
        word = next_word
    return active, narrow, wide, total
