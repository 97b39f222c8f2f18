"""Streams, CUDA graphs and compiled calls of a group on two GPUs, in the order users have them."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.batches import EXPERTS, placement_of

from lplb_triton import Balancer
from lplb_triton.sync import SyncError

RANKS, TIMEOUT = 2, 8.0


def batch(seed, rank):
    """Uneven ids, other ones on each rank."""
    generator = torch.Generator().manual_seed(1000 * rank + seed)
    ids = torch.rand(512, 8, generator=generator) ** 2 * (EXPERTS + 1) - 1
    return ids.long().cuda()


class Case:
    """A balancer over a group of its own, and right answers from torch.distributed."""

    def __init__(self, rank, oracle, timeout=TIMEOUT):
        self.rank, self._oracle, self._answers = rank, oracle, {}
        group = dist.new_group(list(range(RANKS)))
        self.balancer = Balancer(
            placement_of(RANKS), group=group, sync="symmetric", timeout=timeout
        )
        self.run = self.balancer.run

    def expected(self, seed):
        if seed not in self._answers:
            self._answers[seed] = self._oracle.run(batch(seed, self.rank))
        return self._answers[seed]

    def channels(self):
        return len(self.balancer.communicator._channels.openings)

    def capture(self, ids, stream=None):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = self.run(ids)
        return graph, out


def check_recipe(case):
    """Torch's recipe: warm up on a side stream, capture, replay, go on eagerly."""
    static = batch(0, case.rank)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            warm = case.run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph, out = case.capture(static)
    for seed in (1, 2, 1):
        expected = case.expected(seed)
        static.copy_(batch(seed, case.rank))
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(case.run(batch(seed, case.rank)), expected)
    assert torch.equal(warm, case.expected(0))
    case.balancer.check()
    assert case.channels() == 3


def check_three_streams(case):
    """First calls in one order, then in opposite orders on the two ranks."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [batch(seed, case.rank) for seed in range(6)]
    expected = [case.expected(seed) for seed in range(6)]
    torch.cuda.synchronize()
    outs = []
    for step in range(60):
        order = range(3) if step == 0 or case.rank == 0 else reversed(range(3))
        for at in order:
            with torch.cuda.stream(streams[at]):
                outs.append(((step + at) % 6, case.run(inputs[(step + at) % 6])))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[seed]) for seed, out in outs)
    case.balancer.check()
    assert case.channels() == 3


def check_graphs(case):
    """Two graphs in flight, replayed in opposite orders, eager calls between; 64 on one stream."""
    inputs = [batch(seed, case.rank) for seed in range(4)]
    expected = [case.expected(seed) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    assert torch.equal(case.run(inputs[2]), expected[2])
    graphs = [case.capture(inputs[at], streams[at]) for at in range(2)]
    torch.cuda.synchronize()
    for step in range(100):
        for _, out in graphs:
            out.fill_(-7)
        torch.cuda.synchronize()
        for at in (0, 1) if (step + case.rank) % 2 else (1, 0):
            with torch.cuda.stream(streams[at]):
                graphs[at][0].replay()
        eager = case.run(inputs[2 + step % 2])
        torch.cuda.synchronize()
        assert all(torch.equal(graphs[at][1], expected[at]) for at in range(2))
        assert torch.equal(eager, expected[2 + step % 2])
    assert case.channels() == 3

    many = [case.capture(inputs[n % 4]) for n in range(64)]
    for graph, _ in many:
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[n % 4]) for n, (_, out) in enumerate(many))
    case.balancer.check()
    assert case.channels() == 4


def check_compiled(case):
    """``reduce-overhead`` takes CUDA graphs, and results and counters stay right."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: case.run(x + 1) + 1, mode="reduce-overhead", fullgraph=True)
    for step in range(8):
        out = compiled(batch(step % 3, case.rank) - 1)
        assert torch.equal(out - 1, case.expected(step % 3))
    case.balancer.check()
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert int(case.balancer.solves) == int(case.balancer.certified) == 8


def check_disorder(rank, oracle):
    """First calls of streams in another order on one rank: each rank hears of the other."""
    for kind in ("pool", "default"):
        case = Case(rank, oracle)
        streams = [torch.cuda.Stream() for _ in range(2)]
        if kind == "default":
            streams[0] = torch.cuda.current_stream()
        mine = batch(0, rank)
        torch.cuda.synchronize()
        with pytest.raises(SyncError, match=f"rank {1 - rank} opened the channel with") as info:
            for stream in streams if rank == 0 else reversed(streams):
                with torch.cuda.stream(stream):
                    case.run(mine)
            case.balancer.check()
        assert info.value.ranks == (1 - rank,)
        assert "The first call of a stream must be the same call" in str(info.value)
        case.balancer.close()


def check_missing(rank, oracle):
    """A rank that doesn't come to `update_placement` or `close` is named in time."""
    case = Case(rank, oracle, timeout=1.5)
    if rank == 0:
        with pytest.raises(SyncError, match=r"update_placement failed on rank 0: ranks \[1\]"):
            case.balancer.update_placement(placement_of(RANKS, 1))
    dist.barrier()
    assert torch.equal(case.run(batch(0, rank)), case.expected(0))
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 0:
        with pytest.raises(SyncError, match=r"closing .* failed on rank 0: ranks \[1\] did not"):
            case.balancer.close()
    dist.barrier()


def work(rank, store, checks):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    oracle = Balancer(placement_of(RANKS), group=dist.group.WORLD, sync="distributed")
    for name in checks:
        if name in ("check_disorder", "check_missing"):
            globals()[name](rank, oracle)
        else:
            case = Case(rank, oracle)
            globals()[name](case)
            case.balancer.close()
        dist.barrier()
        gc.collect()
    torch.cuda.synchronize()
    dist.destroy_process_group()


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


@pytest.mark.gpu
@pytest.mark.multigpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_gpus(check, tmp_path):
    """Streams, graphs and compiled calls on two GPUs give right ids or named errors."""
    mp.spawn(work, (tmp_path / "store", [check]), nprocs=RANKS)


# torch's own: what it uses and has deprecated, and what it says of other precisions
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.gpu
def test_reduce_overhead_takes_graphs():
    """A call compiled with `reduce-overhead` becomes a graph with right ids and counters."""
    balancer = Balancer(placement_of(RANKS), rank=0)
    ids = [batch(seed, 0) for seed in range(3)]
    expected = [balancer.run(mine) for mine in ids]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x: balancer.run(x + 1) + 1, mode="reduce-overhead", fullgraph=True
    )
    for step in range(9):
        assert torch.equal(compiled(ids[step % 3] - 1) - 1, expected[step % 3])
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert int(balancer.solves) == int(balancer.certified) == 12
