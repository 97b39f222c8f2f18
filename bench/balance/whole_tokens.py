"""Compute rank loads in whole tokens, as source ranks round them."""

from __future__ import annotations

import torch

from lplb_triton import Placement, Solution, reference
from lplb_triton.traces.trace import MOST_TOKENS

__all__ = ["check_tokens", "merge_sources", "compute_token_loads"]


def merge_sources(counts: torch.Tensor, ep: int) -> torch.Tensor:
    """Add up consecutive recorded sources where there are more of them than ranks.

    Parameters
    ----------
    counts
        int64 [batches, sources, n_logical].
    ep
        Number of ranks.

    Returns
    -------
    torch.Tensor
        int64 [batches, ep, n_logical] if ``ep`` divides the sources, else ``counts``.
    """
    batches, sources, experts = counts.shape
    if sources <= ep or sources % ep:
        return counts
    return counts.reshape(batches, ep, sources // ep, experts).sum(2)


def check_tokens(name: str, counts: torch.Tensor) -> None:
    """Refuse counts that whole-token arithmetic with shares in units of 2**-24 can't carry.

    Parameters
    ----------
    name
        Name of the argument.
    counts
        Tokens, any shape.

    Raises
    ------
    TypeError
        If they are not integers.
    ValueError
        If a count is outside of [0, `MOST_TOKENS`].
    """
    if not isinstance(counts, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(counts).__name__}")
    if counts.dtype.is_floating_point or counts.dtype.is_complex or counts.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {counts.dtype}")
    if counts.numel():
        least, most = (int(value) for value in counts.aminmax())
        if least < 0 or most > MOST_TOKENS:
            wrong = least if least < 0 else most
            raise ValueError(f"{name} must be in [0, {MOST_TOKENS}] (int32), got {wrong}")


def compute_token_loads(
    placement: Placement, counts: torch.Tensor, solution: Solution
) -> torch.Tensor:
    """Compute rank loads in whole tokens when every source rank rounds its own quotas.

    Each source splits its own tokens of an expert by the cumulative shares of the expert's
    copies, with the rounding offset of its rank (docs/method.md, equations 12 and 13), exactly
    as `lplb_triton.Balancer` does.

    Parameters
    ----------
    placement
        With ``n_group`` groups of ``group_size`` ranks and ``ep_size`` ranks in all.
    counts
        int64 [batches, sources, n_logical] on the CPU, tokens that each source sends to each
        logical expert. Source s rounds as rank s.
    solution
        Of ``placement.problem(counts.sum(1))``, any device.

    Returns
    -------
    torch.Tensor
        int64 [batches, ep_size], tokens on each rank; every batch sums to its tokens.

    Raises
    ------
    TypeError, ValueError
        If ``counts`` holds anything but integers from 0 to `lplb_triton.traces.trace.MOST_TOKENS`.
    """
    check_tokens("counts", counts)
    s = placement.structure
    start, cell, index, multiplicity, slot = (
        torch.tensor(array, device="cpu")
        for array in (s.copy_start, s.copy_cell, s.copy_index, s.copy_multiplicity, s.copy_slot)
    )
    rank = slot.long() // placement.slots_per_rank
    shares = solution.shares.cpu().reshape(
        len(counts), placement.n_group, placement.group_size, placement.max_columns
    )
    loads = torch.zeros(len(counts), placement.ep_size, dtype=torch.int64, device="cpu")
    offsets = [
        reference.compute_rounding_offsets(source, counts.shape[2])
        for source in range(counts.shape[1])
    ]
    for batch, by_source in enumerate(counts):
        cumulative = reference.cumulative_shares(shares[batch], cell, index, multiplicity, start)
        quotas = reference.split_counts(by_source, cumulative, start, torch.stack(offsets))
        loads[batch].index_add_(0, rank, quotas.sum(0))
    return loads
