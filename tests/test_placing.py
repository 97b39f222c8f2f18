"""Placement for the program: validity, determinism, EPLB to beat, cuts against HiGHS, errors."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lplb_triton import Placement, chain, place, plan_moves, solve
from lplb_triton.placement import exact_search as exact
from lplb_triton.placement.cut_search import CutSearch, find_level_cuts
from lplb_triton.placement.exact_search import ExactSearch
from lplb_triton.placement.placing import draw_batches
from lplb_triton.testing.verify import highs_optimum


def fluctuating(batches, experts, seed, spread=0.3):
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(0, 1, experts)
    return torch.from_numpy(1000 * mean * rng.lognormal(0, spread, (batches, experts)))


def optima(placement, history):
    """Optimum of each batch, in mean rank loads."""
    return solve(placement.problem(history)).max_load / history.sum(1) * placement.ep_size


def cut_search(start, load, rng):
    price = np.zeros((start.n_logical, start.ep_size), dtype=np.float32)
    return CutSearch(start, load, price, np.zeros(start.ep_size, dtype=np.int64), rng)


def eplb(history, ep_size, redundant):
    return Placement.from_history(history.mean(0), ep_size, redundant_per_rank=redundant)


@settings(max_examples=12)
@given(
    st.sampled_from([1, 2, 3, 6]),
    st.integers(0, 2),
    st.sampled_from([1, 2, 9]),
    st.integers(0, 2**20),
)
def test_valid_and_never_worse_than_eplb(ep_size, redundant, batches, seed):
    """A placement of `place` has the sizes asked for and a mean optimum not above EPLB's."""
    history = fluctuating(batches, 12, seed, 0.5)
    history[:, 3] = 0
    found = place(history, ep_size, redundant_per_rank=redundant, samples=24, trials=60, seed=seed)
    assert found.n_physical == 12 + redundant * ep_size
    assert found.slots_per_rank == 12 // ep_size + redundant
    assert (found.ep_size, found.n_logical, found.n_group) == (ep_size, 12, 1)
    assert int(found.logcnt.min()) >= 1
    # What counts is relative load, so EPLB gets the mean of that too.
    start = eplb(history / history.sum(1, keepdim=True), ep_size, redundant)
    assert optima(found, history).mean() <= optima(start, history).mean() * (1 + 1e-3)


@pytest.mark.parametrize("ep_size, redundant", [(8, 1), (16, 1)])
def test_halves_the_excess_on_unseen_batches(ep_size, redundant):
    """On batches it has not seen, `place` has less than half of EPLB's excess load."""
    loads = fluctuating(120, 64, 5)
    history, unseen = loads[:60], loads[60:]
    found = place(history, ep_size, redundant_per_rank=redundant, samples=128, trials=800)
    before = optima(eplb(history, ep_size, redundant), unseen).mean() - 1
    after = optima(found, unseen).mean() - 1
    assert before > 0.02
    assert after < before / 2


def test_mean_alone_and_short_histories():
    """A mean or three batches are enough to beat EPLB, and a mean may be one row of a matrix."""
    loads = fluctuating(60, 64, 6)
    before = optima(eplb(loads, 8, 1), loads).mean() - 1
    for history in (loads.mean(0), loads.mean(0, keepdim=True), loads[:3]):
        found = place(history, 8, samples=64, trials=400, dispersion=0.3)
        assert optima(found, loads).mean() - 1 < before
    assert torch.equal(
        place(loads.mean(0), 8, samples=32, trials=50).phy2log,
        place(loads.mean(0, keepdim=True), 8, samples=32, trials=50).phy2log,
    )


def test_same_seed_same_placement():
    """The same seed gives the same placement; global state and the history stay as they are."""
    history = fluctuating(20, 32, 7)
    torch.manual_seed(1)
    first = place(history, 8, samples=32, trials=150, seed=3)
    torch.manual_seed(2)
    np.random.seed(2)
    state = torch.get_rng_state()
    again = place(history, 8, samples=32, trials=150, seed=3)
    assert torch.equal(first.phy2log, again.phy2log)
    assert torch.equal(state, torch.get_rng_state())
    kept = history.clone()
    place(history, 8, samples=32, trials=20)
    assert torch.equal(kept, history)


