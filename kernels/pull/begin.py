"""The start of a pull: what this rank reads and where, and whether all ranks have the same plan.

A checksum of the batch's plan goes to every rank, and those that have come are compared. Nobody
waits for these; of two ranks whose plans differ, the later one finds out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.pull.signals import (
    GATE,
    LANES,
    acquire_words,
    order_all,
    report_fault,
    send_signal,
    signal_addresses,
)

PULLS = tl.constexpr(_layout.LIVE_PULLS)
PLANNED = tl.constexpr(_layout.LIVE_PLANNED)
PLANS = tl.constexpr(_layout.LIVE_PLANS)
FAULT_MISMATCH = tl.constexpr(_layout.FAULT_MISMATCH)


@triton.jit
def sum_plan(plan_ptr, n, layer, BLOCK: tl.constexpr):
    """Return a checksum of a plan of ``n`` experts and the number of a layer, in 32 bits."""
    total = layer.to(tl.int64) * 2654435761
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        expert = tl.load(plan_ptr + at, mask=at < n, other=-2).to(tl.int64) + 2
        # The factors look random, so that no exchange of experts leaves the sum as it was.
        factor = ((at.to(tl.int64) + 1) * 2654435761) & 0xFFFFFFFF
        factor = ((factor ^ (factor >> 15)) * 73244475) & 0xFFFFFFFF
        total += tl.sum(expert * (factor | 1), 0)
    return total & 0xFFFFFFFF


@triton.jit
def compare_plans(
    plan_ptr, n, layer, addresses_ptr, state_ptr, status_ptr, rank, n_ranks, ON_GPU: tl.constexpr
):
    """Send the checksum of this pull's plan, compare those that have come, report a difference."""
    number = tl.load(state_ptr + PULLS) + 1
    tl.debug_barrier()
    tl.store(state_ptr + PULLS, number)
    word = (number << 32) | sum_plan(plan_ptr, n, layer, LANES)
    row = PLANNED + (number % PLANS).to(tl.int32)
    is_open = tl.load(state_ptr + GATE, volatile=True) == 0
    if is_open:
        send_signal(addresses_ptr, row, rank, n_ranks, word, ON_GPU)
    lane = tl.arange(0, LANES)
    order_all(lane, ON_GPU)
    tl.debug_barrier()
    there = (lane < n_ranks) & is_open
    theirs = acquire_words(signal_addresses(addresses_ptr, row, rank), there, ON_GPU)
    other = (there & ((theirs >> 32) == number) & (theirs != word)).to(tl.int32)
    if tl.sum(other, 0) > 0:
        fault = tl.full((), FAULT_MISMATCH, tl.int32)
        report_fault(state_ptr, status_ptr, fault, n_ranks, number, row, other, theirs)


@triton.jit
def find_row(
    plan_ptr, homes_ptr, held_ptr, rank, slot, SLOTS: tl.constexpr, RESIDENT: tl.constexpr
):
    """Return whether a slot's expert is to be read, and where: rank, -1 for none, and row.

    With RESIDENT what the slot holds already, as ``held_ptr`` says, isn't read again.
    """
    expert = tl.load(plan_ptr + rank * SLOTS + slot)
    wanted = expert >= 0
    if RESIDENT:
        wanted = wanted & (tl.load(held_ptr + slot) != expert)
    home = tl.load(homes_ptr + 2 * expert, mask=wanted, other=-1)
    row = tl.load(homes_ptr + 2 * expert + 1, mask=wanted, other=0)
    return wanted, home, row


@triton.jit
def find_rows(plan_ptr, homes_ptr, held_ptr, rank, SLOTS: tl.constexpr, RESIDENT: tl.constexpr):
    """Return what this rank reads for its one or two slots.

    These are the number of copies, the slot of the first copy, and of slot 0 and of slot 1 the rank
    and row of `find_row`. With one slot the last two are those of slot 0.
    """
    wanted, home, row = find_row(plan_ptr, homes_ptr, held_ptr, rank, 0, SLOTS, RESIDENT)
    count = wanted.to(tl.int32)
    first = 1 - count
    second_home, second_row = home, row
    if SLOTS > 1:
        more, second_home, second_row = find_row(
            plan_ptr, homes_ptr, held_ptr, rank, 1, SLOTS, RESIDENT
        )
        count += more.to(tl.int32)
    return count, first, home, row, second_home, second_row
