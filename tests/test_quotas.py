"""Exact global quotas: bounds, conservation, near ranks first, twin against kernel."""

import numpy as np
import pytest
import torch
from helpers.shares import ONE, random_cumulative, structure_tensors

from lplb_triton import Balancer, Placement, kernels, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 6, 8), (6, 9, 24), (7, 10, 28), (16, 20, 48)]


def random_case(rng, shape):
    """Any slots at all: several copies on one rank, experts with many copies and with one."""
    ranks, experts, slots = shape
    extra = np.floor(rng.random(slots - experts) ** 2 * experts).astype(int)
    phy2log = rng.permutation(np.concatenate([np.arange(experts), extra]))
    placement = Placement.from_phy2log(phy2log, ranks)
    t = structure_tensors(placement)
    cumulative = random_cumulative(rng, placement)
    most = rng.choice([3, 50, 5000])
    counts = rng.integers(0, most, (placement.ep_size, placement.n_logical))
    # Some ranks without tokens, some experts that nobody wants.
    counts[rng.random(placement.ep_size) < 0.2] = 0
    counts[:, rng.random(placement.n_logical) < 0.2] = 0
    holder = placement.rank_of_slot[t["copy_slot"].long()]
    lengths = t["copy_start"].diff().long()
    expert = torch.arange(placement.n_logical).repeat_interleave(lengths)
    return placement, t, cumulative, torch.from_numpy(counts), holder, expert


def nearest_first(supply, demand, holder, ranks_per_node):
    """Tokens kept on the rank, and on the node, if as many as possible are: by expert."""
    own = sum(min(int(supply[r]), int(demand[holder == r].sum())) for r in range(len(supply)))
    node = 0
    for first in range(0, len(supply), ranks_per_node):
        here = (holder >= first) & (holder < first + ranks_per_node)
        node += min(int(supply[first : first + ranks_per_node].sum()), int(demand[here].sum()))
    return own, node


@pytest.mark.parametrize("shape", SHAPES)
def test_global_quotas_are_exact_and_near_first(shape):
    """Quotas keep all tokens, match the shares, and keep the most tokens on rank and node."""
    rng = np.random.default_rng(5)
    for case in range(8):
        placement, t, cumulative, counts, holder, expert = random_case(rng, shape)
        ranks = placement.ep_size
        ranks_per_node = [1, ranks, 2, 3][case % 4]
        quotas, kept = reference.divide_quotas(
            counts, cumulative, t["copy_start"], holder, ranks_per_node
        )
        assert (quotas >= 0).all()
        sums = torch.zeros(ranks, placement.n_logical, dtype=torch.long)
        assert torch.equal(sums.index_add_(1, expert, quotas), counts)
        # Every copy within one token of its share; every rank within its replicated experts.
        before = torch.cat([torch.zeros(1, dtype=torch.long), cumulative[:-1].long()])
        before[t["copy_start"][:-1].long()] = 0
        share = (cumulative.long() - before).double() / ONE * counts.sum(0)[expert]
        off = quotas.sum(0) - share
        assert float(off.abs().max()) < 1
        replicated = t["copy_start"].diff()[expert] > 1
        for rank in range(ranks):
            mine = holder == rank
            n_replicated = len(expert[mine & replicated].unique())
            assert abs(float(off[mine].sum())) < max(n_replicated, 1e-9) or n_replicated == 0
        own = node = 0
        for e in range(placement.n_logical):
            here = expert == e
            a, b = nearest_first(counts[:, e], quotas.sum(0)[here], holder[here], ranks_per_node)
            own, node = own + a, node + b
        assert int(kept[:, 0].sum()) == own
        assert torch.equal(kept[:, 2], counts.sum(1))
        # Serving ranks first can cost a node nothing: what leaves a rank may stay on its node.
        assert int(kept[:, 1].sum()) == node


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_kernel_equals_twin(shape):
    """The kernel's shares and traffic are those of the twin on the first and last rank."""
    rng = np.random.default_rng(6)
    for case in range(2):
        placement, t, cumulative, counts, holder, _ = random_case(rng, shape)
        ranks_per_node = [2, placement.ep_size][case]
        quotas, kept = reference.divide_quotas(
            counts, cumulative, t["copy_start"], holder, ranks_per_node
        )
        lengths = t["copy_start"].diff().long()
        wanted = (lengths > 1).repeat_interleave(lengths)
        on = {name: t[name].to(DEVICE) for name in ("copy_start", "copy_slot", "copy_index")}
        for rank in (0, placement.ep_size - 1):
            mine = torch.full_like(cumulative, -7).to(DEVICE)
            traffic = torch.ones(3, dtype=torch.int64, device=DEVICE)
            given = kernels.Quotas(
                counts.int().to(DEVICE), *on.values(), mine, traffic,
                rank, placement.slots_per_rank, ranks_per_node, int(lengths.max()) + 1,
            )  # fmt: skip
            kernels.divide_quotas(cumulative.to(DEVICE), given)
            shares = reference.shares_of_quotas(quotas[rank], counts[rank], t["copy_start"], rank)
            assert torch.equal(mine.cpu()[wanted], shares[wanted])
            assert torch.equal(traffic.cpu() - 1, kept[rank])
            turned = reference.copy_quotas(counts[rank], shares, t["copy_start"], rank)
            assert torch.equal(turned, quotas[rank])


def test_select_meets_the_divided_quotas():
    """Every rank's selection sends to each slot exactly the tokens of its quota."""
    rng = np.random.default_rng(7)
    placement, t, cumulative, _, holder, _ = random_case(rng, SHAPES[-1])
    ids = [
        torch.from_numpy((rng.random(400) ** 2 * (placement.n_logical + 1)).astype(np.int64) - 1)
        for _ in range(placement.ep_size)
    ]
    counts = torch.stack([torch.bincount(i[i >= 0], minlength=placement.n_logical) for i in ids])
    quotas, _ = reference.divide_quotas(counts, cumulative, t["copy_start"], holder, 4)
    for rank in range(placement.ep_size):
        balancer = Balancer(placement, device="cpu", rank=rank)
        shares = reference.shares_of_quotas(quotas[rank], counts[rank], t["copy_start"], rank)
        out = balancer.select(ids[rank], shares, balancer.count(ids[rank])[1])
        got = torch.bincount(out[out >= 0], minlength=placement.n_physical)
        assert torch.equal(got[t["copy_slot"].long()], quotas[rank])
