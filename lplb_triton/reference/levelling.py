"""Plain-torch twin of levelling with steps by potentials: no Triton, no shared code, any device.

Equation numbers refer to docs/method.md. A *cell* is a pair of a column and a rank that holds it.
Only columns with two copies or more have cells. They are kept as a table ``[E, K]``, a row per
column, where ``E`` is the number of such columns and ``K`` the largest number of copies; shorter
rows are padded. ``G`` is the number of ranks and ``B`` the number of instances. Loads and tokens
are in any one unit; `solve` uses the mean load of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch

from lplb_triton.problem import Problem
from lplb_triton.reference.solving import as_plan, certify, gap_to_aim_at, valid_loads
from lplb_triton.solution import Solution

__all__ = [
    "Graph",
    "build_graph",
    "cut_bound",
    "free_cells",
    "laplacian",
    "potentials",
    "project",
    "solve",
    "step",
    "sweep",
]

# Up to this many copies of a column are joined each with each (equation 18).
FEW_COPIES = 4
# Sweeps of a run, at most: of the first one, and of those after steps by potentials.
FIRST_SWEEPS = 16
LATER_SWEEPS = 8
# Classes of edges that the first run may level, up to the end of a sweep.
FIRST_CLASSES = 256
# The part of the difference of two ranks that an edge moves in the first sweeps of a run and in
# the others, and how many the first ones are.
LEVEL_PART = 0.5
RELAXED_PART = 0.75
LEVEL_SWEEPS = 2
# A sweep that takes no more than this part of the aimed gap off the largest load is steady.
STEADY_PART = 0.5
# How far below the largest load the four cuts are, in parts of the aimed gap (equation 19).
CUT_DEPTHS = (0.4, 1.6, 6.4, 25.6)
# A cell has tokens if it has more than this part of its column's (equation 20).
EMPTY_PART = 1e-6
# Steps of the method of conjugate residuals for the potentials (equation 21).
RESIDUAL_STEPS = 8
# Rounds of the projection, at most (equation 22).
MOST_ROUNDS = 5
# The step, counted from 1, from which on its length is searched for (equation 23).
FIRST_SEARCH = 4
# Denominators are at least this. Loads are about 1.
TINY = 1e-30
# What is taken off for round-off, in parts of the bound.
ALLOWANCE_FLOAT32 = 2.0**-20
ALLOWANCE_FLOAT64 = 2.0**-46
# Graphs that are kept, the last ones used.
MOST_GRAPHS = 64


@dataclass(frozen=True, eq=False)
class Graph:
    """Which ranks the columns of one mask join, and everything that follows from that alone."""

    columns: torch.Tensor
    """``[E]`` int64, numbers of the columns that have two copies or more."""
    rank: torch.Tensor
    """``[E, K]`` int64, rank of each cell in ascending order; 0 where the row is padded."""
    real: torch.Tensor
    """``[E, K]`` bool, False where the row is padded."""
    copies: torch.Tensor
    """``[E]`` int64, cells of each column."""
    rank_cells: torch.Tensor
    """``[G, M]`` int64, numbers of the cells on each rank, row by row; ``E * K`` for padding."""
    classes: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], ...]
    """For each class of edges the numbers of their two cells, then these cells' ranks, int64."""
    rounds: int
    """Rounds of the projection (equation 22)."""

    @property
    def n_ranks(self) -> int:
        """Number of ranks, G."""
        return self.rank_cells.shape[0]

    def at_cells(self, by_rank: torch.Tensor) -> torch.Tensor:
        """Give each cell its rank's value, ``[B, G]`` to ``[B, E, K]``; padding gets any value."""
        return by_rank[:, self.rank]

    def sum_by_rank(self, cells: torch.Tensor) -> torch.Tensor:
        """Sum up the cells of each rank, ``[B, E, K]`` to ``[B, G]``."""
        padded = torch.nn.functional.pad(cells.flatten(1), (0, 1))
        return padded[:, self.rank_cells].sum(2)

    def split_evenly(self, w: torch.Tensor) -> torch.Tensor:
        """Split each column's tokens evenly over its cells, ``[B, E]`` to ``[B, E, K]``."""
        return torch.where(self.real, (w / self.copies).unsqueeze(2), 0.0)


def _join_copies(n: int) -> list[tuple[int, int]]:
    """Pairs of n copies that are joined: each with each, or as the corners of a hypercube are."""
    pairs = list(combinations(range(n), 2))
    if n > FEW_COPIES:
        pairs = [(i, j) for i, j in pairs if (i ^ j).bit_count() == 1]
    return pairs


