"""The quick way for placements whose columns are pairs: one expert with copies on two ranks.

A class of edges then matches ranks with ranks, and a lane can be a rank: it holds what its rank has
of its edge of each class, and all that lanes tell each other are their loads. Every warp does all
of it, in registers, so that none waits for another. Equation numbers refer to docs/method.md.

Ranks are taken 32 at a time, in parts: what they have is a tuple of parts, and by class a tuple
of parts of one class, then of the next. Tuples stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.levelling import EXACT_SWEEPS, RELAXATION, STEADY, _cut_bound
from lplb_triton.kernels.tiles import SHARE_ONE, _inverse, _shares
from lplb_triton.kernels.tokens import _counts_of

# Fields of a table's word.
FIELD = tl.constexpr(0xFFFF)


@triton.jit
def _parts(x, memory_ptr, G: tl.constexpr):
    """Split x [G] into parts of which every warp has all, through ``memory`` [G] float32."""
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    tl.store(memory_ptr + tl.arange(0, G), x)
    tl.debug_barrier()
    parts = ()
    for h in tl.static_range(PARTS):
        parts += (tl.load(memory_ptr + h * LANES + tl.arange(0, LANES)),)
    return parts


@triton.jit
def _load_pairs(pairs_ptr, n_ranks, G: tl.constexpr, CLASSES: tl.constexpr):
    """Load words [CLASSES, n_ranks] int64 of each rank's edges, and their partners.

    A word holds, in four times 16 bits from the lowest, partner, expert, column and copy. A rank
    without an edge in a class is its own partner there, the rest is 0xFFFF.
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
        weights += (_counts_of(counts_ptr, _field(words[i], 16)),)
    return weights


