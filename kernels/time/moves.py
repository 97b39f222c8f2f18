"""Moves along the edges between cells, for all candidates at once (equation 29 of docs/method.md).

A warp is a candidate. Numbers by rank are tuples of slices [CANDIDATES, LANES], one rank in each
lane, which stay in registers. A cell belongs to one rank, and so only its lane reads and writes it.
Both ends of an edge compute the same decision from the same numbers: every expression is the same
whichever of the two comes first.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.lanes import load_lanes, number_ranks, store_lanes, take_partners
from lplb_triton.kernels.time.cost import count_active, count_tiles, find_times

RANK_BITS = tl.constexpr(_layout.TIME_RANK_BITS)
RANK_MASK = tl.constexpr(_layout.TIME_RANK_MASK)
# Weight of both ranks' times beside that of the slower one, and what a split must win by.
SUM_WEIGHT = tl.constexpr(0.1)
KEEP = tl.constexpr(0.999999)
# Places whose rows are loaded at once.
PLACES_AT_ONCE = tl.constexpr(8)


@triton.jit
def _count_rows(loaded, sums, NARROW: tl.constexpr, WIDE: tl.constexpr):
    """Add the active cells, tiles and rows of a block of places to sums."""
    active, narrow, wide, total = sums
    for i in tl.static_range(PLACES_AT_ONCE):
        active += count_active(loaded[i])
        narrow += count_tiles(loaded[i], NARROW)
        wide += count_tiles(loaded[i], WIDE)
        total += loaded[i]
    return active, narrow, wide, total


@triton.jit
def count_ranks(
    before_ptr, after_ptr, n_ranks, n_places, SLICES: tl.constexpr, LANES: tl.constexpr,
    CANDIDATES: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum up cells by rank: active ones, narrow and wide tiles, and rows (equation 28).

    ``before_ptr`` and ``after_ptr`` [CANDIDATES, 1] are the addresses of rows of two plans for each
    candidate. Returns by slice the four sums of the first, then of the second.
    """
    befores, afters = (), ()
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        none = rank * 0
        before, after = (none, none, none, none), (none, none, none, none)
        for first in range(0, n_places, PLACES_AT_ONCE):
            # Loads of a block are under way at the same time.
            loaded, later = (), ()
            for i in tl.static_range(PLACES_AT_ONCE):
                there = (rank < n_ranks) & (first + i < n_places)
                at = (first + i) * n_ranks + rank
                loaded += (load_lanes(before_ptr + at, there, CANDIDATES, LANES),)
                later += (load_lanes(after_ptr + at, there, CANDIDATES, LANES),)
            before = _count_rows(loaded, before, NARROW, WIDE)
            after = _count_rows(later, after, NARROW, WIDE)
        befores += (before,)
        afters += (after,)
    return _split_sums(befores, SLICES), _split_sums(afters, SLICES)


