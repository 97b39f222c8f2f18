"""Plans by time: the twin against a MILP, what is promised, and the kernel against the twin."""

import numpy as np
import pytest
import torch
from helpers.balancers import DEVICE
from helpers.time_plans import (
    COST,
    by_slot,
    copy_starts,
    draw_case,
    exact_cost,
    find_best_time,
    list_groups,
    plan_tokens,
)

from lplb_triton import Balancer, Placement, kernels, reference
from lplb_triton._layout import STATUS_INVALID
from lplb_triton.reference.time import (
    find_starts,
    plan_time,
    split_evenly,
    write_shares,
)
from lplb_triton.reference.time_bound import bound_time

SHAPES = [(2, 1, 6), (4, 1, 16), (8, 2, 32), (32, 2, 64)]


def plan_case(placement, counts, cumulative, cost=COST, margin=0):
    """Plan every group; returns pairs of tables and plan."""
    start = copy_starts(placement)
    return [
        (tables, plan_time(tables, cost, counts, cumulative, start, margin))
        for tables in list_groups(placement)
    ]


def find_slowest(tables, rows, smoothed=True):
    """Return the predicted time of the slowest rank."""
    return COST.predict(by_slot(tables, rows), smoothed=smoothed).max()


def double_up():
    """Return a placement in which a rank has two copies of an expert, beside one elsewhere."""
    return Placement.from_phy2log(torch.tensor([0, 0, 1, 2, 1, 2, 3, 3, 0, 1, 2, 3]), 3)


def test_plans_are_near_those_of_a_milp():
    """In small cases the slowest rank takes at most 5% more than in the best plan, mostly none."""
    cost, ratios = exact_cost(2048, 768), []
    for seed in range(18):
        ranks = 2 + seed % 2
        rows = (6, 50, 130)[seed % 3]
        placement, counts, cumulative = draw_case(seed, ranks, 1 + seed // 2 % 2, 2 * ranks, rows)
        ((tables, plan),) = plan_case(placement, counts, cumulative, cost)
        best, bound = find_best_time(tables, cost, counts)
        assert plan.times[1] >= bound - 1e-3
        ratios.append(plan.times[1] / best)
    assert max(ratios) < 1.05 and np.mean(ratios) < 1.01
    assert np.median(ratios) < 1.0005


@pytest.mark.parametrize("rows", [4, 60, 150, 900])
def test_no_plan_beats_the_bound(rows):
    """The bound is below the best plan of a MILP and, in larger cases, near the plan by time."""
    cost = exact_cost(2048, 768)
    for ranks, slots, experts in ((3, 1, 6), (8, 2, 32)):
        placement, counts, cumulative = draw_case(rows, ranks, slots, experts, rows)
        ((tables, plan),) = plan_case(placement, counts, cumulative, cost)
        bound = bound_time(tables, cost, counts, plan.rows, float(plan.times[1]))
        assert 0.6 * plan.times[1] < bound <= plan.times[1] * (1 + 1e-6)
        if ranks == 3 and rows < 200:
            assert bound <= find_best_time(tables, cost, counts)[0] * 1.001


@pytest.mark.parametrize(("ranks", "slots", "experts"), SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 90, 700])
def test_no_plan_is_slower_than_what_it_began_with(ranks, slots, experts, rows):
    """Every token is in one cell, and no simple plan is faster by more than one percent."""
    placement, counts, cumulative = draw_case(rows, ranks, slots, experts, rows)
    start = copy_starts(placement)
    for tables, plan in plan_case(placement, counts, cumulative, margin=4):
        sums = np.add.reduceat(plan.rows, tables.start[:-1])
        assert (plan.rows >= 0).all() and (sums == counts[tables.experts]).all()
        simple = find_starts(tables, COST, counts, cumulative, start)
        for name in ("tokens", "even", "home"):
            exact, smooth = (find_slowest(tables, simple[name], smoothed=s) for s in (False, True))
            assert plan.times[1] <= 1.0101 * exact
            # Of those within the limit, the plan is the first by the smoothed table.
            assert plan.times[3] <= smooth or exact > 1.01 * find_least(tables, simple)
        assert plan.times[3] == find_slowest(tables, plan.rows)
        assert plan.times[1] == find_slowest(tables, plan.rows, smoothed=False)
        assert plan.times[2] == find_slowest(tables, simple["tokens"])


