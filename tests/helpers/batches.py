"""Placements of 32 experts, and uneven batches of token ids for each rank of a group."""

import numpy as np
import torch

from lplb_triton import Placement

EXPERTS = 32


def placement_of(ranks, seed=0):
    """EPLB's placement for drawn loads, with two redundant slots on each rank."""
    load = torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, EXPERTS))
    return Placement.from_history(load, ranks, redundant_per_rank=2)


def ids_of(rank, batch):
    """A rank's ids: rank 1 has none in even batches, no rank has any in batch 2, few in 3."""
    if batch == 2 or (rank == 1 and batch % 2 == 0):
        return torch.empty(0, 4, dtype=torch.int64)
    rng = np.random.default_rng(100 * rank + batch)
    rows = 300 if batch != 3 else rank
    return torch.from_numpy((rng.random((rows, 4)) ** 2 * (EXPERTS + 1)).astype(np.int64) - 1)


def count(ids, n):
    """Tokens of each of ``n`` experts; an id of -1 counts for none."""
    return torch.bincount(ids[ids >= 0].reshape(-1), minlength=n)