def test_scale_dtype_and_empty_batches_do_not_matter():
    """Integer, doubled or padded histories give the same placement."""
    history = fluctuating(12, 16, 8).round()
    expected = place(history, 4, samples=32, trials=80).phy2log
    padded = torch.cat([history[:5], torch.zeros(2, 16), history[5:]])
    for same in (history.int(), history * 2, padded):
        assert torch.equal(place(same, 4, samples=32, trials=80).phy2log, expected)


def test_nothing_to_do():
    """Silent or balanced loads get a valid placement, and no trials or one rank give EPLB's."""
    silent = torch.zeros(10, 8)
    assert int(place(silent, 4).logcnt.min()) >= 1
    history = fluctuating(10, 8, 9)
    for found in (place(history, 4, trials=0), place(history, 1)):
        start = eplb(history / history.sum(1, keepdim=True), found.ep_size, 1)
        assert torch.equal(found.phy2log, start.phy2log)
    # Balanced already: the search has nothing to draw from.
    assert place(torch.ones(10, 8), 4).n_physical == 12


def test_bookkeeping_of_the_search():
    """The tables of the search stay those of its placement after many changes."""
    load = draw_batches(fluctuating(20, 24, 10).numpy(), 40, 0.2, 1.0, np.random.default_rng(0))
    load = load / load.sum(1, keepdims=True) * 6
    start = Placement.from_history(torch.from_numpy(load.mean(0)), 6, redundant_per_rank=1)
    search = cut_search(start, load, np.random.default_rng(0))
    for search.trial in range(1, 120):
        search.try_change()
        copies = np.zeros_like(search.copies)
        np.add.at(copies, (search.expert, search.rank), 1)
        assert (copies == search.copies).all()
        assert (copies.sum(1) >= 1).all()
    confined, value_of = search.evaluate_cuts(search.cuts)
    assert (confined == search.confined).all()
    np.testing.assert_allclose(search.value_of, value_of, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(search.value, np.maximum(value_of.max(0), 1), rtol=1e-4)
    assert len({cut.tobytes() for cut in search.cuts}) == len(search.cuts)


def test_cuts_bound_the_optimum_and_reach_it():
    """Cuts bound the optimum from below, and those of solved programs reach it."""
    rng = np.random.default_rng(11)
    load = fluctuating(8, 24, 11, 0.6).float().numpy()
    load = load / load.sum(1, keepdims=True) * 6
    start = Placement.from_history(torch.from_numpy(load.mean(0)), 6, redundant_per_rank=1)
    search = cut_search(start, load, rng)
    exact = np.array(
        [highs_optimum(row, np.zeros(6), np.ascontiguousarray(search.copies.T > 0)) for row in load]
    )
    search.separate_cuts(np.arange(len(load)))
    assert (search.value <= exact * (1 + 1e-5)).all()
    upper = search.solve_batches()
    assert (search.value <= exact * (1 + 1e-5)).all()
    assert (upper >= exact * (1 - 1e-5)).all()
    np.testing.assert_allclose(search.value, exact, rtol=3e-3)


def test_level_cuts_are_the_best_prefix():
    """The cut of a batch is the best among the prefixes of its ranks by load."""
    held = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)
    weight = np.array([[4, 2, 1, 0], [0, 0, 1, 9]], dtype=np.float32)
    loads = np.array([[5.0, 1.5, 0.5], [0.0, 0.5, 9.5]])
    cuts = find_level_cuts(loads, weight, held)
    assert cuts.tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize(
    "error, name, arguments",
    [
        (TypeError, "history", {"history": [[1.0, 2.0]]}),
        (TypeError, "history", {"history": torch.ones(2, 8, dtype=torch.complex64)}),
        (ValueError, "history", {"history": torch.ones(2, 2, 8)}),
        (ValueError, "history", {"history": torch.ones(0, 8)}),
        (ValueError, "history", {"history": torch.tensor([1.0, -1.0])}),
        (ValueError, "history", {"history": torch.tensor([1.0, float("nan")])}),
        (ValueError, "ep_size", {"ep_size": 3}),
        (ValueError, "ep_size", {"ep_size": 0}),
        (TypeError, "ep_size", {"ep_size": 2.0}),
        (ValueError, "redundant_per_rank", {"redundant_per_rank": -1}),
        (TypeError, "redundant_per_rank", {"redundant_per_rank": True}),
        (ValueError, "samples", {"samples": 0}),
        (ValueError, "trials", {"trials": -1}),
        (ValueError, "dispersion", {"dispersion": -0.1}),
        (ValueError, "dispersion", {"dispersion": float("nan")}),
        (TypeError, "dispersion", {"dispersion": "0.2"}),
        (ValueError, "seed", {"seed": -1}),
    ],
)
def test_errors_name_the_argument(error, name, arguments):
    """An error on an argument of `place` contains the argument's name."""
    good = {"history": torch.ones(2, 8), "ep_size": 2}
    with pytest.raises(error, match=name):
        place(**{**good, **arguments})


