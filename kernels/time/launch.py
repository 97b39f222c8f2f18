"""What launchers need of plans by time, and the launcher of the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from lplb_triton import _layout
from lplb_triton.kernels.lanes import MOST_SLICES, WARP, cut_slices
from lplb_triton.kernels.launch import KernelCall, launch_call, supports_pdl
from lplb_triton.kernels.time.kernel import plan_time_kernel

# Slots that are handled at once, at most.
MOST_SLOTS_AT_ONCE = 1024


class TimeTables(NamedTuple):
    """Device tables of a placement for plans by time, int32; see `plan_time_kernel`."""

    time_cells: torch.Tensor
    """[n_group, N_TIME_FIELDS, n_places, n_ranks]"""
    time_lists: torch.Tensor
    """[n_group, n_places n_ranks]"""
    time_steps: torch.Tensor
    """[n_group, 2, most_steps, n_ranks]"""
    time_extents: torch.Tensor
    """[n_group, N_TIME_EXTENTS]"""


class TimeRules(NamedTuple):
    """The cost of a rank on the device, and its sizes."""

    table: torch.Tensor
    """[2, 2, slots of a rank and one, tiles] float32: times, and smoothed ones."""
    slopes: torch.Tensor
    """[3] float32: what a further narrow tile, wide tile, and a row add."""
    sides: tuple[int, int]
    """Rows of a tile, powers of two."""
    wide_from: int
    margin: int
    """Rows by which tiles end early."""


class TimePlan(NamedTuple):
    """All that a plan by time takes besides counts and the shares of the token plan."""

    tables: TimeTables
    rules: TimeRules
    plans: torch.Tensor
    """[n_group, TIME_PLANS, slots of a group] int32, scratch."""
    times: torch.Tensor
    """[n_group, TIME_REPORTED] float32, is written."""


def plan_time_call(
    counts: torch.Tensor, cumulative: torch.Tensor, status: torch.Tensor, plan: TimePlan
) -> KernelCall:
    """Prepare `plan_time`."""
    tables, rules = plan.tables, plan.rules
    n_group, _, n_places, n_ranks = tables.time_cells.shape
    args = (
        counts, cumulative, status, *tables, rules.table, rules.slopes, plan.plans, plan.times,
        n_ranks, n_places, rules.wide_from,
    )  # fmt: skip
    ranks = max(WARP, triton.next_power_of_2(n_ranks))
    slots = triton.next_power_of_2(n_places * n_ranks)
    narrow, wide = (side.bit_length() - 1 for side in rules.sides)
    constants = (
        tables.time_steps.shape[2], *cut_slices(ranks),
        min(MOST_SLOTS_AT_ONCE, max(128, slots)), rules.margin, narrow, wide,
        *rules.table.shape[2:], supports_pdl(counts.device),
    )  # fmt: skip
    return KernelCall(plan_time_kernel, n_group, args, constants, make_options(ranks))


def make_options(ranks: int) -> dict[str, int | bool]:
    """Return compile options: a warp for each candidate, or two, and no fused multiply-add.

    Both ends of an edge compute the same times, and must round them alike.
    """
    warps = _layout.TIME_CANDIDATES * (1 if ranks <= MOST_SLICES * WARP else 2)
    return {"num_warps": warps, "enable_fp_fusion": False, "num_stages": 1}


def plan_time(
    counts: torch.Tensor, cumulative: torch.Tensor, status: torch.Tensor, plan: TimePlan
) -> None:
    """Plan a batch by time, for given shares of the token plan.

    ``counts`` [n_logical] int32, ``cumulative`` [n_copies] int32, whose shares are replaced,
    ``status`` [n_group] int32 of the solve. Writes ``plan.times`` and ``plan.plans``.
    """
    launch_call(plan_time_call(counts, cumulative, status, plan))
