"""Exact quotas over all ranks: the torch twin of the kernel in kernels/quotas.py.

Equation numbers refer to docs/method.md. Copies are numbered expert by expert.
"""

from __future__ import annotations

import torch

from lplb_triton._layout import SHARE_BITS
from lplb_triton.reference.tokens import (
    compute_rounding_offsets,
    copy_quotas,
    repeat_by_copy,
    sum_by_expert,
)

__all__ = ["divide_quotas", "shares_of_quotas"]


def divide_quotas(
    gathered: torch.Tensor,
    cumulative: torch.Tensor,
    copy_start: torch.Tensor,
    holder: torch.Tensor,
    ranks_per_node: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide exact global quotas among the ranks, nearest first (equations 15 and 16).

    Parameters
    ----------
    gathered : torch.Tensor
        ``[n_ranks, n_logical]`` int, every rank's tokens per expert.
    cumulative : torch.Tensor
        ``[n_physical]`` int32, see `cumulative_shares`.
    copy_start : torch.Tensor
        ``[n_logical + 1]`` int32.
    holder : torch.Tensor
        ``[n_physical]`` int, rank of each copy.
    ranks_per_node : int
        Consecutive ranks that share a node.

    Returns
    -------
    quotas : torch.Tensor
        ``[n_ranks, n_physical]`` int64, tokens that each copy gets from each rank.
    kept : torch.Tensor
        ``[n_ranks, 3]`` int64: of each rank's tokens those that stay on the rank, those that stay
        on its node, and all of them.
    """
    n_ranks, n_logical = gathered.shape
    experts = torch.arange(n_logical, device=gathered.device)
    expert = repeat_by_copy(experts, copy_start, cumulative.numel())
    supply = gathered.long()[:, expert]
    demand = copy_quotas(gathered.sum(0), cumulative, copy_start, 0)

    quotas = torch.zeros_like(supply)
    rank = torch.arange(n_ranks, device=gathered.device).unsqueeze(1)
    nearness = (
        rank == holder.unsqueeze(0),
        rank // ranks_per_node == holder.unsqueeze(0) // ranks_per_node,
        torch.ones_like(quotas, dtype=torch.bool),
    )
    for size in (1, ranks_per_node, n_ranks):
        for first in range(0, n_ranks, size):
            block = slice(first, min(first + size, n_ranks))
            here = (holder >= first) & (holder < first + size)
            matched = _match_supply(supply[block], torch.where(here, demand, 0), copy_start)
            quotas[block] += matched
            demand = demand - matched.sum(0)
            # The table repeats a rank's supply of an expert for each of its copies.
            used = torch.zeros(len(matched), n_logical, dtype=torch.long, device=matched.device)
            supply[block] -= used.index_add_(1, expert, matched)[:, expert]
    kept = torch.stack([torch.where(near, quotas, 0).sum(1) for near in nearness], 1)
    return quotas, kept


def _match_supply(
    supply: torch.Tensor, demand: torch.Tensor, copy_start: torch.Tensor
) -> torch.Tensor:
    """Match supply by rank with demand by copy, both in order, expert by expert.

    ``supply`` is ``[ranks, n_copies]``, the same for all copies of an expert, and ``demand`` is
    ``[n_copies]``. Returns the tokens that each copy gets from each rank, ``[ranks, n_copies]``.
    """
    supply_end = supply.cumsum(0)
    demand_end = sum_by_expert(demand, copy_start)
    end = torch.minimum(supply_end, demand_end)
    begin = torch.maximum(supply_end - supply, demand_end - demand)
    return (end - begin).clamp(min=0)


def shares_of_quotas(
    quotas: torch.Tensor, counts: torch.Tensor, copy_start: torch.Tensor, rank: int
) -> torch.Tensor:
    """Compute the cumulative shares that `copy_quotas` turns into these quotas (equation 17).

    Parameters
    ----------
    quotas : torch.Tensor
        ``[n_physical]`` int, this rank's tokens for each copy.
    counts : torch.Tensor
        ``[n_logical]`` int, this rank's tokens per expert, each below 2**24.
    copy_start : torch.Tensor
        ``[n_logical + 1]`` int32.
    rank : int
        This rank's number in the EP group.

    Returns
    -------
    torch.Tensor
        ``[n_physical]`` int32 in units of 2**-24, by copy.
    """
    ends = sum_by_expert(quotas, copy_start)
    size = repeat_by_copy(counts.long().clamp(min=1), copy_start, quotas.numel())
    theta = compute_rounding_offsets(rank, counts.numel()).to(quotas.device)
    theta = repeat_by_copy(theta, copy_start, quotas.numel())
    shares = ((ends << SHARE_BITS) - theta + size - 1).div(size, rounding_mode="floor")
    return torch.where(ends > 0, shares, 0).int()
