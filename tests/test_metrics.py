"""Metrics of a balancer against the outcome of each batch."""

import math

import pytest
import torch

from lplb_triton import Balancer, Placement, chain

EXPERTS, RANKS = 16, 4


def draw(n, seed=0):
    """Draw ids of batches in which other experts are popular each time."""
    generator = torch.Generator().manual_seed(seed)
    load = torch.rand(n, EXPERTS, generator=generator) ** 4 + 0.01
    return [torch.multinomial(row.expand(128, -1), 2, generator=generator) for row in load]


def balance(placement, **options):
    """Make a balancer on the CPU."""
    return Balancer(placement, device="cpu", rank=0, **options)


def imbalance(loads):
    """Return the largest load over the mean."""
    return float(loads.max() / loads.mean())


def means_by_hand(placement, batches):
    """Average over batches the imbalance at home, and that of the ids of a balancer of its own."""
    other = balance(placement)
    home = placement.log2phy[:, 0].long() // placement.slots_per_rank
    before, after = [], []
    for idx in batches:
        counts = torch.bincount(idx.reshape(-1), minlength=EXPERTS).double()
        at_home = torch.zeros(RANKS, dtype=torch.float64).index_add_(0, home, counts)
        slots = torch.bincount(other.run(idx).reshape(-1), minlength=placement.n_physical)
        before.append(imbalance(at_home))
        after.append(imbalance(slots.view(RANKS, -1).sum(1).double()))
    return sum(before) / len(before), sum(after) / len(after)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "triton"},
        {"backend": "torch"},
        {"backend": "triton", "solver": "interior_point"},
    ],
    ids=["levelling", "torch", "interior_point"],
)
def test_means_over_batches(options):
    """Imbalances are those of the ids, the bound is below them, and a batch without ids is none."""
    placement = chain(torch.ones(EXPERTS), RANKS, redundant_per_rank=1)
    batches = draw(3)
    balancer = balance(placement, **options)
    assert balancer.metrics().batches == 0
    for idx in [*batches, torch.full((4, 2), -1)]:
        balancer.run(idx)
    found = balancer.metrics()
    before, after = means_by_hand(placement, batches)
    assert found.batches == 3
    assert found.imbalance_before == pytest.approx(before, rel=1e-6)
    # Quotas are whole tokens.
    assert found.imbalance_after == pytest.approx(after, abs=0.05)
    assert found.imbalance_static == found.imbalance_after < found.imbalance_before
    assert 1 - 1e-5 <= found.bound <= found.imbalance_after
    assert found.gap == pytest.approx(1 - found.bound / found.imbalance_after, abs=2e-3)
    assert found.certified == 1
    assert found.fetched == 0
    assert math.isnan(found.kept_on_rank)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_live_slots(backend):
    """With live slots the plan's load and the fetched experts are those of `Balancer.live`."""
    placement = Placement.from_phy2log(torch.arange(EXPERTS), RANKS).with_live_slots(1)
    balancer = balance(placement, backend=backend)
    fetched, after = 0, []
    for idx in draw(3, seed=1):
        balancer.run(idx)
        fetched += int((balancer.live.experts >= 0).sum())
        after.append(float(balancer.live.max_load) / (idx.numel() / RANKS))
    found = balancer.metrics()
    assert fetched > 0
    assert found.fetched == pytest.approx(fetched / 3)
    assert found.imbalance_after == pytest.approx(sum(after) / 3, rel=1e-6)
    assert found.imbalance_static == pytest.approx(found.imbalance_before, rel=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_resident_experts_are_not_fetched_again(backend):
    """An expert that lies in a live slot already is not counted as fetched."""
    placement = Placement.from_phy2log(torch.arange(EXPERTS), RANKS).with_live_slots(1)
    balancer = balance(placement, backend=backend, live_resident=True)
    (idx,) = draw(1)
    balancer.run(idx)
    first = balancer.metrics().fetched
    balancer.run(idx)
    assert first > 0
    assert balancer.metrics().fetched == 0


def test_readings_are_about_what_came_between():
    """A reading covers the batches since the one before, copies keep sums, warm-up adds none."""
    balancer = balance(chain(torch.ones(EXPERTS), RANKS, redundant_per_rank=1), backend="triton")
    first, second = draw(2)
    balancer.run(first)
    assert balancer.metrics().batches == 1
    balancer.warmup()
    assert balancer.metrics().batches == 0
    balancer.run(second)
    balancer.run(second)
    found = balancer.metrics()
    assert found.batches == 2
    single = balance(balancer.placement, backend="triton")
    single.run(second)
    assert found[1:7] == single.metrics()[1:7]
    balancer.solves.zero_()
    balancer.certified.zero_()
    balancer.run(first)
    assert balancer.metrics().certified == 1


def test_polling_does_not_wait():
    """A poll returns what the copy of the poll before it says."""
    balancer = balance(chain(torch.ones(EXPERTS), RANKS, redundant_per_rank=1))
    batches = draw(3)
    balancer.run(batches[0])
    assert balancer.metrics(wait=False) is None
    balancer.run(batches[1])
    assert balancer.metrics(wait=False).batches == 1
    assert balancer.metrics().batches == 1


@pytest.mark.gpu
def test_replays_add_to_metrics():
    """Replays of a CUDA graph count, and polling ends with their number."""
    placement = chain(torch.ones(EXPERTS), RANKS, redundant_per_rank=1)
    balancer = Balancer(placement, device="cuda", rank=0)
    idx = draw(1)[0].cuda()
    balancer.run(idx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        balancer.run(idx)
    reference = balancer.metrics()
    for _ in range(5):
        graph.replay()
    assert balancer.metrics(wait=False) is None
    torch.cuda.synchronize()
    found = balancer.metrics(wait=False)
    assert found.batches == 5
    assert found.imbalance_after == pytest.approx(reference.imbalance_after, rel=1e-9)


def test_metrics_print_as_one_line():
    """Printed metrics say batches, imbalance, its bound and certificates, or that none came."""
    balancer = balance(chain(torch.ones(EXPERTS), RANKS, redundant_per_rank=1))
    assert str(balancer.metrics()) == "no batches since the last reading"
    for idx in draw(2):
        balancer.run(idx)
    found = balancer.metrics()
    before, after, bound = found.imbalance_before, found.imbalance_after, found.bound
    line = f"2 batches, imbalance {before:.3f} -> {after:.3f} (bound {bound:.3f}), 100% certified"
    assert str(found) == line
    assert str(found._replace(batches=1, certified=0.9999)).startswith("1 batch, ")
    assert str(found._replace(certified=0.9999)).endswith(" 99% certified")
