"""Moves along the edges between cells, for all candidates at once (equation 35 of docs/method.md).

A warp is a candidate. Numbers by rank are tuples of slices [CANDIDATES, LANES], one rank in each
lane, which stay in registers. A cell belongs to one rank, and so only its lane reads and writes it.
Both ends of an edge compute the same move with the opposite sign, in whole numbers.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.lanes import load_lanes, number_ranks, store_lanes, take_partners

CANDIDATES = tl.constexpr(_layout.NEAR_CANDIDATES)
RANK_BITS = tl.constexpr(_layout.NEAR_RANK_BITS)
RANK_MASK = tl.constexpr(_layout.NEAR_RANK_MASK)
WITHIN_AT = tl.constexpr(_layout.NEAR_WITHIN_AT)
RELAXED_AT = tl.constexpr(_layout.NEAR_RELAXED_AT)
SHIFT_AT = tl.constexpr(_layout.NEAR_SHIFT_AT)
LAST_SHIFT = tl.constexpr(_layout.NEAR_LAST_SHIFT)
# Numbers of a rank that are loaded at once.
AT_ONCE = tl.constexpr(8)
LONE_AT_ONCE = tl.constexpr(16)


@triton.jit
def load_lone(lone_ptr, first, n_ranks, most_lone, SLICES: tl.constexpr, LANES: tl.constexpr):
    """Load a block of experts that are on one rank only, by slice, [LONE_AT_ONCE, LANES].

    ``lone_ptr`` is the address of their numbers, [most_lone, n_ranks], -1 for none.
    """
    experts = ()
    number = first + tl.arange(0, LONE_AT_ONCE)[:, None]
    for h in tl.static_range(SLICES):
        rank = h * LANES + tl.arange(0, LANES)[None, :]
        there = (rank < n_ranks) & (number < most_lone)
        experts += (tl.load(lone_ptr + number * n_ranks + rank, mask=there, other=-1),)
    return experts


@triton.jit
def _count_lone(counts_ptr, experts, SLICES: tl.constexpr, LANES: tl.constexpr):
    """Sum up the tokens of a block of such experts, by rank."""
    loaded, sums = (), ()
    for h in tl.static_range(SLICES):
        loaded += (load_lanes(counts_ptr + experts[h], experts[h] >= 0, LONE_AT_ONCE, LANES),)
    for h in tl.static_range(SLICES):
        found = tl.sum(tl.maximum(loaded[h], 0), 0)
        sums += (found[None, :] + number_ranks(h, LANES, CANDIDATES) * 0,)
    return sums


@triton.jit
def sum_lone(
    counts_ptr, lone_ptr, experts, n_ranks, most_lone, SLICES: tl.constexpr, LANES: tl.constexpr
):
    """Sum up the tokens of experts that are on one rank only, by rank.

    ``experts`` is the first block of `load_lone`.
    """
    sums = _count_lone(counts_ptr, experts, SLICES, LANES)
    for first in range(LONE_AT_ONCE, most_lone, LONE_AT_ONCE):
        more = load_lone(lone_ptr, first, n_ranks, most_lone, SLICES, LANES)
        added, new = _count_lone(counts_ptr, more, SLICES, LANES), ()
        for h in tl.static_range(SLICES):
            new += (sums[h] + added[h],)
        sums = new
    return sums


@triton.jit
def add_cells(
    loads, x_ptr, on_rank_ptr, n_ranks, most_on_rank, SLICES: tl.constexpr, LANES: tl.constexpr
):
    """Add the units of cells to numbers by rank.

    ``x_ptr`` [CANDIDATES, 1] are the addresses of the candidates' units, and ``on_rank_ptr`` is
    that of the ranks' numbers of cells.
    """
    sums = ()
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        n_cells = tl.load(on_rank_ptr + rank, mask=rank < n_ranks, other=0)
        load = loads[h]
        for first in range(0, most_on_rank, AT_ONCE):
            loaded = ()
            for i in tl.static_range(AT_ONCE):
                at = x_ptr + ((first + i) * n_ranks + rank)
                loaded += (tl.load(at, mask=first + i < n_cells, other=0),)
            for i in tl.static_range(AT_ONCE):
                load += loaded[i]
        sums += (load,)
    return sums


@triton.jit
def _divide(values, quarters):
    """Return ``quarters / 4`` of whole numbers, rounded towards zero."""
    return (values * quarters + tl.where(values < 0, 3, 0)) >> 2


@triton.jit
def _choose_move(load, other_load, near, far, is_within, low, price, quarters):
    """Return the units that this rank gives to the other one, were there no limit.

    ``near`` is its own surplus, and ``far`` what the other one's is below 0.
    """
    ahead = load - other_load
    fewer = tl.maximum(low + price - other_load, _divide(ahead + price, quarters))
    same = _divide(ahead, quarters)
    more = tl.minimum(load - low - price, _divide(ahead - price, quarters))
    moved = tl.minimum(fewer, tl.minimum(near, far))
    moved = tl.maximum(moved, tl.minimum(same, tl.maximum(near, far)))
    return tl.where(is_within, same, tl.maximum(moved, more))


@triton.jit
def load_words(words_ptr, step, n_steps, n_ranks, SLICES: tl.constexpr, LANES: tl.constexpr):
    """Load the words of one step by slice; where none is, a rank is its own partner."""
    words = ()
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        there = (rank < n_ranks) & (step < n_steps)
        word = tl.load(words_ptr + step * n_ranks + rank, mask=there, other=0)
        words += (tl.where(there, word, rank),)
    return words


@triton.jit
def _load_cells(rows_ptr, words, n_ranks, SLICES: tl.constexpr, LANES: tl.constexpr):
    """Load a number of the cells that words name, by slice; 0 where there is no edge."""
    found = ()
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        cell = ((words[h] >> RANK_BITS) & RANK_MASK) * n_ranks + rank
        is_edge = (words[h] & RANK_MASK) != rank
        found += (load_lanes(rows_ptr + cell, is_edge, CANDIDATES, LANES),)
    return found


@triton.jit
def _store_cells(rows_ptr, words, values, n_ranks, SLICES: tl.constexpr, LANES: tl.constexpr):
    """Store a number of the cells that words name."""
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        cell = ((words[h] >> RANK_BITS) & RANK_MASK) * n_ranks + rank
        is_edge = (words[h] & RANK_MASK) != rank
        store_lanes(rows_ptr + cell, values[h], is_edge, CANDIDATES, LANES)


@triton.jit
def _renew(loaded, ahead, words, values, SLICES: tl.constexpr, LANES: tl.constexpr):
    """Return numbers that were loaded ahead, renewed where this step has changed the same cell."""
    found = ()
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        is_edge = (words[h] & RANK_MASK) != rank
        place = (words[h] >> RANK_BITS) & RANK_MASK
        is_same = is_edge & (((ahead[h] >> RANK_BITS) & RANK_MASK) == place)
        found += (tl.where(is_same, values[h], loaded[h]),)
    return found


@triton.jit
def _move(
    xs, surpluses, loads, words, aim, mean, is_falling, SLICES: tl.constexpr, LANES: tl.constexpr
):
    """Make one step; returns new units and surpluses of the cells, and new loads of the ranks."""
    new_xs, new_surpluses, new_loads, lacks = (), (), (), ()
    for h in tl.static_range(SLICES):
        # ptxas drops the sign of a number that is negated where it is compared (see
        # tests/compile_kernels.py), so it is negated on the other rank.
        lacks += (-surpluses[h],)
    for h in tl.static_range(SLICES):
        rank = number_ranks(h, LANES, CANDIDATES)
        word = words[h]
        partner = word & RANK_MASK
        is_edge = partner != rank
        is_within = ((word >> WITHIN_AT) & 1) > 0
        is_relaxed = is_falling & (((word >> RELAXED_AT) & 1) > 0)
        shift = tl.where(is_falling, word >> SHIFT_AT, LAST_SHIFT)
        price = tl.maximum(mean >> shift, 1)
        low = aim - price - (price >> 1)
        other_x = take_partners(xs, partner, SLICES, LANES)
        far = take_partners(lacks, partner, SLICES, LANES)
        other_load = take_partners(loads, partner, SLICES, LANES)
        moved = _choose_move(
            loads[h], other_load, surpluses[h], far, is_within, low, price,
            tl.where(is_relaxed, 3, 2),
        )  # fmt: skip
        moved = tl.minimum(tl.maximum(moved, -other_x), xs[h])
        moved = tl.where(is_edge, moved, 0)
        surplus = surpluses[h] - moved
        # Cells of one node share what the node has above its own tokens; the lower rank rounds
        # its half down, the other one up.
        both = surplus - far + moved
        half = (both + (rank > partner).to(tl.int32)) >> 1
        new_xs += (xs[h] - moved,)
        new_surpluses += (tl.where(is_within, half, surplus),)
        new_loads += (loads[h] - moved,)
    return new_xs, new_surpluses, new_loads


@triton.jit
def move_units(
    x_ptr,  # [CANDIDATES, 1] addresses of the candidates' units, by slot
    surplus_ptr,  # [CANDIDATES, 1] addresses of their surpluses
    words_ptr,  # [CANDIDATES, 1] addresses of the words of their first step
    words,  # those of the first step
    ahead,  # and of the second
    loads,  # of all ranks, see `add_cells`
    aim,
    mean,
    is_falling,  # [CANDIDATES, 1] whether a candidate's price falls
    n_ranks,
    n_steps,
    SLICES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Go through all steps (equation 36); returns the ranks' new loads.

    Units and surpluses of cells change in memory.
    """
    xs = _load_cells(x_ptr, words, n_ranks, SLICES, LANES)
    surpluses = _load_cells(surplus_ptr, words, n_ranks, SLICES, LANES)
    for step in range(0, n_steps):
        # What the next step needs is under way while this one is made.
        next_xs = _load_cells(x_ptr, ahead, n_ranks, SLICES, LANES)
        next_surpluses = _load_cells(surplus_ptr, ahead, n_ranks, SLICES, LANES)
        behind = load_words(words_ptr, step + 2, n_steps, n_ranks, SLICES, LANES)
        xs, surpluses, loads = _move(
            xs, surpluses, loads, words, aim, mean, is_falling, SLICES, LANES
        )
        _store_cells(x_ptr, words, xs, n_ranks, SLICES, LANES)
        _store_cells(surplus_ptr, words, surpluses, n_ranks, SLICES, LANES)
        next_xs = _renew(next_xs, ahead, words, xs, SLICES, LANES)
        next_surpluses = _renew(next_surpluses, ahead, words, surpluses, SLICES, LANES)
        xs, surpluses, words, ahead = next_xs, next_surpluses, ahead, behind
    return loads
