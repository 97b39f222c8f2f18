"""Sum counts over ranks through memory that all of them can write: one program does it all.

A rank's buffer holds, per channel, two slots, each with one row by sender: the version of the
placement, the number of counts with the way the channel was opened, and the counts. Each is a word
of 64 bits with the epoch above it, so that a word has come as soon as it says so itself: no flag,
no fence, and no order among them. docs/sync.md says why the protocol holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.solve.tiles import add2

# Words of a row before its counts, of 64 bits (int32 in rows that another library gathers).
HEADER = tl.constexpr(2)
GATHERED_HEADER = tl.constexpr(4)
# There is one lane by rank, and as many lanes as threads (at least MOST_RANKS): a value that
# exists once needs no agreement between copies.
MOST_RANKS = tl.constexpr(128)
WARPS = 4
# Rows that are written or read at a time. A tile of them has at least as many words as there are
# threads, so that every word is in one thread.
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

# A header's second word: the number of counts, and above it how the channel was opened.
OPENING_SHIFT = tl.constexpr(16)

# The largest count, and the largest sum of counts.
MOST_COUNT = tl.constexpr(2**31 - 1)

# int64 words of the status in pinned host memory: fault, epoch and channel, then by rank whether
# it is to blame, its version and the second word of its header.
STATUS_RANKS = tl.constexpr(8)


@triton.jit
def _now(lane):
    """Nanoseconds, the same in every thread: each lane reads a clock, the latest counts."""
    clock = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,r", [lane], dtype=tl.int64, is_pure=False, pack=1
    )
    return tl.max(clock, 0)


@triton.jit
def _tagged(number, epoch):
    """Make words: the epoch above, a number of 32 bits below."""
    return (epoch.to(tl.int64) << 32) | (number.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _has_come(word, epoch):
    return (word >> 32).to(tl.int32) == epoch


@triton.jit
def _send(address, word, mask, ON_GPU: tl.constexpr):
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
    header = _tagged(tl.where(word == 0, version, call), epoch)
    for first_peer in range(0, n_ranks, ROWS):
        peer = first_peer + tl.arange(0, ROWS)
        there = ((peer < n_ranks) & complete)[:, None]
        base = tl.load(addresses_ptr + peer, mask=peer < n_ranks, other=0)
        row = (base + 8 * (first_word + rank * row_words).to(tl.int64))[:, None]
        to_all = tl.zeros((ROWS, 1), dtype=tl.int64)
        _send(row + 8 * word[None, :], header[None, :] + to_all, there & (word >= 0), ON_GPU)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            counts = tl.load(counts_ptr + at, mask=at < n, other=0, volatile=True)
            _send(
                row + 8 * (HEADER + at[None, :]), _tagged(counts[None, :], epoch) + to_all,
                there & (at < n)[None, :], ON_GPU,
            )  # fmt: skip


@triton.jit
def _sum_counts(counts):
    """Add up rows of counts as int64; a count that is none makes the sum too large for int32."""
    return tl.sum(tl.where(counts < 0, MOST_COUNT + 1, counts.to(tl.int64)), 0)


@triton.jit
def _total_of(total):
    """Make int32 of a sum of `_sum_counts`, or what no solver takes for a count."""
    return tl.where(total > MOST_COUNT, NO_COUNT, total).to(tl.int32)


@triton.jit
def _tile(rows_ptr, row_words, header, first_row, at, n_ranks, n):
    """Rows from ``first_row`` on, where their counts ``at`` are after a header, and which exist."""
    row = first_row + tl.arange(0, ROWS)
    mask = (row < n_ranks)[:, None] & (at < n)[None, :]
    return row, rows_ptr + row[:, None] * row_words + header + at[None, :], mask


@triton.jit
def _await_rows(
    rows_ptr, row_words, total_ptr, gathered_ptr, present, epoch, version, call, n_ranks, n,
    timeout_ms,
    BLOCK: tl.constexpr, GATHER: tl.constexpr, ON_GPU: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add up all ranks' rows as they come, and copy them if GATHER.

    Looks at the headers with every look at a tile of counts, and ends early when one belongs to
    another call. ``timeout_ms`` is a number of looks where there is no clock. Returns how many
    words of the last look had not come, and by lane who came with another version or ``call``,
    and with which.
    """
    header_ptr = rows_ptr + tl.arange(0, LANES) * row_words
    lane = tl.arange(0, LANES)
    begun = tl.full((), 0, tl.int64)
    limit = timeout_ms.to(tl.int64)
    if ON_GPU:
        begun = _now(lane)
        limit = limit * 1000000
    waited = tl.full((), 0, tl.int64)
    missing = n_ranks * 0
    n_strangers = n_ranks * 0
    stranger = tl.zeros((LANES,), dtype=tl.int32)
    their_version = tl.zeros((LANES,), dtype=tl.int64)
    their_call = tl.zeros((LANES,), dtype=tl.int64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.int64)
        for first_row in range(0, n_ranks, ROWS):
            row, cell_ptr, mask = _tile(rows_ptr, row_words, HEADER, first_row, at, n_ranks, n)
            words = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
            # What is missing of the tile before, at the end of the time, stays missing.
            look = (missing == 0) & (n_strangers == 0)
            # Only numbers that all threads share decide, and so all of them leave together.
            while look:
                their_version = tl.load(header_ptr, mask=present, other=0, volatile=True)
                their_call = tl.load(header_ptr + 1, mask=present, other=0, volatile=True)
                words = tl.load(cell_ptr, mask=mask, other=0, volatile=True)
                absent = tl.sum((mask & (_has_come(words, epoch) == 0)).to(tl.int32), 1)
                come = _has_come(their_version, epoch) & _has_come(their_call, epoch)
                same = (their_version.to(tl.int32) == version) & (their_call.to(tl.int32) == call)
                stranger = (present & come & (same == 0)).to(tl.int32)
                unheard, n_strangers = tl.reduce(
                    ((present & (come == 0)).to(tl.int32), stranger), 0, add2
                )
                missing = unheard + tl.sum(absent, 0)
                look = (missing > 0) & (n_strangers == 0) & (waited <= limit)
                if look:
                    if ON_GPU:
                        waited = _now(lane) - begun
                    else:
                        waited += 1
            counts = words.to(tl.int32)
            total += _sum_counts(counts)
            if GATHER:
                tl.store(gathered_ptr + row[:, None] * n + at[None, :], counts, mask=mask)
        tl.store(total_ptr + at, _total_of(total), mask=at < n)
    return missing, stranger, their_version.to(tl.int32), their_call.to(tl.int32)


