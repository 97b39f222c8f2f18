"""Copies and files of balancers, and balancers made or used under the caller's modes."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers.batches import count, ids_of, placement_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lplb_triton import Balancer, Planner, topologies
from lplb_triton.sync._connect import shared_communicators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = 4


PLACEMENTS = [placement_of(RANKS, seed) for seed in range(3)]


def make(seed=0, **settings):
    return Balancer(PLACEMENTS[seed], device=DEVICE, **settings)


def ids(batch=1):
    return ids_of(0, batch).to(DEVICE)


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": through_a_file,
}
backends = pytest.mark.parametrize(
    "backend", ["torch", "triton"] if DEVICE == "cpu" else ["triton"]
)


@backends
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_balancer_of_its_own(way, backend):
    """A copy has its original's settings and answers, and later changes are its own."""
    balancer = make(backend=backend, tolerance=1e-4, max_iterations=17, rank=2)
    expected = balancer.run(ids())
    twin = COPIES[way](balancer)
    for name in ("device", "backend", "tolerance", "max_iterations", "rank", "quotas", "group"):
        assert getattr(twin, name) == getattr(balancer, name), name
    assert torch.equal(twin.placement.phy2log, balancer.placement.phy2log)
    assert int(twin.solves) == int(twin.certified) == 1
    assert torch.equal(twin.run(ids()), expected)
    assert (int(balancer.solves), int(twin.solves)) == (1, 2)
    # By the operator too, which finds its balancer by a number.
    compiled = torch.compile(lambda x: twin.run(x), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids()), expected)
    balancer.update_placement(PLACEMENTS[1])
    assert torch.equal(twin.run(ids()), expected) and torch.equal(compiled(ids()), expected)
    assert (int(balancer.solves), int(twin.solves)) == (1, 5)
    twin.update_placement(PLACEMENTS[2])
    assert torch.equal(compiled(ids()), make(2, rank=2, backend=backend).run(ids()))


@pytest.mark.parametrize("way", COPIES)
def test_a_model_with_a_balancer_and_a_planner_inside(way):
    """A copied model holds a balancer and a planner that work apart from the original's."""
    model = torch.nn.Linear(2, 2)
    model.balancer = make()
    model.planner = Planner(topologies.ring(2), 36, 32, 2, device=DEVICE)
    model.planner.update_redundancy_mapping(torch.rand(32))
    twin = COPIES[way](model) if way != "copy" else copy.deepcopy(model)
    counters = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    expected = model.planner.run(ids(), counters[0])
    assert torch.equal(twin.planner.run(ids(), counters[1]), expected)
    assert counters.flatten().tolist() == [1, 1]
    assert torch.equal(twin.balancer.run(ids()), model.balancer.run(ids()))
    twin.planner.update_redundancy_mapping(torch.rand(32))
    assert torch.equal(model.planner.run(ids(), counters[0]), expected)


