"""vLLM's policy, held against vLLM's rules and this library's EPLB."""

import abc
import inspect
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lplb_triton import eplb
from lplb_triton.integrations.vllm import LplbEplbPolicy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
rebalance = LplbEplbPolicy.rebalance_experts


def draw_load(layers, experts, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1.5, (layers, experts)))


def vllm_keeps(new, old, n_ranks):
    """vLLM's rule, slot after slot: rank r of the new map keeps what rank r of the old one had."""
    out = []
    for row, before in zip(new.tolist(), old.tolist(), strict=True):
        n = len(row) // n_ranks
        placed = []
        for r in range(n_ranks):
            todo, was = row[r * n : (r + 1) * n], before[r * n : (r + 1) * n]
            slots = [None] * n
            for s, expert in enumerate(was):
                if expert in todo:
                    slots[s] = expert
                    todo.remove(expert)
            placed += [todo.pop(0) if s is None else s for s in slots]
        out.append(placed)
    return torch.tensor(out)


def shares_of(phy2log, n_ranks, n_nodes=1):
    """[layers, nodes] multiset of the ranks' multisets of experts."""
    nodes = phy2log.reshape(len(phy2log), n_nodes, n_ranks // n_nodes, -1)
    return [[sorted(sorted(rank) for rank in node) for node in layer] for layer in nodes.tolist()]


def count_kept(new, old):
    shared = min(new.shape[1], old.shape[1])
    return int((new[:, :shared] == old[:, :shared]).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.int32])
@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (4, 2), (3, 2)])
def test_is_our_eplb(dtype, groups, nodes):
    """Without an old map, the policy returns the placement of this library's EPLB."""
    weight = (100 * draw_load(3, 24)).to(dtype).to(DEVICE)
    got = rebalance(weight, 32, groups, nodes, 8)
    assert got.dtype == torch.int64 and got.shape == (3, 32) and got.device.type == "cpu"
    assert torch.equal(got, eplb.rebalance_experts(weight, 32, groups, nodes, 8)[0])
    assert inspect.ismethod(rebalance)


