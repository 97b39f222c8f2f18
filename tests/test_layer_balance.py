"""The part that training integrations share: one layer's placement, loads and imbalance."""

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from torch.utils.checkpoint import checkpoint

from lplb_triton import spread
from lplb_triton.integrations.layers import LayerBalance, measure_imbalance, rebalance_layers
from lplb_triton.training.spread import attach

CPU = torch.device("cpu")


def draw_ids(rank, seed=0):
    """Draw ids that mostly want experts of rank 0, with some dropped choices."""
    generator = torch.Generator().manual_seed(10 * rank + seed)
    ids = (8 * torch.rand(64, 2, generator=generator) ** 3).long()
    return ids.masked_fill(torch.rand(64, 2, generator=generator) < 0.1, -1)


def check_loads(rank, group):
    """Count, report, rebalance, and count again."""
    layer = LayerBalance(8, group=group, device=CPU, redundant=1)
    assert measure_imbalance([layer]) == [(1.0, 1.0)]
    per_batch = []
    for seed in range(3):
        ids = draw_ids(rank, seed)
        slots = layer.route(ids)
        assert torch.equal(slots < 0, ids < 0)
        kept = slots >= 0
        logical = layer.placement.phy2log[slots.clamp(min=0).long()].long()
        assert torch.equal(logical[kept], ids[kept])
        per_batch.append(ids)
    everywhere = [torch.cat([draw_ids(r, seed) for r in range(2)]) for seed in range(3)]
    halves = torch.stack([torch.bincount(x[x >= 0] // 4, minlength=2) for x in everywhere])
    before = float((halves.amax(1) / halves.double().mean(1)).mean())
    mine = torch.cat(per_batch)
    assert torch.equal(layer.load, torch.bincount(mine[mine >= 0], minlength=8))
    (found,) = measure_imbalance([layer])
    assert found.before == pytest.approx(before) and before > 1.5
    assert found.after < found.before
    first = layer.plan
    layer.rebalance()
    assert layer.plan is not first and not bool(layer.load.any())
    assert measure_imbalance([layer]) == [found]  # of the batches before
    for seed in range(9):  # more batches than are averaged over
        layer.route(draw_ids(rank, seed))
    (balanced,) = measure_imbalance([layer])
    assert balanced.after < 1.1 < balanced.before
    kept = layer.plan
    layer.load.zero_()
    layer.rebalance()
    assert layer.plan is kept  # nothing was counted, so nothing is known to be better


def check_many(rank, group):
    """Rebalance layers of two groups at once, one of them without loads."""
    alone = [dist.new_group([r]) for r in range(2)][rank]
    layers = [LayerBalance(8, group=group, device=CPU) for _ in range(3)]
    layers.append(LayerBalance(8, group=alone, device=CPU))
    plans = [layer.plan for layer in layers]
    for seed, layer in enumerate(layers):
        if seed != 1:
            layer.route(draw_ids(rank, seed))
    single = LayerBalance(8, group=group, device=CPU)
    single.route(draw_ids(rank, 0))
    assert rebalance_layers(layers) == 3
    kept = [layer.plan is plan for layer, plan in zip(layers, plans, strict=True)]
    assert kept == [False, True, False, False]
    single.rebalance()
    assert torch.equal(single.placement.phy2log, layers[0].placement.phy2log)
    assert layers[0].balancer.placement == layers[0].plan.placement


def test_many_layers_at_once(tmp_path):
    """Layers with loads get the placement that each would get by itself; others keep theirs."""
    run_ranks(check_many, 2, tmp_path)


def test_loads_and_imbalance(tmp_path):
    """Loads are what was routed; a placement by them balances the same loads."""
    run_ranks(check_loads, 2, tmp_path)


def check_recompute(rank, group):
    """Recompute a region with the placement of its forward pass, and with another."""
    layer = LayerBalance(8, group=group, device=CPU, redundant=1)
    ids = draw_ids(rank)
    w = torch.randn(4, 3, requires_grad=True)

    def region(w):
        slots = layer.route(ids)
        (weights,) = spread(layer.plan, w)
        local = slots.flatten() % layer.placement.slots_per_rank
        return attach(weights[local[slots.flatten() >= 0]].sin().sum(), [weights])

    for reentrant in (False, True):
        layer.load.zero_()
        checkpoint(region, w, use_reentrant=reentrant).backward()
        assert torch.equal(layer.load, torch.bincount(ids[ids >= 0], minlength=8))
        loss = checkpoint(region, w, use_reentrant=reentrant)
        layer.rebalance()
        with pytest.raises(RuntimeError, match="placement changed between a forward pass"):
            loss.backward()
        layer.route(ids)


def test_recomputed_regions(tmp_path):
    """A recomputed region counts no loads, and raises if the placement changed in between."""
    run_ranks(check_recompute, 2, tmp_path)


def test_bad_arguments_are_refused():
    """Numbers that don't fit are named."""
    with pytest.raises(ValueError, match="redundant must be at least 0"):
        LayerBalance(8, group=None, device=CPU, redundant=-1)
    with pytest.raises(ValueError, match="load must"):
        LayerBalance(8, group=None, device=CPU, load=torch.ones(7))


def check_size(rank, group):
    """Give a number of experts that the ranks can't share."""
    with pytest.raises(ValueError, match="must divide the 7 experts, got 2"):
        LayerBalance(7, group=group, device=CPU)


def test_experts_are_shared_evenly(tmp_path):
    """The group's size must divide the number of experts."""
    run_ranks(check_size, 2, tmp_path)


def check_live(rank, group):
    """Train with and without a live slot, by ids that the placement doesn't foresee."""
    layer = LayerBalance(8, group=group, device=CPU, redundant=0, live=1)
    generator = torch.Generator().manual_seed(3)
    everything = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    w = everything[4 * rank : 4 * rank + 4].clone().requires_grad_()
    filled, expected = 0, torch.zeros(8, dtype=torch.float64)
    for seed in range(3):
        ids = draw_ids(rank, seed) if seed != 1 else torch.arange(8).repeat(8).view(-1, 2)

        def region(w, ids=ids):
            slots = layer.route(ids)
            (weights,) = spread(layer.batch_plan, w)
            # What all ranks send to this rank's slots, as its experts would get it.
            counts = torch.bincount(slots[slots >= 0].long(), minlength=layer.placement.n_physical)
            dist.all_reduce(counts, group=group)
            own = counts.view(2, -1)[rank].double()
            return attach((own[:, None] * weights).sum(), [weights], layer.batch_plan)

        checkpoint(region, w, use_reentrant=False).backward()
        plan = layer.batch_plan
        assert plan.is_of_batch == bool((layer.balancer.live.experts >= 0).any())
        filled += plan.is_of_batch
        chosen = [draw_ids(r, seed) if seed != 1 else ids for r in range(2)]
        expected += torch.bincount(torch.cat([c[c >= 0] for c in chosen]), minlength=8)
    assert 0 < filled < 3
    mine = expected[4 * rank : 4 * rank + 4, None].expand(4, 3)
    torch.testing.assert_close(w.grad, mine, rtol=1e-12, atol=0)
    layer.rebalance(torch.ones(8))
    assert layer.idle and layer.batch_plan is layer.plan
    even = torch.arange(8).view(-1, 2)
    assert torch.equal(layer.placement.phy2log[layer.route(even).long()].long(), even)


def test_live_slots_of_a_layer(tmp_path):
    """A live slot changes neither gradients nor, where the layer is idle, where tokens go."""
    with pytest.raises(ValueError, match="^live must be at most 2, got 3"):
        LayerBalance(8, group=None, device=CPU, live=3)
    run_ranks(check_live, 2, tmp_path)


def check_idle(rank, group):
    """Rebalance by loads that are even enough, and then by uneven ones."""
    layer = LayerBalance(8, group=group, device=CPU, redundant=1, balance_above=1.05)
    w = torch.randn(4, 3, requires_grad=True)
    even = torch.arange(8).repeat(8).view(-1, 2)
    layer.route(even)
    assert not layer.idle
    layer.rebalance()
    assert layer.idle
    solves = int(layer.balancer.solves)
    slots = layer.route(even.masked_fill(even == 3, -1))
    assert torch.equal(slots[even != 3], (even + even // 4)[even != 3])
    assert bool((slots[even == 3] == -1).all()) and int(layer.balancer.solves) == solves
    (weights,) = spread(layer.plan, w)
    assert torch.equal(weights[:4], w) and not bool(weights[4:].any())
    (rows,) = spread(layer.plan, list(w.unbind()), redundant_only=True)
    attach((weights**2).sum() + rows.sum(), [weights, rows], layer.plan).backward()
    torch.testing.assert_close(w.grad, 2 * w.detach())
    layer.route(draw_ids(rank))
    layer.load.zero_()
    layer.route(draw_ids(rank, 1))
    layer.rebalance()  # by the latest batches, which are not all even
    assert not layer.idle and layer.plan.count_messages() != (0, 0)
    layer.rebalance(torch.ones(8) if rank == 0 else torch.arange(8.0))  # the first rank's count
    assert layer.idle
    layer.rebalance(torch.arange(8.0))
    assert not layer.idle


def test_even_layers_are_idle(tmp_path):
    """Where balancing would gain little, nothing is solved or sent, until loads are uneven."""
    run_ranks(check_idle, 2, tmp_path)
