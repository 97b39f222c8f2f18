"""Per-token kernels: count logical ids, and rewrite them into physical ids.

The flattened batch is cut into one contiguous chunk per program. A token's *position* is the
number of earlier tokens of the same expert in the batch; it depends neither on the number of
programs nor on timing, so every result here is deterministic. Equation numbers refer to
docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHARE_BITS = tl.constexpr(24)
SHARE_MASK = tl.constexpr((1 << 24) - 1)
SHARE_HALF = tl.constexpr(1 << 23)
# Equation 13: odd multipliers near 2**24 over the golden and the plastic number.
OFFSET_BY_RANK = tl.constexpr(10368889)
OFFSET_BY_EXPERT = tl.constexpr(12664745)

# What kernels report to the host is two int64 words in memory that it can read. The first one holds
# two int32: whether an id was bad, and which other input was; the second one holds the bad id.
REPORT_ID = tl.constexpr(0)
REPORT_INPUT = tl.constexpr(1)
BAD_COUNTS = tl.constexpr(1)
BAD_RUNNING = tl.constexpr(2)
BAD_CUMULATIVE = tl.constexpr(3)

# Looks at counts that another program has to write, before giving up: seconds.
MOST_POLLS = tl.constexpr(1 << 22)


@triton.jit
def _start_dependents(PDL: tl.constexpr):
    """Let the next kernel of the pipeline start; what it needs from this one it waits for."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _await_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended and what it wrote is there.

    Every program has to: a kernel that ended before the one ahead of it would let a third
    overtake both.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _report(report_ptr, at, what, mask):
    """Write ``what`` to a half of the first word of a report, where ``mask`` says so."""
    flag_ptr = report_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + at
    # Usually nothing; otherwise any of those that write will do.
    tl.store(flag_ptr + mask.to(tl.int32) * 0, what, mask=mask)


