"""Communicators over gloo: exact sums, global quotas, late, dead and confused ranks, lifecycle."""

import gc
import os
import pickle
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo import context, run_ranks
from helpers.batches import EXPERTS, count, ids_of, placement_of

from lplb_triton import Balancer, Placement, sync
from lplb_triton.sync import _connect, _rendezvous
from lplb_triton.sync._connect import deep_ep_domain, shared_communicators

BOUND = 4.0


def check_quotas(group, rank, ranks):
    """Exact over all ranks, and nearer than each rank's own rounding."""
    placement = placement_of(ranks)
    structure = placement.structure
    lengths = np.diff(structure.copy_start)
    kept = {}
    with (
        Balancer(placement, group=group, device="cpu", timeout=60, quotas="global") as exact,
        Balancer(placement, group=group, device="cpu", timeout=60) as rounded,
    ):
        assert "quotas=global" in repr(exact) and "torch.distributed(gloo)" in repr(exact)
        assert exact.communicator is rounded.communicator
        for batch in range(4):
            mine = ids_of(rank, batch)
            if rank == ranks - 1:
                time.sleep(0.3)
            for name, balancer in (("global", exact), ("local", rounded)):
                out = balancer.run(mine)
                assert torch.equal(placement.phy2log[out[out >= 0]].long(), mine[mine >= 0])
                loads = count(out, placement.n_physical)
                by_rank = placement.rank_of_slot[out[out >= 0].long()]
                kept[name] = kept.get(name, 0) + int((by_rank == rank).sum())
                dist.all_reduce(loads, group=group)
                counts = count(torch.cat([ids_of(r, batch) for r in range(ranks)]), EXPERTS)
                single = Balancer(placement, device="cpu", rank=0)
                cumulative = single.cumulative_shares(single.solve(counts.int()).shares).long()
                first = np.repeat(structure.copy_start[:-1], lengths)
                before = torch.cat([torch.zeros(1, dtype=torch.long), cumulative[:-1]])
                before[torch.tensor(structure.copy_start[:-1]).long()] = 0
                expert = torch.from_numpy(np.repeat(np.arange(EXPERTS), lengths))
                share = (cumulative - before).double() / (1 << 24) * counts[expert]
                off = loads[torch.tensor(structure.copy_slot).long()] - share
                if name == "global":
                    assert float(off.abs().max()) < 1
                    holder = placement.rank_of_slot[torch.tensor(structure.copy_slot).long()]
                    for r in range(ranks):
                        replicated = (holder == r).numpy() & (lengths[expert] > 1)
                        n_replicated = len(set(first[replicated]))
                        assert abs(float(off[holder == r].sum())) <= max(0, n_replicated)
        assert exact.traffic[0] == kept["global"]
    both = torch.tensor([kept["global"], kept["local"], int(exact.traffic[2])])
    dist.all_reduce(both, group=group)
    assert both[0] > both[1]
    if rank == 0:
        print(f"{ranks} ranks: own rank keeps {both[1] / both[2]:.3f} -> {both[0] / both[2]:.3f}")


def check_domains(group, rank, ranks):
    """Two communicators in a row give what one gives."""
    # torch names a group after the number of groups of its ranks, here another one on rank 0.
    dist.new_group([0])
    with (
        sync.connect(group, device="cpu", timeout=60) as flat,
        sync.connect(group, "hierarchical", device="cpu", timeout=60, domain_size=2) as tree,
    ):
        for step in range(3):
            counts = torch.arange(20, dtype=torch.int32) * (rank + 1) + step
            version = torch.tensor([step], dtype=torch.int32)
            results = []
            for communicator in (flat, tree):
                total = torch.empty_like(counts)
                rows = torch.empty(ranks, 20, dtype=torch.int32)
                alone = torch.empty_like(counts)
                communicator.exchange(counts, version, total, rows)
                communicator.exchange(counts, version, alone)
                assert torch.equal(total, alone)
                results.append((total, rows))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
        check_large(tree)
        assert repr(tree).startswith("hierarchical(torch.distributed(gloo) x 2")


