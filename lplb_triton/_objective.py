"""The objective of a balancer: its arguments, and the predicted times of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lplb_triton._checks import check_choice
from lplb_triton._layout import TIME_MOST_RANKS, TIME_MOST_SLOTS
from lplb_triton.costs import TimeCost
from lplb_triton.placement import Placement

__all__ = ["OBJECTIVES", "PlanTimes", "choose_margin", "read_times", "resolve_cost"]

OBJECTIVES = ("tokens", "time")
# Rows by which tiles end early where every rank rounds its own quotas: a copy's rows over all ranks
# differ from its share then, and a few more would open another tile.
LOCAL_MARGIN = 4


class PlanTimes(NamedTuple):
    """Predicted times of one batch; tensors on the device, ``[n_group]`` each.

    Times are those of the group's slowest rank, in microseconds, by the balancer's `TimeCost`.
    """

    tokens: torch.Tensor
    """float32: the time of the token plan, which ``objective="tokens"`` would have used."""
    plan: torch.Tensor
    """float32: the time of the plan in use; above ``tokens`` by 1% at most."""
    smoothed_tokens: torch.Tensor
    """float32: as ``tokens``, by the smoothed table, by which plans are compared."""
    smoothed_plan: torch.Tensor
    """float32: as ``plan``, by the smoothed table."""
    choice: torch.Tensor
    """int64: which plan is in use. 0 is the token plan, 1 the even split, 2 experts at home, and
    3 to 6 what moves have made of the token plan, balanced homes, the token plan without small
    copies, and the even split."""


def resolve_cost(placement: Placement, objective: str, cost: TimeCost | None) -> TimeCost | None:
    """Check a balancer's objective and cost; None for ``objective="tokens"``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.
    """
    check_choice("objective", objective, OBJECTIVES)
    if objective == "tokens":
        if cost is not None:
            raise ValueError("cost needs objective='time'")
        return None
    if cost is None:
        raise ValueError(
            "objective='time' needs a cost: TimeCost.for_model(hidden, inner), or one that "
            "lplb-bench calibrate has measured"
        )
    if not isinstance(cost, TimeCost):
        raise TypeError(f"cost must be a TimeCost, got {type(cost).__name__}")
    if placement.live_per_rank:
        raise ValueError("objective='time' doesn't go with live slots, which are filled by tokens")
    if placement.slots_per_rank > cost.most_active:
        raise ValueError(
            f"cost must be for at least the {placement.slots_per_rank} slots of a rank, got one "
            f"for {cost.most_active}: see most_active of TimeCost.for_model"
        )
    if placement.group_size > TIME_MOST_RANKS or placement.slots_per_rank > TIME_MOST_SLOTS:
        raise ValueError(
            f"objective='time' takes up to {TIME_MOST_RANKS} ranks in a group and "
            f"{TIME_MOST_SLOTS} slots a rank, got {placement.group_size} and "
            f"{placement.slots_per_rank}"
        )
    return cost


def choose_margin(quotas: str) -> int:
    """Return the rows by which tiles end early: some, where ranks round their own quotas."""
    return LOCAL_MARGIN if quotas == "local" else 0


def read_times(times: torch.Tensor) -> PlanTimes:
    """Make the times of what a back end has written, ``[n_group, 5]`` float32."""
    tokens, plan, smoothed_tokens, smoothed_plan, choice = times.clone().unbind(1)
    return PlanTimes(tokens, plan, smoothed_tokens, smoothed_plan, choice.long())