def _colour_edges(
    ranks_of: list[list[int]], width: int, n_ranks: int
) -> list[list[tuple[int, int, int, int]]]:
    """Put the edges of equation 18 into classes that name no rank twice, crowded ranks first.

    ``ranks_of`` lists the ranks of each row of the table of cells, which is ``width`` cells wide.
    An edge is the numbers of two cells, then their ranks.
    """
    edges = []
    for row, ranks in enumerate(ranks_of):
        for i, j in _join_copies(len(ranks)):
            edges.append((row * width + i, row * width + j, ranks[i], ranks[j]))
    degree = [0] * n_ranks
    for *_, a, b in edges:
        degree[a] += 1
        degree[b] += 1
    edges.sort(key=lambda edge: -degree[edge[2]] - degree[edge[3]])
    taken = [0] * n_ranks  # Bit k says that the rank has an edge of class k.
    classes: list[list[tuple[int, int, int, int]]] = []
    for edge in edges:
        a, b = edge[2:]
        either = taken[a] | taken[b]
        k = (~either & (either + 1)).bit_length() - 1
        taken[a] |= 1 << k
        taken[b] |= 1 << k
        if k == len(classes):
            classes.append([])
        classes[k].append(edge)
    return classes


def build_graph(mask: torch.Tensor) -> Graph:
    """Find the cells and edges of a mask (equation 18).

    Parameters
    ----------
    mask : torch.Tensor
        ``[G, C]`` bool, whether a rank holds a copy of a column.

    Returns
    -------
    Graph
        On the device of the mask.
    """
    device, n_ranks = mask.device, mask.shape[0]
    by_column = [[g for g, held in enumerate(row) if held] for row in mask.T.tolist()]
    columns = [e for e, ranks in enumerate(by_column) if len(ranks) > 1]
    ranks_of = [by_column[e] for e in columns]
    width = max([1, *map(len, ranks_of)])
    on_rank: list[list[int]] = [[] for _ in range(n_ranks)]
    for row, ranks in enumerate(ranks_of):
        for nth, g in enumerate(ranks):
            on_rank[g].append(row * width + nth)
    most = max([1, *map(len, on_rank)])

    def integers(rows: list[list[int]], size: int, padding: int) -> torch.Tensor:
        rows = [row + [padding] * (size - len(row)) for row in rows]
        made = torch.tensor(rows, dtype=torch.int64, device=device)
        return made.reshape(len(rows), size)

    copies = integers([[len(ranks)] for ranks in ranks_of], 1, 0)[:, 0]
    edges = _colour_edges(ranks_of, width, n_ranks)
    tables = [torch.tensor(some, dtype=torch.int64, device=device) for some in edges]
    return Graph(
        columns=integers([[e] for e in columns], 1, 0)[:, 0],
        rank=integers(ranks_of, width, 0),
        real=torch.arange(width, device=device) < copies.unsqueeze(1),
        copies=copies,
        rank_cells=integers(on_rank, most, len(columns) * width),
        classes=tuple((t[:, 0], t[:, 1], t[:, 2], t[:, 3]) for t in tables),
        rounds=min(width, MOST_ROUNDS),
    )


@lru_cache(maxsize=MOST_GRAPHS)
def _find_graph(cells: bytes, n_ranks: int, n_columns: int, device: torch.device) -> Graph:
    """Build the graph of a mask from its bytes, or look it up."""
    mask = torch.tensor(list(cells), dtype=torch.bool, device=device)
    return build_graph(mask.reshape(n_ranks, n_columns))


