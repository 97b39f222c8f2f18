"""Gradients of live slots: written where other ranks read them, and added up at home.

Each rank writes the gradients of its own live slots to memory that the others read, in one of two
halves that take turns. An expert's home reads them and adds them to the gradient of the original,
in the order of the slots' numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.launch import KernelCall, launch_call
from lplb_triton.kernels.pull.signals import (
    LANES,
    WARPS,
    Signals,
    await_or_report,
    on_gpu,
    send_signal,
)

RETURNS = tl.constexpr(_layout.LIVE_RETURNS)
GATE = tl.constexpr(_layout.LIVE_GATE)
GRADED = tl.constexpr(_layout.LIVE_GRADED)
TAKEN = tl.constexpr(_layout.LIVE_TAKEN)
# Elements that a program copies or adds at a time, and its warps.
GRADIENT_BLOCK = 8192
GRADIENT_WARPS = 16
# Elements of a unit where rows are aligned: at least 16 bytes of any trained dtype.
ALIGNED_UNIT = 8


@triton.jit(do_not_specialize=["rank", "n_ranks", "timeout_ms"])
def begin_return_kernel(
    addresses_ptr,  # [n_ranks] int64: where each rank's signals are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    timeout_ms,
    plan_ptr,  # [n_ranks, SLOTS] int32: expert of each live slot, -1 for none
    SLOTS: tl.constexpr,
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
):
    """Wait until what this rank wrote two returns ago has been added up. Grid (1,)."""
    number = tl.load(state_ptr + RETURNS) + 1
    tl.debug_barrier()
    tl.store(state_ptr + RETURNS, number)
    lane = tl.arange(0, LANES)
    needed = lane < 0
    for slot in tl.static_range(SLOTS):
        filled = tl.load(plan_ptr + rank * SLOTS + slot) >= 0
        needed = needed | (filled & (lane < n_ranks))
    await_or_report(
        addresses_ptr, state_ptr, status_ptr, TAKEN, rank, n_ranks, needed, number - 2, number,
        timeout_ms, ON_GPU,
    )  # fmt: skip


@triton.jit
def slot_address(base, state_ptr, half, offset, stride, slot):
    """Return where a slot's gradient of a tensor is, int64, in the half of this return.

    ``half``, ``offset`` and ``stride`` are units of 16 bytes: of a half, before the tensor, of a
    row.
    """
    units = (tl.load(state_ptr + RETURNS) % 2) * half + offset + stride.to(tl.int64) * slot
    return base + units * 16


@triton.jit(
    do_not_specialize=["rank", "units", "stride", "offset", "half"],
    do_not_specialize_on_alignment=["grads_ptr"],
)
def write_gradients_kernel(
    grads_ptr,  # [SLOTS, width]: gradients of this rank's live slots
    plan_ptr,  # [n_ranks, SLOTS] int32: expert of each live slot, -1 for none
    returned_ptr,  # [n_ranks] int64: where each rank's gradients are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    rank,  # this rank's number
    units,  # width / UNIT
    stride,  # units of 16 bytes of a row there
    offset,  # units of 16 bytes before the tensor there
    half,  # units of 16 bytes of a half
    SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy the gradients of filled slots to where other ranks read them. Any grid."""
    width = units * UNIT
    base = tl.load(returned_ptr + rank)
    # Once a wait has failed, others may still read what lies there.
    closed = tl.load(state_ptr + GATE, volatile=True) != 0
    blocks = tl.cdiv(width, BLOCK)
    for slot in tl.static_range(SLOTS):
        filled = tl.load(plan_ptr + rank * SLOTS + slot) >= 0
        if filled & (closed == 0):
            address = slot_address(base, state_ptr, half, offset, stride, slot)
            to = address.to(tl.pointer_type(grads_ptr.dtype.element_ty))
            row = grads_ptr + width.to(tl.int64) * slot
            if UNIT > 1:
                to = tl.multiple_of(to, 16)
                row = tl.multiple_of(row, 16)
            for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
                column = block * BLOCK + tl.arange(0, BLOCK)
                inside = column < width
                tl.store(to + column, tl.load(row + column, mask=inside, other=0), mask=inside)


