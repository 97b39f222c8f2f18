"""Placements and ids drawn for balancers, and a check of what a run returns."""

import numpy as np
import torch

import lplb_triton
from lplb_triton import Placement
from lplb_triton.testing.instances import draw_loads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def placement_of(seed=0, ranks=8, slots=1, experts=64):
    """Place experts by EPLB under lognormal loads."""
    load = draw_loads("lognormal", np.random.default_rng(seed), experts)
    return Placement.from_history(load, ranks, redundant_per_rank=slots)


def random_ids(seed, n_logical, shape=(64, 8), dtype=torch.int64, device=DEVICE):
    """Draw ids that prefer the first experts, and -1 for dropped ones."""
    rng = np.random.default_rng(seed)
    skewed = np.floor(rng.random(shape) ** 2 * (n_logical + 1)).astype(np.int64) - 1
    return torch.from_numpy(skewed).to(dtype).to(device)


def check_answer(balancer, idx, out):
    """Physical ids map back, and rank loads are the certified ones to a few tokens."""
    placement = balancer.placement
    idx, out = idx.cpu(), out.cpu().long()
    assert torch.equal(out < 0, idx < 0)
    assert torch.equal(placement.phy2log[out[out >= 0]].long(), idx[idx >= 0].long())
    counts = torch.bincount(idx[idx >= 0].long(), minlength=placement.n_logical)
    rank = placement.rank_of_slot[out[out >= 0]].long()
    loads = torch.bincount(rank, minlength=placement.ep_size)
    solution = lplb_triton.solve(placement.problem(counts))
    # One token per replicated expert on the rank is all that rounding can add.
    slack = placement.slots_per_rank + 2e-3 * float(loads.max())
    assert int(loads.max()) <= float(solution.max_load.max()) + slack
    assert int(loads.max()) >= float(solution.lower_bound.max()) - 1e-6
