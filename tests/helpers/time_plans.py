"""Placements, batches and a MILP for plans by time."""

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

import lplb_triton
from lplb_triton import Placement, TimeCost, reference
from lplb_triton.costs.gemm import PACKAGED, tabulate
from lplb_triton.reference.time_tables import make_time_tables
from lplb_triton.testing.instances import draw_loads

COST = TimeCost.for_model(2048, 768)


def draw_case(seed, ranks=8, slots=1, experts=32, rows=24):
    """Draw a placement by EPLB, counts of ``rows`` an expert on average, and a token plan.

    Returns the placement, counts [n_logical] int64 and cumulative shares [n_copies] int64.
    """
    rng = np.random.default_rng(seed)
    load = draw_loads("lognormal", rng, experts)
    placement = Placement.from_history(load, ranks, redundant_per_rank=slots)
    weights = load.numpy() * rng.lognormal(0, 0.3, experts)
    counts = rng.multinomial(rows * experts, weights / weights.sum()).astype(np.int64)
    return placement, counts, plan_tokens(placement, counts)


def plan_tokens(placement, counts):
    """Solve the token LP; returns cumulative shares [n_copies] int64."""
    solution = lplb_triton.solve(placement.problem(torch.from_numpy(counts)), backend="torch")
    s = placement.structure
    names = ("copy_cell", "copy_index", "copy_multiplicity", "copy_start")
    tables = [torch.from_numpy(np.array(getattr(s, name))) for name in names]
    return reference.cumulative_shares(solution.shares, *tables).numpy().astype(np.int64)


def copy_starts(placement):
    """Return the first copy of every expert as int64."""
    return placement.structure.copy_start.astype(np.int64)


def list_groups(placement):
    """Return the tables of all groups."""
    return make_time_tables(placement)


def by_slot(tables, rows):
    """Return rows by slot of every rank, [n_ranks, n_slots], from rows by cell."""
    slots = np.zeros((tables.n_ranks, tables.n_slots), dtype=np.int64)
    slots[tables.rank, tables.place] = rows
    return slots


def find_best_time(tables, cost, counts, seconds=5.0):
    """Find the least time of the slowest rank by a MILP, and a bound for it; small cases only.

    Every rank is one of the points (size, active cells, tiles) of the table, whose time is exact.
    """
    n, points, ends = tables.n_cells, [], np.diff(tables.start)
    expert = np.arange(len(ends)).repeat(ends)
    total = counts[tables.experts][expert].astype(float)
    most = int(sum(-(-counts // cost.sides[0]))) + tables.n_slots
    for size in range(2):
        for active in range(1, tables.n_slots + 1):
            points += [(size, active, tiles) for tiles in range(active, most + 1)]
    n_points, n_ranks = len(points), tables.n_ranks
    # Variables: rows, whether a cell is active, tiles of both sizes, points of ranks, time.
    active_at, tiles_at = n, (2 * n, 3 * n)
    point_at, time_at = 4 * n, 4 * n + n_ranks * n_points
    entries, low, high = [], [], []

    def constrain(terms, least, largest):
        entries.extend((len(low), column, value) for column, value in terms)
        low.append(least)
        high.append(largest)

    for e in range(len(ends)):
        cells = range(int(tables.start[e]), int(tables.start[e + 1]))
        constrain([(c, 1.0) for c in cells], total[cells[0]], total[cells[0]])
    for c in range(n):
        constrain([(c, 1.0), (active_at + c, -max(total[c], 1.0))], -np.inf, 0)
        for side, at in zip(cost.sides, tiles_at, strict=True):
            constrain([(c, 1.0), (at + c, -side)], -np.inf, 0)
    everything = float(counts.sum()) + 1
    for rank in range(n_ranks):
        cells = np.flatnonzero(tables.rank == rank)
        at = point_at + rank * n_points
        constrain([(at + i, 1.0) for i in range(n_points)], 0, 1)
        rows = [(c, 1.0) for c in cells]
        constrain(rows + [(at + i, -everything) for i in range(n_points)], -np.inf, 0)
        wanted = [(active_at + c, 1.0) for c in cells]
        constrain(wanted + [(at + i, -float(p[1])) for i, p in enumerate(points)], -np.inf, 0)
        border = float(cost.wide_from * tables.n_slots)
        for size, place in enumerate(tiles_at):
            # Of the other size nothing is asked.
            terms = [(place + c, 1.0) for c in cells]
            terms += [
                (at + i, -float(p[2]) if p[0] == size else -float(most))
                for i, p in enumerate(points)
            ]
            constrain(terms, -np.inf, 0)
            sign = [(at + i, 1.0) for i, p in enumerate(points) if p[0] == size]
            if size == 0:
                constrain(
                    rows + [(i, everything) for i, _ in sign], -np.inf, everything + border - 1
                )
            else:
                constrain(rows + [(i, -border) for i, _ in sign], 0, np.inf)
        table = [float(cost.table[p]) for p in points]
        terms = [(at + i, -t) for i, t in enumerate(table)] + [(time_at, 1.0)]
        constrain(terms + [(c, -cost.per_row) for c in cells], 0, np.inf)
    upper = np.full(time_at + 1, np.inf)
    upper[:n], upper[active_at : 2 * n], upper[point_at:time_at] = total, 1, 1
    whole = np.ones(time_at + 1)
    whole[:n] = whole[time_at] = 0
    objective = np.zeros(time_at + 1)
    objective[time_at] = 1
    row, column, value = zip(*entries, strict=True)
    matrix = coo_matrix((value, (row, column)), (len(low), time_at + 1)).tocsr()
    found = milp(
        objective, constraints=LinearConstraint(matrix, low, high), integrality=whole,
        bounds=Bounds(0, upper), options={"time_limit": seconds, "mip_rel_gap": 1e-3},
    )  # fmt: skip
    return found.fun, found.mip_dual_bound


def exact_cost(hidden, inner, most_active=64):
    """Return the cost without a smoothed table of its own: plans are judged by true steps."""
    table = tabulate(PACKAGED, hidden, inner, most_active, 256)
    made = TimeCost.for_model(hidden, inner)
    return TimeCost(table, made.slopes, made.per_row)