def check_group(rank, group):
    """Copies share the communicator; files keep no group; a failed set_group can be repeated."""
    placement = placement_of(2)
    balancer = Balancer(placement, group=group, device="cpu", timeout=20.0)
    expected = balancer.run(ids_of(rank, 1))
    # As many as would let a sum over two ranks wrap around; without memory for them.
    with pytest.raises(ValueError, match=r"^idx must have .* over the 2 ranks .*, 1073741824 on"):
        balancer.run(torch.zeros(1, dtype=torch.int64).expand(1 << 30))
    twin = copy.deepcopy(balancer)
    assert twin.group is group and twin.communicator is balancer.communicator
    assert torch.equal(twin.run(ids_of(rank, 1)), expected)
    assert int(twin._layer.version) != int(balancer._layer.version)
    # The shared communicator lives until the last of them lets go.
    balancer.close()
    assert list(shared_communicators.values()) == [twin.communicator]
    assert torch.equal(twin.run(ids_of(rank, 1)), expected)

    loaded = through_a_file(twin)
    twin.close()
    assert not shared_communicators
    assert loaded.group is None
    for call in (
        lambda: loaded.run(ids_of(rank, 1)),
        lambda: loaded.update_placement(placement),
        lambda: loaded.sync(count(ids_of(rank, 1), 32).int()),
    ):
        with pytest.raises(RuntimeError, match=r"of ranks \[0, 1\].* call set_group\(group\)"):
            call()
    # Saved once more, it is still the balancer of that group.
    loaded = through_a_file(loaded)
    loaded.set_group(group)
    assert torch.equal(loaded.run(ids_of(rank, 1)), expected) and int(loaded.solves) == 4
    loaded.close()
    with pytest.raises(RuntimeError, match="is closed"):
        loaded.set_group(group)
    with pytest.raises(RuntimeError, match="is closed"):
        copy.copy(loaded).run(ids_of(rank, 1))

    # A group that could not be taken to the end leaves a balancer that says so.
    torn = Balancer(placement, device="cpu", rank=rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lplb_triton.sync._distributed.DistributedCommunicator.waits_on_device", True)
        patch.setattr(torn, "warmup", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            torn.set_group(group)
    with pytest.raises(RuntimeError, match=r"^Balancer.set_group failed here: call set_group"):
        torn.run(ids_of(rank, 1))
    assert not shared_communicators and torn.group is None
    torn.set_group(group)
    torn.run(ids_of(rank, 1))
    torn.close()

    # Every rank holds all tokens: counts aren't summed, and all pick the same copies.
    same = Balancer(placement_of(2, rank), group=group, device="cpu", quotas="replicated")
    assert same.communicator is None and same.rank == 0
    out = same.run(ids_of(0, 1))
    assert torch.equal(out, Balancer(placement, device="cpu", rank=0).run(ids_of(0, 1)))
    theirs = [None, None]
    dist.all_gather_object(theirs, out)
    assert torch.equal(*theirs)

    # A group that would fit, and isn't used.
    with pytest.warns(RuntimeWarning, match="group= .*quotas='replicated'"):
        Balancer(placement, device="cpu")
    planner = Planner(topologies.ring(2), 34, 32, 2, device="cpu")
    with pytest.warns(RuntimeWarning, match="no group is given"):
        planner.run(ids_of(rank, 1), torch.zeros(1, dtype=torch.int64))


def test_copies_files_and_warnings_in_a_group(tmp_path):
    """In a group of two, copies share its communicator, and files keep no group."""
    run_ranks(check_group, 2, tmp_path)


class Everything(TorchDispatchMode):
    """Notes all that is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@backends
def test_a_mode_sees_one_operator(backend):
    """A dispatch mode sees one operator for each run and nothing of other calls."""
    balancer = make(backend=backend)
    expected, counter = balancer.run(ids()), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    mine = ids()
    with Everything() as mode:
        out = balancer.run(mine)
        counted = balancer.run(mine, certified=counter)
        made = make(backend=backend)
        made.check()
        made.update_placement(PLACEMENTS[1])
        counts, running = made.count(mine)
        shares = made.solve(counts).shares
        made.select(mine, made.cumulative_shares(shares), running)
    seen = [name for name in mode.seen if "detach" not in name]
    assert seen == ["lplb_triton.balance.default", "lplb_triton.balance_counted.default"]
    assert torch.equal(out, expected) and torch.equal(counted, expected)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_made_within_a_selectively_checkpointed_region(policy):
    """What is recorded in the first pass must not be replayed in the checks of the second."""
    saved = {
        torch.ops.aten.max.default,
        torch.ops.aten.min.default,
        torch.ops.aten.empty.memory_format,
    }
    balancers = []

    def forward(x):
        if not balancers:
            balancers.append(make())
        physical = balancers[0].run(ids())
        return x * physical[physical >= 0].sum()

    def choose(context, op, *args, **kwargs):
        ours = str(op).startswith("lplb_triton")
        return policy if ours or op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.ones(3, requires_grad=True, device=DEVICE)
    context = lambda: create_selective_checkpoint_contexts(choose)  # noqa: E731
    checkpoint(forward, x, use_reentrant=False, context_fn=context).sum().backward()
    expected = make().run(ids())
    assert torch.equal(x.grad, expected[expected >= 0].sum().float().expand(3))
    runs = 1 if policy is CheckpointPolicy.MUST_SAVE else 2
    assert int(balancers[0].solves) == runs


@backends
def test_made_under_inference_mode_and_used_outside(backend):
    """A balancer made under inference mode works outside, and its copy works inside."""
    expected = make(backend=backend).run(ids())
    with torch.inference_mode():
        balancer = make(backend=backend)
        assert torch.equal(balancer.run(ids()), expected)
    assert torch.equal(balancer.run(ids()), expected)
    balancer.update_placement(PLACEMENTS[1])
    counts, running = balancer.count(ids())
    cumulative = balancer.cumulative_shares(balancer.solve(counts).shares)
    assert torch.equal(balancer.select(ids(), cumulative, running), balancer.run(ids()))
    twin = copy.deepcopy(balancer)
    with torch.inference_mode():
        assert torch.equal(twin.run(ids()), balancer.run(ids()))
    assert not any(t.is_inference() for t in (twin.certified, balancer.solves, balancer.traffic))


@backends
def test_planners_and_counters_of_inference_mode(backend):
    """A planner made under inference mode works inside and outside."""
    r2o, workload = topologies.ring(2), torch.arange(32, device=DEVICE)
    with torch.inference_mode():
        planner = Planner(r2o, 36, 32, 2, device=DEVICE, backend=backend)
        counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        planner.solve_probs(workload.clone(), counter)
        planner.balancer.solve(workload.clone().int(), certified=counter)
        planner.run(ids(), counter)
        assert int(counter) == 3
    planner.update_redundancy_mapping(torch.rand(32))
    outside = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    planner.solve_probs(workload, outside)
    planner.run(ids(), outside)
    assert int(outside) == 2


@backends
def test_other_devices_and_dtypes_by_default(backend):
    """A balancer gives the same ids under other default devices, dtypes and autocast."""
    expected = make(backend=backend).run(ids())
    mine = ids()
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            with torch.device("meta"), torch.autocast(DEVICE, dtype=torch.bfloat16):
                balancer = make(backend=backend)
                assert torch.equal(balancer.run(mine), expected)
                balancer.warmup()
                counts, running = balancer.count(mine)
                solution = balancer.solve(counts)
                solution.check()
                cumulative = balancer.cumulative_shares(solution.shares)
                balancer.select(mine, cumulative, running)
                assert torch.equal(copy.deepcopy(balancer).run(mine), expected)
    finally:
        torch.set_default_dtype(before)


def test_a_compiled_call_keeps_its_effects():
    """Its counters aren't inputs of the graph, and a call whose ids nobody uses isn't dropped."""
    balancer = make()
    seen = []

    def note(graph, inputs):
        seen.append((len(inputs), [n.op for n in graph.graph.nodes if "balance" in str(n.target)]))
        return graph

    def layer(x):
        balancer.run(x + 0)
        return x + 1

    from torch._dynamo.backends.common import aot_autograd

    mine = ids()
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    assert torch.equal(compiled(mine), mine + 1)
    assert seen == [(1, ["call_function"])]
    assert int(balancer.solves) == 1