@triton.jit
def list_sums(plan_ptr, homes_ptr, lists_ptr, rank, n, ready, ENTRIES: tl.constexpr):
    """List the entries of a plan whose experts are at home here: see `exchange_returns_kernel`."""
    at = tl.arange(0, ENTRIES)
    expert = tl.load(plan_ptr + at, mask=at < n, other=-1)
    there = expert >= 0
    home = tl.load(homes_ptr + 2 * expert, mask=there, other=-1)
    row = tl.load(homes_ptr + 2 * expert + 1, mask=there, other=0)
    mine = there & (home == rank) & ready
    following = tl.full((ENTRIES,), -1, tl.int32)
    earlier = tl.zeros((ENTRIES,), dtype=tl.int32)
    for back in range(0, n):
        other = n - 1 - back
        same = tl.load(plan_ptr + other) == expert
        following = tl.where(same & (at < other), other, following)
        earlier += (same & (other < at)).to(tl.int32)
    first = mine & (earlier == 0)
    place = tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(lists_ptr + 1 + at, following)
    tl.store(lists_ptr + 1 + ENTRIES + place, at, mask=first)
    tl.store(lists_ptr + 1 + 2 * ENTRIES + place, row, mask=first)
    tl.store(lists_ptr, tl.sum(first.to(tl.int32), 0))


@triton.jit(do_not_specialize=["rank", "n_ranks", "timeout_ms"])
def exchange_returns_kernel(
    addresses_ptr,  # [n_ranks] int64: where each rank's signals are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    timeout_ms,
    plan_ptr,  # [n_ranks, SLOTS] int32: expert of each live slot, -1 for none
    homes_ptr,  # [n_logical, 2] int32: rank and static slot of each expert's original
    lists_ptr,  # [1 + 3 ENTRIES] int32, is written: see below
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,  # at least n_ranks SLOTS, a power of two
    SEND: tl.constexpr,
    WAIT: tl.constexpr,
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
):
    """Say that this rank's gradients are written, wait for those it adds up, list them. Grid (1,).

    The lists are the number of this rank's experts with live copies; for each entry of the plan the
    next entry with the same expert, or -1; for each such expert its first entry; and its row.
    """
    number = tl.load(state_ptr + RETURNS)
    if SEND:
        gate = tl.load(state_ptr + GATE, volatile=True)
        if gate == 0:
            send_signal(addresses_ptr, GRADED, rank, n_ranks, number, ON_GPU)
    if WAIT:
        lane = tl.arange(0, LANES)
        needed = lane < 0
        for slot in tl.static_range(SLOTS):
            there = lane < n_ranks
            expert = tl.load(plan_ptr + lane * SLOTS + slot, mask=there, other=-1)
            home = tl.load(homes_ptr + 2 * expert, mask=expert >= 0, other=-1)
            needed = needed | (home == rank)
        ready = await_or_report(
            addresses_ptr, state_ptr, status_ptr, GRADED, rank, n_ranks, needed, number, number,
            timeout_ms, ON_GPU,
        )  # fmt: skip
        list_sums(plan_ptr, homes_ptr, lists_ptr, rank, n_ranks * SLOTS, ready, ENTRIES)


