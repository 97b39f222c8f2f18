"""Where a balancer's plans keep tokens: its arguments, and the traffic of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lplb_triton._checks import check_choice, check_integer, check_number
from lplb_triton._layout import NEAR_MOST_RANKS, NEAR_MOST_SLOTS, NEAR_REPORTED
from lplb_triton.placement import Placement

__all__ = [
    "DEFAULT_SLACK",
    "LOCALITIES",
    "Locality",
    "NodeTraffic",
    "explain_near_limits",
    "new_traffic_numbers",
    "read_node_traffic",
    "resolve_locality",
]

LOCALITIES = ("none", "node")
DEFAULT_SLACK = 0.01


class Locality(NamedTuple):
    """How plans keep tokens near; the same on every rank."""

    ranks_per_node: int | None
    """Consecutive ranks on a node; None for as many as the communicator finds."""
    slack: float | None
    """The part by which the largest load may be above the bound; None keeps the LP's plan."""


class NodeTraffic(NamedTuple):
    """Tokens of the last batch that leave their node; tensors on the device, ``[n_group]`` each.

    Tokens of all ranks, once for each of their experts, of experts with copies on several ranks.
    What is sent to experts on one rank only, no plan can change.
    """

    before: torch.Tensor
    """float32: tokens that leave their node by the LP's plan, with exact quotas."""
    after: torch.Tensor
    """float32: by the plan in use; never more than ``before``."""
    least: torch.Tensor
    """float32: by every plan of this placement, whatever its loads: tokens from nodes without a
    copy of their expert."""
    total: torch.Tensor
    """float32: all tokens of these experts."""
    max_load: torch.Tensor
    """float32: tokens on the most loaded rank by the plan in use, of all experts."""
    limit: torch.Tensor
    """float32: what that may be: the LP's largest load, or the bound with the slack if that is
    more."""
    choice: torch.Tensor
    """int64: which plan is in use. 0 is the LP's; 1 and 3 began near first, 2 and 4 with the LP's
    plan."""


def resolve_locality(
    placement: Placement,
    quotas: str,
    locality: str,
    ranks_per_node: int | None,
    slack: float,
    objective: str,
) -> Locality:
    """Check a balancer's locality, and the number of ranks on a node.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.
    """
    check_choice("locality", locality, LOCALITIES)
    if ranks_per_node is not None:
        ranks_per_node = check_integer("ranks_per_node", ranks_per_node)
        if quotas != "global":
            raise ValueError("ranks_per_node needs quotas='global'")
        if ranks_per_node > placement.ep_size:
            raise ValueError(
                f"ranks_per_node must be in [1, {placement.ep_size}], got {ranks_per_node}"
            )
    if locality == "none":
        if slack != DEFAULT_SLACK:
            raise ValueError("slack needs locality='node'")
        return Locality(ranks_per_node, None)
    if quotas != "global":
        raise ValueError(
            "locality='node' needs quotas='global', with which every rank knows whose tokens "
            "there are"
        )
    if ranks_per_node is None:
        raise ValueError("locality='node' needs ranks_per_node")
    if objective != "tokens":
        raise ValueError(f"locality='node' with objective={objective!r} is not there yet")
    if placement.live_per_rank:
        raise ValueError("locality='node' with live slots is not there yet")
    reason = explain_near_limits(placement.group_size, placement.slots_per_rank)
    if reason is not None:
        raise ValueError(reason)
    return Locality(ranks_per_node, check_number("slack", slack, most=1.0))


def explain_near_limits(group_size: int, slots_per_rank: int) -> str | None:
    """Say why ``locality="node"`` doesn't take such sizes; None if it does."""
    if group_size <= NEAR_MOST_RANKS and slots_per_rank <= NEAR_MOST_SLOTS:
        return None
    return (
        f"locality='node' takes up to {NEAR_MOST_RANKS} ranks in a group and {NEAR_MOST_SLOTS} "
        f"slots a rank, got {group_size} and {slots_per_rank}"
    )


def new_traffic_numbers(n_group: int, device: torch.device) -> torch.Tensor:
    """Return the memory that a back end writes `NodeTraffic` to, all 0."""
    return torch.zeros(n_group, NEAR_REPORTED, dtype=torch.float32, device=device)


def read_node_traffic(numbers: torch.Tensor) -> NodeTraffic:
    """Make the traffic of what a back end has written, ``[n_group, NEAR_REPORTED]`` float32."""
    *amounts, choice = numbers.clone().unbind(1)
    before, after, least, total, max_load, limit = amounts
    return NodeTraffic(before, after, least, total, max_load, limit, choice.long())
