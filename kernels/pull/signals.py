"""Signals between ranks: numbers that only grow, in memory that all ranks can write.

Each rank has a row of words for each kind of signal, one word for each sender. A sender stores its
number in every rank's row, with release semantics for all GPUs; a receiver polls its own row with
acquire semantics. The memory that a signal speaks of is written, or read, by launches ahead of the
one that sends, and read, or written, by launches behind the one that waits. So one program sends
and waits, and the ends of launches order the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.exchange import read_clock
from lplb_triton.kernels.exchange_rows import STATUS_FAULT, write_status
from lplb_triton.kernels.launch import KernelCall, is_interpreted, launch_call

# One lane for each rank, and one thread for each lane.
WARPS = 4
LANES = tl.constexpr(_layout.MAX_RANKS)
GATE = tl.constexpr(_layout.LIVE_GATE)
FAULT_ABSENT = tl.constexpr(_layout.FAULT_ABSENT)


@triton.jit
def release_words(address, word, mask, ON_GPU: tl.constexpr):
    """Store words at addresses (int64), after all that this thread knows to have been written."""
    if ON_GPU:
        tl.inline_asm_elementwise(
            """{
            .reg .pred there;
            setp.ne.s32 there, $3, 0;
            @there st.release.sys.global.b64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l,r", [address, word, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(address.to(tl.pointer_type(tl.int64)), word, mask=mask)


@triton.jit
def acquire_words(address, mask, ON_GPU: tl.constexpr):
    """Load words at addresses (int64), before all that this thread reads later; 0 where masked."""
    if ON_GPU:
        word = tl.inline_asm_elementwise(
            """{
            .reg .pred there;
            setp.ne.s32 there, $2, 0;
            mov.u64 $0, 0;
            @there ld.acquire.sys.global.b64 $0, [$1];
            }""",
            "=&l,l,r", [address, mask.to(tl.int32)], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        word = tl.load(address.to(tl.pointer_type(tl.int64)), mask=mask, other=0, volatile=True)
    return word


@triton.jit
def order_all(lane, ON_GPU: tl.constexpr):
    """Order what this thread wrote before what it reads next, for all GPUs."""
    if ON_GPU:
        tl.inline_asm_elementwise(
            "fence.sc.sys; mov.u32 $0, 0;",
            "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def send_signal(addresses_ptr, row, rank, n_ranks, value, ON_GPU: tl.constexpr):
    """Store a number, int64, in this rank's word of a row in every rank's memory."""
    lane = tl.arange(0, LANES)
    there = lane < n_ranks
    base = tl.load(addresses_ptr + lane, mask=there, other=0)
    address = base + (rank + row * LANES).to(tl.int64) * 8
    release_words(address, tl.zeros((LANES,), dtype=tl.int64) + value, there, ON_GPU)


@triton.jit
def signal_addresses(addresses_ptr, row, rank):
    """Return the addresses of the words of a row in this rank's memory, one in each lane."""
    lane = tl.arange(0, LANES)
    return tl.load(addresses_ptr + rank) + (lane + row * LANES).to(tl.int64) * 8


@triton.jit
def await_signals(addresses_ptr, row, rank, needed, least, timeout_ms, ON_GPU: tl.constexpr):
    """Wait until the words of the ranks that are ``needed``, by lane, are at least ``least``.

    Returns 1 in the lanes of ranks that didn't send it in time. ``timeout_ms`` is a number of reads
    where there is no clock.
    """
    lane = tl.arange(0, LANES)
    address = signal_addresses(addresses_ptr, row, rank)
    late = (needed & (acquire_words(address, needed, ON_GPU) < least)).to(tl.int32)
    # The loop ends by sums that all threads share, so that all threads leave together.
    waiting = tl.sum(late, 0) > 0
    begun = tl.full((), 0, tl.int64)
    limit = timeout_ms.to(tl.int64)
    if ON_GPU:
        limit = limit * 1000000
        # Most often all have come, and nobody looks at the clock.
        if waiting:
            begun = read_clock(lane)
    waited = tl.full((), 0, tl.int64)
    while waiting:
        word = acquire_words(address, needed, ON_GPU)
        late = (needed & (word < least)).to(tl.int32)
        waiting = (tl.sum(late, 0) > 0) & (waited <= limit)
        if waiting:
            if ON_GPU:
                waited = read_clock(lane) - begun
            else:
                waited += 1
    return late


@triton.jit
def report_fault(state_ptr, status_ptr, fault, n_ranks, number, phase, blamed, value):
    """Close the gate, and tell the host of the first fault: which ranks, and in what phase.

    ``value`` is what each lane's rank has sent instead, int64.
    """
    before = tl.atomic_xchg(state_ptr + GATE, tl.full((), 1, tl.int64), sem="acq_rel", scope="gpu")
    if before == 0:
        write_status(status_ptr, 0, n_ranks, number, phase, blamed, value, value >> 32, LANES)
        tl.debug_barrier()
        tl.store(status_ptr + STATUS_FAULT, fault.to(tl.int64))


@triton.jit
def await_or_report(
    addresses_ptr, state_ptr, status_ptr, row, rank, n_ranks, needed, least, number, timeout_ms,
    ON_GPU: tl.constexpr,
):  # fmt: skip
    """Wait as `await_signals` does and report ranks that are late; returns whether none is.

    Nothing is waited for once the gate is closed.
    """
    gate = tl.load(state_ptr + GATE, volatile=True)
    # Another program may close it meanwhile; by a sum all threads agree on what they have read.
    is_open = tl.sum((tl.zeros((LANES,), dtype=tl.int64) + gate).to(tl.int32), 0) == 0
    late = await_signals(addresses_ptr, row, rank, needed & is_open, least, timeout_ms, ON_GPU)
    n_late = tl.sum(late, 0)
    if n_late > 0:
        fault = tl.full((), FAULT_ABSENT, tl.int32)
        least_of_all = tl.zeros((LANES,), dtype=tl.int64) + least
        report_fault(state_ptr, status_ptr, fault, n_ranks, number, row, late, least_of_all)
    return (n_late == 0) & is_open


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "timeout_ms", "row", "counter", "advance", "more"]
)
def meet_kernel(
    addresses_ptr,  # [n_ranks] int64: where each rank's signals are
    state_ptr,  # [LIVE_STATE_WORDS] int64, this rank's own
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    timeout_ms,
    row,  # of the signals
    counter,  # word of the state whose number is sent
    advance,  # is added to the counter
    more,  # is added to what is sent, but not to the counter
    SEND: tl.constexpr,
    WAIT: tl.constexpr,
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
):
    """Send a number to every rank with SEND, and await every rank's with WAIT. Grid (1,)."""
    number = tl.load(state_ptr + counter) + advance
    value = number + more
    gate = tl.load(state_ptr + GATE, volatile=True)
    tl.debug_barrier()
    tl.store(state_ptr + counter, number)
    if SEND:
        # A rank whose wait failed sends nothing: the others then find it missing.
        if gate == 0:
            send_signal(addresses_ptr, row, rank, n_ranks, value, ON_GPU)
    if WAIT:
        everyone = tl.arange(0, LANES) < n_ranks
        await_or_report(
            addresses_ptr, state_ptr, status_ptr, row, rank, n_ranks, everyone, value, number,
            timeout_ms, ON_GPU,
        )  # fmt: skip


class Signals(NamedTuple):
    """One rank's side of the signals."""

    addresses: torch.Tensor
    """[n_ranks] int64, of the ranks' signals, each [LIVE_SIGNAL_ROWS, MAX_RANKS] int64."""
    state: torch.Tensor
    """[LIVE_STATE_WORDS] int64."""
    status: torch.Tensor
    """[`status_words`] int64 in memory that the host can read."""
    rank: int
    timeout_ms: int

    def args(self) -> tuple[Any, ...]:
        """Return the arguments that kernels with signals begin with."""
        return (*self[:3], self.rank, self.addresses.numel(), self.timeout_ms)


def on_gpu() -> int:
    """Return the compile-time argument ON_GPU."""
    return int(not is_interpreted())


def meet(
    signals: Signals,
    row: int,
    counter: int,
    *,
    advance: int = 0,
    more: int = 0,
    send: bool = True,
    wait: bool = False,
) -> None:
    """Send a number to every rank, or wait for every rank's; see `meet_kernel`."""
    args = (*signals.args(), row, counter, advance, more)
    constants = (int(send), int(wait), on_gpu())
    launch_call(KernelCall(meet_kernel, 1, args, constants, {"num_warps": WARPS}))