@triton.jit
def _absent(rows_ptr, row_words, present, epoch, n, LANES: tl.constexpr):
    """Lanes of the ranks of which a word has not come."""
    row_ptr = rows_ptr + tl.arange(0, LANES) * row_words
    absent = tl.zeros((LANES,), dtype=tl.int32)
    for at in range(-HEADER, n):
        word = tl.load(row_ptr + (HEADER + at), mask=present, other=0, volatile=True)
        absent |= (present & (_has_come(word, epoch) == 0)).to(tl.int32)
    return absent


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
    status_ptr, first, n_ranks, epoch, channel, blamed, their_version, their_call,
    LANES: tl.constexpr,
):  # fmt: skip
    """Tell the host of ranks ``first`` to ``first + LANES``; the fault itself comes later."""
    row = first + tl.arange(0, LANES)
    by_rank_ptr = status_ptr + STATUS_RANKS + row
    mask = row < n_ranks
    tl.store(by_rank_ptr, blamed.to(tl.int64), mask=mask)
    tl.store(by_rank_ptr + n_ranks, their_version.to(tl.int64), mask=mask)
    tl.store(by_rank_ptr + 2 * n_ranks, their_call.to(tl.int64), mask=mask)
    tl.store(status_ptr + 1, tl.full((), 0, tl.int64) + epoch)
    tl.store(status_ptr + 2, tl.full((), 0, tl.int64) + channel)