@triton.jit
def _load_ends(pairs_ptr, n_ranks, G: tl.constexpr, CLASSES: tl.constexpr):
    """Load the same words as one tile, [CLASSES * G] or more; also returns whose they are."""
    ROWS: tl.constexpr = 2 if CLASSES <= 2 else 4 if CLASSES <= 4 else 8
    end = tl.arange(0, ROWS * G)
    rank = end % G
    there = (end < CLASSES * G) & (rank < n_ranks)
    word = tl.load(pairs_ptr + (end // G) * n_ranks + rank, mask=there, other=-1)
    return tl.where(there, rank, 0), word


@triton.jit
def _of_ranks(parts, rank, G: tl.constexpr):
    """What the lanes of these ranks hold."""
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    lane = rank & (LANES - 1)
    found = tl.gather(parts[0], lane, 0)
    for h in tl.static_range(1, PARTS):
        found = tl.where(rank >= h * LANES, tl.gather(parts[h], lane, 0), found)
    return found


@triton.jit
def _largest(loads, G: tl.constexpr):
    """Largest of the loads, none below 0: as integers, which a warp compares at once."""
    largest = loads[0]
    for h in tl.static_range(1, (G + 31) // 32):
        largest = tl.maximum(largest, loads[h])
    return tl.max(largest.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _cut_bound_of_pairs(loads, fixed, ends, peak, aim, n_ranks, memory_ptr, G: tl.constexpr):
    """Find a bound as `_cut_bound` does; fixed [G], ``ends`` as from `_load_ends`."""
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    tl.debug_barrier()
    for h in tl.static_range(PARTS):
        tl.store(memory_ptr + h * LANES + tl.arange(0, LANES), loads[h])
    tl.debug_barrier()
    rank, word, weight = ends
    load = tl.load(memory_ptr + tl.arange(0, G))
    partner = tl.maximum(_field(word, 0), 0)
    lowest = tl.minimum(tl.load(memory_ptr + rank), tl.load(memory_ptr + partner))
    on = tl.arange(0, G) < n_ranks
    # Both ends of an edge have a half of it.
    return _cut_bound(load, fixed, 0.5 * weight[None, :], lowest[None, :], on, peak, aim)


@triton.jit
def _level_pairs(
    loads, fixed, partners, weights, ends, peak, bound, aim, n_ranks, most_sweeps, memory_ptr,
    G: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Level even splits along the edges of all classes (equation 18), as `_balance` does.

    Returns what each rank holds of its edges, and a bound.
    """
    PARTS: tl.constexpr = (G + 31) // 32
    mine = ()
    for i in tl.static_range(CLASSES * PARTS):
        mine += (0.5 * weights[i],)
    done = most_sweeps * 0
    looked = done
    while (peak - bound > peak * aim) & (done < most_sweeps):
        part = tl.where(done >= EXACT_SWEEPS, 0.5 * RELAXATION, 0.5)
        # To look at the largest load takes half as long as a sweep.
        sweeps = tl.where(done >= EXACT_SWEEPS, 2, 1)
        for _ in range(sweeps):
            moved = ()
            for k in tl.static_range(CLASSES):
                levelled = ()
                for h in tl.static_range(PARTS):
                    load = loads[h]
                    held = mine[k * PARTS + h]
                    other = _of_ranks(loads, partners[k * PARTS + h], G)
                    # As little as can be waits for ``other``: the load is not taken from the step.
                    room = weights[k * PARTS + h] - held
                    step = tl.fma(other, part, -load * part)
                    moved += (held + tl.maximum(tl.minimum(step, room), -held),)
                    level = tl.fma(other, part, load - load * part)
                    levelled += (tl.maximum(tl.minimum(level, load + room), load - held),)
                loads = levelled
            mine = moved
        done += sweeps
        now = _largest(loads, G)
        steady = (peak - now <= now * aim * STEADY) & (2 * done >= 3 * looked)
        due = (done == 1) | (done >= most_sweeps) | steady
        if due & (now - bound > now * aim):
            cut = _cut_bound_of_pairs(loads, fixed, ends, now, aim, n_ranks, memory_ptr, G)
            bound = tl.maximum(bound, cut)
            looked = done
        peak = now
    return mine, bound


@triton.jit
def _round_pairs(mine, weights, partners, G: tl.constexpr, CLASSES: tl.constexpr):
    """Round tokens to whole units of their column (equation 11): the second copy gets the rest.

    A column without tokens is split evenly. Returns the units that each rank holds.
    """
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    units = ()
    for k in tl.static_range(CLASSES):
        rounded = ()
        for h in tl.static_range(PARTS):
            weight = weights[k * PARTS + h]
            some = weight > 0
            share = mine[k * PARTS + h] * _inverse(tl.where(some, weight, 1.0))
            share = tl.where(some, share, 0.5)
            rounded += (tl.minimum((share * SHARE_ONE + 0.5).to(tl.int32), SHARE_ONE),)
        for h in tl.static_range(PARTS):
            partner = partners[k * PARTS + h]
            rest = SHARE_ONE - _of_ranks(rounded, partner, G)
            rank = h * LANES + tl.arange(0, LANES)
            units += (tl.where(partner < rank, rest, rounded[h]),)
    return units


@triton.jit
def _spread_pairs(ends, x_ptr, cumulative_ptr, dense_ptr, n_columns, dense):
    """Write shares to ``dense``, and tokens by cell to x, from the cumulative shares in memory."""
    rank, word, weight = ends
    column, copy = _field(word, 32), _field(word, 48)
    there = copy >= 0
    second = (word.to(tl.int32) & FIELD) < rank
    tl.debug_barrier()
    # Copies of one expert, and cells of one column, are numbered by rank.
    upto = tl.load(cumulative_ptr + copy - second.to(tl.int32), mask=there, other=0)
    share = _shares(tl.where(second, SHARE_ONE - upto, upto))
    tl.store(dense_ptr + rank * n_columns + column, share, mask=there & (dense > 0))
    tl.store(x_ptr + 2 * column + second.to(tl.int32), share * weight, mask=there)


@triton.jit
def _solve_pairs(
    words, partners, weights, ends, fixed, peak, bound, invalid, aim, slack, n_ranks, n_columns,
    most_sweeps, x_ptr, memory_ptr, cumulative_ptr, dense_ptr, dense,
    G: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Level, round, judge and write a plan; returns its largest load, a bound, and whether it does.

    words, partners and weights in parts, by class and part; ``ends`` are rank, word and weight of
    all of them in one tile; fixed [G]. The largest load may be a part ``slack`` of it above
    the bound. cumulative and dense as for `_solve_counts_kernel`; a plan that does not do is left
    in x, in tokens by cell. ``memory`` [G] float32 is scratch.
    """
    PARTS: tl.constexpr = (G + 31) // 32
    LANES: tl.constexpr = G // PARTS
    ends = ends[0], ends[1], tl.where(invalid, 0.0, ends[2])
    own = _parts(fixed, memory_ptr, G)
    valid, loads = (), ()
    for i in tl.static_range(CLASSES * PARTS):
        valid += (tl.where(invalid, 0.0, weights[i]),)
    weights = valid
    for h in tl.static_range(PARTS):
        load = own[h]
        for k in tl.static_range(CLASSES):
            load += 0.5 * weights[k * PARTS + h]
        loads += (load,)
    mine, bound = _level_pairs(
        loads, fixed, partners, weights, ends, peak, bound, aim, n_ranks, most_sweeps, memory_ptr,
        G, CLASSES,
    )  # fmt: skip
    units = _round_pairs(mine, weights, partners, G, CLASSES)
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
    max_load = _largest(loads, G)
    solved = ((max_load - bound > max_load * slack) == 0) | invalid
    if (dense > 0) | (solved == 0):
        _spread_pairs(ends, x_ptr, cumulative_ptr, dense_ptr, n_columns, dense)
    return max_load, bound, solved
