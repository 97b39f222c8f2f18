"""Move plans: what is written, where it is read, and what crosses domains."""

import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lplb_triton import MovePlan, Placement, chain, plan_moves
from lplb_triton.placement.moves import keep_slots


def random_placement(seed):
    generator = torch.Generator().manual_seed(seed)
    phy2log = torch.cat([torch.arange(8), torch.randint(8, (4,), generator=generator)])
    return Placement(phy2log[torch.randperm(12, generator=generator)], 4, n_logical=8)


@settings(max_examples=60)
@given(st.integers(0, 2**20), st.integers(0, 2**20))
def test_plan_turns_one_placement_into_the_other(one, two):
    """A plan turns one placement into the other, and reads from the nearest copies."""
    old, new = random_placement(one), random_placement(two)
    plan = plan_moves(old, new, ranks_per_domain=2)
    weights = old.phy2log.long()
    weights[plan.target] = old.phy2log.long()[plan.source]
    assert torch.equal(weights, new.phy2log.long())
    assert torch.equal(plan.expert, new.phy2log.long()[plan.target])
    assert torch.equal(plan.source_rank, plan.source // 3)
    assert torch.equal(plan.target_rank, plan.target // 3)
    assert torch.equal(plan.crossing, plan.source_rank // 2 != plan.target_rank // 2)
    assert len(plan) == int((old.phy2log != new.phy2log).sum())
    ranks = old.rank_of_slot
    for expert, target, crossing in zip(plan.expert, plan.target_rank, plan.crossing, strict=True):
        holders = ranks[old.phy2log == expert]
        # Nearest source: from its own rank, else its own domain.
        assert bool(crossing) == (not bool((holders // 2 == target // 2).any()))
    news = sum(
        int(not (old.phy2log[ranks == r] == e).any())
        for r, e in zip(plan.target_rank, plan.expert, strict=True)
    )
    assert plan.moved == news


def test_sources_take_turns():
    """Two moves of one expert read from different copies."""
    old = Placement(torch.tensor([0, 1, 0, 2, 3, 3, 4, 4]), 4)
    new = Placement(torch.tensor([0, 1, 0, 2, 3, 0, 4, 0]), 4)
    assert sorted(plan_moves(old, new).source_rank.tolist()) == [0, 1]


def test_nothing_to_move():
    """A plan from a placement to itself is empty."""
    placement = chain(torch.rand(8), 4)
    plan = plan_moves(placement, placement)
    assert len(plan) == plan.moved == 0


def test_errors_name_the_argument():
    """A wrong argument is refused with a message that names it."""
    placement = chain(torch.rand(8), 4)
    with pytest.raises(TypeError, match="previous"):
        plan_moves(torch.arange(8), placement)
    with pytest.raises(TypeError, match="^placement must be a Placement, got Tensor"):
        plan_moves(placement, torch.arange(8))
    with pytest.raises(ValueError, match="previous"):
        plan_moves(chain(torch.rand(8), 2), placement)
    with pytest.raises(ValueError, match="ranks_per_domain"):
        plan_moves(placement, placement, ranks_per_domain=3)


def test_default_device_changes_nothing():
    """Another default device changes neither plans nor kept slots."""
    for seed in range(20):
        old, new = random_placement(seed), random_placement(seed + 1)
        maps = [p.phy2log.long()[None] for p in (new, old)]
        expected, plan = keep_slots(*maps, 4), plan_moves(old, new)
        with torch.device("meta"):
            again, kept = plan_moves(old, new), keep_slots(*maps, 4)
        assert kept.device.type == "cpu" and torch.equal(kept, expected)
        assert torch.equal(again.source, plan.source)


def test_repr_has_numbers_only():
    """The repr of a plan has numbers only, and plans compare by identity."""
    old = Placement(torch.tensor([0, 1, 0, 2, 3, 3, 4, 4]), 4)
    new = Placement(torch.tensor([0, 1, 0, 2, 3, 0, 4, 0]), 4)
    plan = plan_moves(old, new, ranks_per_domain=2)
    assert repr(plan) == "MovePlan(2 slots to write, 2 moved, 2 crossing)"
    assert plan == plan and plan != plan_moves(old, new) and len({plan}) == 1


def test_plans_saved_under_the_old_module_name_load():
    """A pickle that names `lplb_triton.moves.MovePlan` loads as a `MovePlan`."""
    plan = plan_moves(chain(torch.arange(8.0), 4), chain(torch.arange(8.0).flip(0), 4))
    saved = pickle.dumps(plan, protocol=2)
    new, old = (
        f"clplb_triton{path}\nMovePlan\n".encode() for path in (".placement.moves", ".moves")
    )
    assert saved.count(new) == 1
    loaded = pickle.loads(saved.replace(new, old))
    assert type(loaded) is MovePlan and torch.equal(loaded.expert, plan.expert)
