"""Check every batch of a load set against HiGHS, then time it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lplb_triton import Balancer, Problem, Solution, Status
from lplb_triton.bench.measure.cases import STEPS
from lplb_triton.bench.measure.loads import TOP_K
from lplb_triton.bench.measure.pipeline import check_ids
from lplb_triton.bench.measure.preparation import Prepared
from lplb_triton.bench.measure.timer import Timer, compute_statistics, copy_to_cpu
from lplb_triton.bench.measure.workload import check_plan, make_solver
from lplb_triton.bench.types import Row

__all__ = []


@dataclass(frozen=True, eq=False)
class Checked:
    """A load set whose plans have all passed their check.

    Attributes
    ----------
    prepared
        What was checked.
    balancer
        With its placement; a kernel for these sizes is compiled.
    iterations
        Steps by potentials of each batch: those of the group with the most.
    worst_gap
        Largest certified relative gap.
    uncertified
        Batches with a group that was not certified.
    """

    prepared: Prepared
    balancer: Balancer
    iterations: list[int]
    worst_gap: float
    uncertified: int


def check_plans(prepared: Prepared, device: torch.device | str, tolerance: float) -> Checked:
    """Solve every batch and compare plan and bound with HiGHS's optimum.

    A feasible plan with a true bound that reports a gap wider than the tolerance is no wrong
    answer; such batches are counted.

    Parameters
    ----------
    prepared
        Placement and optima.
    device
        Where to solve.
    tolerance
        Certified relative gap.

    Returns
    -------
    Checked

    Raises
    ------
    WrongAnswerError
        If a plan or a bound is wrong; nothing is timed then.
    """
    placement, loads = prepared.placement, prepared.loads
    balancer = Balancer(placement, device=device, tolerance=tolerance)
    iterations, worst_gap, uncertified = [], 0.0, 0
    for index, counts in enumerate(loads.batches):
        solution = copy_to_cpu(balancer.solve(counts.to(device)))
        problem = placement.problem(counts)
        for group, optimum in enumerate(prepared.optima[index]):
            name = f"{prepared.case}, {loads.kind}, {loads.name}, batch {index}, group {group}"
            at = slice(group, group + 1)
            mask = problem.mask if len(problem.mask) == 1 else problem.mask[at]
            one = Problem(problem.weights[at], problem.fixed[at], mask)
            check_plan(one, _select_group(solution, at), float(optimum), name, certified=False)
        iterations.append(int(solution.iterations.max()))
        worst_gap = max(worst_gap, float(solution.gap.max()))
        uncertified += bool((solution.status != Status.CERTIFIED).any())
    return Checked(prepared, balancer, iterations, worst_gap, uncertified)


def _select_group(solution: Solution, at: slice) -> Solution:
    """Return the instances in a slice of a solution."""
    return Solution(
        solution.shares[at],
        solution.max_load[at],
        solution.lower_bound[at],
        solution.gap[at],
        solution.iterations[at],
        solution.status[at],
        solution.tolerance,
    )


def time_solves(checked: Checked, timer: Timer) -> Row:
    """Time every batch of a checked load set.

    Parameters
    ----------
    checked
        From `check_plans`.
    timer
        `lplb_triton.bench.measure.timer.GraphTimer` on a GPU.

    Returns
    -------
    dict
        ``times_us`` and ``iterations`` by batch, and what `pool_rows` makes of them.
    """
    batches = checked.prepared.loads.batches.to(checked.balancer.device)
    counts = torch.zeros_like(batches[0])
    launch = partial(make_solver(checked.balancer), counts)
    return _make_row(checked, timer.time_batches(launch, counts, batches))


def _make_row(checked: Checked, times: list[float]) -> Row:
    case, loads = checked.prepared.case, checked.prepared.loads
    single = {
        "experts": case.experts,
        "ep": case.ep,
        "placement": case.placement,
        "slots": case.slots,
        "kind": loads.kind,
        "loads": loads.name,
        "worst_gap": checked.worst_gap,
        "uncertified": checked.uncertified,
        "times_us": times,
        "iterations": checked.iterations,
    }
    return {**single, **_summarize([single])}


def time_runs(checked: Checked, timer: Timer, seed: int) -> Row:
    """Time `Balancer.run` on every batch of a checked load set: count, solve and select.

    Parameters
    ----------
    checked
        From `check_plans`; its batches have equally many tokens.
    timer
        `lplb_triton.bench.measure.timer.GraphTimer` on a GPU.
    seed
        Seed of the order of the ids.

    Returns
    -------
    dict
        As from `time_solves`.

    Raises
    ------
    WrongAnswerError
        If ids are no copies of their experts or rank loads differ from the plan; nothing is
        timed then.
    """
    balancer, placement = checked.balancer, checked.prepared.placement
    rng = np.random.default_rng(seed)
    ids = [
        rng.permutation(np.repeat(np.arange(len(counts)), counts)).reshape(-1, TOP_K)
        for counts in checked.prepared.loads.batches.numpy()
    ]
    batches = torch.from_numpy(np.stack(ids)).to(balancer.device)
    for idx in batches:
        counts, _ = balancer.count(idx)
        check_ids(placement, idx, balancer.run(idx), balancer.solve(counts))
    idx = batches[0].clone()
    return _make_row(checked, timer.time_batches(partial(balancer.run, idx), idx, batches))


def pool_rows(rows: Sequence[Row]) -> list[Row]:
    """Summarize the load sets of each case and kind together.

    Parameters
    ----------
    rows
        From `time_solves`.

    Returns
    -------
    list of dict
        In order of first appearance: ``us`` are statistics over all batches, ``steps`` the share
        of batches that needed 0, 1, 2, 3 or more steps by potentials, and ``steps_us`` the median
        time of these, or None where there are none.
    """
    sizes = ("experts", "ep", "placement", "slots", "kind")
    together: dict[tuple[Any, ...], list[Row]] = {}
    for each in rows:
        together.setdefault(tuple(each[name] for name in sizes), []).append(each)
    return [
        {**dict(zip(sizes, key, strict=True)), **_summarize(parts)}
        for key, parts in together.items()
    ]


def _summarize(rows: Sequence[Row]) -> Row:
    needed = np.concatenate([each["iterations"] for each in rows]).clip(max=len(STEPS) - 1)
    times = np.concatenate([each["times_us"] for each in rows])
    found = np.bincount(needed, minlength=len(STEPS)) / len(needed)
    medians = [
        float(np.median(times[needed == n])) if found[n] else None for n in range(len(STEPS))
    ]
    return {
        "load_sets": len(rows),
        "batches": len(needed),
        "us": compute_statistics(times.tolist()),
        "steps": dict(zip(STEPS, found.tolist(), strict=True)),
        "steps_us": dict(zip(STEPS, medians, strict=True)),
        "worst_gap": max(each["worst_gap"] for each in rows),
        "uncertified": sum(each["uncertified"] for each in rows),
    }
