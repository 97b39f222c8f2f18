"""The torch twin of the interior-point kernel in kernels/solve/interior_point.py.

Equation numbers refer to docs/method.md. ``B`` is the number of instances, ``G`` the number of
ranks and ``C`` the number of columns. Loads are in units of an instance's mean rank load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lplb_triton.problem import Problem
from lplb_triton.reference.certificate import (
    certify,
    check_loads,
    choose_aimed_gap,
    choose_bound_allowance,
    make_plan,
)
from lplb_triton.solution import Solution

__all__ = [
    "LIGHT_FRACTION",
    "MIN_CENTERING",
    "REGULARIZATION",
    "START_CENTERING",
    "START_MARGIN",
    "STEP_FACTOR",
    "solve",
]

# Start and step of the interior-point method (equations 4 and 9).
START_MARGIN = 0.1
START_CENTERING = 0.03
STEP_FACTOR = 0.99
MIN_CENTERING = 0.01
REGULARIZATION = 0.03
# Columns whose total load is under this part of the tolerance stay split evenly (equation 10).
LIGHT_FRACTION = 0.05


def solve(problem: Problem, tolerance: float, max_iterations: int, dtype: torch.dtype) -> Solution:
    """Solve a batch of instances by a primal-dual interior-point method (equations 1 to 11).

    Torch's settings in the caller, such as autocast, make no difference, and nothing has a
    gradient.

    Parameters
    ----------
    problem : Problem
        The instances.
    tolerance : float
        Relative gap to reach.
    max_iterations : int
        Bound on the iterations.
    dtype : torch.dtype
        float32 or float64, the arithmetic; the certificate is evaluated in float64.

    Returns
    -------
    Solution
        ``max_load``, ``lower_bound`` and ``gap`` in float64.
    """
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        return _solve(problem, tolerance, max_iterations, dtype)


def _solve(problem: Problem, tolerance: float, max_iterations: int, dtype: torch.dtype) -> Solution:
    mask = problem.mask.expand(problem.n_instances, -1, -1)
    n_copies = mask.sum(1)
    weights, fixed, unit, invalid = check_loads(problem, n_copies)
    w, f = (weights / unit).to(dtype), (fixed / unit).to(dtype)
    programs = _Programs.build(w, f, mask, n_copies, tolerance)
    even_load = programs.find_loads(programs.even)
    incumbent = _Incumbent.start(programs, even_load, n_copies, problem.start)
    point = _start_point(programs, even_load)
    n_products = programs.active.sum((1, 2)) + problem.group_size
    iterations = torch.zeros(len(w), dtype=torch.int32, device=w.device)
    allowance = choose_bound_allowance(dtype)
    aimed_gap = choose_aimed_gap(tolerance - allowance, problem.group_size)
    for _ in range(max_iterations):
        running = incumbent.max_load - incumbent.bound > aimed_gap * incumbent.max_load
        if not bool(running.any()):
            break
        iterations += running.int()
        step = _find_step(programs, point, n_products)
        # Equation 9: the full step, with what is negative cut off, gives a plan and a bound.
        incumbent.update_plan(programs, point.x + step.x, running)
        bound = _compute_dual_bound((point.y + step.y).clamp(min=0.0), f, w, mask)
        incumbent.bound = torch.where(running, torch.fmax(incumbent.bound, bound), incumbent.bound)
        point = _take_step(point, step, running)
    lower = incumbent.bound.double() * unit[:, 0] * (1.0 - allowance)
    return certify(incumbent.plan, mask, weights, fixed, lower, iterations, invalid, tolerance)


@dataclass(frozen=True, eq=False)
class _Programs:
    """The programs of a batch, and which of their columns the method divides among ranks."""

    w: torch.Tensor
    """``[B, C]`` float, weight of each column."""
    fixed: torch.Tensor
    """``[B, G]`` float, load of each rank whatever the plan."""
    mask: torch.Tensor
    """``[B, G, C]`` bool, where a copy is."""
    even: torch.Tensor
    """``[B, G, C]`` float, the even split."""
    active: torch.Tensor
    """``[B, G, C]`` bool, copies whose shares are variables; other columns stay split evenly."""
    w_active: torch.Tensor
    """``[B, G, C]`` float, weights at the active copies, else 0."""
    base: torch.Tensor
    """``[B, G]`` float, load of each rank from everything but the active copies."""

    @classmethod
    def build(
        cls,
        w: torch.Tensor,
        fixed: torch.Tensor,
        mask: torch.Tensor,
        n_copies: torch.Tensor,
        tolerance: float,
    ) -> _Programs:
        """Leave out columns with one copy and light ones (equation 10)."""
        even = mask.to(w.dtype) / n_copies.clamp(min=1).to(w.dtype)[:, None]
        light = w <= LIGHT_FRACTION * tolerance / max(w.shape[1], 1)
        active = mask & (~light & (n_copies > 1)).unsqueeze(1)
        w_active = torch.where(active, w.unsqueeze(1), 0.0)
        base = fixed + (torch.where(active, 0.0, w.unsqueeze(1)) * even).sum(2)
        return cls(w, fixed, mask, even, active, w_active, base)

    def find_loads(self, plan: torch.Tensor) -> torch.Tensor:
        """Find the loads ``[B, G]`` under a plan whose inactive columns are split evenly."""
        return self.base + (self.w_active * plan).sum(2)


@dataclass(eq=False)
class _Incumbent:
    """The best plan and the best bound of each instance so far."""

    plan: torch.Tensor
    """``[B, G, C]`` float."""
    max_load: torch.Tensor
    """``[B]`` float, load of the most loaded rank under the plan."""
    bound: torch.Tensor
    """``[B]`` float, a load that no plan can beat."""

    @classmethod
    def start(
        cls,
        programs: _Programs,
        even_load: torch.Tensor,
        n_copies: torch.Tensor,
        start: torch.Tensor | None,
    ) -> _Incumbent:
        """Take the even split or the caller's start, and the mean or the largest pinned load."""
        w, fixed, mask = programs.w, programs.fixed, programs.mask
        plan, max_load = programs.even, even_load.amax(1)
        if start is not None:
            start = make_plan(start, mask, programs.even)
            start_load = (fixed + (w.unsqueeze(1) * start).sum(2)).amax(1)
            better = start_load < max_load
            plan = torch.where(better[:, None, None], start, plan)
            max_load = torch.where(better, start_load, max_load)
        pinned = fixed + torch.where(mask & (n_copies == 1)[:, None], w[:, None], 0.0).sum(2)
        bound = torch.maximum(even_load.mean(1), pinned.amax(1))
        return cls(plan, max_load, bound)

    def update_plan(self, programs: _Programs, x: torch.Tensor, running: torch.Tensor) -> None:
        """Make plans of shares ``[B, G, C]`` and keep those that are better, where running."""
        active = programs.active
        plan = torch.where(active, x.clamp(min=0.0), 0.0)
        plan = torch.where(active, plan / plan.sum(1, keepdim=True), programs.even)
        max_load = programs.find_loads(plan).amax(1)
        better = running & (max_load < self.max_load)
        self.plan = torch.where(better[:, None, None], plan, self.plan)
        self.max_load = torch.where(better, max_load, self.max_load)


