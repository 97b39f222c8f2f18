"""Time other methods on the same programs, and check their answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import topologies
from lplb_triton.bench.measure.timer import Launch, Timer, compute_statistics, time_in_rounds
from lplb_triton.bench.measure.workload import Workload
from lplb_triton.bench.types import Floats, Row

__all__ = []


# A peer's answer counts as infeasible if a constraint is off by more than this part of the
# largest number in the program.
FEASIBLE = 1e-3

MAX_SWEEPS = 4096


def time_peers(
    workload: Workload,
    timer: Timer,
    device: torch.device | str,
    *,
    tolerance: float,
    max_sweeps: int = MAX_SWEEPS,
    progress: Callable[[], None] | None = None,
) -> Row:
    """Time the peers on the instances of `time_solve`, and count their bad answers.

    Parameters
    ----------
    workload, timer, device, tolerance, progress
        As for `time_solve`; an answer is inexact if its gap to the optimum is wider than the
        tolerance.
    max_sweeps : int
        Limit for edge balancing.

    Returns
    -------
    dict
        By peer, or a string that says why there is nothing to time.
    """
    row: Row = {"shape": workload.shape, "instances": len(workload)}
    # Imported here: everything else in this module runs without Triton.
    from lplb_triton.bench import peers

    try:
        peers.find_copy_ranks(workload.problem.mask[0])
    except ValueError as error:
        reason = str(error)
        return {**row, "affine_scaling": reason, "edge_balancing": reason, "lplb": reason}
    row["affine_scaling"] = _time_affine_scaling(workload, timer, device, tolerance)
    row["edge_balancing"] = _time_edge_balancing(workload, timer, device, tolerance, max_sweeps)
    row["lplb"] = _time_lplb(workload, timer, device)
    if progress is not None:
        progress()
    return row


def _compute_largest_loads(workload: Workload, first_shares: torch.Tensor) -> Floats:
    """Compute the largest rank load when the first copies take these shares ``[B, C]``."""
    from lplb_triton.bench import peers

    weights = workload.problem.weights
    first, second = peers.find_copy_ranks(workload.problem.mask[0])
    used = first >= 0
    on_first = torch.where(used, first_shares.double().cpu(), 0.0) * weights
    loads = workload.problem.fixed.clone()
    loads.index_add_(1, first[used], on_first[:, used])
    loads.index_add_(1, second[used], (weights - on_first)[:, used])
    largest: Floats = loads.amax(1).numpy()
    return largest


def _compute_gaps(workload: Workload, first_shares: torch.Tensor) -> Floats:
    """Compute relative gaps to HiGHS's optimum; infinite for shares that are not finite."""
    largest = _compute_largest_loads(workload, first_shares)
    gaps: Floats = np.full(len(workload), np.inf)
    finite = np.isfinite(largest)
    gaps[finite] = 1 - workload.optima[finite] / np.maximum(largest[finite], 1e-300)
    return gaps


def _time_affine_scaling(
    workload: Workload, timer: Timer, device: torch.device | str, tolerance: float
) -> Row | str:
    from lplb_triton.bench import peers

    try:
        peer = peers.AffineScaling(workload.problem.mask[0], device)
    except ValueError as error:
        return str(error)
    weights, fixed = workload.loads(device)
    x = peer.solve(weights, fixed).double().cpu()
    infeasible = find_largest_violations(workload, x) > FEASIBLE
    columns = workload.placement.max_columns
    inexact = ~infeasible & (_compute_gaps(workload, x[:, :columns].clamp(0, 1)) > tolerance)
    launches = _make_launches(peer.solve, weights, fixed)
    rotated = timer.time_rotation(launches)
    return {
        "us": compute_statistics(time_in_rounds(timer, launches, rotated)),
        "rotated_us": rotated,
        "infeasible": int(infeasible.sum()),
        "inexact": int(inexact.sum()),
    }


def find_largest_violations(workload: Workload, x: torch.Tensor) -> Floats:
    """Find the largest violation of each standard form, in units of its largest number.

    ``x`` is the answer of `peers.AffineScaling`; where it is not finite, the violation is infinite.
    """
    from lplb_triton.bench import peers

    weights, fixed = workload.problem.weights, workload.problem.fixed
    first, second = peers.find_copy_ranks(workload.problem.mask[0])
    columns, ranks = weights.shape[1], fixed.shape[1]
    unit = torch.maximum(weights.amax(1), fixed.amax(1)).clamp(min=1e-300).unsqueeze(1)
    shares = x[:, : 2 * columns].reshape(-1, 2, columns)
    slack, top = x[:, 2 * columns : 2 * columns + ranks], x[:, [2 * columns + ranks]]
    loads = fixed / unit
    used = first >= 0
    for ends, part in ((first, shares[:, 0]), (second, shares[:, 1])):
        loads.index_add_(1, ends[used], (part * weights / unit)[:, used])
    off = torch.cat([loads + slack - top, shares.sum(1) - 1.0], 1).abs()
    worst = torch.maximum(off.amax(1), -x.amin(1))
    violations: Floats = torch.where(x.isfinite().all(1), worst, torch.inf).numpy()
    return violations


