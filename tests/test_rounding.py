"""Shares in whole units: exact sums, no copy off by a unit, no plan worse than an even split."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from lplb_triton import Balancer, Placement, Problem, Status, reference, solve
from lplb_triton.testing.verify import highs_optimum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
ONE = 1 << 24


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 300), st.sampled_from([0.0, 0.1, 3.0]))
@example(0, 194, 0.0)
@example(0, 27, 0.0)
def test_every_share_is_off_by_less_than_a_unit(seed, copies, spread):
    """Rounded shares sum up to one, and each is off by less than a unit."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(np.arange(2 * copies) % 2 == 1).reshape(-1, 1)
    exact = torch.zeros(2 * copies, 1, dtype=torch.float64)
    exact[mask] = torch.from_numpy(rng.lognormal(0, spread, copies))
    exact /= exact.sum()
    units = reference.quantize_shares(exact, mask)
    assert int(units.sum()) == ONE and bool((units >= 0).all()) and bool((units[~mask] == 0).all())
    assert float((units - exact * ONE).abs().max()) < 1 + 1e-3


def on_all_ranks(ranks):
    """One expert with a copy on every rank, and one on each rank alone."""
    slots = np.stack([np.zeros(ranks, dtype=np.int64), np.arange(1, ranks + 1)], axis=1)
    return Placement.from_phy2log(slots.reshape(-1), ranks)


def solutions(placement, counts, backend, tolerance=1e-3):
    """What `solve` and `Balancer.solve` make of counts."""
    there = counts.to(DEVICE)
    if backend == "torch" or placement.group_size <= 128:
        yield solve(placement.problem(there), tolerance=tolerance, backend=backend)
    yield Balancer(placement, device=DEVICE, backend=backend, tolerance=tolerance).solve(there)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ranks", "tolerance"), [(27, 1e-5), (37, 1e-5), (53, 1e-5), (101, 1e-4), (194, 1e-3)]
)
def test_an_expert_on_very_many_ranks_is_split_evenly(backend, ranks, tolerance):
    """A lone expert's shares differ by at most a unit, even over 194 ranks."""
    placement = on_all_ranks(ranks)
    counts = torch.zeros(ranks + 1, dtype=torch.int32)
    counts[0] = 100_003
    for solution in solutions(placement, counts, backend, tolerance):
        assert solution.status.tolist() == [Status.CERTIFIED]
        units = solution.shares.double()[0, :, 0] * ONE
        assert float(units.sum()) == ONE
        assert float(units.max() - units.min()) <= 1


def test_rounding_a_plan_with_many_copies_keeps_its_certificate():
    """Rounded plans of up to 116 copies are certified to 1.5e-5."""
    rng = np.random.default_rng(0)
    ranks, columns = 128, 20
    copies = 2 + 6 * np.arange(columns)
    mask = np.zeros((1, ranks, columns), dtype=np.bool_)
    for column, n in enumerate(copies):
        mask[0, rng.choice(ranks, n, replace=False), column] = True
    weights = np.floor(rng.lognormal(0, 1.5, (24, columns)) * 1e5 * copies)
    fixed = np.floor(rng.lognormal(0, 0.2, (24, ranks)) * 1e5)
    problem = Problem(*map(torch.from_numpy, (weights, fixed, mask)))
    for tolerance in (1e-4, 1.5e-5):
        solution = solve(problem, tolerance=tolerance, backend="torch")
        assert solution.status.tolist() == [Status.CERTIFIED] * 24
        assert (solution.shares.double().sum(1) == 1).all()


def random_copies(rng, ranks, slots):
    """Any slot map, often with several copies of an expert on a rank."""
    n_logical = int(rng.integers(1, ranks * slots))
    extra = rng.integers(n_logical, size=ranks * slots - n_logical)
    flat = rng.permutation(np.concatenate([np.arange(n_logical), extra]))
    return Placement.from_phy2log(flat, ranks, n_logical=n_logical)


def even_over_ranks(placement, counts):
    """Rank loads if every column is split evenly over its ranks."""
    problem = placement.problem(counts)
    even = problem.mask / problem.mask.sum(1, keepdim=True).clamp(min=1)
    return problem.fixed + (problem.weights.unsqueeze(1) * even).sum(2)