@triton.jit
def _sum_over_ranks(
    counts_ptr, total_ptr, gathered_ptr,
    addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
    rank, n_ranks, capacity, timeout_ms, opening, channel, n, complete,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, ON_GPU: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Sum ``counts`` [n] over the ranks into ``total`` [n]; both int32.

    With GATHER, ``gathered`` [n_ranks, n] int32 gets every rank's counts (else it isn't read).
    addresses [n_ranks] int64, where each rank's buffer is; gates and epochs [CHANNELS] and
    version [1] int32, this rank's own; status [STATUS_RANKS + 3 n_ranks] int64 in pinned host
    memory. A buffer is [CHANNELS, 2, n_ranks, HEADER + capacity] int64, at first zero.
    ``version``, ``n`` and ``opening`` must be the same on all ranks; ``opening`` tells how the
    channel came to be, in 15 bits, and ``n`` has 16. One program calls this, with LANES threads,
    once its counts are there; if not all of them came, not ``complete``, it takes no part.

    What it writes other threads may read after a barrier.
    """
    lane = tl.arange(0, LANES)
    present = lane < n_ranks
    row_words = HEADER + capacity
    # One thread asks for all, so that no thread can see another gate than its neighbour.
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
        # Without its own counts a rank is absent, for itself too.
        _publish(
            counts_ptr, addresses_ptr, slot_word, row_words, rank, n_ranks, n, epoch, version,
            call, complete, BLOCK, ON_GPU,
        )  # fmt: skip
        rows_ptr = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int64)) + slot_word
        missing, blamed, their_version, their_call = _await_rows(
            rows_ptr, row_words, total_ptr, gathered_ptr, present, epoch, version, call, n_ranks,
            n, timeout_ms, BLOCK, GATHER, ON_GPU, LANES,
        )  # fmt: skip
        # Everybody has read: the next epoch, and with it the next slot, may begin.
        tl.debug_barrier()
        if tl.sum(blamed) > 0:
            fault = tl.full((), FAULT_MISMATCH, tl.int32)
        elif missing > 0:
            fault = tl.full((), FAULT_ABSENT, tl.int32)
            blamed = _absent(rows_ptr, row_words, present, epoch, n, LANES)
        else:
            tl.store(epochs_ptr + channel, epoch)
            tl.atomic_cas(gates_ptr + channel, BUSY, IDLE, sem="release", scope="gpu")
    if (fault != 0) | (gate == POISONED):
        _give_up(counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n, BLOCK, GATHER)
    if fault != 0:
        # Calls of other channels may fail too, for want of a rank that was sent away by this fault.
        # The first to poison gate 0 tells the host.
        before = tl.atomic_xchg(gates_ptr, POISONED, sem="acq_rel", scope="gpu")
        gates = tl.arange(0, CHANNELS)
        tl.atomic_xchg(
            gates_ptr + gates, tl.full((CHANNELS,), POISONED, tl.int32), sem="release", scope="sys"
        )
        if before != POISONED:
            _report(
                status_ptr, 0, n_ranks, epoch, channel, blamed, their_version, their_call, LANES
            )
            tl.debug_barrier()
            tl.store(status_ptr, fault.to(tl.int64))


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "capacity", "timeout_ms", "opening", "channel", "n"],
    do_not_specialize_on_alignment=["counts_ptr", "total_ptr", "gathered_ptr", "version_ptr"],
)
def _sum_over_ranks_kernel(
    counts_ptr, total_ptr, gathered_ptr,
    addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
    rank, n_ranks, capacity, timeout_ms, opening, channel, n,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, ON_GPU: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Sum counts over the ranks: `_sum_over_ranks` in a launch of its own.

    Grid (1,), LANES / 32 warps.
    """
    _sum_over_ranks(
        counts_ptr, total_ptr, gathered_ptr,
        addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
        rank, n_ranks, capacity, timeout_ms, opening, channel, n, tl.full((), 1, tl.int1),
        CHANNELS, BLOCK, GATHER, ON_GPU, LANES,
    )  # fmt: skip


@triton.jit
def _strangers(rows_ptr, row_words, present, version, n, LANES: tl.constexpr):
    """Lanes of the ranks whose gathered row belongs to another call, its version and length."""
    header_ptr = rows_ptr + tl.arange(0, LANES) * row_words
    their_version = tl.load(header_ptr + 1, mask=present, other=0)
    their_n = tl.load(header_ptr + 2, mask=present, other=0)
    same = (their_version == version) & (their_n == n)
    return (present & (same == 0)).to(tl.int32), their_version, their_n


@triton.jit
def _sum_gathered_rows(
    rows_ptr, row_words, total_ptr, gathered_ptr, n_ranks, n,
    BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Add up all ranks' rows, and copy them if GATHER."""
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.int64)
        for first_row in range(0, n_ranks, ROWS):
            row, cell_ptr, mask = _tile(
                rows_ptr, row_words, GATHERED_HEADER, first_row, at, n_ranks, n
            )
            values = tl.load(cell_ptr, mask=mask, other=0)
            total += _sum_counts(values)
            if GATHER:
                tl.store(gathered_ptr + row[:, None] * n + at[None, :], values, mask=mask)
        tl.store(total_ptr + at, _total_of(total), mask=at < n)


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
    """Check and sum rows [n_ranks, GATHERED_HEADER + n] int32 that another library has gathered.

    A header is 0, version, number of counts, 0; the rest as for `_sum_over_ranks`. Grid (1,),
    LANES / 32 warps.
    """
    row_words = GATHERED_HEADER + n
    version = tl.load(version_ptr)
    wrong = tl.zeros((LANES,), dtype=tl.int32)
    for first in range(0, n_ranks, LANES):
        present = first + tl.arange(0, LANES) < n_ranks
        bad, their_version, their_n = _strangers(
            rows_ptr + first * row_words, row_words, present, version, n, LANES
        )
        wrong += bad
        if tl.sum(bad) > 0:
            _report(status_ptr, first, n_ranks, 0, 0, bad, their_version, their_n, LANES)
    if tl.sum(wrong) == 0:
        _sum_gathered_rows(rows_ptr, row_words, total_ptr, gathered_ptr, n_ranks, n, BLOCK, GATHER)
    else:
        _give_up(counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n, BLOCK, GATHER)
        tl.debug_barrier()
        tl.store(status_ptr, tl.full((), FAULT_MISMATCH, tl.int64))
