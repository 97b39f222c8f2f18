"""Experts of all slots where tokens that leave their node have a price, by mean loads alone.

Copies are made one by one. Of all pairs of an expert and a node with a free slot, the next is that
with the largest load per copy plus price times the tokens that the copy keeps in its node. The rank
within the node is one of the least loaded, and of these the farthest from the expert's other copies
in the graph that copies make of the ranks: load can then flow between any two ranks over few
others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lplb_triton.placement.home import NEARLY_LEAST_LOAD
from lplb_triton.placement.nodes import TrafficPrice, choose_node

__all__ = ["choose_node_slots"]

# Nodes whose pair with an expert comes within this part of its load per copy of the best pair are
# equally good, and the rank decides.
NEARLY_BEST_PAIR = 0.05
# Smallest difference that counts between two loads per copy, in mean rank loads.
TIE = 1e-9


def choose_node_slots(
    traffic: TrafficPrice, ranks: int, spare: int, *, keep_home: bool
) -> NDArray[np.int64]:
    """Choose the experts of every slot.

    Parameters
    ----------
    traffic
        Tokens by expert and node, and the price of those that leave their node.
    ranks
        Number of ranks; divides the number of experts.
    spare
        Redundant slots per rank.
    keep_home
        Whether the first ``n_logical / ranks`` slots of a rank hold its home experts.

    Returns
    -------
    numpy.ndarray
        ``[ranks, n_logical / ranks + spare]`` int64. An expert is repeated on a rank only if the
        rank has all others too.
    """
    n_local = len(traffic.demand) // ranks
    # With this many slots a rank has every expert, and more slots can only repeat one.
    useful = min(spare, len(traffic.demand) - n_local)
    slots = _Slots(traffic, ranks, n_local + useful)
    if keep_home:
        for expert in range(len(slots.weight)):
            slots.fill(expert, expert // n_local)
    heaviest = np.argsort(-slots.weight, kind="stable")
    left = np.full(traffic.n_nodes, slots.ranks_per_node * useful)
    while left.any():
        expert, nodes = slots.choose_pair(left > 0, n_local if keep_home else None)
        if slots.copies[expert] == 0:
            slots.fill_first(expert)
            continue
        rank = slots.choose_rank(expert, nodes)
        slots.fill(expert, rank)
        left[slots.node[rank]] -= 1
    for single in heaviest[slots.copies[heaviest] == 0]:
        slots.fill_first(int(single))
    repeats = np.resize(heaviest, spare - useful).tolist()
    return np.array([experts + repeats for experts in slots.experts], dtype=np.int64)


class _Slots:
    """Slots that are filled one by one, and what they make of loads and distances.

    Notation: E experts, N nodes, G ranks. Loads are in mean rank loads, with the tokens of a node
    on its own copies where it has some, and divided evenly over all copies where it has none.
    """

    def __init__(self, traffic: TrafficPrice, ranks: int, slots_per_rank: int) -> None:
        n_logical, n_nodes = traffic.demand.shape
        self.price, self.ranks_per_node = traffic.price, traffic.ranks_per_node
        self.demand = traffic.demand * ranks  # [E, N]
        self.weight = self.demand.sum(1)  # [E]
        self.node = np.arange(ranks) // self.ranks_per_node  # [G]
        self.experts: list[list[int]] = [[] for _ in range(ranks)]
        self.free = np.full(ranks, slots_per_rank)
        # First copies that a node may still get: as many as any other.
        self.first_left = np.full(n_nodes, n_logical // n_nodes)
        self.held = np.zeros((n_logical, ranks), dtype=np.bool_)
        self.by_node = np.zeros((n_logical, n_nodes), dtype=np.int64)
        self.copies = np.zeros(n_logical, dtype=np.int64)
        self.load = np.zeros(ranks)
        # [G, G] ranks between which copies make no path are as far apart as there are ranks.
        self.distance = np.where(np.eye(ranks, dtype=np.bool_), 0, ranks)

    def spread_load(self, expert: int) -> NDArray[np.float64]:
        """Return what an expert's copies add to the load of each rank, ``[G]``."""
        demand, by_node = self.demand[expert], self.by_node[expert]
        far = demand[by_node == 0].sum() / max(1, self.copies[expert])
        near = demand / np.maximum(by_node, 1)
        return np.where(self.held[expert], near[self.node] + far, 0.0)

    def fill(self, expert: int, rank: int) -> None:
        """Put a copy of an expert into a free slot of a rank."""
        self.load -= self.spread_load(expert)
        holders = np.flatnonzero(self.held[expert])
        if holders.size:
            # Every new path runs over the rank that got the copy.
            through = np.minimum(self.distance[rank], self.distance[holders].min(0) + 1)
            np.minimum(self.distance, through[:, None] + through, out=self.distance)
        self.held[expert, rank] = True
        self.by_node[expert, self.node[rank]] += 1
        self.copies[expert] += 1
        self.free[rank] -= 1
        self.experts[rank].append(expert)
        self.load += self.spread_load(expert)

    def fill_first(self, expert: int) -> None:
        """Put the first copy of an expert into a node that is not too full and near its tokens."""
        ranks = len(self.free)
        by_node = self.load.reshape(-1, self.ranks_per_node).sum(1) / ranks
        node = choose_node(self.demand[expert] / ranks, by_node, self.first_left > 0, self.price)
        self.first_left[node] -= 1
        self.fill(expert, self.choose_rank(expert, np.array([node])))

    def choose_pair(
        self, allowed: NDArray[np.bool_], n_local: int | None
    ) -> tuple[int, NDArray[np.int64]]:
        """Choose the expert that gets the next copy, and the nodes ``[n]`` that may get it.

        ``allowed`` ``[N]`` are the nodes with redundant slots left. With ``n_local`` home experts
        on a rank, the load per copy counts as many times as its home rank has mean rank loads.
        """
        per_copy = self.weight / np.maximum(self.copies, 1)
        urgency = per_copy
        if n_local is not None:
            of_home = per_copy.reshape(-1, n_local).sum(1)
            urgency = per_copy * np.repeat(of_home, n_local)
        value = urgency[:, None] + self.price * self.demand * (self.by_node == 0)
        value -= TIE * self.copies[:, None]
        open_slots = (~self.held & (self.free > 0)).reshape(len(value), len(allowed), -1).any(2)
        value = np.where(open_slots & allowed, value, -np.inf)
        expert, node = divmod(int(value.argmax()), len(allowed))
        least = value[expert, node] - NEARLY_BEST_PAIR * per_copy[expert]
        return expert, np.flatnonzero(value[expert] >= least)

    def choose_rank(self, expert: int, nodes: NDArray[np.int64]) -> int:
        """Choose a nearly least loaded rank of the nodes for a copy of an expert."""
        allowed = np.flatnonzero(np.isin(self.node, nodes) & (self.free > 0) & ~self.held[expert])
        least = self.load[allowed].min()
        allowed = allowed[self.load[allowed] <= least + NEARLY_LEAST_LOAD]
        holders = np.flatnonzero(self.held[expert])
        if holders.size:
            apart = self.distance[np.ix_(holders, allowed)].min(0)
        else:
            # A first copy joins the ranks that copies connect with the most others.
            apart = (self.distance[allowed] < len(self.free)).sum(1)
        return int(allowed[np.lexsort((self.load[allowed], -apart))[0]])
