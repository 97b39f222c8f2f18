"""Find pieces: tokens that move from static copies to live slots, one after the other.

A rank is a lane of a slice of LANES ranks; numbers by rank are tuples of slices, and stay in
registers. Every warp does all of the work, so no warp waits for another. Loads are whole numbers of
units of 2**shift tokens. Equation numbers refer to docs/method.md.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

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

RANK_MASK = tl.constexpr((1 << _layout.LIVE_RANK_BITS) - 1)
# Is added to the surplus of a rank that neither gives nor takes any more, and stands for that of no
# rank.
SETTLED = tl.constexpr(-(1 << 29))
NEVER = tl.constexpr(-(1 << 30))
# Slots whose offers are loaded at once.
AT_ONCE = tl.constexpr(4)


@triton.jit
def find_largest(slices, SLICES: tl.constexpr):
    """Return the largest of numbers by rank."""
    largest = slices[0]
    for h in tl.static_range(1, SLICES):
        largest = tl.maximum(largest, slices[h])
    return tl.max(largest, 0)


@triton.jit
def sum_slices(slices, SLICES: tl.constexpr):
    """Return the sum of numbers by rank."""
    total = slices[0]
    for h in tl.static_range(1, SLICES):
        total += slices[h]
    return tl.sum(total, 0)


@triton.jit
def _take(slices, rank, SLICES: tl.constexpr):
    """Return the number of one rank, which must not be negative."""
    lane = tl.arange(0, LANES)
    found = tl.where(lane == rank, slices[0], 0)
    for h in tl.static_range(1, SLICES):
        found = tl.where(lane + h * LANES == rank, slices[h], found)
    return tl.max(found, 0)


@triton.jit
def _insert(offers, word, MOST: tl.constexpr):
    """Insert a word by lane into MOST words in descending order, of which the last one drops."""
    kept = ()
    for k in tl.static_range(MOST):
        kept += (tl.maximum(offers[k], word),)
        word = tl.minimum(offers[k], word)
    return kept


@triton.jit
def _load_offers(offers_ptr, sizes, h: tl.constexpr, MOST: tl.constexpr):
    """Load the MOST largest offers of the ranks of slice ``h``.

    Returns them in descending order, 0 for none, and the sum of all units of each rank.
    """
    lane = tl.arange(0, LANES)
    rank = lane + h * LANES
    load = tl.zeros((LANES,), tl.int32)
    offers = ()
    for _ in tl.static_range(MOST):
        offers += (load,)
    for place in range(0, sizes.n_slots, AT_ONCE):
        words = ()
        for i in tl.static_range(AT_ONCE):
            there = (rank < sizes.n_ranks) & (place + i < sizes.n_slots)
            at = offers_ptr + (place + i) * sizes.n_ranks + rank
            words += (tl.load(at, mask=there, other=0),)
        for i in tl.static_range(AT_ONCE):
            load += words[i] >> OFFER_SHIFT
            offers = _insert(offers, words[i], MOST)
    return offers, load


@triton.jit
def load_all_offers(offers_ptr, sizes, SLICES: tl.constexpr, MOST: tl.constexpr):
    """Load the largest offers of all ranks; returns offers by slice and number, and loads."""
    offers, loads = (), ()
    for h in tl.static_range(SLICES):
        found, load = _load_offers(offers_ptr, sizes, h, MOST)
        offers += found
        loads += (load,)
    return offers, loads


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
def _find_offer(offers, giver, SLICES: tl.constexpr, MOST: tl.constexpr):
    """Find the largest offer of a rank."""
    lane = tl.arange(0, LANES)
    found = tl.zeros((LANES,), tl.int32)
    for h in tl.static_range(SLICES):
        largest = offers[h * MOST]
        for k in tl.static_range(1, MOST):
            largest = tl.maximum(largest, offers[h * MOST + k])
        found = tl.maximum(found, tl.where(lane + h * LANES == giver, largest, 0))
    return tl.max(found, 0)


@triton.jit
def _replace_offer(offers, giver, word, new_word, SLICES: tl.constexpr, MOST: tl.constexpr):
    """Replace one offer of the giver."""
    lane = tl.arange(0, LANES)
    replaced = ()
    for h in tl.static_range(SLICES):
        own = lane + h * LANES == giver
        for k in tl.static_range(MOST):
            offer = offers[h * MOST + k]
            replaced += (tl.where(own & (offer == word), new_word, offer),)
    return replaced


@triton.jit
def _refill(offers, floors, giver, offers_ptr, sizes, SLICES: tl.constexpr, MOST: tl.constexpr):
    """Load the giver's largest offers anew; those of others stay as they are.

    A rank's floor is the smallest of the offers that were loaded, 0 if these are all.
    """
    lane = tl.arange(0, LANES)
    new_offers, new_floors = (), ()
    for h in tl.static_range(SLICES):
        own = lane + h * LANES == giver
        found, _ = _load_offers(offers_ptr, sizes, h, MOST)
        for k in tl.static_range(MOST):
            new_offers += (tl.where(own, found[k], offers[h * MOST + k]),)
        new_floors += (tl.where(own, found[MOST - 1], floors[h]),)
    return new_offers, new_floors


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
    taken = _take(used, receiver, SLICES)
    # Of three numbers by slot, the smallest is best: 0 to 1 holds what is wanted, 2 to 3 doesn't.
    best = tl.full((), 8, tl.int32)
    for r in tl.static_range(LIVE):
        holds = ()
        for h in tl.static_range(SLICES):
            holds += (resident[h * LIVE + r] + 1,)
        inside = _take(holds, receiver, SLICES) - 1
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


@triton.jit
def _add_at(slices, rank, amount, SLICES: tl.constexpr):
    """Add to the number of one rank."""
    lane = tl.arange(0, LANES)
    added = ()
    for h in tl.static_range(SLICES):
        added += (tl.where(lane + h * LANES == rank, slices[h] + amount, slices[h]),)
    return added


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
    lane = tl.arange(0, LANES)
    n_live = sizes.n_ranks * LIVE
    zero = tl.zeros((LANES,), tl.int32)
    surplus, rooms, excess, free, used, sent, received, floors, first_live = (
        (), (), (), (), (), (), (), (), (),
    )  # fmt: skip
    for h in tl.static_range(SLICES):
        is_rank = lane + h * LANES < sizes.n_ranks
        own = tl.where(is_rank, loads[h] - target, 0)
        surplus += (tl.where(is_rank, own, NEVER),)
        rooms += (tl.maximum(-own, 0),)
        excess += (tl.maximum(own, 0),)
        free += (zero + LIVE,)
        used += (zero,)
        sent += (zero,)
        received += (zero,)
        floors += (offers[h * MOST + MOST - 1],)
        first_live += (zero - 1,)
    room, left = sum_slices(rooms, SLICES), sum_slices(excess, SLICES)
    resident = _load_resident(tables.resident, sizes, SLICES, LIVE, RESIDENT)
    peak = find_largest(loads, SLICES)
    price = peak
    steps, kept, port, word = left * 0, left * 0, left * 0, left * 0 + 1
    giver_word = _find_giver(surplus, SLICES)
    while (giver_word > 0) & (room > 0) & (word > 0):
        giver, had = giver_word & RANK_MASK, giver_word >> RANK_BITS
        word = _find_offer(offers, giver, SLICES, MOST)
        if MORE:
            if word < _take(floors, giver, SLICES):
                # One thread has written what other threads read.
                tl.debug_barrier()
                offers, floors = _refill(offers, floors, giver, offers_ptr, sizes, SLICES, MOST)
                # All threads have read before one of them writes again.
                tl.debug_barrier()
                word = _find_offer(offers, giver, SLICES, MOST)
        offered, place = word >> OFFER_SHIFT, (word >> 1) & PLACE_MASK
        at = place * sizes.n_ranks + giver
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
        wanted = tl.minimum(had, offered)
        # No deficit is as large as the second number.
        limit = tl.where(largest_first, 2 * MOST_UNITS, wanted)
        found = _find_receiver(
            surplus, first_live, expert, bits, home, limit, rules.domain,
            SLICES, LIVE, SHARED, DOMAINS,
        )  # fmt: skip
        if PRICED:
            found = tl.where(_take(sent, home, SLICES) < rules.fanout, found, 0)
        value = found >> RANK_BITS
        deficit = tl.where(value > 2 * MOST_UNITS, 4 * MOST_UNITS - value, value)
        fetches = giver >= 0
        if RESIDENT:
            there = _find_resident(
                surplus, used, resident, expert, bits, first_live, home, rules.domain,
                SLICES, LIVE, SHARED, DOMAINS,
            )  # fmt: skip
            fetches = there == 0
            found = tl.where(fetches, found, there)
            deficit = tl.where(fetches, deficit, there >> RANK_BITS)
        some = (found > 0) & (word > 0)
        receiver = tl.where(some, found & RANK_MASK, -1)
        is_last_slot = giver >= 0
        slot = giver * 0
        if LIVE > 1:
            n_free = _take(free, receiver, SLICES)
            is_last_slot = n_free == 1
            slot = LIVE - n_free
        if RESIDENT:
            slot = _choose_slot(used, resident, receiver, expert, fetches == 0, SLICES, LIVE)

        amount = tl.minimum(wanted, deficit)
        is_scarce = left - amount > ((room - deficit) >> 4) * ROOM_SHARE
        amount = tl.where(is_last_slot & is_scarce, tl.minimum(deficit, offered), amount)
        amount = tl.where(some, amount, 0)
        steps += some.to(tl.int32)
        piece = pieces_ptr + receiver * LIVE + slot
        tl.store(piece, at + 1, mask=some)
        tl.store(piece + n_live, amount, mask=some)
        tl.store(piece + 2 * n_live, steps, mask=some)

        room += tl.maximum(amount - had, 0)
        room -= tl.where(some, tl.where(is_last_slot, deficit, amount), 0)
        left -= tl.minimum(amount, had)
        # A rank whose last slot is taken is at or below the target: it gives no more.
        receiver_after = amount - deficit + tl.where(is_last_slot, SETTLED, 0)
        new_surplus = ()
        for h in tl.static_range(SLICES):
            rank = lane + h * LANES
            own = tl.where(rank == receiver, receiver_after, surplus[h])
            new_surplus += (tl.where(rank == giver, had - amount, own),)
        surplus = new_surplus
        if LIVE > 1:
            free = _add_at(free, receiver, -some.to(tl.int32), SLICES)
            first_now = tl.where(some, expert, -1)
            new_first = ()
            for h in tl.static_range(SLICES):
                is_new = (lane + h * LANES == receiver) & (first_live[h] < 0)
                new_first += (tl.where(is_new, first_now, first_live[h]),)
            first_live = new_first
        if RESIDENT:
            used = _add_at(used, receiver, some.to(tl.int32) << slot, SLICES)
        new_word = word - (amount << OFFER_SHIFT)
        new_word = tl.where(some & (amount < offered), new_word, 0)
        offers = _replace_offer(offers, giver, word, new_word, SLICES, MOST)
        if MORE:
            tl.store(offers_ptr + at, new_word, mask=word > 0)
        giver_word = _find_giver(surplus, SLICES)
        if PRICED:
            fetched = (some & fetches).to(tl.int32)
            sent = _add_at(sent, home, fetched, SLICES)
            received = _add_at(received, receiver, fetched, SLICES)
            port = tl.maximum(port, _take(sent, home, SLICES))
            port = tl.maximum(port, _take(received, receiver, SLICES))
            # Below the target it doesn't matter which rank has the most.
            new_peak = target + (giver_word >> RANK_BITS)
            better = some & (new_peak + port * cost < price)
            price = tl.where(better, new_peak + port * cost, price)
            peak = tl.where(better, new_peak, peak)
            kept = tl.where(better, steps, kept)
    lasting = ()
    for h in tl.static_range(SLICES):
        is_settled = (surplus[h] < SETTLED // 2) & (surplus[h] > NEVER)
        lasting += (tl.where(is_settled, surplus[h] - SETTLED, surplus[h]),)
    last_peak = target + find_largest(lasting, SLICES)
    if PRICED:
        # The largest load may have come to lie below the target.
        peak = tl.where((kept == steps) & (steps > 0), last_peak, peak)
    else:
        kept, peak, price = steps, last_peak, last_peak
    return price, peak, kept
