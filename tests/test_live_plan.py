"""The plan of live slots: what holds for every plan, and how near it comes to the best one."""

import numpy as np
import pytest
from helpers.live_cases import at_home, draw_batch, draw_counts, split_tokens
from helpers.live_optimum import find_live_optimum
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lplb_triton.bench.workloads import ADVERSARIAL, WORKLOADS, Settings, draw
from lplb_triton.reference.live import LiveCase, choose_unit_shift, find_live_bound
from lplb_triton.traces import trace as traces

KINDS = ("home", "chain", "eplb")

batches = st.builds(
    draw_batch,
    kind=st.sampled_from(KINDS),
    ep_size=st.sampled_from([2, 4, 8]),
    n_experts=st.sampled_from([16, 32]),
    sigma=st.floats(0, 2),
    # Shares are in units of 2**-24, which is exact for so many tokens of an expert.
    tokens=st.sampled_from([40, 2000, 10**6, 2**24]),
    seed=st.integers(0, 10**6),
)
lives = st.sampled_from([1, 2])


def find_loads(batch, outcome):
    """Tokens of each rank under a plan, by its shares."""
    tokens = split_tokens(batch.counts, outcome.cumulative, outcome.copies)
    return np.bincount(outcome.copies.rank, tokens, batch.ep_size).astype(np.int64)


def find_home(batch, expert):
    """Rank of an expert's original, for experts at home."""
    return expert // (len(batch.counts) // batch.ep_size)


def count_port(batch, pieces, resident=None):
    """Fetched experts at the busiest port: copies that leave a home rank or reach a rank."""
    sent, received = np.zeros((2, batch.ep_size), dtype=np.int64)
    for piece in pieces:
        if resident is None or piece.expert not in resident[piece.rank]:
            sent[find_home(batch, piece.expert)] += 1
            received[piece.rank] += 1
    return int(max(sent.max(), received.max()))


@settings(max_examples=150)
@given(batch=batches, live=lives)
def test_shares_give_what_the_pieces_say(batch, live):
    """The counts by copy over all ranks are the static ones less the pieces, and the pieces."""
    outcome = batch.plan(live)
    copies, before = outcome.copies, batch.tokens()
    after = split_tokens(batch.counts, outcome.cumulative, copies)
    n_slots = int(batch.copies.place.max()) + 1
    expert = np.repeat(np.arange(len(batch.counts)), np.diff(copies.start))
    live_copy = copies.place >= n_slots
    expected = before.copy()
    for piece in outcome.pieces:
        expected[piece.copy] -= piece.tokens
    assert after[~live_copy].tolist() == expected.tolist() and expected.min() >= 0
    found = zip(expert, copies.rank, copies.place - n_slots, after, strict=True)
    pieces = [(p.expert, p.rank, p.slot, p.tokens) for p in outcome.pieces]
    assert [row for row, on in zip(found, live_copy, strict=True) if on] == sorted(pieces)
    sums = np.add.reduceat(after, copies.start[:-1])
    assert sums.tolist() == batch.counts.tolist()


@settings(max_examples=150)
@given(batch=batches, live=lives)
def test_slots_hold_each_expert_once(batch, live):
    """Every live slot holds what its one piece says, and no rank holds an expert twice."""
    outcome = batch.plan(live)
    expected = np.full((batch.ep_size, live), -1)
    for piece in outcome.pieces:
        assert expected[piece.rank, piece.slot] == -1
        expected[piece.rank, piece.slot] = piece.expert
        own = slice(*batch.copies.start[piece.expert : piece.expert + 2])
        assert piece.rank not in batch.copies.rank[own]
        assert own.start <= piece.copy < own.stop and piece.tokens > 0
    assert outcome.experts.tolist() == expected.tolist()
    held = [(piece.expert, piece.rank) for piece in outcome.pieces]
    assert len(set(held)) == len(held)


@settings(max_examples=150)
@given(batch=batches, live=lives, above=st.sampled_from([1.0, 1.02, 1.2]))
def test_never_worse_than_the_static_plan(batch, live, above):
    """A plan with pieces has a smaller largest load, which it reports; others change nothing.

    Loads of more than 2**20 tokens are planned in units of several tokens.
    """
    outcome = batch.plan(live, above)
    before, after = batch.loads(), find_loads(batch, outcome)
    assert after.sum() == before.sum()
    if outcome.pieces:
        n_slots = int(batch.copies.place.max()) + 1
        unit = 1 << choose_unit_shift(batch.max_load, n_slots, batch.ep_size)
        # Each slot's tokens are rounded down to units.
        rounding = (unit - 1) * n_slots
        assert after.max() < before.max() + rounding
        assert after.max() - rounding <= outcome.max_load <= after.max()
    else:
        assert after.tolist() == before.tolist() and outcome.max_load == batch.max_load
        assert outcome.cumulative.tolist() == batch.cumulative.tolist()
    assert 0 <= outcome.bound <= outcome.max_load and 0 <= outcome.gap <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_level_loads_need_no_plan(kind):
    """Where the largest load is at most ``above`` times the mean, nothing is fetched."""
    for seed in range(5):
        batch = draw_batch(kind, 8, 32, 0.5, 10**5, seed)
        ratio = batch.max_load / batch.counts.sum() * 8
        assert ratio > 1 and batch.plan(1, above=ratio * 1.001).pieces == []
    empty = at_home(np.zeros(16, dtype=np.int64), 4).plan(1)
    assert empty.pieces == [] and (empty.max_load, empty.bound, empty.gap) == (0, 0, 0)


