"""Live slots on a GPU: kernel against twin up to 512 ranks, graphs, streams, repeated runs."""

import warnings

import pytest
import torch
from helpers.live import (
    DEVICE,
    assert_same_plan,
    check_ids,
    count_by_rank,
    draw_ids,
    make_placement,
    plan_both,
    words_of,
)

from lplb_triton import Balancer

pytestmark = pytest.mark.gpu
# Ranks and experts.
SIZES = [(8, 32), (64, 128), (144, 288), (256, 512), (512, 1024)]
sizes = pytest.mark.parametrize(("ranks", "experts"), SIZES)


def make(placement, **settings):
    return Balancer(placement, device=DEVICE, backend="triton", rank=0, **settings)


def check_run(balancer, idx):
    """Ids name copies of their experts, and no rank has more tokens than the plan says."""
    placement = balancer.placement
    out = balancer.run(idx)
    check_ids(balancer, idx, out)
    plan = balancer.live
    # Without live copies, each replicated expert of a rank may be rounded up.
    slack = 1 if (plan.experts >= 0).any() else 1 + placement.static_per_rank
    loads = count_by_rank(placement, out)
    assert int(loads.max()) <= float(plan.max_load) + slack
    assert int(loads.sum()) == int((idx >= 0).sum())
    return out


@pytest.mark.parametrize("redundant", [0, 1])
@pytest.mark.parametrize("live", [1, 2])
@sizes
def test_plan_of_given_shares(ranks, experts, live, redundant):
    """From the same shares, kernel and twin make the same plan, bit for bit."""
    placement = make_placement(ranks, experts, live, redundant)
    for seed in range(3):
        idx = draw_ids(placement, 200 * ranks, 2.0 + 3.0 * seed, seed, device="cpu")
        counts = torch.bincount(idx.flatten(), minlength=experts)
        kernel, twin, _ = plan_both(placement, counts)
        assert_same_plan(placement, counts, kernel, twin)


@pytest.mark.parametrize("rules", [{"live_cost": 20, "live_fanout": 2}, {"live_domain": 8}, {}])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("ranks", "experts"), SIZES[1:4])
def test_plan_by_each_rule(ranks, experts, resident, rules):
    """Kernel and twin make the same plan under all rules, and with experts that lie there."""
    for live, redundant in ((1, 1), (2, 0)):
        placement = make_placement(ranks, experts, live, redundant)
        idx = draw_ids(placement, 200 * ranks, 5.0, live, device="cpu")
        counts = torch.bincount(idx.flatten(), minlength=experts)
        held = torch.randint(-1, experts, (ranks, live)).int() if resident else None
        kernel, twin, after = plan_both(placement, counts, resident=held, **rules)
        assert_same_plan(placement, counts, kernel, twin)
        if resident:
            assert torch.equal(after.reshape(-1), kernel.words[:-3])


@pytest.mark.parametrize("live", [1, 2])
@sizes
def test_a_run_without_copies_against_the_twin(ranks, experts, live):
    """Without redundant slots, a run gives the ids and the plan of the twin."""
    placement = make_placement(ranks, experts, live)
    kernel = make(placement)
    twin = Balancer(placement, device="cpu", backend="torch", rank=0)
    for seed, dtype in ((0, torch.int64), (1, torch.int32)):
        idx = draw_ids(placement, 200 * ranks, 3.0, seed, dtype)
        idx[::7, 1] = -1
        out = check_run(kernel, idx)
        assert torch.equal(out.cpu(), twin.run(idx.cpu()))
        ours, theirs = words_of(kernel.live), words_of(twin.live)
        assert torch.equal(ours[:-2], theirs[:-2])
        numbers = [words[-2:].view(torch.float32) for words in (ours, theirs)]
        torch.testing.assert_close(*numbers, rtol=1e-6, atol=1e-6)
    kernel.check()


@pytest.mark.parametrize("live", [1, 2])
@pytest.mark.parametrize("redundant", [1, 2])
@sizes
def test_runs_with_copies_keep_the_plan(ranks, experts, redundant, live):
    """With redundant slots, ids and loads are those of the plan, batch after batch."""
    balancer = make(make_placement(ranks, experts, live, redundant))
    filled = 0
    for seed in range(6):
        idx = draw_ids(balancer.placement, 160 * ranks, 1.0 + 2.0 * seed, seed)
        check_run(balancer, idx)
        filled += int((balancer.live.experts >= 0).any())
    assert filled > 0
    balancer.check()


@pytest.mark.parametrize(("ranks", "redundant"), [(8, 0), (64, 1), (256, 1), (512, 0)])
def test_fifty_runs_are_the_same(ranks, redundant):
    """Fifty runs of a batch, with others between, give the same ids and the same plan."""
    placement = make_placement(ranks, 2 * ranks, 1, redundant)
    balancer = make(placement)
    idx, other = (draw_ids(placement, 200 * ranks, 5.0, seed) for seed in (0, 1))
    expected = check_run(balancer, idx)
    plan = words_of(balancer.live)
    for step in range(50):
        if step % 2:
            balancer.run(other)
        assert torch.equal(balancer.run(idx, n_sms=1 + step), expected)
        assert torch.equal(words_of(balancer.live), plan)


