"""Weights of live slots by messages: values, gradients, and batches that differ between ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from torch.utils.checkpoint import checkpoint

from lplb_triton import Placement, Replicas, SpreadPlan, chain, spread
from lplb_triton.sync import SyncError
from lplb_triton.training.slot_memory import keep_redundant_rows
from lplb_triton.training.spread import attach, stack_slots

RANKS, EXPERTS, WIDTH = 4, 8, 3
EXACT = dict(rtol=1e-10, atol=1e-10)


def make_plan(group, live=1, redundant=1, **settings):
    generator = torch.Generator().manual_seed(0)
    ranks = 1 if group is None else group.size()
    load = torch.rand(EXPERTS, generator=generator)
    placement = chain(load, ranks, redundant_per_rank=redundant, keep_home=True)
    placement = placement.with_live_slots(live)
    return SpreadPlan(placement, group=group, device="cpu", **settings)


class Batch:
    """Weights and output gradients of all ranks in one batch, and what must come of them."""

    def __init__(self, plan, rank, experts, dtype=torch.float64):
        generator = torch.Generator().manual_seed(7)
        shape = plan.placement.n_physical, WIDTH
        everything = torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        upstream = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        table = plan.placement.phy2log.long().view(plan.placement.ep_size, -1).clone()
        table[:, plan.placement.static_per_rank :] = experts
        held = table.view(-1)
        home = slice(rank * plan.n_local, (rank + 1) * plan.n_local)
        self.upstream = upstream.view(*table.shape, WIDTH)[rank]
        self.original = everything[home].clone()
        known = (held >= 0)[:, None]
        self.slots = torch.where(known, everything[held], 0).view(*table.shape, WIDTH)[rank]
        total = torch.zeros(EXPERTS, WIDTH, dtype=torch.float64)
        total.index_add_(0, held[held >= 0], upstream[held >= 0].double())
        self.gradient = total[home]

    def leaf(self):
        return self.original.clone().requires_grad_()

    def loss(self, slots):
        return (slots * self.upstream).sum()


def draw_batches(live):
    """Experts of live slots of several batches: some, none, one expert everywhere, all, other."""
    none = torch.full((RANKS, live), -1)
    one, everywhere = none.clone(), none.clone()
    one[2, 0] = 1
    everywhere[1:, live - 1] = 0
    filled = (torch.arange(RANKS * live) * 3 % EXPERTS).view(RANKS, live)
    return [one, none, everywhere, filled.int(), none, filled.flip(0)]


def check_gradients(plan, rank, live):
    """Every form of the call gives the weights and sums of its batch, with changing batches."""
    n = plan.n_local
    for experts in draw_batches(live):
        case, filled = Batch(plan, rank, experts), plan.fill(experts)
        assert filled.is_of_batch == bool((experts >= 0).any()) == (filled is not plan)
        assert filled.n_redundant == 1 + live
        w = case.leaf()
        (slots,) = spread(filled, w)
        assert torch.equal(slots, case.slots)
        attach(case.loss(slots), [slots], filled).backward()
        torch.testing.assert_close(w.grad, case.gradient, **EXACT)
        parts = [row.clone().requires_grad_() for row in case.original]
        (rows,) = spread(filled, parts, redundant_only=True)
        assert torch.equal(rows, case.slots[n:])
        case.loss(torch.cat([torch.stack(parts), rows])).backward()
        torch.testing.assert_close(torch.stack([p.grad for p in parts]), case.gradient, **EXACT)
        with torch.no_grad():
            assert torch.equal(spread(filled, case.original)[0], case.slots)


def check_accumulation(plan, rank, live):
    """Micro-batches in flight keep their own live slots, and gradients add up."""
    w, losses, expected = Batch(plan, rank, -1).leaf(), [], 0
    for experts in draw_batches(live):
        case = Batch(plan, rank, experts)
        plan_of_batch = plan.fill(experts)
        (slots,) = stack_slots(plan_of_batch, [w], reuse_gradients=True)
        with keep_redundant_rows(plan_of_batch, [w], [slots]):
            losses.append((slots * slots).sum() / 2 + case.loss(slots.sin()))
        alone = case.leaf()
        (again,) = spread(plan_of_batch, alone)
        ((again * again).sum() / 2 + case.loss(again.sin())).backward()
        expected = expected + alone.grad
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(w.grad, expected, **EXACT)


def check_checkpointing(plan, rank, live):
    """A recomputed region makes the plan of its batch again."""
    for use_reentrant in (False, True):
        w, expected = Batch(plan, rank, -1).leaf(), 0
        for experts in draw_batches(live)[:4]:
            case = Batch(plan, rank, experts)

            def region(w, experts=experts, case=case):
                return case.loss(spread(plan.fill(experts), w)[0].sin())

            plain = case.leaf()
            region(plain).backward()
            expected = expected + plain.grad
            checkpoint(region, w, use_reentrant=use_reentrant).backward()
        torch.testing.assert_close(w.grad, expected, **EXACT)


def check_order(plan, rank, live):
    """Sums of float32 gradients are the same in every run, bit for bit."""
    experts = draw_batches(live)[2]
    case, found = Batch(plan, rank, experts, torch.float32), []
    for _ in range(3):
        w = case.leaf()
        case.loss(spread(plan.fill(experts), w)[0]).backward()
        found.append(w.grad)
    assert all(torch.equal(one, found[0]) for one in found)


def check_disagreement(group, rank):
    """Experts that differ, or don't fit, are an error on every rank before anything is sent."""
    plan = make_plan(group)
    experts = draw_batches(1)[3]
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda *args, **kwargs: sent.append(args))
        with pytest.raises(SyncError, match=r"ranks \[2\] differ from rank 0") as caught:
            plan.fill(experts.flip(0) if rank == 2 else experts)
        assert caught.value.ranks == (2,) and caught.value.epoch == 1
        kind, message = (ValueError, "^experts must be in") if rank == 1 else (SyncError, r"\[1\]")
        with pytest.raises(kind, match=message):
            plan.fill(experts + EXPERTS if rank == 1 else experts)
    assert not sent
    # The ranks are still in step.
    filled = plan.fill(experts)
    case = Batch(plan, rank, experts)
    assert torch.equal(spread(filled, case.original)[0], case.slots)
    w = case.leaf()
    loss = case.loss(spread(filled, w)[0])
    plan.retire()
    with pytest.raises(RuntimeError, match="placement changed between"):
        loss.backward()
    with pytest.raises(RuntimeError, match="placement changed between"):
        plan.fill(experts)


