"""SGLang's solver with ``objective="time"``: shares, ids, updates and refusals."""

import pytest
import torch
from sglang_maps import DEVICE, padded

from lplb_triton import Balancer, Placement, TimeCost
from lplb_triton.integrations.sglang import LPLBSolver, update_solvers

COST = TimeCost.for_model(7168, 2048)
RANKS, EXPERTS = 2, 8
BACKENDS = ("torch", "triton")


def make_maps(seed=0, redundant=1):
    """Draw maps of EPLB's placement by random loads."""
    load = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed)) + 0.1
    placement = Placement.from_history(load, RANKS, redundant_per_rank=redundant)
    rows = padded(placement.log2phy.long(), 6)
    return placement.phy2log.long().to(DEVICE), rows.to(DEVICE)


def draw_ids(tokens=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EXPERTS, (tokens, 2), generator=generator).to(DEVICE)


def count_slots(ids, n_physical):
    return torch.bincount(ids.flatten(), minlength=n_physical)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shares_are_those_of_the_plan_by_time(backend):
    """Shares of `solve` give the ids of `run`, and a closed copy has probability 0."""
    phy2log, log2phy = make_maps()
    solver = LPLBSolver(
        phy2log, log2phy, RANKS, backend=backend, replicated_tokens=True, objective="time",
        cost=COST,
    )  # fmt: skip
    ids = draw_ids()
    prob = solver.solve(ids).clone()
    twin = LPLBSolver(
        phy2log, log2phy, RANKS, backend="torch", replicated_tokens=True, objective="time",
        cost=COST,
    )  # fmt: skip
    torch.testing.assert_close(prob, twin.solve(ids), atol=2e-3, rtol=0)
    torch.testing.assert_close(prob.sum(1), torch.ones_like(prob[:, 0]), atol=1e-6, rtol=0)
    assert not bool(prob[log2phy < 0].any())
    times = solver.balancer.times
    assert float(times.smoothed_plan) < float(times.smoothed_tokens)
    loads = count_slots(solver.run(ids), len(phy2log))
    counts = count_slots(ids, EXPERTS)
    listed = log2phy >= 0
    expected = (prob * counts[:, None])[listed]
    assert float((loads[log2phy[listed]] - expected).abs().max()) < 1
    used = counts[phy2log[log2phy[listed]]] > 0
    assert bool((prob[listed][used] == 0).any())
    assert not bool(loads[log2phy[listed]][(prob[listed] == 0) & used].any())
    solver.check()


def test_of_copies_on_one_rank_the_first_gets_all():
    """A rank's second copy of an expert is left without tokens, since its weights would be read."""
    phy2log = torch.tensor([0, 0, 2, 0, 1, 1]).to(DEVICE)
    log2phy = torch.tensor([[0, 1, 3], [4, 5, -1], [2, -1, -1]]).to(DEVICE)
    solver = LPLBSolver(
        phy2log, log2phy, 2, replicated_tokens=True, objective="time", cost=COST, backend="torch"
    )
    prob = solver.solve(torch.tensor([0] * 60 + [1] * 30 + [2] * 10).to(DEVICE))
    assert prob[1].tolist() == [1, 0, 0] and float(prob[0, 1]) == 0


def test_updates_keep_the_objective():
    """After an update, shares are those of a new solver for the new maps."""
    before, after = make_maps(), make_maps(seed=7)
    options = {"replicated_tokens": True, "objective": "time", "cost": COST, "backend": "torch"}
    solver = LPLBSolver(*before, RANKS, **options)
    ids = draw_ids()
    solver.solve(ids)
    update_solvers([solver], after[0][None], after[1][None])
    assert torch.equal(solver.solve(ids), LPLBSolver(*after, RANKS, **options).solve(ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "time"}, "objective='time' needs a cost"),
        ({"cost": COST}, "cost needs objective='time'"),
        ({"objective": "speed"}, "objective must be one of tokens, time"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    """Objectives and costs that don't go together are refused by name."""
    with pytest.raises(ValueError, match=message):
        LPLBSolver(*make_maps(), RANKS, replicated_tokens=True, **options)


@pytest.mark.parametrize(
    ("backend", "solver"),
    [("torch", "levelling"), ("triton", "levelling"), ("triton", "interior_point")],
)
@pytest.mark.parametrize("scale", [0, 1])
def test_shares_by_slot_by_tokens(backend, solver, scale):
    """By tokens, shares by slot are those of the solution, those of single copies 1."""
    phy2log, _ = make_maps()
    placement = Placement(phy2log, RANKS, n_logical=EXPERTS)
    balancer = Balancer(
        placement, quotas="replicated", device=DEVICE, backend=backend, solver=solver
    )
    counts = count_slots(draw_ids(), EXPERTS) * scale
    solution = balancer.solve(counts)
    cumulative = balancer.cumulative_shares(solution.shares).long()
    slots = balancer.share_slots(counts)
    sums = torch.zeros(EXPERTS, device=DEVICE).index_add(0, phy2log, slots)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    first = placement.structure.copy_slot[placement.structure.copy_start[:-1]].astype("int64")
    at = torch.from_numpy(placement.structure.copy_start[:-1].astype("int64"))
    expected = cumulative[at].float() / 2**24
    single = placement.logcnt.to(DEVICE) == 1
    assert single.any() and (slots[torch.from_numpy(first)][single] == 1).all()
    assert torch.equal(slots[torch.from_numpy(first)][~single], expected[~single])


def test_live_slots_have_no_shares_by_slot():
    """Live slots are planned by `run` alone, and shares by slot are refused."""
    placement = Placement(make_maps()[0], RANKS, n_logical=EXPERTS).with_live_slots(1)
    balancer = Balancer(placement, quotas="replicated", device=DEVICE, backend="torch")
    with pytest.raises(RuntimeError, match="live slots are planned by run only"):
        balancer.share_slots(torch.ones(EXPERTS, dtype=torch.int64, device=DEVICE))
