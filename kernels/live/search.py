"""Find pieces: tokens that move from static copies to live slots, one after the other.

A rank is a lane of a slice of LANES ranks; numbers by rank are tuples of slices, and stay in
registers. Every warp does all of the work, so no warp waits for another. Loads are whole numbers of
units of 2**shift tokens. Equation numbers refer to docs/method.md.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.live.arguments import (
    LANES,
    MOST_UNITS,
    OFFER_SHIFT,
    PLACE_MASK,
    RANK_BITS,
    ROOM_SHARE,
)
from lplb_triton.kernels.live.offers import find_offer, refill_offers, replace_offer
from lplb_triton.kernels.live.slices import add_at, find_largest, sum_slices, take

RANK_MASK = tl.constexpr((1 << _layout.LIVE_RANK_BITS) - 1)
# Is added to the surplus of a rank that neither gives nor takes any more, and stands for that of no
# rank.
SETTLED = tl.constexpr(-(1 << 29))
NEVER = tl.constexpr(-(1 << 30))


@triton.jit
def _find_giver(surplus, SLICES: tl.constexpr):
    """Find the rank with the largest surplus; returns a word of surplus and rank, 0 for none."""
    lane = tl.arange(0, LANES)
    largest = tl.zeros((LANES,), tl.int32)
    for h in tl.static_range(SLICES):
        word = (surplus[h] << RANK_BITS) | (lane + h * LANES)
        largest = tl.maximum(largest, tl.where(surplus[h] > 0, word, 0))
    return tl.max(largest, 0)


@triton.jit
def _is_near(rank, home, domain):
    """Whether ranks lie in the domain of ``home``."""
    return rank // domain == home // domain


@triton.jit
def _find_receiver(
    surplus, first_live, expert, bits, home, limit, domain,
    SLICES: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr, DOMAINS: tl.constexpr,
):  # fmt: skip
    """Find the rank with the smallest deficit of ``limit`` units or more, or else the largest.

    ``bits`` say which ranks hold a static copy of the expert, ``first_live`` what lies in the first
    live slot of each rank. Returns a word of value and rank, 0 for none.
    """
    lane = tl.arange(0, LANES)
    largest = tl.zeros((LANES,), tl.int32)
    for h in tl.static_range(SLICES):
        deficit = -surplus[h]
        if SHARED:
            deficit = tl.where((bits[h] >> lane) & 1 == 0, deficit, 0)
        if LIVE > 1:
            deficit = tl.where(first_live[h] == expert, 0, deficit)
        if DOMAINS:
            deficit = tl.where(_is_near(lane + h * LANES, home, domain), deficit, 0)
        # This is negative for ranks that are settled.
        value = tl.where(deficit >= limit, 4 * MOST_UNITS - deficit, deficit)
        word = (value << RANK_BITS) | (lane + h * LANES)
        largest = tl.maximum(largest, tl.where(value > 0, word, 0))
    return tl.max(largest, 0)


@triton.jit
def _find_resident(
    surplus, used, resident, expert, bits, first_live, home, domain,
    SLICES: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr, DOMAINS: tl.constexpr,
):  # fmt: skip
    """Find the rank with the largest deficit in an unused slot of which the expert lies already."""
    lane = tl.arange(0, LANES)
    largest = tl.zeros((LANES,), tl.int32)
    for h in tl.static_range(SLICES):
        there = lane < 0
        for r in tl.static_range(LIVE):
            there |= (resident[h * LIVE + r] == expert) & ((used[h] >> r) & 1 == 0)
        if SHARED:
            there &= (bits[h] >> lane) & 1 == 0
        deficit = tl.where(there, -surplus[h], 0)
        if LIVE > 1:
            deficit = tl.where(first_live[h] == expert, 0, deficit)
        if DOMAINS:
            deficit = tl.where(_is_near(lane + h * LANES, home, domain), deficit, 0)
        word = (deficit << RANK_BITS) | (lane + h * LANES)
        largest = tl.maximum(largest, tl.where(deficit > 0, word, 0))
    return tl.max(largest, 0)


@triton.jit
def _choose_slot(
    used, resident, receiver, expert, is_there, SLICES: tl.constexpr, LIVE: tl.constexpr
):
    """Choose an unused live slot: the one with the expert, or else an empty one, or else any."""
    taken = take(used, receiver, SLICES)
    # Of three numbers by slot, the smallest is best: 0 to 1 holds what is wanted, 2 to 3 doesn't.
    best = tl.full((), 8, tl.int32)
    for r in tl.static_range(LIVE):
        holds = ()
        for h in tl.static_range(SLICES):
            holds += (resident[h * LIVE + r] + 1,)
        inside = take(holds, receiver, SLICES) - 1
        wanted = tl.where(is_there, expert, -1)
        rating = tl.where(inside == wanted, r, 2 + r)
        best = tl.minimum(best, tl.where((taken >> r) & 1 == 0, rating, 8))
    return best & 1


@triton.jit
def _load_resident(ptr, sizes, SLICES: tl.constexpr, LIVE: tl.constexpr, RESIDENT: tl.constexpr):
    """Load what live slots hold already, by slice and slot; -1 for nothing."""
    lane = tl.arange(0, LANES)
    resident = ()
    for h in tl.static_range(SLICES):
        for r in tl.static_range(LIVE):
            holds = tl.full((LANES,), -1, tl.int32)
            if RESIDENT:
                there = lane + h * LANES < sizes.n_ranks
                at = (lane + h * LANES) * LIVE + r
                holds = tl.load(ptr + at, mask=there, other=-1)
            resident += (holds,)
    return resident


class Offer(NamedTuple):
    """What the giver of a step offers."""

    giver: Any
    had: Any
    """Its surplus."""
    word: Any
    """0 if it has nothing to offer."""
    units: Any
    at: Any
    """Number of the static slot."""
    expert: Any
    """-1 where nothing needs it."""
    home: Any
    """Rank of the expert's original."""
    bits: Any
    """By slice, the ranks with a static copy of the expert; 0 for an expert with one only."""


