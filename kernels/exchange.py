"""Sum counts over ranks through memory that all of them can write: the kernel, and its launcher.

A rank's buffer has two slots for each channel, and a slot has a row for each sender. A row holds
the version of the placement, the number of counts together with how the channel was opened, and the
counts. Each of these is a word of 64 bits with the epoch in its upper half, so a word shows by
itself whether it has arrived: there is no flag, no fence, and no order among words. docs/sync.md
says why the protocol holds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.count import pad_experts
from lplb_triton.kernels.exchange_rows import (
    ROWS,
    STATUS_FAULT,
    WARPS,
    sum_counts,
    tile_rows,
    to_total,
    write_failure,
    write_status,
)
from lplb_triton.kernels.launch import KernelCall, is_interpreted, launch_call
from lplb_triton.kernels.solve.tiles import add2

# Counts that one pass of an exchange handles.
EXCHANGE_BLOCK = 256
HEADER = tl.constexpr(_layout.HEADER_WORDS)
OPENING_SHIFT = tl.constexpr(_layout.COUNT_BITS)
FAULT_ABSENT = tl.constexpr(_layout.FAULT_ABSENT)
FAULT_MISMATCH = tl.constexpr(_layout.FAULT_MISMATCH)
FAULT_OVERLAP = tl.constexpr(_layout.FAULT_OVERLAP)

# States of a channel's gate, in this rank's own memory.
IDLE = tl.constexpr(0)
BUSY = tl.constexpr(1)
POISONED = tl.constexpr(2)


@triton.jit
def read_clock(lane):
    """Return the time in nanoseconds, the same in all threads: the latest that a lane reads."""
    clock = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,r", [lane], dtype=tl.int64, is_pure=False, pack=1
    )
    return tl.max(clock, 0)


@triton.jit
def _tag_words(number, epoch):
    """Make words of 64 bits: the epoch above, a number of 32 bits below."""
    return (epoch.to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _has_arrived(word, epoch):
    """Tell whether words belong to this epoch."""
    return (word >> 32).to(tl.int32) == epoch


@triton.jit
def send_words(address, word, mask, ON_GPU: tl.constexpr):
    """Store words at addresses (int64) in one piece each, for other GPUs to see."""
    if ON_GPU:
        tl.inline_asm_elementwise(
            """{
            .reg .pred there;
            setp.ne.s32 there, $3, 0;
            @there st.relaxed.sys.global.b64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l,r", [address, word, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(address.to(tl.pointer_type(tl.int64)), word, mask=mask)


@triton.jit
def _publish(
    counts_ptr, addresses_ptr, first_word, row_words, rank, n_ranks, n, epoch, version, call,
    complete, BLOCK: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Write this rank's row of a slot into every rank's buffer, if its counts are complete."""
    word = tl.arange(0, HEADER)
    header = _tag_words(tl.where(word == 0, version, call), epoch)
    for first_peer in range(0, n_ranks, ROWS):
        peer = first_peer + tl.arange(0, ROWS)
        there = ((peer < n_ranks) & complete)[:, None]
        base = tl.load(addresses_ptr + peer, mask=peer < n_ranks, other=0)
        row = (base + 8 * (first_word + rank * row_words).to(tl.int64))[:, None]
        to_all = tl.zeros((ROWS, 1), dtype=tl.int64)
        send_words(row + 8 * word[None, :], header[None, :] + to_all, there & (word >= 0), ON_GPU)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            counts = tl.load(counts_ptr + at, mask=at < n, other=0, volatile=True)
            send_words(
                row + 8 * (HEADER + at[None, :]), _tag_words(counts[None, :], epoch) + to_all,
                there & (at < n)[None, :], ON_GPU,
            )  # fmt: skip


@triton.jit
def _await_rows(
    rows_ptr, row_words, total_ptr, gathered_ptr, present, epoch, version, call, n_ranks, n,
    timeout_ms,
    BLOCK: tl.constexpr, GATHER: tl.constexpr, ON_GPU: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add up all ranks' rows as they arrive, and copy them if GATHER.

    The headers are read with every read of a tile of counts, and the wait ends early when one
    belongs to another call. ``timeout_ms`` is a number of reads where there is no clock. Returns
    how many words of the last read had not arrived, and by lane whether the rank has sent another
    version or another ``call``, its version, and its call.
    """
    header_ptr = rows_ptr + tl.arange(0, LANES) * row_words
    lane = tl.arange(0, LANES)
    begun = tl.full((), 0, tl.int64)
    limit = timeout_ms.to(tl.int64)
    if ON_GPU:
        begun = read_clock(lane)
        limit = limit * 1000000
    waited = tl.full((), 0, tl.int64)
    missing = n_ranks * 0
    n_mismatched = n_ranks * 0
    mismatched = tl.zeros((LANES,), dtype=tl.int32)
    their_version = tl.zeros((LANES,), dtype=tl.int64)
    their_call = tl.zeros((LANES,), dtype=tl.int64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.int64)
        for first_row in range(0, n_ranks, ROWS):
            row, cell_ptr, mask = tile_rows(rows_ptr, row_words, HEADER, first_row, at, n_ranks, n)
            words = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
            # Once words of a tile have not arrived in time, no further tile is waited for.
            waiting = (missing == 0) & (n_mismatched == 0)
            # The loop ends by sums that all threads share, so that all threads leave together.
            while waiting:
                their_version = tl.load(header_ptr, mask=present, other=0, volatile=True)
                their_call = tl.load(header_ptr + 1, mask=present, other=0, volatile=True)
                words = tl.load(cell_ptr, mask=mask, other=0, volatile=True)
                absent = tl.sum((mask & (_has_arrived(words, epoch) == 0)).to(tl.int32), 1)
                arrived = _has_arrived(their_version, epoch) & _has_arrived(their_call, epoch)
                same = (their_version.to(tl.int32) == version) & (their_call.to(tl.int32) == call)
                mismatched = (present & arrived & (same == 0)).to(tl.int32)
                n_absent, n_mismatched = tl.reduce(
                    ((present & (arrived == 0)).to(tl.int32), mismatched), 0, add2
                )
                missing = n_absent + tl.sum(absent, 0)
                waiting = (missing > 0) & (n_mismatched == 0) & (waited <= limit)
                if waiting:
                    if ON_GPU:
                        waited = read_clock(lane) - begun
                    else:
                        waited += 1
            counts = words.to(tl.int32)
            total += sum_counts(counts)
            if GATHER:
                tl.store(gathered_ptr + row[:, None] * n + at[None, :], counts, mask=mask)
        tl.store(total_ptr + at, to_total(total), mask=at < n)
    return missing, mismatched, their_version.to(tl.int32), their_call.to(tl.int32)


@triton.jit
def _find_absent(rows_ptr, row_words, present, epoch, n, LANES: tl.constexpr):
    """Return 1 in the lanes of the ranks of which a word has not arrived, else 0."""
    row_ptr = rows_ptr + tl.arange(0, LANES) * row_words
    absent = tl.zeros((LANES,), dtype=tl.int32)
    for at in range(-HEADER, n):
        word = tl.load(row_ptr + (HEADER + at), mask=present, other=0, volatile=True)
        absent |= (present & (_has_arrived(word, epoch) == 0)).to(tl.int32)
    return absent


@triton.jit
def _report_fault(
    gates_ptr, status_ptr, fault, n_ranks, epoch, channel, blamed, their_version, their_call,
    CHANNELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Poison the gates of all channels, and write the status if no other call has done so.

    Calls of other channels may fail too, because this fault turns away a rank that they wait for.
    The first one to poison gate 0 reports to the host.
    """
    before = tl.atomic_xchg(gates_ptr, POISONED, sem="acq_rel", scope="gpu")
    gates = tl.arange(0, CHANNELS)
    tl.atomic_xchg(
        gates_ptr + gates, tl.full((CHANNELS,), POISONED, tl.int32), sem="release", scope="sys"
    )
    if before != POISONED:
        write_status(
            status_ptr, 0, n_ranks, epoch, channel, blamed, their_version, their_call, LANES
        )
        tl.debug_barrier()
        tl.store(status_ptr + STATUS_FAULT, fault.to(tl.int64))


@triton.jit
def exchange_counts(
    counts_ptr,  # [n] int32: this rank's counts
    total_ptr,  # [n] int32: gets the sums, NO_COUNT if the exchange failed
    gathered_ptr,  # [n_ranks, n] int32: gets every rank's counts with GATHER, else not used
    addresses_ptr,  # [n_ranks] int64: where each rank's buffer is
    gates_ptr,  # [CHANNELS] int32, this rank's own: IDLE, BUSY or POISONED
    epochs_ptr,  # [CHANNELS] int32, this rank's own: the last epoch
    version_ptr,  # [1] int32, of the placement: the same on all ranks
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    capacity,  # counts that a row of the buffers holds
    timeout_ms,
    opening,  # how the channel was opened, in 15 bits: the same on all ranks
    channel,
    n,  # number of counts, in 16 bits: the same on all ranks
    complete,  # int1: whether this rank's counts are there; if not, it takes no part
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,  # counts that are handled at a time
    GATHER: tl.constexpr,
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
    LANES: tl.constexpr,  # number of threads
):
    """Sum counts over the ranks, by one program.

    A buffer is [CHANNELS, 2, n_ranks, HEADER + capacity] int64, at first zero. Other threads may
    read after a barrier what is written here.
    """
    lane = tl.arange(0, LANES)
    present = lane < n_ranks
    row_words = HEADER + capacity
    # One thread reads the gate for all, so that no two threads can see different states of it.
    gate = tl.atomic_cas(gates_ptr + channel, IDLE, BUSY, sem="acquire", scope="gpu")
    epoch = tl.load(epochs_ptr + channel) + 1
    version = tl.load(version_ptr)
    fault = tl.where(gate == BUSY, FAULT_OVERLAP, 0)
    blamed = tl.zeros((LANES,), dtype=tl.int32)
    their_version = tl.zeros((LANES,), dtype=tl.int32)
    their_call = tl.zeros((LANES,), dtype=tl.int32)
    call = n | (opening << OPENING_SHIFT)
    if gate == IDLE:
        slot_word = (channel * 2 + (epoch & 1)) * n_ranks * row_words
        # A rank without its own counts publishes nothing and is absent, for itself too.
        _publish(
            counts_ptr, addresses_ptr, slot_word, row_words, rank, n_ranks, n, epoch, version,
            call, complete, BLOCK, ON_GPU,
        )  # fmt: skip
        rows_ptr = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int64)) + slot_word
        missing, blamed, their_version, their_call = _await_rows(
            rows_ptr, row_words, total_ptr, gathered_ptr, present, epoch, version, call, n_ranks,
            n, timeout_ms, BLOCK, GATHER, ON_GPU, LANES,
        )  # fmt: skip
        # All threads have read: the next epoch, and with it the next slot, may begin.
        tl.debug_barrier()
        if tl.sum(blamed) > 0:
            fault = tl.full((), FAULT_MISMATCH, tl.int32)
        elif missing > 0:
            fault = tl.full((), FAULT_ABSENT, tl.int32)
            blamed = _find_absent(rows_ptr, row_words, present, epoch, n, LANES)
        else:
            tl.store(epochs_ptr + channel, epoch)
            tl.atomic_cas(gates_ptr + channel, BUSY, IDLE, sem="release", scope="gpu")
    if (fault != 0) | (gate == POISONED):
        write_failure(counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n, BLOCK, GATHER)
    if fault != 0:
        _report_fault(
            gates_ptr, status_ptr, fault, n_ranks, epoch, channel, blamed, their_version,
            their_call, CHANNELS, LANES,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "capacity", "timeout_ms", "opening", "channel", "n"],
    do_not_specialize_on_alignment=["counts_ptr", "total_ptr", "gathered_ptr", "version_ptr"],
)
def sum_over_ranks_kernel(
    counts_ptr,  # [n] int32: this rank's counts
    total_ptr,  # [n] int32: gets the sums, NO_COUNT if the exchange failed
    gathered_ptr,  # [n_ranks, n] int32: gets every rank's counts with GATHER, else not used
    addresses_ptr,  # [n_ranks] int64: where each rank's buffer is
    gates_ptr,  # [CHANNELS] int32, this rank's own: IDLE, BUSY or POISONED
    epochs_ptr,  # [CHANNELS] int32, this rank's own: the last epoch
    version_ptr,  # [1] int32, of the placement: the same on all ranks
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    capacity,  # counts that a row of the buffers holds
    timeout_ms,
    opening,  # how the channel was opened, in 15 bits: the same on all ranks
    channel,
    n,  # number of counts, in 16 bits: the same on all ranks
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,  # counts that are handled at a time
    GATHER: tl.constexpr,
    ON_GPU: tl.constexpr,  # whether this runs on a GPU, not in the interpreter
    LANES: tl.constexpr,  # number of threads
):
    """Sum counts over the ranks in a launch of its own. Grid (1,), LANES / 32 warps."""
    exchange_counts(
        counts_ptr, total_ptr, gathered_ptr,
        addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
        rank, n_ranks, capacity, timeout_ms, opening, channel, n, tl.full((), 1, tl.int1),
        CHANNELS, BLOCK, GATHER, ON_GPU, LANES,
    )  # fmt: skip


class Channel(NamedTuple):
    """One of the channels of an exchange, whose calls are in the same order on every rank."""

    number: int
    opening: int = 0
    """How the channel was opened, in 15 bits; the same on every rank."""


FIRST_CHANNEL = Channel(0)


class Exchange(NamedTuple):
    """One rank's side of an exchange of counts [n] with other ranks; docs/sync.md."""

    total: torch.Tensor
    """[n] int32, gets the sums."""
    gathered: torch.Tensor | None
    """[n_ranks, n] int32, where it is given, gets every rank's counts."""
    addresses: torch.Tensor
    """[n_ranks] int64, of the buffers."""
    gates: torch.Tensor
    """[channels] int32."""
    epochs: torch.Tensor
    """[channels] int32."""
    version: torch.Tensor
    """[1] int32."""
    status: torch.Tensor
    """[`status_words`] int64 in memory that the host can read."""
    rank: int
    capacity: int
    """The most counts that the buffers hold."""
    timeout_ms: int

    def args(self, channel: Channel) -> tuple[Any, ...]:
        """Return the run-time arguments of a kernel that does the exchange, the channel's last."""
        gathered = self.total if self.gathered is None else self.gathered
        return (
            self.total, gathered, *self[2:7],
            self.rank, self.addresses.numel(), self.capacity, self.timeout_ms,
            channel.opening, channel.number,
        )  # fmt: skip

    def constants(self) -> tuple[int, ...]:
        """Return the compile-time arguments: CHANNELS, BLOCK, GATHER and ON_GPU."""
        return (
            self.gates.numel(),
            choose_block(self.total.numel()),
            int(self.gathered is not None),
            int(not is_interpreted()),
        )


def choose_block(n: int) -> int:
    """Return how many of ``n`` counts to handle at a time."""
    # A tile of eight rows has a word for each of up to 512 threads.
    return min(EXCHANGE_BLOCK, max(64, pad_experts(n)))


def channel_words(n_ranks: int, capacity: int) -> int:
    """Return the number of 64-bit words of one channel in a rank's buffer."""
    return 2 * n_ranks * (_layout.HEADER_WORDS + capacity)


def sum_over_ranks(counts: torch.Tensor, exchange: Exchange, channel: Channel) -> None:
    """Exchange ``counts`` [n] int32 with all ranks, in a launch of its own."""
    args = (counts, *exchange.args(channel), counts.numel())
    constants = (*exchange.constants(), 32 * WARPS)
    launch_call(KernelCall(sum_over_ranks_kernel, 1, args, constants, {"num_warps": WARPS}))