@triton.jit(
    do_not_specialize=["units", "stride", "offset", "half"],
    do_not_specialize_on_alignment=["own_ptr"],
)
def add_gradients_kernel(
    own_ptr,  # [static_per_rank, width], is added to: gradients of this rank's static slots
    lists_ptr,  # [1 + 3 ENTRIES] int32, see `exchange_returns_kernel`
    returned_ptr,  # [n_ranks] int64: where each rank's gradients are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    units,  # width / UNIT
    stride,  # units of 16 bytes of a row there
    offset,  # units of 16 bytes before the tensor there
    half,  # units of 16 bytes of a half
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    UNIT: tl.constexpr,
    DOUBLE: tl.constexpr,  # whether sums are made in float64, else in float32
    BLOCK: tl.constexpr,
):
    """Add the gradients of live slots to those of the originals, slot by slot. Any grid."""
    width = units * UNIT
    blocks = tl.cdiv(width, BLOCK)
    kind = tl.float64 if DOUBLE else tl.float32
    first_ptr = lists_ptr + 1 + ENTRIES
    for piece in range(tl.program_id(0), tl.load(lists_ptr) * blocks, tl.num_programs(0)):
        number = piece // blocks
        column = (piece - number * blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        row = tl.load(first_ptr + ENTRIES + number).to(tl.int64)
        own = own_ptr + row * width
        if UNIT > 1:
            own = tl.multiple_of(own, 16)
        total = tl.load(own + column, mask=inside, other=0).to(kind)
        entry = tl.load(first_ptr + number)
        while entry >= 0:
            peer = entry // SLOTS
            slot = (entry - peer * SLOTS).to(tl.int64)
            base = tl.load(returned_ptr + peer)
            address = slot_address(base, state_ptr, half, offset, stride, slot)
            there = address.to(tl.pointer_type(own_ptr.dtype.element_ty))
            if UNIT > 1:
                there = tl.multiple_of(there, 16)
            more = tl.load(there + column, mask=inside, other=0, cache_modifier=".cg")
            total += more.to(kind)
            entry = tl.load(lists_ptr + 1 + entry)
        tl.store(own + column, total.to(own_ptr.dtype.element_ty), mask=inside)


def count_entries(n_ranks: int, slots: int) -> int:
    """Return the number of a plan's entries, padded as kernels need it."""
    return int(triton.next_power_of_2(n_ranks * slots))


def list_words(n_ranks: int, slots: int) -> int:
    """Return the number of int32 words of the lists of `exchange_returns`."""
    return 1 + 3 * count_entries(n_ranks, slots)


def begin_return(signals: Signals, plan: torch.Tensor) -> None:
    """Begin a return of gradients; see `begin_return_kernel`."""
    args = (*signals.args(), plan)
    constants = (plan.shape[1], on_gpu())
    launch_call(KernelCall(begin_return_kernel, 1, args, constants, {"num_warps": WARPS}))


def exchange_returns(
    signals: Signals,
    plan: torch.Tensor,
    homes: torch.Tensor,
    lists: torch.Tensor,
    *,
    send: bool = True,
    wait: bool = True,
) -> None:
    """Send that gradients are written, and wait for others'; see `exchange_returns_kernel`."""
    args = (*signals.args(), plan, homes, lists)
    n_ranks, slots = plan.shape
    constants = (slots, count_entries(n_ranks, slots), int(send), int(wait), on_gpu())
    launch_call(KernelCall(exchange_returns_kernel, 1, args, constants, {"num_warps": WARPS}))


def choose_unit(tensor: torch.Tensor, width: int) -> int:
    """Return how many elements to move at a time."""
    aligned = not tensor.data_ptr() % 16 and not width % ALIGNED_UNIT
    return ALIGNED_UNIT if aligned else 1


def write_gradients(
    grads: torch.Tensor,
    signals: Signals,
    plan: torch.Tensor,
    returned: torch.Tensor,
    stride: int,
    offset: int,
    half: int,
    n_sms: int,
) -> None:
    """Copy ``grads`` ``[slots, ...]``, contiguous, to where other ranks read them.

    ``returned`` ``[n_ranks]`` int64 are the addresses of the ranks' gradients; the sizes are units
    of 16 bytes. See `write_gradients_kernel`.
    """
    width = grads.shape[1:].numel()
    unit = choose_unit(grads, width)
    args = (
        grads, plan, returned, signals.state,
        signals.rank, width // unit, stride, offset, half,
    )  # fmt: skip
    constants = (plan.shape[1], unit, GRADIENT_BLOCK)
    options = {"num_warps": GRADIENT_WARPS}
    launch_call(KernelCall(write_gradients_kernel, n_sms, args, constants, options))


def add_gradients(
    own: torch.Tensor,
    lists: torch.Tensor,
    signals: Signals,
    returned: torch.Tensor,
    slots: int,
    stride: int,
    offset: int,
    half: int,
    n_sms: int,
) -> None:
    """Add live slots' gradients to ``own`` ``[static_per_rank, ...]``, contiguous.

    See `add_gradients_kernel`.
    """
    width = own.shape[1:].numel()
    unit = choose_unit(own, width)
    args = (
        own, lists, returned, signals.state, width // unit, stride, offset, half,
    )  # fmt: skip
    entries = count_entries(signals.addresses.numel(), slots)
    constants = (slots, entries, unit, int(own.dtype == torch.float64), GRADIENT_BLOCK)
    options = {"num_warps": GRADIENT_WARPS}
    launch_call(KernelCall(add_gradients_kernel, n_sms, args, constants, options))
