"""The torch twin of kernels/solve/levelling.py: levelling along edges, then steps by potentials.

Equation numbers refer to docs/method.md. Cells and the sizes ``B``, ``E``, ``K`` and ``G`` are as
in `lplb_triton.reference.graph`. Loads and tokens are in any one unit; `solve` uses the mean load
of a rank. The *peak* is the largest load of a rank while a plan is being made; the *aimed gap* is
the relative gap at which levelling ends.
"""

from __future__ import annotations

import torch

from lplb_triton.problem import Problem
from lplb_triton.reference.certificate import (
    certify,
    check_loads,
    choose_aimed_gap,
    choose_bound_allowance,
    make_plan,
)
from lplb_triton.reference.graph import Graph, list_graphs
from lplb_triton.reference.potentials import step_by_potentials
from lplb_triton.solution import Solution

__all__ = ["compute_cut_bound", "level_edges", "solve"]

# Most sweeps before the first step by potentials, and after each step.
MAX_FIRST_SWEEPS = 16
MAX_LATER_SWEEPS = 8
# Most classes of edges before the first step, rounded up to whole sweeps.
MAX_FIRST_CLASSES = 256
# The first EXACT_SWEEPS sweeps of a run move the fraction of the difference between two ranks that
# levels them; later ones over-relax.
EXACT_SWEEPS = 2
EXACT_FRACTION = 0.5
RELAXED_FRACTION = 0.75
# The peak is steady once a sweep takes no more than this fraction of the aimed gap off it.
STEADY_FRACTION = 0.5
# How far below the peak the four sets of ranks reach, in aimed gaps (equation 19).
CUT_DEPTHS = (0.4, 1.6, 6.4, 25.6)
# The step, counted from 1, from which on its length is searched for (equation 23).
FIRST_LINE_SEARCH = 4


