"""Plans that keep tokens near: against HiGHS, exact quotas, and kernel against twin."""

import numpy as np
import pytest
import torch
from helpers.balancers import DEVICE
from helpers.near_plans import Case, draw_case, draw_counts, solve_two_stages
from helpers.time_plans import copy_starts

from lplb_triton import Placement, chain, kernels, reference
from lplb_triton._backends.near_arrays import make_near_arrays
from lplb_triton._layout import NEAR_REPORTED, NEAR_ROWS, STATUS_INVALID
from lplb_triton.reference import near_tables

SLACK = 0.01
# Of loads and of tokens that leave their node, for rounding to units and to shares.
ROUNDING = 1e-5


def test_plans_are_near_the_optimum_of_two_stages():
    """Loads are within the slack of the optimum, and traffic is near the least at such loads."""
    ratios = []
    for seed in range(80):
        case = draw_case(seed)
        (plan,), shares = case.plan(SLACK)
        least, traffic = solve_two_stages(case, SLACK)
        load = case.find_loads(shares).max()
        assert load <= (1 + SLACK) * least * (1 + ROUNDING)
        assert abs(plan.max_load - load) <= ROUNDING * load
        before, after, bound, total, _, limit, _ = plan.numbers
        assert bound <= after <= before <= total and plan.max_load <= limit
        lone = case.gathered.sum() - total
        # What experts on one rank only send away is the same by every plan.
        (tables,) = case.tables
        node = tables.lone_rank // case.ranks_per_node
        home = np.arange(len(case.gathered))[:, None] // case.ranks_per_node == node
        sent = lone - (case.gathered[:, tables.lone_experts] * home).sum()
        ratios.append((after + sent) / max(traffic + sent, 1))
    ratios = np.array(ratios)
    assert ratios.min() > 1 - 5e-3 and ratios.mean() < 1.02 and ratios.max() < 1.1


@pytest.mark.parametrize("seed", [1, 4, 7])
def test_exact_quotas_have_the_traffic_of_the_plan(seed):
    """Exact quotas send as many tokens to other nodes as the plan says, to one token a copy."""
    case = draw_case(seed)
    (plan,), shares = case.plan(SLACK)
    p = case.placement
    start, holder = p.structure.copy_start, p.structure.copy_slot // p.slots_per_rank
    sent = []
    for cumulative in (case.cumulative, shares):
        _, kept = reference.divide_quotas(
            torch.from_numpy(case.gathered), torch.from_numpy(cumulative),
            torch.from_numpy(start.copy()), torch.from_numpy(holder.astype(np.int64)),
            case.ranks_per_node,
        )  # fmt: skip
        sent.append(int(kept[:, 2].sum() - kept[:, 1].sum()))
    before, after = plan.numbers[:2]
    n_cells = case.tables[0].n_cells
    assert after < before and sent[1] < sent[0]
    assert abs((sent[0] - sent[1]) - (before - after)) <= 2 * n_cells


def test_no_slack_and_one_node_change_nothing_for_the_worse():
    """Without slack the largest load doesn't rise; with one node the LP's plan stays."""
    case = draw_case(3)
    (plan,), shares = case.plan(0.0)
    before = case.find_loads(case.cumulative).max()
    assert case.find_loads(shares).max() <= before * (1 + ROUNDING)
    assert plan.numbers[1] <= plan.numbers[0]
    alone = Case(case.placement, case.placement.ep_size, case.gathered)
    (plan,), shares = alone.plan(SLACK)
    assert plan.choice == 0 and plan.numbers[0] == 0 and (shares == case.cumulative).all()


@pytest.fixture
def few_steps(monkeypatch):
    """Make few steps, which take less time in the interpreter."""
    monkeypatch.setattr(near_tables, "STEPS_OF_FEW", 6)


def test_classes_name_no_rank_twice():
    """A class has no rank twice, edges join cells of an expert, and steps go both ways."""
    (tables,) = draw_case(2).tables
    expert = np.arange(len(tables.experts)).repeat(np.diff(tables.start))
    for edges in tables.classes:
        ranks = tables.rank[edges].reshape(-1)
        assert len(set(ranks.tolist())) == len(ranks)
        assert (expert[edges[:, 0]] == expert[edges[:, 1]]).all()
        assert (tables.rank[edges[:, 0]] < tables.rank[edges[:, 1]]).all()
    forward, backward = (near_tables.find_steps(tables, way) for way in (False, True))
    assert len(forward) == len(backward) <= near_tables.STEPS_OF_FEW
    assert forward[0].number == 0 and backward[0].number == len(tables.classes) - 1
    assert [step.shift for step in forward] == sorted(step.shift for step in forward)


