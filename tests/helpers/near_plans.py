"""Placements, batches and the two-stage linear program for plans that keep tokens near."""

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix, hstack, vstack

from helpers.time_plans import copy_starts
from lplb_triton import Balancer, Placement, chain
from lplb_triton.reference.near import plan_near, write_near_shares
from lplb_triton.reference.near_tables import make_near_tables


def draw_counts(rng, ranks, ranks_per_node, experts, tokens):
    """Draw counts by source rank [ranks, experts] whose nodes prefer different experts."""
    nodes = ranks // ranks_per_node
    wanted = rng.lognormal(0, rng.uniform(0.5, 1.5), experts)
    wanted = wanted * rng.lognormal(0, rng.uniform(0.1, 1.0), (nodes, 1, experts))
    wanted = wanted * rng.lognormal(0, 0.3, (nodes, ranks_per_node, experts))
    wanted = wanted.reshape(ranks, experts)
    return rng.multinomial(tokens, wanted / wanted.sum(1, keepdims=True)).astype(np.int64)


def place(rng, history, ranks, slots):
    """Place experts by EPLB, by a chain, or with copies anywhere."""
    experts = len(history)
    kind = rng.integers(3)
    if kind < 2:
        build = (Placement.from_history, chain)[kind]
        return build(torch.from_numpy(history), ranks, redundant_per_rank=slots)
    homes = np.arange(experts).reshape(ranks, -1)
    others = [np.setdiff1d(np.arange(experts), row) for row in homes]
    more = np.stack([rng.choice(other, slots, replace=False) for other in others])
    return Placement(np.concatenate([homes, more], 1).reshape(-1), ranks)


class Case:
    """A batch of a placement: counts by rank, the token plan's shares, and bounds by group."""

    def __init__(self, placement, ranks_per_node, gathered):
        self.placement, self.ranks_per_node, self.gathered = placement, ranks_per_node, gathered
        twin = Balancer(placement, device="cpu", backend="torch", rank=0)
        self.solution = twin.solve(torch.from_numpy(gathered.sum(0)))
        cumulative = twin.cumulative_shares(self.solution.shares)
        self.cumulative = cumulative.numpy().astype(np.int64)
        self.tables = make_near_tables(placement, ranks_per_node)

    def plan(self, slack=0.01):
        """Plan all groups; returns the plans, and shares [n_copies] int64."""
        shares, start = self.cumulative.copy(), copy_starts(self.placement)
        plans = []
        for group, tables in enumerate(self.tables):
            bound = np.float32(self.solution.lower_bound[group])
            plan = plan_near(tables, self.gathered, self.cumulative, start, bound, slack)
            if plan is not None:
                write_near_shares(tables, plan, shares)
            plans.append(plan)
        return plans, shares

    def find_loads(self, shares):
        """Return loads by rank for cumulative shares."""
        part = self.find_parts(shares)
        n_copies = np.diff(copy_starts(self.placement))
        tokens = part * self.gathered.sum(0).repeat(n_copies)
        holder = self.placement.structure.copy_slot // self.placement.slots_per_rank
        return np.bincount(holder, tokens, self.placement.ep_size)

    def find_parts(self, shares):
        """Return the share of every copy from cumulative ones."""
        start = copy_starts(self.placement)
        parts = np.diff(shares, prepend=0)
        parts[start[:-1]] = shares[start[:-1]]
        return parts / 2**24


def draw_case(seed):
    """Draw a small case of one group."""
    rng = np.random.default_rng(seed)
    ranks_per_node = int(rng.choice([2, 4]))
    ranks = ranks_per_node * int(rng.integers(2, 5))
    experts, slots = ranks * int(rng.integers(2, 7)), int(rng.integers(1, 4))
    tokens = int(rng.choice([64, 512, 4096, 32768]))
    history = draw_counts(rng, ranks, ranks_per_node, experts, 10000)
    placement = place(rng, history.sum(0), ranks, slots)
    drift = history * rng.lognormal(0, rng.uniform(0, 0.4), (1, experts))
    gathered = rng.multinomial(tokens, drift / drift.sum(1, keepdims=True)).astype(np.int64)
    return Case(placement, ranks_per_node, gathered)


def solve_two_stages(case, slack):
    """Solve a case of one group by HiGHS: the least largest load, then the least traffic.

    Returns the largest load, and how many tokens leave their node with at most ``slack`` more.
    Only tokens of experts with copies on several ranks count.
    """
    (t,) = case.tables
    tokens, n = case.gathered.sum(0), t.n_cells
    expert = np.arange(len(t.experts)).repeat(np.diff(t.start))
    fixed = np.bincount(t.lone_rank, tokens[t.lone_experts], t.n_ranks)
    runs = np.unique(t.node_first)
    run = np.searchsorted(runs, t.node_first)
    nodes = np.arange(t.n_ranks) // t.ranks_per_node
    there = np.array([case.gathered[nodes == t.node[c], t.experts[expert[c]]].sum() for c in runs])

    def mark(rows, size):
        return coo_matrix((np.ones(n), (rows, np.arange(n))), (size, n)).tocsr()

    whole, loads = mark(expert, len(t.experts)), mark(t.rank, t.n_ranks)
    one = csr_matrix(np.ones((t.n_ranks, 1)))
    first = linprog(
        np.append(np.zeros(n), 1), A_ub=hstack([loads, -one]).tocsr(), b_ub=-fixed,
        A_eq=hstack([whole, csr_matrix((len(t.experts), 1))]).tocsr(), b_eq=tokens[t.experts],
    )  # fmt: skip
    least = max(first.fun, fixed.max())
    away = csr_matrix(np.eye(len(runs)))
    rows = [
        hstack([loads, csr_matrix((t.n_ranks, len(runs)))]),
        hstack([-mark(run, len(runs)), -away]),
    ]
    second = linprog(
        np.append(np.zeros(n), np.ones(len(runs))), A_ub=vstack(rows).tocsr(),
        b_ub=np.append((1 + slack) * least - fixed, -there),
        A_eq=hstack([whole, csr_matrix((len(t.experts), len(runs)))]).tocsr(),
        b_eq=tokens[t.experts],
    )  # fmt: skip
    assert second.status == 0, second.message
    return least, second.fun + tokens[t.experts].sum() - there.sum()