def _make_launches(
    solve: Callable[..., object], weights: torch.Tensor, fixed: torch.Tensor, *more: torch.Tensor
) -> list[Launch]:
    """Make one launch per instance, and run it once: its alignment may need a new compilation."""
    tables = (weights, fixed, *more)
    launches: list[Launch] = [
        partial(solve, *(table[index : index + 1] for table in tables))
        for index in range(len(weights))
    ]
    for launch in launches:
        launch()
    return launches


def find_smallest_sweeps(
    reached: Callable[[NDArray[np.int64]], NDArray[np.bool_]], n: int, limit: int
) -> NDArray[np.int64]:
    """Find the smallest number of sweeps of each instance that reaches the gap.

    Parameters
    ----------
    reached : callable
        Takes ``[n]`` numbers of sweeps, says for each instance whether they are enough. More
        sweeps never do worse.
    n : int
        Number of instances.
    limit : int
        Most sweeps to try.

    Returns
    -------
    numpy.ndarray
        int64 [n]; -1 where ``limit`` is not enough.
    """
    # ``low - 1`` sweeps are too few. Doubling comes first, so that instances that need few sweeps
    # are not tried with the limit.
    low = np.zeros(n, dtype=np.int64)
    high = np.ones(n, dtype=np.int64)
    enough = reached(high)
    while not enough.all() and high.max() < limit:
        low = np.where(enough, low, high + 1)
        high = np.where(enough, high, np.minimum(2 * high, limit))
        enough = reached(high)
    possible = enough
    while (possible & (low < high)).any():
        middle = (low + high) // 2
        enough = reached(middle)
        high = np.where(enough, middle, high)
        low = np.where(enough, low, middle + 1)
    return np.where(possible, high, -1)


def _time_edge_balancing(
    workload: Workload,
    timer: Timer,
    device: torch.device | str,
    tolerance: float,
    max_sweeps: int,
) -> Row:
    from lplb_triton.bench import peers

    peer = peers.EdgeBalancing(workload.problem.mask[0], device)
    weights, fixed = workload.loads(device)

    def reached(sweeps: NDArray[np.int64]) -> NDArray[np.bool_]:
        on_device = torch.from_numpy(sweeps.astype(np.int32)).to(device)
        return _compute_gaps(workload, peer.solve(weights, fixed, on_device)) <= tolerance

    sweeps = find_smallest_sweeps(reached, len(workload), max_sweeps)
    there = np.flatnonzero(sweeps >= 0)
    row: Row = {
        "colors": peer.n_colors,
        "max_sweeps": max_sweeps,
        "not_reached": len(workload) - len(there),
    }
    if not len(there):
        return {**row, "us": None, "sweeps": None}
    needed = torch.from_numpy(sweeps[there].astype(np.int32)).to(device)
    index = torch.from_numpy(there).to(device)
    launches = _make_launches(peer.solve, weights[index], fixed[index], needed)
    rotated = timer.time_rotation(launches)
    # The method has no stopping test: in practice all instances take as many sweeps as the worst.
    alike = _make_launches(
        peer.solve, weights[index], fixed[index], needed.amax().expand_as(needed)
    )
    return {
        **row,
        "us": compute_statistics(time_in_rounds(timer, launches, rotated)),
        "alike_us": compute_statistics(time_in_rounds(timer, alike, rotated)),
        "rotated_us": rotated,
        "sweeps": compute_statistics(sweeps[there].tolist()),
    }


def _time_lplb(workload: Workload, timer: Timer, device: torch.device | str) -> Row | str:
    """Time DeepSeek's own solver where the package ``lplb`` is installed; else say why not."""
    try:
        r2o = topologies.from_name(workload.shape)
        planner_type = importlib.import_module("lplb").Planner
    except (ImportError, AttributeError, ValueError) as error:
        return f"not timed: {error}"
    p = workload.placement
    try:
        planner = planner_type(r2o, p.n_physical, p.n_logical, ep_size=p.ep_size)
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        launches = [
            partial(planner.solve_probs, row, counter) for row in workload.counts.to(device)
        ]
        for launch in launches:
            launch()
        available = int(counter)
        rotated = timer.time_rotation(launches)
        times = time_in_rounds(timer, launches, rotated)
    except Exception as error:  # An error of the other package must not end the run.
        return f"not timed: {type(error).__name__}: {error}"
    # Where LPLB's own test of a solution fails, its answer is 0.5 everywhere.
    return {
        "us": compute_statistics(times),
        "rotated_us": rotated,
        "refused": len(workload) - available,
    }
