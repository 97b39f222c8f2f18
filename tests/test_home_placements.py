"""Placements that keep every expert on its home rank and choose only redundant slots."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lplb_triton import Placement, chain, place, plan_moves, solve
from lplb_triton.placement.home import choose_home_slots
from lplb_triton.traces import trace as traces


def from_history(load, ranks, **options):
    return Placement.from_history(load, ranks, keep_home=True, **options)


def from_chain(load, ranks, **options):
    return chain(load, ranks, keep_home=True, **options)


def from_search(load, ranks, **options):
    return place(load, ranks, keep_home=True, trials=40, samples=16, **options)


MAKERS = [from_history, from_chain, from_search]


def home_rows(placement):
    n_local = placement.n_logical // placement.ep_size
    return placement.phy2log.reshape(placement.ep_size, -1)[:, :n_local].reshape(-1)


def mean_imbalance(placement, batches):
    """Mean of the LP's optimum over the mean rank load, over batches ``[n, n_logical]``."""
    counts = torch.from_numpy(batches)
    optimum = solve(placement.problem(counts)).max_load.reshape(len(batches), -1).amax(1)
    return float((optimum / (counts.sum(1) / placement.ep_size)).mean())


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=25)
@given(data=st.data())
def test_experts_stay_at_home(make, data):
    """The first slots of every rank hold its own experts, in order, whatever the loads."""
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    n_logical = ranks * data.draw(st.integers(1, 4))
    redundant = data.draw(st.integers(0, 3))
    load = data.draw(
        st.lists(st.sampled_from([0.0, 1.0, 3.0, 1e30]), min_size=n_logical, max_size=n_logical)
    )
    placement = make(torch.tensor(load), ranks, redundant_per_rank=redundant)
    assert home_rows(placement).tolist() == list(range(n_logical))
    for held in placement.phy2log.reshape(ranks, -1).tolist():
        everything = len(set(held)) == n_logical
        assert len(set(held)) == len(held) or everything, "repeated though another was lacking"


@pytest.mark.parametrize("make", [from_chain, from_search])
def test_copies_stay_in_their_domain(make):
    """With domains, all copies of an expert lie in the domain of its home rank."""
    load = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, 32))
    placement = make(load, 8, redundant_per_rank=2, ranks_per_domain=4)
    assert placement.n_group == 2
    assert home_rows(placement).tolist() == list(range(32))
    domain = placement.rank_of_slot.long() // 4
    assert (domain == placement.phy2log.long() // 16).all()


def test_another_placement_moves_nothing_but_copies():
    """Between two placements at home only redundant slots change."""
    rng = np.random.default_rng(1)
    one, other = (
        from_chain(torch.from_numpy(rng.lognormal(0, 1, 64)), 16, redundant_per_rank=2)
        for _ in range(2)
    )
    assert one != other
    assert all(slot % one.slots_per_rank >= 4 for slot in plan_moves(one, other).target.tolist())


def test_hot_experts_get_copies_on_empty_ranks():
    """Copies go to the hottest expert first, and lie where load is lacking."""
    slots = choose_home_slots(np.array([8.0, 1, 1, 1, 1, 1, 0, 0]), 4, 1, spread_out=False)
    assert slots[3].tolist() == [6, 7, 0]
    assert (slots[1:, 2] == 0).all() and slots[0, 2] != 0


@pytest.mark.parametrize("ranks", [8, 16, 32, 64])
def test_no_worse_than_eplb_on_the_packaged_trace(ranks):
    """On real loads the LP's optimum of either placement at home is below that of EPLB's."""
    totals = traces.packaged().totals().astype(np.float64)
    half = len(totals) // 2
    found = {"eplb": [], "history": [], "chain": []}
    for layer in range(totals.shape[1]):
        history = torch.from_numpy(totals[:half, layer].mean(0))
        batches = totals[half::10, layer]
        for redundant in (1, 2):
            options = {"redundant_per_rank": redundant}
            eplb = Placement.from_history(history, ranks, **options)
            found["eplb"].append(mean_imbalance(eplb, batches))
            found["history"].append(
                mean_imbalance(from_history(history, ranks, **options), batches)
            )
            found["chain"].append(mean_imbalance(from_chain(history, ranks, **options), batches))
    assert np.mean(found["history"]) <= np.mean(found["eplb"])
    assert np.mean(found["chain"]) <= np.mean(found["eplb"])


def test_search_improves_its_start():
    """`place` at home is no worse than the placement that it starts from."""
    totals = traces.packaged().totals()[:100, 0].astype(np.float64)
    history = torch.from_numpy(totals)
    start = place(history, 32, redundant_per_rank=2, keep_home=True, trials=0)
    found = place(history, 32, redundant_per_rank=2, keep_home=True, trials=200, samples=64)
    assert mean_imbalance(found, totals) <= mean_imbalance(start, totals) + 1.5e-3
    assert home_rows(found).tolist() == list(range(256))


def test_previous_at_home_keeps_its_slots():
    """A search from a placement at home with a price on moves leaves it as it is."""
    history = torch.from_numpy(np.random.default_rng(2).lognormal(0, 1, (16, 32)))
    previous = from_chain(history.mean(0), 8)
    again = place(history, 8, previous=previous, move_penalty=10.0, keep_home=True, trials=30)
    assert again == previous


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda w: Placement.from_history(w, 4, keep_home=1),
            TypeError,
            "keep_home must be a bool",
        ),
        (lambda w: chain(w, 4, keep_home=None), TypeError, "keep_home must be a bool"),
        (lambda w: place(w, 4, keep_home="yes"), TypeError, "keep_home must be a bool"),
        (
            lambda w: Placement.from_history(w, 4, keep_home=True, num_groups=2),
            ValueError,
            "num_groups must be 1",
        ),
        (lambda w: Placement.from_history(w, 3, keep_home=True), ValueError, "ep_size must divide"),
        (
            lambda w: place(w, 4, previous=chain(w, 4), keep_home=True),
            ValueError,
            "previous must have every expert at home",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    """An argument that does not go with experts at home is refused by its name."""
    load = torch.tensor([5.0, 1, 1, 1, 9, 1, 1, 1])
    with pytest.raises(error, match=message):
        call(load)
