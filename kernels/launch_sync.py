"""Launchers of the kernels that sum counts over ranks and divide quotas among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from lplb_triton.kernels.launch import Channel, Exchange, _Call, _exchange_block, _launch
from lplb_triton.kernels.quotas import _divide_quotas_kernel
from lplb_triton.kernels.sync import (
    FAULT_ABSENT,
    FAULT_MISMATCH,
    FAULT_OVERLAP,
    HEADER,
    MOST_RANKS,
    OPENING_SHIFT,
    STATUS_RANKS,
    WARPS,
    _sum_gathered_kernel,
    _sum_over_ranks_kernel,
)

MAX_RANKS = int(MOST_RANKS.value)
HEADER_WORDS = int(HEADER.value)
STATUS_FIRST = int(STATUS_RANKS.value)
COUNT_BITS = int(OPENING_SHIFT.value)
FAULTS = {
    int(FAULT_ABSENT.value): "absent",
    int(FAULT_MISMATCH.value): "mismatch",
    int(FAULT_OVERLAP.value): "overlap",
}


def status_words(n_ranks: int) -> int:
    """int64 words of the status of a group of ranks."""
    return STATUS_FIRST + 3 * n_ranks


def channel_words(n_ranks: int, capacity: int) -> int:
    """64-bit words of one channel in a rank's buffer."""
    return 2 * n_ranks * (HEADER_WORDS + capacity)


def sum_over_ranks(counts: torch.Tensor, exchange: Exchange, channel: Channel) -> None:
    """Exchange ``counts`` [n] int32 with all ranks, in a launch of its own."""
    args = (counts, *exchange.args(channel), counts.numel())
    constants = (*exchange.constants(), 32 * WARPS)
    _launch(_Call(_sum_over_ranks_kernel, 1, args, constants, {"num_warps": WARPS}))


def sum_gathered(
    counts: torch.Tensor, total: torch.Tensor, gathered: torch.Tensor | None,
    rows: torch.Tensor, version: torch.Tensor, status: torch.Tensor, rank: int,
) -> None:  # fmt: skip
    """Check and sum ``rows`` [n_ranks, GATHERED_HEADER + n] int32, as `sum_over_ranks` does."""
    n = counts.numel()
    args = (
        counts, total, total if gathered is None else gathered,
        rows, version, status, rank, len(rows), n,
    )  # fmt: skip
    constants = (_exchange_block(n), int(gathered is not None), 32 * WARPS)
    _launch(_Call(_sum_gathered_kernel, 1, args, constants, {"num_warps": WARPS}))


class Quotas(NamedTuple):
    """What turns shares of all ranks into this rank's own (equations 15 to 17).

    ``gathered`` [n_ranks, n_logical] int32, every rank's counts; ``mine`` [n_copies] int32 gets
    this rank's cumulative shares, and ``traffic`` [3] int64 is added to. ``max_copies`` bounds
    the copies of one expert.
    """

    gathered: torch.Tensor
    copy_start: torch.Tensor
    copy_slot: torch.Tensor
    copy_index: torch.Tensor
    mine: torch.Tensor
    traffic: torch.Tensor
    rank: int
    slots_per_rank: int
    ranks_per_node: int
    max_copies: int


def _divide_call(cumulative: torch.Tensor, quotas: Quotas) -> _Call:
    n_ranks, n_logical = quotas.gathered.shape
    args = (
        quotas.gathered, cumulative, *quotas[1:6],
        quotas.rank, n_ranks, n_logical, quotas.slots_per_rank, quotas.ranks_per_node,
    )  # fmt: skip
    ranks = max(2, triton.next_power_of_2(n_ranks))
    copies = max(2, triton.next_power_of_2(quotas.max_copies))
    return _Call(_divide_quotas_kernel, n_logical, args, (ranks, copies), {"num_warps": 1})


def divide_quotas(cumulative: torch.Tensor, quotas: Quotas) -> None:
    """Write ``quotas.mine`` for ``cumulative`` [n_copies] int32 as the solver leaves it."""
    _launch(_divide_call(cumulative, quotas))