class Receiver(NamedTuple):
    """Who receives in a step."""

    some: Any
    """Whether there is a receiver."""
    rank: Any
    """-1 for none."""
    deficit: Any
    slot: Any
    """Its live slot."""
    is_last: Any
    """Whether this is the last of its slots that are free."""
    fetches: Any
    """Whether the expert doesn't lie in the slot already."""


class Ranks(NamedTuple):
    """What changes by rank during a search; tuples of slices."""

    surplus: Any
    free: Any
    """Live slots without a piece."""
    first_live: Any
    """Expert of the first piece, -1 for none."""
    used: Any
    """Bits of the live slots with a piece, with RESIDENT."""
    sent: Any
    """Copies that were fetched from the rank, with PRICED."""
    received: Any


@triton.jit
def _start_ranks(loads, target, sizes, SLICES: tl.constexpr, LIVE: tl.constexpr):
    """Return `Ranks` before the first step, the sum of their deficits and that of surpluses."""
    lane = tl.arange(0, LANES)
    zero = tl.zeros((LANES,), tl.int32)
    surplus, rooms, excess, free, first_live, zeros = (), (), (), (), (), ()
    for h in tl.static_range(SLICES):
        is_rank = lane + h * LANES < sizes.n_ranks
        own = tl.where(is_rank, loads[h] - target, 0)
        surplus += (tl.where(is_rank, own, NEVER),)
        rooms += (tl.maximum(-own, 0),)
        excess += (tl.maximum(own, 0),)
        free += (zero + LIVE,)
        first_live += (zero - 1,)
        zeros += (zero,)
    ranks = Ranks(surplus, free, first_live, zeros, zeros, zeros)
    return ranks, sum_slices(rooms, SLICES), sum_slices(excess, SLICES)


