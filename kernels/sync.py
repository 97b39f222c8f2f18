"""Sum counts over ranks through memory that all of them can write: one program does it all.

A rank's buffer holds, per channel, a line of flags (one by sender) and two slots, each with one
row by sender: a header (epoch, version, number of counts) and the counts. docs/sync.md says why
the protocol holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Words (int32) of a row's header and of a channel's line of flags.
HEADER = tl.constexpr(4)
FLAGS = tl.constexpr(128)
# There is one lane by rank, and as many lanes as threads (at least FLAGS): a value that exists
# once needs no agreement between copies.
WARPS = 4
# Rows that are written or read at a time.
ROWS = tl.constexpr(8)

# A channel's gate, in this rank's own memory.
IDLE = tl.constexpr(0)
BUSY = tl.constexpr(1)
POISONED = tl.constexpr(2)

FAULT_ABSENT = tl.constexpr(1)
FAULT_MISMATCH = tl.constexpr(2)
FAULT_OVERLAP = tl.constexpr(3)
# Counts of a call that failed: no solver takes them for tokens.
NO_COUNT = tl.constexpr(-2)

# int64 words of the status in pinned host memory: fault, epoch and channel, then by rank whether
# it is to blame, its version and its number of counts.
STATUS_RANKS = tl.constexpr(8)


@triton.jit
def _now(lane):
    """Nanoseconds, the same in every thread: each lane reads a clock, the latest counts."""
    clock = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,r", [lane], dtype=tl.int64, is_pure=False, pack=1
    )
    return tl.max(clock, 0)


@triton.jit
def _publish(
    counts_ptr, addresses_ptr, first_word, row_words, rank, n_ranks, n, epoch, version,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write this rank's row of a slot into every rank's buffer."""
    word = tl.arange(0, HEADER)
    header = tl.where(word == 0, epoch, tl.where(word == 1, version, tl.where(word == 2, n, 0)))
    for first_peer in range(0, n_ranks, ROWS):
        peer = first_peer + tl.arange(0, ROWS)
        there = (peer < n_ranks)[:, None]
        base = tl.load(addresses_ptr + peer, mask=peer < n_ranks, other=0)
        base = tl.multiple_of(base + 4 * (first_word + rank * row_words).to(tl.int64), 16)
        row = base.to(tl.pointer_type(tl.int32))[:, None]
        to_all = tl.zeros((ROWS, 1), dtype=tl.int32)
        tl.store(row + word[None, :], header[None, :] + to_all, mask=there)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            values = tl.load(counts_ptr + at, mask=at < n, other=0, volatile=True)
            mask = there & (at < n)[None, :]
            tl.store(row + HEADER + at[None, :], values[None, :] + to_all, mask=mask)


@triton.jit
def _absent(flag, present, epoch):
    """Lanes of the ranks whose flag doesn't say this epoch, or the next."""
    ahead = flag - epoch
    return (present & (ahead != 0) & (ahead != 1)).to(tl.int32)


@triton.jit
def _await_flags(
    flags_ptr, present, epoch, n_ranks, timeout_ms, CLOCK: tl.constexpr, LANES: tl.constexpr
):
    """Wait until every rank's flag says this epoch, or the next: nobody gets further ahead.

    Returns whether somebody hadn't come when the time was over. Without CLOCK, ``timeout_ms`` is
    a number of looks.
    """
    lane = tl.arange(0, LANES)
    begun = tl.full((), 0, tl.int64)
    limit = timeout_ms.to(tl.int64)
    if CLOCK:
        begun = _now(lane)
        limit = limit * 1000000
    waited = tl.full((), 0, tl.int64)
    n_absent = n_ranks
    # Only numbers that all threads share are carried, and so all of them leave together.
    while (n_absent > 0) & (waited <= limit):
        flag = tl.atomic_add(
            flags_ptr + lane, tl.zeros((LANES,), tl.int32), mask=present, sem="acquire", scope="sys"
        )
        n_absent = tl.sum(_absent(flag, present, epoch), 0)
        if CLOCK:
            waited = _now(lane) - begun
        else:
            waited += 1
    return n_absent > 0


@triton.jit
def _strangers(rows_ptr, row_words, present, epoch, version, n, LANES: tl.constexpr):
    """Lanes of the ranks whose message belongs to another call, its version and its length."""
    header_ptr = rows_ptr + tl.arange(0, LANES) * row_words
    their_epoch = tl.load(header_ptr, mask=present, other=0, volatile=True)
    their_version = tl.load(header_ptr + 1, mask=present, other=0, volatile=True)
    their_n = tl.load(header_ptr + 2, mask=present, other=0, volatile=True)
    same = (their_epoch == epoch) & (their_version == version) & (their_n == n)
    return (present & (same == 0)).to(tl.int32), their_version, their_n


