"""Placements for plans by time: valid, never judged slower, and arguments that don't fit."""

import numpy as np
import pytest
import torch

from lplb_triton import Placement, TimeCost, chain, place, plan_moves
from lplb_triton.placement.by_time import (
    estimate_weights,
    level_homes,
    predict_times,
    sample_counts,
)
from lplb_triton.placement.home import is_at_home

COST = TimeCost.for_model(7168, 2048)
SMALL = TimeCost.for_model(8, 8, most_active=2)
RANKS, EXPERTS = 8, 32


def draw_history(seed=0, batches=16):
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(0, 1, EXPERTS)
    return torch.from_numpy(mean * rng.lognormal(0, 0.3, (batches, EXPERTS)))


def place_for(rows, **options):
    """Place the drawn history for batches of so many rows a rank."""
    arguments = {"redundant_per_rank": 1, "samples": 6, **options}
    return place(
        draw_history(), RANKS, objective="time", cost=COST, rows_per_rank=rows, **arguments
    )


@pytest.fixture(scope="module")
def few():
    """The placement for four rows a rank."""
    return place_for(4)


def test_valid_and_the_same_again(few):
    """The placement has every expert and the sizes asked for, and is the same in another call."""
    assert (few.n_physical, few.ep_size, few.n_group) == (EXPERTS + RANKS, RANKS, 1)
    assert int(few.logcnt.min()) >= 1
    assert torch.equal(place_for(4).phy2log, few.phy2log)


@pytest.mark.parametrize("rows", [4, 512])
def test_not_judged_slower_than_placements_by_tokens(few, rows):
    """In the batches that decide, no chained placement or one at home is faster."""
    found = few if rows == 4 else place_for(rows)
    load = draw_history().numpy()
    counts = sample_counts(load, rows * RANKS, 6, 0.2, np.random.default_rng(0))
    mean = float(predict_times(found, counts, COST).mean())
    history = draw_history()
    for other in (
        chain(history, RANKS),
        chain(history, RANKS, keep_home=True),
        Placement.from_history(history, RANKS, redundant_per_rank=1, keep_home=True),
    ):
        assert mean <= float(predict_times(other, counts, COST).mean())


def test_few_rows_level_active_experts(few):
    """Unseen small batches are faster than on EPLB's placement."""
    load = draw_history(0, 200).numpy()[16:]
    counts = sample_counts(load, 4 * RANKS, 24, 0.2, np.random.default_rng(1))
    eplb = Placement.from_history(draw_history(), RANKS, redundant_per_rank=1)
    ours, theirs = (float(predict_times(p, counts, COST).mean()) for p in (few, eplb))
    assert ours < 0.97 * theirs


def test_experts_stay_at_home():
    """With keep_home only copies are chosen."""
    assert is_at_home(place_for(4, keep_home=True))


def test_domains_hold_all_copies():
    """With domains, every domain is a group and holds all copies of its experts."""
    found = place_for(4, ranks_per_domain=4)
    assert found.n_group == 2
    domain = np.arange(found.n_physical) // (found.n_physical // 2)
    for expert in range(EXPERTS):
        assert len(set(domain[found.phy2log.numpy() == expert])) == 1


def test_moves_have_a_price():
    """A price above any gain leaves the previous placement, and without one it is left."""
    previous = Placement.from_history(draw_history(), RANKS, redundant_per_rank=1)
    kept = place_for(4, previous=previous, move_penalty=1.0)
    assert torch.equal(kept.phy2log, previous.phy2log)
    free = place_for(4, previous=previous)
    assert plan_moves(previous, free).moved > 0


def test_weights_of_experts_follow_the_cost():
    """An expert weighs as much as it is often active, and further tiles add to that."""
    counts = np.zeros((4, 8), dtype=np.int64)
    counts[:, 0], counts[::2, 1], counts[:, 2] = 5, 5, 500
    weights = estimate_weights(counts, COST, 2)
    assert weights[2] > weights[0] > weights[1] > weights[3] == 0
    assert weights[0] == pytest.approx(2 * weights[1])


def test_levelled_homes_have_equal_numbers():
    """Ranks have equal numbers of experts, and weights as level as pairs allow."""
    weights = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    order = level_homes(weights, 4)
    assert sorted(order) == list(range(8))
    assert weights[order].reshape(4, 2).sum(1).tolist() == [9.0] * 4


def test_samples_are_of_the_size_asked_for():
    """Every sampled batch has all rows, and short histories fluctuate by the dispersion."""
    load = draw_history(0, 2).numpy()
    rng = np.random.default_rng(0)
    counts = sample_counts(load, 10**6, 3, 0.5, rng)
    assert counts.sum(1).tolist() == [10**6] * 3
    ratio = counts / load[0] / (counts / load[0]).sum(1, keepdims=True) * EXPERTS
    assert np.log(ratio).std() > 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "tokens", "cost": COST}, "cost needs objective='time'"),
        ({"objective": "tokens", "rows_per_rank": 3}, "rows_per_rank needs objective='time'"),
        ({"objective": "speed"}, "objective must be one of"),
        ({"objective": "time", "cost": COST}, "needs rows_per_rank"),
        ({"objective": "time", "rows_per_rank": 3}, "needs a cost"),
        ({"objective": "time", "rows_per_rank": 0, "cost": COST}, "rows_per_rank must be"),
        ({"objective": "time", "rows_per_rank": 2**30, "cost": COST}, "must be at most"),
        ({"cost": COST, "ranks_per_node": 2}, "cost needs objective='time'"),
        (
            {"objective": "time", "rows_per_rank": 3, "cost": COST, "ranks_per_node": 2},
            "ranks_per_node needs objective=.tokens.",
        ),
        (
            {"objective": "time", "rows_per_rank": 3, "cost": SMALL},
            "cost must be for at least the 5 slots",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    """Arguments that don't go together are refused by name."""
    with pytest.raises(ValueError, match=message):
        place(draw_history(), RANKS, trials=0, **arguments)


def test_a_history_without_load_is_placed():
    """Without any load, the placement is that by tokens."""
    none = torch.zeros(3, EXPERTS)
    found = place(none, RANKS, objective="time", cost=COST, rows_per_rank=4)
    assert torch.equal(found.phy2log, place(none, RANKS, trials=0).phy2log)
