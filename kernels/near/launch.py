"""What launchers need of plans that keep tokens near, and the launcher of the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from lplb_triton import _layout
from lplb_triton.kernels.lanes import MOST_SLICES, WARP, cut_slices
from lplb_triton.kernels.launch import KernelCall, launch_call, supports_pdl
from lplb_triton.kernels.near.kernel import plan_near_kernel

# The fewest cells that are handled at once.
LEAST_CELLS = 128


class NearTables(NamedTuple):
    """Device tables of a placement for near plans, int32; see `plan_near_kernel`."""

    near_cells: torch.Tensor
    """[n_group, N_NEAR_FIELDS, most_cells]"""
    near_lone: torch.Tensor
    """[n_group, n_places, n_ranks]"""
    near_ranks: torch.Tensor
    """[n_group, n_ranks]"""
    near_steps: torch.Tensor
    """[n_group, 2, most_steps, n_ranks]"""
    near_extents: torch.Tensor
    """[n_group, N_NEAR_EXTENTS]"""


class NearPlan(NamedTuple):
    """All that a near plan takes besides counts and the token plan."""

    tables: NearTables
    scratch: torch.Tensor
    """[n_group, NEAR_ROWS, slots of a group] int32."""
    numbers: torch.Tensor
    """[n_group, NEAR_REPORTED] float32, is written."""
    slack: float
    """The part by which the largest load may be above the bound."""
    ranks_per_node: int


def plan_near_call(
    gathered: torch.Tensor,
    counts: torch.Tensor,
    cumulative: torch.Tensor,
    stats: torch.Tensor,
    status: torch.Tensor,
    plan: NearPlan,
) -> KernelCall:
    """Prepare `plan_near`."""
    tables = plan.tables
    n_group, n_places, n_ranks = tables.near_lone.shape
    most_cells = tables.near_cells.shape[2]
    args = (
        gathered, counts, cumulative, stats, status, *tables, plan.scratch, plan.numbers,
        1.0 + plan.slack, n_ranks, n_places, most_cells, *gathered.shape, plan.ranks_per_node,
    )  # fmt: skip
    ranks = max(WARP, triton.next_power_of_2(n_ranks))
    block = max(LEAST_CELLS, triton.next_power_of_2(most_cells))
    constants = (
        tables.near_steps.shape[2], *cut_slices(ranks), block, supports_pdl(counts.device),
    )  # fmt: skip
    return KernelCall(plan_near_kernel, n_group, args, constants, make_options(ranks))


def make_options(ranks: int) -> dict[str, int | bool]:
    """Return compile options: a warp for each candidate, or two, and no fused multiply-add.

    There are never more lanes than ranks of all candidates: a cell is one thread's alone.
    """
    warps = _layout.NEAR_CANDIDATES * (1 if ranks <= MOST_SLICES * WARP else 2)
    return {"num_warps": warps, "enable_fp_fusion": False, "num_stages": 1}


def plan_near(
    gathered: torch.Tensor,
    counts: torch.Tensor,
    cumulative: torch.Tensor,
    stats: torch.Tensor,
    status: torch.Tensor,
    plan: NearPlan,
) -> None:
    """Plan a batch near its tokens, for given shares of the token plan.

    ``gathered`` [ranks, n_logical] int32 and their sums ``counts`` [n_logical] int32,
    ``cumulative`` [n_copies] int32, whose shares are replaced, ``stats`` [3, n_group] float32 of
    the solve (largest load, lower bound, gap), whose first and last are, and ``status`` [n_group]
    int32. Writes ``plan.numbers`` and ``plan.scratch``.
    """
    launch_call(plan_near_call(gathered, counts, cumulative, stats, status, plan))
