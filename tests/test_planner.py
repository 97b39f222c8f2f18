"""The original's public surface: sizes, rules, weights, workloads, selection."""

import inspect

import pytest
import torch

import lplb_triton
from lplb_triton import Planner, topologies
from lplb_triton.planner import Planner as DirectPlanner
from lplb_triton.testing.verify import highs_optimum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(name="cube", n_logical=64, ep_size=8, redundants=2, **kwargs):
    r2o = topologies.from_name(name)
    kwargs.setdefault("device", DEVICE)
    return Planner(r2o, n_logical + redundants * ep_size, n_logical, ep_size, **kwargs)


def counter(dtype=torch.int64, shape=(1,)):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def balanced_loads(planner, workload, o_weight):
    """Rank loads from the published definition of the weights, [n_group, group_size]."""
    r2o, c = planner.r2o.long(), planner.combined_redundant_experts
    d = planner.num_redundants
    by_slot = workload[planner.phy2log.long()].double()
    by_slot = by_slot.reshape(planner.n_group, planner.group_size, -1)
    own = by_slot[:, :, : c * d].reshape(planner.n_group, planner.group_size, c, d).sum(2)
    moved = (own * (1 - o_weight.double())).gather(1, r2o.expand_as(own))
    fixed = by_slot[:, :, c * d : planner.n_local_logical_routed_experts].sum(2)
    return (own * o_weight + moved).sum(2) + fixed


def test_surface():
    """The planner has the names, parameters, sizes and tensor types of the original."""
    assert lplb_triton.Planner is DirectPlanner is Planner
    assert lplb_triton.eplb.rebalance_experts is lplb_triton.rebalance_experts
    names = list(inspect.signature(Planner).parameters)[:5]
    assert names == [
        "redundant_to_original",
        "n_routed_experts",
        "n_logical_routed_experts",
        "ep_size",
        "group",
    ]
    planner = make("cube", 256, 32, 4)
    assert torch.equal(planner.r2o.cpu(), topologies.cube())
    assert torch.equal(planner.o2r.cpu(), topologies.inverse(topologies.cube()))
    assert planner.r2o.dtype == planner.o2r.dtype == torch.int32
    assert (planner.group_size, planner.num_redundants, planner.n_group) == (8, 2, 4)
    assert (planner.n_local_routed_experts, planner.n_local_logical_routed_experts) == (12, 8)
    assert planner.combined_redundant_experts == 2 and planner.ep_size == 32
    assert planner.n_routed_experts == 384 and planner.n_logical_routed_experts == 256
    assert planner.ep_group is None and planner.deep_ep_initialized is False
    assert planner.phy2log.shape == (384,) and planner.phy2log.dtype == torch.int32


def test_identity_order_and_copies_follow_r2o():
    """Without a history originals are in order, and each copy is of the expert that r2o says."""
    planner = make("cube", 256, 32, 4)
    slots = planner.phy2log.cpu().reshape(4, 8, 12)
    assert torch.equal(slots[:, :, :8].reshape(-1), torch.arange(256, dtype=torch.int32))
    r2o = topologies.cube()
    for rank in range(8):
        for c in range(2):
            for d in range(2):
                source = int(r2o[rank, d])
                copy, original = slots[:, rank, 8 + c * 2 + d], slots[:, source, c * 2 + d]
                assert torch.equal(copy, original)


def test_history_puts_the_heaviest_first_and_originals_before_copies():
    """A history sorts each rank's originals by load, and copies fill the last slots."""
    planner = make("hypercube", 128, 16)
    history = torch.randint(1, 1000, (128,))
    phy2log, log2phy, logcnt = planner.update_redundancy_mapping(history.to(DEVICE))
    assert torch.equal(phy2log, planner.phy2log)
    assert {t.dtype for t in (phy2log, log2phy, logcnt)} == {torch.int32}
    local = history[phy2log.cpu().long()].reshape(16, 10)[:, :8]
    assert (local.diff(dim=1) <= 0).all()
    assert log2phy.shape == (128, 2)
    assert (log2phy[:, 0] % 10 < 8).all() and ((log2phy[:, 1] < 0) == (logcnt == 1)).all()
    copies = log2phy[:, 1][log2phy[:, 1] >= 0]
    assert (copies % 10 >= 8).all() and len(copies) == 32
    back, _, _ = planner.update_redundancy_mapping()
    assert torch.equal(back.cpu().reshape(16, 10)[:, :8].reshape(-1), torch.arange(128).int())