@pytest.mark.parametrize(("ranks", "redundant"), [(8, 1), (64, 0)])
def test_a_graph_replayed_on_new_ids(ranks, redundant):
    """A replayed graph plans for the ids that are there, and `live` tells its plan."""
    placement = make_placement(ranks, 2 * ranks, 1, redundant)
    balancer, eager = make(placement), make(placement)
    balancer.warmup()
    static = draw_ids(placement, 100 * ranks, 5.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = balancer.run(static)
    plan = balancer.live
    plans = set()
    for seed in range(6):
        # Level batches come between uneven ones.
        fresh = draw_ids(placement, 100 * ranks, 5.0 * (seed % 3), seed)
        static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager.run(fresh))
        assert torch.equal(words_of(plan), words_of(eager.live))
        check_ids(balancer, fresh, out)
        plans.add(tuple(words_of(plan).tolist()))
    assert len(plans) == 6
    other = make_placement(ranks, 2 * ranks, 1, redundant, seed=1)
    balancer.update_placement(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, make(other).run(static))
    balancer.check()


@pytest.mark.parametrize("redundant", [0, 1])
def test_two_streams_at_once(redundant):
    """Calls on two streams that overlap give the ids and the plans of calls one by one."""
    placement = make_placement(64, 128, 2, redundant)
    balancer = make(placement)
    batches = [draw_ids(placement, 12800, 4.0, seed) for seed in (0, 1)]
    expected = []
    for idx in batches:
        expected.append((check_run(balancer, idx), words_of(balancer.live)))
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(20):
        found = [[], []]
        for step in range(10):
            for which, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    out = balancer.run(batches[which])
                    found[which].append((out, balancer.live))
                    if step == 4:
                        torch.cuda._sleep(20000)
        torch.cuda.synchronize()
        for pairs, (ids, words) in zip(found, expected, strict=True):
            for out, plan in pairs:
                assert torch.equal(out, ids)
                assert torch.equal(words_of(plan), words)


def test_two_graphs_replayed_at_once():
    """Two graphs of one balancer, replayed at once, keep their ids and plans apart."""
    placement = make_placement(8, 32, 1)
    balancer = make(placement)
    balancer.warmup()
    batches = [draw_ids(placement, 4000, 4.0, seed) for seed in (0, 1)]
    expected, graphs, found = [], [], []
    for idx in batches:
        expected.append((balancer.run(idx), words_of(balancer.live)))
    for idx in batches:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = balancer.run(idx)
        graphs.append(graph)
        found.append((out, balancer.live))
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(50):
        for out, plan in found:
            out.fill_(-7), plan.experts.fill_(-7)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (out, plan), (ids, words) in zip(found, expected, strict=True):
            assert torch.equal(out, ids) and torch.equal(words_of(plan), words)


def test_resident_slots_on_a_gpu():
    """What live slots hold is kept over batches, and by replays of a graph too."""
    placement = make_placement(8, 32, 2)
    balancer = make(placement, live_resident=True)
    twin = Balancer(placement, device="cpu", backend="torch", rank=0, live_resident=True)
    balancer.warmup()
    for seed in range(4):
        idx = draw_ids(placement, 4000, 5.0, seed)
        assert torch.equal(check_run(balancer, idx).cpu(), twin.run(idx.cpu()))
        assert torch.equal(balancer.live.experts.cpu(), twin.live.experts)
    static = draw_ids(placement, 4000, 5.0, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = balancer.run(static)
    for seed in range(4, 7):
        static.copy_(draw_ids(placement, 4000, 5.0, seed))
        graph.replay()
        assert torch.equal(out.cpu(), twin.run(static.cpu()))
        assert torch.equal(balancer.live.experts.cpu(), twin.live.experts)


def test_a_run_allocates_ids_and_plan_alone():
    """A run allocates its ids and its plan, and never makes the host wait for the GPU."""
    placement = make_placement(8, 32, 1, redundant=1)
    balancer = make(placement)
    idx = draw_ids(placement, 4000)
    balancer.run(idx)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with warnings.catch_warnings():
        # torch warns that this mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            balancer.run(idx)
            plan = balancer.live
        finally:
            torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after - before == 2 and plan.experts.shape == (8, 1)


def test_nothing_compiles_after_warmup():
    """After a warm-up, no batch makes Triton compile, whether it needs live slots or not."""
    from lplb_triton.kernels.count import count_kernel
    from lplb_triton.kernels.launch import compiled_kernels
    from lplb_triton.kernels.select import select_kernel
    from lplb_triton.kernels.solve.counts_kernel import solve_counts_kernel

    def compiled():
        kernels = (solve_counts_kernel, count_kernel, select_kernel)
        found = [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]
        return [*found, len(compiled_kernels)]

    placement = make_placement(8, 32, 1, redundant=1)
    balancer = make(placement, live_cost=3)
    balancer.warmup()
    reference = compiled()
    assert all(reference)
    for case in range(40):
        dtype = (torch.int64, torch.int32)[case % 2]
        balancer.run(draw_ids(placement, 4 * (1 + 37 * case), case % 5, case, dtype))
    assert compiled() == reference
