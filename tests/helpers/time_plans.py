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


class Program:
    """The MILP of a small case: rows, active cells, tiles of both sizes, a point for each rank.

    A point is a size, active cells and tiles, whose time is exact. The last variable is the time of
    the slowest rank.
    """

    def __init__(self, tables, cost, counts):
        self.tables, self.cost, self.counts = tables, cost, counts
        self.most = int((-(-counts // cost.sides[0])).sum()) + tables.n_slots
        self.points = [
            (size, active, tiles)
            for size in range(2)
            for active in range(1, tables.n_slots + 1)
            for tiles in range(active, self.most + 1)
        ]
        n = tables.n_cells
        self.active_at, self.tiles_at, self.point_at = n, (2 * n, 3 * n), 4 * n
        self.time_at = 4 * n + tables.n_ranks * len(self.points)
        self.entries, self.low, self.high = [], [], []
        expert = np.arange(len(tables.experts)).repeat(np.diff(tables.start))
        self.total = counts[tables.experts][expert].astype(float)

    def constrain(self, terms, low, high):
        """Bound a sum of variables, given as pairs of variable and factor."""
        self.entries += [(len(self.low), column, factor) for column, factor in terms]
        self.low.append(low)
        self.high.append(high)

    def add_cells(self):
        """Bound the rows of every expert, and the activity and tiles of every cell."""
        start = self.tables.start
        for begin, end in zip(start[:-1], start[1:], strict=True):
            total = self.total[begin]
            self.constrain([(c, 1.0) for c in range(begin, end)], total, total)
        for c, total in enumerate(self.total):
            self.constrain([(c, 1.0), (self.active_at + c, -max(total, 1.0))], -np.inf, 0)
            for side, at in zip(self.cost.sides, self.tiles_at, strict=True):
                self.constrain([(c, 1.0), (at + c, -side)], -np.inf, 0)

    def add_rank(self, rank):
        """Bound the sums over a rank's cells by its point, and its time."""
        cells = np.flatnonzero(self.tables.rank == rank)
        at = self.point_at + rank * len(self.points)
        rows, everything = [(c, 1.0) for c in cells], float(self.counts.sum()) + 1

        def weigh(weights):
            return [(at + i, float(w)) for i, w in enumerate(weights)]

        self.constrain(weigh([1] * len(self.points)), 0, 1)
        self.constrain(rows + weigh([-everything] * len(self.points)), -np.inf, 0)
        active = [(self.active_at + c, 1.0) for c in cells]
        self.constrain(active + weigh([-p[1] for p in self.points]), -np.inf, 0)
        for size, place in enumerate(self.tiles_at):
            # Of the other size nothing is asked.
            tiles = weigh([-p[2] if p[0] == size else -self.most for p in self.points])
            self.constrain([(place + c, 1.0) for c in cells] + tiles, -np.inf, 0)
        border = float(self.cost.wide_from * self.tables.n_slots)
        narrow = weigh([everything * (p[0] == 0) for p in self.points])
        self.constrain(rows + narrow, -np.inf, everything + border - 1)
        self.constrain(rows + weigh([-border * (p[0] == 1) for p in self.points]), 0, np.inf)
        time = [*weigh([-self.cost.table[p] for p in self.points]), (self.time_at, 1.0)]
        self.constrain(time + [(c, -self.cost.per_row) for c in cells], 0, np.inf)

    def solve(self, seconds):
        """Return the least time, and a bound for it."""
        size = self.time_at + 1
        upper, whole, objective = np.full(size, np.inf), np.ones(size), np.zeros(size)
        upper[: self.active_at] = self.total
        upper[self.active_at : self.tiles_at[0]] = upper[self.point_at : self.time_at] = 1
        whole[: self.active_at] = whole[self.time_at] = 0
        objective[self.time_at] = 1
        row, column, value = zip(*self.entries, strict=True)
        matrix = coo_matrix((value, (row, column)), (len(self.low), size)).tocsr()
        found = milp(
            objective, constraints=LinearConstraint(matrix, self.low, self.high), integrality=whole,
            bounds=Bounds(0, upper), options={"time_limit": seconds, "mip_rel_gap": 1e-3},
        )  # fmt: skip
        return found.fun, found.mip_dual_bound


def find_best_time(tables, cost, counts, seconds=5.0):
    """Find the least time of the slowest rank by HiGHS, and a bound for it; small cases only."""
    program = Program(tables, cost, counts)
    program.add_cells()
    for rank in range(tables.n_ranks):
        program.add_rank(rank)
    return program.solve(seconds)


def exact_cost(hidden, inner, most_active=64):
    """Return the cost without a smoothed table of its own: plans are judged by true steps."""
    table = tabulate(PACKAGED, hidden, inner, most_active, 256)
    made = TimeCost.for_model(hidden, inner)
    return TimeCost(table, made.slopes, made.per_row)
