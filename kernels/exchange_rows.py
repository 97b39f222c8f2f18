"""What the ways to sum counts over ranks share: tiles of rows, totals, and how a failure ends."""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout

# The kernels have as many lanes as threads, at least one for each rank: a value of one lane is in
# one thread, and no two threads can hold different copies of it.
WARPS = 4
# Rows that are written or read at a time. A tile of them has at least as many words as there are
# threads, so every word is in one thread only.
ROWS = tl.constexpr(8)
MAX_COUNT = tl.constexpr(_layout.MAX_COUNT)
NO_COUNT = tl.constexpr(_layout.NO_COUNT)
STATUS_FAULT = tl.constexpr(_layout.STATUS_FAULT)
STATUS_EPOCH = tl.constexpr(_layout.STATUS_EPOCH)
STATUS_CHANNEL = tl.constexpr(_layout.STATUS_CHANNEL)
STATUS_FIRST = tl.constexpr(_layout.STATUS_FIRST)

# What the first word of a status says, by name.
FAULTS = {
    _layout.FAULT_ABSENT: "absent",
    _layout.FAULT_MISMATCH: "mismatch",
    _layout.FAULT_OVERLAP: "overlap",
}


@triton.jit
def sum_counts(counts):
    """Add up rows of counts as int64; a negative one makes the sum too large for int32."""
    return tl.sum(tl.where(counts < 0, MAX_COUNT + 1, counts.to(tl.int64)), 0)


@triton.jit
def to_total(total):
    """Make int32 of a sum that `sum_counts` returned, NO_COUNT if it is too large."""
    return tl.where(total > MAX_COUNT, NO_COUNT, total).to(tl.int32)


@triton.jit
def tile_rows(rows_ptr, row_words, header, first_row, at, n_ranks, n):
    """Return rows from ``first_row`` on, pointers to their counts ``at``, and which of them exist.

    ``header`` is the number of words before the counts of a row.
    """
    row = first_row + tl.arange(0, ROWS)
    mask = (row < n_ranks)[:, None] & (at < n)[None, :]
    return row, rows_ptr + row[:, None] * row_words + header + at[None, :], mask


@triton.jit
def write_failure(
    counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n,
    BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Write what a failed call returns: NO_COUNT as totals, and 0 as the counts of other ranks."""
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(total_ptr + at, tl.full((BLOCK,), NO_COUNT, tl.int32), mask=at < n)
        if GATHER:
            own = tl.load(counts_ptr + at, mask=at < n, other=0, volatile=True)
            for row in range(0, n_ranks):
                tl.store(gathered_ptr + row * n + at, tl.where(row == rank, own, 0), mask=at < n)


@triton.jit
def write_status(
    status_ptr, first, n_ranks, epoch, channel, blamed, their_version, their_call,
    LANES: tl.constexpr,
):  # fmt: skip
    """Write ranks ``first`` to ``first + LANES`` to the status.

    The fault, which tells the host that all of it is there, is written later.
    """
    row = first + tl.arange(0, LANES)
    by_rank_ptr = status_ptr + STATUS_FIRST + row
    mask = row < n_ranks
    tl.store(by_rank_ptr, blamed.to(tl.int64), mask=mask)
    tl.store(by_rank_ptr + n_ranks, their_version.to(tl.int64), mask=mask)
    tl.store(by_rank_ptr + 2 * n_ranks, their_call.to(tl.int64), mask=mask)
    tl.store(status_ptr + STATUS_EPOCH, tl.full((), 0, tl.int64) + epoch)
    tl.store(status_ptr + STATUS_CHANNEL, tl.full((), 0, tl.int64) + channel)


def status_words(n_ranks: int) -> int:
    """Return the number of int64 words of the status of a group of ranks."""
    return _layout.STATUS_FIRST + _layout.STATUS_FIELDS * n_ranks
