"""Counting and selecting: the torch twins of kernels/count.py, select.py and rounding.py.

Equation numbers refer to docs/method.md. Copies are numbered expert by expert.
"""

from __future__ import annotations

import torch

from lplb_triton._layout import OFFSET_BY_EXPERT, OFFSET_BY_RANK, SHARE_BITS, SHARE_ONE

__all__ = [
    "assign_copies",
    "check_counts_of",
    "check_cumulative",
    "compute_rounding_offsets",
    "copy_quotas",
    "split_counts",
    "count_experts",
    "cumulative_shares",
    "repeat_by_copy",
    "sum_by_expert",
]


def count_experts(
    idx: torch.Tensor, n_logical: int, chunk: int, n_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count ids per expert, in total and as running sums over chunks of the batch.

    Parameters
    ----------
    idx : torch.Tensor
        int, any shape; ids in [-1, n_logical), -1 counts nowhere.
    n_logical : int
        Number of logical experts.
    chunk : int
        Ids per row of the running sums.
    n_rows : int
        Number of rows, ``n_rows * chunk >= idx.numel()``.

    Returns
    -------
    counts : torch.Tensor
        ``[n_logical]`` int32.
    running : torch.Tensor
        ``[n_rows, n_logical]`` int32; row i counts the ids before ``(i + 1) * chunk``.
    """
    flat = idx.reshape(-1).long()
    row = torch.arange(flat.numel(), device=flat.device) // chunk
    valid = flat >= 0
    cell = row[valid] * n_logical + flat[valid]
    by_row = torch.bincount(cell, minlength=n_rows * n_logical).reshape(n_rows, n_logical)
    running = by_row.cumsum(0).int()
    return running[-1].clone(), running


def cumulative_shares(
    shares: torch.Tensor,
    copy_cell: torch.Tensor,
    copy_index: torch.Tensor,
    copy_multiplicity: torch.Tensor,
    copy_start: torch.Tensor,
) -> torch.Tensor:
    """Turn shares by rank and column into cumulative shares by copy (equation 12).

    Parameters
    ----------
    shares : torch.Tensor
        ``[n_group, G, C]`` float32, multiples of 2**-24.
    copy_cell, copy_index, copy_multiplicity, copy_start : torch.Tensor
        Of `lplb_triton.Placement.structure`.

    Returns
    -------
    torch.Tensor
        ``[n_physical]`` int32 in units of 2**-24: part of the expert's tokens that go to this
        copy or an earlier one; 2**24 at each expert's last copy.
    """
    units = torch.round(shares.double().reshape(-1) * SHARE_ONE).long()
    if units.numel() == 0:
        units = torch.zeros(1, dtype=torch.long, device=shares.device)
    rank_share = torch.where(copy_cell < 0, SHARE_ONE, units[copy_cell.clamp(min=0).long()])
    index, multiplicity = copy_index.long(), copy_multiplicity.long()
    # Copies of an expert on one rank split the rank's share as evenly as integers allow.
    part = (index + 1) * rank_share // multiplicity - index * rank_share // multiplicity
    return sum_by_expert(part, copy_start).int()


def sum_by_expert(values: torch.Tensor, copy_start: torch.Tensor) -> torch.Tensor:
    """Sum values over the copies of an expert up to each one, ``[n_physical]``."""
    running = values.cumsum(0)
    first = copy_start[:-1].long()
    before = torch.where(first > 0, running[(first - 1).clamp(min=0)], 0)
    return running - repeat_by_copy(before, copy_start, values.numel())


def repeat_by_copy(values: torch.Tensor, copy_start: torch.Tensor, n_copies: int) -> torch.Tensor:
    """Repeat each expert's value for its copies, ``[..., n_logical]`` to ``[..., n_copies]``."""
    return values.repeat_interleave(copy_start.diff().long(), dim=-1, output_size=n_copies)


def compute_rounding_offsets(rank: int, n_logical: int) -> torch.Tensor:
    """Compute offsets that make the rounding of many ranks cancel (equation 13).

    Parameters
    ----------
    rank : int
        This rank's number in the EP group.
    n_logical : int
        Number of logical experts.

    Returns
    -------
    torch.Tensor
        ``[n_logical]`` int64 in [0, 2**24), on the CPU.
    """
    expert = torch.arange(n_logical, dtype=torch.int64, device="cpu")
    return (rank * OFFSET_BY_RANK + expert * OFFSET_BY_EXPERT + SHARE_ONE // 2) % SHARE_ONE


def copy_quotas(
    counts: torch.Tensor, cumulative: torch.Tensor, copy_start: torch.Tensor, rank: int
) -> torch.Tensor:
    """Compute the tokens that each copy gets from this rank (equation 12).

    Parameters
    ----------
    counts : torch.Tensor
        ``[n_logical]`` int, this rank's tokens per expert.
    cumulative : torch.Tensor
        ``[n_physical]`` int32, see `cumulative_shares`.
    copy_start : torch.Tensor
        ``[n_logical + 1]`` int32.
    rank : int
        This rank's number in the EP group.

    Returns
    -------
    torch.Tensor
        ``[n_physical]`` int64, by copy (expert-major); each expert's quotas sum to its count.
    """
    offsets = compute_rounding_offsets(rank, counts.numel()).to(counts.device)
    return split_counts(counts, cumulative, copy_start, offsets)


def split_counts(
    counts: torch.Tensor,
    cumulative: torch.Tensor,
    copy_start: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """Compute the tokens that each copy gets from many ranks at once (equation 12).

    Parameters
    ----------
    counts : torch.Tensor
        ``[..., n_logical]`` int, tokens of each rank per expert.
    cumulative, copy_start : torch.Tensor
        As for `copy_quotas`.
    offsets : torch.Tensor
        ``[..., n_logical]`` int64, see `compute_rounding_offsets`.

    Returns
    -------
    torch.Tensor
        ``[..., n_physical]`` int64, as `copy_quotas` has them for each rank.
    """
    n_copies = cumulative.numel()
    per_copy = repeat_by_copy(counts.long(), copy_start, n_copies)
    theta = repeat_by_copy(offsets, copy_start, n_copies)
    ends = (per_copy * cumulative.long() + theta) >> SHARE_BITS
    starts = ends.roll(1, -1)
    starts[..., copy_start[:-1].long()] = 0
    return ends - starts


def assign_copies(
    idx: torch.Tensor,
    counts: torch.Tensor,
    cumulative: torch.Tensor,
    copy_start: torch.Tensor,
    copy_slot: torch.Tensor,
    rank: int,
) -> torch.Tensor:
    """Rewrite logical into physical ids by exact quotas, copies spread over the batch.

    Parameters
    ----------
    idx : torch.Tensor
        int, any shape; ids in [-1, n_logical), -1 stays -1.
    counts, cumulative, copy_start, rank
        As for `copy_quotas`; ``counts`` must be the counts of ``idx``.
    copy_slot : torch.Tensor
        ``[n_physical]`` int32, slot of each copy.

    Returns
    -------
    torch.Tensor
        Physical ids, shape and dtype of ``idx``.
    """
    flat = idx.reshape(-1).long()
    out = torch.full_like(flat, -1)
    where = torch.nonzero(flat >= 0).flatten()
    expert = flat[where]
    # Position of each token among the tokens of its expert, in batch order.
    by_expert = torch.argsort(expert, stable=True)
    counts = counts.long()
    first = counts.cumsum(0) - counts
    position = torch.empty_like(expert)
    position[by_expert] = (
        torch.arange(expert.numel(), device=flat.device) - first[expert[by_expert]]
    )
    ends = copy_quotas(counts, cumulative, copy_start, rank).cumsum(0)
    ends = torch.nn.functional.pad(ends, (1, 0))

    # Equation 14 halves the range of copies, and each time deals its tokens out evenly.
    low = copy_start.long()[expert]
    high = copy_start.long()[expert + 1] - 1
    while bool((low < high).any()):
        inner = low < high
        middle = (low + high) // 2
        size = ends[high + 1] - ends[low]
        quota = ends[middle + 1] - ends[low]
        scaled = position * quota + size // 2
        taken = scaled // size.clamp(min=1)
        left = inner & (scaled - taken * size + quota >= size)
        right = inner & ~left
        position = torch.where(left, taken, torch.where(right, position - taken, position))
        high = torch.where(left, middle, high)
        low = torch.where(right, middle + 1, low)
    out[where] = copy_slot.long()[low]
    return out.reshape(idx.shape).to(idx.dtype)


def check_counts_of(name: str, idx: torch.Tensor, counts: torch.Tensor) -> None:
    """Raise a ValueError unless ``counts`` are those of ``idx``; waits for the device."""
    found = torch.bincount(idx[idx >= 0].long(), minlength=counts.numel())
    if not torch.equal(found, counts.long()):
        raise ValueError(f"{name} must end with the counts of idx")


def check_cumulative(
    counts: torch.Tensor, cumulative: torch.Tensor, copy_start: torch.Tensor, rank: int
) -> None:
    """Raise a ValueError unless these shares assign all tokens; waits for the device.

    Arguments as for `copy_quotas`. Shares of a rank's exact quotas (equation 17) may end below
    2**24.
    """
    first = copy_start[:-1].long()
    parts = cumulative.diff(prepend=cumulative.new_zeros(1))
    parts[first] = cumulative[first]
    bad = (parts < 0).any() | (cumulative > SHARE_ONE).any()
    quotas = copy_quotas(counts, cumulative, copy_start, rank)
    given = sum_by_expert(quotas, copy_start)[copy_start[1:].long() - 1]
    if bool(bad | (given != counts).any()):
        raise ValueError(
            "cumulative must rise from 0 or more to 2**24 over the copies of each expert"
        )
