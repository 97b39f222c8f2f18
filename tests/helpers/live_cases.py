"""Batches for plans of live slots, with the copies and shares that they start from."""

from typing import NamedTuple

import numpy as np
import torch

from lplb_triton import Placement, chain, reference, solve
from lplb_triton._layout import SHARE_ONE
from lplb_triton.reference.live import Copies, LiveCase, count_running, plan_live


class Batch(NamedTuple):
    """One batch with the plan of the static copies."""

    ep_size: int
    counts: np.ndarray
    cumulative: np.ndarray
    copies: Copies
    max_load: float

    def plan(self, live_per_rank, above=1.02, resident=None, **rules):
        """Plan live slots on top."""
        case = LiveCase(self.ep_size, live_per_rank, above, **rules)
        plan = (self.counts, self.cumulative, self.copies, self.max_load)
        return plan_live(case, *plan, resident)

    def tokens(self):
        """Tokens of each static copy, without live slots."""
        return split_tokens(self.counts, self.cumulative, self.copies)

    def loads(self):
        """Tokens of each rank, without live slots."""
        return np.bincount(self.copies.rank, self.tokens(), self.ep_size).astype(np.int64)


def split_tokens(counts, cumulative, copies):
    """Tokens of each copy by cumulative shares, over all ranks (equation 15)."""
    running = count_running(counts, cumulative, copies)
    tokens = np.diff(running, prepend=0)
    tokens[copies.start[:-1]] = running[copies.start[:-1]]
    return tokens


def at_home(counts, ep_size):
    """Make a batch with every expert on its home rank only."""
    n = len(counts)
    rank, place = np.divmod(np.arange(n), n // ep_size)
    shares = np.full(n, SHARE_ONE, dtype=np.int64)
    most = float(counts.reshape(ep_size, -1).sum(1).max())
    return Batch(ep_size, counts, shares, Copies(np.arange(n + 1), rank, place), most)


def on_placement(placement, counts):
    """Make a batch with the LP's plan of a placement."""
    structure = placement.structure
    solution = solve(placement.problem(torch.from_numpy(counts)))
    shape = (placement.n_group, placement.group_size, placement.max_columns)
    tables = (
        torch.tensor(table)
        for table in (
            *(structure.copy_cell, structure.copy_index, structure.copy_multiplicity),
            structure.copy_start,
        )
    )
    cumulative = reference.cumulative_shares(solution.shares.reshape(shape), *tables)
    rank, place = np.divmod(structure.copy_slot.astype(np.int64), placement.slots_per_rank)
    copies = Copies(structure.copy_start.astype(np.int64), rank, place)
    most = float(solution.max_load.max())
    return Batch(placement.ep_size, counts, cumulative.numpy().astype(np.int64), copies, most)


def draw_counts(n_experts, sigma, tokens, seed):
    """Draw lognormal loads of ``tokens`` in all, about."""
    loads = np.random.default_rng(seed).lognormal(0, sigma, n_experts)
    return (loads / loads.sum() * tokens).astype(np.int64)


def draw_batch(kind, ep_size, n_experts, sigma, tokens, seed):
    """Draw a batch at home, on ``chain`` or on EPLB's placement, both made from other loads."""
    counts = draw_counts(n_experts, sigma, tokens, seed)
    if kind == "home":
        return at_home(counts, ep_size)
    history = torch.from_numpy(draw_counts(n_experts, sigma, tokens, seed + 1)).double()
    if kind == "chain":
        return on_placement(chain(history, ep_size), counts)
    return on_placement(Placement.from_history(history, ep_size, redundant_per_rank=2), counts)