def sweep(
    graph: Graph, x: torch.Tensor, load: torch.Tensor, part: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Level all edges once, class by class (equation 18).

    Parameters
    ----------
    graph : Graph
        The columns.
    x : torch.Tensor
        ``[B, E, K]`` float, tokens of each cell.
    load : torch.Tensor
        ``[B, G]`` float, load of each rank under ``x``.
    part : float
        Part of the difference of two ranks that an edge moves; 0.5 levels them.

    Returns
    -------
    x, load : torch.Tensor
        The new ones. No instance's largest load has grown if ``part`` is at most 1.
    """
    cells, load = x.flatten(1).clone(), load.clone()
    for low, high, first, second in graph.classes:
        here, there = load[:, first], load[:, second]
        x_low, x_high = cells[:, low], cells[:, high]
        moved = torch.minimum(torch.maximum((there - here) * part, -x_low), x_high)
        cells[:, low], cells[:, high] = x_low + moved, x_high - moved
        load[:, first], load[:, second] = here + moved, there - moved
    return cells.reshape(x.shape), load


def cut_bound(
    graph: Graph, load: torch.Tensor, w: torch.Tensor, fixed: torch.Tensor, aim: float
) -> torch.Tensor:
    """Largest bound of four sets of the fullest ranks (equation 19).

    Parameters
    ----------
    graph : Graph
        The columns.
    load : torch.Tensor
        ``[B, G]`` float, load of each rank.
    w : torch.Tensor
        ``[B, E]`` float, tokens of each column that has several copies.
    fixed : torch.Tensor
        ``[B, G]`` float, load of each rank whatever the plan.
    aim : float
        Relative gap that is aimed at.

    Returns
    -------
    torch.Tensor
        ``[B]``, a load that no plan can beat.
    """
    peak = load.amax(1)[:, None, None]
    depths = torch.tensor(CUT_DEPTHS, dtype=load.dtype, device=load.device)
    least = peak - aim * peak * depths[:, None]
    inside = load.unsqueeze(1) >= least
    # A column lies in a set exactly if the least loaded of its ranks does.
    lowest = torch.where(graph.real, graph.at_cells(load), torch.inf).amin(2)
    kept = torch.where(lowest.unsqueeze(1) >= least, w.unsqueeze(1), 0.0).sum(2)
    total = torch.where(inside, fixed.unsqueeze(1), 0.0).sum(2) + kept
    return (total / inside.sum(2)).amax(1)


def free_cells(graph: Graph, x: torch.Tensor, load: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Find the cells that have tokens or are likely to get some (equation 20).

    Tokens are likely to come where a rank's load is below the mean of those ranks that have tokens
    of the column.

    Parameters
    ----------
    graph : Graph
        The columns.
    x, load, w : torch.Tensor
        As for `sweep` and `cut_bound`.

    Returns
    -------
    torch.Tensor
        ``[B, E, K]`` bool; padding isn't free.
    """
    w = w.unsqueeze(2)
    has = graph.real & (x > EMPTY_PART * w)
    here = graph.at_cells(load)
    total = torch.where(has, here, 0.0).sum(2, keepdim=True)
    mean = total / has.sum(2, keepdim=True).clamp(min=1)
    return graph.real & (w > 0) & (has | (here < mean))


def laplacian(graph: Graph, free: torch.Tensor, potential: torch.Tensor) -> torch.Tensor:
    """Multiply the matrix L of the free cells by potentials (equation 20).

    Parameters
    ----------
    graph : Graph
        The columns.
    free : torch.Tensor
        ``[B, E, K]`` bool, free cells; padding isn't free.
    potential : torch.Tensor
        ``[B, G]`` float.

    Returns
    -------
    torch.Tensor
        ``[B, G]``.
    """
    here = torch.where(free, graph.at_cells(potential), 0.0)
    mean = here.sum(2, keepdim=True) / free.sum(2, keepdim=True).clamp(min=1)
    return graph.sum_by_rank(torch.where(free, here - mean, 0.0))


def potentials(graph: Graph, free: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """Find potentials that level loads along free cells, as far as they go (equation 21).

    Parameters
    ----------
    graph : Graph
        The columns.
    free : torch.Tensor
        ``[B, E, K]`` bool, free cells; padding isn't free.
    load : torch.Tensor
        ``[B, G]`` float, load of each rank.

    Returns
    -------
    torch.Tensor
        ``[B, G]``; moves along free cells by them change loads by minus L times them.
    """
    left = load - load.mean(1, keepdim=True)
    potential = torch.zeros_like(left)
    way, image = torch.zeros_like(left), torch.zeros_like(left)
    product = torch.zeros_like(left[:, :1])
    for _ in range(RESIDUAL_STEPS):
        image_of_left = laplacian(graph, free, left)
        previous, product = product, (left * image_of_left).sum(1, keepdim=True)
        turn = torch.where(previous > TINY, product / previous.clamp(min=TINY), 0.0)
        way = left + turn * way
        image = image_of_left + turn * image
        size = (image * image).sum(1, keepdim=True)
        length = torch.where(size > TINY, product / size.clamp(min=TINY), 0.0)
        potential = potential + length * way
        left = left - length * image
    return potential


def project(graph: Graph, y: torch.Tensor, on: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Project each column's cells on what adds up to its tokens, none negative (equation 22).

    Parameters
    ----------
    graph : Graph
        The columns.
    y : torch.Tensor
        ``[B, E, K]`` float, any numbers.
    on : torch.Tensor
        ``[B, E, K]`` bool, cells that may get tokens; padding may not.
    w : torch.Tensor
        ``[B, E]`` float, tokens of each column.

    Returns
    -------
    torch.Tensor
        ``[B, E, K]``, non-negative, with columns that add up to ``w`` but for round-off.
    """
    level = w.unsqueeze(2)
    for _ in range(graph.rounds):
        total = torch.where(on, y, 0.0).sum(2, keepdim=True)
        level = (total - w.unsqueeze(2)) / on.sum(2, keepdim=True).clamp(min=1)
        on = on & (y > level)
    x = torch.where(on, y - level, 0.0)
    total = x.sum(2, keepdim=True)
    scaled = x * (w.unsqueeze(2) / total.clamp(min=TINY))
    return torch.where(total > TINY, scaled, graph.split_evenly(w))


def step(
    graph: Graph,
    x: torch.Tensor,
    load: torch.Tensor,
    w: torch.Tensor,
    fixed: torch.Tensor,
    search: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step by potentials over the free cells (equations 20 to 23).

    Parameters
    ----------
    graph : Graph
        The columns.
    x, load, w, fixed : torch.Tensor
        As for `sweep` and `cut_bound`.
    search : bool
        Whether the step's length is searched for (equation 23).

    Returns
    -------
    x, load : torch.Tensor
        The new ones. The largest load may have grown.
    """
    free = free_cells(graph, x, load, w)
    potential = potentials(graph, free, load)
    new_x = project(graph, x - graph.at_cells(potential), free, w)
    new_load = fixed + graph.sum_by_rank(new_x)
    if not search:
        return new_x, new_load
    change = new_load - load
    above = load - load.mean(1, keepdim=True)
    part = -(above * change).sum(1) / (change * change).sum(1).clamp(min=TINY)
    part = part.clamp(min=0.0, max=1.0)
    return x + part[:, None, None] * (new_x - x), load + part[:, None] * change


class _Plans:
    """Plans of instances that share a graph; those within the aimed gap stand still."""

    def __init__(self, graph: Graph, w: torch.Tensor, fixed: torch.Tensor, aim: float) -> None:
        self.graph, self.w, self.fixed, self.aim = graph, w, fixed, aim
        self.x = graph.split_evenly(w)
        self.load = fixed + graph.sum_by_rank(self.x)
        self.bound = torch.maximum((fixed.sum(1) + w.sum(1)) / graph.n_ranks, fixed.amax(1))
        self.steps = torch.zeros(len(w), dtype=torch.int32, device=w.device)
        self.open = torch.arange(len(w), device=w.device)
        self._close()

    def _close(self) -> None:
        """Keep open only the instances whose gap is wider than the aim."""
        peak = self.load[self.open].amax(1)
        apart = peak - self.bound[self.open] > self.aim * peak
        self.open = self.open[apart]

    def sweep(self, most: int) -> None:
        """Sweep up to ``most`` times; look for better bounds when that promises something."""
        peak = self.load.amax(1)
        looked = torch.zeros_like(self.steps)
        for swept in range(1, most + 1):
            if not len(self.open):
                return
            at = self.open
            part = LEVEL_PART if swept <= LEVEL_SWEEPS else RELAXED_PART
            self.x[at], self.load[at] = sweep(self.graph, self.x[at], self.load[at], part)
            self._close()
            at = self.open
            now = self.load[at].amax(1)
            steady = peak[at] - now <= now * (self.aim * STEADY_PART)
            peak[at] = now
            due = steady & (2 * swept >= 3 * looked[at])
            if swept in (1, most):
                due = torch.ones_like(due)
            looked[at[due]] = swept
            self._cut(at[due])

    def _cut(self, at: torch.Tensor) -> None:
        """Look for better bounds of these instances."""
        if len(at):
            found = cut_bound(self.graph, self.load[at], self.w[at], self.fixed[at], self.aim)
            self.bound[at] = torch.maximum(self.bound[at], found)
            self._close()

    def step(self, search: bool) -> None:
        """Make a step by potentials."""
        at = self.open
        state = self.x[at], self.load[at], self.w[at], self.fixed[at]
        self.x[at], self.load[at] = step(self.graph, *state, search)
        self.steps[at] += 1
        self._close()

    def restore(self, x: torch.Tensor, load: torch.Tensor) -> None:
        """Take these plans back where the largest load has grown."""
        worse = self.load.amax(1) > load.amax(1)
        self.x = torch.where(worse[:, None, None], x, self.x)
        self.load = torch.where(worse[:, None], load, self.load)


def _level(
    graph: Graph, w: torch.Tensor, fixed: torch.Tensor, aim: float, max_steps: int
) -> _Plans:
    """Sweep and step until the gaps are within the aim, or after ``max_steps`` steps."""
    plans = _Plans(graph, w, fixed, aim)
    whole = -(-FIRST_CLASSES // max(1, len(graph.classes)))
    plans.sweep(min(FIRST_SWEEPS, whole))
    if not len(plans.open):
        return plans
    before = plans.x.clone(), plans.load.clone()
    for number in range(1, max_steps + 1):
        plans.step(number >= FIRST_SEARCH)
        plans.sweep(LATER_SWEEPS)
        if not len(plans.open):
            break
    plans.restore(*before)
    return plans


def solve(problem: Problem, tolerance: float, max_iterations: int, dtype: torch.dtype) -> Solution:
    """Level a batch of instances by sweeps and by steps by potentials (equations 18 to 23).

    Whatever the caller has set in torch makes no difference, and nothing has a gradient.

    Parameters
    ----------
    problem : Problem
        The instances.
    tolerance : float
        Relative gap to reach.
    max_iterations : int
        Bound on the steps by potentials.
    dtype : torch.dtype
        float32 or float64, the arithmetic; the certificate is evaluated in float64.

    Returns
    -------
    Solution
        ``max_load``, ``lower_bound`` and ``gap`` in float64; ``iterations`` counts the steps by
        potentials: 0 where sweeps were enough.
    """
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        return _solve(problem, tolerance, max_iterations, dtype)


def _solve(problem: Problem, tolerance: float, max_iterations: int, dtype: torch.dtype) -> Solution:
    mask = problem.mask.expand(problem.n_instances, -1, -1)
    n_copies = problem.mask.sum(1)
    weights, fixed, unit, invalid = valid_loads(problem, n_copies)
    w, f = (weights / unit).to(dtype), (fixed / unit).to(dtype)
    # Columns with one copy count as fixed.
    lone = problem.mask & (n_copies == 1).unsqueeze(1)
    f = f + torch.where(lone, w.unsqueeze(1), 0.0).sum(2)

    even = mask.to(dtype) / n_copies.clamp(min=1).to(dtype).unsqueeze(1)
    plan = even.clone()
    bound = w.new_zeros(len(w))
    steps = torch.zeros(len(w), dtype=torch.int32, device=w.device)
    allowance = ALLOWANCE_FLOAT32 if dtype == torch.float32 else ALLOWANCE_FLOAT64
    aim = gap_to_aim_at(tolerance - allowance, problem.group_size)
    for graph, rows in _graphs(problem):
        columns = graph.columns
        plans = _level(graph, w[rows][:, columns], f[rows], aim, max_iterations)
        bound[rows], steps[rows] = plans.bound, plans.steps
        parts = torch.where(plans.w.unsqueeze(2) > 0, plans.x / plans.w.unsqueeze(2), 0.0)
        row, nth = graph.real.nonzero(as_tuple=True)
        shares = torch.where(plans.w[:, row] > 0, parts[:, row, nth], 1.0 / graph.copies[row])
        plan[rows.unsqueeze(1), graph.rank[row, nth], columns[row]] = shares.to(dtype)

    # No answer is worse than the even split or the start.
    others = [even] if problem.start is None else [even, as_plan(problem.start, mask, even)]
    for other in others:
        better = _largest_load(other, weights, fixed) < _largest_load(plan, weights, fixed)
        plan = torch.where(better[:, None, None], other, plan)
    lower = bound.double() * unit[:, 0] * (1.0 - allowance)
    return certify(plan, mask, weights, fixed, lower, steps, invalid, tolerance)


def _graphs(problem: Problem) -> list[tuple[Graph, torch.Tensor]]:
    """List the distinct masks' graphs, each with the numbers of its instances, ``[n]`` int64."""
    device, mask = problem.device, problem.mask.cpu()
    found: dict[bytes, list[int]] = {}
    for i, one in enumerate(mask):
        found.setdefault(one.contiguous().numpy().tobytes(), []).append(i)
    if len(mask) == 1:
        found = {cells: list(range(problem.n_instances)) for cells in found}
    return [
        (
            _find_graph(cells, problem.group_size, problem.n_columns, device),
            torch.tensor(rows, dtype=torch.int64, device=device),
        )
        for cells, rows in found.items()
    ]


def _largest_load(plan: torch.Tensor, weights: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """Load of the most loaded rank under shares ``[B, G, C]``, ``[B]`` float64."""
    return (fixed + (weights.unsqueeze(1) * plan).sum(2)).amax(1)
