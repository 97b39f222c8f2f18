"""The quick way for placements whose columns are pairs: one expert with copies on two ranks.

A class of edges then matches ranks with ranks, and a lane can be a rank: it holds what its rank has
of its edge of each class, and all that lanes tell each other are their loads. Every warp does all
of it, in registers, so that none waits for another. Equation numbers refer to docs/method.md.

Ranks are taken 32 at a time, in parts: what they have is a tuple of parts, and by class a tuple
of parts of one class, then of the next. Tuples stay in registers.
"""

# Triton's tuples grow.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.count import load_counts
from lplb_triton.kernels.solve.levelling import (
    CUTS,
    EXACT_SWEEPS,
    RELAXATION,
    ROUNDED_PART,
    STEADY,
    _aim,
    _cut_loads,
)
from lplb_triton.kernels.solve.tiles import SHARE_ONE, _add2, _inverse, _largest_load, _shares

# All bits of one of the four fields of a table's word.
FIELD = tl.constexpr(_layout.PAIR_FIELD)


@triton.jit
def _parts(x, G: tl.constexpr):
    """Split x [G] into parts of which every warp has all."""
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    parts = ()
    for h in tl.static_range(PARTS):
        # Not x itself: its layout would spread to all that follows.
        parts += (tl.gather(x, h * LANES + tl.arange(0, LANES), 0),)
    return parts


@triton.jit
def _load_pairs(pairs_ptr, n_ranks, G: tl.constexpr, CLASSES: tl.constexpr):
    """Load words [CLASSES, n_ranks] int64 of each rank's edges, and their partners.

    A word holds, in four times 16 bits from the lowest, partner, expert, nothing and copy. A rank
    without an edge in a class is its own partner there, the rest is 0xFFFF. Lanes that are no ranks
    have 0xFFFF throughout: whose load they look at doesn't matter, since they have no weight.
    """
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    words, partners = (), ()
    for k in tl.static_range(CLASSES):
        for h in tl.static_range(PARTS):
            rank = h * LANES + tl.arange(0, LANES)
            word = tl.load(pairs_ptr + k * n_ranks + rank, mask=rank < n_ranks, other=-1)
            words += (word,)
            partners += (word.to(tl.int32) & FIELD,)
    return words, partners


@triton.jit
def _field(word, FIRST_BIT: tl.constexpr):
    """Take what begins at a bit of a word, -1 for 0xFFFF."""
    field = (word >> FIRST_BIT).to(tl.int32) & FIELD
    return tl.where(field == FIELD, -1, field)


@triton.jit
def _weights_of_pairs(counts_ptr, words, N: tl.constexpr):
    """Load the counts of the experts of N words."""
    weights = ()
    for i in tl.static_range(N):
        weights += (load_counts(counts_ptr, _field(words[i], 16)),)
    return weights


@triton.jit
def _of_lanes(parts, rank, G: tl.constexpr):
    """Find what the lanes of these ranks hold."""
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    lane = rank & (LANES - 1)
    found = tl.gather(parts[0], lane, 0)
    for h in tl.static_range(1, PARTS):
        found = tl.where(rank >= h * LANES, tl.gather(parts[h], lane, 0), found)
    return found


