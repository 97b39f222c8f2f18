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
ENDED = tl.constexpr(_layout.LIVE_ENDED)
# Bytes that a program copies and adds at a time, and its warps. Adding keeps two such blocks, and
# as many of the next two pieces, in registers.
WRITE_BYTES = 32768
ADD_BYTES = 16384
GRADIENT_WARPS = 16
# Elements of a unit where rows are aligned: at least 16 bytes of any trained dtype.
ALIGNED_UNIT = 8


@triton.jit
def slot_address(base, number, half, offset, stride, slot):
    """Return where a slot's gradient of a tensor is, int64, in the half of a return's number.

    ``half``, ``offset`` and ``stride`` are units of 16 bytes: of a half, before the tensor, of a
    row.
    """
    units = (number % 2) * half + offset + stride.to(tl.int64) * slot
    return base + units * 16


@triton.jit
def load_block(from_ptr, block, width, BLOCK: tl.constexpr):
    """Read a block of a row; nothing is read behind the row's end."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(from_ptr + column, mask=column < width, other=0)


@triton.jit
def copy_row(from_ptr, to_ptr, width, BLOCK: tl.constexpr):
    """Copy this program's part of a row, reading two blocks ahead."""
    step = tl.num_programs(0)
    block = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK)
    if block < blocks:
        values = load_block(from_ptr, block, width, BLOCK)
        next_values = load_block(from_ptr, block + step, width, BLOCK)
        while block < blocks:
            later_values = load_block(from_ptr, block + 2 * step, width, BLOCK)
            column = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(to_ptr + column, values, mask=column < width)
            values = next_values
            next_values = later_values
            block += step


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "timeout_ms", "units", "stride", "offset", "half"],
    do_not_specialize_on_alignment=["plan_ptr", "grads_ptr"],
)
def write_gradients_kernel(
    addresses_ptr,  # [n_ranks] int64: where each rank's signals are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    timeout_ms,
    plan_ptr,  # [n_ranks, SLOTS] int32: expert of each live slot, -1 for none
    grads_ptr,  # [SLOTS, width]: gradients of this rank's live slots
    returned_ptr,  # [n_ranks] int64: where each rank's gradients are
    units,  # width / UNIT
    stride,  # units of 16 bytes of a row there
    offset,  # units of 16 bytes before the tensor there
    half,  # units of 16 bytes of a half
    SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
):
    """Copy the gradients of filled slots to where other ranks read them. Any grid.

    Each program waits until what this rank wrote two returns ago has been added up.
    """
    width = units * UNIT
    base = tl.load(returned_ptr + rank)
    number = tl.load(state_ptr + RETURNS) + 1
    count = rank * 0
    for slot in tl.static_range(SLOTS):
        count += (tl.load(plan_ptr + rank * SLOTS + slot) >= 0).to(tl.int32)
    if count > 0:
        needed = tl.arange(0, LANES) < n_ranks
        # Once a wait has failed, others may still read what lies there.
        ready = await_or_report(
            addresses_ptr, state_ptr, status_ptr, TAKEN, rank, n_ranks, needed, number - 2, number,
            timeout_ms, ON_GPU,
        )  # fmt: skip
        # What one thread has acquired holds for all threads behind this barrier.
        tl.debug_barrier()
        for slot in tl.static_range(SLOTS):
            filled = tl.load(plan_ptr + rank * SLOTS + slot) >= 0
            if filled & ready:
                address = slot_address(base, number, half, offset, stride, slot)
                to_ptr = address.to(tl.pointer_type(grads_ptr.dtype.element_ty))
                row_ptr = grads_ptr + width.to(tl.int64) * slot
                if UNIT > 1:
                    to_ptr = tl.multiple_of(to_ptr, 16)
                    row_ptr = tl.multiple_of(row_ptr, 16)
                copy_row(row_ptr, to_ptr, width, BLOCK)


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

    SEND begins the next return, which kernels ahead of this one number one more than the state. The
    lists are the number of this rank's experts with live copies; for each entry of the plan the
    next entry with the same expert, or -1; for each such expert its first entry; and its row.
    """
    number = tl.load(state_ptr + RETURNS)
    if SEND:
        number += 1
        tl.debug_barrier()
        tl.store(state_ptr + RETURNS, number)
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


@triton.jit
def load_piece(
    piece, n_pieces, blocks, width, own_ptr, lists_ptr, returned_ptr, number, stride, offset, half,
    SLOTS: tl.constexpr, ENTRIES: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a block of an original's gradient, and of that of its first live slot.

    Returns both, where the first begins, the block and the live slot's entry of the plan; nothing
    is read of a piece from ``n_pieces`` on.
    """
    there = piece < n_pieces
    expert = piece // blocks
    block = piece - expert * blocks
    first_ptr = lists_ptr + 1 + ENTRIES
    entry = tl.load(first_ptr + expert, mask=there, other=0)
    row = tl.load(first_ptr + ENTRIES + expert, mask=there, other=0).to(tl.int64)
    own = own_ptr + row * width
    if UNIT > 1:
        own = tl.multiple_of(own, 16)
    end = tl.where(there, width, 0)
    mine = load_block(own, block, end, BLOCK)
    more = load_returned(
        entry, block, end, own_ptr, returned_ptr, number, stride, offset, half, SLOTS, UNIT, BLOCK
    )
    return mine, more, own, block, entry