@triton.jit
def _read_offer(
    giver_word, word, tables, sizes,
    SLICES: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr, PRICED: tl.constexpr,
    DOMAINS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Take the words of a step apart, and load what else is needed of the offer."""
    giver, had = giver_word & RANK_MASK, giver_word >> RANK_BITS
    at = ((word >> 1) & PLACE_MASK) * sizes.n_ranks + giver
    is_shared = (word & 1) == 1
    expert, home, bits = giver * 0 - 1, giver, ()
    if LIVE > 1 or RESIDENT:
        expert = tl.load(tables.slot_experts + at, mask=word > 0, other=-1)
    for h in tl.static_range(SLICES):
        if SHARED:
            holders = tables.slot_holders + at * SLICES + h
            bits += (tl.load(holders, mask=is_shared, other=0),)
        else:
            bits += (0,)
    if SHARED and (PRICED or DOMAINS):
        # Only an expert with other static copies may have its original elsewhere.
        original = tl.load(tables.slot_homes + at, mask=is_shared, other=0)
        home = tl.where(is_shared, original, giver)
    return Offer(giver, had, word, word >> OFFER_SHIFT, at, expert, home, bits)


@triton.jit
def _choose_receiver(
    offer, ranks, resident, largest_first, rules,
    SLICES: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr, PRICED: tl.constexpr,
    DOMAINS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Choose who receives what is offered, and in which live slot."""
    # No deficit is as large as the first number.
    wanted = tl.minimum(offer.had, offer.units)
    limit = tl.where(largest_first, 2 * MOST_UNITS, wanted)
    found = _find_receiver(
        ranks.surplus, ranks.first_live, offer.expert, offer.bits, offer.home, limit, rules.domain,
        SLICES, LIVE, SHARED, DOMAINS,
    )  # fmt: skip
    if PRICED:
        found = tl.where(take(ranks.sent, offer.home, SLICES) < rules.fanout, found, 0)
    value = found >> RANK_BITS
    deficit = tl.where(value > 2 * MOST_UNITS, 4 * MOST_UNITS - value, value)
    fetches = offer.giver >= 0
    if RESIDENT:
        there = _find_resident(
            ranks.surplus, ranks.used, resident, offer.expert, offer.bits, ranks.first_live,
            offer.home, rules.domain, SLICES, LIVE, SHARED, DOMAINS,
        )  # fmt: skip
        fetches = there == 0
        found = tl.where(fetches, found, there)
        deficit = tl.where(fetches, deficit, there >> RANK_BITS)
    some = (found > 0) & (offer.word > 0)
    rank = tl.where(some, found & RANK_MASK, -1)
    is_last = offer.giver >= 0
    slot = offer.giver * 0
    if LIVE > 1:
        n_free = take(ranks.free, rank, SLICES)
        is_last = n_free == 1
        slot = LIVE - n_free
    if RESIDENT:
        slot = _choose_slot(ranks.used, resident, rank, offer.expert, fetches == 0, SLICES, LIVE)
    return Receiver(some, rank, deficit, slot, is_last, fetches)


@triton.jit
def _choose_amount(offer, receiver, room, left):
    """Choose how many units move: what the giver has too much, or more where room gets scarce.

    ``room`` is the sum of the deficits of ranks with free slots, ``left`` that of the surpluses. A
    receiver's last slot is filled up if the room of the others might not hold what is left.
    """
    amount = tl.minimum(tl.minimum(offer.had, offer.units), receiver.deficit)
    is_scarce = left - amount > ((room - receiver.deficit) >> 4) * ROOM_SHARE
    filling = tl.minimum(receiver.deficit, offer.units)
    amount = tl.where(receiver.is_last & is_scarce, filling, amount)
    return tl.where(receiver.some, amount, 0)


@triton.jit
def _move_units(
    ranks, offer, receiver, amount,
    SLICES: tl.constexpr, LIVE: tl.constexpr, PRICED: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Return `Ranks` after a piece has moved."""
    lane = tl.arange(0, LANES)
    surplus, free, first_live, used, sent, received = ranks
    # A rank whose last slot is taken is at or below the target: it gives no more.
    after = amount - receiver.deficit + tl.where(receiver.is_last, SETTLED, 0)
    first = tl.where(receiver.some, offer.expert, -1)
    new_surplus, new_first = (), ()
    for h in tl.static_range(SLICES):
        rank = lane + h * LANES
        own = tl.where(rank == receiver.rank, after, surplus[h])
        new_surplus += (tl.where(rank == offer.giver, offer.had - amount, own),)
        if LIVE > 1:
            is_new = (rank == receiver.rank) & (first_live[h] < 0)
            new_first += (tl.where(is_new, first, first_live[h]),)
    count = receiver.some.to(tl.int32)
    if LIVE > 1:
        first_live = new_first
        free = add_at(free, receiver.rank, -count, SLICES)
    if RESIDENT:
        used = add_at(used, receiver.rank, count << receiver.slot, SLICES)
    if PRICED:
        fetched = (receiver.some & receiver.fetches).to(tl.int32)
        sent = add_at(sent, offer.home, fetched, SLICES)
        received = add_at(received, receiver.rank, fetched, SLICES)
    return Ranks(new_surplus, free, first_live, used, sent, received)


@triton.jit
def _find_last_peak(surplus, target, SLICES: tl.constexpr):
    """Find the largest load, also of ranks that are settled."""
    loads = ()
    for h in tl.static_range(SLICES):
        is_settled = (surplus[h] < SETTLED // 2) & (surplus[h] > NEVER)
        loads += (tl.where(is_settled, surplus[h] - SETTLED, surplus[h]),)
    return target + find_largest(loads, SLICES)


@triton.jit
def find_pieces(
    offers,  # by slice and number, from `load_all_offers`
    loads,  # by rank
    target,  # load to end at
    largest_first,  # bool, whether the largest deficits are filled first
    pieces_ptr,  # [3, G L] int32, written: static slot + 1, units, step
    offers_ptr,  # [S, G] int32, changed with MORE
    tables,
    rules,
    cost,  # of a fetched expert, in units
    sizes,
    SLICES: tl.constexpr,
    MOST: tl.constexpr,  # offers of a rank in registers
    MORE: tl.constexpr,  # whether a rank may have more of them
    LIVE: tl.constexpr,
    SHARED: tl.constexpr,  # whether experts may have several static copies
    PRICED: tl.constexpr,  # whether there is a cost, or a limit of copies that leave a rank
    DOMAINS: tl.constexpr,  # whether there are several domains
    RESIDENT: tl.constexpr,  # whether live slots hold something already
):
    """Find pieces one by one (equation 24).

    Each step takes tokens of the largest offer of the rank with the largest surplus. Once that rank
    has no offer left, the largest load stays what it is. With PRICED, only the pieces of the first
    steps are kept, those that cost least (equation 25). Returns the least price, the largest load
    at that price, and the number of steps.
    """
    n_live = sizes.n_ranks * LIVE
    ranks, room, left = _start_ranks(loads, target, sizes, SLICES, LIVE)
    resident = _load_resident(tables.resident, sizes, SLICES, LIVE, RESIDENT)
    floors = ()
    for h in tl.static_range(SLICES):
        floors += (offers[h * MOST + MOST - 1],)
    peak = find_largest(loads, SLICES)
    price = peak
    steps, kept, port, word = left * 0, left * 0, left * 0, left * 0 + 1
    giver_word = _find_giver(ranks.surplus, SLICES)
    while (giver_word > 0) & (room > 0) & (word > 0):
        giver = giver_word & RANK_MASK
        word = find_offer(offers, giver, SLICES, MOST)
        if MORE:
            if word < take(floors, giver, SLICES):
                # One thread has written what other threads read.
                tl.debug_barrier()
                offers, floors = refill_offers(
                    offers, floors, giver, offers_ptr, sizes, SLICES, MOST
                )
                # All threads have read before one of them writes again.
                tl.debug_barrier()
                word = find_offer(offers, giver, SLICES, MOST)
        offer = _read_offer(
            giver_word, word, tables, sizes, SLICES, LIVE, SHARED, PRICED, DOMAINS, RESIDENT
        )
        receiver = _choose_receiver(
            offer, ranks, resident, largest_first, rules, SLICES, LIVE, SHARED, PRICED, DOMAINS,
            RESIDENT,
        )  # fmt: skip
        amount = _choose_amount(offer, receiver, room, left)
        some = receiver.some
        steps += some.to(tl.int32)
        piece = pieces_ptr + receiver.rank * LIVE + receiver.slot
        tl.store(piece, offer.at + 1, mask=some)
        tl.store(piece + n_live, amount, mask=some)
        tl.store(piece + 2 * n_live, steps, mask=some)

        room += tl.maximum(amount - offer.had, 0)
        room -= tl.where(some, tl.where(receiver.is_last, receiver.deficit, amount), 0)
        left -= tl.minimum(amount, offer.had)
        ranks = _move_units(ranks, offer, receiver, amount, SLICES, LIVE, PRICED, RESIDENT)
        new_word = word - (amount << OFFER_SHIFT)
        new_word = tl.where(some & (amount < offer.units), new_word, 0)
        offers = replace_offer(offers, giver, word, new_word, SLICES, MOST)
        if MORE:
            tl.store(offers_ptr + offer.at, new_word, mask=word > 0)
        giver_word = _find_giver(ranks.surplus, SLICES)
        if PRICED:
            port = tl.maximum(port, take(ranks.sent, offer.home, SLICES))
            port = tl.maximum(port, take(ranks.received, receiver.rank, SLICES))
            # Below the target it doesn't matter which rank has the most.
            new_peak = target + (giver_word >> RANK_BITS)
            better = some & (new_peak + port * cost < price)
            price = tl.where(better, new_peak + port * cost, price)
            peak = tl.where(better, new_peak, peak)
            kept = tl.where(better, steps, kept)
    last_peak = _find_last_peak(ranks.surplus, target, SLICES)
    if PRICED:
        # The largest load may have come to lie below the target.
        peak = tl.where((kept == steps) & (steps > 0), last_peak, peak)
    else:
        kept, peak, price = steps, last_peak, last_peak
    return price, peak, kept
