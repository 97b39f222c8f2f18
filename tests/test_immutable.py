"""A placement can't be changed, and is a value: equal, hashed, copied and kept by content."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lplb_triton import Balancer, Placement, plan_moves, solve, topologies

PHY2LOG = [0, 1, 2, 0, 3, 4, 5, 0]
MAPS = ("phy2log", "log2phy", "logcnt", "rank_of_slot")


def make():
    return Placement(np.array(PHY2LOG), 4)


@pytest.mark.parametrize(
    "name", ["ep_size", "structure", "phy2log", "max_columns", "_phy2log", "x"]
)
def test_attributes_cannot_be_set_or_deleted(name):
    """Attributes of a placement can be neither set nor deleted."""
    placement = make()
    with pytest.raises(AttributeError, match=f"^{name} can't be set: a Placement is immutable"):
        setattr(placement, name, 8)
    with pytest.raises(AttributeError, match=f"^{name} can't be deleted"):
        delattr(placement, name)
    assert placement == make()


def test_what_it_was_made_from_and_what_it_returns_cannot_change_it():
    """Writes to a placement's source, maps or problems do not change the placement."""
    counts = torch.tensor([8.0, 1, 1, 1, 1, 1])
    slots = torch.tensor(PHY2LOG)
    for source in (slots, slots.numpy()):
        placement = Placement(source, 4)
        wanted = [plain.clone() for plain in (getattr(placement, name) for name in MAPS)]
        source[0] = 5
        problem = placement.problem(counts)
        kept = problem.mask.clone()
        for tensor in (problem.mask, problem.weights, problem.fixed, placement.even_loads(counts)):
            tensor.fill_(1)
        for name in MAPS:
            getattr(placement, name).fill_(3)
        source[0] = 0
        assert torch.equal(placement.problem(counts).mask, kept)
        for name, value in zip(MAPS, wanted, strict=True):
            assert torch.equal(getattr(placement, name), value)
        assert placement == make() and placement.structure.mask.sum() == int(kept.sum())


def test_tables_are_read_only():
    """The arrays of a placement's structure are read-only."""
    for array in make().structure:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_equal_by_content():
    """Placements are equal if their slots and sizes are, and equal ones share a hash."""
    placement = make()
    same = Placement(torch.tensor(PHY2LOG, dtype=torch.uint8), 4, n_logical=6)
    assert placement == same and hash(placement) == hash(same)
    assert len({placement, same, Placement(PHY2LOG, 4)}) == 1
    others = [
        Placement(PHY2LOG, 2),
        Placement([1, 0, 2, 0, 3, 4, 5, 0], 4),
        Placement(PHY2LOG, 4, max_columns=5),
        Placement([0, 1, 0, 2], 4),
    ]
    assert all(placement != other for other in others) and len({placement, *others}) == 5
    one = [0, 1, 0, 1, 2, 3, 2, 3]
    assert Placement(one, 4) != Placement(one, 4, n_group=2)
    assert placement != PHY2LOG and (placement == PHY2LOG) is False
    ring = topologies.ring(2)
    assert Placement.from_topology(ring, 8, 4, 4) == Placement.from_topology(ring, 8, 4, 4)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_and_copied(protocol):
    """A pickled placement is equal and immutable, and a copy is the placement itself."""
    placement = Placement.from_topology(topologies.ring(2), 12, 8, 4)
    kept = pickle.loads(pickle.dumps(placement, protocol))
    assert kept == placement and kept.n_group == 2 and kept is not placement
    assert all(map(np.array_equal, kept.structure, placement.structure))
    assert not any(array.flags.writeable for array in kept.structure)
    assert copy.copy(placement) is placement and copy.deepcopy([placement])[0] is placement
    with pytest.raises(AttributeError, match="immutable"):
        placement.__setstate__(make().__getstate__())
    assert kept == placement


def test_kept_in_a_file_that_holds_no_code(tmp_path):
    """A saved placement can be loaded with weights_only=True."""
    placement = make()
    torch.save({"placement": placement}, tmp_path / "model.pt")
    with torch.serialization.safe_globals([Placement]):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert loaded["placement"] == placement


def test_an_equal_placement_is_no_news_to_a_balancer():
    """A balancer takes an equal placement, and then a different one."""
    balancer = Balancer(make(), device="cpu")
    assert balancer.update_placement(make()) == make()
    other = Placement([0, 1, 0, 2, 3, 4, 5, 0], 4)
    balancer.update_placement(other)
    assert balancer.placement == other != make()


def test_reprs_tell_sizes_and_print_no_tensor():
    """Reprs are one line of sizes without the contents of tensors."""
    placement = make()
    counts = torch.tensor([8.0, 1, 1, 1, 1, 1]).repeat(3, 1)
    problem = placement.problem(counts)
    solution = solve(problem)
    moves = plan_moves(placement, Placement([1, 0, 2, 0, 3, 4, 5, 0], 4))
    for value, text in (
        (placement, "6 experts in 8 slots, 4 ranks"),
        (placement.structure, "6 experts in 8 slots, 1 group(s) of 4 ranks"),
        (problem, "3 instances, 4 ranks, 2 columns"),
        (solution, "3 instances, 4 ranks, 2 columns, tolerance 0.001, on cpu"),
        (moves, "MovePlan(2 slots to write"),
    ):
        assert text in repr(value)
        assert "tensor" not in repr(value) and "array" not in repr(value)
        assert "\n" not in repr(value)


def test_results_with_tensors_can_be_compared_and_be_keys():
    """Results with tensors compare by identity and can be members of a set."""
    problem = make().problem(torch.ones(2, 6))
    solution, moves = solve(problem), plan_moves(make(), make())
    for value in (problem, solution, moves):
        assert value == value and len({value, copy.copy(value)}) == 2
        assert value != copy.copy(value)