def solve(problem: Problem, tolerance: float, max_iterations: int, dtype: torch.dtype) -> Solution:
    """Level a batch of instances by sweeps and by steps by potentials (equations 18 to 23).

    Torch's settings in the caller, such as autocast, make no difference, and nothing has a
    gradient.

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
    weights, fixed, unit, invalid = check_loads(problem, n_copies)
    w, f = (weights / unit).to(dtype), (fixed / unit).to(dtype)
    # Columns with one copy count as fixed.
    lone = problem.mask & (n_copies == 1).unsqueeze(1)
    f = f + torch.where(lone, w.unsqueeze(1), 0.0).sum(2)

    even = mask.to(dtype) / n_copies.clamp(min=1).to(dtype).unsqueeze(1)
    plan = even.clone()
    bound = w.new_zeros(len(w))
    steps = torch.zeros(len(w), dtype=torch.int32, device=w.device)
    allowance = choose_bound_allowance(dtype)
    aimed_gap = choose_aimed_gap(tolerance - allowance, problem.group_size)
    for graph, rows in list_graphs(problem):
        columns = graph.columns
        plans = _level_instances(graph, w[rows][:, columns], f[rows], aimed_gap, max_iterations)
        bound[rows], steps[rows] = plans.bound, plans.steps
        fractions = torch.where(plans.w.unsqueeze(2) > 0, plans.x / plans.w.unsqueeze(2), 0.0)
        row, nth = graph.real.nonzero(as_tuple=True)
        shares = torch.where(plans.w[:, row] > 0, fractions[:, row, nth], 1.0 / graph.copies[row])
        plan[rows.unsqueeze(1), graph.rank[row, nth], columns[row]] = shares.to(dtype)

    # No answer is worse than the even split or the start.
    candidates = [even] if problem.start is None else [even, make_plan(problem.start, mask, even)]
    for candidate in candidates:
        before = _find_largest_load(plan, weights, fixed)
        better = _find_largest_load(candidate, weights, fixed) < before
        plan = torch.where(better[:, None, None], candidate, plan)
    lower = bound.double() * unit[:, 0] * (1.0 - allowance)
    return certify(plan, mask, weights, fixed, lower, steps, invalid, tolerance)


class _Plans:
    """Plans of instances that share a graph; those within the aimed gap no longer change."""

    def __init__(
        self, graph: Graph, w: torch.Tensor, fixed: torch.Tensor, aimed_gap: float
    ) -> None:
        self.graph, self.w, self.fixed, self.aimed_gap = graph, w, fixed, aimed_gap
        self.x = graph.split_evenly(w)
        self.load = fixed + graph.sum_by_rank(self.x)
        self.bound = torch.maximum((fixed.sum(1) + w.sum(1)) / graph.n_ranks, fixed.amax(1))
        self.steps = torch.zeros(len(w), dtype=torch.int32, device=w.device)
        self.open = torch.arange(len(w), device=w.device)
        self._close_certified()

    def _close_certified(self) -> None:
        """Keep open only the instances whose gap is wider than the aimed gap."""
        peak = self.load[self.open].amax(1)
        is_open = peak - self.bound[self.open] > self.aimed_gap * peak
        self.open = self.open[is_open]

    def sweep(self, max_sweeps: int) -> None:
        """Sweep up to ``max_sweeps`` times; compute bounds when the peak is steady.

        They are also computed after the first sweep and after the last.
        """
        peak = self.load.amax(1)
        last_cut = torch.zeros_like(self.steps)
        for swept in range(1, max_sweeps + 1):
            if not len(self.open):
                return
            at = self.open
            fraction = EXACT_FRACTION if swept <= EXACT_SWEEPS else RELAXED_FRACTION
            self.x[at], self.load[at] = level_edges(self.graph, self.x[at], self.load[at], fraction)
            self._close_certified()
            at = self.open
            new_peak = self.load[at].amax(1)
            steady = peak[at] - new_peak <= new_peak * (self.aimed_gap * STEADY_FRACTION)
            peak[at] = new_peak
            due = steady & (2 * swept >= 3 * last_cut[at])
            if swept in (1, max_sweeps):
                due = torch.ones_like(due)
            last_cut[at[due]] = swept
            self._raise_bounds(at[due])

    def _raise_bounds(self, at: torch.Tensor) -> None:
        """Raise the bounds of these instances to those of their cuts, where these are higher."""
        if len(at):
            found = compute_cut_bound(
                self.graph, self.load[at], self.w[at], self.fixed[at], self.aimed_gap
            )
            self.bound[at] = torch.maximum(self.bound[at], found)
            self._close_certified()

    def step(self, line_search: bool) -> None:
        """Make a step by potentials on the open instances."""
        at = self.open
        state = self.x[at], self.load[at], self.w[at], self.fixed[at]
        self.x[at], self.load[at] = step_by_potentials(self.graph, *state, line_search)
        self.steps[at] += 1
        self._close_certified()

    def restore(self, x: torch.Tensor, load: torch.Tensor) -> None:
        """Return to these plans where the peak has grown since."""
        worse = self.load.amax(1) > load.amax(1)
        self.x = torch.where(worse[:, None, None], x, self.x)
        self.load = torch.where(worse[:, None], load, self.load)


def _level_instances(
    graph: Graph, w: torch.Tensor, fixed: torch.Tensor, aimed_gap: float, max_steps: int
) -> _Plans:
    """Sweep and step until the gaps are within the aimed gap, or after ``max_steps`` steps."""
    plans = _Plans(graph, w, fixed, aimed_gap)
    whole_sweeps = -(-MAX_FIRST_CLASSES // max(1, len(graph.classes)))
    plans.sweep(min(MAX_FIRST_SWEEPS, whole_sweeps))
    if not len(plans.open):
        return plans
    before = plans.x.clone(), plans.load.clone()
    for number in range(1, max_steps + 1):
        plans.step(number >= FIRST_LINE_SEARCH)
        plans.sweep(MAX_LATER_SWEEPS)
        if not len(plans.open):
            break
    plans.restore(*before)
    return plans


def level_edges(
    graph: Graph, x: torch.Tensor, load: torch.Tensor, fraction: float
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
    fraction : float
        Fraction of the difference of two ranks that an edge moves; 0.5 levels them.

    Returns
    -------
    x, load : torch.Tensor
        The new ones. No instance's peak has grown if ``fraction`` is at most 1.
    """
    cells, load = x.flatten(1).clone(), load.clone()
    for low, high, first, second in graph.classes:
        here, there = load[:, first], load[:, second]
        x_low, x_high = cells[:, low], cells[:, high]
        moved = torch.minimum(torch.maximum((there - here) * fraction, -x_low), x_high)
        cells[:, low], cells[:, high] = x_low + moved, x_high - moved
        load[:, first], load[:, second] = here + moved, there - moved
    return cells.reshape(x.shape), load


def compute_cut_bound(
    graph: Graph, load: torch.Tensor, w: torch.Tensor, fixed: torch.Tensor, aimed_gap: float
) -> torch.Tensor:
    """Compute the largest bound of four sets of the fullest ranks (equation 19).

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
    aimed_gap : float
        Relative gap that is aimed at.

    Returns
    -------
    torch.Tensor
        ``[B]``, a load that no plan can beat.
    """
    peak = load.amax(1)[:, None, None]
    depths = torch.tensor(CUT_DEPTHS, dtype=load.dtype, device=load.device)
    threshold = peak - aimed_gap * peak * depths[:, None]
    inside = load.unsqueeze(1) >= threshold
    # A column lies in a set exactly if the least loaded of its ranks does.
    lowest = torch.where(graph.real, graph.at_cells(load), torch.inf).amin(2)
    confined = torch.where(lowest.unsqueeze(1) >= threshold, w.unsqueeze(1), 0.0).sum(2)
    total = torch.where(inside, fixed.unsqueeze(1), 0.0).sum(2) + confined
    return (total / inside.sum(2)).amax(1)


def _find_largest_load(
    plan: torch.Tensor, weights: torch.Tensor, fixed: torch.Tensor
) -> torch.Tensor:
    """Find the load ``[B]`` float64 of the most loaded rank under shares ``[B, G, C]``."""
    return (fixed + (weights.unsqueeze(1) * plan).sum(2)).amax(1)