def check_large(communicator):
    """No sum wraps around, and what one rank has no count for has no sum."""
    most, ranks = 2**31 - 1, communicator.n_ranks
    mine = [-1, most, most, 5] if communicator.rank == 0 else [100, 0, 1, 6]
    counts, version = torch.tensor(mine, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for rows in (None, torch.empty(ranks, 4, dtype=torch.int32)):
        total = torch.empty(4, dtype=torch.int32)
        communicator.exchange(counts, version, total, rows)
        assert total.tolist() == [-2, most, -2, 5 + 6 * (ranks - 1)]


def check_confusion(group, rank, ranks):
    """Two layers in another order on one rank: nobody takes the sum for its own."""
    layers = [Balancer(placement_of(ranks, i), group=group, device="cpu") for i in (0, 1)]
    mine = ids_of(rank, 1)
    layers[0].run(mine)
    with pytest.raises(sync.SyncError, match="epoch 2 of .* placement version") as info:
        layers[rank == 1].run(mine)
    expected = tuple(r for r in range(ranks) if r != 1) if rank == 1 else (1,)
    assert info.value.ranks == expected and info.value.epoch == 2
    for call in (lambda: layers[0].run(mine), layers[0].check):
        with pytest.raises(sync.SyncError, match="epoch 2"):
            call()
    layers[0].close()
    layers[0].close()
    layers[1].close()
    with pytest.raises(RuntimeError, match="is closed"):
        layers[0].run(mine)
    with pytest.raises(RuntimeError, match="has failed"):
        Balancer(placement_of(ranks), group=group, device="cpu")


def check_confusion_in_a_domain(group, rank):
    """A rank of the second domain comes with another call; every rank's call ends with a name."""
    version = torch.tensor([rank == 3], dtype=torch.int32)
    with sync.connect(
        group, "hierarchical", device="cpu", timeout=0.5, domain_size=2
    ) as communicator:
        counts = torch.ones(4, dtype=torch.int32)
        begun = time.monotonic()
        with pytest.raises(sync.SyncError, match=f"failed on rank {rank}: ") as info:
            communicator.exchange(counts, version, torch.empty_like(counts))
        # The first domain can't know which of the second's ranks is right.
        assert info.value.ranks == ((2, 3), (2, 3), (3,), (2,))[rank]
        assert time.monotonic() - begun < 6


def check_death(group, rank, ranks, victim):
    """One rank is killed between two batches."""
    balancer = Balancer(placement_of(ranks), group=group, device="cpu", timeout=BOUND)
    balancer.run(ids_of(rank, 0))
    dist.barrier(group)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(sync.SyncError, match=f"epoch 2 of .* failed on rank {rank}") as info:
        balancer.run(ids_of(rank, 1))
    assert time.monotonic() - begun < BOUND + 6
    assert info.value.ranks == (victim,) and info.value.epoch == 2
    balancer.close()


def work(rank, ranks, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    world = dist.group.WORLD
    assert sync.connect(world, device="cpu").timeout == 1800
    check_quotas(world, rank, ranks)
    with sync.connect(world, device="cpu", timeout=60) as communicator:
        check_large(communicator)
    # Closed without a fault: the same group serves again.
    assert not shared_communicators
    with Balancer(placement_of(ranks), group=world, device="cpu") as balancer:
        balancer.run(ids_of(rank, 1))
    assert not shared_communicators
    if ranks > 2:
        check_domains(world, rank, ranks)
    check_confusion(dist.new_group(list(range(ranks))), rank, ranks)
    if ranks == 4:
        check_confusion_in_a_domain(dist.new_group(list(range(ranks))), rank)
    with pytest.raises(ValueError, match="^placement, quotas and solver"):
        Balancer(
            placement_of(ranks, 0), group=world, device="cpu", quotas=("local", "global")[rank == 1]
        )
    check_death(dist.new_group(list(range(ranks))), rank, ranks, victim=ranks - 1)
    os._exit(0)


def spawn(target, ranks, path):
    """Exit code of every rank."""
    workers = [context().Process(target=target, args=(r, ranks, path)) for r in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks(ranks, tmp_path):
    """Ranks agree exactly, and a confused or killed rank is named on all others."""
    codes = spawn(work, ranks, tmp_path / "store")
    assert codes == [0] * (ranks - 1) + [-signal.SIGKILL]


def check_failed_group(rank, group):
    check_confusion(group, rank, group.size())


def test_a_failed_group_can_end(tmp_path):
    """A process group whose exchange has failed can be destroyed."""
    run_ranks(check_failed_group, 2, tmp_path)


class Runtime:
    """Of a legacy buffer's C++ runtime what is read."""

    def __init__(self, n_nodes):
        self._n_nodes = n_nodes

    def get_num_rdma_ranks(self):
        return self._n_nodes


class LegacyBuffer:
    """Attributes of ``deep_ep.Buffer`` (DeepEP 04b06f7, deep_ep/buffer.py; the same at 189df34)."""

    def __init__(self, group, n_nodes=1):
        self.rank = group.rank()
        self.group_size = group.size()
        self.group = group
        self.num_nvl_bytes = 1 << 28
        self.num_rdma_bytes = 0
        self.low_latency_mode = False
        self.runtime = Runtime(n_nodes)


class ElasticBuffer:
    """Attributes of ``deep_ep.ElasticBuffer`` (DeepEP 0297fc8, deep_ep/buffers/elastic.py)."""

    def __init__(self, group, n_nodes=1):
        self.group = group
        self.rank_idx, self.num_ranks = group.rank(), group.size()
        self.num_bytes, self.num_max_tokens_per_rank = 1 << 28, 4096
        self.num_scaleout_ranks, self.num_scaleup_ranks = n_nodes, group.size() // n_nodes
        self.num_rdma_ranks, self.num_nvlink_ranks = n_nodes, group.size() // n_nodes
        self.runtime = object()


class OfMpi(LegacyBuffer):
    """A legacy buffer made with ``comm=``, whose ``group`` is a communicator of mpi4py."""

    def __init__(self, group):
        super().__init__(group)
        self.group = object()


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=7),
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


class GroupOfEight:
    def size(self):
        return 8

    def rank(self):
        return 0


@pytest.mark.parametrize("kind", [LegacyBuffer, ElasticBuffer])
def test_what_is_read_of_deep_ep(kind, group_of_one, monkeypatch):
    """A DeepEP buffer of either kind gives its group and the ranks of a node."""
    assert deep_ep_domain(kind(group_of_one)) == (group_of_one, 1)
    monkeypatch.setattr(dist, "ProcessGroup", GroupOfEight)
    group = GroupOfEight()
    assert deep_ep_domain(kind(group)) == (group, 8)
    assert deep_ep_domain(kind(group, n_nodes=2)) == (group, 4)


def test_deep_ep_without_a_process_group(group_of_one):
    """A buffer without a process group of torch is refused by name."""
    for buffer in (OfMpi(group_of_one), object()):
        with pytest.raises(TypeError, match="^buffer must have a process group"):
            deep_ep_domain(buffer)


def test_bounds_come_from_the_group(group_of_one):
    """A communicator has its group's timeout unless one is given, and ends with its block."""
    with sync.connect(group_of_one, device="cpu") as communicator:
        assert communicator.timeout == 7
        assert repr(communicator) == "torch.distributed(gloo)"
        counts = torch.arange(5, dtype=torch.int32)
        total = torch.empty_like(counts)
        communicator.exchange(counts, torch.zeros(1, dtype=torch.int32), total)
        assert torch.equal(total, counts)
        communicator.check()
    with pytest.raises(RuntimeError, match="is closed"):
        communicator.exchange(counts, torch.zeros(1, dtype=torch.int32), total)
    assert sync.connect(group_of_one, device="cpu", timeout=0.5).timeout == 0.5


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda g: sync.connect(g, "nccl", device="cpu"), ValueError, "sync must be one of"),
        (lambda g: sync.connect(g, "symmetric", device="cpu"), ValueError, "sync='symmetric'"),
        (lambda g: sync.connect(None, device="cpu"), TypeError, "group"),
        (lambda g: sync.connect(g, device="meta"), ValueError, "device"),
        (lambda g: sync.connect(g, device="cpu", timeout=0), ValueError, "timeout"),
        (lambda g: sync.connect(g, device="cpu", timeout="1"), TypeError, "timeout"),
        (lambda g: sync.connect(g, device="cpu", capacity=0), ValueError, "capacity"),
        (lambda g: sync.connect(g, device="cpu", capacity=1 << 16), ValueError, "capacity"),
        (lambda g: sync.connect(g, device="cpu", domain_size=2), ValueError, "domain_size"),
        (lambda g: Balancer(placement_of(2), device="cpu", quotas="all"), ValueError, "quotas"),
        (lambda g: Balancer(placement_of(2), device="cpu", quotas="global"), ValueError, "quotas"),
    ],
)
def test_arguments_are_named(call, error, name, group_of_one):
    """A wrong option of `connect` or of quotas is refused by name."""
    with pytest.raises(error, match=f"^{name}"):
        call(group_of_one)


