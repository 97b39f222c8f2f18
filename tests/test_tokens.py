"""Counting and selecting: quotas, determinism, spread, twin against kernel."""

import numpy as np
import pytest
import torch
from helpers.shares import ONE, random_cumulative, structure_tensors

from lplb_triton import Balancer, Placement, reference
from lplb_triton.testing.instances import draw_loads, shape_placement

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_quotas_are_within_one_token_on_500_cases():
    """Quotas sum up to the counts, each within one token of its share."""
    rng = np.random.default_rng(0)
    shapes = ["ring:8", "cube", "eplb:16:2", "random:7:3", "eplb:2:1"]
    for case in range(500):
        placement = shape_placement(shapes[case % len(shapes)], rng)
        t = structure_tensors(placement)
        cumulative = random_cumulative(rng, placement)
        counts = torch.from_numpy(rng.integers(0, rng.choice([3, 50, 5000]), placement.n_logical))
        rank = int(rng.integers(placement.ep_size))
        quotas = reference.copy_quotas(counts, cumulative, t["copy_start"], rank)
        lengths = t["copy_start"].diff().long()
        expert = torch.repeat_interleave(torch.arange(placement.n_logical), lengths)
        before = torch.cat([torch.zeros(1, dtype=torch.long), cumulative[:-1].long()])
        before[t["copy_start"][:-1].long()] = 0
        share = (cumulative.long() - before).double() / ONE
        assert ((quotas - counts[expert] * share).abs() < 1).all()
        assert torch.equal(
            torch.zeros_like(counts).index_add_(0, expert, quotas), counts.to(quotas.dtype)
        )
        assert (quotas >= 0).all()


@pytest.mark.parametrize(
    ("tokens", "limit"), [(4096, 1e-3), (1024, 4e-3), (128, 3e-2)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_cancels_over_64_ranks(seed, tokens, limit):
    """Quotas of 64 ranks keep the largest load near the plan's."""
    rng = np.random.default_rng(seed)
    popularity = rng.lognormal(0.0, 1.0, 256)
    placement = Placement.from_history(torch.from_numpy(popularity), 64, redundant_per_rank=2)
    t = structure_tensors(placement)
    # Near the history, so that the LP levels all ranks and rounding shows on any of them.
    popularity *= rng.lognormal(0.0, 0.1, 256)
    counts = rng.multinomial(tokens * 8, popularity / popularity.sum(), size=64)
    counts = torch.from_numpy(counts)
    balancer = Balancer(placement, device="cpu")
    solution = balancer.solve(counts.sum(0).int())
    solution.check()
    cumulative = balancer.cumulative_shares(solution.shares)
    total = sum(
        reference.copy_quotas(counts[rank], cumulative, t["copy_start"], rank) for rank in range(64)
    )
    rank_of_copy = placement.rank_of_slot[t["copy_slot"].long()].long()
    loads = torch.zeros(64, dtype=torch.long).index_add_(0, rank_of_copy, total)
    assert loads.sum() == counts.sum()
    assert float(solution.max_load[0]) <= 1.01 * tokens * 8
    assert float(loads.max()) <= float(solution.max_load[0]) * (1 + limit)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", ["ring:5", "cube", "eplb:16:2", "random:7:3"])
def test_kernel_equals_twin_bit_for_bit(shape, dtype):
    """Kernel and twin count and select the same, for any size and number of SMs."""
    rng = np.random.default_rng(1)
    placement = shape_placement(shape, rng)
    rank = placement.ep_size - 1
    kernel = Balancer(placement, backend="triton", device=DEVICE, rank=rank)
    twin = Balancer(placement, backend="torch", device="cpu", rank=rank)
    for size in (0, 1, 7, 300, 1111):
        idx = torch.from_numpy(rng.integers(-1, placement.n_logical, size)).to(dtype)
        idx[: size // 3] = int(rng.integers(placement.n_logical))
        cumulative = random_cumulative(rng, placement)
        for n_sms in (1, 3, 40):
            counts, running = kernel.count(idx.to(DEVICE), n_sms=n_sms)
            counts_twin, running_twin = twin.count(idx, n_sms=n_sms)
            assert torch.equal(counts.cpu(), counts_twin)
            assert torch.equal(running.cpu(), running_twin)
            got = kernel.select(idx.to(DEVICE), cumulative.to(DEVICE), running)
            expected = twin.select(idx, cumulative, running_twin)
            assert got.dtype == dtype and torch.equal(got.cpu(), expected)
        valid = expected[idx >= 0].long()
        assert torch.equal(placement.phy2log[valid].long(), idx[idx >= 0].long())
        assert (expected[idx < 0] == -1).all()
        t = structure_tensors(placement)
        quotas = reference.copy_quotas(counts_twin, cumulative, t["copy_start"], rank)
        got_quotas = torch.bincount(valid, minlength=placement.n_physical)[t["copy_slot"].long()]
        assert torch.equal(got_quotas, quotas)


def test_copies_are_spread_over_the_batch():
    """Every prefix of a batch has a copy's share of its tokens, to within two."""
    rng = np.random.default_rng(2)
    placement = shape_placement("cube", rng)
    balancer = Balancer(placement, device="cpu")
    replicated = int(np.flatnonzero(placement.structure.column_of >= 0)[0])
    idx = torch.full((1000,), replicated)
    t = structure_tensors(placement)
    first = int(t["copy_start"][replicated])
    for share in (0.1, 0.5, 0.77):
        cumulative = torch.full((placement.n_physical,), ONE, dtype=torch.int32)
        cumulative[first] = int(share * ONE)
        _, running = balancer.count(idx)
        out = balancer.select(idx, cumulative, running)
        on_first = (out == int(t["copy_slot"][first])).double()
        assert abs(float(on_first.sum()) - share * 1000) < 1
        # Every prefix of the batch holds the copy's part of it, to a token.
        drift = on_first.cumsum(0) - share * torch.arange(1, 1001)
        assert float(drift.abs().max()) < 2


def test_many_copies_are_spread_too():
    """With nine copies every prefix has each copy's share to within six tokens."""
    rng = np.random.default_rng(3)
    phy2log = np.concatenate([np.zeros(9, dtype=int), np.arange(1, 8)])
    placement = Placement.from_phy2log(rng.permutation(phy2log), 16, n_logical=8)
    balancer = Balancer(placement, device="cpu")
    cumulative = random_cumulative(rng, placement)
    idx = torch.zeros(5000, dtype=torch.long)
    _, running = balancer.count(idx)
    out = balancer.select(idx, cumulative, running)
    for slot in out.unique():
        here = (out == slot).double()
        drift = here.cumsum(0) - here.mean() * torch.arange(1, 5001)
        assert float(drift.abs().max()) < 6


def test_few_tokens_and_equal_loads_families_solve():
    """Few, equal or no tokens are certified and no worse than an even split."""
    rng = np.random.default_rng(4)
    placement = shape_placement("hypercube", rng)
    balancer = Balancer(placement, device="cpu")
    for family in ("few tokens", "equal", "empty"):
        counts = draw_loads(family, rng, placement.n_logical)
        solution = balancer.solve(counts)
        solution.check()
        assert float(solution.max_load.max()) <= float(placement.even_loads(counts).max()) + 1e-6
