"""What the kernels of live slots share: addresses, rules, and the layout of their scratch.

``G`` is the number of ranks, ``S`` the number of static slots of a rank, ``L`` the number of its
live slots, ``E`` the number of experts. A static slot's number is ``place * G + rank``, so that
threads that follow each other read ranks that do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton import _layout

# Loads by the plan of the static copies are below this, in units. Aims are below one and a half
# times as much.
MOST_UNITS = tl.constexpr(1 << _layout.LIVE_UNIT_BITS)
AIM_BITS = tl.constexpr(_layout.LIVE_AIM_BITS)
ROOM_SHARE = tl.constexpr(_layout.LIVE_ROOM_SHARE)
PASSES = tl.constexpr(_layout.LIVE_PASSES)
MISS_BITS = tl.constexpr(_layout.LIVE_MISS_BITS)
CUTS = tl.constexpr(_layout.LIVE_CUTS)
HALVINGS = tl.constexpr(_layout.LIVE_HALVINGS)
# Fields of a rank's offer: its units above the place of the slot, and a bit that says whether the
# expert has other static copies.
OFFER_SHIFT = tl.constexpr(_layout.LIVE_PLACE_BITS + 1)
PLACE_MASK = tl.constexpr((1 << _layout.LIVE_PLACE_BITS) - 1)
# Bits of a rank's number in a word that is compared.
RANK_BITS = tl.constexpr(_layout.LIVE_RANK_BITS)
LANES = tl.constexpr(_layout.LIVE_LANES)


class LiveTables(NamedTuple):
    """Addresses of tables of the placement; int32."""

    slot_words: Any
    """[S, G] copy of each static slot, shifted by two bits, and two bits: whether its expert has
    other static copies, and whether this copy is the first of them."""
    slot_experts: Any
    """[S, G]"""
    slot_holders: Any
    """[S, G, cdiv(G, 32)] bits of the ranks with a static copy of the slot's expert."""
    slot_homes: Any
    """[S, G] rank of the expert's original."""
    copy_start: Any
    """[E + 1]"""
    copy_slot: Any
    """[n_copies] physical slot of each static copy."""
    copy_index: Any
    """[n_copies] number of a copy among those of its expert on its rank."""
    resident: Any
    """[G, L] what live slots hold already; read and written only with RESIDENT."""


class LiveRules(NamedTuple):
    """Run-time numbers; see `lplb_triton.Balancer`."""

    above: Any
    aim: Any
    """Part of the mean load that a plan may end above it, in units of 2**-AIM_BITS."""
    cost: Any
    fanout: Any
    """The most copies that leave one home rank, a large number for no limit."""
    domain: Any
    """Ranks of a domain; G or more for one domain."""


class LiveSizes(NamedTuple):
    """Run-time sizes."""

    n_ranks: Any
    n_slots: Any
    """Static slots of a rank."""
    n_logical: Any
    most_copies: Any
    """The most static copies of an expert."""
    slots_per_rank: Any
    """Static and live slots of a rank."""


class LiveScratch(NamedTuple):
    """Addresses of the parts of the scratch of a stream; int32. `live_scratch_words` sizes it."""

    flag: Any
    """[1] 0 without a plan, else one more than the halvings that find a copy; padded to LANES."""
    first: Any
    """[E] first copy of each expert with live copies, else 0."""
    last: Any
    """[E] its last copy."""
    slot: Any
    """[n_copies + G L] physical slots of the copies in these ranges, numbered from n_copies on."""
    copy_index: Any
    """[n_copies + G L] as ``copy_index``."""
    running: Any
    """[n_copies + G L] tokens of the expert up to each of these copies."""
    offers: Any
    """[S, G] offers of static slots."""
    loads: Any
    """[G] loads of the plan of static copies, in units."""
    lowest: Any
    """[E] the smallest of these loads over the ranks that hold an expert."""
    pieces: Any
    """[2, 3, G L] pieces of two passes, by live slot: static slot, units, step; 0 for none."""


class LiveOutcome(NamedTuple):
    """Where a plan writes what others read."""

    out: Any
    """[G L + 4] int32: experts of live slots, -1 for none, then the largest load, a lower bound
    and the gap, bits of float32."""
    version: Any
    """[1] int32, checksum of the placement and of this plan."""
    base: Any
    """Checksum of the placement, int32; no address."""


@triton.jit
def divide_live_scratch(ptr, sizes, LIVE: tl.constexpr):
    """Divide a stream's scratch of live slots; returns `LiveScratch`."""
    n_copies = sizes.n_ranks * sizes.n_slots
    n_moved = n_copies + sizes.n_ranks * LIVE
    first = ptr + LANES
    last = first + sizes.n_logical
    slot = last + sizes.n_logical
    copy_index = slot + n_moved
    running = copy_index + n_moved
    offers = running + n_moved
    loads = offers + n_copies
    lowest = loads + sizes.n_ranks
    pieces = lowest + sizes.n_logical
    return LiveScratch(ptr, first, last, slot, copy_index, running, offers, loads, lowest, pieces)


def live_scratch_words(n_logical: int, n_ranks: int, n_slots: int, live: int) -> int:
    """Return the int32 words of the scratch that `divide_live_scratch` divides."""
    n_copies = n_ranks * n_slots
    n_moved = n_copies + n_ranks * live
    words = 3 * n_logical + 3 * n_moved + n_copies + n_ranks + 6 * n_ranks * live
    return int(_layout.LIVE_LANES) + words