@triton.jit
def _split_sums(slices, SLICES: tl.constexpr):
    """Turn sums by slice into slices of each of the four sums."""
    all_active, all_narrow, all_wide, all_rows = (), (), (), ()
    for h in tl.static_range(SLICES):
        active, narrow, wide, total = slices[h]
        all_active += (active,)
        all_narrow += (narrow,)
        all_wide += (wide,)
        all_rows += (total,)
    return all_active, all_narrow, all_wide, all_rows


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
def _try_split(
    x, tried, active, narrow, wide, total, table, slopes, wide_rows, LANES: tl.constexpr,
    CANDIDATES: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, ACTIVE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Return the times of ranks once a cell of each goes from ``x`` to ``tried`` rows."""
    active += count_active(tried) - count_active(x)
    narrow += count_tiles(tried, NARROW) - count_tiles(x, NARROW)
    wide += count_tiles(tried, WIDE) - count_tiles(x, WIDE)
    total += tried - x
    return find_times(
        active, narrow, wide, total, table, slopes, wide_rows, CANDIDATES, LANES, ACTIVE, TILES
    )


@triton.jit
def _find_splits(
    xs, partners, times, totals, wide_rows, SLICES: tl.constexpr, LANES: tl.constexpr,
    CANDIDATES: tl.constexpr, MARGIN: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return, by slice, the rows of both cells of an edge, and what the third split leaves here.

    In it the slower rank gives its last tile; of equal ones the higher rank does.
    """
    sums, thirds = (), ()
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        other_x = take_partners(xs, partners[h], SLICES, LANES)
        other_t = take_partners(times, partners[h], SLICES, LANES)
        rows = totals[h] + take_partners(totals, partners[h], SLICES, LANES)
        slower = (times[h] > other_t) | ((times[h] == other_t) & (rank > partners[h]))
        source = tl.where(slower, xs[h], other_x)
        cut = _cut_last_tile(source, rows >= 2 * wide_rows, MARGIN, NARROW, WIDE)
        both = xs[h] + other_x
        sums += (both,)
        thirds += (tl.where(slower, cut, both - cut),)
    return sums, thirds


@triton.jit
def _load_words(
    words_ptr, step, n_steps, n_ranks, SLICES: tl.constexpr, LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Load the words of one step by slice; where none is, a rank is its own partner."""
    words = ()
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        there = (rank < n_ranks) & (step < n_steps)
        word = load_lanes(words_ptr + step * n_ranks + rank, there, CANDIDATES, LANES)
        words += (tl.where(there, word, rank),)
    return words


@triton.jit
def _choose_splits(
    xs, partners, times, active, narrow, wide, total, table, slopes, wide_rows,
    SLICES: tl.constexpr, LANES: tl.constexpr, CANDIDATES: tl.constexpr, MARGIN: tl.constexpr,
    NARROW: tl.constexpr, WIDE: tl.constexpr, ACTIVE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Return the rows and times of ranks after the best of four splits, by slice."""
    sums, thirds = _find_splits(
        xs, partners, times, total, wide_rows, SLICES, LANES, CANDIDATES, MARGIN, NARROW, WIDE
    )
    best = ()
    for h in tl.static_range(SLICES):
        best += (_weigh(times[h], take_partners(times, partners[h], SLICES, LANES)) * KEEP,)
    new, new_times = xs, times
    for split in tl.static_range(3):
        tried, tried_times = (), ()
        for h in tl.static_range(SLICES):
            if split == 2:
                rows = thirds[h]
            else:
                first = number_ranks(h, LANES, CANDIDATES) < partners[h]
                rows = tl.where(first == (split == 0), sums[h], 0)
            tried += (rows,)
            tried_times += (
                _try_split(
                    xs[h], rows, active[h], narrow[h], wide[h], total[h], table, slopes, wide_rows,
                    LANES, CANDIDATES, NARROW, WIDE, ACTIVE, TILES,
                ),
            )  # fmt: skip
        kept, kept_times, least = (), (), ()
        for h in tl.static_range(SLICES):
            is_edge = partners[h] != number_ranks(h, LANES, CANDIDATES)
            value = _weigh(tried_times[h], take_partners(tried_times, partners[h], SLICES, LANES))
            is_better = is_edge & (value < best[h])
            kept += (tl.where(is_better, tried[h], new[h]),)
            kept_times += (tl.where(is_better, tried_times[h], new_times[h]),)
            least += (tl.minimum(best[h], value),)
        new, new_times, best = kept, kept_times, least
    return new, new_times


@triton.jit
def improve_cells(
    rows_ptr,  # [CANDIDATES, 1] addresses of the candidates' rows
    words_ptr,  # [CANDIDATES, 1] addresses of the words of their first step
    active,  # sums of all ranks, see `count_ranks`
    narrow,
    wide,
    total,
    table,  # [CANDIDATES, 1] addresses of their tables
    slopes,
    wide_rows,
    n_ranks,
    n_steps,
    SLICES: tl.constexpr,
    LANES: tl.constexpr,
    CANDIDATES: tl.constexpr,
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
    times = ()
    for h in tl.static_range(SLICES):
        found = find_times(
            active[h], narrow[h], wide[h], total[h], table, slopes, wide_rows, CANDIDATES, LANES,
            ACTIVE, TILES,
        )  # fmt: skip
        times += (found,)
    words = _load_words(words_ptr, 0, n_steps, n_ranks, SLICES, LANES, CANDIDATES)
    for step in range(0, n_steps):
        # The next step's words are under way while this one is made.
        ahead = _load_words(words_ptr, step + 1, n_steps, n_ranks, SLICES, LANES, CANDIDATES)
        partners, cells, xs = (), (), ()
        for h in tl.static_range(SLICES):
            rank = number_ranks(h, LANES, CANDIDATES)
            partner = words[h] & RANK_MASK
            cell_ptr = rows_ptr + ((words[h] >> RANK_BITS) * n_ranks + rank)
            partners += (partner,)
            cells += (cell_ptr,)
            xs += (load_lanes(cell_ptr, partner != rank, CANDIDATES, LANES),)
        new, times = _choose_splits(
            xs, partners, times, active, narrow, wide, total, table, slopes, wide_rows,
            SLICES, LANES, CANDIDATES, MARGIN, NARROW, WIDE, ACTIVE, TILES,
        )  # fmt: skip
        to_active, to_narrow, to_wide, to_total = (), (), (), ()
        for h in tl.static_range(SLICES):
            to_active += (active[h] + count_active(new[h]) - count_active(xs[h]),)
            to_narrow += (narrow[h] + count_tiles(new[h], NARROW) - count_tiles(xs[h], NARROW),)
            to_wide += (wide[h] + count_tiles(new[h], WIDE) - count_tiles(xs[h], WIDE),)
            to_total += (total[h] + new[h] - xs[h],)
            is_edge = partners[h] != number_ranks(h, LANES, CANDIDATES)
            store_lanes(cells[h], new[h], is_edge, CANDIDATES, LANES)
        active, narrow, wide, total, words = to_active, to_narrow, to_wide, to_total, ahead
    return active, narrow, wide, total