@pytest.mark.parametrize(
    ("name", "ep_size", "redundants", "reorder"),
    [
        ("cube", 32, 2, True),
        ("cube", 32, 4, False),
        ("cube", 64, 2, True),
        ("ring:8", 32, 1, True),
        ("hypercube", 16, 2, True),
        ("torus:8x4", 32, 2, False),
    ],
)
def test_published_configurations_reach_the_optimum(name, ep_size, redundants, reorder):
    """The weights of published configurations keep all load and reach HiGHS's optimum."""
    planner = make(name, 256, ep_size, redundants)
    draw = torch.Generator().manual_seed(42)
    if reorder:
        history = (torch.randn(256, generator=draw) * 0.15 + 1).clamp_min(0).mul(2**20).long()
        planner.update_redundancy_mapping(history)
    workload = (torch.randn(256, generator=draw) * 0.3 + 1).clamp_min(0).mul(4096).int().to(DEVICE)
    available = counter(torch.int32, ())
    o_weight, scaled = planner.solve_probs(workload, available)
    assert int(available) == planner.n_group
    loads = balanced_loads(planner, workload, o_weight)
    assert float(loads.sum()) == pytest.approx(float(workload.sum()), rel=1e-9)
    problem = planner.balancer.placement.problem(workload.cpu())
    for group in range(planner.n_group):
        row = (
            problem.weights[group],
            problem.fixed[group],
            problem.mask[group % len(problem.mask)],
        )
        optimum = highs_optimum(*(t.numpy() for t in row))
        assert optimum * (1 - 1e-6) <= float(loads[group].max()) <= optimum * (1 + 1e-3)
    torch.testing.assert_close(scaled.reshape(-1), workload.float() / workload.max())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_counter_of_any_shape(dtype, shape):
    """A counter of int32 or int64 with one element, of any shape, counts every solve."""
    planner = make()
    available = counter(dtype, shape)
    idx = torch.randint(64, (30, 4), device=DEVICE)
    planner.run(idx, available)
    planner.run(idx, available, 3)
    planner.solve_probs(planner.count_workload(idx, 4)[0], available)
    assert int(available) == 3


def test_no_tokens_give_zeros_and_count_as_certified():
    """Without tokens the scaled workload is zero, weights are valid and solves certified."""
    planner = make("cube", 128, 16)
    available = counter()
    o_weight, scaled = planner.solve_probs(
        torch.zeros(128, dtype=torch.int32, device=DEVICE), available
    )
    assert int(available) == 2 and (scaled == 0).all()
    assert scaled.shape == (2, 8, 8) and o_weight.shape == (2, 8, 2)
    assert ((o_weight >= 0) & (o_weight <= 1)).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weighted_select(backend, dtype):
    """Selected slots hold the ids' experts, and originals keep their weight's part of tokens."""
    planner = make("torus:2x2", 32, 8, 4, backend=backend)
    planner.update_redundancy_mapping(torch.randint(1, 100, (32,)))
    idx = torch.randint(-1, 32, (500,), device=DEVICE, dtype=dtype)
    o_weight = torch.rand(2, 4, 2, device=DEVICE)
    o_weight[0, 0, 0], o_weight[1, 2, 1] = 0, 1
    for n_sms in (1, 7, 900):
        workload, running = planner.count_workload(idx, n_sms)
        assert workload.dtype == running.dtype == torch.int32 and running.shape == (n_sms, 32)
        assert torch.equal(running[-1], workload) and int(workload.sum()) == int((idx >= 0).sum())
        out = planner.weighted_select_target(idx, o_weight, running, n_sms)
        assert out.dtype == dtype and torch.equal(out < 0, idx < 0)
        assert torch.equal(planner.phy2log[out[out >= 0].long()].long(), idx[idx >= 0].long())
        # Original (c, d) of rank r keeps o_weight[r, d] of its tokens, to less than one.
        kept = torch.bincount(out[out >= 0].long(), minlength=64).reshape(2, 4, 8)[:, :, :4]
        total = workload[planner.phy2log.long()].reshape(2, 4, 8)[:, :, :4]
        weight = o_weight.repeat(1, 1, 2)
        assert ((kept - total * weight.double()).abs() < 1).all()


