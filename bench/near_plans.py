"""The balancer's plans that keep tokens in their nodes, and simulated tokens; no printing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import Balancer, Placement
from lplb_triton._layout import SHARE_ONE
from lplb_triton.reference.near import plan_near, write_near_shares
from lplb_triton.reference.near_tables import make_near_tables

__all__ = ["SLACK", "Judged", "LocalityTwin", "count_node_pairs", "draw_token_ids"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Load above the optimum that the balancer's plan may take to keep tokens near, its default.
SLACK = 0.01


class Judged(NamedTuple):
    """How a batch is planned near its tokens."""

    max_load: float
    """Largest load of the near plan, in tokens."""
    far: float
    """The part of the assignments that leave their node by it."""
    far_by_lp: float
    """And by the LP's plan, with tokens to copies in their own node first."""


class LocalityTwin:
    """The plans of ``Balancer(locality="node", slack=0.01)``, by its twin on the host.

    Parameters
    ----------
    placement
        Of one group.
    ranks_per_node
        Consecutive ranks of a node.
    """

    def __init__(self, placement: Placement, ranks_per_node: int) -> None:
        self.placement, self.ranks_per_node = placement, ranks_per_node
        self.balancer = Balancer(placement, device="cpu", backend="torch", rank=0)
        (self.tables,) = make_near_tables(placement, ranks_per_node)
        s = placement.structure
        self.copy_start = s.copy_start.astype(np.int64)
        self.expert = np.arange(placement.n_logical).repeat(np.diff(self.copy_start))
        self.rank = s.copy_slot.astype(np.int64) // placement.slots_per_rank

    def plan(self, counts: Ints) -> Judged:
        """Judge both plans of a batch, of ``[nodes, n_logical]`` counts."""
        by_lp, near = self._find_shares(counts)
        return Judged(*self._measure(counts, near), self._measure(counts, by_lp)[1])

    def divide(self, counts: Ints) -> Floats:
        """Divide a batch by the near plan; returns tokens of each slot, ``[ranks, slots]``."""
        _, near = self._find_shares(counts)
        p = self.placement
        taken = np.zeros(p.ep_size * p.slots_per_rank)
        np.add.at(taken, p.structure.copy_slot, self._divide_by(counts.sum(0), near))
        return taken.reshape(p.ep_size, -1)

    def _find_shares(self, counts: Ints) -> tuple[Ints, Ints]:
        """Find the cumulative shares of the LP's plan and of the near plan."""
        # Which rank of a node a token is on makes no difference to the plan.
        gathered = np.zeros((self.placement.ep_size, counts.shape[1]), dtype=np.int64)
        gathered[:: self.ranks_per_node] = counts
        solution = self.balancer.solve(torch.from_numpy(counts.sum(0)))
        by_lp = self.balancer.cumulative_shares(solution.shares).numpy().astype(np.int64)
        bound, near = float(solution.lower_bound[0]), by_lp.copy()
        plan = plan_near(self.tables, gathered, by_lp, self.copy_start, bound, SLACK)
        if plan is not None:
            write_near_shares(self.tables, plan, near)
        return by_lp, near

    def _divide_by(self, total: Ints, cumulative: Ints) -> Floats:
        """Return the tokens of each copy by cumulative shares."""
        share = np.diff(cumulative, prepend=0)
        share[self.copy_start[:-1]] = cumulative[self.copy_start[:-1]]
        tokens: Floats = share / SHARE_ONE * total[self.expert]
        return tokens

    def _measure(self, counts: Ints, cumulative: Ints) -> tuple[float, float]:
        """Return the largest load, and the part of tokens that leave, by cumulative shares."""
        total = counts.sum(0)
        tokens = self._divide_by(total, cumulative)
        loads = np.bincount(self.rank, tokens, self.placement.ep_size)
        taken = np.zeros(counts.T.shape)
        np.add.at(taken, (self.expert, self.rank // self.ranks_per_node), tokens)
        return float(loads.max()), float(1 - np.minimum(taken, counts.T).sum() / total.sum())


def draw_token_ids(counts: Ints, top_k: int, rng: np.random.Generator) -> Ints:
    """Draw tokens with the recorded counts of one source, ``[tokens, top_k]``, padded with -1.

    The experts, in random order, each as often as counted, are dealt to the tokens in turn. No
    expert is dealt to a token twice as long as none has more assignments than there are tokens.
    """
    order = rng.permutation(len(counts))
    dealt = np.repeat(order, counts[order])
    tokens = -(-len(dealt) // top_k)
    ids = np.full(tokens * top_k, -1, dtype=np.int64)
    ids[: len(dealt)] = dealt
    return np.ascontiguousarray(ids.reshape(top_k, tokens).T)


def count_node_pairs(ids: Ints, own_node: int, sent: Floats, rng: np.random.Generator) -> int:
    """Count the pairs of a token and another node that gets it.

    ``ids`` ``[tokens, top_k]`` are the tokens of one source, ``sent`` ``[E, nodes]`` the part of
    its node's tokens by target, from which the target of each assignment is drawn.
    """
    nodes = sent.shape[1]
    ends = sent[np.maximum(ids, 0)].cumsum(2)
    target = (rng.random(ids.shape)[..., None] >= ends[..., :-1]).sum(2)
    gets = np.zeros((len(ids), nodes), dtype=np.bool_)
    row, column = np.nonzero(ids >= 0)
    gets[row, target[row, column]] = True
    gets[:, own_node] = False
    return int(gets.sum())