@triton.jit(
    do_not_specialize=["n_ids", "chunk", "n_logical"],
    do_not_specialize_on_alignment=["idx_ptr", "report_ptr"],
)
def _count_kernel(
    idx_ptr, by_program_ptr, counts_ptr, report_ptr, n_ids, chunk, n_logical,
    BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Count the ids of one chunk.

    idx [n_ids] int32 or int64, by_program [programs, n_logical] int32 (every element is
    written). counts [n_logical] int32 becomes -1, which says that totals are still to come. An
    id outside [-1, n_logical) counts nowhere and leaves itself in ``report`` [2] int64. Grid
    (programs,).
    """
    _start_dependents(PDL)
    program = tl.program_id(0).to(tl.int64)
    begin = program * chunk
    end = tl.minimum(begin + chunk, n_ids)
    bins = tl.zeros((BINS,), dtype=tl.int32)
    for block in range(begin, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        ids = tl.load(idx_ptr + at, mask=at < end, other=-1)
        known = (ids >= 0) & (ids < n_logical)
        bad = (ids < -1) | (ids >= n_logical)
        tl.store(report_ptr + 1 + at * 0, ids.to(tl.int64), mask=bad)
        _report(report_ptr, REPORT_ID, 1, bad)
        bins += tl.histogram(tl.where(known, ids, 0).to(tl.int32), BINS, mask=known)
    expert = tl.arange(0, BINS)
    tl.store(by_program_ptr + program * n_logical + expert, bins, mask=expert < n_logical)
    if program == 0:
        tl.store(counts_ptr + expert, tl.full((BINS,), -1, tl.int32), mask=expert < n_logical)


@triton.jit
def _sum_rows(
    running_ptr, counts_ptr, block, n_rows, n_logical, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Turn one block's counts by program into running sums, in place, and write their totals."""
    expert = block * EXPERTS + tl.arange(0, EXPERTS)
    inside = expert < n_logical
    row = tl.arange(0, ROWS)
    ptrs = running_ptr + row[:, None].to(tl.int64) * n_logical + expert[None, :]
    carry = tl.zeros((EXPERTS,), dtype=tl.int32)
    for first in range(0, n_rows, ROWS):
        mask = (first + row < n_rows)[:, None] & inside[None, :]
        values = tl.load(ptrs, mask=mask, other=0)
        before = carry
        carry += tl.sum(values, 0)
        if first + ROWS >= n_rows:
            # Somebody waits for the totals: they go first.
            tl.store(counts_ptr + expert, carry, mask=inside)
        tl.store(ptrs, tl.cumsum(values, 0) + before[None, :], mask=mask)
        ptrs += ROWS * n_logical


@triton.jit
def _await_counts(counts_ptr, n, BLOCK: tl.constexpr):
    """Wait until all ``n`` counts are there; returns whether they are, the same in all threads.

    `_count_kernel` left -1 in their places; MOST_POLLS looks take seconds. What a thread saw
    meanwhile it must not use: another may have seen more. Loads after this find the counts.
    """
    complete = tl.full((), 1, tl.int1)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        least = tl.full((), -1, tl.int32)
        polls = tl.full((), 0, tl.int32)
        while complete & (least < 0) & (polls < MOST_POLLS):
            polls += 1
            least = tl.min(tl.load(counts_ptr + at, mask=at < n, other=0, volatile=True))
        complete = complete & (least >= 0)
    tl.debug_barrier()
    return complete


@triton.jit
def _counts_of(counts_ptr, expert):
    """Load counts of experts, 0 where there is none (-1), never from a stale line of a cache.

    Counts below 0, of a failed exchange, come out infinite.
    """
    counts = tl.load(counts_ptr + expert, mask=expert >= 0, other=0, volatile=True)
    return tl.where(counts < 0, float("inf"), counts.to(tl.float32))


@triton.jit(do_not_specialize=["n_rows", "n_logical"])
def _running_sum_kernel(
    running_ptr, counts_ptr, n_rows, n_logical, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Turn counts by program into running sums, in place, and write their totals.

    running [n_rows, n_logical] int32, counts [n_logical] int32. Grid (experts / EXPERTS,).
    """
    _sum_rows(running_ptr, counts_ptr, tl.program_id(0), n_rows, n_logical, ROWS, EXPERTS)


@triton.jit
def _rounding_offset(rank, expert):
    """Where a rank's rounding of an expert begins (equation 13); both int64."""
    return (expert * OFFSET_BY_EXPERT + rank * OFFSET_BY_RANK + SHARE_HALF) & SHARE_MASK


@triton.jit
def _quota_end(cumulative_ptr, copy, count, offset):
    """Tokens of this expert on this rank that go to ``copy`` or an earlier one (equation 12)."""
    share = tl.load(cumulative_ptr + copy).to(tl.int64)
    return (count * share + offset) >> SHARE_BITS


@triton.jit
def _find_copy(cumulative_ptr, low, high, position, count, offset, steps, INTEGER: tl.constexpr):
    """Halve the range of copies, dealing a node's tokens out evenly (equation 14).

    INTEGER holds ``count`` squared.
    """
    position = position.to(INTEGER)
    size = count.to(INTEGER)
    count = count.to(tl.int64)
    low_end = tl.zeros_like(count)
    for _ in range(steps):
        inner = low < high
        middle = (low + high) // 2
        middle_end = _quota_end(cumulative_ptr, middle, count, offset)
        quota = (middle_end - low_end).to(INTEGER)
        divisor = tl.maximum(size, 1).to(INTEGER)
        scaled = position * quota + size // 2
        taken = scaled // divisor
        left = inner & (scaled - taken * size + quota >= size)
        right = inner & (left == 0)
        position = tl.where(left, taken, tl.where(right, position - taken, position))
        size = tl.where(left, quota, tl.where(right, size - quota, size))
        low_end = tl.where(right, middle_end, low_end)
        high = tl.where(left, middle, high)
        low = tl.where(right, middle + 1, low)
    return low


@triton.jit(
    do_not_specialize=["n_ids", "chunk", "n_logical", "n_rows", "rank"],
    do_not_specialize_on_alignment=[
        "idx_ptr",
        "out_ptr",
        "running_ptr",
        "cumulative_ptr",
        "report_ptr",
    ],
)
def _select_kernel(
    idx_ptr, out_ptr, running_ptr,
    cumulative_ptr, copy_start_ptr, copy_slot_ptr, search_steps_ptr, report_ptr,
    n_ids, chunk, n_logical, n_rows, rank,
    BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Physical ids for one chunk of logical ids (equations 12 to 14).

    idx and out [n_ids]; running [n_rows, n_logical] int32 as `_sum_rows` leaves it (one row per
    program); cumulative and copy_slot [n_copies], copy_start [n_logical + 1], search_steps [1]
    int32. With CHECK, ``running`` and ``cumulative`` may be anybody's: if they don't fit the ids,
    or are no shares, ``report`` [2] int64 says so. Grid (n_rows,).
    """
    program = tl.program_id(0).to(tl.int64)
    begin = program * chunk
    end = tl.minimum(begin + chunk, n_ids)
    expert = tl.arange(0, BINS)
    # Tokens of each expert ahead of this program's next block, by this program alone at first.
    seen = tl.zeros((BINS,), dtype=tl.int32)
    n_before = tl.where(program > 0, n_logical, 0)
    totals_ptr = running_ptr + (n_rows - 1).to(tl.int64) * n_logical
    steps = tl.load(search_steps_ptr)
    lane = tl.arange(0, BLOCK)
    earlier = lane[:, None] < lane[None, :]
    for block in range(begin, end, BLOCK):
        at = block + lane
        ids = tl.load(idx_ptr + at, mask=at < end, other=-1)
        known = (ids >= 0) & (ids < n_logical)
        e = tl.where(known, ids, 0).to(tl.int32)
        low = tl.load(copy_start_ptr + e)
        high = tl.load(copy_start_ptr + e + 1) - 1
        # Rank within the block by comparing all pairs: stable, hence deterministic.
        tag = tl.where(known, e, -1)
        same = (tag[:, None] == tag[None, :]) & earlier
        position = tl.sum(same.to(tl.int32), 0)
        if block == begin:
            # All before this hides behind the solve.
            _await_previous(PDL)
            before_ptrs = running_ptr + (program - 1) * n_logical + expert
            seen = tl.load(before_ptrs, mask=expert < n_before, other=0)
        count = tl.load(totals_ptr + e, mask=known, other=0)
        position += tl.gather(seen, e, 0)
        if block + BLOCK < end:
            seen += tl.histogram(e, BINS, mask=known)

        offset = _rounding_offset(rank.to(tl.int64), e.to(tl.int64))
        if CHECK:
            _report(report_ptr, REPORT_INPUT, BAD_RUNNING, known & (position >= count))
            first_end = tl.load(cumulative_ptr + low)
            bad = (first_end < 0) | (first_end > SHARE_MASK + 1)
            bad |= _quota_end(cumulative_ptr, high, count.to(tl.int64), offset) != count
            _report(report_ptr, REPORT_INPUT, BAD_CUMULATIVE, known & bad)
        most = n_ids
        if n_ids >= 65536:
            most = tl.max(count)
        if most < 65536:
            low = _find_copy(cumulative_ptr, low, high, position, count, offset, steps, tl.uint32)
        else:
            low = _find_copy(cumulative_ptr, low, high, position, count, offset, steps, tl.int64)
        slot = tl.load(copy_slot_ptr + low)
        physical = tl.where(known, slot, -1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, physical, mask=at < end)
    _await_previous(PDL)
