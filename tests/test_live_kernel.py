"""The kernel that plans live slots gives what its twin gives from the same shares, bit for bit."""

import numpy as np
import pytest
import torch
from helpers.live import assert_same_plan, loads_of, make_placement, plan_both

from lplb_triton import Placement
from lplb_triton._layout import LIVE_UNIT_BITS

pytestmark = pytest.mark.both


def draw_counts(placement, seed, scale=500.0, spread=1.0):
    """Draw lognormal tokens of each expert."""
    drawn = np.random.default_rng(seed).lognormal(0, spread, placement.n_logical)
    return torch.from_numpy(np.floor(drawn * scale)).long()


def check_both(placement, counts, resident=None, **rules):
    """Plan by both and compare; returns the kernel's plan and what lies in live slots after it."""
    kernel, twin, after = plan_both(placement, counts, resident=resident, **rules)
    assert_same_plan(placement, counts, kernel, twin)
    return kernel, after


@pytest.mark.parametrize(
    ("ranks", "experts", "redundant", "live"),
    [
        *((4, 12, redundant, live) for redundant in (0, 1, 2) for live in (1, 2)),
        *((8, 32, redundant, live) for redundant in (0, 1, 2) for live in (1, 2)),
        (40, 80, 1, 2),
    ],
)
def test_plans_of_random_batches(ranks, experts, redundant, live):
    """Kernel and twin agree for placements with and without copies, and slots are filled."""
    placement = make_placement(ranks, experts, live, redundant)
    plan, _ = check_both(placement, draw_counts(placement, ranks, 800.0, 2.0))
    assert plan.n_live > 0


@pytest.mark.parametrize(
    "rules",
    [
        {"live_above": 1.0},
        {"live_above": 1.3},
        {"live_cost": 40},
        {"live_fanout": 1},
        {"live_fanout": 2, "live_domain": 2},
        {"live_domain": 4},
        {"live_domain": 1},
        {"live_cost": 25, "live_fanout": 3, "live_domain": 4},
    ],
    ids=str,
)
def test_plans_by_each_rule(rules):
    """Kernel and twin agree under each rule, with live slots that hold something or nothing."""
    for seed, redundant in ((0, 0), (1, 1)):
        placement = make_placement(8, 32, 2 - redundant, redundant, seed)
        counts = draw_counts(placement, seed)
        resident = None
        if redundant:
            drawn = np.random.default_rng(seed).integers(-1, 32, (8, placement.live_per_rank))
            resident = torch.from_numpy(drawn).int()
        plan, after = check_both(placement, counts, resident, **rules)
        if resident is not None:
            assert torch.equal(after.reshape(-1), plan.words[:-3])
            held = (resident.reshape(-1) >= 0) & (plan.words[:-3] < 0)
            assert not held.any(), "a slot lost what it held"


def test_a_cost_is_the_price_of_a_fetch():
    """Experts are fetched only if the largest load falls by more than the busiest rank pays."""
    placement = make_placement(8, 32, 1)
    counts = draw_counts(placement, 3)
    static = counts.reshape(8, -1).sum(1).max()
    before = None
    for cost in (0, 30, 300, int(static)):
        plan, _ = check_both(placement, counts, live_cost=cost)
        assert before is None or (plan.n_live <= before.n_live and plan.max_load >= before.max_load)
        if plan.n_live:
            homes = plan.words[:-3][plan.words[:-3] >= 0] // 4
            assert plan.max_load + cost * int(homes.bincount().max()) < static
        before = plan
    assert before.n_live == 0


def test_a_cost_in_large_units():
    """A cost is in tokens, whatever units loads are counted in."""
    placement = make_placement(8, 32, 1)
    counts = draw_counts(placement, 3, scale=2e6)
    plan, _ = check_both(placement, counts, live_cost=200_000)
    assert plan.shift > 0 and plan.n_live > 2


def crowd_a_rank():
    """Return a placement of 8 ranks, and counts of which one rank has nearly all."""
    counts = torch.full((32,), 10)
    counts[:4] = 900
    return make_placement(8, 32, 2), counts


def test_no_home_sends_more_than_the_fan_out():
    """From no home rank are more copies fetched than `live_fanout`, and more of them help."""
    placement, counts = crowd_a_rank()
    before = 3600.0
    for fanout in (1, 2, 4, 8):
        plan, _ = check_both(placement, counts, live_fanout=fanout)
        assert 0 < plan.n_live <= fanout and plan.max_load < before
        before = plan.max_load


def test_a_fan_out_is_spent_on_large_amounts():
    """Three copies that may leave a rank take three whole experts of its four with them."""
    placement, counts = crowd_a_rank()
    plan, _ = check_both(placement, counts, live_fanout=3)
    # Four ranks then share 3720 tokens.
    assert plan.max_load <= 960


