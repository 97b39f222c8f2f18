"""The published planner of replicas, as it was written anew from its description."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lplb_triton.bench import peers


def test_one_hot_rank_is_levelled_by_hand():
    """Rank 0 gives its largest expert to the emptiest ranks, one slot each."""
    # The mean is 100, and 1.01 times it is the first largest load that is tried.
    counts = np.array([180, 50, 40, 40, 40, 10, 20, 20])
    plan = peers.plan_replicas(counts, 4, 1)
    # Rank 0 has 129 too many: rank 3 takes 61, rank 2 takes 51, rank 1 the last 17 of them.
    assert plan.replicas == ((0, 3, 61), (0, 2, 51), (0, 1, 17))
    assert plan.loads.tolist() == [101, 97, 101, 101]


def test_an_expert_keeps_a_token_at_home():
    """With all tokens at one expert, one stays there and the largest load is an even part."""
    plan = peers.plan_replicas(np.array([400, 0, 0, 0]), 4, 1)
    assert plan.loads.tolist() == [101, 101, 101, 97]
    alone = peers.plan_replicas(np.array([1, 0]), 2, 1)
    assert alone.replicas == () and alone.loads.tolist() == [1, 0]


def test_without_slots_nothing_moves():
    """Loads are those of experts at home."""
    plan = peers.plan_replicas(np.array([5, 1, 1, 1]), 2, 0)
    assert plan.replicas == () and plan.loads.tolist() == [6, 2]


def test_small_replicas_may_be_forbidden():
    """In the search no replica takes less than the fewest tokens that are asked for."""
    # Each of two receivers can take one of rank 0's experts, less the token that stays.
    counts = np.repeat([10, 0, 0], 15)
    for least, largest in ((1, 132), (10, 150)):
        plan = peers.plan_replicas(counts, 3, 1, min_tokens=least)
        assert plan.loads.max() == largest
        assert [replica.tokens for replica in plan.replicas] == [9, 9] * (largest == 132)


@given(
    ep_size=st.sampled_from([2, 4, 8, 16]),
    per_rank=st.integers(1, 8),
    slots=st.integers(0, 3),
    sigma=st.floats(0, 2.5),
    seed=st.integers(0, 2**32 - 1),
)
def test_plans_are_valid(ep_size, per_rank, slots, sigma, seed):
    """Tokens are kept, slots suffice, no expert is twice on a rank, and no sender receives."""
    rng = np.random.default_rng(seed)
    counts = (rng.lognormal(0, sigma, ep_size * per_rank) * 200).astype(np.int64)
    plan = peers.plan_replicas(counts, ep_size, slots)
    home = counts.reshape(ep_size, per_rank).sum(1)
    assert plan.loads.sum() == counts.sum() and plan.loads.max() <= home.max()
    pairs = [(replica.expert, replica.rank) for replica in plan.replicas]
    assert len(set(pairs)) == len(pairs)
    used = np.bincount([rank for _, rank in pairs], minlength=ep_size)
    assert used.max() <= slots
    senders = {expert // per_rank for expert, _ in pairs}
    assert not senders & {rank for _, rank in pairs}
    sent = np.zeros_like(counts)
    for expert, _, tokens in plan.replicas:
        assert tokens >= 1
        sent[expert] += tokens
    assert (sent <= np.maximum(counts - 1, 0)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.array([1.0, 2.0]), 2, 1), "counts"),
        ((np.array([1, -2]), 2, 1), "counts"),
        ((np.array([1, 2, 3]), 2, 1), "ep_size"),
        ((np.array([1, 2]), 0, 1), "ep_size"),
        ((np.array([1, 2]), 2, -1), "slots"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    """What is out of range is refused by name."""
    with pytest.raises(ValueError, match=message):
        peers.plan_replicas(*arguments)
