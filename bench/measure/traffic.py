"""Real traffic: every batch checked against HiGHS, then timed."""

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
from lplb_triton.bench.measure.timer import Row, Timer, on_cpu, statistics
from lplb_triton.bench.measure.workload import check_plan, run_solver

__all__ = []


@dataclass(frozen=True, eq=False)
class Checked:
    """A load set whose every plan passed its gate.

    Attributes
    ----------
    prepared
        What was checked.
    balancer
        With its placement; a kernel for these sizes is compiled.
    iterations
        Of each batch, steps by potentials: the most of its groups.
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


def check(prepared: Prepared, device: torch.device | str, tolerance: float) -> Checked:
    """Solve every batch and hold plan and bound against HiGHS.

    A plan that is feasible, with a true bound and a gap that it admits is wide, is counted.

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
        solution = on_cpu(balancer.solve(counts.to(device)))
        problem = placement.problem(counts)
        for group, optimum in enumerate(prepared.optima[index]):
            name = f"{prepared.case}, {loads.kind}, {loads.name}, batch {index}, group {group}"
            at = slice(group, group + 1)
            mask = problem.mask if len(problem.mask) == 1 else problem.mask[at]
            one = Problem(problem.weights[at], problem.fixed[at], mask)
            check_plan(one, _part(solution, at), float(optimum), name, certified=False)
        iterations.append(int(solution.iterations.max()))
        worst_gap = max(worst_gap, float(solution.gap.max()))
        uncertified += bool((solution.status != Status.CERTIFIED).any())
    return Checked(prepared, balancer, iterations, worst_gap, uncertified)


def _part(solution: Solution, at: slice) -> Solution:
    """Take some instances of a solution."""
    return Solution(
        solution.shares[at],
        solution.max_load[at],
        solution.lower_bound[at],
        solution.gap[at],
        solution.iterations[at],
        solution.status[at],
        solution.tolerance,
    )


def row(checked: Checked, timer: Timer) -> Row:
    """Time every batch of a checked load set.

    Parameters
    ----------
    checked
        From `check`.
    timer
        `lplb_triton.bench.measure.timer.GraphTimer` on a GPU.

    Returns
    -------
    dict
        ``times_us`` and ``iterations`` by batch, and what `pooled` makes of them.
    """
    batches = checked.prepared.loads.batches.to(checked.balancer.device)
    counts = torch.zeros_like(batches[0])
    launch = partial(run_solver(checked.balancer), counts)
    return _row(checked, timer.by_batch(launch, counts, batches))


def _row(checked: Checked, times: list[float]) -> Row:
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
    return {**single, **_summary([single])}


def run_row(checked: Checked, timer: Timer, seed: int) -> Row:
    """Time `Balancer.run` on every batch of a checked load set: count, solve and select.

    Parameters
    ----------
    checked
        From `check`; its batches have equally many tokens.
    timer
        `lplb_triton.bench.measure.timer.GraphTimer` on a GPU.
    seed
        Of the order of the ids.

    Returns
    -------
    dict
        As from `row`.

    Raises
    ------
    WrongAnswerError
        If ids are no copies of their experts or miss the plan; nothing is timed then.
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
    return _row(checked, timer.by_batch(partial(balancer.run, idx), idx, batches))


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Put the load sets of each case and kind together.

    Parameters
    ----------
    rows
        From `row`.

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
        {**dict(zip(sizes, key, strict=True)), **_summary(parts)} for key, parts in together.items()
    ]


def _summary(rows: Sequence[Row]) -> Row:
    needed = np.concatenate([each["iterations"] for each in rows]).clip(max=len(STEPS) - 1)
    times = np.concatenate([each["times_us"] for each in rows])
    found = np.bincount(needed, minlength=len(STEPS)) / len(needed)
    medians = [
        float(np.median(times[needed == n])) if found[n] else None for n in range(len(STEPS))
    ]
    return {
        "load_sets": len(rows),
        "batches": len(needed),
        "us": statistics(times.tolist()),
        "steps": dict(zip(STEPS, found.tolist(), strict=True)),
        "steps_us": dict(zip(STEPS, medians, strict=True)),
        "worst_gap": max(each["worst_gap"] for each in rows),
        "uncertified": sum(each["uncertified"] for each in rows),
    }
