"""Plans that keep tokens in their nodes, by linear programs on the host; no printing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import Balancer, Placement
from lplb_triton._layout import SHARE_ONE
from lplb_triton.reference.near import plan_near, write_near_shares
from lplb_triton.reference.near_tables import make_near_tables
from lplb_triton.testing.verify import NoOptimumError

__all__ = ["SLACK", "LocalityTwin", "NearPlans", "count_node_pairs", "draw_token_ids"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Load above the optimum that the balancer's plan may take to keep tokens near, its default.
SLACK = 0.01


class NearPlans:
    """Programs of a placement for counts by node, solved by HiGHS.

    A plan is the load of each cell, a copied expert on one of its ranks. Tokens go to copies in
    their own node first, as with ``quotas="global"``; so a plan fixes how many leave their node.

    Parameters
    ----------
    placement
        Of one group.
    ranks_per_node
        Consecutive ranks of a node.
    """

    def __init__(self, placement: Placement, ranks_per_node: int) -> None:
        ranks, n_logical = placement.ep_size, placement.n_logical
        self.ranks, self.node = ranks, np.arange(ranks) // ranks_per_node
        held = np.zeros((n_logical, ranks), dtype=np.bool_)
        held[placement.phy2log.numpy(), placement.rank_of_slot.numpy()] = True
        n_copies = held.sum(1)
        self.single, self.shared = np.flatnonzero(n_copies == 1), np.flatnonzero(n_copies > 1)
        self.rank_of_single = held[self.single].argmax(1)
        # Cells, and pairs of a shared expert and a node with copies of it.
        self.cell_expert, self.cell_rank = np.nonzero(held[self.shared])
        in_node: NDArray[np.bool_] = np.any(held.reshape(n_logical, -1, ranks_per_node), axis=2)
        by_node = in_node[self.shared]
        self.pair_expert, self.pair_node = np.nonzero(by_node)
        number = np.zeros(by_node.shape, dtype=np.int64)
        number[self.pair_expert, self.pair_node] = np.arange(len(self.pair_expert))
        self.pair_of_cell = number[self.cell_expert, self.node[self.cell_rank]]

    def balance(self, counts: Ints) -> tuple[float, Floats]:
        """Return the least largest load for counts ``[nodes, n_logical]``, and a plan ``[cells]``.

        The plan is the one that HiGHS ends with; whose tokens travel doesn't matter to it.
        """
        fixed = self._sum_fixed(counts)
        n_cells = len(self.cell_rank)
        if not n_cells:
            return float(fixed.max()), np.zeros(0)
        loads = self._place((self.cell_rank, np.arange(n_cells)), (self.ranks, n_cells + 1))
        loads -= self._place(
            (np.arange(self.ranks), np.full(self.ranks, n_cells)), (self.ranks, n_cells + 1)
        )
        objective = np.zeros(n_cells + 1)
        objective[-1] = 1.0
        plan = self._solve(objective, loads, -fixed, counts, None)
        return float(plan[-1]), plan[:-1]

    def keep_near(self, counts: Ints, limit: float) -> tuple[float, Floats]:
        """Return the least part of tokens that leave their node, and its plan ``[cells]``.

        No load may exceed the limit.
        """
        n_cells, n_pairs = len(self.cell_rank), len(self.pair_node)
        if not n_cells:
            return self.measure_far(counts, np.zeros(0)), np.zeros(0)
        width = n_cells + n_pairs
        loads = self._place((self.cell_rank, np.arange(n_cells)), (self.ranks, width))
        # What stays near is no more than the copies of the node take, nor than the node sends.
        near = self._place((np.arange(n_pairs), n_cells + np.arange(n_pairs)), (n_pairs, width))
        near -= self._place((self.pair_of_cell, np.arange(n_cells)), (n_pairs, width))
        most = np.full(width, np.inf)
        most[n_cells:] = counts[self.pair_node, self.shared[self.pair_expert]]
        objective = np.concatenate([np.zeros(n_cells), -np.ones(n_pairs)])
        bounds = np.concatenate([limit - self._sum_fixed(counts), np.zeros(n_pairs)])
        from scipy.sparse import vstack

        plan = self._solve(objective, vstack([loads, near]).tocsr(), bounds, counts, most)[:n_cells]
        return self.measure_far(counts, plan), plan

    def measure_far(self, counts: Ints, plan: Floats, *, own_first: bool = True) -> float:
        """Return the part of the tokens that leave their node under a plan ``[cells]``.

        Without ``own_first`` the tokens of every node are divided alike, as with local quotas.
        """
        near = counts[self.node[self.rank_of_single], self.single].sum()
        expert = self.shared[self.pair_expert]
        own = counts[self.pair_node, expert].astype(np.float64)
        taken = np.bincount(self.pair_of_cell, weights=plan, minlength=len(own))
        if own_first:
            near = near + np.minimum(taken, own).sum()
        else:
            near = near + (own * taken / np.maximum(counts.sum(0)[expert], 1)).sum()
        return float(1 - near / counts.sum())

    def divide_tokens(self, counts: Ints, plan: Floats) -> Floats:
        """Return the part of a node's tokens of an expert by target, ``[nodes, E, nodes]``.

        Tokens go to their own node first; the rest is divided by what other nodes still take.
        """
        nodes, n_logical = counts.shape
        total = counts.sum(0).astype(np.float64)
        taken = np.zeros((n_logical, nodes))
        taken[self.single, self.node[self.rank_of_single]] = total[self.single]
        np.add.at(taken, (self.shared[self.cell_expert], self.node[self.cell_rank]), plan)
        own = np.minimum(taken, counts.T)
        left, rest = taken - own, counts.T - own
        sums = left.sum(1, keepdims=True)
        target = np.divide(left, sums, out=np.zeros_like(left), where=sums > 0)
        flow = rest.T[:, :, None] * target[None]
        flow[np.arange(nodes), :, np.arange(nodes)] += own.T
        sent: Floats = flow / np.maximum(flow.sum(2, keepdims=True), 1e-12)
        return sent

    def divide_alike(self, counts: Ints, plan: Floats) -> Floats:
        """Return the same as `divide_tokens` where every node divides its tokens alike."""
        total = counts.sum(0).astype(np.float64)
        sent = np.zeros((counts.shape[1], counts.shape[0]))
        sent[self.single, self.node[self.rank_of_single]] = 1.0
        expert = self.shared[self.cell_expert]
        part = plan / np.maximum(total[expert], 1)
        np.add.at(sent, (expert, self.node[self.cell_rank]), part)
        return np.broadcast_to(sent, (len(counts), *sent.shape))

    def _sum_fixed(self, counts: Ints) -> Floats:
        """Sum the loads of experts with one copy, ``[ranks]``."""
        weight = counts.sum(0)[self.single].astype(np.float64)
        fixed = np.zeros(self.ranks)
        np.add.at(fixed, self.rank_of_single, weight)
        return fixed

    def _place(self, at: tuple[Ints, Ints], shape: tuple[int, int]) -> Any:
        """Return a sparse matrix with ones."""
        from scipy.sparse import csr_matrix

        return csr_matrix((np.ones(len(at[0])), at), shape=shape)

    def _solve(
        self, objective: Floats, rows: Any, bounds: Floats, counts: Ints, most: Floats | None
    ) -> Floats:
        """Solve a program whose cells sum to the loads of the shared experts."""
        # SciPy is slow to import, and most commands don't need it.
        from scipy.optimize import linprog

        sums = self._place(
            (self.cell_expert, np.arange(len(self.cell_expert))),
            (len(self.shared), len(objective)),
        )
        upper = np.full(len(objective), np.inf) if most is None else most
        found = linprog(
            objective,
            A_ub=rows,
            b_ub=bounds,
            A_eq=sums,
            b_eq=counts.sum(0)[self.shared].astype(np.float64),
            bounds=np.stack([np.zeros(len(objective)), upper], 1),
            method="highs",
        )
        if found.status != 0:
            raise NoOptimumError(f"HiGHS found no optimum: {found.message}")
        solution: Floats = found.x
        return solution


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

    def plan(self, counts: Ints) -> tuple[float, float]:
        """Return the largest load and the part of tokens that leave, for ``[nodes, n_logical]``."""
        # Which rank of a node a token is on makes no difference to the plan.
        gathered = np.zeros((self.placement.ep_size, counts.shape[1]), dtype=np.int64)
        gathered[:: self.ranks_per_node] = counts
        total = counts.sum(0)
        solution = self.balancer.solve(torch.from_numpy(total))
        cumulative = self.balancer.cumulative_shares(solution.shares).numpy().astype(np.int64)
        bound = float(solution.lower_bound[0])
        case = (self.tables, gathered, cumulative, self.copy_start)
        plan = plan_near(*case, bound, SLACK)
        if plan is not None:
            write_near_shares(self.tables, plan, cumulative)
        share = np.diff(cumulative, prepend=0)
        share[self.copy_start[:-1]] = cumulative[self.copy_start[:-1]]
        tokens = share / SHARE_ONE * total[self.expert]
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