def run_kernel(case, slack=SLACK, status=0):
    """Plan by the kernel for the same shares; returns shares, numbers and stats."""
    p = case.placement
    arrays = make_near_arrays(p, case.ranks_per_node)
    tables = kernels.NearTables(
        *(torch.from_numpy(arrays[name]).to(DEVICE) for name in kernels.NearTables._fields)
    )
    slots = p.group_size * p.static_per_rank
    scratch = torch.full((p.n_group, NEAR_ROWS, slots), -7, dtype=torch.int32, device=DEVICE)
    numbers = torch.full((p.n_group, NEAR_REPORTED), -1.0, device=DEVICE)
    plan = kernels.NearPlan(tables, scratch, numbers, slack, case.ranks_per_node)
    found = case.solution
    stats = torch.stack((found.max_load, found.lower_bound, found.gap)).float().to(DEVICE)
    shares = torch.from_numpy(case.cumulative.astype(np.int32)).to(DEVICE)
    gathered = torch.from_numpy(np.ascontiguousarray(case.gathered, np.int32)).to(DEVICE)
    statuses = torch.full((p.n_group,), status, dtype=torch.int32, device=DEVICE)
    kernels.plan_near(gathered, gathered.sum(0, dtype=torch.int32), shares, stats, statuses, plan)
    return shares.cpu().numpy(), numbers.cpu().numpy(), stats.cpu()


def check_kernel(case, slack=SLACK):
    """Check that kernel and twin agree bit for bit; returns the kernel's numbers and stats."""
    plans, expected = case.plan(slack)
    shares, numbers, stats = run_kernel(case, slack)
    assert (shares == expected).all()
    assert (numbers == [plan.numbers for plan in plans]).all()
    return numbers, stats


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "experts", "slots", "tokens", "steps"),
    [
        (4, 2, 16, 2, 60, 48), (6, 3, 12, 2, 3000, 12), (40, 8, 80, 1, 500, 12),
        (160, 8, 160, 1, 3000, 4),
    ],
)  # fmt: skip
def test_kernel_and_twin_plan_alike(
    ranks, ranks_per_node, experts, slots, tokens, steps, monkeypatch
):
    """For the same shares of the token plan, kernel and twin agree bit for bit."""
    monkeypatch.setattr(near_tables, "STEPS_OF_FEW", steps)
    monkeypatch.setattr(near_tables, "STEPS_OF_MANY", steps)
    rng = np.random.default_rng(ranks)
    gathered = draw_counts(rng, ranks, ranks_per_node, experts, tokens)
    # A rank without tokens, and an expert that nobody wants.
    gathered[1], gathered[:, 2] = 0, 0
    history = torch.from_numpy(gathered.sum(0) + rng.integers(1, 50, experts))
    case = Case(chain(history, ranks, redundant_per_rank=slots), ranks_per_node, gathered)
    numbers, stats = check_kernel(case)
    before, after, _, _, load, _, choice = numbers[0]
    assert choice > 0 and after < before
    assert float(stats[0, 0]) == load
    assert abs(float(stats[2, 0]) - (1 - float(stats[1, 0]) / load)) < 1e-6


def test_several_copies_on_a_rank_share_its_part(few_steps):
    """Copies of an expert on one rank divide its share evenly, in kernel and twin alike."""
    table = [0, 1, 2, 0, 0, 3, 1, 4, 5, 4, 2, 5, 3, 0, 1, 2]
    placement = Placement(np.array(table), 4)
    rng = np.random.default_rng(0)
    case = Case(placement, 2, draw_counts(rng, 4, 2, 6, 700))
    numbers, _ = check_kernel(case)
    assert numbers[0, -1] > 0
    _, shares = case.plan(SLACK)
    first = copy_starts(placement)[0]
    # Expert 0 has three copies, the first two of them on different ranks.
    parts = case.find_parts(shares)[first : first + 4]
    holder = placement.structure.copy_slot[first : first + 4] // placement.slots_per_rank
    twice = np.flatnonzero(np.bincount(holder) > 1)
    assert len(twice) and np.ptp(parts[holder == twice[0]]) <= 2.0**-23


def test_groups_are_planned_on_their_own(few_steps):
    """With several groups, tokens of all ranks count, and each group has a plan of its own."""
    rng = np.random.default_rng(5)
    one = chain(torch.from_numpy(rng.integers(1, 99, 8)), 4, redundant_per_rank=1)
    table = one.phy2log.repeat(2)
    table[len(one.phy2log) :] += 8
    both = Placement(table, 8, n_logical=16, n_group=2)
    numbers, _ = check_kernel(Case(both, 2, draw_counts(rng, 8, 2, 16, 800)))
    assert len(numbers) == 2 and (numbers[:, 3] > 0).all()


def test_invalid_counts_and_empty_batches_keep_the_shares_of_the_solve(few_steps):
    """A group that is invalid, or has no tokens, keeps its shares, and its traffic is 0."""
    case = draw_case(1)
    shares, numbers, _ = run_kernel(case, status=STATUS_INVALID)
    assert (shares == case.cumulative).all() and (numbers == 0).all()
    empty = Case(case.placement, case.ranks_per_node, case.gathered * 0)
    shares, numbers, _ = run_kernel(empty)
    assert (shares == empty.cumulative).all() and (numbers == 0).all()
    plans, expected = empty.plan()
    assert plans == [None] and (expected == empty.cumulative).all()


def test_large_batches_are_counted_in_larger_units(few_steps):
    """Near 2**31 tokens a unit is several tokens, and plans are as good."""
    case = draw_case(9)
    factor = (2**31 - 1) // int(case.gathered.sum())
    large = Case(case.placement, case.ranks_per_node, case.gathered * factor)
    numbers, _ = check_kernel(large)
    small, _ = case.plan(SLACK)
    assert numbers[0, 1] == pytest.approx(small[0].numbers[1] * factor, rel=0.02)
