"""Checks of loads, rounding of shares and certificates of plans, for both torch solvers.

Equation numbers refer to docs/method.md. ``B`` is the number of instances, ``G`` the number of
ranks and ``C`` the number of columns.
"""

from __future__ import annotations

import torch

from lplb_triton.problem import Problem
from lplb_triton.solution import SHARE_BITS, Solution, Status

__all__ = [
    "LEAST_TARGET_FRACTION",
    "FINE_BITS",
    "TARGET_FRACTION",
    "certify",
    "check_loads",
    "choose_aimed_gap",
    "choose_bound_allowance",
    "make_plan",
    "quantize_shares",
]

# The aimed gap is this fraction of the tolerance, or less where rounding may cost much, but not
# less than the second fraction.
TARGET_FRACTION = 0.98
LEAST_TARGET_FRACTION = 0.75
# Fractions of a bound that are taken off for its round-off; they are more than that can be.
BOUND_ALLOWANCE_FLOAT32 = 2.0**-20
BOUND_ALLOWANCE_FLOAT64 = 2.0**-46
# Running sums of shares are of fine units, 2**-36, before they are rounded to units of 2**-24:
# 2**FINE_BITS of them are a unit.
FINE_BITS = 12


def check_loads(
    problem: Problem, n_copies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the loads of a problem in float64, 0 in instances that have no answer.

    These are instances with a load that is negative or not finite, or a weight without a copy.

    Parameters
    ----------
    problem : Problem
        The instances.
    n_copies : torch.Tensor
        ``[B, C]`` or ``[1, C]`` int, ranks that hold each column.

    Returns
    -------
    weights, fixed : torch.Tensor
        ``[B, C]`` and ``[B, G]``.
    unit : torch.Tensor
        ``[B, 1]``, mean load of a rank; 1 where there is no load.
    invalid : torch.Tensor
        ``[B]`` bool.
    """
    weights, fixed = problem.weights.double(), problem.fixed.double()
    invalid = (
        ~(torch.isfinite(weights) & (weights >= 0)).all(1)
        | ~(torch.isfinite(fixed) & (fixed >= 0)).all(1)
        | ~torch.isfinite(weights.sum(1) + fixed.sum(1))
        | ((weights > 0) & (n_copies == 0)).any(1)
    )
    weights = torch.where(invalid[:, None], 0.0, weights)
    fixed = torch.where(invalid[:, None], 0.0, fixed)
    total = weights.sum(1) + fixed.sum(1)
    unit = torch.where(total > 0, total / fixed.shape[1], 1.0)[:, None]
    return weights, fixed, unit, invalid


def make_plan(shares: torch.Tensor, mask: torch.Tensor, even: torch.Tensor) -> torch.Tensor:
    """Make a plan of any numbers ``[B, G, C]``: shares that sum to 1 per column, else even ones."""
    shares = torch.where(mask & (shares > 0), shares.to(even.dtype), 0.0).clamp(max=1.0)
    total = shares.sum(1, keepdim=True)
    return torch.where(total > 0, shares / total.clamp(min=1e-30), even)


def choose_aimed_gap(target: float, ranks: int) -> float:
    """Choose the gap to aim at, so that rounding by at most ``ranks`` units keeps ``target``."""
    rounded = target - ranks / (1 << SHARE_BITS)
    return max(min(TARGET_FRACTION * target, rounded), LEAST_TARGET_FRACTION * target)


def choose_bound_allowance(dtype: torch.dtype) -> float:
    """Return the fraction of a bound that is taken off for the round-off of its sums."""
    return BOUND_ALLOWANCE_FLOAT32 if dtype == torch.float32 else BOUND_ALLOWANCE_FLOAT64


def quantize_shares(shares: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Round shares to multiples of 2**-24 that add up to exactly 1 (equation 11).

    Running sums over a column are rounded, so each share is off by less than one unit.

    Parameters
    ----------
    shares : torch.Tensor
        ``[..., G, C]`` float, non-negative, about 1 in sum over G where a column has a copy.
    mask : torch.Tensor
        ``[..., G, C]`` bool, where a copy is.

    Returns
    -------
    torch.Tensor
        ``[..., G, C]`` int64 units of 2**-24; each column with a copy sums to 2**24.
    """
    # Sums of integers are exact and the same on every device.
    fine_one = 1 << (SHARE_BITS + FINE_BITS)
    fine = torch.where(mask, torch.round(shares.double() * fine_one), 0.0).long()
    running = fine.cumsum(-2)
    total = running[..., -1:, :].clamp(min=1)
    running = ((running << SHARE_BITS) + total // 2) // total
    return torch.diff(running, dim=-2, prepend=torch.zeros_like(running[..., :1, :]))


def certify(
    plan: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    fixed: torch.Tensor,
    bound: torch.Tensor,
    iterations: torch.Tensor,
    invalid: torch.Tensor,
    tolerance: float,
) -> Solution:
    """Round plans (equation 11) and judge the rounded plans by bounds (equation 3), in float64.

    Parameters
    ----------
    plan : torch.Tensor
        ``[B, G, C]`` float, shares, about 1 in sum over G where a column has a copy.
    mask : torch.Tensor
        ``[B, G, C]`` bool, where a copy is.
    weights, fixed : torch.Tensor
        ``[B, C]`` and ``[B, G]`` float64, 0 in invalid instances.
    bound : torch.Tensor
        ``[B]`` float64, a load that no plan can beat, in the unit of the weights.
    iterations : torch.Tensor
        ``[B]`` int32.
    invalid : torch.Tensor
        ``[B]`` bool.
    tolerance : float
        Relative gap that was asked for.

    Returns
    -------
    Solution
    """
    units = quantize_shares(plan, mask)
    shares = units.double() / (1 << SHARE_BITS)
    max_load = (fixed + (weights.unsqueeze(1) * shares).sum(2)).amax(1)
    lower = torch.minimum(bound, max_load)
    gap = torch.where(max_load > 0, (max_load - lower) / max_load.clamp(min=1e-300), 0.0)
    status = torch.where(gap <= tolerance, int(Status.CERTIFIED), int(Status.GAP))
    return Solution(
        shares=shares.float(),
        max_load=max_load.masked_fill(invalid, torch.inf),
        lower_bound=lower.masked_fill(invalid, 0.0),
        gap=gap.masked_fill(invalid, torch.inf),
        iterations=iterations.masked_fill(invalid, 0),
        status=status.masked_fill(invalid, int(Status.INVALID)).int(),
        tolerance=tolerance,
    )
