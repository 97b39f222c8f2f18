"""Live slots over NVLink: bytes, gradients, graphs, updates under random delays, late ranks."""

import random
import time

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks

from lplb_triton import LiveSlots, Placement
from lplb_triton.sync import SyncError

RANKS, LOCAL = 2, 4
EXPERTS = RANKS * LOCAL
PULLS = 10_000


def make_slots(group, live, *sources, **settings):
    load = torch.ones(EXPERTS)
    placement = Placement.from_history(load, RANKS, redundant_per_rank=0, keep_home=True)
    slots = LiveSlots(live, group=group, **settings)
    assert slots.transport == "symmetric"
    given = [slots.empty(*one) if isinstance(one, tuple) else one for one in sources]
    return slots, slots.add(placement.with_live_slots(live), *given), given


def draw_plan(live, rng):
    """Some of the slots hold some of the other ranks' experts; the same on every rank."""
    plan = torch.full((RANKS, live), -1, dtype=torch.int32)
    for rank in range(RANKS):
        others = [expert for expert in range(EXPERTS) if expert // LOCAL != rank]
        for slot, expert in enumerate(rng.sample(others, live)):
            if rng.random() < 0.8:
                plan[rank, slot] = expert
    return plan


def sleep(rng, most=150_000):
    """Delay this rank's stream now and then."""
    if rng.random() < 0.3:
        torch.cuda._sleep(rng.randrange(most))


def check_bytes(rank, group, n_sms=24):
    """Rows of any dtype and size arrive whole, staged ones and those in place."""
    generator = torch.Generator().manual_seed(rank)
    staged = [
        torch.randn(LOCAL, *shape, generator=generator).cuda().to(dtype)
        for shape, dtype in (
            ((300, 256), torch.bfloat16),
            ((3,), torch.float32),
            ((128, 129), torch.float8_e4m3fn),
        )
    ]
    given = *staged, ((LOCAL, 640), torch.float32)
    slots, layer, sources = make_slots(group, 2, *given, n_sms=n_sms)
    with slots.update():
        sources[3].copy_(torch.randn(LOCAL, 640, generator=generator))
    whole = []
    for source in sources:
        mine = source.view(torch.uint8).reshape(LOCAL, -1)
        whole.append(mine.new_empty(EXPERTS, mine.shape[1]))
        dist.all_gather_into_tensor(whole[-1], mine.contiguous(), group=group)
    rng = random.Random(0)
    for _ in range(50):
        plan = draw_plan(2, rng)
        for (_, live), rows in zip(layer.pull(plan.cuda()).wait(), whole, strict=True):
            for slot, expert in enumerate(plan[rank].tolist()):
                if expert >= 0:
                    got = live[slot].contiguous().view(torch.uint8).reshape(-1)
                    assert torch.equal(got, rows[expert])
    slots.check()
    slots.close()


def check_copy_engines(rank, group):
    """Copy engines bring the same bytes, again for a backward pass, and refuse a capture."""
    check_bytes(rank, group, 0)
    weight = torch.nn.Parameter(torch.full((LOCAL, 64), float(rank), device="cuda"))
    slots, layer, _ = make_slots(group, 1, weight, n_sms=0)
    plan = torch.tensor([[LOCAL], [0]], dtype=torch.int32, device="cuda")
    pull = layer.pull(plan)
    ((_, live),) = pull.wait()
    layer.pull(torch.full_like(plan, -1)).wait()
    live.detach().zero_()
    pull.attach(live.sum()).backward()
    assert (live == 1 - rank).all() and (weight.grad[0] == 1).all()
    with pytest.raises(RuntimeError, match="no CUDA graph can capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            layer.pull(plan)
    slots.check()
    slots.close()


def check_gradients(rank, group):
    """Gradients are sums in a fixed order, bit for bit, with accumulation and either backward."""
    for dtype, backward in ((torch.float32, "pull"), (torch.bfloat16, "keep")):
        shape = (LOCAL, 64, 136)
        weight = torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype))
        slots, layer, _ = make_slots(group, 2, weight, backward=backward)
        rng, expected = random.Random(1), None
        for number in range(6):
            plan = draw_plan(2, rng)
            generator = torch.Generator().manual_seed(number)
            grads = torch.randn(RANKS, LOCAL + 2, *shape[1:], generator=generator).cuda().to(dtype)
            pull = layer.pull(plan.cuda())
            ((static, live),) = pull.wait()
            loss = (static * grads[rank, :LOCAL]).sum()
            for slot, expert in enumerate(plan[rank].tolist()):
                if expert >= 0:
                    loss = loss + (live[slot] * grads[rank, LOCAL + slot]).sum()
            pull.attach(loss).backward()
            part = grads[rank, :LOCAL].clone()
            for row in range(LOCAL):
                total = part[row].float()
                for other, slot in (plan == rank * LOCAL + row).nonzero().tolist():
                    total = total + grads[other, LOCAL + slot].float()
                part[row] = total.to(dtype)
            expected = part if expected is None else expected + part
        slots.check()
        assert torch.equal(weight.grad, expected)
        slots.close()


