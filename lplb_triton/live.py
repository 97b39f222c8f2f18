"""Live slots: the rules by which they are filled, and the plan of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lplb_triton._checks import check_flag, check_integer, check_number
from lplb_triton._layout import MAX_COUNT
from lplb_triton.placement import Placement

__all__ = ["LivePlan", "LiveRules", "make_rules", "read_experts", "read_plan"]

# Bounds of ``live_above``. A plan aims at half of what this allows above the mean.
LEAST_ABOVE, MOST_ABOVE = 1.0, 2.0
# Numbers of experts and slots that the plan takes.
MOST_SLOTS_PER_RANK = 1023


class LivePlan(NamedTuple):
    """What live slots hold in one batch; tensors on the device, which the next batch leaves alone.

    It is the same on every rank of the group, bit for bit.
    """

    experts: torch.Tensor
    """``[ep_size, live_per_rank]`` int32, logical expert of each live slot, -1 for none."""
    max_load: torch.Tensor
    """Scalar float32, tokens of the most loaded rank with these slots filled; too low by up to a
    unit for each static slot of a rank, where loads are counted in units of several tokens."""
    lower_bound: torch.Tensor
    """Scalar float32, a load that no plan with as many live slots can beat (method.md, 26)."""
    gap: torch.Tensor
    """Scalar float32, ``(max_load - lower_bound) / max_load``, called ``live_gap``."""


class LiveRules(NamedTuple):
    """When and how live slots are filled; see `lplb_triton.Balancer`."""

    above: float = 1.02
    cost: int = 0
    fanout: int = 0
    """0 for no limit."""
    domain: int = 0
    """Ranks of a domain, 0 for one domain."""
    resident: bool = False


def make_rules(
    placement: Placement,
    solver: str,
    above: float,
    cost: int,
    fanout: int | None,
    domain: int | None,
    resident: bool,
) -> LiveRules | None:
    """Check a balancer's arguments about live slots; None for a placement without them.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.
    """
    above = check_number("live_above", above)
    if not LEAST_ABOVE <= above <= MOST_ABOVE:
        raise ValueError(f"live_above must be in [{LEAST_ABOVE}, {MOST_ABOVE}], got {above}")
    cost = check_integer("live_cost", cost, 0)
    fanout = 0 if fanout is None else check_integer("live_fanout", fanout)
    domain = 0 if domain is None else check_integer("live_domain", domain)
    for name, value in (("live_cost", cost), ("live_fanout", fanout)):
        if value > MAX_COUNT:
            raise ValueError(f"{name} must be below 2**31, got {value}")
    rules = LiveRules(above, cost, fanout, domain, check_flag("live_resident", resident))
    if not placement.live_per_rank:
        if rules != LiveRules():
            raise ValueError(
                "live_above, live_cost, live_fanout, live_domain and live_resident need a "
                "placement with live slots: placement.with_live_slots(1)"
            )
        return None
    if solver != "levelling":
        raise ValueError(f"a placement with live slots needs solver='levelling', got {solver!r}")
    if domain and placement.ep_size % domain:
        raise ValueError(f"live_domain must divide ep_size {placement.ep_size}, got {domain}")
    if placement.static_per_rank > MOST_SLOTS_PER_RANK:
        raise ValueError(
            f"a placement with live slots must have at most {MOST_SLOTS_PER_RANK} other slots a "
            f"rank, got {placement.static_per_rank}"
        )
    return rules


def read_experts(out: torch.Tensor, ep_size: int, live_per_rank: int) -> torch.Tensor:
    """Return the experts of the plan that `read_plan` makes of ``out``, alone."""
    return out.as_strided((ep_size, live_per_rank), (live_per_rank, 1))


def read_plan(out: torch.Tensor, ep_size: int, live_per_rank: int) -> LivePlan:
    """Make the plan of what a back end has written, ``[ep_size * live_per_rank + 4]`` int32."""
    n_live = ep_size * live_per_rank
    numbers = out[n_live : n_live + 3].view(torch.float32)
    return LivePlan(read_experts(out, ep_size, live_per_rank), *numbers.unbind())
