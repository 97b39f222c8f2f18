"""Count tokens by logical expert: the kernels, and their launchers.

The flattened batch is cut into one contiguous chunk per program. A token's *position* is the
number of earlier tokens of the same expert in the batch; it depends neither on the number of
programs nor on timing, so every result here is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.launch import KernelCall, launch_call, supports_pdl
from lplb_triton.kernels.pdl import start_dependents
from lplb_triton.kernels.report import REPORT_ID, write_report

# Ids that one program counts at a time.
COUNT_BLOCK = 256
# Rows and experts that one program sums at a time; with few experts many programs share the work.
SUM_ROWS = 256
SUM_EXPERTS = 4
# How often a program reads counts that another one has to write, before it gives up. This takes
# seconds.
MOST_POLLS = tl.constexpr(1 << 22)
PENDING_COUNT = tl.constexpr(_layout.PENDING_COUNT)


@triton.jit(
    do_not_specialize=["n_ids", "chunk", "n_logical"],
    do_not_specialize_on_alignment=["idx_ptr", "report_ptr"],
)
def count_kernel(
    idx_ptr,  # [n_ids] int32 or int64: logical ids, -1 for none
    by_program_ptr,  # [programs, n_logical] int32: counts by chunk; all of it is written
    counts_ptr,  # [n_logical] int32: becomes PENDING_COUNT, since totals are still to come
    report_ptr,  # [2] int64, see report.py: any other id outside [0, n_logical), not counted
    n_ids,
    chunk,  # ids of one program
    n_logical,
    BINS: tl.constexpr,  # n_logical or more, a power of two
    BLOCK: tl.constexpr,  # ids that are counted at a time
    PDL: tl.constexpr,  # whether the next kernel may start early
):
    """Count the ids of one chunk. Grid (programs,)."""
    start_dependents(PDL)
    program = tl.program_id(0).to(tl.int64)
    begin = program * chunk
    end = tl.minimum(begin + chunk, n_ids)
    bins = tl.zeros((BINS,), dtype=tl.int32)
    for block in range(begin, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        ids = tl.load(idx_ptr + at, mask=at < end, other=-1)
        known = (ids >= 0) & (ids < n_logical)
        bad = (ids < -1) | (ids >= n_logical)
        # ``at * 0`` makes a block of equal addresses: any one bad id is enough for a report.
        tl.store(report_ptr + 1 + at * 0, ids.to(tl.int64), mask=bad)
        write_report(report_ptr, REPORT_ID, 1, bad)
        bins += tl.histogram(tl.where(known, ids, 0).to(tl.int32), BINS, mask=known)
    expert = tl.arange(0, BINS)
    tl.store(by_program_ptr + program * n_logical + expert, bins, mask=expert < n_logical)
    if program == 0:
        pending = tl.full((BINS,), PENDING_COUNT, tl.int32)
        tl.store(counts_ptr + expert, pending, mask=expert < n_logical)


@triton.jit
def sum_rows(
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
            # Other programs wait for the totals, so they are stored first.
            tl.store(counts_ptr + expert, carry, mask=inside)
        tl.store(ptrs, tl.cumsum(values, 0) + before[None, :], mask=mask)
        ptrs += ROWS * n_logical


@triton.jit(do_not_specialize=["n_rows", "n_logical"])
def running_sum_kernel(
    running_ptr,  # [n_rows, n_logical] int32: counts by program, becomes running sums over rows
    counts_ptr,  # [n_logical] int32: gets the totals
    n_rows,
    n_logical,
    ROWS: tl.constexpr,  # rows that are summed at a time
    EXPERTS: tl.constexpr,  # experts of one program
):
    """Turn counts by program into running sums. Grid (cdiv(n_logical, EXPERTS),)."""
    sum_rows(running_ptr, counts_ptr, tl.program_id(0), n_rows, n_logical, ROWS, EXPERTS)


@triton.jit
def await_counts(counts_ptr, n, BLOCK: tl.constexpr):
    """Wait until all ``n`` counts are there; returns whether they are, the same in all threads.

    `count_kernel` left PENDING_COUNT in their places. The wait ends after MOST_POLLS reads. Values
    that a thread reads during the wait must not be used, since another thread may have read later
    ones. Loads after this return the counts.
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
def load_counts(counts_ptr, expert):
    """Load counts of experts as float32, 0 where there is no expert (-1).

    The load is volatile, or it could return a stale line of a cache. Counts below 0, which are none
    (see _layout.py), become infinite.
    """
    counts = tl.load(counts_ptr + expert, mask=expert >= 0, other=0, volatile=True)
    return tl.where(counts < 0, float("inf"), counts.to(tl.float32))


# Positions of the arguments that change from batch to batch, among those of `count_call`.
COUNT_IDX_AT, COUNT_N_IDS_AT, COUNT_CHUNK_AT = 0, 4, 5


def pad_experts(n_logical: int) -> int:
    """Pad a number of experts to what kernels have bins for."""
    return max(16, int(triton.next_power_of_2(n_logical)))


def count_call(
    idx: torch.Tensor, running: torch.Tensor, counts: torch.Tensor, report: torch.Tensor, chunk: int
) -> KernelCall:
    """Prepare `count_by_program`."""
    n_rows, n_logical = running.shape
    args = (idx, running, counts, report, idx.numel(), chunk, n_logical)
    constants = (pad_experts(n_logical), COUNT_BLOCK, supports_pdl(idx.device))
    return KernelCall(count_kernel, n_rows, args, constants, {"num_warps": 2})


def sum_call(running: torch.Tensor, counts: torch.Tensor) -> KernelCall:
    """Prepare `sum_by_program`."""
    n_rows, n_logical = running.shape
    grid = triton.cdiv(n_logical, SUM_EXPERTS)
    args = (running, counts, n_rows, n_logical)
    constants = (SUM_ROWS, SUM_EXPERTS)
    return KernelCall(running_sum_kernel, grid, args, constants, {"num_warps": 1})


def count_by_program(
    idx: torch.Tensor, running: torch.Tensor, counts: torch.Tensor, report: torch.Tensor, chunk: int
) -> None:
    """Count contiguous ``idx`` by chunk.

    ``running`` [n_sms, n_logical] int32 is written, and ``counts`` [n_logical] int32 becomes
    PENDING_COUNT until `sum_by_program` or `solve_counts` has summed the rows. ``report`` [2] int64
    is memory that kernel and host can reach (pinned on a GPU), see `read_report`.
    """
    launch_call(count_call(idx, running, counts, report, chunk))


def sum_by_program(running: torch.Tensor, counts: torch.Tensor) -> None:
    """Turn ``running`` [n_sms, n_logical] int32 into running sums; ``counts`` gets the totals."""
    launch_call(sum_call(running, counts))