class _Point(NamedTuple):
    """Variables of the optimality conditions (equation 2), or changes of them."""

    x: torch.Tensor
    """``[B, G, C]`` shares."""
    z: torch.Tensor
    """``[B, G, C]`` multipliers of ``x >= 0``."""
    s: torch.Tensor
    """``[B, G]`` slack of each rank's load."""
    y: torch.Tensor
    """``[B, G]`` multipliers of the slack."""


def _start_point(programs: _Programs, even_load: torch.Tensor) -> _Point:
    """Start from the even split, with y uniform and every x z a part of the mean of s y.

    This is equation 4.
    """
    max_load = even_load.amax(1)
    t = max_load + START_MARGIN * (max_load - even_load.mean(1)).clamp(min=1e-6)
    s = t[:, None] - even_load
    y = torch.full_like(s, 1.0 / s.shape[1])
    x = torch.where(programs.active, programs.even, 1.0)
    z = START_CENTERING * (s * y).mean(1)[:, None, None] / x
    return _Point(x, z, s, y)


class _NewtonSystem:
    """The linear system of one interior-point iterate, for a batch of instances."""

    def __init__(self, programs: _Programs, point: _Point) -> None:
        x, z, s, y = point
        tiny = torch.finfo(x.dtype).tiny
        self.point, self.w, self.active = point, programs.w.unsqueeze(1), programs.active
        self.d_copy = torch.where(self.active, x / z, 0.0)
        self.d_column = self.d_copy.sum(1, keepdim=True).clamp(min=tiny)
        self.wd = self.w * self.d_copy
        # Equation 5 has the off-diagonal first, and the diagonal from its row sums, so that
        # nothing is subtracted.
        v = self.wd / self.d_column.sqrt()
        # The product is float64, which autocast and the precision set for float32 leave alone.
        off = (v.double() @ v.double().mT).to(v.dtype)
        off.diagonal(dim1=-2, dim2=-1).zero_()
        diagonal = off.sum(2) + s / y
        # Equation 7: adding rho * ones changes nothing, since dy sums to 0.
        rho = REGULARIZATION * diagonal.amax(1)
        matrix = torch.diag_embed(diagonal) - off + rho[:, None, None]
        self.factor, _ = torch.linalg.cholesky_ex(matrix)

    def average_columns(self, value: torch.Tensor) -> torch.Tensor:
        """Average values over the copies of each column, weighted by D: ``[B, 1, C]``."""
        return (self.d_copy * value).sum(1, keepdim=True) / self.d_column

    def solve(self, target_xz: torch.Tensor, target_sy: torch.Tensor) -> _Point:
        """Solve equation 5 and return the direction of equation 6."""
        q = torch.where(self.active, target_xz / self.point.x, 0.0)
        q_mean = self.average_columns(q)
        rhs = (self.wd * (q - q_mean)).sum(2) + target_sy / self.point.y
        both = torch.stack([rhs, torch.ones_like(rhs)], dim=2)
        u, v = torch.cholesky_solve(both, self.factor).unbind(2)
        dt = u.sum(1, keepdim=True) / v.sum(1, keepdim=True)
        dy = u - dt * v
        slope = self.w * (dy.unsqueeze(2) - self.average_columns(dy.unsqueeze(2).expand_as(q)))
        dx = self.d_copy * (q - q_mean - slope)
        dz = torch.where(self.active, slope + q_mean, 0.0)
        ds = dt - (self.w * dx).sum(2)
        return _Point(dx, dz, ds, dy)


