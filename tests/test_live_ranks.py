"""Live slots over gloo: one plan on all ranks, exact quotas, and ranks that plan differently."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers.live import check_ids, draw_ids, make_placement, words_of

import lplb_triton._backends.torch as torch_backend
from lplb_triton import Balancer
from lplb_triton.sync import SyncError

TIMEOUT = 60.0


def ids_of(placement, rank, batch):
    """Uneven ids of a rank; rank 1 has none in batch 1, and batch 2 is level."""
    if batch == 1 and rank == 1:
        return torch.empty(0, 4, dtype=torch.int64)
    if batch == 2:
        return torch.arange(placement.n_logical).repeat(20).reshape(-1, 4)
    # The same experts are hot on every rank.
    idx = draw_ids(placement, 400 + 40 * rank, power=8.0, seed=batch, device="cpu")
    return idx[torch.randperm(len(idx), generator=torch.Generator().manual_seed(rank))]


def make(placement, group, **settings):
    settings = {"device": "cpu", "timeout": TIMEOUT, "sync": "distributed", **settings}
    return Balancer(placement, group=group, **settings)


def gather(group, tensor):
    rows = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(rows, tensor, group=group)
    return rows


def check_batches(group, rank, placement, **settings):
    """All ranks make one plan, and their loads together are those of it."""
    balancer = make(placement, group, **settings)
    layer, exact = balancer._layer, balancer.quotas == "global"
    for batch in range(3):
        idx = ids_of(placement, rank, batch)
        out = balancer.run(idx)
        check_ids(balancer, idx, out)
        words = words_of(balancer.live)
        assert all(torch.equal(words, other) for other in gather(group, words))
        loads = torch.bincount(out[out >= 0].long(), minlength=placement.n_physical)
        dist.all_reduce(loads, group=group)
        most = int(loads.reshape(placement.ep_size, -1).sum(1).max())
        plan = balancer.live
        filled = bool((plan.experts >= 0).any())
        if not placement.redundant_per_group:
            assert filled == (batch != 2)
        if filled and exact:
            assert most == float(plan.max_load)
        assert most <= float(plan.max_load) + placement.ep_size * placement.slots_per_rank
        # What the next call sends along with the counts tells plans apart.
        assert bool((layer.live_versions[:1] != layer.version).all()) == filled
        versions = gather(group, layer.live_versions[:1])
        assert all(torch.equal(version, versions[0]) for version in versions)
    if exact:
        kept, node, everything = balancer.traffic.tolist()
        assert 0 < kept <= node <= everything
        sent = sum(ids_of(placement, rank, batch).numel() for batch in range(3))
        assert everything == sent
    balancer.close()


def check_one_plan(rank, group, live, interpreted):
    ranks = group.size()
    placement = make_placement(ranks, 8 * ranks, live)
    with_copies = make_placement(ranks, 8 * ranks, live, redundant=1)
    for quotas in ("local", "global"):
        check_batches(group, rank, placement, quotas=quotas)
        check_batches(group, rank, with_copies, quotas=quotas)
        if ranks == 2 and interpreted:
            check_batches(group, rank, placement, quotas=quotas, backend="triton")


@pytest.mark.parametrize(("ranks", "live"), [(2, 2), (4, 1)])
def test_ranks_make_one_plan(tmp_path, ranks, live):
    """Ranks make the same plan, and with global quotas loads are exactly those of it."""
    # Kernels take tensors on a CPU only where they are interpreted.
    run_ranks(check_one_plan, ranks, tmp_path, live, not torch.cuda.is_available())


def check_refusals(rank, group):
    placement = make_placement(2, 16, 1)
    first = rank == 0
    for other in (
        {"live_above": 1.02 if first else 1.03},
        {"live_cost": 0 if first else 5},
        {"live_fanout": None if first else 4},
        {"live_domain": None if first else 1},
        {"live_resident": first},
    ):
        with pytest.raises(ValueError, match="^placement, quotas and .* rules of live slots"):
            make(placement, group, **other)
    with pytest.raises(ValueError, match="^placement, quotas and .* live slots of a rank"):
        make(placement.with_live_slots(1 if first else 2), group)
    alone = Balancer(placement, device="cpu", rank=rank, live_above=1.1 if first else 1.2)
    with pytest.raises(ValueError, match="^placement, quotas and solver"):
        alone.set_group(group)
    # The same rules are taken, and rank 0's placement is everyone's.
    mine = make_placement(2, 16, 1, redundant=1, seed=rank)
    with make(mine, group, live_above=1.1, live_cost=3, live_fanout=2) as balancer:
        assert balancer.placement == make_placement(2, 16, 1, redundant=1, seed=0)
        with pytest.raises(ValueError, match="^placement"):
            balancer.update_placement(mine.with_live_slots(1 if first else 2))
        balancer.run(ids_of(mine, rank, 0))


def test_ranks_with_other_rules_are_refused(tmp_path):
    """Rules and live slots that differ by rank are refused when a balancer is made or joins."""
    run_ranks(check_refusals, 2, tmp_path)


def check_copies(rank, group):
    placement = make_placement(2, 16, 1)
    balancer = make(placement, group, quotas="global", live_cost=2)
    idx = ids_of(placement, rank, 0)
    expected, words = balancer.run(idx), words_of(balancer.live)
    twin, state = copy.deepcopy(balancer), pickle.dumps(balancer)
    assert torch.equal(twin.run(idx), expected)
    assert torch.equal(words_of(twin.live), words)
    loaded = pickle.loads(state)
    with pytest.raises(RuntimeError, match=r"call set_group\(group\) on every rank"):
        loaded.run(idx)
    loaded.set_group(group)
    assert torch.equal(loaded.run(idx), expected)
    assert torch.equal(words_of(loaded.live), words)
    for each in (balancer, twin, loaded):
        each.close()


def test_copies_and_files_in_a_group(tmp_path):
    """Copies and files of a balancer in a group make the plans of the original."""
    run_ranks(check_copies, 2, tmp_path)


def check_confusion(rank, group, backend):
    placement = make_placement(2, 16, 1)
    balancer = make(placement, group, backend=backend)
    idx = ids_of(placement, rank, 0)
    balancer.run(idx)
    if rank == 1 and backend == "triton":
        balancer._layer.live_versions += 1
    elif backend == "torch":
        plan = torch_backend.plan_live
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                # One rank fetches nothing where the other does.
                patch.setattr(
                    torch_backend, "plan_live",
                    lambda case, *given: plan(case._replace(above=1e9), *given),
                )  # fmt: skip
            balancer.run(idx)
    epoch = 2 if backend == "triton" else 3
    with pytest.raises(SyncError, match=f"epoch {epoch} of .* placement version") as info:
        balancer.run(idx)
    assert info.value.ranks == (1 - rank,) and info.value.epoch == epoch
    with pytest.raises(SyncError):
        balancer.run(idx)
    balancer.close()
    # A failed group leaves threads behind that a regular end would wait for.
    os._exit(0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_rank_that_plans_differently_is_found(tmp_path, backend):
    """Ranks whose plans differ raise at their next call, and name each other."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels run on the CPU by the interpreter, which needs a machine without GPUs")
    run_ranks(check_confusion, 2, tmp_path, backend)