@triton.jit
def _peak_of_parts(loads, G: tl.constexpr):
    """Largest of the loads of all parts, by `_largest_load`."""
    largest = loads[0]
    for h in tl.static_range(1, (G + 31) // 32):
        largest = tl.maximum(largest, loads[h])
    return _largest_load(largest)


@triton.jit
def _cut_bound_of_pairs(
    loads, fixed, partners, weights, peak, aim, n_ranks, G: tl.constexpr, CLASSES: tl.constexpr
):
    """Find a load that no plan can beat, from the most loaded ranks (equation 19)."""
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    least = _cut_loads(peak, aim)
    size = tl.zeros((CUTS, LANES), tl.float32)
    inside = size
    for h in tl.static_range(PARTS):
        on = h * LANES + tl.arange(0, LANES) < n_ranks
        member = (loads[h][None, :] >= least) & on[None, :]
        size += tl.where(member, 1.0, 0.0)
        inside += tl.where(member, fixed[h][None, :], 0.0)
        for k in tl.static_range(CLASSES):
            lowest = tl.minimum(loads[h], _of_lanes(loads, partners[k * PARTS + h], G))
            # Both ends of an edge add a half.
            half = 0.5 * weights[k * PARTS + h]
            inside += tl.where(lowest[None, :] >= least, half[None, :], 0.0)
    size, inside = tl.reduce((size, inside), 1, _add2)
    return tl.max(inside / size)


@triton.jit
def _sweep_pairs(loads, mine, partners, weights, part, G: tl.constexpr, CLASSES: tl.constexpr):
    """Level all classes of edges, one after the other; ``part`` of a difference moves."""
    PARTS: tl.constexpr = (G + 31) // 32
    held = ()
    for k in tl.static_range(CLASSES):
        levelled = ()
        for h in tl.static_range(PARTS):
            load = loads[h]
            here = mine[k * PARTS + h]
            room = weights[k * PARTS + h] - here
            other = _of_lanes(loads, partners[k * PARTS + h], G)
            # The next class waits for the load: it takes as few steps from ``other`` as it can.
            level = tl.fma(other, part, load - load * part)
            levelled += (tl.maximum(tl.minimum(level, load + room), load - here),)
            step = tl.fma(other, part, -load * part)
            held += (here + tl.maximum(tl.minimum(step, room), -here),)
        loads = levelled
    return loads, held


@triton.jit
def _level_pairs(
    loads, fixed, partners, weights, peak, bound, aim, beyond, slower, n_ranks, most_sweeps,
    G: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Level even splits along the edges of all classes (equation 18), as `_balance` does.

    ``beyond`` times the bound is within the gap; the largest load is steady if it is at least
    ``slower`` times what it was when last looked at. One sweep more than ``most_sweeps`` is made,
    if that is odd.
    Returns what each rank holds of its edges, and a bound.
    """
    mine = ()
    for i in tl.static_range(CLASSES * ((G + 31) // 32)):
        mine += (0.5 * weights[i],)
    done = most_sweeps * 0
    looked = done
    # All that a sweep's largest load is compared with is there before.
    enough = bound * beyond
    steady = peak * slower
    while (peak > enough) & (done < most_sweeps):
        part = tl.where(done >= EXACT_SWEEPS, 0.5 * RELAXATION, 0.5)
        loads, mine = _sweep_pairs(loads, mine, partners, weights, part, G, CLASSES)
        done += 1
        if done > EXACT_SWEEPS:
            # To look how far it is takes longer than a sweep.
            loads, mine = _sweep_pairs(loads, mine, partners, weights, part, G, CLASSES)
            done += 1
        at_once = (done == 1) | (done >= most_sweeps)
        if_steady = 2 * done >= 3 * looked
        peak = _peak_of_parts(loads, G)
        if (peak > enough) & (at_once | (if_steady & (peak >= steady))):
            cut = _cut_bound_of_pairs(
                loads, fixed, partners, weights, peak, aim, n_ranks, G, CLASSES
            )
            bound = tl.maximum(bound, cut)
            enough = bound * beyond
            looked = done
        steady = peak * slower
    return mine, bound


@triton.jit
def _round_pairs(mine, inverses, partners, G: tl.constexpr, CLASSES: tl.constexpr):
    """Round tokens to whole units of their column (equation 11): the second copy gets the rest.

    ``inverses`` are those of the weights, 0 for a column without tokens, which is split evenly.
    Returns the units that each rank holds.
    """
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    units = ()
    for k in tl.static_range(CLASSES):
        rounded = ()
        for h in tl.static_range(PARTS):
            inverse = inverses[k * PARTS + h]
            share = tl.where(inverse > 0, mine[k * PARTS + h] * inverse, 0.5)
            rounded += (tl.minimum((share * SHARE_ONE + 0.5).to(tl.int32), SHARE_ONE),)
        for h in tl.static_range(PARTS):
            partner = partners[k * PARTS + h]
            rest = SHARE_ONE - _of_lanes(rounded, partner, G)
            rank = h * LANES + tl.arange(0, LANES)
            units += (tl.where(partner < rank, rest, rounded[h]),)
    return units


@triton.jit
def _solve_pairs(
    words, partners, counts, fixed, target, n_ranks, most_sweeps, cumulative_ptr,
    G: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Level, round, judge and write a plan.

    words, partners and counts as from `_load_pairs` and `_weights_of_pairs`; fixed [G]. The largest
    load may be ``target`` of it above the bound. cumulative as for `_solve_counts_kernel`. Returns
    the largest load, a bound, whether counts are invalid, and whether the plan will do, or no plan
    would.
    """
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    aim = _aim(target, n_ranks)
    beyond = 1.0 / (1.0 - aim)
    slower = 1.0 / (1.0 + aim * STEADY)
    part_of_rank = 1.0 / n_ranks.to(tl.float32)
    own = _parts(fixed, G)
    loads = ()
    all_loads = tl.zeros((LANES,), tl.float32)
    for h in tl.static_range(PARTS):
        load = own[h]
        for k in tl.static_range(CLASSES):
            load += 0.5 * counts[k * PARTS + h]
        loads += (load,)
        all_loads += load
    total = tl.sum(all_loads)
    invalid = (total < float("inf")) == 0
    peak = tl.where(invalid, 0.0, _peak_of_parts(loads, G))
    bound = tl.where(invalid, 0.0, tl.maximum(_peak_of_parts(own, G), total * part_of_rank))
    weights, inverses = (), ()
    for i in tl.static_range(CLASSES * PARTS):
        weight = tl.where(invalid, 0.0, counts[i])
        weights += (weight,)
        inverses += (tl.where(weight > 0, _inverse(tl.maximum(weight, 1.0)), 0.0),)
    mine, bound = _level_pairs(
        loads, own, partners, weights, peak, bound, aim, beyond, slower, n_ranks, most_sweeps,
        G, CLASSES,
    )  # fmt: skip
    units = _round_pairs(mine, inverses, partners, G, CLASSES)
    loads = ()
    for h in tl.static_range(PARTS):
        rank = h * LANES + tl.arange(0, LANES)
        load = own[h]
        for k in tl.static_range(CLASSES):
            load += _shares(units[k * PARTS + h]) * weights[k * PARTS + h]
            copy = _field(words[k * PARTS + h], 48)
            upto = tl.where(partners[k * PARTS + h] < rank, SHARE_ONE, units[k * PARTS + h])
            tl.store(cumulative_ptr + copy, upto, mask=copy >= 0)
        loads += (load,)
    max_load = _peak_of_parts(loads, G)
    good = (max_load - bound > max_load * (target * ROUNDED_PART)) == 0
    return max_load, bound, invalid, good | invalid
