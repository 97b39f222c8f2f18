"""Time the solve of one group, and of several groups in one launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import lplb_triton
from lplb_triton import Balancer, Placement, topologies
from lplb_triton.bench.measure.timer import (
    Launch,
    Timer,
    WrongAnswerError,
    compute_statistics,
    time_in_rounds,
)
from lplb_triton.bench.measure.workload import (
    PUBLISHED_FAMILIES,
    SEED,
    Workload,
    check_plan,
    get_instance,
    make_solver,
)
from lplb_triton.bench.types import Row
from lplb_triton.testing.instances import draw_loads, shape_placement

__all__ = [
    "BATCHES_PER_FAMILY",
]


# Instances of each family for which `lplb_triton.solve` is timed too.
PROBLEM_PER_FAMILY = 5

# Batches of each load family for the pipeline.
BATCHES_PER_FAMILY = 4


def _is_early(index: int, workload: Workload, per_family: int = PROBLEM_PER_FAMILY) -> bool:
    """Say whether an instance is among the first few of its family."""
    return workload.families[:index].count(workload.families[index]) < per_family


def time_solve(
    workload: Workload,
    timer: Timer,
    device: torch.device | str,
    *,
    tolerance: float,
    progress: Callable[[], None] | None = None,
) -> Row:
    """Time the LP of one shape, from counts by expert to a plan, after checking every plan.

    Parameters
    ----------
    workload : Workload
        Instances and optima.
    timer : Timer
        `GraphTimer` on a GPU.
    device : torch.device or str
        Where to solve.
    tolerance : float
        Certified relative gap.
    progress : callable or None
        Called once per instance.

    Returns
    -------
    dict
        ``us`` are times by instance of the solve that `Balancer.run` does, ``rotated_us`` the mean
        over one graph of all instances, ``problem_us`` times of `lplb_triton.solve` on some
        instances.

    Raises
    ------
    WrongAnswerError
        If a plan fails its check; nothing is timed then.
    """
    balancer = Balancer(workload.placement, device=device, tolerance=tolerance)
    counts = list(workload.counts.to(device))
    iterations, gaps = [], []
    for index, row in enumerate(counts):
        solution = balancer.solve(row)
        name = f"{workload.shape}, instance {index} ({workload.families[index]})"
        check_plan(get_instance(workload, index), solution, workload.optima[index], name)
        iterations.append(int(solution.iterations[0]))
        gaps.append(float(solution.gap[0]))
    early = [index for index in range(len(workload)) if _is_early(index, workload)]
    solve = partial(lplb_triton.solve, tolerance=tolerance)
    problems = [workload.single(index, device) for index in early]
    for index, problem in zip(early, problems, strict=True):
        name = f"{workload.shape}, instance {index} as a Problem"
        check_plan(get_instance(workload, index), solve(problem), workload.optima[index], name)

    solver = make_solver(balancer)
    launches = [partial(solver, row) for row in counts]
    rotated = timer.time_rotation(launches)
    times = time_in_rounds(timer, launches, rotated, progress)
    by_family = {
        family: float(
            np.median([t for t, f in zip(times, workload.families, strict=True) if f == family])
        )
        for family in dict.fromkeys(workload.families)
    }
    return {
        "shape": workload.shape,
        "ranks": workload.placement.group_size,
        "columns": workload.placement.max_columns,
        "instances": len(workload),
        "us": compute_statistics(times),
        "rotated_us": rotated,
        "by_family_us": by_family,
        "problem_us": compute_statistics(
            time_in_rounds(timer, [partial(solve, problem) for problem in problems], rotated)
        ),
        "iterations": {"mean": float(np.mean(iterations)), "max": max(iterations)},
        "worst_gap": max(gaps),
        "highs_us": workload.highs_us,
    }


def time_groups(
    timer: Timer,
    device: torch.device | str,
    *,
    tolerance: float,
    per_family: int,
    n_group: int = 8,
    seed: int = SEED,
) -> Row:
    """Time several groups of cube in one launch against the slowest of them alone.

    Parameters
    ----------
    timer, device, tolerance
        As for `time_solve`.
    per_family : int
        Batches of each load family; every batch has ``n_group`` groups.
    n_group : int
        Groups in one launch.
    seed : int
        Seed of the loads.

    Returns
    -------
    dict
        ``together_us``, ``slowest_alone_us`` and ``ratio`` over the batches.
    """
    rng = np.random.default_rng(seed)
    one = shape_placement("cube", rng)
    many = Placement.from_topology(
        topologies.cube(), n_group * one.n_physical, n_group * one.n_logical, n_group * one.ep_size
    )
    together = Balancer(many, device=device, tolerance=tolerance)
    alone = Balancer(one, device=device, tolerance=tolerance)
    solve, solve_alone = make_solver(together), make_solver(alone)
    both: list[Launch] = []
    singles: list[Launch] = []
    for family in (f for f in PUBLISHED_FAMILIES for _ in range(per_family)):
        rows = [draw_loads(family, rng, one.n_logical).to(device) for _ in range(n_group)]
        counts = torch.cat(rows)
        solution = together.solve(counts)
        for group, row in enumerate(rows):
            solo = alone.solve(row)
            if int(solution.status[group]) or int(solo.status[0]):
                raise WrongAnswerError(f"cube, group {group} of {n_group}: not certified")
            here, there = float(solution.max_load[group]), float(solo.max_load[0])
            if abs(here - there) > 2 * tolerance * there:
                raise WrongAnswerError(
                    f"cube, group {group} of {n_group}: largest load {here:.8g}, alone {there:.8g}"
                )
        both.append(partial(solve, counts))
        singles += [partial(solve_alone, row) for row in rows]
    guess = timer.time_rotation(both)
    together_us = time_in_rounds(timer, both, guess)
    alone_us = np.reshape(time_in_rounds(timer, singles, guess), (-1, n_group))
    slowest = alone_us.max(axis=1).tolist()
    return {
        "groups": n_group,
        "batches": len(both),
        "together_us": compute_statistics(together_us),
        "slowest_alone_us": compute_statistics(slowest),
        "ratio": compute_statistics([a / b for a, b in zip(together_us, slowest, strict=True)]),
    }
