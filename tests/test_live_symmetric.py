"""Live slots by kernels between two processes, whose shared memory is files and not NVLink."""

import random
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks

from lplb_triton import LiveSlots, Placement
from lplb_triton.sync import SyncError
from lplb_triton.sync._memory import SharedMemory
from lplb_triton.training import live_symmetric

RANKS, LOCAL = 2, 2
EXPERTS = RANKS * LOCAL

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run on the GPU here, which can't read files"
)


class Stream:
    """A stream or an event of a machine without a GPU: everything is done at once."""

    cuda_stream = 0

    def __init__(self, *_, **__):
        pass

    def wait_event(self, _):
        pass

    def record(self, _):
        pass


class Symmetric(LiveSlots):
    """Live slots by kernels on a CPU."""

    def _make_transport(self, _):
        arguments = self.group, self.device, self.live_per_rank, self.timeout, self.n_sms
        return live_symmetric.SymmetricTransport(*arguments, "LiveSlots(1)")


def use_files(folder, rank, patch):
    """Let memory be files that both processes map, and streams and devices nothing."""
    made = []

    def allocate(provider, words, group, device, timeout, purpose, instead):
        made.append(words)
        names = [str(folder / f"memory{len(made)}-{other}") for other in range(RANKS)]
        maps = [torch.from_file(names[rank], shared=True, size=words, dtype=torch.int64)]
        maps[0].zero_()
        dist.barrier(group)
        for other in range(RANKS):
            if other != rank:
                name = names[other]
                maps.append(torch.from_file(name, shared=True, size=words, dtype=torch.int64))
        order = [maps[0].data_ptr(), *(one.data_ptr() for one in maps[1:])]
        addresses = [order[0 if other == rank else 1] for other in range(RANKS)]
        return SharedMemory("files", maps[0], addresses, maps.clear)

    patch.setattr(live_symmetric, "allocate", allocate)
    for name in ("stream", "device"):
        patch.setattr(torch.cuda, name, lambda _: nullcontext())
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "Event", Stream)
    patch.setattr(torch.cuda, "current_stream", Stream)
    patch.setattr(torch.cuda, "synchronize", lambda _: None)


def make_slots(group, *sources):
    placement = Placement.from_history(
        torch.ones(EXPERTS), RANKS, redundant_per_rank=0, keep_home=True
    ).with_live_slots(1)
    slots = Symmetric(1, group=group, device="cpu", transport="messages", n_sms=2)
    given = [slots.empty(*one) if isinstance(one, tuple) else one for one in sources]
    return slots, [slots.add(placement, *given) for _ in range(2)], given


def plan_of(first, second):
    return torch.tensor([[first], [second]], dtype=torch.int32)