def find_least(tables, simple):
    """Return the least exact time of the plans that are judged as they are."""
    return min(find_slowest(tables, simple[k], smoothed=False) for k in ("tokens", "even", "home"))


def test_few_rows_gain_by_closing_copies():
    """With a few rows an expert, plans by time are clearly faster than token plans."""
    ratios = []
    for seed in range(12):
        case = draw_case(seed, 8, 2, 32, 8)
        ratios += [plan.times[1] / plan.times[0] for _, plan in plan_case(*case)]
    assert np.mean(ratios) < 0.93


def test_shares_give_exactly_the_rows_of_the_plan():
    """Over all ranks, the shares that are written give every cell the rows that were planned."""
    for placement, counts in (
        draw_case(3, 8, 2, 32, 40)[:2],
        (double_up(), np.array([50, 3, 0, 400])),
    ):
        cumulative = plan_tokens(placement, counts)
        start = torch.from_numpy(copy_starts(placement))
        written = cumulative.copy()
        for tables, plan in plan_case(placement, counts, cumulative):
            write_shares(tables, plan, counts, written, start.numpy())
            quotas = reference.copy_quotas(
                torch.from_numpy(counts), torch.from_numpy(written), start, 0
            ).numpy()
            assert (quotas[tables.first] == plan.rows).all()
            later = np.ones(len(quotas), dtype=bool)
            later[tables.first] = False
            assert (quotas[later] == 0).all()


def test_permuted_ranks_have_the_same_cost_of_starts():
    """Renaming the ranks of a placement changes neither the token plan's nor the home's time."""
    placement, counts, cumulative = draw_case(1, 8, 1, 32, 24)
    order = np.random.default_rng(0).permutation(8)
    table = placement.phy2log.numpy().reshape(8, -1)[order].reshape(-1)
    renamed = Placement.from_phy2log(torch.from_numpy(table.copy()), 8)
    ((_, plan),) = plan_case(placement, counts, cumulative)
    ((_, other),) = plan_case(renamed, counts, plan_tokens(renamed, counts))
    assert other.times[1] == pytest.approx(plan.times[1], rel=0.05)
    assert other.times[0] == pytest.approx(plan.times[0], rel=0.02)


def test_balanced_homes_are_as_equal_as_copies_allow():
    """No rank has two experts more than another one that a path of copies leads to."""
    placement, _, _ = draw_case(2, 8, 2, 32)
    (tables,) = list_groups(placement)
    numbers = np.bincount(tables.rank[tables.balanced], minlength=8)
    assert numbers.max() - numbers.min() <= 1
    assert (tables.balanced >= tables.start[:-1]).all()
    assert (tables.balanced < tables.start[1:]).all()


def test_classes_name_no_rank_twice():
    """The edges of a class join different ranks, and each joins two cells of one expert."""
    placement, _, _ = draw_case(4, 32, 2, 64)
    (tables,) = list_groups(placement)
    expert = np.arange(len(tables.experts)).repeat(np.diff(tables.start))
    for edges in tables.classes:
        ranks = tables.rank[edges].reshape(-1)
        assert len(set(ranks.tolist())) == len(ranks)
        assert (expert[edges[:, 0]] == expert[edges[:, 1]]).all()
        assert (tables.rank[edges[:, 0]] < tables.rank[edges[:, 1]]).all()


