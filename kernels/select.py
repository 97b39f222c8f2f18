"""Rewrite logical ids into physical ids: the kernel, and its launcher.

The batch is cut into the same chunks as in count.py, whose running sums say at which position each
chunk's tokens begin. Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lplb_triton.kernels.count import pad_experts
from lplb_triton.kernels.launch import KernelCall, launch_call, supports_pdl
from lplb_triton.kernels.live.launch import LiveCopies
from lplb_triton.kernels.metrics import BatchMetrics, add_metrics, no_metrics_args
from lplb_triton.kernels.pdl import await_previous
from lplb_triton.kernels.report import BAD_CUMULATIVE, BAD_RUNNING, REPORT_INPUT, write_report
from lplb_triton.kernels.rounding import SHARE_BITS, SHARE_MASK, compute_rounding_offset

# Ids that one program handles at a time. The kernel compares all pairs of them.
SELECT_BLOCK = 256
# uint32 holds the square of every count below this.
WIDE_COUNT = tl.constexpr(1 << 16)


@triton.jit
def _compute_quota_end(cumulative_ptr, copy, count, offset):
    """Count this rank's tokens of an expert that go to ``copy`` or an earlier one (equation 12).

    ``offset`` is the theta of equation 13, in units of shares.
    """
    cumulative = tl.load(cumulative_ptr + copy).to(tl.int64)
    return (count * cumulative + offset) >> SHARE_BITS


@triton.jit
def _find_copy(cumulative_ptr, low, high, position, count, offset, steps, INTEGER: tl.constexpr):
    """Halve the range of copies until one is left (equation 14).

    Between the halves the tokens of a range are dealt out evenly. ``position`` is the token's
    number n among its expert's tokens on this rank, and ``count`` is how many there are. INTEGER is
    a type that holds ``count`` squared.
    """
    position = position.to(INTEGER)
    size = count.to(INTEGER)
    count = count.to(tl.int64)
    low_end = tl.zeros_like(count)
    for _ in range(steps):
        inner = low < high
        middle = (low + high) // 2
        middle_end = _compute_quota_end(cumulative_ptr, middle, count, offset)
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


@triton.jit
def _find_copies(cumulative_ptr, low, high, position, count, offset, steps, n_ids):
    """Find copies as `_find_copy` does, in uint32 if counts, at most ``n_ids`` each, allow it."""
    most = n_ids
    if n_ids >= WIDE_COUNT:
        most = tl.max(count)
    if most < WIDE_COUNT:
        low = _find_copy(cumulative_ptr, low, high, position, count, offset, steps, tl.uint32)
    else:
        low = _find_copy(cumulative_ptr, low, high, position, count, offset, steps, tl.int64)
    return low


@triton.jit
def _count_equal_ahead(expert, known, earlier):
    """Count the tokens of a block that are ahead of each one and have its expert.

    All pairs are compared, so the result does not depend on timing. ``earlier`` [BLOCK, BLOCK] is
    whether the first token of a pair is ahead of the second.
    """
    tag = tl.where(known, expert, -1)
    same = (tag[:, None] == tag[None, :]) & earlier
    return tl.sum(same.to(tl.int32), 0)


@triton.jit
def _check_inputs(report_ptr, cumulative_ptr, known, low, high, position, count, offset):
    """Report positions that are not below their counts, and values that can't be shares.

    The shares of an expert's first copy must be in range, and those of its last one must end at
    the count.
    """
    write_report(report_ptr, REPORT_INPUT, BAD_RUNNING, known & (position >= count))
    first_end = tl.load(cumulative_ptr + low)
    bad = (first_end < 0) | (first_end > SHARE_MASK + 1)
    bad |= _compute_quota_end(cumulative_ptr, high, count.to(tl.int64), offset) != count
    write_report(report_ptr, REPORT_INPUT, BAD_CUMULATIVE, known & bad)


@triton.jit(
    do_not_specialize=[
        "n_ids", "chunk", "n_logical", "n_rows", "rank", "n_static", "n_ranks", "n_slots", "n_live",
    ],
    do_not_specialize_on_alignment=[
        "idx_ptr",
        "out_ptr",
        "running_ptr",
        "cumulative_ptr",
        "report_ptr",
    ],
)  # fmt: skip
def select_kernel(
    idx_ptr,  # [n_ids] int32 or int64: logical ids, -1 for none
    out_ptr,  # [n_ids], the same dtype: gets physical ids, -1 for none
    running_ptr,  # [n_rows, n_logical] int32: running sums of counts by program, see `sum_rows`
    cumulative_ptr,  # [n_copies] int32: cumulative shares of each expert's copies
    copy_start_ptr,  # [n_logical + 1] int32: first copy of each expert
    copy_slot_ptr,  # [n_copies] int32: physical id of each copy
    search_steps_ptr,  # [1] int32: halvings that the largest number of copies takes
    report_ptr,  # [2] int64, see report.py: with CHECK, inputs that don't fit
    n_ids,
    chunk,  # ids of one program
    n_logical,
    n_rows,
    rank,  # this rank's number
    # What the batch's live slots change, see live/arguments.py; read only with LIVE.
    live_flag_ptr,  # [1] int32
    live_first_ptr,  # [n_logical] int32
    live_last_ptr,  # [n_logical] int32
    live_slot_ptr,  # int32: physical ids of the copies from number n_static on
    n_static,  # static copies
    # What metrics are made of, see `add_metrics`; read only with G > 0.
    metrics_ptr,  # [N_METRICS] float64
    counts_ptr,  # [n_logical] int32
    home_experts_ptr,  # [n_group, n_ranks, n_slots] int32
    stats_ptr,  # [3, n_group] float32
    ints_ptr,  # [2, n_group] int32
    n_ranks,
    n_slots,
    n_live,
    live_out_ptr,  # [n_live + 4] int32
    BINS: tl.constexpr,  # n_logical or more, a power of two
    BLOCK: tl.constexpr,  # ids that are handled at a time
    PDL: tl.constexpr,  # whether this may start before the kernel ahead of it has ended
    CHECK: tl.constexpr,  # whether to check that `running` and `cumulative` fit the ids
    LIVE: tl.constexpr,  # whether there are live slots
    G: tl.constexpr,  # ranks of a group, padded; 0 if there are no metrics
    S: tl.constexpr,  # slots of a rank, padded
):
    """Write physical ids for one chunk of logical ids (equations 12 to 14).

    Grid (n_rows,); with metrics one more program for each group, which keeps nobody waiting.
    """
    program = tl.program_id(0).to(tl.int64)
    if G > 0:
        if program >= n_rows:
            add_metrics(
                metrics_ptr, counts_ptr, home_experts_ptr, stats_ptr, ints_ptr, live_out_ptr,
                program - n_rows, tl.num_programs(0) - n_rows, n_ranks, n_slots, n_live, PDL, G, S,
            )  # fmt: skip
            return
    begin = program * chunk
    end = tl.minimum(begin + chunk, n_ids)
    expert = tl.arange(0, BINS)
    # Tokens of each expert ahead of this program's next block, by this program alone at first.
    seen = tl.zeros((BINS,), dtype=tl.int32)
    n_before = tl.where(program > 0, n_logical, 0)
    totals_ptr = running_ptr + (n_rows - 1).to(tl.int64) * n_logical
    steps = tl.load(search_steps_ptr)
    # Of the batch's live slots: 0 until it is known.
    flag = steps * 0
    halvings = steps
    lane = tl.arange(0, BLOCK)
    earlier = lane[:, None] < lane[None, :]
    for block in range(begin, end, BLOCK):
        at = block + lane
        ids = tl.load(idx_ptr + at, mask=at < end, other=-1)
        known = (ids >= 0) & (ids < n_logical)
        e = tl.where(known, ids, 0).to(tl.int32)
        low = tl.load(copy_start_ptr + e)
        high = tl.load(copy_start_ptr + e + 1) - 1
        position = _count_equal_ahead(e, known, earlier)
        if block == begin:
            # The work before this overlaps with the solve, whose end this waits for.
            await_previous(PDL)
            before_ptrs = running_ptr + (program - 1) * n_logical + expert
            seen = tl.load(before_ptrs, mask=expert < n_before, other=0)
            if LIVE:
                flag = tl.load(live_flag_ptr)
        if LIVE:
            halvings = tl.maximum(steps, flag - 1)
            first = tl.load(live_first_ptr + e, mask=known & (flag > 0), other=0)
            is_moved = first > 0
            low = tl.where(is_moved, first, low)
            high = tl.where(is_moved, tl.load(live_last_ptr + e, mask=is_moved, other=0), high)
        count = tl.load(totals_ptr + e, mask=known, other=0)
        position += tl.gather(seen, e, 0)
        if block + BLOCK < end:
            seen += tl.histogram(e, BINS, mask=known)

        offset = compute_rounding_offset(rank.to(tl.int64), e.to(tl.int64))
        if CHECK:
            _check_inputs(report_ptr, cumulative_ptr, known, low, high, position, count, offset)
        low = _find_copies(cumulative_ptr, low, high, position, count, offset, halvings, n_ids)
        if LIVE:
            slot = tl.load(copy_slot_ptr + low, mask=low < n_static, other=0)
            moved_slot = tl.load(live_slot_ptr + low - n_static, mask=low >= n_static, other=0)
            slot = tl.where(low >= n_static, moved_slot, slot)
        else:
            slot = tl.load(copy_slot_ptr + low)
        physical = tl.where(known, slot, -1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, physical, mask=at < end)
    await_previous(PDL)


class SelectTables(NamedTuple):
    """Device tables that the select kernel reads, int32."""

    copy_start: torch.Tensor
    """[n_logical + 1] first copy of each expert."""
    copy_slot: torch.Tensor
    """[n_copies] physical id of each copy."""
    search_steps: torch.Tensor
    """[1] halvings that the largest number of copies takes."""


# Positions of the arguments that change from batch to batch, among those of `select_call`; the plan
# of live slots is the last one.
SELECT_IDX_AT, SELECT_OUT_AT = 0, 1
SELECT_N_IDS_AT = 5 + len(SelectTables._fields)
SELECT_CHUNK_AT = SELECT_N_IDS_AT + 1


def select_call(
    idx: torch.Tensor,
    out: torch.Tensor,
    running: torch.Tensor,
    cumulative: torch.Tensor,
    tables: SelectTables,
    report: torch.Tensor,
    chunk: int,
    rank: int,
    check: bool = False,
    live: LiveCopies | None = None,
    metrics: BatchMetrics | None = None,
) -> KernelCall:
    """Prepare `select`; ``check`` is whether to check ``running`` and ``cumulative``.

    ``live`` are the copies of this batch, if there are live slots.
    """
    n_group = 0 if metrics is None else len(metrics.home_experts)
    n_rows, n_logical = running.shape
    args = (
        idx, out, running, cumulative, *tables, report,
        idx.numel(), chunk, n_logical, n_rows, rank,
        *(live[:4] if live else [report] * 4), tables.copy_slot.numel(),
        *(metrics.args() if metrics else no_metrics_args(report)),
    )  # fmt: skip
    pdl = supports_pdl(idx.device)
    constants = (
        pad_experts(n_logical), SELECT_BLOCK, pdl, check, live is not None,
        *(metrics.constants() if metrics else (0, 1)),
    )  # fmt: skip
    return KernelCall(select_kernel, n_rows + n_group, args, constants, {"num_warps": 8})


def select(
    idx: torch.Tensor,
    out: torch.Tensor,
    running: torch.Tensor,
    cumulative: torch.Tensor,
    tables: SelectTables,
    report: torch.Tensor,
    chunk: int,
    rank: int,
) -> None:
    """Write physical ids of contiguous ``idx`` to ``out`` (same shape and dtype).

    If ``running`` or ``cumulative`` don't fit, ``report`` [2] int64 says so.
    """
    launch_call(select_call(idx, out, running, cumulative, tables, report, chunk, rank, check=True))
