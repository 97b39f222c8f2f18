"""A batch of a placement's counts, solved by the interior-point kernel in a launch of its own."""

from __future__ import annotations

import torch

from lplb_triton.placement import Placement
from lplb_triton.solution import Solution

__all__ = ["solve_counts"]

# Tokens of a copy are whole multiples of 2**-20, which sum to the same in any order.
TOKEN_BITS = 20


def solve_counts(
    counts: torch.Tensor,
    placement: Placement,
    tables: dict[str, torch.Tensor],
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Solve every group for ``counts`` [n_logical] int32, without a wait for the device.

    The programs are those of `Placement.problem`, from tables that are on the device already, so
    that a CUDA graph can capture this and use another placement from its next replay on. All sums
    are exact: every rank comes to the same plan, in whatever order its GPU adds. A negative count
    makes its group invalid.

    Parameters
    ----------
    counts : torch.Tensor
        On the device of the tables.
    placement : Placement
        Only its sizes matter.
    tables : dict
        `lplb_triton._backends.tables.DeviceTables.views` with those of the interior-point kernel.
    tolerance, max_iterations
        As for `lplb_triton.solve`.

    Returns
    -------
    Solution
        In float32.
    """
    from lplb_triton import kernels

    p = placement
    loads = counts.double().masked_fill(counts < 0, torch.inf)
    n_columns = p.n_group * p.max_columns
    folded = torch.zeros(p.ep_size + n_columns, dtype=torch.float64, device=counts.device)
    folded.index_add_(0, tables["fold_target"], loads)
    fixed = folded[: p.ep_size].float().reshape(p.n_group, p.group_size)
    weights = folded[p.ep_size :].float().reshape(p.n_group, p.max_columns)
    results = kernels.solve(
        weights, fixed, tables["mask"], _even_over_copies(counts, p, tables),
        tolerance, max_iterations,
    )  # fmt: skip
    return Solution(*results, tolerance)


def _even_over_copies(
    counts: torch.Tensor, placement: Placement, tables: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Shares of columns if every expert is split evenly over its copies, 0 without tokens.

    ``[n_group, group_size, max_columns]`` float32, a plan that the answer must not be worse than.
    """
    p = placement
    per_copy = (counts.long().clamp(min=0) << TOKEN_BITS) // tables["n_copies"]
    # The last place is for copies that are in no cell.
    tokens = torch.zeros(p.ep_size * p.max_columns + 1, dtype=torch.int64, device=counts.device)
    tokens.index_add_(0, tables["copy_target"], per_copy[tables["copy_expert"]])
    by_cell = tokens[:-1].reshape(p.n_group, p.group_size, p.max_columns)
    total = by_cell.sum(1, keepdim=True).clamp(min=1)
    return (by_cell.double() / total.double()).float()