@triton.jit
def load_returned(
    entry, block, width, own_ptr, returned_ptr, number, stride, offset, half,
    SLOTS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a block of the gradient of a live slot, an entry of the plan, from its rank's memory."""
    peer = entry // SLOTS
    slot = (entry - peer * SLOTS).to(tl.int64)
    address = slot_address(tl.load(returned_ptr + peer), number, half, offset, stride, slot)
    from_ptr = address.to(tl.pointer_type(own_ptr.dtype.element_ty))
    if UNIT > 1:
        from_ptr = tl.multiple_of(from_ptr, 16)
    column = block * BLOCK + tl.arange(0, BLOCK)
    # Another rank writes here again later, so it stays out of L1.
    return tl.load(from_ptr + column, mask=column < width, other=0, cache_modifier=".cg")


@triton.jit
def add_pieces(
    own_ptr, lists_ptr, returned_ptr, number, width, stride, offset, half,
    SLOTS: tl.constexpr, ENTRIES: tl.constexpr, UNIT: tl.constexpr, DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up this program's pieces, reading two pieces ahead.

    Pieces are blocks of all originals that have live copies. Ahead is read only the first live
    slot of each, as most experts have no other.
    """
    blocks = tl.cdiv(width, BLOCK)
    kind = tl.float64 if DOUBLE else tl.float32
    n_pieces = tl.load(lists_ptr) * blocks
    step = tl.num_programs(0)
    piece = tl.program_id(0)
    if piece < n_pieces:
        mine, more, own, block, entry = load_piece(
            piece, n_pieces, blocks, width, own_ptr, lists_ptr, returned_ptr, number, stride,
            offset, half, SLOTS, ENTRIES, UNIT, BLOCK,
        )  # fmt: skip
        next_mine, next_more, next_own, next_block, next_entry = load_piece(
            piece + step, n_pieces, blocks, width, own_ptr, lists_ptr, returned_ptr, number,
            stride, offset, half, SLOTS, ENTRIES, UNIT, BLOCK,
        )  # fmt: skip
        while piece < n_pieces:
            later_mine, later_more, later_own, later_block, later_entry = load_piece(
                piece + 2 * step, n_pieces, blocks, width, own_ptr, lists_ptr, returned_ptr,
                number, stride, offset, half, SLOTS, ENTRIES, UNIT, BLOCK,
            )  # fmt: skip
            total = mine.to(kind) + more.to(kind)
            entry = tl.load(lists_ptr + 1 + entry)
            while entry >= 0:
                more = load_returned(
                    entry, block, width, own_ptr, returned_ptr, number, stride, offset, half,
                    SLOTS, UNIT, BLOCK,
                )  # fmt: skip
                total += more.to(kind)
                entry = tl.load(lists_ptr + 1 + entry)
            column = block * BLOCK + tl.arange(0, BLOCK)
            if UNIT > 1:
                own = tl.multiple_of(own, 16)
            tl.store(own + column, total.to(own_ptr.dtype.element_ty), mask=column < width)
            mine, more, own, block, entry = next_mine, next_more, next_own, next_block, next_entry
            next_mine, next_more, next_own = later_mine, later_more, later_own
            next_block, next_entry = later_block, later_entry
            piece += step


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "timeout_ms", "units", "stride", "offset", "half"],
    do_not_specialize_on_alignment=["own_ptr"],
)
def add_gradients_kernel(
    addresses_ptr,  # [n_ranks] int64: where each rank's signals are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    timeout_ms,
    own_ptr,  # [static_per_rank, width], is added to: gradients of this rank's static slots
    lists_ptr,  # [1 + 3 ENTRIES] int32, see `exchange_returns_kernel`
    returned_ptr,  # [n_ranks] int64: where each rank's gradients are
    units,  # width / UNIT
    stride,  # units of 16 bytes of a row there
    offset,  # units of 16 bytes before the tensor there
    half,  # units of 16 bytes of a half
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    UNIT: tl.constexpr,
    DOUBLE: tl.constexpr,  # whether sums are made in float64, else in float32
    LAST: tl.constexpr,  # whether this is the last tensor, behind which TAKEN is sent
    BLOCK: tl.constexpr,
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
):
    """Add the gradients of live slots to those of the originals, slot by slot. Any grid."""
    number = tl.load(state_ptr + RETURNS)
    add_pieces(
        own_ptr, lists_ptr, returned_ptr, number, units * UNIT, stride, offset, half, SLOTS,
        ENTRIES, UNIT, DOUBLE, BLOCK,
    )  # fmt: skip
    if LAST:
        one = tl.full((), 1, tl.int64)
        # All threads of a program have read what they add up before its end is counted.
        tl.debug_barrier()
        ended = tl.atomic_add(state_ptr + ENDED, one, sem="acq_rel", scope="gpu")
        if ended == tl.num_programs(0) - 1:
            tl.store(state_ptr + ENDED, one * 0)
            gate = tl.load(state_ptr + GATE, volatile=True)
            if gate == 0:
                send_signal(addresses_ptr, TAKEN, rank, n_ranks, number, ON_GPU)


def count_entries(n_ranks: int, slots: int) -> int:
    """Return the number of a plan's entries, padded as kernels need it."""
    return int(triton.next_power_of_2(n_ranks * slots))


def list_words(n_ranks: int, slots: int) -> int:
    """Return the number of int32 words of the lists of `exchange_returns`."""
    return 1 + 3 * count_entries(n_ranks, slots)


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
    args = (*signals.args(), plan, grads, returned, width // unit, stride, offset, half)
    constants = (plan.shape[1], unit, WRITE_BYTES // grads.element_size(), on_gpu())
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
    *,
    last: bool,
) -> None:
    """Add live slots' gradients to ``own`` ``[static_per_rank, ...]``, contiguous.

    Behind the ``last`` tensor of a return other ranks hear of it. See `add_gradients_kernel`.
    """
    width = own.shape[1:].numel()
    unit = choose_unit(own, width)
    args = (*signals.args(), own, lists, returned, width // unit, stride, offset, half)
    constants = (
        slots, count_entries(signals.addresses.numel(), slots), unit,
        int(own.dtype == torch.float64), int(last), ADD_BYTES // own.element_size(), on_gpu(),
    )  # fmt: skip
    options = {"num_warps": GRADIENT_WARPS}
    launch_call(KernelCall(add_gradients_kernel, n_sms, args, constants, options))
