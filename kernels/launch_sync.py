"""Launchers of the kernels that sum counts over ranks and divide quotas among them."""

from __future__ import annotations

import torch
import triton

from lplb_triton.kernels.launch import _bins, _Call, _launch, is_interpreted
from lplb_triton.kernels.quotas import _divide_quotas_kernel
from lplb_triton.kernels.sync import (
    FAULT_ABSENT,
    FAULT_MISMATCH,
    FAULT_OVERLAP,
    HEADER,
    LANES,
    STATUS_RANKS,
    WARPS,
    _sum_gathered_kernel,
    _sum_over_ranks_kernel,
)

MAX_RANKS = int(LANES.value)
HEADER_WORDS = int(HEADER.value)
STATUS_FIRST = int(STATUS_RANKS.value)
FAULTS = {
    int(FAULT_ABSENT.value): "absent",
    int(FAULT_MISMATCH.value): "mismatch",
    int(FAULT_OVERLAP.value): "overlap",
}
# Counts that one pass handles.
SUM_BLOCK = 256


def status_words(n_ranks: int) -> int:
    """int64 words of the status of a group of ranks."""
    return STATUS_FIRST + 3 * n_ranks


def channel_words(n_ranks: int, capacity: int) -> int:
    """int32 words of one channel in a rank's buffer; ``capacity`` is a multiple of 4."""
    return MAX_RANKS + 2 * n_ranks * (HEADER_WORDS + capacity)


def _block(n: int) -> int:
    return min(SUM_BLOCK, _bins(n))


def sum_over_ranks(
    counts: torch.Tensor, total: torch.Tensor, gathered: torch.Tensor | None,
    addresses: torch.Tensor, gates: torch.Tensor, epochs: torch.Tensor, version: torch.Tensor,
    status: torch.Tensor, rank: int, capacity: int, channel: int, timeout_ms: int,
) -> None:  # fmt: skip
    """Exchange ``counts`` [n] int32 with all ranks and write their sum to ``total`` [n] int32.

    ``gathered`` [n_ranks, n] int32 gets every rank's counts. ``addresses`` [n_ranks] int64 of
    the buffers, ``gates`` and ``epochs`` [channels] int32, ``version`` [1] int32, ``status``
    [`status_words`] int64 in memory that the host can read.
    """
    n = counts.numel()
    args = (
        counts, total, total if gathered is None else gathered,
        addresses, gates, epochs, version, status,
        rank, addresses.numel(), n, capacity, channel, timeout_ms,
    )  # fmt: skip
    constants = (gates.numel(), _block(n), int(gathered is not None), int(not is_interpreted()))
    _launch(_Call(_sum_over_ranks_kernel, 1, args, constants, {"num_warps": WARPS}))


def sum_gathered(
    counts: torch.Tensor, total: torch.Tensor, gathered: torch.Tensor | None,
    rows: torch.Tensor, version: torch.Tensor, status: torch.Tensor, rank: int,
) -> None:  # fmt: skip
    """Check ``rows`` [n_ranks, HEADER_WORDS + n] int32 and sum them, as `sum_over_ranks` does."""
    n = counts.numel()
    args = (
        counts, total, total if gathered is None else gathered,
        rows, version, status, rank, len(rows), n,
    )  # fmt: skip
    constants = (_block(n), int(gathered is not None))
    _launch(_Call(_sum_gathered_kernel, 1, args, constants, {"num_warps": WARPS}))


def divide_quotas(
    gathered: torch.Tensor, cumulative: torch.Tensor, copy_start: torch.Tensor,
    copy_slot: torch.Tensor, copy_index: torch.Tensor, mine: torch.Tensor, traffic: torch.Tensor,
    rank: int, slots_per_rank: int, ranks_per_node: int, max_copies: int,
) -> None:  # fmt: skip
    """Write this rank's cumulative shares to ``mine`` [n_copies] int32 (equations 15 to 17).

    ``gathered`` [n_ranks, n_logical] and ``cumulative`` [n_copies] int32; ``traffic`` [3] int64
    is added to. ``max_copies`` bounds the copies of one expert.
    """
    n_ranks, n_logical = gathered.shape
    args = (
        gathered, cumulative, copy_start, copy_slot, copy_index, mine, traffic,
        rank, n_ranks, n_logical, slots_per_rank, ranks_per_node,
    )  # fmt: skip
    ranks = max(2, triton.next_power_of_2(n_ranks))
    copies = max(2, triton.next_power_of_2(max_copies))
    _launch(_Call(_divide_quotas_kernel, n_logical, args, (ranks, copies), {"num_warps": 1}))
