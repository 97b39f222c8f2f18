"""What ranks can offer: words of units, place and a bit for other static copies of the expert.

The largest offers of each rank are in registers, by slice (slices.py) and number.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.live.arguments import LANES, OFFER_SHIFT

# Slots whose offers are loaded at once.
AT_ONCE = tl.constexpr(4)


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
def find_offer(offers, giver, SLICES: tl.constexpr, MOST: tl.constexpr):
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
def replace_offer(offers, giver, word, new_word, SLICES: tl.constexpr, MOST: tl.constexpr):
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
def refill_offers(
    offers, floors, giver, offers_ptr, sizes, SLICES: tl.constexpr, MOST: tl.constexpr
):
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