def _find_step(programs: _Programs, point: _Point, n_products: torch.Tensor) -> _Point:
    """Find the direction of Mehrotra's predictor and corrector (equation 8).

    ``n_products`` ``[B]`` int is the number of complementary products of each instance.
    """
    x, z, s, y = point
    active = programs.active
    system = _NewtonSystem(programs, point)
    xz, sy = torch.where(active, x * z, 0.0), s * y
    mu = (xz.sum((1, 2)) + sy.sum(1)) / n_products
    affine_step = system.solve(-xz, -sy)
    dx, dz, ds, dy = affine_step
    primal, dual = _find_step_lengths(point, affine_step, 1.0)
    xz_affine = (x + primal[:, None, None] * dx) * (z + dual[:, None, None] * dz)
    sy_affine = (s + primal[:, None] * ds) * (y + dual[:, None] * dy)
    affine = torch.where(active, xz_affine, 0.0).sum((1, 2)) + sy_affine.sum(1)
    mu_affine = affine / n_products
    target = mu * ((mu_affine / mu) ** 4).clamp(min=MIN_CENTERING, max=1.0)
    return system.solve(target[:, None, None] - xz - dx * dz, target[:, None] - sy - ds * dy)


def _find_step_lengths(
    point: _Point, step: _Point, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the primal and dual step, a factor of the longest, at most 1: ``[B]`` (equation 9)."""
    primal = _find_longest_step((point.x, step.x), (point.s, step.s))
    dual = _find_longest_step((point.z, step.z), (point.y, step.y))
    return (factor * primal).clamp(max=1.0), (factor * dual).clamp(max=1.0)


def _find_longest_step(*pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Find the longest step ``[B]`` at which all values stay non-negative, given their changes."""
    rates = [torch.where(dv < 0, -dv / v, 0.0).flatten(1).amax(1) for v, dv in pairs]
    return 1.0 / torch.stack(rates).amax(0).clamp(min=1e-30)


def _take_step(point: _Point, step: _Point, running: torch.Tensor) -> _Point:
    """Step short of the boundary (equation 9); a certified instance stays where it is."""
    primal, dual = _find_step_lengths(point, step, STEP_FACTOR)
    primal, dual = torch.where(running, primal, 0.0), torch.where(running, dual, 0.0)
    return _Point(
        torch.where(running[:, None, None], point.x + primal[:, None, None] * step.x, point.x),
        torch.where(running[:, None, None], point.z + dual[:, None, None] * step.z, point.z),
        torch.where(running[:, None], point.s + primal[:, None] * step.s, point.s),
        torch.where(running[:, None], point.y + dual[:, None] * step.y, point.y),
    )


def _compute_dual_bound(
    y: torch.Tensor, fixed: torch.Tensor, w: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Evaluate equation 3 at ``y / sum(y)``, ``[B]``."""
    y = y / y.sum(1, keepdim=True)
    cheapest = torch.where(mask, y.unsqueeze(2), torch.inf).amin(1)
    return (y * fixed).sum(1) + torch.where(w > 0, w * cheapest, 0.0).sum(1)
