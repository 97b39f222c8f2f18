"""Placements: derived maps, programs, groups, snapshots, errors."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lplb_triton import Placement, rebalance_experts, solve, topologies
from lplb_triton.testing.instances import shape_placement
from lplb_triton.testing.verify import highs_optimum

SHAPES = ["ring:5", "cube", "torus:2x2", "eplb:2:1", "eplb:16:2", "random:7:3", "random:12:2"]


def unmerged_optimum(placement, counts, group):
    """Optimum with one column per expert, built from nothing but the slot map."""
    ranks = placement.rank_of_slot.long()
    per_group = placement.group_size
    mask = np.zeros((placement.n_logical, placement.ep_size), dtype=bool)
    mask[placement.phy2log.long(), ranks] = True
    here = mask[:, group * per_group : (group + 1) * per_group]
    mine = here.any(1)
    return highs_optimum(
        counts.double().numpy()[mine], np.zeros(per_group), np.ascontiguousarray(here[mine].T)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_are_inverse_to_each_other(shape):
    """`log2phy` lists every slot that `phy2log` gives an expert, and `logcnt` counts them."""
    p = shape_placement(shape, np.random.default_rng(0))
    phy2log, log2phy, logcnt = p.phy2log.long(), p.log2phy.long(), p.logcnt.long()
    assert torch.equal(torch.bincount(phy2log, minlength=p.n_logical), logcnt)
    for expert in range(p.n_logical):
        slots = log2phy[expert][log2phy[expert] >= 0]
        assert len(slots) == logcnt[expert] == len(set(slots.tolist()))
        assert (phy2log[slots] == expert).all()
        assert (log2phy[expert][len(slots) :] == -1).all()
    assert torch.equal(p.rank_of_slot.long(), torch.arange(p.n_physical) // p.slots_per_rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_programs_keep_load_and_optimum(shape):
    """Programs keep all tokens, and merging of experts does not change their optimum."""
    rng = np.random.default_rng(1)
    p = shape_placement(shape, rng)
    counts = torch.from_numpy(np.floor(rng.lognormal(0, 1, (3, p.n_logical)) * 100))
    problem = p.problem(counts)
    assert problem.n_instances == 3 * p.n_group
    totals = problem.weights.sum(1) + problem.fixed.sum(1)
    torch.testing.assert_close(totals.reshape(3, -1).sum(1), counts.sum(1))
    solution = solve(problem, tolerance=1e-6)
    for batch in range(3):
        for group in range(p.n_group):
            optimum = unmerged_optimum(p, counts[batch], group)
            got = float(solution.max_load[batch * p.n_group + group])
            assert got == pytest.approx(optimum, rel=2e-6)
    loads = p.rank_loads(counts, solution)
    torch.testing.assert_close(loads.sum(1), counts.sum(1))
    torch.testing.assert_close(
        loads.reshape(3 * p.n_group, -1).amax(1), solution.max_load, rtol=1e-9, atol=0
    )


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4))
def test_even_loads_by_hand(seed, ranks, slots):
    """`even_loads` splits each expert evenly over its slots, and no solved plan is worse."""
    rng = np.random.default_rng(seed)
    n_logical = int(rng.integers(1, ranks * slots + 1))
    flat = np.concatenate(
        [np.arange(n_logical), rng.integers(n_logical, size=ranks * slots - n_logical)]
    )
    p = Placement.from_phy2log(rng.permutation(flat), ranks, n_logical=n_logical)
    counts = torch.from_numpy(rng.integers(0, 100, n_logical))
    expected = [0.0] * ranks
    for slot, expert in enumerate(p.phy2log.tolist()):
        expected[slot // slots] += float(counts[expert]) / int(p.logcnt[expert])
    assert p.even_loads(counts)[0].tolist() == pytest.approx(expected)
    solution = solve(p.problem(counts))
    assert float(solution.max_load.max()) <= max(expected) * (1 + 1e-5) + 1e-9


def test_no_redundancy_leaves_nothing_to_solve():
    """Without copies a program has no columns, and its load is that of the placement."""
    p = Placement.from_phy2log(np.array([3, 1, 0, 2]), 2)
    problem = p.problem(torch.tensor([5, 1, 2, 3]))
    assert problem.n_columns == 0
    assert solve(problem).max_load.tolist() == [7.0]


def test_several_copies_on_one_rank():
    """Several copies on one rank count as one place to send tokens, with their multiplicity."""
    p = Placement.from_phy2log(np.array([0, 0, 0, 1, 2, 3]), 2)
    counts = torch.tensor([90, 10, 10, 10])
    solution = solve(p.problem(counts))
    # Expert 0 lives on rank 0 alone, three times.
    assert float(solution.max_load[0]) == pytest.approx(90)
    assert p.structure.copy_multiplicity[:3].tolist() == [3, 3, 3]
    mixed = Placement.from_phy2log(np.array([0, 0, 1, 0]), 2)
    solution = solve(mixed.problem(torch.tensor([90, 10])))
    assert float(solution.max_load[0]) == pytest.approx(50, rel=1e-3)


def test_from_history_is_eplb():
    """`Placement.from_history` has the slots and copies that `rebalance_experts` gives."""
    load = torch.rand(64)
    phy2log, _, logcnt = rebalance_experts(load[None], 80, 1, 1, 16)
    p = Placement.from_history(load, 16, redundant_per_rank=1)
    assert torch.equal(p.phy2log.long(), phy2log[0]) and torch.equal(p.logcnt.long(), logcnt[0])


def test_snapshots_cannot_change_it():
    """A write to a tensor that a placement returned does not change the placement."""
    p = shape_placement("cube", np.random.default_rng(0))
    before = p.phy2log
    for name in ("phy2log", "log2phy", "logcnt", "rank_of_slot"):
        getattr(p, name).fill_(7)
    assert torch.equal(p.phy2log, before)
    assert "64 experts in 80 slots" in repr(p)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "name"),
    [
        ((torch.rand(4), 2), {}, TypeError, "phy2log"),
        ((torch.zeros(2, 2).long(), 2), {}, ValueError, "phy2log"),
        ((torch.zeros(0).long(), 2), {}, ValueError, "phy2log"),
        ((torch.tensor([0, 1, 3, 3]), 2), {}, ValueError, "phy2log"),
        ((torch.tensor([0, 1, -1, 2]), 2), {}, ValueError, "phy2log"),
        ((torch.tensor([0, 1, 2, 3]), 2), {"n_logical": 3}, ValueError, "phy2log"),
        ((torch.tensor([0, 1, 2]), 2), {}, ValueError, "ep_size"),
        ((torch.tensor([0, 1]), 0), {}, ValueError, "ep_size"),
        ((torch.tensor([0, 1]), 1.0), {}, TypeError, "ep_size"),
        ((torch.tensor([0, 1, 2, 3]), 4), {"n_group": 3}, ValueError, "n_group"),
        ((torch.tensor([0, 1, 0, 2]), 4), {"n_group": 2}, ValueError, "phy2log"),
        ((torch.tensor([0, 0, 1, 2]), 4), {"n_group": 2}, ValueError, "phy2log"),
    ],
)
def test_arguments_are_named(args, kwargs, error, name):
    """An error on the arguments of `from_phy2log` begins with the argument's name."""
    with pytest.raises(error, match=f"^{name}"):
        Placement.from_phy2log(*args, **kwargs)


def test_counts_are_checked():
    """Counts of a wrong shape or type are refused by name."""
    p = Placement.from_topology(topologies.ring(2), 6, 4, 2)
    for bad in (torch.zeros(3), torch.zeros(2, 2, 4)):
        with pytest.raises(ValueError, match="^counts"):
            p.problem(bad)
    with pytest.raises(TypeError, match="^counts"):
        p.problem([1, 2, 3, 4])