def test_a_forgotten_balancer_lets_its_group_go(group_of_one):
    """A balancer that is deleted gives up its shared communicator."""
    balancer = Balancer(placement_of(1), group=group_of_one, device="cpu")
    assert list(shared_communicators.values()) == [balancer.communicator]
    del balancer
    gc.collect()
    assert not shared_communicators


@pytest.mark.parametrize(
    ("hosts", "size"),
    [("aaaa", 4), ("aabb", 2), ("abab", 1), ("aaab", 1), ("abc", 1), ("aabbaa", 1), ("aaabbb", 3)],
)
def test_ranks_of_a_host_must_be_neighbours(hosts, size, monkeypatch):
    """Ranks share a node only if all hosts hold equally many consecutive ranks."""
    monkeypatch.setattr(_rendezvous, "all_gather_objects", lambda *_: list(hosts))
    assert _rendezvous.count_ranks_per_node(None, 1.0) == size


@pytest.mark.parametrize(
    ("ranks", "domain", "told", "reached", "kind"),
    [
        (1, 1, None, True, "distributed"),
        (8, 8, None, True, "symmetric"),
        (8, 8, None, False, "distributed"),
        (8, 4, None, True, "hierarchical"),
        (8, 1, None, True, "distributed"),
        (8, 8, 8, False, "symmetric"),
        (8, 2, 2, False, "hierarchical"),
        (8, 1, 1, False, "distributed"),
    ],
)
def test_the_rule(ranks, domain, told, reached, kind, monkeypatch):
    """With sync="auto" the kind follows from sizes, a given domain and which GPUs are reached."""

    class Group:
        def size(self):
            return ranks

    class Properties:
        uuid = "GPU-1"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(_connect, "_reaches_all", lambda *_: reached)
    monkeypatch.setattr(_connect, "all_gather_objects", lambda *given: [given[3]] * ranks)
    assert _connect.choose_sync(Group(), torch.device("cuda", 0), domain, told, 1.0) == kind


