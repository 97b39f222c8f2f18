"""Solve a placement of pairs in registers: every column is one expert with copies on two ranks.

A class of edges then matches ranks with ranks, and a lane is a rank: it holds the rank's load and,
by class, the tokens ``x`` that the rank has of the weight ``w`` of its edge there. Lanes exchange
nothing but their loads. Every warp does all of the work, so that no warp waits for another.
Equation numbers refer to docs/method.md, which describes this under equation 18.

Ranks are taken in slices of up to 32. Numbers by rank are a tuple of slices, [SLICE] each; numbers
by class and rank are a tuple of the slices of the first class, then those of the next, and so on.
Tuples stay in registers.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.count import load_counts
from lplb_triton.kernels.solve.levelling import (
    EXACT_FRACTION,
    EXACT_SWEEPS,
    N_CUTS,
    RELAXED_FRACTION,
    ROUNDED_FRACTION,
    STEADY_FRACTION,
    choose_aimed_gap,
    compute_cut_thresholds,
)
from lplb_triton.kernels.solve.tiles import (
    SHARE_ONE,
    add2,
    find_largest_load,
    reciprocal,
    units_to_shares,
)

# The value of an empty field of a word of pairs; all of its bits are set.
EMPTY_FIELD = tl.constexpr(_layout.PAIR_FIELD)
# Fields of a word of pairs, counted from the lowest; field 0 is the partner.
FIELD_BITS = tl.constexpr(_layout.FIELD_BITS)
EXPERT_FIELD = tl.constexpr(1)
COPY_FIELD = tl.constexpr(3)


@triton.jit
def _slice_by_rank(values, G: tl.constexpr):
    """Cut numbers by rank [G] into slices; every warp has all of them."""
    SLICES: tl.constexpr = (G + 31) // 32
    SLICE: tl.constexpr = G // SLICES
    slices = ()
    for h in tl.static_range(SLICES):
        # Gather, or Triton propagates the layout of ``values`` into all that follows.
        slices += (tl.gather(values, h * SLICE + tl.arange(0, SLICE), 0),)
    return slices


@triton.jit
def load_pairs(pairs_ptr, n_ranks, G: tl.constexpr, CLASSES: tl.constexpr):
    """Load each rank's edges, words [CLASSES, n_ranks] int64, by class and rank.

    A word holds four fields, from the lowest: the partner, which is the other rank of
    the edge, the expert, an empty field, and the rank's copy of the expert. A rank without an edge
    in a class is its own partner there and has empty fields otherwise. In the padding all fields
    are empty: the partner's load doesn't matter there, since there is no weight to move.

    Returns the words and the partners.
    """
    SLICES: tl.constexpr = (G + 31) // 32
    SLICE: tl.constexpr = G // SLICES
    words, partners = (), ()
    for k in tl.static_range(CLASSES):
        for h in tl.static_range(SLICES):
            rank = h * SLICE + tl.arange(0, SLICE)
            word = tl.load(pairs_ptr + k * n_ranks + rank, mask=rank < n_ranks, other=-1)
            words += (word,)
            partners += (word.to(tl.int32) & EMPTY_FIELD,)
    return words, partners


@triton.jit
def _extract_field(word, FIELD: tl.constexpr):
    """Take a field of a word, -1 if it is empty."""
    field = (word >> (FIELD * FIELD_BITS)).to(tl.int32) & EMPTY_FIELD
    return tl.where(field == EMPTY_FIELD, -1, field)


@triton.jit
def load_pair_counts(counts_ptr, words, N: tl.constexpr):
    """Load the counts of the experts of ``N`` words, by class and rank; 0 where no edge is."""
    counts = ()
    for i in tl.static_range(N):
        counts += (load_counts(counts_ptr, _extract_field(words[i], EXPERT_FIELD)),)
    return counts


@triton.jit
def _gather_from_ranks(slices, rank, G: tl.constexpr):
    """Give each lane the number that another ``rank`` [SLICE] has; ``slices`` are by rank."""
    SLICES: tl.constexpr = (G + 31) // 32
    SLICE: tl.constexpr = G // SLICES
    lane = rank & (SLICE - 1)
    found = tl.gather(slices[0], lane, 0)
    for h in tl.static_range(1, SLICES):
        found = tl.where(rank >= h * SLICE, tl.gather(slices[h], lane, 0), found)
    return found


@triton.jit
def _find_largest_by_rank(loads, G: tl.constexpr):
    """Find the largest of loads by rank."""
    largest = loads[0]
    for h in tl.static_range(1, (G + 31) // 32):
        largest = tl.maximum(largest, loads[h])
    return find_largest_load(largest)


@triton.jit
def _compute_cut_bound_of_pairs(
    loads,  # by rank
    fixed,  # by rank
    partners,  # by class and rank
    weights,  # by class and rank
    peak,
    aimed_gap,
    n_ranks,
    G: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Find a load that no plan can beat, from sets of the most loaded ranks (equation 19)."""
    SLICES: tl.constexpr = (G + 31) // 32
    SLICE: tl.constexpr = G // SLICES
    thresholds = compute_cut_thresholds(peak, aimed_gap)
    size = tl.zeros((N_CUTS, SLICE), tl.float32)
    kept = size
    for h in tl.static_range(SLICES):
        is_rank = h * SLICE + tl.arange(0, SLICE) < n_ranks
        member = (loads[h][None, :] >= thresholds) & is_rank[None, :]
        size += tl.where(member, 1.0, 0.0)
        kept += tl.where(member, fixed[h][None, :], 0.0)
        for k in tl.static_range(CLASSES):
            other_load = _gather_from_ranks(loads, partners[k * SLICES + h], G)
            lowest = tl.minimum(loads[h], other_load)
            # Each of the two ranks of an edge adds half of its weight.
            half = 0.5 * weights[k * SLICES + h]
            kept += tl.where(lowest[None, :] >= thresholds, half[None, :], 0.0)
    size, kept = tl.reduce((size, kept), 1, add2)
    return tl.max(kept / size)