def check_death(group, rank):
    """Rank 3 dies where the others compare their batch: they name it within the time-out."""
    plan = make_plan(group, timeout=10.0)
    experts = draw_batches(1)[3]
    spread(plan.fill(experts), Batch(plan, rank, experts).original)
    if rank == RANKS - 1:
        os._exit(0)
    begun = time.monotonic()
    with pytest.raises(SyncError, match=r"ranks \[3\] did not come|rank that could not") as caught:
        plan.fill(experts)
    assert caught.value.ranks == (3,) and time.monotonic() - begun < 14
    # Rank 0 serves the store in which the others look for reports.
    time.sleep(1.0)
    os._exit(0)


def check_everything(rank, group):
    for live in (1, 2):
        plan = make_plan(group, live)
        check_gradients(plan, rank, live)
        check_accumulation(plan, rank, live)
        check_checkpointing(plan, rank, live)
        check_order(plan, rank, live)
    check_gradients(make_plan(group, 2), rank, 2)
    check_disagreement(group, rank)
    check_death(group, rank)


def test_live_slots_train_like_any_others(tmp_path):
    """Weights, gradients, micro-batches, checkpointing and errors of batches on four ranks."""
    run_ranks(check_everything, RANKS, tmp_path)


def test_one_rank_and_refusals():
    """A rank alone fills its slots without a group; what can't be filled is refused by name."""
    plan = make_plan(None)
    experts = torch.tensor([[5]])
    filled = plan.fill(experts)
    assert torch.equal(spread(filled, torch.eye(EXPERTS))[0][-1], torch.eye(EXPERTS)[5])
    with pytest.raises(RuntimeError, match="is that of a batch"):
        filled.fill(experts)
    for wrong, error in (
        ([[5]], TypeError),
        (torch.tensor([[5.0]]), TypeError),
        (torch.tensor([5]), ValueError),
        (torch.tensor([[-2]]), ValueError),
        (torch.tensor([[EXPERTS]]), ValueError),
    ):
        with pytest.raises(error, match="^experts must"):
            plan.fill(wrong)
    static = Placement.from_phy2log(torch.arange(4), 1)
    with pytest.raises(ValueError, match="must have live slots"):
        SpreadPlan(static, device="cpu").fill(experts)
    idle = SpreadPlan.of_agreed(plan.placement, None, torch.device("cpu"), idle=True)
    with pytest.raises(RuntimeError, match="^an idle plan"):
        idle.fill(experts)
    w = torch.eye(EXPERTS)
    with pytest.raises(ValueError, match="^buffers must be None for a plan with live slots"):
        stack_slots(filled, [w], buffers=[torch.zeros(10, EXPERTS)])
    with pytest.raises(ValueError, match="^placement must have no live slots"):
        Replicas(plan.placement, {"w": w})
    for timeout in (0, "1"):
        with pytest.raises((TypeError, ValueError), match="^timeout must be"):
            SpreadPlan(plan.placement, device="cpu", timeout=timeout)
