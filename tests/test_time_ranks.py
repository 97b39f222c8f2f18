"""Plans by time over gloo: one plan on all ranks, quotas of both kinds, and ranks that differ."""

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers.balancers import placement_of, random_ids
from helpers.time_plans import COST

from lplb_triton import Balancer, TimeCost

TIMEOUT = 60.0


def gather(group, tensor):
    """Return a tensor of every rank."""
    rows = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(rows, tensor, group=group)
    return rows


def check_batches(rank, group):
    """Both back ends find one plan on all ranks; with global quotas its time is exact."""
    placement = placement_of(0, 2, 2, 16)
    for backend in ("torch", "triton"):
        for quotas in ("global", "local"):
            balancer = Balancer(
                placement, group=group, device="cpu", backend=backend, quotas=quotas,
                objective="time", cost=COST, sync="distributed", timeout=TIMEOUT,
            )  # fmt: skip
            out = balancer.run(random_ids(rank, 16, (90 + 300 * rank, 2), device="cpu"))
            times = torch.stack([t.double() for t in balancer.times])
            assert all(torch.equal(times, other) for other in gather(group, times))
            rows = torch.bincount(out[out >= 0], minlength=placement.n_physical)
            dist.all_reduce(rows, group=group)
            found = COST.predict(rows.view(2, -1).numpy()).max()
            assert float(times[1]) == pytest.approx(found, rel=1e-6 if quotas == "global" else 0.1)
            balancer.close()


def check_refusal(rank, group):
    """A rank with another cost, or with another objective, is refused when balancers are made."""
    placement = placement_of(0, 2, 1, 8)
    others = {"objective": "time", "cost": TimeCost.for_model(64, 64)}, {}
    for settings in others:
        mine = {"objective": "time", "cost": COST} if rank == 0 else settings
        with pytest.raises(ValueError, match=r"must be of the same sizes and kinds.*objective"):
            Balancer(
                placement, group=group, device="cpu", sync="distributed", timeout=TIMEOUT, **mine
            )


def check_all(rank, group):
    """Check everything with one group."""
    check_batches(rank, group)
    check_refusal(rank, group)


def test_ranks_plan_alike_or_are_refused(tmp_path):
    """Two ranks find the same plan, keep its rows, and refuse each other's cost or objective."""
    run_ranks(check_all, 2, tmp_path)
