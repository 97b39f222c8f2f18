"""Loads of ranks in whole tokens, and imbalance."""

import numpy as np
import pytest
import torch
from helpers.traces import make_trace

from lplb_triton import Placement, solve, topologies
from lplb_triton.bench import balance
from lplb_triton.bench.measure.simulate import split_tokens


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (torch.full((1, 1, 4), 2.0), TypeError, "counts must hold integers, got torch.float32"),
        (
            torch.full((1, 1, 4), 2**31),
            ValueError,
            r"counts must be in \[0, 2147483647\].*2147483648",
        ),
        (torch.full((1, 1, 4), 2**62), ValueError, "counts must be in"),
        (torch.full((1, 1, 4), -1), ValueError, "counts must be in .* got -1"),
        (np.ones((1, 1, 4), int), TypeError, "counts must be a torch.Tensor, got ndarray"),
    ],
)
def test_counts_that_shares_cannot_carry_are_refused(counts, error, message):
    """Counts that are not integers from 0 to 2**31 - 1 are refused by name."""
    placement = Placement.from_phy2log(torch.tensor([0, 1, 2, 3, 0, 0]), 2)
    solution = solve(placement.problem(torch.ones(1, 4)))
    with pytest.raises(error, match=message):
        balance.compute_token_loads(placement, counts, solution)
    for split in ("lplb", "even"):
        with pytest.raises(error, match=message):
            split_tokens(placement, counts[0, 0], split, 1e-3)


def test_the_largest_counts_are_whole_tokens():
    """What int32 holds is exact: int64 has room for it in units of 2**-24."""
    counts = torch.tensor([[[2**31 - 1, 5, 0, 2**31 - 1]]])
    placement = Placement.from_phy2log(torch.tensor([0, 1, 3, 2, 3, 0]), 2)
    solution = solve(placement.problem(counts[0]), tolerance=1e-6)
    whole = balance.compute_token_loads(placement, counts, solution)
    assert whole.sum() == 2 * (2**31 - 1) + 5
    assert (whole - placement.rank_loads(counts[0], solution)).abs().max() <= 2


def test_integer_loads_are_near_the_plan():
    """Integer loads differ from the plan by less than one token per source and copy."""
    trace = make_trace(batches=6, sources=8)
    counts = torch.from_numpy(trace.counts[:, 0])
    for placement in (
        Placement.from_history(counts.sum((0, 1)).double(), 8, redundant_per_rank=2),
        Placement.from_topology(topologies.ring(4), 40, 32, 8),
    ):
        totals = counts.sum(1)
        solution = solve(placement.problem(totals))
        whole = balance.compute_token_loads(placement, counts, solution)
        assert whole.dtype == torch.int64
        assert whole.shape == (6, 8)
        assert torch.equal(whole.sum(1), totals.sum(1))
        # Each source rounds each copy by less than one token.
        limit = 8 * placement.slots_per_rank
        assert (whole - placement.rank_loads(totals, solution)).abs().max() < limit


def test_integer_loads_without_a_choice():
    """Experts with one copy stay on its rank, and a batch without tokens has no load."""
    counts = torch.tensor([[[3, 1, 0, 5]], [[0, 0, 0, 0]]])
    placement = Placement.from_phy2log(torch.tensor([0, 1, 2, 3, 0, 0]), 2)
    solution = solve(placement.problem(counts.sum(1)))
    whole = balance.compute_token_loads(placement, counts, solution)
    assert whole.sum(1).tolist() == [9, 0]
    # Experts 1 and 2 have one copy, on rank 0; expert 3 is on rank 1.
    assert whole[0, 0] >= 1 and whole[0, 1] >= 5


def test_fold_sources():
    """Sources are summed down to one per rank where the ranks divide them."""
    counts = torch.arange(2 * 6 * 3).reshape(2, 6, 3)
    folded = balance.merge_sources(counts, 3)
    assert torch.equal(folded, counts[:, ::2] + counts[:, 1::2])
    for ep in (4, 6, 12):
        assert balance.merge_sources(counts, ep) is counts


def test_imbalance():
    """Imbalance is the largest load over the mean, and 1 without load."""
    loads = np.array([[1, 3], [2, 2], [0, 0]])
    np.testing.assert_allclose(balance.imbalance(loads), [1.5, 1, 1])
