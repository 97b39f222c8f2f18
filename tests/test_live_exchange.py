"""Live slots where the solving kernel exchanges counts: one plan, and versions that tell of it."""

import pytest
import torch
from helpers.live import check_ids, make_placement, words_of
from helpers.peers import DEVICE, Team, ids_for

from lplb_triton import Balancer
from lplb_triton.sync import SyncError

FIRST_VERSION, EXPERTS = 77, 12


def make_team(quotas="local", redundant=0, timeout=20.0):
    """Make balancers of three ranks with a live slot each, which exchange counts by the kernel."""
    team = Team(make_placement(3, EXPERTS, 1, redundant), quotas, timeout)
    for balancer in team.balancers:
        # As the first versions that tests publish by hand.
        balancer._layer.live_versions.fill_(FIRST_VERSION)
    return team


def publish(team, batches, epoch, versions):
    """Send every rank's counts, so that on a CPU one rank can run after the other."""
    counts = team.counts(batches)
    for rank, version in enumerate(versions):
        team.ranks.publish(rank, counts[rank], epoch, version=version)


def version_of(balancer):
    """Return what the balancer's next call on the first channel sends."""
    return int(balancer._layer.live_versions[0])


@pytest.mark.parametrize(("quotas", "redundant"), [("local", 0), ("local", 1), ("global", 0)])
def test_ranks_make_one_plan_in_the_kernel(quotas, redundant):
    """All ranks plan the same, send the plan's version next, and their loads are the plan's."""
    team = make_team(quotas, redundant)
    placement, versions = team.placement, [FIRST_VERSION] * 3
    twin = Balancer(placement, device="cpu", backend="torch", rank=0)
    for epoch in (1, 2, 3):
        batches = ids_for(team, 100, seed=epoch)
        if epoch == 2:
            # All ranks need the same, so nothing is fetched.
            batches = [torch.arange(EXPERTS, device=DEVICE).repeat(5).reshape(-1, 4)] * 3
        publish(team, batches, epoch, versions)
        loads = torch.zeros(3, dtype=torch.long)
        plans = []
        for balancer, idx in zip(team.balancers, batches, strict=True):
            out = balancer.run(idx)
            check_ids(balancer, idx, out)
            slots = out[out >= 0].long().cpu()
            loads += torch.bincount(placement.rank_of_slot[slots].long(), minlength=3)
            plans.append(words_of(balancer.live))
            balancer.check()
        assert all(torch.equal(plan, plans[0]) for plan in plans)
        plan = team.balancers[0].live
        filled = bool((plan.experts >= 0).any())
        if not redundant:
            twin.run(torch.cat([idx.reshape(-1).cpu() for idx in batches]))
            assert torch.equal(plans[0][:-2], words_of(twin.live)[:-2])
            assert filled == (epoch != 2)
        slack = 3 * placement.slots_per_rank
        if quotas == "global":
            slack = 0 if filled else placement.slots_per_rank
        assert int(loads.max()) <= float(plan.max_load) + slack
        versions = [version_of(balancer) for balancer in team.balancers]
        assert len(set(versions)) == 1
        assert (versions[0] != FIRST_VERSION) == filled


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_another_plan_is_another_version():
    """A rank that sends the version of another plan is named, and nothing is fetched then."""
    team = make_team(timeout=0.05)
    batches = ids_for(team, 100, seed=1)
    publish(team, batches, 1, [FIRST_VERSION] * 3)
    balancer = team.balancers[0]
    balancer.run(batches[0])
    assert (balancer.live.experts >= 0).any()
    version = version_of(balancer)
    # Rank 1 has fetched nothing, where the others have.
    publish(team, batches, 2, [version, FIRST_VERSION, version])
    out = balancer.run(batches[0])
    check_ids(balancer, batches[0], out)
    assert (balancer.live.experts == -1).all()
    with pytest.raises(SyncError, match="epoch 2 .* placement version") as info:
        balancer.check()
    assert info.value.ranks == (1,)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_failed_exchange_leaves_live_slots_empty():
    """If a rank doesn't come, tokens go to static slots, and the next call raises."""
    team = make_team(timeout=0.05, redundant=1)
    batches = ids_for(team, 100, seed=1)
    balancer = team.balancers[0]
    out = balancer.run(batches[0])
    check_ids(balancer, batches[0], out)
    assert (balancer.live.experts == -1).all()
    static = out[out >= 0].cpu() % team.placement.slots_per_rank
    assert (static < team.placement.static_per_rank).all()
    with pytest.raises(SyncError, match="epoch 1 .* did not come") as info:
        balancer.check()
    assert info.value.ranks == (1, 2)


def test_warmup_plans_nothing():
    """A warm-up leaves versions, resident slots and the last plan as they are."""
    placement = make_placement(3, 24, 1, 1)
    balancer = Balancer(placement, device=DEVICE, backend="triton", rank=0, live_resident=True)
    idx = torch.arange(24, device=DEVICE).repeat(2)
    idx[:20] = 3
    balancer.run(idx)
    layer, words = balancer._layer, words_of(balancer.live)
    before = layer.live_versions.clone(), layer.resident.clone()
    balancer.warmup()
    assert torch.equal(layer.live_versions, before[0]) and torch.equal(layer.resident, before[1])
    assert torch.equal(words_of(balancer.live), words)