def run_kernel(placement, counts, cumulative, quotas="replicated", status=0):
    """Plan by the kernel for given shares; returns shares and reported numbers."""
    balancer = Balancer(
        placement, device=DEVICE, backend="triton", objective="time", cost=COST, quotas=quotas,
        **({} if quotas == "replicated" else {"rank": 0}),
    )  # fmt: skip
    plan = balancer._backend.make_time_plan()
    status = torch.full((placement.n_group,), status, dtype=torch.int32, device=DEVICE)
    shares = torch.from_numpy(cumulative.astype(np.int32)).to(DEVICE)
    tokens = torch.from_numpy(counts.astype(np.int32)).to(DEVICE)
    kernels.plan_time(tokens, shares, status, plan)
    return shares.cpu().numpy(), balancer.times


@pytest.mark.parametrize(
    ("ranks", "slots", "experts", "rows", "quotas", "margin"),
    [(8, 2, 32, 90, "local", 4), (2, 1, 6, 40, "replicated", 0), (40, 1, 80, 70, "replicated", 0),
     (160, 1, 160, 300, "local", 4)],
)  # fmt: skip
def test_kernel_and_twin_plan_alike(ranks, slots, experts, rows, quotas, margin):
    """For the same shares of the token plan, kernel and twin agree bit for bit."""
    placement, counts, cumulative = draw_case(ranks, ranks, slots, experts, rows)
    written, expected = cumulative.copy(), []
    for tables, plan in plan_case(placement, counts, cumulative, margin=margin):
        write_shares(tables, plan, counts, written, copy_starts(placement))
        expected.append([*plan.times.tolist(), plan.choice])
    shares, times = run_kernel(placement, counts, cumulative, quotas)
    assert torch.stack([t.double() for t in times], 1).tolist() == expected
    assert (shares == written).all()


def test_invalid_counts_keep_the_shares_of_the_solve():
    """A group that the solve found invalid keeps its even split, whatever the plan."""
    placement, counts = double_up(), np.array([-2, 9, 5, 7])
    even = split_evenly(copy_starts(placement))
    shares, times = run_kernel(placement, counts, even, status=STATUS_INVALID)
    assert (shares == even).all()
    # The plan would have changed shares, since a rank has two copies of an expert.
    assert int(times.choice) >= 0 and (placement.structure.copy_multiplicity > 1).any()
    balancer = Balancer(
        placement, device="cpu", backend="torch", objective="time", cost=COST, quotas="replicated"
    )
    status = torch.tensor([STATUS_INVALID], dtype=torch.int32)
    shares = torch.from_numpy(even.astype(np.int32))
    found = balancer._backend.plan_by_time(torch.from_numpy(counts), shares, status)
    assert torch.equal(found, shares)
    for mine, other in zip(balancer.times, times, strict=True):
        assert torch.equal(mine, other.cpu())


def test_groups_are_planned_on_their_own():
    """With several groups, each has the plan that it would have alone, with its own experts."""
    one, counts, _ = draw_case(6, 2, 1, 12, 20)
    table = one.phy2log.repeat(2)
    table[len(one.phy2log) :] += 12
    both = Placement(table, 4, n_logical=24, n_group=2)
    counts = np.concatenate([counts, counts[::-1] * 3])
    cumulative = plan_tokens(both, counts)
    written = cumulative.copy()
    plans = plan_case(both, counts, cumulative)
    for tables, plan in plans:
        write_shares(tables, plan, counts, written, copy_starts(both))
    shares, times = run_kernel(both, counts, cumulative)
    assert (shares == written).all() and len(plans) == 2
    assert times.plan.tolist() == [plan.times[1] for _, plan in plans]


@pytest.mark.parametrize("counts", [[0, 9, 0, 0], [2000, 40, 5, 90]])
def test_kernel_and_twin_with_several_copies_on_a_rank(counts):
    """Several copies of an expert on a rank become one, empty batches and experts are no matter."""
    placement, counts = double_up(), np.array(counts)
    cumulative = plan_tokens(placement, counts)
    ((tables, plan),) = plan_case(placement, counts, cumulative)
    written = cumulative.copy()
    write_shares(tables, plan, counts, written, copy_starts(placement))
    shares, times = run_kernel(placement, counts, cumulative)
    assert (shares == written).all()
    assert int(times.choice) == plan.choice and float(times.plan) == plan.times[1]