@given(
    seed=st.integers(0, 10**6),
    ranks=st.sampled_from([1, 2, 3, 4]),
    slots=st.integers(1, 7),
    layers=st.integers(1, 4),
)
def test_keeps_as_much_as_any_order_of_ranks_can(seed, ranks, slots, layers):
    """As many slots keep their expert as under the best order of the ranks' shares."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, ranks * slots + 1))
    weight = torch.from_numpy(rng.lognormal(0, 2, (layers, experts)))
    # The old map is anything, several copies on a rank and empty slots included.
    old = torch.from_numpy(rng.integers(-1, experts, (layers, ranks * slots)))
    plain = rebalance(weight, ranks * slots, 1, 1, ranks)
    kept = rebalance(weight, ranks * slots, 1, 1, ranks, old.int())
    assert kept.dtype == torch.int64
    assert shares_of(kept, ranks) == shares_of(plain, ranks)
    by_rank = plain.reshape(layers, ranks, slots)
    orders = [
        vllm_keeps(by_rank[:, list(order)].reshape(plain.shape), old, ranks)
        for order in itertools.permutations(range(ranks))
    ]
    best = torch.stack([(new == old).sum(1) for new in orders]).max(0).values
    assert torch.equal((kept == old).sum(1), best)


def test_shares_stay_on_their_node():
    """Ranks' shares stay on their node, and more slots are kept than by vLLM's own rule."""
    weight, other = draw_load(5, 24), draw_load(5, 24, seed=1)
    old = rebalance(other, 32, 4, 2, 8)
    plain = rebalance(weight, 32, 4, 2, 8)
    kept = rebalance(weight, 32, 4, 2, 8, old)
    assert shares_of(kept, 8, 2) == shares_of(plain, 8, 2)
    assert count_kept(kept, old) > count_kept(vllm_keeps(plain, old, 8), old)


def test_same_load_moves_nothing():
    """An unchanged load returns the old map, whatever the order of its ranks and slots."""
    weight = draw_load(5, 64)
    old = rebalance(weight, 80, 1, 1, 8)
    shuffled = old.reshape(5, 8, 10).flip(-1).roll(3, dims=1).reshape(5, 80)
    assert torch.equal(rebalance(weight, 80, 1, 1, 8, shuffled), shuffled)


@pytest.mark.parametrize(
    ("experts", "slots", "before", "after"),
    [(128, 10, 32, 28), (256, 9, 32, 30), (64, 10, 8, 7), (16, 8, 8, 2), (64, 8, 16, 24)],
)
def test_ranks_leave_or_join(experts, slots, before, after):
    """vLLM: the last ranks leave, and the map before has more slots; joining ranks hold nothing."""
    old = rebalance(draw_load(20, experts), slots * before, 1, 1, before)
    weight = draw_load(20, experts, seed=1)
    plain = rebalance(weight, slots * after, 1, 1, after)
    kept = rebalance(weight, slots * after, 1, 1, after, old)
    assert shares_of(kept, after) == shares_of(plain, after)
    same_size = torch.full_like(plain, -1)
    shared = min(same_size.shape[1], old.shape[1])
    same_size[:, :shared] = old[:, :shared]
    theirs = vllm_keeps(plain, same_size, after)
    assert count_kept(kept, old) > count_kept(theirs, old) > 0
    assert torch.equal(rebalance(weight, slots * after, 1, 1, after, same_size), kept)


def test_other_slots_of_a_rank_bind_nothing(caplog):
    """An old map that is not whole ranks of slots is ignored with a warning."""
    weight = draw_load(2, 16)
    plain = rebalance(weight, 16, 1, 1, 4)
    old = torch.arange(18).remainder(16).expand(2, -1)
    with caplog.at_level(logging.WARNING, "lplb_triton"):
        assert torch.equal(rebalance(weight, 16, 1, 1, 4, old), plain)
    assert [record.name for record in caplog.records] == ["lplb_triton"]
    assert "18 slots, not whole ranks of 4" in caplog.text


BAD_LOADS = [float("nan"), float("inf"), -float("inf"), -1.0]


@pytest.mark.parametrize("bad", [*BAD_LOADS, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_loads_leave_the_old_map(bad, dtype, caplog):
    """Bad loads leave the old map as it is, in a tensor of its own, and are logged."""
    old = rebalance(draw_load(3, 16), 24, 1, 1, 4)
    given = old.clone()
    weight = draw_load(3, 16, seed=1).to(dtype).to(DEVICE)
    weight[1, 5:7] = bad
    got = rebalance(weight, 24, 1, 1, 4, given.int())
    assert torch.equal(got, old) and got.dtype == torch.int64 and got.device.type == "cpu"
    got = rebalance(weight, 24, 1, 1, 4, given)
    got.zero_()
    assert torch.equal(given, old)
    assert {(r.name, r.levelno) for r in caplog.records} == {("lplb_triton", logging.ERROR)}
    assert all(r.getMessage().startswith("weight ") for r in caplog.records)
    assert "the old map stays" in caplog.text


@pytest.mark.parametrize("bad", BAD_LOADS)
def test_bad_loads_without_an_old_map_count_as_zero(bad, caplog):
    """Without an old map, bad loads count as zero, and the log says how many there are."""
    weight = draw_load(3, 16)
    mended = weight.clone()
    weight[1, 5], mended[1, 5] = bad, 0.0
    want = rebalance(mended, 24, 1, 1, 4)
    assert torch.equal(rebalance(weight, 24, 1, 1, 4), want)
    assert "weight holds 1 NaN, infinite or negative loads in 1 of 3 layers" in caplog.text
    assert "count as zero" in caplog.text


@pytest.mark.parametrize("unfit", ["empty slots", "an expert missing", "no such expert", "size"])
def test_bad_loads_and_a_map_that_is_no_placement(unfit, caplog):
    """Bad loads count as zero if the old map is not a placement of these sizes."""
    weight = draw_load(3, 16)
    old = rebalance(weight, 24, 1, 1, 4)
    if unfit == "size":
        old = torch.cat([old, old[:, :6]], dim=1)
    else:
        wrong = {"empty slots": -1, "no such expert": 16, "an expert missing": 0}[unfit]
        old[old == 5] = wrong
    weight[0] = torch.nan
    got = rebalance(weight, 24, 1, 1, 4, old)
    assert got.shape == (3, 24)
    for row in got.tolist():
        assert set(row) == set(range(16))
    assert "count as zero" in caplog.text


def test_loads_too_large_for_float32(caplog):
    """Loads whose sum exceeds float32 are placed as scaled loads are, and are logged."""
    weight = draw_load(2, 16).float()
    weight[1] *= 3e38 / weight[1].max()
    want = rebalance(weight / torch.tensor([[1.0], [64.0]]), 24, 1, 1, 4)
    assert not caplog.records
    assert shares_of(rebalance(weight, 24, 1, 1, 4), 4) == shares_of(want, 4)
    assert "weight adds up to" in caplog.text


def test_negative_integers(caplog):
    """Negative integers count as bad loads, even where their sum wraps around."""
    weight = torch.full((1, 4), -(2**62))
    assert set(rebalance(weight, 6, 1, 1, 2)[0].tolist()) == {0, 1, 2, 3}
    assert "4 NaN, infinite or negative loads" in caplog.text


def test_stands_in_for_the_abstract_class():
    """The policy implements the method of an abstract base class such as vLLM's."""

    class Abstract(abc.ABC):
        @classmethod
        @abc.abstractmethod
        def rebalance_experts(cls, *args):
            raise NotImplementedError

    class Policy(LplbEplbPolicy, Abstract):
        pass

    assert not inspect.isabstract(Policy)
    assert Policy.rebalance_experts(draw_load(1, 4), 6, 1, 1, 2).shape == (1, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 2.0}, "^num_ranks must be an int"),
        ({"num_replicas": 16.0}, "^num_replicas must be an int"),
        ({"num_groups": None}, "^num_groups must be an int"),
        ({"weight": [[1.0]]}, "^weight must be a torch.Tensor"),
        ({"weight": torch.ones(2, 16, dtype=torch.complex64)}, "^weight must have a real dtype"),
        ({"old_global_expert_indices": [0]}, "^old_global_expert_indices must be a torch.Tensor"),
        ({"old_global_expert_indices": torch.zeros(2, 16)}, "^old_global.*must hold integers"),
    ],
)
def test_kinds(change, message):
    """An argument of the wrong type is refused by its name."""
    with pytest.raises(TypeError, match=message):
        rebalance(**(ARGUMENTS | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 5}, "^num_replicas must be a multiple of num_ranks 5, got 16"),
        ({"num_replicas": 12}, "^num_replicas must be at least the number of logical experts 16"),
        ({"num_groups": 3, "num_nodes": 3, "num_ranks": 4}, "^num_ranks must be a multiple of num"),
        ({"num_groups": 6, "num_nodes": 2}, "^num_groups must divide the number of logical"),
        ({"weight": torch.ones(16)}, r"^weight must be \[layers, num_logical\]"),
        ({"weight": torch.ones(0, 16)}, r"^weight must be \[layers, num_logical\]"),
        ({"old_global_expert_indices": torch.arange(16)}, "^old_global_expert_indices must have 2"),
        (
            {"old_global_expert_indices": torch.zeros(3, 16, dtype=torch.int64)},
            "^old_global_expert_indices must have 2 layers",
        ),
    ],
)
def test_sizes(change, message):
    """Also an AssertionError, which is what vLLM's own policy raises and its tests ask for."""
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=message):
            rebalance(**(ARGUMENTS | change))


@pytest.mark.parametrize("name", ["num_ranks", "num_nodes", "num_groups", "num_replicas"])
def test_sizes_from_one(name):
    """Each size below 1 is refused by its name."""
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
        rebalance(**(ARGUMENTS | {name: 0}))


ARGUMENTS = {
    "weight": draw_load(2, 16),
    "num_replicas": 16,
    "num_groups": 1,
    "num_nodes": 1,
    "num_ranks": 4,
}
