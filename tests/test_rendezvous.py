"""Collective calls outside of batches: bounded, with the missing ranks named on all others."""

import time

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks

from lplb_triton import Balancer, Placement, sync
from lplb_triton.sync import SyncError
from lplb_triton.sync._rendezvous import all_gather_objects, rendezvous_counts

BOUND = 1.0
EXPERTS = 30


def placement_of(ranks, seed=0):
    load = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed))
    return Placement.from_history(load, ranks, redundant_per_rank=2)


def ids_of(rank):
    return torch.arange(rank, 400) ** 2 % EXPERTS


def check_rendezvous(rank, group):
    """A rendezvous returns all values, names late ranks and other purposes, and leaves no keys."""
    assert all_gather_objects(group, "a test", 20.0, rank) == [0, 1, 2]
    store = dist.distributed_c10d._get_process_group_store(group)
    # Of a rendezvous that succeeded only the outcome stays, until the next one.
    assert all_gather_objects(group, "a test", 20.0, rank * 2) == [0, 2, 4]
    dist.barrier()
    assert not store.check(["lplb_triton/meeting/1/end"])
    assert not store.check([f"lplb_triton/meeting/2/{rank}"])

    if rank == 1:
        time.sleep(2 * BOUND)
    begun = time.monotonic()
    # The late rank raises at once.
    with pytest.raises(SyncError, match=rf"^a test failed on rank {rank}: ranks \[1\] did") as info:
        all_gather_objects(group, "a test", BOUND)
    assert info.value.ranks == (1,) and time.monotonic() - begun < BOUND + 1
    with pytest.raises(SyncError, match="came for") as info:
        all_gather_objects(group, "another" if rank == 2 else "a test", 20.0)
    assert info.value.ranks == ((0, 1) if rank == 2 else (2,))
    # The next ones are not affected.
    assert all_gather_objects(group, "a test", 20.0, -rank) == [0, -1, -2]


def check_update(rank, group):
    """One rank updates while the others run: it stops waiting, and nothing has changed."""
    balancer = Balancer(placement_of(3), group=group, device="cpu", timeout=BOUND)
    expected = balancer.run(ids_of(rank))
    if rank == 2:
        message = r"^Balancer.update_placement failed on rank 2: ranks \[0, 1\] did not come"
        with pytest.raises(SyncError, match=message) as info:
            balancer.update_placement(placement_of(3, 1))
        assert info.value.ranks == (0, 1)
    dist.barrier()
    assert torch.equal(balancer.placement.phy2log, placement_of(3).phy2log)
    assert torch.equal(balancer.run(ids_of(rank)), expected)

    # The others, who come later, hear that this one has failed; together it works.
    if rank < 2:
        with pytest.raises(SyncError, match=r"ranks \[0, 1\] did not come"):
            balancer.update_placement(placement_of(3, 1))
    dist.barrier()
    balancer.update_placement(placement_of(3, 1))
    assert torch.equal(balancer.placement.phy2log, placement_of(3, 1).phy2log)

    # What one rank's arguments are refused for, the others are told of.
    wrong = placement_of(3) if rank != 1 else 7
    with pytest.raises(TypeError if rank == 1 else ValueError, match="^placement") as info:
        balancer.update_placement(wrong)
    assert rank == 1 or "rank 1" in str(info.value)
    balancer.run(ids_of(rank))


def check_others(rank, group):
    """Making a balancer, another group, ending one: each of them is bounded."""
    if rank != 1:
        for call in (
            lambda: Balancer(placement_of(3), group=group, device="cpu", timeout=BOUND),
            lambda: Balancer(placement_of(3), device="cpu", timeout=BOUND, rank=0).set_group(group),
            lambda: sync.connect(group, device="cpu", timeout=BOUND),
        ):
            begun = time.monotonic()
            with pytest.raises(SyncError, match=r"ranks \[1\] did not come within 1 s"):
                call()
            assert time.monotonic() - begun < BOUND + 3
    dist.barrier()


def check_ranks(rank, group):
    check_rendezvous(rank, group)
    check_update(rank, group)
    check_others(rank, dist.new_group())


def test_ranks_that_do_not_come_are_named(tmp_path):
    """Collective calls end within their bound and name the ranks that are missing."""
    run_ranks(check_ranks, 3, tmp_path)


class _Store:
    """A store whose server has gone."""

    def set(self, *_):
        raise dist.DistNetworkError("Connection reset by peer")


class _Group:
    def size(self):
        return 2


def test_a_store_that_is_gone_is_named(monkeypatch):
    """If the store can't be reached, the error says so and names the caller."""
    group = _Group()
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr("lplb_triton.sync._rendezvous.group_store", lambda group: _Store())
    with pytest.raises(SyncError, match="^closing failed on rank 1: the store .*Connection"):
        all_gather_objects(group, "closing", 1.0)
    assert rendezvous_counts[group] == 1
