"""Originals and gradients of all ranks, the same on every rank, for tests of `spread`."""

import torch

from lplb_triton import SpreadPlan, chain

EXPERTS, WIDTH = 8, 3


def make_plan(group, redundant=2, seed=0):
    """Make a plan with several copies of some experts."""
    load = torch.distributions.LogNormal(0.0, 1.0)
    torch.manual_seed(seed)
    ranks = 1 if group is None else group.size()
    placement = chain(load.sample((EXPERTS,)), ranks, redundant_per_rank=redundant, keep_home=True)
    return SpreadPlan(placement, group=group, device="cpu")


class Case:
    """Originals and output gradients of all ranks, the same on every rank, and what must come."""

    def __init__(self, plan, rank, dtype=torch.float64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.plan, self.rank, n = plan, rank, plan.n_local
        everything = torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64)
        slots = plan.placement.n_physical
        upstream = torch.randn(slots, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        self.original = everything.to(dtype)[rank * n : (rank + 1) * n].clone()
        self.upstream = upstream.view(plan.placement.ep_size, -1, WIDTH)
        phy2log = plan.placement.phy2log.long()
        self.slots = everything.to(dtype)[phy2log].view(self.upstream.shape)[rank]
        self.gradient = self.add_up(self.upstream)

    def add_up(self, upstream):
        """Return the sums of gradients that this rank's originals must get."""
        wide = torch.zeros(EXPERTS, WIDTH, dtype=torch.float64)
        wide.index_add_(0, self.plan.placement.phy2log.long(), upstream.reshape(-1, WIDTH).double())
        n = self.plan.n_local
        return wide[self.rank * n : (self.rank + 1) * n]

    def leaf(self):
        """Return a fresh leaf with the originals' values."""
        return self.original.clone().requires_grad_()

    def loss(self, slots):
        """Return a loss whose gradient by the slots is this rank's part of ``upstream``."""
        return (slots * self.upstream[self.rank]).sum()