def check_training(rank, group):
    """Gradients of two layers that share the slots are dense sums, and memory is as said."""
    weight = torch.nn.Parameter(torch.arange(6.0).view(LOCAL, 3) + 10 * rank)
    scale = torch.full((LOCAL, 4), float(rank))
    slots, layers, _ = make_slots(group, weight, scale)
    assert slots.transport == "symmetric"
    plans, x = [plan_of(2, 1), plan_of(-1, 0)], torch.tensor([1.0, 2.0, 3.0])
    whole = (torch.arange(6.0).view(1, LOCAL, 3) + 10 * torch.arange(2).view(2, 1, 1)).flatten(0, 1)
    total, expected = torch.zeros(()), torch.zeros(EXPERTS, 3)
    for layer, plan in zip(layers, plans, strict=True):
        pull = layer.pull(plan)
        (static, live), (_, scales) = pull.wait()
        y = (static * x).sum()
        if (expert := int(plan[rank])) >= 0:
            assert torch.equal(live[0], whole[expert]) and (scales == expert // LOCAL).all()
            # The gradient needs the slot's weights, which the other layer has overwritten by then.
            y = y + (live[0] ** 2 * x).sum()
        total = total + pull.attach(y)
        expected += x
        for expert in plan.flatten().tolist():
            if expert >= 0:
                expected[expert] += 2 * whole[expert] * x
    total.backward()
    assert torch.equal(weight.grad, expected[LOCAL * rank : LOCAL * rank + LOCAL])
    found = slots.memory()
    # Rows of 12 and 16 bytes, for two originals of two layers, and two halves of gradients.
    assert (found["live"], found["staged"], found["gradients"]) == (32, 2 * 2 * 32, 2 * 16)
    slots.check()
    slots.close()


def check_updates(rank, group):
    """No pull sees weights of another step, whichever rank is late."""
    slots, layers, (placed, staged) = make_slots(
        group, ((LOCAL, 4), torch.float32), torch.zeros(LOCAL, 5)
    )
    both, mine = random.Random(0), random.Random(rank + 1)
    for step in range(6):
        for _ in range(both.randrange(3)):
            plan = plan_of(both.choice((-1, 2, 3)), both.choice((-1, 0, 1)))
            time.sleep(mine.choice((0, 0, 0.03)))
            for _, live in layers[both.randrange(2)].pull(plan).wait():
                assert plan[rank, 0] < 0 or (live == step).all()
        time.sleep(mine.choice((0, 0, 0.03)))
        with slots.update():
            placed.fill_(step + 1)
            staged.fill_(step + 1)
    slots.check()
    assert slots.step == 6 and slots.memory()["in_place"] == 32
    slots.close()


def check_absence(rank, group):
    """A rank that doesn't come to an update is named, and pulls fail from then on."""
    slots, (layer, _), _ = make_slots(group, torch.zeros(LOCAL, 4))
    # In the interpreter, a number of reads.
    peer = slots._transport.peer
    peer._signals = peer._signals._replace(timeout_ms=20)
    if rank == 0:
        late = r"ranks \[1\] did not end step 0 of its pulls"
        # Nothing is published after a failed wait.
        with pytest.raises(SyncError, match=late), slots.update():
            pass
        with pytest.raises(SyncError, match=late):
            slots.check()
        with pytest.raises(RuntimeError):
            layer.pull(plan_of(2, -1))
    dist.barrier(group)
    other, layers, (placed,) = make_slots(group, ((LOCAL, 4), torch.float32))
    with pytest.raises(ValueError, match=r"by LiveSlots.empty on all ranks or on none"):
        other.add(layers[0].placement, torch.zeros(LOCAL, 4) if rank else placed)
    with pytest.raises(ValueError, match="multiples of 16 bytes, got 12"):
        make_slots(group, ((LOCAL, 3), torch.float32))


def check_ranks(rank, group, folder):
    with pytest.MonkeyPatch.context() as patch:
        use_files(folder, rank, patch)
        for check in (check_training, check_updates, check_absence):
            check(rank, group)
            dist.barrier(group)


def test_two_processes(tmp_path):
    """Weights and gradients go through shared memory, in step, and a late rank is named."""
    run_ranks(check_ranks, RANKS, tmp_path, tmp_path)


class Used:
    """A tensor that keeps which streams it was used on."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream.cuda_stream)


def test_memory_of_a_pull_stays_while_the_stream_that_waits_uses_it(monkeypatch):
    """Torch learns of a stream that waits for a pull if the pull began on another one."""
    current = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    transport = live_symmetric.SymmetricTransport.__new__(live_symmetric.SymmetricTransport)
    transport._device, transport._n_sms = torch.device("cuda", 0), 2
    transport._stream, transport._begin, transport._end = Stream(), Stream(), Stream()
    transport._pull = lambda *_, **__: None
    for waits_on, recorded in ((3, []), (5, [5])):
        fetch = SimpleNamespace(memory=Used(), plan=Used())
        current.cuda_stream = 3
        transport.start(fetch)
        current.cuda_stream = waits_on
        transport.finish(fetch)
        assert fetch.memory.streams == fetch.plan.streams == recorded


def test_a_stream_waits_for_a_pull_that_another_one_has_waited_for():
    """With memory of its own a pull may be waited for after the next one, by any stream."""
    slots, waited = LiveSlots.__new__(LiveSlots), []
    slots._keep, slots.resident, slots._holder = True, False, None
    slots._transport = SimpleNamespace(finish=waited.append)
    first, second = object(), object()
    slots._pending = second
    slots.finish(first)
    assert waited == [first] and slots._pending is second
    slots.finish(second)
    assert waited == [first, second] and slots._pending is None