@pytest.mark.parametrize(
    ("peers", "visible", "atomics", "reached"),
    [
        (["a", "b"], ["a", "b"], True, True),
        (["a", "b"], ["a", "b"], False, False),
        (["a", "b"], ["a"], True, False),
        (["a", "a"], ["a"], True, False),
    ],
)
def test_who_reaches_whom(peers, visible, atomics, reached, monkeypatch):
    """A GPU reaches the others if all are visible, distinct, and take its atomics."""

    class Properties:
        def __init__(self, index):
            self.uuid = visible[index]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(_connect, "_supports_peer_atomics", lambda source, target: atomics)
    assert _connect._reaches_all(torch.device("cuda", 0), "a", peers) == reached


def run_alone(_, kind):
    """A group of one on a GPU: memory, launches and capture of a back end, without a peer."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    placement = Placement.from_phy2log([0, 1, 2, 3, 0, 3], 1)
    ids = torch.tensor([[0, 3], [2, 3], [-1, 1], [3, 0]], device="cuda")
    with Balancer(placement, group=dist.group.WORLD, sync=kind) as balancer:
        eager = [balancer.run(ids) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = balancer.run(ids)
        graph.replay()
        balancer.check()
        for out in (eager, captured):
            kept = out[ids >= 0]
            assert (out[ids < 0] == -1).all()
            assert torch.equal(placement.phy2log[kept.cpu()].long(), ids[ids >= 0].cpu())
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distributed", "symmetric", "nvshmem"])
def test_a_group_of_one_on_a_gpu(kind):
    """A group of one on a GPU runs eagerly and in a graph with every back end."""
    if kind == "nvshmem":
        pytest.importorskip("nvshmem")
    mp.spawn(run_alone, (kind,), nprocs=1)


def test_errors_cross_processes():
    """An error that one process pickles tells another one all that it knows."""
    error = pickle.loads(pickle.dumps(sync.SyncError("rank 3 did not come", (3,), 7)))
    assert type(error) is sync.SyncError and str(error) == "rank 3 did not come"
    assert (error.ranks, error.epoch) == ((3,), 7)