def check_graph(rank, group):
    """A graph of pull, backward and update follows the plan of each replay."""
    weight = torch.nn.Parameter(torch.zeros(LOCAL, 512, 512, device="cuda"))
    slots, layer, _ = make_slots(group, 1, weight)
    plan = torch.tensor([[LOCAL], [0]], dtype=torch.int32, device="cuda")
    x = torch.randn(8, 512, device="cuda")

    def step():
        weight.grad = None
        pull = layer.pull(plan)
        ((static, live),) = pull.wait()
        pull.attach(x @ static[0] + x @ live[0]).sum().backward()
        with slots.update(), torch.no_grad():
            weight.add_(1)
        return live.clone()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        live = step()
    rng, mine = random.Random(2), random.Random(rank)
    for number in range(200):
        drawn = draw_plan(1, rng)
        plan.copy_(drawn)
        sleep(mine)
        graph.replay()
        if drawn[rank, 0] >= 0:
            assert (live == 3 + number).all()
    slots.check()
    slots.close()


def check_torn(rank, group):
    """Weights of a step are those of that step, whatever ranks are late, in 10,000 pulls."""
    slots, layer, (first, second) = make_slots(
        group, 2, ((LOCAL, 32768), torch.float32), torch.zeros(LOCAL, 40000, device="cuda")
    )
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    rng, mine, pulls, step = random.Random(3), random.Random(100 + rank), 0, 0
    while pulls < PULLS:
        for _ in range(rng.randrange(1, 9)):
            plan = draw_plan(2, rng)
            sleep(mine)
            pull = layer.pull(plan.cuda())
            sleep(mine, 50_000)
            for _, live in pull.wait():
                for slot in range(2):
                    if plan[rank, slot] >= 0:
                        wrong += (live[slot] != step).sum()
            pulls += 1
        if mine.random() < 0.02:
            time.sleep(mine.random() * 0.01)
        with slots.update():
            step += 1
            sleep(mine)
            first.fill_(step)
            second.fill_(step)
    slots.check()
    assert int(wrong) == 0
    slots.close()


def check_failures(rank, group):
    """A late rank is named by those that wait for it, and of two plans one is refused."""
    weight = torch.zeros(LOCAL, 1024, device="cuda")
    slots, _, _ = make_slots(group, 1, weight, timeout=1.0)
    if rank == 0:
        with slots.update():
            pass
        with pytest.raises(SyncError, match="did not end step 0 of its pulls") as caught:
            slots.check()
        assert caught.value.ranks == (1,)
    dist.barrier()
    slots, layer, _ = make_slots(dist.new_group(backend="nccl"), 1, weight, timeout=1.0)
    plan = torch.tensor([[LOCAL + rank], [-1]], dtype=torch.int32, device="cuda")
    layer.pull(plan).wait()
    torch.cuda.synchronize()
    failed = [None] * RANKS
    try:
        slots.check()
        mine = None
    except SyncError as error:
        assert "another plan" in str(error)
        mine = error.ranks
    dist.all_gather_object(failed, mine)
    assert (1,) in failed or (0,) in failed
    assert failed[0] in (None, (1,)) and failed[1] in (None, (0,))


def check_on_gpus(rank, _):
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    checks = check_bytes, check_copy_engines
    for check in (*checks, check_gradients, check_graph, check_torn, check_failures):
        try:
            check(rank, group)
        except BaseException as error:
            raise RuntimeError(f"{check.__name__} failed on rank {rank}") from error
        dist.barrier()
    dist.destroy_process_group(group)


@pytest.mark.gpu
@pytest.mark.multigpu
def test_two_gpus(tmp_path):
    """Weights and gradients over NVLink are right, whole and in time, or an error names a rank."""
    run_ranks(check_on_gpus, RANKS, tmp_path)