def test_experts_stay_in_their_domain():
    """With `live_domain`, experts are fetched by ranks of their original's domain only."""
    placement = make_placement(8, 32, 2)
    plan, _ = check_both(placement, draw_counts(placement, 1, spread=2.0), live_domain=2)
    experts = plan.words[:-3].reshape(8, 2)
    ranks = torch.arange(8)[:, None].expand(8, 2)
    filled = experts >= 0
    assert filled.any()
    assert torch.equal(experts[filled] // 4 // 2, ranks[filled] // 2)


def test_loads_of_more_tokens_than_units():
    """With more than 2**20 tokens a rank, plans are made in larger units and lose little by it."""
    for redundant, scale in ((0, 3e5), (1, 6e6)):
        placement = make_placement(8, 32, 1, redundant)
        counts = draw_counts(placement, 5, scale)
        assert float(counts.sum()) / 8 > 1 << LIVE_UNIT_BITS
        plan, _ = check_both(placement, counts)
        assert plan.shift > 0 and plan.n_live > 0
        loads = loads_of(placement, counts, plan)
        assert loads.sum() == int(counts.sum())
        assert loads.max() <= 1.02 * float(counts.sum()) / 8


def test_an_expert_with_more_copies_than_are_handled_at_once():
    """Tokens of an expert with seven static copies move from several of them."""
    # Expert 0 lies on ranks 0 to 6, and with an expert of its own on each.
    slots = np.array([[0, rank + 1] for rank in range(7)] + [[8, 9], [10, 11]]).reshape(-1)
    placement = Placement.from_phy2log(slots, 9).with_live_slots(2)
    counts = torch.tensor([7000, 900, 800, 700, 600, 500, 400, 300, 5, 6, 7, 8])
    plan, _ = check_both(placement, counts)
    experts = plan.words[:-3].tolist()
    assert experts.count(0) >= 2, experts
    lengths = np.diff(plan.copies.start)
    assert lengths[0] == 7 + experts.count(0)


def test_a_rank_that_offers_more_slots_than_registers_hold():
    """A rank gives away twelve whole experts; eight are found at first, then the next ones."""
    ranks, own = 16, 16
    placement = Placement.from_phy2log(torch.arange(ranks * own), ranks).with_live_slots(1)
    counts = torch.zeros(ranks, own, dtype=torch.long)
    counts[0] = torch.arange(100, 100 + own)
    counts[1:, 3] = torch.arange(15)
    plan, _ = check_both(placement, counts.reshape(-1))
    assert plan.n_live >= 12


def test_offers_that_shrink_below_those_to_come():
    """The largest offer is taken also if it isn't among the first eight that were found."""
    ranks, own = 24, 16
    placement = Placement.from_phy2log(torch.arange(ranks * own), ranks).with_live_slots(1)
    counts = torch.zeros(ranks, own, dtype=torch.long)
    counts[0] = torch.arange(100, 100 + own)
    counts[1:, 0] = 90
    counts[1:, 1] = torch.arange(23)
    plan, _ = check_both(placement, counts.reshape(-1), live_above=1.0)
    assert plan.n_live > 8


@pytest.mark.parametrize("live", [1, 2])
def test_batches_that_need_nothing(live):
    """Level batches, and ones without tokens, leave live slots empty and shares as they are."""
    placement = make_placement(8, 32, live)
    for tokens in (0, 1, 100):
        plan, _ = check_both(placement, torch.full((32,), tokens))
        assert plan.n_live == 0 and plan.max_load == 4.0 * tokens
        assert plan.numbers[1] == 4.0 * tokens and plan.numbers[2] == 0.0


def test_live_slots_that_hold_experts_are_used_first():
    """An expert that lies in a live slot costs nothing, and stays there when it isn't needed."""
    placement = make_placement(8, 32, 1)
    counts = torch.full((32,), 100)
    counts[0] = 500
    resident = torch.full((8, 1), -1, dtype=torch.int32)
    resident[2], resident[5] = 0, 31
    # A fetch would cost more than it gains.
    plan, after = check_both(placement, counts, resident, live_cost=10_000)
    assert plan.words[:-3].tolist() == [-1, -1, 0, -1, -1, 31, -1, -1]
    assert plan.max_load < 800 and torch.equal(after.reshape(-1), plan.words[:-3])
    level, after = check_both(placement, torch.full((32,), 100), resident)
    assert torch.equal(after, resident) and level.max_load == 400


@pytest.mark.parametrize(("ranks", "experts"), [(1, 4), (2, 2), (33, 33)])
def test_small_and_odd_sizes(ranks, experts):
    """One rank, one expert a rank, and a rank more than fits a slice."""
    placement = make_placement(ranks, experts, 2)
    plan, _ = check_both(placement, draw_counts(placement, 2, spread=2.0))
    assert (plan.n_live > 0) == (ranks > 1)
