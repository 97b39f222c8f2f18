"""The start of a pull: which experts this rank reads and where, once their weights are published.

One program does this ahead of the copies, so nothing else waits. It also sends a checksum of the
batch's plan to every rank and compares those that have come. Nobody waits for these; of two ranks
whose plans differ, the later one finds out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.launch import KernelCall, launch_call
from lplb_triton.kernels.pull.signals import (
    GATE,
    LANES,
    WARPS,
    Signals,
    acquire_words,
    await_or_report,
    on_gpu,
    order_all,
    report_fault,
    send_signal,
    signal_addresses,
)

STEP = tl.constexpr(_layout.LIVE_STEP)
PULLS = tl.constexpr(_layout.LIVE_PULLS)
PUBLISHED = tl.constexpr(_layout.LIVE_PUBLISHED)
PLANNED = tl.constexpr(_layout.LIVE_PLANNED)
PLANS = tl.constexpr(_layout.LIVE_PLANS)
FAULT_MISMATCH = tl.constexpr(_layout.FAULT_MISMATCH)
# Numbers of a copy in the list of copies, which begins with how many there are.
COPY_FIELDS = 3


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


@triton.jit(do_not_specialize=["rank", "n_ranks", "timeout_ms", "layer"])
def begin_pull_kernel(
    addresses_ptr,  # [n_ranks] int64: where each rank's signals are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    timeout_ms,
    plan_ptr,  # [n_ranks, SLOTS] int32: expert of each live slot, -1 for none
    homes_ptr,  # [n_logical, 2] int32: rank and static slot of each expert's original
    held_ptr,  # [SLOTS] int32, with RESIDENT: experts in the slots before, is written
    copies_ptr,  # [1 + COPY_FIELDS SLOTS] int32, is written: number of copies; slot, rank and row
    layer,  # number of the layer
    SLOTS: tl.constexpr,
    RESIDENT: tl.constexpr,  # whether what a slot holds already isn't read again
    COMPARE: tl.constexpr,  # whether to compare plans, as in a forward pass
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
):
    """List this rank's copies once the ranks that it reads have published their weights. Grid (1,).

    The list is empty if one of them doesn't in time, or if anything failed before.
    """
    lane = tl.arange(0, LANES)
    needed = lane < 0
    for slot in tl.static_range(SLOTS):
        expert = tl.load(plan_ptr + rank * SLOTS + slot)
        wanted = expert >= 0
        if RESIDENT:
            wanted = wanted & (tl.load(held_ptr + slot) != expert)
        home = tl.load(homes_ptr + 2 * expert, mask=wanted, other=-1)
        needed = needed | (lane == home)
    if COMPARE:
        compare_plans(
            plan_ptr, n_ranks * SLOTS, layer, addresses_ptr, state_ptr, status_ptr, rank, n_ranks,
            ON_GPU,
        )  # fmt: skip
    step = tl.load(state_ptr + STEP)
    # A gate that a difference has closed lets nothing through.
    ready = await_or_report(
        addresses_ptr, state_ptr, status_ptr, PUBLISHED, rank, n_ranks, needed, step, step,
        timeout_ms, ON_GPU,
    )  # fmt: skip
    count = rank * 0
    for slot in tl.static_range(SLOTS):
        expert = tl.load(plan_ptr + rank * SLOTS + slot)
        wanted = ready & (expert >= 0)
        if RESIDENT:
            wanted = wanted & (tl.load(held_ptr + slot) != expert)
        at = copies_ptr + 1 + count * 3
        home = tl.load(homes_ptr + 2 * expert, mask=wanted, other=0)
        row = tl.load(homes_ptr + 2 * expert + 1, mask=wanted, other=0)
        tl.store(at, slot + count * 0, mask=wanted)
        tl.store(at + 1, home, mask=wanted)
        tl.store(at + 2, row, mask=wanted)
        if RESIDENT:
            tl.debug_barrier()
            tl.store(held_ptr + slot, expert, mask=wanted)
        count += wanted.to(tl.int32)
    tl.store(copies_ptr, count)


def begin_pull(
    signals: Signals,
    plan: torch.Tensor,
    homes: torch.Tensor,
    copies: torch.Tensor,
    held: torch.Tensor | None,
    layer: int,
    *,
    compare: bool,
) -> None:
    """List the copies of this rank for `copy_rows`; see `begin_pull_kernel`."""
    given = copies if held is None else held
    args = (*signals.args(), plan, homes, given, copies, layer)
    constants = (plan.shape[1], int(held is not None), int(compare), on_gpu())
    launch_call(KernelCall(begin_pull_kernel, 1, args, constants, {"num_warps": WARPS}))


def copy_list_words(slots: int) -> int:
    """Return the number of int32 words of a list of copies."""
    return 1 + COPY_FIELDS * slots
