"""Several ranks over gloo: one answer, exact global loads, rank 0's placement."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks

from lplb_triton import Balancer, Placement, Planner, solve, topologies


def _placement(seed, ranks):
    load = torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, 32))
    return Placement.from_history(load, ranks, redundant_per_rank=2)


def _ids(rank, batch):
    """Rank 1 has no tokens in even batches, and nobody has any in batch 2."""
    if batch == 2 or (rank == 1 and batch % 2 == 0):
        return torch.empty(0, 4, dtype=torch.int64)
    rng = np.random.default_rng(100 * rank + batch)
    return torch.from_numpy((rng.random((200, 4)) ** 3 * 33).astype(np.int64) - 1)


def check_ranks(rank, group):
    ranks = group.size()
    # Every rank comes with another placement; rank 0's must win, also for updates.
    balancer = Balancer(_placement(rank, ranks), group=group, device="cpu")
    balancer.record_loads()
    seen = torch.zeros(32, dtype=torch.float64)
    for version in (0, 50):
        if version:
            balancer.update_placement(_placement(version + rank, ranks))
        placement = _placement(version, ranks)
        assert torch.equal(balancer.placement.phy2log, placement.phy2log)
        for batch in range(4):
            idx = _ids(rank, batch)
            out = balancer.run(idx)
            assert torch.equal(placement.phy2log[out[out >= 0]].long(), idx[idx >= 0])
            loads = torch.bincount(out[out >= 0], minlength=placement.n_physical)
            dist.all_reduce(loads)
            everything = torch.cat([_ids(r, batch).reshape(-1) for r in range(ranks)])
            counts = torch.bincount(everything[everything >= 0], minlength=32)
            seen += counts
            assert torch.equal(balancer.load_history(), seen)
            single = Balancer(placement, device="cpu", rank=0)
            cumulative = single.cumulative_shares(single.solve(counts.int()).shares)
            expected = torch.zeros_like(loads)
            for r in range(ranks):
                alone = Balancer(placement, device="cpu", rank=r)
                ids = _ids(r, batch)
                mapped = alone.select(ids, cumulative, alone.count(ids)[1])
                expected += torch.bincount(mapped[mapped >= 0], minlength=placement.n_physical)
            assert torch.equal(loads, expected)
            by_rank = loads.reshape(ranks, -1).sum(1)
            best = solve(placement.problem(counts)).max_load
            assert int(by_rank.max()) <= float(best.max()) + placement.slots_per_rank
    assert int(balancer.certified) == int(balancer.solves) == 8

    buffer = SimpleNamespace(group=group)
    r2o = topologies.ring(ranks)
    planner = Planner(r2o, 32 + ranks, 32, ranks, device="cpu")
    planner.init_from_deep_ep(buffer)
    planner.init_from_deep_ep(buffer)
    assert planner.deep_ep_initialized and planner.ep_group is group
    workload = torch.full((32,), rank + 1, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int64)
    _, scaled = planner.solve_probs(workload, counter)
    assert torch.equal(scaled, torch.ones_like(scaled)) and int(counter) == 1
    assert int(workload[0]) == rank + 1
    phy2log, _, _ = planner.update_redundancy_mapping(torch.rand(32) * (rank + 1))
    wire = phy2log.clone()
    dist.broadcast(wire, 0)
    assert torch.equal(wire, phy2log)

    with pytest.raises(ValueError, match="^group"):
        Balancer(_placement(0, 2 * ranks), group=group, device="cpu")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_over_gloo(ranks, tmp_path):
    """Balancers and planners over gloo solve for the counts of all ranks together."""
    run_ranks(check_ranks, ranks, tmp_path)