def test_run_equals_its_pieces():
    """`run` gives the ids of its three steps, and overwritten results of those do not matter."""
    planner = make("cube", 64, 8)
    idx = (torch.rand(300, 4, device=DEVICE) ** 3 * 65).long() - 1
    workload, running = planner.count_workload(idx, 5)
    o_weight, _ = planner.solve_probs(workload, counter())
    pieces = planner.weighted_select_target(idx, o_weight, running, 5)
    assert torch.equal(pieces, planner.run(idx, counter()))
    running.zero_()
    o_weight.zero_()
    assert torch.equal(pieces, planner.run(idx, counter()))
    assert planner.run(idx[:0], counter()).shape == (0, 4)


class Buffer:
    """Stand-in with the one attribute that is read of a DeepEP buffer."""

    def __init__(self, group):
        self.group = group


def test_init_from_deep_ep_refuses_what_has_no_group():
    """A buffer without a group is refused, and the planner stays uninitialised."""
    planner = make()
    with pytest.raises(TypeError, match="^buffer"):
        planner.init_from_deep_ep(object())
    assert planner.deep_ep_initialized is False


def test_init_from_deep_ep_takes_the_group(tmp_path):
    """A group of another size than `ep_size` is refused, from a buffer or as an argument."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        group = torch.distributed.group.WORLD
        with pytest.raises(ValueError, match="^group"):
            make(device="cpu").init_from_deep_ep(Buffer(group))
        with pytest.raises(ValueError, match="^group"):
            make(device="cpu", group=group)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda p: Planner(p.r2o, 80, 64), ValueError, "ep_size"),
        (lambda p: Planner(p.r2o, 80, 64, 12), ValueError, "ep_size"),
        (lambda p: Planner(p.r2o, 81, 64, 8), ValueError, "n_routed_experts"),
        (lambda p: Planner(p.r2o, 72, 64, 8), ValueError, "n_routed_experts"),
        (lambda p: Planner(p.r2o, 64, 64, 8), ValueError, "n_routed_experts"),
        (lambda p: Planner(p.r2o, 80, 63, 8), ValueError, "n_logical_routed_experts"),
        (lambda p: Planner(p.r2o.float(), 80, 64, 8), TypeError, "redundant_to_original"),
        (lambda p: p.run(torch.zeros(2, device=DEVICE), counter()), TypeError, "idx"),
        (lambda p: p.run(torch.zeros(2).long().to(DEVICE), 3), TypeError, "avail_counter"),
        (
            lambda p: p.run(torch.zeros(2).long().to(DEVICE), torch.zeros(2).int().to(DEVICE)),
            ValueError,
            "avail_counter",
        ),
        (lambda p: p.solve_probs(torch.zeros(64), counter()), TypeError, "workload"),
        (lambda p: p.solve_probs(torch.zeros(3).int(), counter()), ValueError, "workload"),
        (
            lambda p: p.update_redundancy_mapping(torch.zeros(3)),
            ValueError,
            "workload",
        ),
        (
            lambda p: p.weighted_select_target(
                torch.zeros(2).long().to(DEVICE),
                torch.ones(1, 8, 2, device=DEVICE),
                torch.zeros(3, 64).int().to(DEVICE),
                4,
            ),
            ValueError,
            "n_sms",
        ),
        (
            lambda p: p.weighted_select_target(
                torch.zeros(2).long().to(DEVICE),
                torch.ones(8, 2, device=DEVICE),
                torch.zeros(3, 64).int().to(DEVICE),
                3,
            ),
            ValueError,
            "o_weight",
        ),
    ],
)
def test_arguments_are_named(call, error, name):
    """An error on an argument of the planner begins with the argument's name."""
    with pytest.raises(error, match=f"^{name}"):
        call(make())