@pytest.fixture
def few(monkeypatch):
    """Fewer programs a step: the torch twin solves them one by one."""
    for name, value in (("CANDIDATES", 12), ("SCREENING_BATCHES", 12), ("SHORTLIST_SIZE", 2)):
        monkeypatch.setattr(exact, name, value)


def exact_search(history, ep_size, redundant, penalty=0.0, ranks_per_domain=None):
    load = (history / history.sum(1, keepdim=True) * ep_size).float()
    start = chain(
        load.mean(0), ep_size, redundant_per_rank=redundant, ranks_per_domain=ranks_per_domain
    )
    price = torch.full((start.n_logical, ep_size), penalty)
    price[start.phy2log.long(), start.rank_of_slot.long()] = 0
    domain = torch.arange(ep_size) // (ranks_per_domain or ep_size)
    return start, ExactSearch(start, load, price, domain, torch.Generator().manual_seed(0))


def test_exact_search_keeps_its_books_and_lowers_the_optimum(few):
    """The exact search lowers the mean optimum, and its tables match what it returns."""
    history = fluctuating(24, 32, 12, 0.5)
    start, search = exact_search(history, 8, 1)
    torch.testing.assert_close(
        search.optimum.double(), optima(start, history).clamp(min=1), rtol=2e-3, atol=0
    )
    before = float(search.optimum.mean())
    found, excess = search.run(6)
    held = torch.zeros_like(search.copies)
    held.index_put_((search.expert, search.rank), torch.ones(40), accumulate=True)
    assert torch.equal(held, search.copies)
    assert found.n_physical == start.n_physical and int(found.logcnt.min()) >= 1
    assert excess + 1 < before
    assert optima(found, history).mean() == pytest.approx(excess + 1, rel=2e-3)


def test_exact_search_tries_what_it_prices():
    """Changes are applied as encoded, and gain no more than estimated."""
    _, search = exact_search(fluctuating(16, 16, 13, 0.5), 4, 1)
    estimate = search.estimate_changes()
    change = estimate.isfinite().nonzero()[:, 0]
    assert len(change) > 20
    copies = search.apply_changes(change)
    assert torch.equal(copies.sum((1, 2)), torch.full((len(change),), 20.0))
    assert (copies.sum(2) >= 1).all() and (copies >= 0).all()
    slots, experts = search.decode_changes(change)
    for i in range(0, len(change), 7):
        expert = search.expert.clone()
        expert[slots[i]] = experts[i]
        held = torch.zeros_like(search.copies)
        held.index_put_((expert, search.rank), torch.ones(20), accumulate=True)
        assert torch.equal(held, copies[i])
    # The estimate takes one cut of each batch, so no change is better than it says.
    exact = search.score_placements(copies, search.find_optima(copies, search.load))
    gain = search.score_placements(search.copies[None], search.optimum[None]) - exact
    assert (gain <= -estimate[change] * 1.01 + 5e-3).all()


@pytest.mark.parametrize("exact", [False, True])
def test_domains_keep_copies_together(few, exact):
    """Every expert has all its copies in one domain if `ranks_per_domain` is given."""
    history = fluctuating(24, 32, 14, 0.5)
    if exact:
        _, search = exact_search(history, 8, 1, ranks_per_domain=4)
        found, _ = search.run(4)
    else:
        found = place(history, 8, ranks_per_domain=4, samples=32, trials=200)
        assert (found.n_group, found.group_size) == (2, 4)
    domain = found.rank_of_slot // 4
    for expert in range(32):
        assert len(domain[found.phy2log == expert].unique()) == 1


