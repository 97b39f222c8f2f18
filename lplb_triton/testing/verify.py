"""Comparison of answers with those of HiGHS: feasibility, bound, optimum, gap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.balancer import Balancer
from lplb_triton.placement import Placement
from lplb_triton.problem import Problem
from lplb_triton.solution import Solution
from lplb_triton.solver import DEFAULT_TOLERANCE, solve
from lplb_triton.testing.instances import Part, draw_part

__all__ = [
    "NoOptimumError",
    "Verdict",
    "compare",
    "highs_optimum",
    "optima_of",
    "solve_counts",
    "verify",
]

Floats = NDArray[np.float64]
# Relative slack for comparing two floating-point answers.
SLACK = 1e-6


class NoOptimumError(RuntimeError):
    """HiGHS has no optimum to compare answers with."""


@dataclass
class Verdict:
    """Counts over all instances of one part, one tolerance and one way of solving."""

    tolerance: float
    from_counts: bool = False
    """Whether `Balancer.solve` was asked, which knows the placement, or `lplb_triton.solve`."""
    part: str = "random"
    """Name of the part."""
    instances: int = 0
    infeasible: int = 0
    bound_above_optimum: int = 0
    load_below_optimum: int = 0
    not_certified: int = 0
    worst_gap: float = 0.0
    max_iterations: int = 0
    """Interior-point iterations of `lplb_triton.solve`, steps by potentials of `Balancer.solve`."""
    total_iterations: int = 0

    @property
    def sound(self) -> bool:
        """Whether every plan is feasible and every certificate true."""
        return not (self.infeasible or self.bound_above_optimum or self.load_below_optimum)

    @property
    def certified(self) -> float:
        """Share of the instances that were certified at the tolerance."""
        return 1 - self.not_certified / max(self.instances, 1)

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def highs_optimum(weights: Floats, fixed: Floats, mask: NDArray[np.bool_]) -> float:
    """Optimum of one program (method.md, equation 1) by HiGHS.

    Parameters
    ----------
    weights, fixed, mask : numpy.ndarray
        ``[C]``, ``[G]``, ``[G, C]``.

    Returns
    -------
    float
        The smallest possible load of the most loaded rank, in the unit of the weights.

    Raises
    ------
    NoOptimumError
        If HiGHS reports anything but an optimum.
    """
    # SciPy is slow to import, and most processes that import this module don't need it.
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    used = (weights > 0) & mask.any(0)
    weights, mask = weights[used], mask[:, used]
    ranks, columns = mask.shape
    unit = (weights.sum() + fixed.sum()) / ranks
    if unit == 0:
        return 0.0
    rank, column = np.nonzero(mask)
    n = len(rank)
    loads = coo_matrix(
        (
            np.concatenate([weights[column] / unit, -np.ones(ranks)]),
            (
                np.concatenate([rank, np.arange(ranks)]),
                np.concatenate([np.arange(n), np.full(ranks, n)]),
            ),
        ),
        shape=(ranks, n + 1),
    )
    sums = coo_matrix((np.ones(n), (column, np.arange(n))), shape=(columns, n + 1))
    cost = np.zeros(n + 1)
    cost[-1] = 1.0
    result = linprog(
        cost,
        A_ub=loads.tocsr(),
        b_ub=-fixed / unit,
        A_eq=sums.tocsr() if columns else None,
        b_eq=np.ones(columns) if columns else None,
        method="highs",
    )
    if result.status != 0:
        raise NoOptimumError(f"HiGHS found no optimum: {result.message}")
    return float(result.fun) * float(unit)


def _judge(verdict: Verdict, problem: Problem, solution: Solution, optima: Floats) -> None:
    """Add one batch to a verdict, with loads recomputed in float64 from the shares."""
    shares = solution.shares.double().cpu()
    weights, fixed = problem.weights.double().cpu(), problem.fixed.double().cpu()
    mask = problem.mask.cpu().expand(len(weights), -1, -1)
    off = ((shares < 0) | (shares > 1) | ((shares != 0) & ~mask)).flatten(1).any(1)
    sums = torch.where(mask.any(1), shares.sum(1), 1.0)
    off |= ((sums - 1.0).abs() > SLACK).any(1)
    loads = (fixed + (weights.unsqueeze(1) * shares).sum(2)).amax(1)
    optimum = torch.from_numpy(optima)
    reported = solution.max_load.double().cpu()
    off |= (reported - loads).abs() > SLACK * loads.clamp(min=1e-300)
    bound = solution.lower_bound.double().cpu()
    iterations = solution.iterations.cpu()
    verdict.instances += len(loads)
    verdict.infeasible += int(off.sum())
    verdict.bound_above_optimum += int((bound > optimum * (1 + SLACK)).sum())
    verdict.load_below_optimum += int((optimum > reported * (1 + SLACK)).sum())
    true_gap = torch.where(loads > 0, (loads - bound) / loads.clamp(min=1e-300), 0.0)
    bad = (solution.status.cpu() != 0) | (true_gap > verdict.tolerance * (1 + 1e-3))
    verdict.not_certified += int(bad.sum())
    verdict.worst_gap = max(verdict.worst_gap, float(true_gap.max()))
    verdict.max_iterations = max(verdict.max_iterations, int(iterations.max()))
    verdict.total_iterations += int(iterations.sum())


def solve_counts(
    placement: Placement,
    counts: torch.Tensor,
    device: torch.device | str,
    tolerance: float = DEFAULT_TOLERANCE,
) -> Solution:
    """Solve batches by the kernel of `Balancer`, which starts from counts by expert.

    Parameters
    ----------
    placement : Placement
        The placement.
    counts : torch.Tensor
        ``[B, n_logical]`` integers, tokens per logical expert.
    device : torch.device or str
        Where to solve.
    tolerance : float
        Relative gap to certify.

    Returns
    -------
    Solution
        All batches, one after the other.
    """
    balancer = Balancer(placement, device=device, backend="triton", tolerance=tolerance)
    parts = [balancer.solve(row) for row in counts.to(device)]
    fields = ("shares", "max_load", "lower_bound", "gap", "iterations", "status")
    shares, *numbers = (torch.cat([getattr(part, name) for part in parts]) for name in fields)
    max_load, lower_bound, gap, iterations, status = numbers
    return Solution(shares, max_load, lower_bound, gap, iterations, status, tolerance)


def optima_of(problem: Problem) -> Floats:
    """Optima ``[B]`` of all instances by HiGHS."""
    masks = problem.mask.expand(problem.n_instances, -1, -1).numpy()
    jobs = zip(problem.weights.numpy(), problem.fixed.numpy(), masks, strict=True)
    return np.array([highs_optimum(*job) for job in jobs])


def compare(
    parts: Sequence[Part],
    *,
    tolerances: tuple[float, ...] = (1e-3, 1e-4),
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Verdict]:
    """Solve all instances of some parts and compare every one with HiGHS.

    Parameters
    ----------
    parts : sequence of lplb_triton.testing.instances.Part
        What to solve.
    tolerances, backend, device, dtype, progress
        As for `verify`.

    Returns
    -------
    list of Verdict
        Of each part in turn, one per tolerance for `lplb_triton.solve`, and with the Triton
        kernels one per tolerance for `Balancer.solve`. The latter are the only ones for parts with
        placements that the kernel of `lplb_triton.solve` does not take.
    """
    found = []
    for part in parts:
        ways = (False, True) if part.as_problems else (True,)
        if backend != "triton":
            ways = (False,)
        verdicts = [Verdict(tolerance, way, part.name) for way in ways for tolerance in tolerances]
        found += verdicts
        for instance in part.instances:
            problem = instance.problem
            optima = optima_of(problem)
            on_device = None if ways == (True,) else problem.to(device)
            for verdict in verdicts:
                if on_device is None or verdict.from_counts:
                    solution = solve_counts(
                        instance.placement, instance.counts, device, verdict.tolerance
                    )
                else:
                    solution = solve(
                        on_device, tolerance=verdict.tolerance, backend=backend, dtype=dtype
                    )
                _judge(verdict, problem, solution, optima)
            if progress is not None:
                progress(instance.shape, problem.n_instances)
    return found


def verify(
    n_instances: int,
    *,
    seed: int = 0,
    tolerances: tuple[float, ...] = (1e-3, 1e-4),
    backend: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Verdict]:
    """Solve random programs and compare every one with HiGHS.

    Parameters
    ----------
    n_instances : int
        Instances over all shapes and families of `lplb_triton.testing.instances`.
    seed : int
        Seed of the corpus.
    tolerances : tuple of float
        Each gives a row.
    backend, dtype
        As for `lplb_triton.solve`.
    device : str
        Where to solve.
    progress : callable or None
        Called with each placement's name and number of instances when it is done.

    Returns
    -------
    list of Verdict
        As for `compare`.
    """
    return compare(
        [draw_part(n_instances, seed)],
        tolerances=tolerances,
        backend=backend,
        device=device,
        dtype=dtype,
        progress=progress,
    )