@settings(max_examples=60)
@given(
    ep_size=st.sampled_from([4, 8]),
    live=lives,
    sigma=st.floats(0.3, 2),
    seed=st.integers(0, 10**6),
    order=st.randoms(use_true_random=False),
)
def test_ranks_may_be_renumbered(ep_size, live, sigma, seed, order):
    """With other numbers for the ranks, and no ties, the same experts go to the same ranks."""
    counts = draw_counts(4 * ep_size, sigma, 2**20, seed)
    loads = counts.reshape(ep_size, 4)
    # Ties go to ranks by their numbers.
    assume(len(set(loads.sum(1).tolist())) == ep_size)
    number = list(range(ep_size))
    order.shuffle(number)
    first = at_home(counts, ep_size)
    second = at_home(loads[number].reshape(-1), ep_size)
    one, two = first.plan(live), second.plan(live)
    assert sorted(find_loads(first, one)) == sorted(find_loads(second, two))
    mapped = [
        (number[p.expert // 4] * 4 + p.expert % 4, number[p.rank], p.tokens) for p in two.pieces
    ]
    assert [(p.expert, p.rank, p.tokens) for p in one.pieces] == mapped
    assert one.bound == two.bound


@settings(max_examples=100)
@given(
    ep_size=st.sampled_from([4, 8]),
    live=lives,
    sigma=st.floats(0.5, 2),
    seed=st.integers(0, 10**6),
    cost=st.integers(0, 30000),
)
def test_a_fetch_is_worth_its_cost(ep_size, live, sigma, seed, cost):
    """Largest load and cost are together no more than with fewer of the pieces, or none."""
    batch = at_home(draw_counts(32, sigma, 2**18, seed), ep_size)
    outcome = batch.plan(live, cost=cost)
    loads = batch.loads()
    prices = [int(loads.max())]
    for n, piece in enumerate(outcome.pieces, 1):
        loads[find_home(batch, piece.expert)] -= piece.tokens
        loads[piece.rank] += piece.tokens
        prices.append(int(loads.max()) + cost * count_port(batch, outcome.pieces[:n]))
    assert prices[-1] == min(prices)


def test_high_costs_forbid_fetching():
    """At a cost of all the tokens nothing is fetched, and at none it is."""
    batch = at_home(draw_counts(32, 1.5, 10**5, 0), 8)
    assert batch.plan(1, cost=int(batch.counts.sum())).pieces == []
    assert len(batch.plan(1, cost=0).pieces) >= 4


@settings(max_examples=60)
@given(
    live=lives,
    sigma=st.floats(0.5, 2),
    seed=st.integers(0, 10**6),
    fanout=st.integers(1, 4),
    domain=st.sampled_from([0, 2, 4]),
)
def test_limits_are_kept(live, sigma, seed, fanout, domain):
    """No home rank sends more copies than allowed, and none leaves its domain."""
    batch = at_home(draw_counts(32, sigma, 2**18, seed), 8)
    outcome = batch.plan(live, fanout=fanout, domain=domain)
    homes = [find_home(batch, piece.expert) for piece in outcome.pieces]
    assert max(np.bincount(homes, minlength=8)) <= fanout
    if domain:
        assert all(
            home // domain == piece.rank // domain
            for home, piece in zip(homes, outcome.pieces, strict=True)
        )


def test_limits_that_bind_cost_balance():
    """A hot rank's copies stop at the limit and at its domain, and the load stays higher."""
    counts = np.full(32, 100, dtype=np.int64)
    counts[:4] = 1000
    batch = at_home(counts, 8)
    free, narrow, near = (batch.plan(1, **rules) for rules in ({}, {"fanout": 2}, {"domain": 2}))
    assert free.max_load < narrow.max_load and free.max_load < near.max_load < 4000
    assert len(narrow.pieces) == 2 and [piece.rank for piece in near.pieces] == [1]


@settings(max_examples=100)
@given(
    live=lives,
    sigma=st.floats(0.5, 2),
    seed=st.integers(0, 10**6),
    cost=st.sampled_from([0, 3000]),
    fanout=st.sampled_from([0, 1]),
)
def test_what_lies_in_slots_is_free(live, sigma, seed, cost, fanout):
    """Limits and cost count only what a slot did not hold; unused slots keep what they hold."""
    rng = np.random.default_rng(seed)
    batch = at_home(draw_counts(32, sigma, 2**18, seed), 8)
    resident = np.stack(
        [
            rng.choice([e for e in range(32) if find_home(batch, e) != r], live, replace=False)
            for r in range(8)
        ]
    )
    resident[rng.random(resident.shape) < 0.3] = -1
    given_slots = resident.copy()
    outcome = batch.plan(live, resident=resident, cost=cost, fanout=fanout)
    assert resident.tolist() == given_slots.tolist()
    expected, moved = resident.copy(), []
    for piece in outcome.pieces:
        if resident[piece.rank, piece.slot] != piece.expert:
            moved.append(piece)
        expected[piece.rank, piece.slot] = piece.expert
    assert outcome.experts.tolist() == expected.tolist()
    for row in outcome.experts:
        kept = row[row >= 0].tolist()
        assert len(set(kept)) == len(kept)
    sent = np.bincount([find_home(batch, piece.expert) for piece in moved], minlength=8)
    assert not fanout or sent.max() <= fanout
    before = int(batch.loads().max())
    port = count_port(batch, moved)
    assert find_loads(batch, outcome).max() + cost * port <= before


def test_the_same_batch_again_fetches_nothing():
    """With what the first plan fetched in the slots, a cost that forbids fetching does no harm."""
    batch = at_home(draw_counts(64, 1.0, 2**18, 5), 8)
    first = batch.plan(2)
    again = batch.plan(2, resident=first.experts, cost=2**18)
    assert first.pieces and again.pieces
    for piece in again.pieces:
        assert first.experts[piece.rank, piece.slot] == piece.expert
    assert find_loads(batch, again).max() < 1.1 * batch.counts.sum() / 8 < batch.max_load


def draw_cases(ep_size):
    """Loads of 32 and 64 experts: every workload, and the packaged trace with four as one."""
    recorded = traces.packaged().totals()
    for layer in range(recorded.shape[1]):
        yield from recorded[::16, layer].reshape(-1, 64, 4).sum(2)
    for name in WORKLOADS:
        if name == ADVERSARIAL:
            continue
        for experts in (32, 64):
            for seed in range(6):
                test = draw(name, Settings(ep_size, experts, 4, seed=seed)).test
                yield from test.sum(1).numpy()


def is_near(batch, outcome, live):
    """Say whether a plan is within 1% (and a token) of the best, which HiGHS finds if need be."""
    mean = batch.counts.sum() / batch.ep_size
    if outcome.max_load <= 1.01 * mean + 1:
        return True
    best = find_live_optimum(batch.counts, batch.ep_size, live)
    assert outcome.max_load >= best.proved * (1 - 1e-9)
    # Whole tokens can't be below the next whole number.
    assert outcome.bound <= np.ceil(best.reached * (1 + 1e-9))
    return outcome.max_load <= 1.01 * best.reached + 1


@pytest.mark.parametrize(("live", "least"), [(1, 0.9), (2, 0.99)])
def test_most_plans_are_near_the_best(live, least):
    """On 8 ranks, plans are within 1% of the optimum by HiGHS in most of the cases."""
    batches = [at_home(counts, 8) for counts in draw_cases(8)]
    hard = [b for b in batches if b.max_load > 1.02 * b.counts.sum() / 8]
    near = [is_near(batch, batch.plan(live), live) for batch in hard]
    assert len(near) > 400 and np.mean(near) >= least


@settings(max_examples=30)
@given(
    ep_size=st.sampled_from([4, 5, 8]),
    live=lives,
    sigma=st.floats(1, 3),
    tokens=st.sampled_from([200, 2**18]),
    seed=st.integers(0, 10**6),
)
def test_the_bound_is_below_the_optimum(ep_size, live, sigma, tokens, seed):
    """No bound, be it of the plan or of sets of ranks alone, is above what HiGHS reaches."""
    counts = draw_counts(4 * ep_size, sigma, tokens, seed)
    batch = at_home(counts, ep_size)
    best = find_live_optimum(counts, ep_size, live, gap=1e-6)
    of_sets = find_live_bound(LiveCase(ep_size, live, 1.0), counts, batch.copies, batch.loads())
    most = np.ceil(best.reached * (1 + 1e-9))
    outcome = batch.plan(live, above=1.0)
    assert of_sets <= most and outcome.bound <= most
    assert best.proved * (1 - 1e-9) <= find_loads(batch, outcome).max()


def test_a_hot_rank_has_a_bound_above_the_mean():
    """Seven ranks with a slot each can't take enough of 16 equal experts of a rank."""
    counts = np.ones(128, dtype=np.int64)
    counts[:16] = 1000
    batch = at_home(counts, 8)
    # Seven experts may leave; nine thousand tokens stay.
    bound = find_live_bound(LiveCase(8, 1, 1.02), counts, batch.copies, batch.loads())
    best = find_live_optimum(counts, 8, 1)
    outcome = batch.plan(1)
    assert 0.99 * 9000 <= bound <= 9000 == round(best.reached)
    assert outcome.max_load == 9000 and outcome.gap <= 0.01
