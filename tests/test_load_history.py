"""Loads that a balancer records: sums, decay, recomputation, copies, and what costs nothing."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lplb_triton import Balancer, Placement, chain, place

PLACEMENT = Placement.from_history(torch.linspace(1, 9, 16), 4)


def make_balancer(backend="torch", solver="levelling", device="cpu"):
    return Balancer(PLACEMENT, rank=0, device=device, backend=backend, solver=solver)


def draw(batch, device="cpu"):
    """Ids of a batch, with some that are dropped, and how often each expert is among them."""
    ids = torch.randint(-1, 16, (30, 2), generator=torch.Generator().manual_seed(batch))
    return ids.to(device), torch.bincount(ids[ids >= 0], minlength=16).double().to(device)


def test_loads_add_up_and_decay():
    """Loads are those of every batch since the start, decayed, until recording stops."""
    balancer = make_balancer()
    with pytest.raises(RuntimeError, match="call record_loads first"):
        balancer.load_history()
    balancer.run(draw(9)[0])
    balancer.record_loads()
    for batch in range(2):
        balancer.run(draw(batch)[0])
    assert torch.equal(balancer.load_history(reset=True), draw(0)[1] + draw(1)[1])
    assert not balancer.load_history().any()
    balancer.record_loads(decay=0.5)
    for batch in range(2):
        balancer.run(draw(batch)[0])
    assert torch.equal(balancer.load_history(), draw(0)[1] / 2 + draw(1)[1])
    balancer.record_loads(False)
    balancer.run(draw(0)[0])
    found = balancer.load_history()
    assert torch.equal(found, draw(0)[1] / 2 + draw(1)[1])
    found.zero_()
    assert balancer.load_history().any()


@pytest.mark.parametrize("solver", ["levelling", "interior_point"])
def test_kernels_record_what_they_solve_for(solver):
    """Both solvers of the Triton back end add the batch's counts."""
    balancer = make_balancer("triton", solver)
    balancer.record_loads()
    balancer.run(draw(0)[0])
    assert torch.equal(balancer.load_history(), draw(0)[1])


def test_wrong_arguments_are_refused():
    """Decays that are none are refused by name, and recording that never began stays off."""
    balancer = make_balancer()
    for decay in (0, 1.5, -1, float("nan")):
        with pytest.raises(ValueError, match="^decay"):
            balancer.record_loads(decay=decay)
    for name, call in (
        ("decay", lambda: balancer.record_loads(decay="0.5")),
        ("recording", lambda: balancer.record_loads(0.5)),
        ("reset", lambda: balancer.load_history(reset=1)),
    ):
        with pytest.raises(TypeError, match=f"^{name}"):
            call()
    balancer.record_loads(False)
    with pytest.raises(RuntimeError, match="call record_loads first"):
        balancer.load_history()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_computes_again_counts_once(use_reentrant):
    """The recomputation in the backward pass runs the balancer again, and adds nothing."""
    balancer = make_balancer()
    balancer.record_loads()
    ids, counts = draw(0)
    calls = []

    def layer(x):
        calls.append(balancer.run(ids))
        return (x * calls[-1].sum()).sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 2 and torch.equal(*calls)
    assert torch.equal(balancer.load_history(), counts)


def test_inference_mode_and_autocast_change_nothing():
    """Batches of any mode are added to the same sums."""
    balancer = make_balancer()
    with torch.inference_mode():
        balancer.record_loads()
        balancer.run(draw(0)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        balancer.run(draw(1)[0])
    ids, counts = draw(2)
    with torch.device("meta"):
        balancer.run(ids)
        found = balancer.load_history()
    assert torch.equal(found, draw(0)[1] + draw(1)[1] + counts)


def test_copies_and_files_keep_what_was_recorded():
    """A copy and a loaded balancer go on from the loads and the decay, each for itself."""
    balancer = make_balancer()
    balancer.record_loads(decay=0.5)
    balancer.run(draw(0)[0])
    for other in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        other.run(draw(1)[0])
        assert torch.equal(other.load_history(), draw(0)[1] / 2 + draw(1)[1])
    assert torch.equal(balancer.load_history(), draw(0)[1])


def test_every_placement_call_takes_the_history():
    """The history goes into each way of placing, and the new placement is used."""
    balancer = make_balancer()
    balancer.record_loads()
    for batch in range(3):
        balancer.run(draw(batch)[0])
    load = balancer.load_history()
    made = chain(load, 4), place(load, 4, trials=1), Placement.from_history(load, 4)
    for placement in made:
        assert balancer.update_placement(placement) == placement
    assert torch.equal(balancer.load_history(), load)


@pytest.mark.gpu
def test_graphs_streams_and_recomputation_on_a_gpu():
    """Replays count each, streams have sums of their own, and a run without recording is as is."""
    balancer = make_balancer("triton", device="cuda")
    balancer.warmup()
    balancer.record_loads()
    (first, counts), (second, others) = draw(0, "cuda"), draw(1, "cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        balancer.run(first)
    assert not balancer.load_history().any()
    for _ in range(5):
        graph.replay()
    with torch.cuda.stream(stream):
        for _ in range(100):
            balancer.run(second)
    for _ in range(100):
        balancer.run(first)
    torch.cuda.synchronize()
    assert torch.equal(balancer.load_history(reset=True), 105 * counts + 100 * others)
    x = torch.ones(3, requires_grad=True, device="cuda")
    y = checkpoint(lambda x: x * balancer.run(first).sum(), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(balancer.load_history(), counts)
