"""Traffic between nodes: what a placement makes tokens travel, and arguments about it.

A token leaves its node for an expert that has no copy there. With the part `d[e, n]` of all tokens
that the ranks of node n send to expert e, the least part that any plan sends to other nodes is the
sum of d[e, n] over experts e and nodes n without a copy of e.

Plans that level the loads send more. How many, two linear programs say
(`lplb_triton.placement.near_plans`), too slow for every change of a search. The search counts an
excess instead: if every token whose expert has a copy in its node, or one copy only, goes there,
some ranks get more than the mean load, and a part of that has to move to other nodes. Tokens whose
expert has several copies, none of them near, are free to fill the other ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton._checks import check_integer, check_number, nearest_divisors, would_do

if TYPE_CHECKING:
    from lplb_triton.placement.placement import Placement

__all__ = [
    "DEFAULT_TRAFFIC_PRICE",
    "MOVED_PER_EXCESS",
    "DeviceTraffic",
    "TrafficPrice",
    "assign_groups",
    "average_demand",
    "check_nodes",
    "find_ranks_outside",
    "sum_by_node",
]

_Double = NDArray[np.float64]
_Bool = NDArray[np.bool_]
_Int = NDArray[np.int64]

# Tokens of load that a token sent to another node is worth, if the caller names no price, and at
# most. More would make no other placement, and loads would vanish beside it in float32.
DEFAULT_TRAFFIC_PRICE, MOST_TRAFFIC_PRICE = 1.0, 1e6
# A node may exceed the mean load of the nodes by this part of it for tokens that are all near
# there and nowhere else, if the price is 1.
NODE_TOLERANCE = 0.1
# Smallest gain for which two groups change places, times the price where that is above 1: smaller
# gains may be rounding, by which groups would change places for ever.
MIN_GAIN = 1e-9
# Tokens that a search counts as leaving their node for each bound token beyond the mean load of its
# rank. More would make it drop copies that keep tokens near, which lowers the excess as well.
MOVED_PER_EXCESS = 0.5


@dataclass(frozen=True, eq=False)
class TrafficPrice:
    """What tokens cost that leave their node.

    Attributes
    ----------
    demand
        ``[n_logical, nodes]`` float64, part of all tokens that the ranks of a node send to an
        expert, in the mean over batches; the sum is 1.
    price
        Tokens of load on the most loaded rank that one token per rank, sent to another node, is
        worth. A placement costs the mean of the optima, in mean rank loads, plus this number times
        the part of the tokens that leave their node.
    ranks_per_node
        Consecutive ranks of a node.
    """

    demand: _Double
    price: float
    ranks_per_node: int

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return int(self.demand.shape[1])

    def count_by_node(self, copies: NDArray[np.generic]) -> _Int:
        """Count the copies ``[n_logical, ranks]`` of each node, ``[n_logical, nodes]``."""
        by_node = copies.reshape(len(copies), self.n_nodes, self.ranks_per_node)
        return np.asarray(by_node.sum(2, dtype=np.int64))

    def bind_tokens(self, copies: NDArray[np.generic], experts: _Int | slice) -> _Double:
        """Return the part of an expert's tokens that is bound to each rank, ``[n, ranks]``.

        Bound are tokens whose expert has copies in their node, evenly to these, and those whose
        expert has one copy only. ``copies`` ``[n, ranks]`` are those of the ``experts``.
        """
        demand, by_node = self.demand[experts], self.count_by_node(copies)
        total = demand.sum(1, keepdims=True)
        share = np.where(total > 0, demand / np.where(total > 0, total, 1.0), 1.0 / self.n_nodes)
        single = by_node.sum(1, keepdims=True) == 1
        bound = np.where(single, by_node, np.where(by_node > 0, share, 0.0))
        per_copy = np.repeat(bound / np.maximum(by_node, 1), self.ranks_per_node, axis=1)
        return np.asarray(per_copy * np.asarray(copies, dtype=np.float64))

    def price_copies(self, copies: NDArray[np.generic], bound: NDArray[np.floating]) -> float:
        """Price the tokens that leave their node, for copies ``[n_logical, ranks]``.

        ``bound`` ``[batches, ranks]`` are the loads of bound tokens, in mean rank loads.
        """
        lacking = self.demand[self.count_by_node(copies) == 0].sum()
        excess = np.maximum(bound - 1.0, 0.0).mean() if bound.size else 0.0
        return self.price * float(lacking + MOVED_PER_EXCESS * excess)


class DeviceTraffic:
    """`TrafficPrice` for many placements at once, on a device.

    Notation: E experts, G ranks, N nodes, S slots, K placements, b batches.
    """

    def __init__(self, traffic: TrafficPrice, device: torch.device) -> None:
        self.price, self.ranks_per_node = traffic.price, traffic.ranks_per_node
        self.demand = torch.from_numpy(traffic.demand).float().to(device)  # [E, N]
        total = self.demand.sum(1, keepdim=True)
        # Without tokens the share doesn't matter.
        self.share = self.demand / torch.where(total > 0, total, 1.0)

    def count_by_node(self, copies: torch.Tensor) -> torch.Tensor:
        """Count copies ``[..., G]`` by node, ``[..., N]``."""
        return copies.reshape(*copies.shape[:-1], -1, self.ranks_per_node).sum(-1)

    def price_copies(self, copies: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
        """Do what `TrafficPrice.price_copies` does, for ``[K, E, G]`` and batches ``[b, E]``."""
        by_node = self.count_by_node(copies)
        lacking = (self.demand * (by_node == 0)).sum((1, 2))
        single = by_node.sum(2, keepdim=True) == 1
        part = torch.where(single, by_node, self.share * (by_node > 0)) / by_node.clamp(min=1)
        per_copy = part.repeat_interleave(self.ranks_per_node, 2)
        excess = (load.float() @ (per_copy * copies) - 1).clamp(min=0).mean((1, 2))
        return self.price * (lacking + MOVED_PER_EXCESS * excess)

    def price_leaving(
        self, copies: torch.Tensor, expert: torch.Tensor, rank: torch.Tensor
    ) -> torch.Tensor:
        """Price the tokens without a copy in their node if a slot's copy moves to a rank, [S, G].

        It is one half of a swap, to first order.
        """
        by_node, node = self.count_by_node(copies), rank // self.ranks_per_node
        to_node = self.demand * (by_node == 0)
        lost = torch.where(by_node[expert, node] == 1, self.demand[expert, node], 0.0)
        change = (lost.unsqueeze(1) - to_node[expert]).repeat_interleave(self.ranks_per_node, 1)
        to = torch.arange(copies.shape[1], device=copies.device) // self.ranks_per_node
        return self.price * change.masked_fill(to == node.unsqueeze(1), 0.0)

    def price_giving(
        self, copies: torch.Tensor, expert: torch.Tensor, rank: torch.Tensor
    ) -> torch.Tensor:
        """Price the tokens without a copy in their node if a slot is given to an expert, [E, S]."""
        by_node, node = self.count_by_node(copies), rank // self.ranks_per_node
        lost = torch.where(by_node[expert, node] == 1, self.demand[expert, node], 0.0)
        return self.price * (lost - (self.demand * (by_node == 0))[:, node])


def check_nodes(
    ep_size: int,
    ranks_per_node: object,
    traffic_price: object,
    ranks_per_domain: object,
    num_groups: object,
    n_logical: int,
) -> tuple[int, float, int | None] | None:
    """Return ranks of a node, price and groups, or None without nodes; raise naming the argument.

    Only what has been given is checked, and ``ep_size`` must have been.
    """
    if ranks_per_node is None:
        for name, value in (("traffic_price", traffic_price), ("num_groups", num_groups)):
            if value is not None:
                raise ValueError(f"{name} needs ranks_per_node, the ranks of a node")
        return None
    size = check_integer("ranks_per_node", ranks_per_node)
    if ep_size % size:
        raise ValueError(
            f"ranks_per_node must divide the {ep_size} ranks, got {size}"
            f"{would_do(nearest_divisors(ep_size, size))}"
        )
    if ranks_per_domain is not None:
        raise ValueError(
            "ranks_per_node can't be combined with ranks_per_domain, which keeps all copies of an "
            "expert in one domain; num_groups keeps them in one node"
        )
    price = DEFAULT_TRAFFIC_PRICE
    if traffic_price is not None:
        price = check_number("traffic_price", traffic_price, MOST_TRAFFIC_PRICE)
    if num_groups is None:
        return size, price, None
    groups, n_nodes = check_integer("num_groups", num_groups), ep_size // size
    if n_logical % groups or groups % n_nodes:
        raise ValueError(
            f"num_groups must divide the {n_logical} experts and be a multiple of the {n_nodes} "
            f"nodes, got {groups}"
        )
    return size, price, groups


def sum_by_node(name: str, load: torch.Tensor, rows: _Double, n_nodes: int) -> _Double:
    """Add up the loads of the sources of each node, ``[batches, nodes, n_logical]``.

    ``load`` is ``[batches, sources, n_logical]`` and ``rows`` its values as
    ``[batches * sources, n_logical]``. Each batch is divided by a power of two, so that sums
    don't overflow.
    """
    batches, sources, n_logical = load.shape
    if sources % n_nodes:
        raise ValueError(
            f"{name} must have a multiple of {n_nodes} sources, the nodes of the group, in its "
            f"second dimension, got {sources}"
        )
    by_batch = rows.reshape(batches, -1)
    _, exponent = np.frexp(by_batch.max(1, keepdims=True))
    scaled = np.ldexp(by_batch, -exponent)
    summed: _Double = scaled.reshape(batches, n_nodes, sources // n_nodes, n_logical).sum(2)
    return summed


def average_demand(totals: _Double, by_node: _Double | None, n_nodes: int) -> _Double:
    """Average the parts of batches that nodes send to experts, ``[n_logical, nodes]``.

    Without loads by node (``[batches, nodes, n_logical]``) all nodes send the same part of the
    ``totals`` ``[batches, n_logical]``. Without any load all experts get equally many tokens.
    """
    if by_node is None:
        by_node = np.repeat(totals[:, None] / n_nodes, n_nodes, axis=1)
    by_node = by_node[by_node.sum((1, 2)) > 0]
    if not len(by_node):
        by_node = np.ones((1, n_nodes, totals.shape[1]))
    demand: _Double = (by_node / by_node.sum((1, 2), keepdims=True)).mean(0).T
    return np.ascontiguousarray(demand / demand.sum())


def assign_groups(traffic: TrafficPrice, num_groups: int) -> _Int:
    """Choose a node for each group of consecutive experts, ``[num_groups]``.

    Every node gets as many groups, heaviest first, by `choose_node`. Then two groups change places
    as long as that helps.
    """
    demand = traffic.demand.reshape(num_groups, -1, traffic.n_nodes).sum(1)
    weight = demand.sum(1)
    left = np.full(traffic.n_nodes, num_groups // traffic.n_nodes)
    load = np.zeros(traffic.n_nodes)
    node = np.zeros(num_groups, dtype=np.int64)
    for group in np.argsort(-weight, kind="stable"):
        node[group] = choose_node(demand[group], load, left > 0, traffic.price)
        load[node[group]] += weight[group]
        left[node[group]] -= 1
    unit = traffic.n_nodes / NODE_TOLERANCE
    while True:
        # [groups, groups] what it costs that one of two groups goes to the node of the other.
        near = demand[:, node]
        more = weight[None] - weight[:, None]
        gap = load[node][:, None] - load[node][None]
        loads = unit * more * (gap + more)
        change = loads - traffic.price * (
            near + near.T - near.diagonal()[:, None] - near.diagonal()
        )
        one, other = divmod(int(change.argmin()), num_groups)
        if change[one, other] >= -MIN_GAIN * max(1.0, traffic.price):
            return node
        moved = weight[other] - weight[one]
        load[node[one]] += moved
        load[node[other]] -= moved
        node[one], node[other] = node[other], node[one]


def find_ranks_outside(placement: Placement, num_groups: int) -> _Bool:
    """Find the ranks out of each expert's node, ``[n_logical, ranks]``.

    The LP groups of the placement are the nodes; raises naming ``previous`` unless each group of
    consecutive experts lies in one of them.
    """
    node_of = placement.structure.cell_group.reshape(num_groups, -1)
    if (node_of != node_of[:, :1]).any():
        raise ValueError("previous must have all experts of a group in one node, see num_groups")
    of_rank = np.arange(placement.ep_size) // placement.group_size
    return np.asarray(placement.structure.cell_group[:, None] != of_rank)


def choose_node(demand: _Double, load: _Double, allowed: _Bool, price: float) -> int:
    """Choose the node of tokens, ``demand`` of each node ``[nodes]``: least loaded, near them.

    ``load`` ``[nodes]`` is what the nodes have, in parts of all tokens.
    """
    nodes = len(demand)
    cost = demand.sum() * (load - load.mean()) * nodes / NODE_TOLERANCE - price * demand
    return int(np.where(allowed, cost, np.inf).argmin())