def test_price_keeps_weights_where_they_are():
    """A higher price moves fewer experts, and a small price costs little balance."""
    loads = fluctuating(100, 64, 15)
    drifted = loads * torch.from_numpy(np.random.default_rng(1).lognormal(0, 0.1, 64))
    old = place(loads[:50], 8, samples=64, trials=400)
    free = place(drifted[:50], 8, previous=old, samples=64, trials=400)
    few = place(drifted[:50], 8, previous=old, move_penalty=5e-4, samples=64, trials=400)
    none = place(drifted[:50], 8, previous=old, move_penalty=1.0, samples=64, trials=100)
    rival = plan_moves(eplb(loads[:50], 8, 1), eplb(drifted[:50], 8, 1)).moved
    moved = [plan_moves(old, new).moved for new in (none, few, free)]
    assert moved[0] == 0 and moved == sorted(moved)
    assert moved[1] <= rival / 3
    unseen = drifted[50:]
    assert optima(few, unseen).mean() <= optima(free, unseen).mean() + 0.005


def test_exact_search_prices_moves(few):
    """The exact search changes nothing if every move costs more than it gains."""
    _, search = exact_search(fluctuating(16, 16, 13, 0.5), 4, 1, penalty=10.0)
    kept = search.expert.clone()
    search.run(3)
    assert torch.equal(search.expert, kept)


@pytest.mark.gpu
def test_search_on_a_gpu():
    """The search on a GPU leaves less than half of EPLB's excess load."""
    history = fluctuating(64, 64, 16)
    found = place(history.cuda(), 16, trials=64 * 60)
    before = optima(eplb(history, 16, 1), history).mean() - 1
    assert optima(found, history).mean() - 1 < before / 2


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 3), st.integers(0, 2**20))
def test_chain_is_valid_and_connected(ep_size, redundant, seed):
    """`chain` repeats no expert on a rank, and shared experts connect all ranks."""
    load = fluctuating(1, 32, seed, 1.0)[0]
    if ep_size == 1:
        redundant = 0
    found = chain(load, ep_size, redundant_per_rank=redundant)
    assert found.n_physical == 32 + redundant * ep_size and int(found.logcnt.min()) == 1
    held = torch.zeros(32, ep_size)
    held.index_put_(
        (found.phy2log.long(), found.rank_of_slot.long()),
        torch.ones(found.n_physical),
        accumulate=True,
    )
    assert held.max() == 1
    if redundant:
        linked = (held.T @ held > 0).float()
        assert (torch.linalg.matrix_power(linked, ep_size) > 0).all()


def test_chain_halves_the_excess_of_eplb():
    """The excess load of `chain` is below 0.6 of EPLB's on 32 ranks."""
    loads = fluctuating(60, 256, 17)
    for redundant in (1, 2):
        before = optima(eplb(loads, 32, redundant), loads).mean() - 1
        after = optima(chain(loads.mean(0), 32, redundant_per_rank=redundant), loads).mean() - 1
        assert after < 0.6 * before


def test_chain_with_a_slot_for_every_expert_and_more():
    """With room for every expert each rank holds all, and more slots repeat the heaviest."""
    full = chain(torch.ones(8), 2, redundant_per_rank=4)
    assert full.logcnt.tolist() == [2] * 8
    # What is left over repeats the heaviest on each rank.
    more = chain(torch.arange(8.0), 2, redundant_per_rank=5)
    assert more.logcnt.tolist() == [2] * 7 + [4]
    assert more.structure.copy_multiplicity.max() == 2


@pytest.mark.parametrize(
    "error, name, arguments",
    [
        (TypeError, "previous", {"previous": torch.arange(6)}),
        (ValueError, "previous", {"previous": Placement(np.arange(8), 2)}),
        (ValueError, "move_penalty", {"move_penalty": 1e-3}),
        (TypeError, "move_penalty", {"move_penalty": "much"}),
        (ValueError, "move_penalty", {"move_penalty": -1.0}),
        (ValueError, "ranks_per_domain", {"ranks_per_domain": 3}),
        (
            ValueError,
            "previous",
            {"previous": chain(torch.arange(8.0), 2), "ranks_per_domain": 1},
        ),
    ],
)
def test_more_errors_name_the_argument(error, name, arguments):
    """An error on `previous`, its price or the domains contains the argument's name."""
    good = {"history": torch.ones(2, 8), "ep_size": 2}
    with pytest.raises(error, match=name):
        place(**{**good, **arguments})
