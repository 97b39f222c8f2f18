"""Placement for the program: validity, determinism, EPLB to beat, cuts against HiGHS, errors."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lplb_triton import Placement, solve
from lplb_triton._cut_search import CutSearch, _level_cuts
from lplb_triton.bench.verify import highs_optimum
from lplb_triton.placing import _scenarios, place


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
    loads = fluctuating(120, 64, 5)
    history, unseen = loads[:60], loads[60:]
    found = place(history, ep_size, redundant_per_rank=redundant, samples=128, trials=800)
    before = optima(eplb(history, ep_size, redundant), unseen).mean() - 1
    after = optima(found, unseen).mean() - 1
    assert before > 0.02
    assert after < before / 2


def test_mean_alone_and_short_histories():
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
    history = fluctuating(12, 16, 8).round()
    expected = place(history, 4, samples=32, trials=80).phy2log
    padded = torch.cat([history[:5], torch.zeros(2, 16), history[5:]])
    for same in (history.int(), history * 2, padded):
        assert torch.equal(place(same, 4, samples=32, trials=80).phy2log, expected)


def test_nothing_to_do():
    silent = torch.zeros(10, 8)
    assert int(place(silent, 4).logcnt.min()) >= 1
    history = fluctuating(10, 8, 9)
    for found in (place(history, 4, trials=0), place(history, 1)):
        start = eplb(history / history.sum(1, keepdim=True), found.ep_size, 1)
        assert torch.equal(found.phy2log, start.phy2log)
    # Balanced already: the search has nothing to draw from.
    assert place(torch.ones(10, 8), 4).n_physical == 12


def test_bookkeeping_of_the_search():
    load = _scenarios(fluctuating(20, 24, 10).numpy(), 40, 0.2, 1.0, np.random.default_rng(0))
    load = load / load.sum(1, keepdims=True) * 6
    start = Placement.from_history(torch.from_numpy(load.mean(0)), 6, redundant_per_rank=1)
    search = cut_search(start, load, np.random.default_rng(0))
    for search.trial in range(1, 120):
        search.step()
        copies = np.zeros_like(search.copies)
        np.add.at(copies, (search.expert, search.rank), 1)
        assert (copies == search.copies).all()
        assert (copies.sum(1) >= 1).all()
    confined, value_of = search.measure(search.cuts)
    assert (confined == search.confined).all()
    np.testing.assert_allclose(search.value_of, value_of, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(search.value, np.maximum(value_of.max(0), 1), rtol=1e-4)
    assert len({cut.tobytes() for cut in search.cuts}) == len(search.cuts)


def test_cuts_bound_the_optimum_and_reach_it():
    rng = np.random.default_rng(11)
    load = fluctuating(8, 24, 11, 0.6).float().numpy()
    load = load / load.sum(1, keepdims=True) * 6
    start = Placement.from_history(torch.from_numpy(load.mean(0)), 6, redundant_per_rank=1)
    search = cut_search(start, load, rng)
    exact = np.array(
        [highs_optimum(row, np.zeros(6), np.ascontiguousarray(search.copies.T > 0)) for row in load]
    )
    search.separate(np.arange(len(load)))
    assert (search.value <= exact * (1 + 1e-5)).all()
    upper = search.certify()
    assert (search.value <= exact * (1 + 1e-5)).all()
    assert (upper >= exact * (1 - 1e-5)).all()
    np.testing.assert_allclose(search.value, exact, rtol=3e-3)


def test_level_cuts_are_the_best_prefix():
    held = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)
    weight = np.array([[4, 2, 1, 0], [0, 0, 1, 9]], dtype=np.float32)
    loads = np.array([[5.0, 1.5, 0.5], [0.0, 0.5, 9.5]])
    cuts = _level_cuts(loads, weight, held)
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
    good = {"history": torch.ones(2, 8), "ep_size": 2}
    with pytest.raises(error, match=name):
        place(**{**good, **arguments})