@pytest.mark.parametrize(("backend", "examples"), [("torch", 120), ("triton", 25)])
def test_no_plan_is_worse_than_an_even_split(backend, examples):
    """No plan is above the even split, nor above the optimum by more than the tolerance."""

    @settings(max_examples=examples)
    @given(
        st.integers(0, 10**6),
        st.integers(2, 8),
        st.integers(2, 5),
        st.sampled_from([0.0, 0.0005, 0.01, 1.0]),
    )
    @example(3, 3, 4, 0.0)
    def check(seed, ranks, slots, spread):
        rng = np.random.default_rng(seed)
        placement = random_copies(rng, ranks, slots)
        copies = placement.logcnt.numpy()
        drawn = np.floor(1000 * copies * rng.lognormal(0, spread, placement.n_logical))
        counts = torch.from_numpy(drawn.astype(np.int32))
        even = min(
            float(placement.even_loads(counts).max()),
            float(even_over_ranks(placement, counts).max()),
        )
        problem = placement.problem(counts)
        optimum = highs_optimum(
            *(t[0].numpy() for t in (problem.weights, problem.fixed, problem.mask))
        )
        for solution in solutions(placement, counts, backend):
            solution.check()
            loads = placement.rank_loads(counts.to(DEVICE), solution)
            # A column's rank is off by less than a unit of the column.
            assert float(loads.max()) <= even * (1 + ranks / ONE + 1e-9)
            assert optimum * (1 - 1e-9) <= float(loads.max()) <= optimum * (1 + 1e-3)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_is_kept_where_nothing_is_better(backend):
    """A start that is optimal is the answer without a single step."""
    # Of two ranks one has the tokens' copy twice: both even splits are far from equal loads.
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    weights, fixed = torch.tensor([[4.0]]), torch.tensor([[1.0, 3.0]])
    start = torch.tensor([[[0.75], [0.25]]])
    solution = solve(Problem(weights, fixed, mask, start).to(DEVICE), backend=backend)
    assert solution.iterations.tolist() == [0] and float(solution.max_load[0]) == 4.0
    assert torch.equal(solution.shares.cpu(), start)
    without = solve(Problem(weights, fixed, mask).to(DEVICE), backend=backend)
    assert int(without.iterations[0]) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_copies_on_a_rank_divide_its_share(backend):
    """Copies of an expert on one rank have shares that differ by at most a unit."""
    placement = Placement.from_phy2log([0, 0, 0, 1, 0, 2, 0, 3], 2, n_logical=4)
    counts = torch.tensor([1000, 3, 7, 11], dtype=torch.int32)
    balancer = Balancer(placement, device=DEVICE, backend=backend)
    solution = balancer.solve(counts.to(DEVICE))
    ends = balancer.cumulative_shares(solution.shares).cpu().tolist()
    units = [end - begin for begin, end in zip([0, *ends[:4]], ends[:5], strict=True)]
    first = float(solution.shares.double()[0, 0, 0]) * ONE
    assert ends[4] == ONE and sum(units[:3]) == first
    assert max(units[:3]) - min(units[:3]) <= 1 and max(units[3:]) - min(units[3:]) <= 1


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ([1.0], TypeError, "start must be a torch.Tensor, got list"),
        (torch.ones(1, 2), ValueError, r"start must have 3 dimensions, got \(1, 2\)"),
        (torch.ones(1, 2, 2), ValueError, r"start must have shape \[1, 2, 1\], got \(1, 2, 2\)"),
        (torch.ones(1, 2, 1).int(), TypeError, "start must be floating-point, got torch.int32"),
        (-torch.ones(1, 2, 1), ValueError, "start must be finite and non-negative"),
    ],
)
def test_starts_that_are_none(start, error, message):
    """A start of a wrong type, shape, dtype or sign is refused by name."""
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    with pytest.raises(error, match=f"^{message}$"):
        Problem(torch.ones(1, 1), torch.ones(1, 2), mask, start)


def test_a_start_has_shares_where_copies_are():
    """A start that gives a share to a rank without a copy is refused."""
    mask = torch.tensor([[[True], [False]]])
    with pytest.raises(ValueError, match="^start gives a share to a rank that mask gives no copy$"):
        Problem(torch.ones(1, 1), torch.ones(1, 2), mask, torch.ones(1, 2, 1))
