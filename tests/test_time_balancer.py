"""A balancer with ``objective="time"``: ids, times, settings, copies, files and versions."""

import copy
import pickle

import pytest
import torch
from helpers.balancers import DEVICE, check_answer, placement_of, random_ids
from helpers.time_plans import COST

from lplb_triton import Balancer, Placement, TimeCost, chain
from lplb_triton._consensus import LayerPlacement

BACKENDS = ["triton"] if DEVICE == "cuda" else ["triton", "torch"]
OTHER = TimeCost.for_model(4096, 1536)


def make(placement, backend="triton", cost=COST, **settings):
    """Make a balancer by time of one process, whose counts are all there are."""
    settings = {"rank": 0, **settings} if settings.get("quotas") != "replicated" else settings
    return Balancer(
        placement, device=DEVICE, backend=backend, objective="time", cost=cost, **settings
    )


def rows_of(placement, out):
    """Count tokens by rank and slot."""
    slots = torch.bincount(out[out >= 0].long().flatten().cpu(), minlength=placement.n_physical)
    return slots.view(placement.ep_size, -1).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["levelling", "interior_point"])
def test_ids_have_the_predicted_time(backend, solver):
    """Ids map back, and their rows take the time that was predicted, less than the token plan's."""
    placement = placement_of(0, 4, 2, 16)
    balancer = make(placement, backend, solver=solver, quotas="replicated")
    idx = random_ids(1, 16, (60, 2))
    out = balancer.run(idx)
    experts = placement.phy2log.to(DEVICE)[out.clamp(min=0)].long()
    assert torch.equal(experts[out >= 0], idx[idx >= 0])
    times = balancer.times
    assert float(times.plan) == COST.predict(rows_of(placement, out)).max()
    assert float(times.smoothed_plan) < float(times.smoothed_tokens)
    assert float(times.plan) < 0.97 * float(times.tokens)
    assert times.plan.shape == (1,) and times.plan.device == idx.device
    assert int(balancer.certified) == int(balancer.solves) == 1
    if backend == "torch" or DEVICE == "cuda":
        assert torch.equal(balancer.run(idx), out)


def test_kernel_and_twin_give_the_same_ids():
    """Where both solvers find the same token plan, ids and times are the same bit for bit."""
    placement = placement_of(3, 8, 1, 32)
    kernel = make(placement)
    twin = Balancer(placement, device="cpu", backend="torch", objective="time", cost=COST, rank=0)
    idx = random_ids(2, 32, (20, 8), dtype=torch.int32)
    assert torch.equal(kernel.run(idx).cpu(), twin.run(idx.cpu()))
    for ours, theirs in zip(kernel.times, twin.times, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_large_batches_keep_the_token_plan_or_stay_near_it():
    """With many tokens the largest load is at most a few tiles above the token plan's."""
    placement = placement_of(1, 8, 1, 32)
    backend = BACKENDS[-1]
    idx = random_ids(4, 32, (40000, 8))
    largest = [
        int(rows_of(placement, balancer.run(idx)).sum(1).max())
        for balancer in (
            make(placement, backend, quotas="replicated"),
            Balancer(placement, device=DEVICE, backend=backend, quotas="replicated"),
        )
    ]
    assert largest[0] < 1.05 * largest[1]


def test_one_rank_and_empty_batches():
    """A batch without tokens takes no time, and a single rank has nothing to decide."""
    alone = make(Placement.from_phy2log(torch.tensor([0, 1, 2, 0]), 1))
    out = alone.run(torch.tensor([[0, 0], [1, -1]], device=DEVICE))
    assert out.tolist() == [[0, 0], [1, -1]]
    balancer = make(placement_of(0, 4, 1, 8))
    assert balancer.run(torch.full((4, 2), -1, device=DEVICE)).tolist() == [[-1, -1]] * 4
    assert float(balancer.times.plan) == float(balancer.times.tokens) == 0.0
    assert balancer.run(torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)).shape == (0, 2)


def test_another_placement_is_planned_by_its_own_tables():
    """After `update_placement` plans are those of a balancer made with the new placement."""
    first, second = placement_of(0, 4, 1, 8), placement_of(9, 4, 1, 8)
    idx = random_ids(5, 8, (24, 4))
    for backend in BACKENDS:
        balancer = make(first, backend)
        balancer.run(idx)
        balancer.update_placement(second)
        assert torch.equal(balancer.run(idx), make(second, backend).run(idx))


def test_copies_and_files_keep_objective_and_cost():
    """A deep copy and a balancer from a pickle plan by the same cost."""
    balancer = make(placement_of(2, 4, 1, 16), BACKENDS[-1])
    idx = random_ids(6, 16, (10, 4))
    out = balancer.run(idx)
    for again in (copy.deepcopy(balancer), pickle.loads(pickle.dumps(balancer))):
        assert again.objective == "time" and again.cost == COST
        assert torch.equal(again.run(idx), out)
    assert "objective=time" in repr(balancer)


def test_cost_is_part_of_what_ranks_compare():
    """Balancers whose objective or cost differs have other versions and other kinds."""
    placement = placement_of(0, 4, 1, 16)
    tokens = Balancer(placement, device=DEVICE, rank=0)
    same = make(placement, cost=TimeCost.for_model(2048, 768))
    made = [tokens, make(placement), make(placement, cost=OTHER), same]
    for balancer in made:
        balancer._membership.write(LayerPlacement(placement, (0,)))
    versions = [int(balancer._layer.version) for balancer in made]
    assert len(set(versions[:3])) == 3 and versions[3] == versions[1]
    kinds = [balancer._membership.kinds for balancer in made]
    assert len(set(kinds[:3])) == 3 and kinds[3] == kinds[1]


def test_wrong_settings_are_refused_by_name():
    """Costs without the objective, the objective without a cost, and live slots are refused."""
    placement = placement_of(0, 4, 1, 16)

    def refuse(match, kind=ValueError, where=placement, **settings):
        with pytest.raises(kind, match=match):
            Balancer(where, device="cpu", rank=0, **settings)

    refuse("objective must be one of tokens, time", objective="speed")
    refuse("cost needs objective='time'", cost=COST)
    refuse("needs a cost", objective="time")
    refuse("cost must be a TimeCost, got int", TypeError, objective="time", cost=3)
    live = chain(torch.ones(16), 4, redundant_per_rank=1).with_live_slots(1)
    refuse(
        "go with live slots, which are filled by tokens", where=live, objective="time", cost=COST
    )
    narrow = TimeCost.for_model(64, 64, most_active=2)
    refuse("at least the 5 slots of a rank", objective="time", cost=narrow)
    with pytest.raises(RuntimeError, match="objective='time' only"):
        _ = Balancer(placement, device="cpu", rank=0).times


def test_tokens_are_the_default():
    """Without an objective nothing changes: ids are those of the token plan."""
    placement = placement_of(0, 8, 1, 32)
    idx = random_ids(7, 32, (64, 8))
    balancer = Balancer(placement, device=DEVICE, rank=0)
    assert balancer.objective == "tokens" and balancer.cost is None
    check_answer(balancer, idx, balancer.run(idx))
    assert balancer._layer.times is None
