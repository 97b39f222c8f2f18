"""The plan of live slots, behind the plan of the static copies in the same launch.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.live.arguments import (
    AIM_BITS,
    LANES,
    MISS_BITS,
    MOST_UNITS,
    OFFER_SHIFT,
    PASSES,
    LiveOutcome,
    LiveRules,
    LiveSizes,
    LiveTables,
    divide_live_scratch,
)
from lplb_triton.kernels.live.bound import find_live_bound
from lplb_triton.kernels.live.offers import load_all_offers
from lplb_triton.kernels.live.search import find_pieces
from lplb_triton.kernels.live.slices import find_largest, sum_slices
from lplb_triton.kernels.live.tables import count_running, load_total, write_copies
from lplb_triton.kernels.rounding import SHARE_BITS

# Static slots whose offers are made at once.
SLOTS_AT_ONCE = tl.constexpr(256)
# Experts that the bound handles at once, and experts that are reset at once.
MOST_EXPERTS_AT_ONCE = 1024
EXPERTS_AT_ONCE = tl.constexpr(256)


@triton.jit
def _make_offers(counts_ptr, cumulative_ptr, shift, scratch, tables, sizes, SHARED: tl.constexpr):
    """Write what static slots can offer: their units, place, and whether there are other copies."""
    n_copies = sizes.n_ranks * sizes.n_slots
    for block in range(0, n_copies, SLOTS_AT_ONCE):
        at = block + tl.arange(0, SLOTS_AT_ONCE)
        there = at < n_copies
        expert = tl.load(tables.slot_experts + at, mask=there, other=0)
        tokens = load_total(counts_ptr, expert, there)
        is_shared = at * 0
        if SHARED:
            word = tl.load(tables.slot_words + at, mask=there, other=0)
            copy, is_shared = word >> 2, (word >> 1) & 1
            has_before = there & (word & 1 == 0)
            follows = tl.load(tables.copy_start + expert + 1, mask=there, other=0) > copy + 1
            end = count_running(cumulative_ptr, copy, expert, tokens, there & follows)
            before = count_running(cumulative_ptr, copy - 1, expert, tokens, has_before)
            tokens = end - tl.where(has_before, before, 0)
        units = (tokens >> shift).to(tl.int32)
        offer = (units << OFFER_SHIFT) | (at // sizes.n_ranks << 1) | is_shared
        tl.store(scratch.offers + at, tl.where(units > 0, offer, 0), mask=there)


@triton.jit
def _reset(scratch, sizes, P: tl.constexpr, LIVE: tl.constexpr):
    """Forget the copies of the batch before."""
    for block in range(0, sizes.n_logical, EXPERTS_AT_ONCE):
        expert = block + tl.arange(0, EXPERTS_AT_ONCE)
        nothing = tl.zeros((EXPERTS_AT_ONCE,), tl.int32)
        tl.store(scratch.first + expert, nothing, mask=expert < sizes.n_logical)
    _reset_pieces(scratch.pieces, sizes, P, LIVE)
    _reset_pieces(scratch.pieces + 3 * sizes.n_ranks * LIVE, sizes, P, LIVE)


@triton.jit
def _reset_pieces(pieces_ptr, sizes, P: tl.constexpr, LIVE: tl.constexpr):
    """Forget the pieces of a pass: there is no step 0."""
    n_live = sizes.n_ranks * LIVE
    piece = tl.arange(0, P)
    tl.store(pieces_ptr + 2 * n_live + piece, tl.zeros((P,), tl.int32), mask=piece < n_live)


@triton.jit
def _store_loads(scratch, loads, sizes, SLICES: tl.constexpr):
    """Write the loads by rank to memory."""
    lane = tl.arange(0, LANES)
    for h in tl.static_range(SLICES):
        rank = lane + h * LANES
        tl.store(scratch.loads + rank, loads[h], mask=rank < sizes.n_ranks)


@triton.jit
def _search(
    counts_ptr, cumulative_ptr, shift, scratch, tables, rules, sizes,
    G: tl.constexpr, SLICES: tl.constexpr, MOST: tl.constexpr, MORE: tl.constexpr,
    EXPERTS: tl.constexpr, P: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr,
    PRICED: tl.constexpr, DOMAINS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Find pieces in a few passes.

    The first pass aims at half of what the rules allow above the mean. If it misses that by much,
    the second one aims at what can't be beaten, and fills the largest deficits first; later ones
    aim halfway between that and what was found. With limits, which the bound doesn't know, the
    second pass is like the later ones. Returns the address of the pieces, the number of their
    steps, the largest load and a bound, in units.
    """
    n_words = 3 * sizes.n_ranks * LIVE
    cost = tl.maximum(rules.cost >> shift, tl.minimum(rules.cost, 1))
    cost = tl.minimum(cost, MOST_UNITS)
    kept_set, steps, n_passes = shift * 0, shift * 0, shift * 0
    mean, first_target, target, price, peak, bound = steps, steps, steps, steps, steps, steps
    goes_on = shift >= 0
    while goes_on:
        if MORE:
            if n_passes > 0:
                # The pass before has changed the offers in memory.
                tl.debug_barrier()
                _make_offers(counts_ptr, cumulative_ptr, shift, scratch, tables, sizes, SHARED)
                tl.debug_barrier()
        largest_first = n_passes < 0
        if not PRICED and not DOMAINS:
            largest_first = n_passes == 1
        offers, loads = load_all_offers(scratch.offers, sizes, SLICES, MOST)
        if MORE:
            # All threads have read before one of them writes.
            tl.debug_barrier()
        largest, total = find_largest(loads, SLICES), sum_slices(loads, SLICES)
        if n_passes == 0:
            mean = (total + sizes.n_ranks - 1) // sizes.n_ranks
            aim = (mean.to(tl.int64) * rules.aim) >> AIM_BITS
            first_target = mean + aim.to(tl.int32)
            target, price, peak = first_target, largest, largest
            # Tokens are whole, but a larger unit may be divided.
            bound = tl.where(shift == 0, mean, total // sizes.n_ranks)
        # The pieces that are kept so far lie in the other set.
        pieces_ptr = scratch.pieces + (1 - kept_set) * n_words
        found_price, found_peak, found_steps = find_pieces(
            offers, loads, target, largest_first, pieces_ptr, scratch.offers, tables, rules, cost,
            sizes,
            SLICES, MOST, MORE, LIVE, SHARED, PRICED, DOMAINS, RESIDENT,
        )  # fmt: skip
        better = found_price < price
        kept_set = tl.where(better, 1 - kept_set, kept_set)
        steps = tl.where(better, found_steps, steps)
        price = tl.where(better, found_price, price)
        peak = tl.where(better, found_peak, peak)
        n_passes += 1
        goes_on = peak > first_target + (first_target >> MISS_BITS)
        if goes_on:
            if n_passes == 1:
                _store_loads(scratch, loads, sizes, SLICES)
                tl.debug_barrier()
                known = find_live_bound(
                    counts_ptr, mean, largest, shift, scratch, tables, sizes, G, EXPERTS, LIVE
                )
                bound = tl.maximum(bound, known)
            least = tl.maximum(first_target, bound)
            target = (least + peak) // 2
            if not PRICED and not DOMAINS:
                target = tl.where(n_passes == 1, least, target)
            goes_on = (target < peak) & (n_passes < PASSES)
            if goes_on:
                tl.debug_barrier()
                _reset_pieces(scratch.pieces + (1 - kept_set) * n_words, sizes, P, LIVE)
                tl.debug_barrier()
    return scratch.pieces + kept_set * n_words, steps, peak, bound


@triton.jit
def _write_version(outcome, expert, tokens, piece):
    """Write the checksum that the next exchange of counts compares: of placement and plan.

    Slots without an expert, -1, add nothing.
    """
    word = (piece + 1).to(tl.int64) * 0x3504F333 + (expert + 1).to(tl.int64) * 0x2545F491
    word = ((word ^ (word >> 15)) & 0x3FFFFFFF) * (2 * tokens.to(tl.int64) + 1)
    checksum = tl.sum(tl.where(expert >= 0, word & 0x3FFFFFFFFFF, 0), 0)
    checksum = (checksum ^ (checksum >> 23)) & 0x7FFFFFFF
    tl.store(outcome.version, outcome.base ^ checksum.to(tl.int32))


@triton.jit
def _write_outcome(
    expert, tokens, max_load, bound, outcome, tables, sizes,
    P: tl.constexpr, LIVE: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Write what live slots hold, and the numbers of the plan.

    With RESIDENT the checksum is of all that they hold, since the next plans depend on it.
    """
    piece = tl.arange(0, P)
    n_live = sizes.n_ranks * LIVE
    is_fetched = expert >= 0
    if RESIDENT:
        there = tl.load(tables.resident + piece, mask=piece < n_live, other=-1)
        is_fetched &= expert != there
        expert = tl.where(expert >= 0, expert, there)
        tl.store(tables.resident + piece, expert, mask=piece < n_live)
        _write_version(outcome, expert, tokens, piece)
    tl.store(outcome.out + piece, expert, mask=piece < n_live)
    bound = tl.minimum(bound, max_load)
    gap = tl.where(max_load > 0, (max_load - bound) / tl.maximum(max_load, 1.0), 0.0)
    tl.store(outcome.out + n_live, max_load.to(tl.int32, bitcast=True))
    tl.store(outcome.out + n_live + 1, bound.to(tl.int32, bitcast=True))
    tl.store(outcome.out + n_live + 2, gap.to(tl.int32, bitcast=True))
    tl.store(outcome.out + n_live + 3, tl.sum(is_fetched.to(tl.int32), 0))


@triton.jit(noinline=True)
def _plan(
    counts_ptr, cumulative_ptr, max_load, mean, scratch, outcome, tables, rules, sizes,
    G: tl.constexpr, SLICES: tl.constexpr, MOST: tl.constexpr, MORE: tl.constexpr,
    EXPERTS: tl.constexpr, P: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr,
    PRICED: tl.constexpr, DOMAINS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Plan for a batch that needs it.

    Most batches don't need this. Since it is not inlined, it takes no registers from the solver.
    """
    tl.debug_barrier()
    # Rounding to shares moves less than this from copy to copy.
    largest = max_load.to(tl.int64)
    largest += sizes.n_slots * ((largest * sizes.n_ranks >> SHARE_BITS) + 2)
    shift = sizes.n_slots * 0
    while (largest >> shift) >= MOST_UNITS:
        shift += 1
    _make_offers(counts_ptr, cumulative_ptr, shift, scratch, tables, sizes, SHARED)
    _reset(scratch, sizes, P, LIVE)
    tl.debug_barrier()
    pieces_ptr, steps, peak, bound = _search(
        counts_ptr, cumulative_ptr, shift, scratch, tables, rules, sizes, G, SLICES, MOST, MORE,
        EXPERTS, P, LIVE, SHARED, PRICED, DOMAINS, RESIDENT,
    )  # fmt: skip
    tl.debug_barrier()
    expert, tokens, halvings = write_copies(
        counts_ptr, cumulative_ptr, pieces_ptr, steps, shift, scratch, tables, sizes, P, LIVE,
        SHARED,
    )  # fmt: skip
    tl.store(scratch.flag, tl.where(steps > 0, halvings + 1, 0))
    max_load = tl.where(steps > 0, (peak << shift).to(tl.float32), max_load)
    bound = tl.maximum((bound << shift).to(tl.float32), mean)
    if not RESIDENT:
        _write_version(outcome, expert, tokens, tl.arange(0, P))
    _write_outcome(expert, tokens, max_load, bound, outcome, tables, sizes, P, LIVE, RESIDENT)


@triton.jit
def plan_live_slots(
    counts_ptr,  # [E] int32, tokens of each expert over all ranks
    cumulative_ptr,  # [2 n_copies + G L] int32: shares of static copies, then of this batch's
    max_load,  # float32, largest load of the plan of static copies
    mean,  # float32, mean load
    invalid,  # bool, whether counts are invalid
    scratch_ptr,  # [live_scratch_words] int32
    outcome,
    tables,
    rules,
    sizes,
    G: tl.constexpr,
    SLICES: tl.constexpr,
    MOST: tl.constexpr,
    MORE: tl.constexpr,
    EXPERTS: tl.constexpr,
    P: tl.constexpr,
    LIVE: tl.constexpr,
    SHARED: tl.constexpr,
    PRICED: tl.constexpr,
    DOMAINS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Plan what this batch's live slots hold, if the plan of static copies is not good enough.

    Writes the outcome, and what `select` needs of it to the scratch (equations 24 to 27).
    """
    scratch = divide_live_scratch(scratch_ptr, sizes, LIVE)
    if (max_load > rules.above * mean) & (invalid == 0):
        _plan(
            counts_ptr, cumulative_ptr, max_load, mean, scratch, outcome, tables, rules, sizes,
            G, SLICES, MOST, MORE, EXPERTS, P, LIVE, SHARED, PRICED, DOMAINS, RESIDENT,
        )  # fmt: skip
    else:
        tl.store(scratch.flag, 0)
        if not RESIDENT:
            tl.store(outcome.version, outcome.base)
        nothing = tl.full((P,), -1, tl.int32)
        _write_outcome(
            nothing, nothing * 0, max_load, mean, outcome, tables, sizes, P, LIVE, RESIDENT
        )


@triton.jit(
    do_not_specialize=[
        "n_ranks", "n_slots", "n_logical", "above", "aim", "cost", "fanout", "domain",
    ]
)  # fmt: skip
def plan_live_kernel(
    counts_ptr,  # [E] int32, tokens of each expert over all ranks
    cumulative_ptr,  # [2 n_copies + G L] int32: shares of static copies, then of this batch's
    max_load_ptr,  # [1] float32, largest load of the plan of static copies
    slot_words_ptr,  # the tables of `LiveTables`
    slot_experts_ptr,
    slot_holders_ptr,
    slot_homes_ptr,
    copy_start_ptr,
    copy_slot_ptr,
    copy_index_ptr,
    most_copies_ptr,  # [1] int32
    resident_ptr,
    scratch_ptr,  # [live_scratch_words] int32
    version_ptr,  # [1] int32, written
    base_ptr,  # [1] int32
    out_ptr,  # [G L + 4] int32, written
    above,  # float32
    aim,
    cost,
    fanout,
    domain,
    n_ranks,
    n_slots,
    n_logical,
    G: tl.constexpr,
    BINS: tl.constexpr,  # E, padded
    LIVE: tl.constexpr,
    SLICES: tl.constexpr,
    OFFERS: tl.constexpr,
    MORE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    PRICED: tl.constexpr,
    DOMAINS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Plan live slots for given counts and shares, in a launch of its own. Grid (1,)."""
    expert = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + expert, mask=expert < n_logical, other=0)
    mean = tl.sum(counts.to(tl.float32), 0) / n_ranks.to(tl.float32)
    plan_live_slots(
        counts_ptr, cumulative_ptr, tl.load(max_load_ptr), mean, tl.min(counts, 0) < 0,
        scratch_ptr, LiveOutcome(out_ptr, version_ptr, tl.load(base_ptr)),
        LiveTables(
            slot_words_ptr, slot_experts_ptr, slot_holders_ptr, slot_homes_ptr, copy_start_ptr,
            copy_slot_ptr, copy_index_ptr, resident_ptr,
        ),
        LiveRules(above, aim, cost, fanout, domain),
        LiveSizes(n_ranks, n_slots, n_logical, tl.load(most_copies_ptr), n_slots + LIVE),
        G, SLICES, OFFERS, MORE, EXPERTS, SLOTS, LIVE, SHARED, PRICED, DOMAINS, RESIDENT,
    )  # fmt: skip