@triton.jit
def _sum_rows_of_ranks(
    rows_ptr, row_words, total_ptr, gathered_ptr, n_ranks, n,
    BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Add up all ranks' rows, and copy them if GATHER."""
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.int32)
        for first_row in range(0, n_ranks, ROWS):
            row = first_row + tl.arange(0, ROWS)
            mask = (row < n_ranks)[:, None] & (at < n)[None, :]
            cell_ptr = rows_ptr + row[:, None] * row_words + HEADER + at[None, :]
            # Not from a line of a cache that was read for an earlier epoch.
            values = tl.load(cell_ptr, mask=mask, other=0, volatile=True)
            total += tl.sum(values, 0)
            if GATHER:
                tl.store(gathered_ptr + row[:, None] * n + at[None, :], values, mask=mask)
        tl.store(total_ptr + at, total, mask=at < n)


@triton.jit
def _give_up(
    counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n,
    BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Write what a failed call returns: no total, and nobody's counts but this rank's."""
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(total_ptr + at, tl.full((BLOCK,), NO_COUNT, tl.int32), mask=at < n)
        if GATHER:
            own = tl.load(counts_ptr + at, mask=at < n, other=0, volatile=True)
            for row in range(0, n_ranks):
                tl.store(gathered_ptr + row * n + at, tl.where(row == rank, own, 0), mask=at < n)


@triton.jit
def _report(
    status_ptr, first, n_ranks, epoch, channel, blamed, their_version, their_n,
    LANES: tl.constexpr,
):  # fmt: skip
    """Tell the host of ranks ``first`` to ``first + LANES``; the fault itself comes later."""
    row = first + tl.arange(0, LANES)
    by_rank_ptr = status_ptr + STATUS_RANKS + row
    mask = row < n_ranks
    tl.store(by_rank_ptr, blamed.to(tl.int64), mask=mask)
    tl.store(by_rank_ptr + n_ranks, their_version.to(tl.int64), mask=mask)
    tl.store(by_rank_ptr + 2 * n_ranks, their_n.to(tl.int64), mask=mask)
    tl.store(status_ptr + 1, tl.full((), 0, tl.int64) + epoch)
    tl.store(status_ptr + 2, tl.full((), 0, tl.int64) + channel)


@triton.jit
def _sum_over_ranks(
    counts_ptr, total_ptr, gathered_ptr,
    addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
    rank, n_ranks, capacity, timeout_ms, channel, n, complete,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, CLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Sum ``counts`` [n] over the ranks into ``total`` [n]; both int32.

    With GATHER, ``gathered`` [n_ranks, n] int32 gets every rank's counts (else it isn't read).
    addresses [n_ranks] int64, where each rank's buffer is; gates and epochs [CHANNELS] and
    version [1] int32, this rank's own; status [STATUS_RANKS + 3 n_ranks] int64 in pinned host
    memory. A buffer is [CHANNELS, FLAGS + 2 * n_ranks * (HEADER + capacity)] int32, at first zero.
    ``version`` must be the same on all ranks. One program calls this, with LANES threads, once
    its counts are there; if not all of them came, not ``complete``, it takes no part.

    What it writes other threads may read after a barrier.
    """
    lane = tl.arange(0, LANES)
    present = lane < n_ranks
    row_words = HEADER + capacity
    channel_words = FLAGS + 2 * n_ranks * row_words
    # One thread asks for all, so that no thread can see another gate than its neighbour.
    gate = tl.atomic_cas(gates_ptr + channel, IDLE, BUSY, sem="acquire", scope="gpu")
    epoch = tl.load(epochs_ptr + channel) + 1
    version = tl.load(version_ptr)
    fault = tl.where(gate == BUSY, FAULT_OVERLAP, 0)
    blamed = tl.zeros((LANES,), dtype=tl.int32)
    their_version = tl.zeros((LANES,), dtype=tl.int32)
    their_n = tl.zeros((LANES,), dtype=tl.int32)
    if gate == IDLE:
        slot_word = channel * channel_words + FLAGS + (epoch & 1) * n_ranks * row_words
        _publish(
            counts_ptr, addresses_ptr, slot_word, row_words, rank, n_ranks, n, epoch, version,
            BLOCK,
        )  # fmt: skip
        # The release below covers other threads' stores only because all of them are here first.
        tl.debug_barrier()
        base = tl.load(addresses_ptr + lane, mask=present, other=0)
        flag_ptr = (base + 4 * (channel * channel_words + rank).to(tl.int64)).to(
            tl.pointer_type(tl.int32)
        )
        # Without its own counts a rank is absent, for itself too.
        tl.atomic_xchg(
            flag_ptr, tl.zeros((LANES,), tl.int32) + epoch, mask=present & complete,
            sem="release", scope="sys",
        )  # fmt: skip
        mine_ptr = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int32))
        flags_ptr = mine_ptr + channel * channel_words
        late = _await_flags(flags_ptr, present, epoch, n_ranks, timeout_ms, CLOCK, LANES)
        tl.debug_barrier()
        if late:
            fault = tl.full((), FAULT_ABSENT, tl.int32)
            flag = tl.load(flags_ptr + lane, mask=present, other=0, volatile=True)
            blamed = _absent(flag, present, epoch)
        else:
            rows_ptr = mine_ptr + slot_word
            blamed, their_version, their_n = _strangers(
                rows_ptr, row_words, present, epoch, version, n, LANES
            )
            fault = tl.where(tl.sum(blamed) > 0, FAULT_MISMATCH, 0)
            if fault == 0:
                _sum_rows_of_ranks(
                    rows_ptr, row_words, total_ptr, gathered_ptr, n_ranks, n, BLOCK, GATHER
                )
                # Everybody has read: the next epoch, and with it the next slot, may begin.
                tl.debug_barrier()
                tl.store(epochs_ptr + channel, epoch)
                tl.atomic_cas(gates_ptr + channel, BUSY, IDLE, sem="release", scope="gpu")
    if (fault != 0) | (gate == POISONED):
        _give_up(counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n, BLOCK, GATHER)
    if fault != 0:
        _report(status_ptr, 0, n_ranks, epoch, channel, blamed, their_version, their_n, LANES)
        tl.debug_barrier()
        gates = tl.arange(0, CHANNELS)
        tl.atomic_xchg(
            gates_ptr + gates, tl.full((CHANNELS,), POISONED, tl.int32), sem="release", scope="sys"
        )
        tl.debug_barrier()
        tl.store(status_ptr, fault.to(tl.int64))


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "capacity", "timeout_ms", "channel", "n"],
    do_not_specialize_on_alignment=["counts_ptr", "total_ptr", "gathered_ptr", "version_ptr"],
)
def _sum_over_ranks_kernel(
    counts_ptr, total_ptr, gathered_ptr,
    addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
    rank, n_ranks, capacity, timeout_ms, channel, n,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, CLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Sum counts over the ranks: `_sum_over_ranks` in a launch of its own.

    Grid (1,), LANES / 32 warps.
    """
    _sum_over_ranks(
        counts_ptr, total_ptr, gathered_ptr,
        addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
        rank, n_ranks, capacity, timeout_ms, channel, n, tl.full((), 1, tl.int1),
        CHANNELS, BLOCK, GATHER, CLOCK, LANES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "n"],
    do_not_specialize_on_alignment=[
        "counts_ptr", "total_ptr", "gathered_ptr", "version_ptr", "rows_ptr",
    ],
)  # fmt: skip
def _sum_gathered_kernel(
    counts_ptr, total_ptr, gathered_ptr, rows_ptr, version_ptr, status_ptr, rank, n_ranks, n,
    BLOCK: tl.constexpr, GATHER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Check and sum rows [n_ranks, HEADER + n] int32 that another library has gathered.

    Headers and the rest as for `_sum_over_ranks`; epochs are 0. Grid (1,), LANES / 32 warps.
    """
    row_words = HEADER + n
    version = tl.load(version_ptr)
    wrong = tl.zeros((LANES,), dtype=tl.int32)
    for first in range(0, n_ranks, LANES):
        present = first + tl.arange(0, LANES) < n_ranks
        bad, their_version, their_n = _strangers(
            rows_ptr + first * row_words, row_words, present, 0, version, n, LANES
        )
        wrong += bad
        if tl.sum(bad) > 0:
            _report(status_ptr, first, n_ranks, 0, 0, bad, their_version, their_n, LANES)
    if tl.sum(wrong) == 0:
        _sum_rows_of_ranks(rows_ptr, row_words, total_ptr, gathered_ptr, n_ranks, n, BLOCK, GATHER)
    else:
        _give_up(counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n, BLOCK, GATHER)
        tl.debug_barrier()
        tl.store(status_ptr, tl.full((), FAULT_MISMATCH, tl.int64))