@triton.jit
def _level_edges_of_pairs(
    loads,  # by rank
    x,  # by class and rank, tokens that the rank has of its edge
    partners,  # by class and rank
    weights,  # by class and rank
    fraction,  # how much of the difference between two ranks moves; 0.5 levels them
    G: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Level all edges once, one class after the other (equation 18); returns new loads and x."""
    SLICES: tl.constexpr = (G + 31) // 32
    new_x = ()
    for k in tl.static_range(CLASSES):
        new_loads = ()
        for h in tl.static_range(SLICES):
            load = loads[h]
            own = x[k * SLICES + h]
            others = weights[k * SLICES + h] - own
            other_load = _gather_from_ranks(loads, partners[k * SLICES + h], G)
            # The next class needs the new load, so the chain of operations from ``other_load`` to
            # it is as short as possible. Nothing waits for x.
            target = tl.fma(other_load, fraction, load - load * fraction)
            new_loads += (tl.maximum(tl.minimum(target, load + others), load - own),)
            moved = tl.fma(other_load, fraction, -load * fraction)
            new_x += (own + tl.maximum(tl.minimum(moved, others), -own),)
        loads = new_loads
    return loads, new_x


@triton.jit
def _level_pairs(
    loads,  # by rank, of the even split
    fixed,  # by rank
    partners,  # by class and rank
    weights,  # by class and rank
    peak,  # largest of the loads
    bound,  # a load that no plan can beat
    aimed_gap,
    n_ranks,
    most_sweeps,
    good_factor,  # the gap is reached if the peak is at most this many times the bound
    steady_factor,  # the peak is steady if it is at least this many times the one before
    G: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Level even splits along the edges of all classes, as `levelling.level_plan` does.

    One sweep more than ``most_sweeps`` may be made. Returns x by class and rank, the tokens that
    each rank has of its edges, and the best bound.
    """
    x = ()
    for i in tl.static_range(CLASSES * ((G + 31) // 32)):
        x += (0.5 * weights[i],)
    sweeps = most_sweeps * 0
    sweeps_at_last_bound = sweeps
    # The loads that the next peak is compared with are computed before it is known.
    good_load = bound * good_factor
    steady_load = peak * steady_factor
    while (peak > good_load) & (sweeps < most_sweeps):
        fraction = tl.where(sweeps >= EXACT_SWEEPS, RELAXED_FRACTION, EXACT_FRACTION)
        loads, x = _level_edges_of_pairs(loads, x, partners, weights, fraction, G, CLASSES)
        sweeps += 1
        if sweeps > EXACT_SWEEPS:
            # Finding the peak takes longer than a sweep, so later on it is found every other sweep.
            loads, x = _level_edges_of_pairs(loads, x, partners, weights, fraction, G, CLASSES)
            sweeps += 1
        due = (sweeps == 1) | (sweeps >= most_sweeps)
        due_if_steady = 2 * sweeps >= 3 * sweeps_at_last_bound
        peak = _find_largest_by_rank(loads, G)
        if (peak > good_load) & (due | (due_if_steady & (peak >= steady_load))):
            cut = _compute_cut_bound_of_pairs(
                loads, fixed, partners, weights, peak, aimed_gap, n_ranks, G, CLASSES
            )
            bound = tl.maximum(bound, cut)
            good_load = bound * good_factor
            sweeps_at_last_bound = sweeps
        steady_load = peak * steady_factor
    return x, bound


@triton.jit
def _round_pairs(x, inverses, partners, G: tl.constexpr, CLASSES: tl.constexpr):
    """Round tokens to whole units of their column (equation 11); returns units, int32.

    All arguments and the result are by class and rank. ``inverses`` are 1 / weight, or 0 for a
    column without tokens, which is split evenly. The second copy gets what the first one leaves.
    """
    SLICES: tl.constexpr = (G + 31) // 32
    SLICE: tl.constexpr = G // SLICES
    units = ()
    for k in tl.static_range(CLASSES):
        rounded = ()
        for h in tl.static_range(SLICES):
            inverse = inverses[k * SLICES + h]
            share = tl.where(inverse > 0, x[k * SLICES + h] * inverse, 0.5)
            rounded += (tl.minimum((share * SHARE_ONE + 0.5).to(tl.int32), SHARE_ONE),)
        for h in tl.static_range(SLICES):
            partner = partners[k * SLICES + h]
            rest = SHARE_ONE - _gather_from_ranks(rounded, partner, G)
            rank = h * SLICE + tl.arange(0, SLICE)
            units += (tl.where(partner < rank, rest, rounded[h]),)
    return units


@triton.jit
def _compute_first_loads(fixed, counts, part_of_rank, G: tl.constexpr, CLASSES: tl.constexpr):
    """Compute the loads of the even split and the first bound.

    ``fixed`` is by rank, ``counts`` by class and rank; ``part_of_rank`` is 1 / n_ranks. Returns
    loads by rank, their peak, the bound, and whether counts are invalid; peak and bound are 0 then.
    """
    SLICES: tl.constexpr = (G + 31) // 32
    SLICE: tl.constexpr = G // SLICES
    loads = ()
    all_loads = tl.zeros((SLICE,), tl.float32)
    for h in tl.static_range(SLICES):
        load = fixed[h]
        for k in tl.static_range(CLASSES):
            load += 0.5 * counts[k * SLICES + h]
        loads += (load,)
        all_loads += load
    total = tl.sum(all_loads)
    invalid = (total < float("inf")) == 0
    peak = tl.where(invalid, 0.0, _find_largest_by_rank(loads, G))
    bound = tl.maximum(_find_largest_by_rank(fixed, G), total * part_of_rank)
    bound = tl.where(invalid, 0.0, bound)
    return loads, peak, bound, invalid


@triton.jit
def _store_pairs(
    cumulative_ptr,  # [n_copies] int32, written for the copies of the pairs
    units,  # by class and rank
    words,  # by class and rank
    partners,  # by class and rank
    weights,  # by class and rank
    fixed,  # by rank
    G: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Write the cumulative shares of a rounded plan (equation 12); returns its largest load."""
    SLICES: tl.constexpr = (G + 31) // 32
    SLICE: tl.constexpr = G // SLICES
    loads = ()
    for h in tl.static_range(SLICES):
        rank = h * SLICE + tl.arange(0, SLICE)
        load = fixed[h]
        for k in tl.static_range(CLASSES):
            load += units_to_shares(units[k * SLICES + h]) * weights[k * SLICES + h]
            copy = _extract_field(words[k * SLICES + h], COPY_FIELD)
            is_second = partners[k * SLICES + h] < rank
            cumulative = tl.where(is_second, SHARE_ONE, units[k * SLICES + h])
            tl.store(cumulative_ptr + copy, cumulative, mask=copy >= 0)
        loads += (load,)
    return _find_largest_by_rank(loads, G)


@triton.jit
def solve_pairs(
    words,  # by class and rank, from `load_pairs`
    partners,  # by class and rank, from `load_pairs`
    counts,  # by class and rank, from `load_pair_counts`
    fixed,  # [G] float32
    target,  # relative gap that the plan may have
    n_ranks,
    most_sweeps,
    cumulative_ptr,  # [n_copies] int32, written for the copies of the pairs
    G: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Level even splits, round the plan, judge it and write it (equations 11, 12, 18 and 19).

    Returns the largest load, a bound, whether counts are invalid, and whether the group is solved,
    which it is if the plan is good enough or if counts are invalid.
    """
    SLICES: tl.constexpr = (G + 31) // 32
    aimed_gap = choose_aimed_gap(target, n_ranks)
    good_factor = 1.0 / (1.0 - aimed_gap)
    steady_factor = 1.0 / (1.0 + aimed_gap * STEADY_FRACTION)
    part_of_rank = 1.0 / n_ranks.to(tl.float32)
    fixed = _slice_by_rank(fixed, G)
    loads, peak, bound, invalid = _compute_first_loads(fixed, counts, part_of_rank, G, CLASSES)
    weights, inverses = (), ()
    for i in tl.static_range(CLASSES * SLICES):
        weight = tl.where(invalid, 0.0, counts[i])
        weights += (weight,)
        inverses += (tl.where(weight > 0, reciprocal(tl.maximum(weight, 1.0)), 0.0),)
    x, bound = _level_pairs(
        loads, fixed, partners, weights, peak, bound, aimed_gap, n_ranks, most_sweeps,
        good_factor, steady_factor, G, CLASSES,
    )  # fmt: skip
    units = _round_pairs(x, inverses, partners, G, CLASSES)
    max_load = _store_pairs(cumulative_ptr, units, words, partners, weights, fixed, G, CLASSES)
    good = (max_load - bound > max_load * (target * ROUNDED_FRACTION)) == 0
    return max_load, bound, invalid, good | invalid
