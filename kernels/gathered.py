"""Check and sum counts that another library has gathered: the kernel, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.exchange import choose_block
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
from lplb_triton.kernels.launch import KernelCall, launch_call

HEADER = tl.constexpr(_layout.GATHERED_HEADER_WORDS)
FAULT_MISMATCH = tl.constexpr(_layout.FAULT_MISMATCH)


@triton.jit
def _find_mismatches(rows_ptr, row_words, present, version, n, LANES: tl.constexpr):
    """Find the ranks whose row belongs to another call.

    Returns by lane, int32: 1 for such a rank and 0 for others, the row's version, and its number of
    counts.
    """
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
            row, cell_ptr, mask = tile_rows(rows_ptr, row_words, HEADER, first_row, at, n_ranks, n)
            values = tl.load(cell_ptr, mask=mask, other=0)
            total += sum_counts(values)
            if GATHER:
                tl.store(gathered_ptr + row[:, None] * n + at[None, :], values, mask=mask)
        tl.store(total_ptr + at, to_total(total), mask=at < n)


@triton.jit(
    do_not_specialize=["rank", "n_ranks", "n"],
    do_not_specialize_on_alignment=[
        "counts_ptr", "total_ptr", "gathered_ptr", "version_ptr", "rows_ptr",
    ],
)  # fmt: skip
def sum_gathered_kernel(
    counts_ptr,  # [n] int32: this rank's counts
    total_ptr,  # [n] int32: gets the sums, NO_COUNT if a row belongs to another call
    gathered_ptr,  # [n_ranks, n] int32: gets every rank's counts with GATHER, else not used
    rows_ptr,  # [n_ranks, HEADER + n] int32: a header is 0, version, number of counts, 0
    version_ptr,  # [1] int32, of the placement: the same on all ranks
    status_ptr,  # [STATUS_FIRST + 3 n_ranks] int64 in pinned host memory, see _layout.py
    rank,  # this rank's number
    n_ranks,
    n,  # number of counts
    BLOCK: tl.constexpr,  # counts that are handled at a time
    GATHER: tl.constexpr,
    LANES: tl.constexpr,  # number of threads
):
    """Check and sum rows. Grid (1,), LANES / 32 warps."""
    row_words = HEADER + n
    version = tl.load(version_ptr)
    wrong = tl.zeros((LANES,), dtype=tl.int32)
    for first in range(0, n_ranks, LANES):
        present = first + tl.arange(0, LANES) < n_ranks
        bad, their_version, their_n = _find_mismatches(
            rows_ptr + first * row_words, row_words, present, version, n, LANES
        )
        wrong += bad
        if tl.sum(bad) > 0:
            write_status(status_ptr, first, n_ranks, 0, 0, bad, their_version, their_n, LANES)
    if tl.sum(wrong) == 0:
        _sum_gathered_rows(rows_ptr, row_words, total_ptr, gathered_ptr, n_ranks, n, BLOCK, GATHER)
    else:
        write_failure(counts_ptr, total_ptr, gathered_ptr, rank, n_ranks, n, BLOCK, GATHER)
        tl.debug_barrier()
        tl.store(status_ptr + STATUS_FAULT, tl.full((), FAULT_MISMATCH, tl.int64))


def sum_gathered(
    counts: torch.Tensor,
    total: torch.Tensor,
    gathered: torch.Tensor | None,
    rows: torch.Tensor,
    version: torch.Tensor,
    status: torch.Tensor,
    rank: int,
) -> None:
    """Check and sum ``rows`` [n_ranks, GATHERED_HEADER_WORDS + n] int32, as `sum_over_ranks` does.

    ``counts`` [n] int32 are this rank's; ``total`` [n] int32 and ``gathered`` [n_ranks, n] int32,
    where it is given, are written; ``version`` [1] int32; ``status`` [`status_words`] int64.
    """
    n = counts.numel()
    args = (
        counts, total, total if gathered is None else gathered,
        rows, version, status, rank, len(rows), n,
    )  # fmt: skip
    constants = (choose_block(n), int(gathered is not None), 32 * WARPS)
    launch_call(KernelCall(sum_gathered_kernel, 1, args, constants, {"num_warps": WARPS}))
