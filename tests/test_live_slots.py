"""Placements with live slots: what they hold, what stays as it is, and who refuses them."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lplb_triton import Balancer, Placement, Replicas, chain, place, plan_moves, solve

LIVE = pytest.mark.parametrize("live", [1, 2])


def static_placement(seed=0, ranks=4, experts=16, redundant=2):
    load = torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, experts))
    return chain(load, ranks, redundant_per_rank=redundant)


@LIVE
def test_live_slots_follow_the_static_ones(live):
    """The static slots of a rank come first and are those of before; live ones hold -1."""
    static = static_placement()
    p = static.with_live_slots(live)
    by_rank = p.phy2log.reshape(4, -1)
    assert torch.equal(by_rank[:, : static.slots_per_rank], static.phy2log.reshape(4, -1))
    assert (by_rank[:, static.slots_per_rank :] == -1).all()
    sizes = (p.live_per_rank, p.static_per_rank, p.slots_per_rank, p.n_copies, p.n_physical)
    n_slots = static.slots_per_rank
    assert sizes == (live, n_slots, n_slots + live, static.n_physical, 4 * (n_slots + live))
    assert (p.n_logical, p.ep_size, p.n_group) == (static.n_logical, static.ep_size, 1)
    assert p.max_columns == static.max_columns
    assert p.redundant_per_group == static.redundant_per_group
    assert torch.equal(p.rank_of_slot.long(), torch.arange(p.n_physical) // p.slots_per_rank)
    assert f"{live} live slot(s) a rank" in repr(p) and "live" not in repr(static)
    assert (static.live_per_rank, static.n_copies) == (0, static.n_physical)
    assert static.static_per_rank == static.slots_per_rank


@LIVE
def test_log2phy_lists_static_slots_in_the_old_order(live):
    """`log2phy` and `logcnt` count static slots alone, numbered with the live ones between."""
    static = static_placement()
    p = static.with_live_slots(live)
    assert torch.equal(p.logcnt, static.logcnt)
    old = static.log2phy.long()
    wanted = torch.where(old < 0, old, old + old // static.slots_per_rank * live)
    assert torch.equal(p.log2phy.long(), wanted)
    slots = p.log2phy[p.log2phy >= 0].long()
    assert sorted(slots.tolist()) == torch.nonzero(p.phy2log >= 0).flatten().tolist()


@LIVE
def test_copies_are_numbered_as_without_live_slots(live):
    """The program and the copies are those of the static slots."""
    static = static_placement()
    p = static.with_live_slots(live)
    counts = torch.arange(1, 17) ** 2
    ours, theirs = p.problem(counts), static.problem(counts)
    assert torch.equal(ours.weights, theirs.weights) and torch.equal(ours.fixed, theirs.fixed)
    assert torch.equal(p.even_loads(counts), static.even_loads(counts))
    solution = solve(ours)
    assert torch.equal(p.rank_loads(counts, solution), static.rank_loads(counts, solution))
    for name in ("copy_start", "copy_cell", "copy_index", "copy_multiplicity", "mask"):
        assert np.array_equal(getattr(p.structure, name), getattr(static.structure, name)), name
    experts = np.repeat(np.arange(p.n_logical), np.diff(p.structure.copy_start))
    assert np.array_equal(p.phy2log.numpy()[p.structure.copy_slot], experts)


def test_equality_and_copies_tell_live_slots_apart():
    """Placements are equal only with as many live slots, also after a file or a copy."""
    static = static_placement()
    p = static.with_live_slots(1)
    assert p == static_placement().with_live_slots(1)
    assert hash(p) == hash(static_placement().with_live_slots(1))
    assert len({static, p, static.with_live_slots(2)}) == 3
    for again in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p), copy.copy(p)):
        assert again == p and again.live_per_rank == 1
        assert torch.equal(again.phy2log, p.phy2log)


def test_numbers_of_live_slots_can_be_changed():
    """Live slots are replaced, not added to, and with 0 of them the placement is as before."""
    static = static_placement()
    p = static.with_live_slots(2)
    assert p.with_live_slots(1) == static.with_live_slots(1)
    assert p.with_live_slots(0) == static == static.with_live_slots(0)
    assert Placement(p.phy2log, 4, n_logical=16, live_per_rank=2, max_columns=p.max_columns) == p


@pytest.mark.parametrize(
    ("live", "error", "text"),
    [
        (3, ValueError, "^live_per_rank must be at most 2, got 3"),
        (-1, ValueError, "^live_per_rank"),
        (1.0, TypeError, "^live_per_rank"),
        (None, TypeError, "^live_per_rank"),
        ("1", TypeError, "^live_per_rank"),
    ],
)
def test_bad_numbers_are_refused_by_name(live, error, text):
    """Only 0, 1 and 2 live slots are taken."""
    with pytest.raises(error, match=text):
        static_placement().with_live_slots(live)
    with pytest.raises(error, match=text):
        Placement(torch.tensor([0, -1, 1, -1]), 2, live_per_rank=live)


def test_slot_maps_that_do_not_fit_are_refused():
    """Live slots must be -1 and leave static ones; static slots must not be -1."""
    with pytest.raises(ValueError, match="^phy2log must be -1 in the last 1 slots of each rank"):
        Placement(torch.tensor([0, -1, 1, 2]), 2, live_per_rank=1)
    with pytest.raises(ValueError, match="^live_per_rank must leave static slots, got 2 of 2"):
        Placement(torch.tensor([-1, -1, -1, -1]), 2, n_logical=1, live_per_rank=2)
    with pytest.raises(ValueError, match="^phy2log"):
        Placement(torch.tensor([0, -1, 1, -1]), 2)
    with pytest.raises(ValueError, match="^phy2log"):
        Placement(torch.tensor([0, -1, -1, 1, 2, -1]), 2, live_per_rank=1)


def test_several_groups_are_refused():
    """A placement of several groups takes no live slots, but 0 of them."""
    groups = Placement(torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]), 4, n_group=2)
    with pytest.raises(ValueError, match="^live_per_rank needs a placement of one group, got 2"):
        groups.with_live_slots(1)
    assert groups.with_live_slots(0) == groups


def test_moves_leave_live_slots_out():
    """A plan of moves names static slots only, and placements must have as many live slots."""
    old, new = (static_placement(seed).with_live_slots(2) for seed in (0, 1))
    plan = plan_moves(old, new)
    assert len(plan) > 0
    assert (old.phy2log[plan.source] >= 0).all() and (new.phy2log[plan.target] >= 0).all()
    weights = old.phy2log.clone()
    weights[plan.target] = old.phy2log[plan.source]
    assert torch.equal(weights, new.phy2log)
    without = plan_moves(*(static_placement(seed) for seed in (0, 1)))
    assert len(without) == len(plan) and without.moved == plan.moved
    # As many slots of a rank, but another number of live ones.
    other = static_placement(0, redundant=3).with_live_slots(1)
    assert other.n_physical == old.n_physical
    with pytest.raises(ValueError, match="^previous must have 1 live slots a rank, got 2"):
        plan_moves(old, other)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_update_keeps_the_number_of_live_slots(backend):
    """`update_placement` takes as many live slots only, and nothing changes if it refuses."""
    first, second = (static_placement(seed).with_live_slots(1) for seed in (0, 1))
    balancer = Balancer(first, device="cpu", backend=backend)
    for bad in (
        static_placement(0),
        static_placement(0).with_live_slots(2),
        static_placement(0, redundant=3),
        static_placement(0, redundant=1).with_live_slots(2),
    ):
        with pytest.raises(ValueError, match="^placement"):
            balancer.update_placement(bad)
    assert balancer.placement == first
    assert balancer.update_placement(second) == second == balancer.placement
    plain = Balancer(static_placement(0, redundant=3), device="cpu", backend=backend)
    with pytest.raises(ValueError, match="^placement"):
        plain.update_placement(first)


def test_replicas_refuse_live_slots_by_name():
    """`Replicas` takes placements without live slots only."""
    static = chain(torch.rand(8), 1, redundant_per_rank=1, keep_home=True)
    p, rows = static.with_live_slots(1), torch.nn.Parameter(torch.randn(8, 3))
    with pytest.raises(ValueError, match="^placement must have no live slots here, got Placement"):
        Replicas(p, {"w": rows})
    replicas = Replicas(static, {"w": rows})
    with pytest.raises(ValueError, match="^placement must have no live slots here, got Placement"):
        replicas.move(p, None)
    assert replicas.placement == static


def test_placing_starts_from_static_slots():
    """`place` starts from the static slots of a previous placement."""
    previous = static_placement(redundant=1)
    load = torch.rand(16, generator=torch.Generator().manual_seed(3))
    settings = {"redundant_per_rank": 1, "move_penalty": 0.01}
    found = place(load, 4, previous=previous.with_live_slots(1), **settings)
    assert found == place(load, 4, previous=previous, **settings)
