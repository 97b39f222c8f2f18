"""The plan that keeps most tokens in their node, by linear programs on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lplb_triton.placement import Placement
from lplb_triton.placement.nodes import TrafficPrice

__all__ = ["SLACK", "NearPlans", "measure_far"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Load above the optimum that plans may take to keep tokens near, and batches that say how many are.
SLACK = 0.01
MOST_BATCHES = 16


def measure_far(placement: Placement, load: Floats, traffic: TrafficPrice) -> float:
    """Return the part of the tokens that leave their node by the plan that keeps most near.

    It is a mean over at most 16 of the batches ``[batches, n_logical]``, evenly spaced. Every
    expert's tokens come from the nodes as in the mean over all batches.
    """
    total = traffic.demand.sum(1, keepdims=True)
    source = np.where(total > 0, traffic.demand / np.where(total > 0, total, 1.0), 0.0)
    source[total[:, 0] == 0] = 1.0 / traffic.n_nodes
    plans = NearPlans(placement, traffic.ranks_per_node)
    parts = []
    for at in np.linspace(0, len(load) - 1, min(MOST_BATCHES, len(load))).round().astype(int):
        counts = load[at] * source.T
        least, _ = plans.balance(counts)
        parts.append(plans.keep_near(counts, least * (1 + SLACK))[0])
    return float(np.mean(parts))


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

    def balance(self, counts: NDArray[np.number[Any]]) -> tuple[float, Floats]:
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

    def keep_near(self, counts: NDArray[np.number[Any]], limit: float) -> tuple[float, Floats]:
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

    def measure_far(
        self, counts: NDArray[np.number[Any]], plan: Floats, *, own_first: bool = True
    ) -> float:
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

    def divide_tokens(self, counts: NDArray[np.number[Any]], plan: Floats) -> Floats:
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

    def divide_alike(self, counts: NDArray[np.number[Any]], plan: Floats) -> Floats:
        """Return the same as `divide_tokens` where every node divides its tokens alike."""
        total = counts.sum(0).astype(np.float64)
        sent = np.zeros((counts.shape[1], counts.shape[0]))
        sent[self.single, self.node[self.rank_of_single]] = 1.0
        expert = self.shared[self.cell_expert]
        part = plan / np.maximum(total[expert], 1)
        np.add.at(sent, (expert, self.node[self.cell_rank]), part)
        return np.broadcast_to(sent, (len(counts), *sent.shape))

    def _sum_fixed(self, counts: NDArray[np.number[Any]]) -> Floats:
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
        self,
        objective: Floats,
        rows: Any,
        bounds: Floats,
        counts: NDArray[np.number[Any]],
        most: Floats | None,
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
            raise RuntimeError(f"HiGHS found no optimum: {found.message}")
        solution: Floats = found.x
        return solution
