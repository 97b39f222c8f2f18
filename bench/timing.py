"""Times of the library and of its peers; no printing.

Kernels of a few microseconds are timed as replays of CUDA graphs, so that the host's launches
stay out of the figure. No answer is timed before it has passed its gate: every plan is held
against HiGHS's optimum, every rewritten id against the plan.

On the CPU the same code runs with the torch twins and any `Timer`; that is for tests.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

import lplb_triton
from lplb_triton import Balancer, Placement, Problem, Solution, Status, topologies
from lplb_triton.testing.instances import FAMILIES, draw_loads, shape_placement
from lplb_triton.testing.verify import SLACK, highs_optimum

__all__ = [
    "PIPELINE_SHAPES",
    "PIPELINE_TOKENS",
    "PUBLISHED_FAMILIES",
    "SEED",
    "SOLVE_SHAPES",
    "GraphTimer",
    "Timer",
    "WrongAnswerError",
    "Workload",
    "check_ids",
    "check_plan",
    "copy_bandwidth",
    "draw_workload",
    "first_call",
    "first_call_row",
    "groups_row",
    "host_seconds",
    "on_cpu",
    "peer_row",
    "pipeline_row",
    "pipeline_placement",
    "run_solver",
    "smallest_sweeps",
    "solve_row",
    "statistics",
]

Floats = NDArray[np.float64]
Launch = Callable[[], object]
Row = dict[str, Any]
T = TypeVar("T")

SOLVE_SHAPES = (
    "ring:8",
    "cube",
    "hypercube",
    "torus:4x8",
    "eplb:32:1",
    "eplb:32:2",
    "torus:8x8",
    "eplb:64:1",
    "eplb:64:2",
)
PIPELINE_SHAPES = ("cube", "eplb:32:2", "eplb:64:2")
PIPELINE_TOKENS = (128, 4096, 16384)
PIPELINE_EXPERTS = 256
TOP_K = 8
PUBLISHED_FAMILIES = tuple(FAMILIES)[:6]
SEED = 20

# A peer's answer counts as infeasible if a constraint is off by more than this part of the
# largest number in the program.
FEASIBLE = 1e-3
MAX_SWEEPS = 4096
# Calls through the library's LP interface are timed for this many instances of each family.
PROBLEM_PER_FAMILY = 5
# Batches of each load family for the pipeline.
BATCHES_PER_FAMILY = 4
# Times through all launches, so that a disturbance meets each only once.
ROUNDS = 3
# Eager calls that are timed, in bursts that the launch queue can take.
HOST_CALLS, HOST_BURSTS = 100, 10


class WrongAnswerError(RuntimeError):
    """An answer failed its gate, so there is no time for it."""


class Timer(Protocol):
    """Measures launches that take microseconds."""

    def by_batch(self, launch: Launch, counts: torch.Tensor, batches: torch.Tensor) -> list[float]:
        """Median microseconds of a launch for each row, which it finds in ``counts``."""
        ...

    def rotation(self, launches: Sequence[Launch]) -> float:
        """Mean microseconds of one launch, all of them one after the other."""
        ...

    def per_call(self, launch: Launch, about_us: float) -> float:
        """Median microseconds of one launch, repeated; ``about_us`` is a guess."""
        ...


class GraphTimer:
    """Times launches by CUDA-graph replay.

    Parameters
    ----------
    device : torch.device
        The GPU.
    replays : int
        Timed replays of each graph.
    """

    # Launches in a graph that repeats one of them: fewer where one takes long.
    MIN_CALLS, MAX_CALLS, GRAPH_US = 4, 10, 500.0
    # Timed replays of a graph in each of the rounds through all batches: at least 20 in all.
    BATCH_REPLAYS = 7

    def __init__(self, device: torch.device, replays: int = 6) -> None:
        self._replays = replays
        # Graphs share one pool: they are made and used one after the other. A pool only lives as
        # long as some graph that uses it, so one is kept.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._anchor = self._capture([partial(torch.zeros, 1, device=device)])

    def rotation(self, launches: Sequence[Launch]) -> float:
        """Mean microseconds per launch of a graph that holds all of them once.

        Parameters
        ----------
        launches : sequence of callable
            Each has run before, so that nothing is compiled here.

        Returns
        -------
        float
            Median over the replays.
        """
        return self._replay(launches) / len(launches)

    def per_call(self, launch: Launch, about_us: float) -> float:
        """Microseconds per launch of a graph that repeats one.

        Parameters
        ----------
        launch : callable
            Has run before.
        about_us : float
            About how long it takes, which decides how often the graph repeats it.

        Returns
        -------
        float
            Median over the replays.
        """
        wanted = round(self.GRAPH_US / max(about_us, 1e-3))
        calls = min(max(wanted, self.MIN_CALLS), self.MAX_CALLS)
        return self._replay([launch] * calls) / calls

    def by_batch(self, launch: Launch, counts: torch.Tensor, batches: torch.Tensor) -> list[float]:
        """Microseconds of a launch on each of many batches, without a graph for each.

        A graph reads its counts from where they were at its capture, so each batch is copied there
        before its replays; the copy and one replay after it are not timed. A launch that is short
        is repeated within the graph, since a replay of a single one takes some microseconds more.

        Parameters
        ----------
        launch : callable
            Reads ``counts`` and leaves them alone. Has run before.
        counts : torch.Tensor
            Overwritten.
        batches : torch.Tensor
            ``[B, ...]``, on the device, rows like ``counts``.

        Returns
        -------
        list of float
            Of each batch, the median of 21 replays, seven in each of three rounds through all.
        """
        once = self._capture([launch])
        often = self._capture([launch] * self.MAX_CALLS)
        about = self._batch_round([once] * len(batches), counts, batches, 1)[:, 0]
        calls = np.where(about * self.MAX_CALLS > self.GRAPH_US, 1, self.MAX_CALLS)
        graphs = [once if n == 1 else often for n in calls]
        rounds = [
            self._batch_round(graphs, counts, batches, self.BATCH_REPLAYS) for _ in range(ROUNDS)
        ]
        times: list[float] = (np.median(np.concatenate(rounds, axis=1), axis=1) / calls).tolist()
        return times

    def _batch_round(
        self,
        graphs: Sequence[torch.cuda.CUDAGraph],
        counts: torch.Tensor,
        batches: torch.Tensor,
        replays: int,
    ) -> Floats:
        """Microseconds of each replay ``[B, replays]`` of each batch's graph."""
        marks = [[_event() for _ in range(replays + 1)] for _ in graphs]
        with torch.cuda.stream(self._stream):
            for graph, batch, (first, *others) in zip(graphs, batches, marks, strict=True):
                counts.copy_(batch)
                graph.replay()
                first.record()
                for mark in others:
                    graph.replay()
                    mark.record()
        torch.cuda.synchronize()
        return 1e3 * np.array(
            [[a.elapsed_time(b) for a, b in itertools.pairwise(row)] for row in marks]
        )

    def _replay(self, launches: Sequence[Launch]) -> float:
        graph = self._capture(launches)
        with torch.cuda.stream(self._stream):
            graph.replay()
            marks = [_event() for _ in range(self._replays + 1)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
        return 1e3 * float(np.median(times))

    def _capture(self, launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # torch.cuda.graph() would also empty the allocator's cache, which costs milliseconds.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()
        return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def statistics(times: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile, maximum and mean.

    Parameters
    ----------
    times : sequence of float
        At least one.

    Returns
    -------
    dict
        ``median``, ``p95``, ``p99``, ``max``, ``mean``.
    """
    values = np.asarray(times, dtype=np.float64)
    return {
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
        "mean": float(values.mean()),
    }


@dataclass(frozen=True)
class Workload:
    """Instances of one shape with their optima.

    Attributes
    ----------
    shape : str
        Name, as `lplb_triton.testing.instances.shape_placement` takes it.
    placement : Placement
        One LP group.
    families : list of str
        Load family of each instance.
    counts : torch.Tensor
        ``[B, n_logical]`` int32 on the CPU.
    problem : Problem
        The programs, float64 on the CPU.
    optima : numpy.ndarray
        ``[B]``, by HiGHS.
    highs_us : float
        Median wall time of one HiGHS call, in microseconds.
    """

    shape: str
    placement: Placement
    families: list[str]
    counts: torch.Tensor
    problem: Problem
    optima: Floats
    highs_us: float

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self.families)

    def loads(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights ``[B, C]`` and fixed loads ``[B, G]`` in float32 on a device."""
        return (
            self.problem.weights.to(device, torch.float32),
            self.problem.fixed.to(device, torch.float32),
        )

    def single(self, index: int, device: torch.device | str) -> Problem:
        """One instance on a device, in float32."""
        weights, fixed = self.loads(device)
        return Problem(
            weights[index : index + 1].contiguous(),
            fixed[index : index + 1].contiguous(),
            self.problem.mask.to(device),
        )


def draw_workload(shape: str, per_family: int, seed: int = SEED) -> Workload:
    """Draw instances of the six published load families and solve them with HiGHS.

    Parameters
    ----------
    shape : str
        As for `lplb_triton.testing.instances.shape_placement`.
    per_family : int
        Instances of each family.
    seed : int
        Seed of the placement's history and of the loads.

    Returns
    -------
    Workload
        Families one after the other.
    """
    rng = np.random.default_rng(seed)
    placement = shape_placement(shape, rng)
    families = [family for family in PUBLISHED_FAMILIES for _ in range(per_family)]
    counts = torch.stack([draw_loads(family, rng, placement.n_logical) for family in families])
    problem = placement.problem(counts)
    mask = problem.mask[0].numpy()
    optima, seconds = [], []
    for weights, fixed in zip(problem.weights.numpy(), problem.fixed.numpy(), strict=True):
        begin = time.perf_counter()
        optima.append(highs_optimum(weights, fixed, mask))
        seconds.append(time.perf_counter() - begin)
    return Workload(
        shape,
        placement,
        families,
        counts,
        problem,
        np.array(optima),
        1e6 * float(np.median(seconds)),
    )


def check_plan(
    problem: Problem, solution: Solution, optimum: float, name: str, *, certified: bool = True
) -> None:
    """Refuse a plan that is infeasible, falsely certified or not certified.

    Loads are computed again in float64 from the shares.

    Parameters
    ----------
    problem : Problem
        One instance, float64 on the CPU.
    solution : Solution
        Its solution, on any device.
    optimum : float
        By another solver.
    name : str
        What the message calls the instance.
    certified : bool
        Whether a plan is refused too that is feasible, with a true bound, and says that its gap is
        wider than the tolerance.

    Raises
    ------
    WrongAnswerError
        Saying what is wrong.
    """
    shares = solution.shares.double().cpu()[0]
    mask = problem.mask[0]
    load = float((problem.fixed[0] + (shares * problem.weights[0]).sum(1)).max())
    reported, bound = float(solution.max_load[0]), float(solution.lower_bound[0])
    small = SLACK * max(load, 1e-300)
    status = int(solution.status[0])
    admitted = not certified and status == Status.GAP
    wrong = None
    if status != Status.CERTIFIED and not admitted:
        wrong = f"not certified, gap {float(solution.gap[0]):.3g}"
    elif not bool(((shares >= 0) & (shares <= 1) & (mask | (shares == 0))).all()):
        wrong = "a share is out of range or where no copy is"
    elif bool(((shares.sum(0) - 1).abs() > SLACK)[mask.any(0)].any()):
        wrong = "shares of a column do not add up to 1"
    elif not abs(reported - load) <= small:
        wrong = f"max_load {reported:.8g} is not that of the plan, {load:.8g}"
    elif not (bound <= optimum + small and optimum <= load + small):
        wrong = f"optimum {optimum:.8g} is outside [{bound:.8g}, {load:.8g}]"
    elif not admitted and load - bound > solution.tolerance * load * (1 + 1e-3):
        wrong = f"gap {(load - bound) / load:.3g} is wider than the tolerance"
    if wrong is not None:
        raise WrongAnswerError(f"{name}: {wrong}")


def _in_rounds(
    timer: Timer,
    launches: Sequence[Launch],
    about_us: float,
    progress: Callable[[], None] | None = None,
) -> list[float]:
    """Microseconds per call of each launch, the median of rounds through all of them.

    What disturbs a GPU for a few milliseconds is over when a launch's turn comes again.
    ``progress`` is called once per launch, in the first round.
    """
    times = np.empty((ROUNDS, len(launches)))
    for at, row in enumerate(times):
        for index, launch in enumerate(launches):
            row[index] = timer.per_call(launch, about_us)
            if at == 0 and progress is not None:
                progress()
    found: list[float] = np.median(times, axis=0).tolist()
    return found


def run_solver(balancer: Balancer) -> Callable[[torch.Tensor], object]:
    """Solve as `Balancer.run` does: to shares by copy and a certificate, in one launch.

    `Balancer.solve` spreads the shares over ranks and columns in another one.

    Parameters
    ----------
    balancer : Balancer
        Without a group.

    Returns
    -------
    callable
        Takes counts by expert.
    """
    if balancer.backend == "torch":
        return balancer.solve
    return partial(balancer._backend.solve_by_copy, certified=balancer.certified)


def _is_early(index: int, workload: Workload, per_family: int = PROBLEM_PER_FAMILY) -> bool:
    """Whether an instance is among the first few of its family."""
    return workload.families[:index].count(workload.families[index]) < per_family


def solve_row(
    workload: Workload,
    timer: Timer,
    device: torch.device | str,
    *,
    tolerance: float,
    progress: Callable[[], None] | None = None,
) -> Row:
    """Time the LP of one shape, from counts by expert to plan, after checking every plan.

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
        If a plan fails its gate; nothing is timed then.
    """
    balancer = Balancer(workload.placement, device=device, tolerance=tolerance)
    counts = list(workload.counts.to(device))
    iterations, gaps = [], []
    for index, row in enumerate(counts):
        solution = balancer.solve(row)
        name = f"{workload.shape}, instance {index} ({workload.families[index]})"
        check_plan(_instance(workload, index), solution, workload.optima[index], name)
        iterations.append(int(solution.iterations[0]))
        gaps.append(float(solution.gap[0]))
    early = [index for index in range(len(workload)) if _is_early(index, workload)]
    solve = partial(lplb_triton.solve, tolerance=tolerance)
    problems = [workload.single(index, device) for index in early]
    for index, problem in zip(early, problems, strict=True):
        name = f"{workload.shape}, instance {index} as a Problem"
        check_plan(_instance(workload, index), solve(problem), workload.optima[index], name)

    solver = run_solver(balancer)
    launches = [partial(solver, row) for row in counts]
    rotated = timer.rotation(launches)
    times = _in_rounds(timer, launches, rotated, progress)
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
        "us": statistics(times),
        "rotated_us": rotated,
        "by_family_us": by_family,
        "problem_us": statistics(
            _in_rounds(timer, [partial(solve, problem) for problem in problems], rotated)
        ),
        "iterations": {"mean": float(np.mean(iterations)), "max": max(iterations)},
        "worst_gap": max(gaps),
        "highs_us": workload.highs_us,
    }


def _instance(workload: Workload, index: int) -> Problem:
    """One instance in float64 on the CPU, as the gate wants it."""
    p = workload.problem
    return Problem(p.weights[index : index + 1], p.fixed[index : index + 1], p.mask)


def groups_row(
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
        As for `solve_row`.
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
    solve, solve_alone = run_solver(together), run_solver(alone)
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
    guess = timer.rotation(both)
    together_us = _in_rounds(timer, both, guess)
    alone_us = np.reshape(_in_rounds(timer, singles, guess), (-1, n_group))
    slowest = alone_us.max(axis=1).tolist()
    return {
        "groups": n_group,
        "batches": len(both),
        "together_us": statistics(together_us),
        "slowest_alone_us": statistics(slowest),
        "ratio": statistics([a / b for a, b in zip(together_us, slowest, strict=True)]),
    }


def peer_row(
    workload: Workload,
    timer: Timer,
    device: torch.device | str,
    *,
    tolerance: float,
    max_sweeps: int = MAX_SWEEPS,
    progress: Callable[[], None] | None = None,
) -> Row:
    """Time the peers on the instances of `solve_row`, and count their bad answers.

    Parameters
    ----------
    workload, timer, device, tolerance, progress
        As for `solve_row`; an answer is inexact if its gap to the optimum is wider than the
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
        peers.two_copy_ranks(workload.problem.mask[0])
    except ValueError as error:
        reason = str(error)
        return {**row, "affine_scaling": reason, "edge_balancing": reason, "lplb": reason}
    row["affine_scaling"] = _affine_scaling(workload, timer, device, tolerance)
    row["edge_balancing"] = _edge_balancing(workload, timer, device, tolerance, max_sweeps)
    row["lplb"] = _original(workload, timer, device)
    if progress is not None:
        progress()
    return row


def _largest_loads(workload: Workload, first_shares: torch.Tensor) -> Floats:
    """Load of the most loaded rank when the first copies take these shares ``[B, C]``."""
    from lplb_triton.bench import peers

    weights = workload.problem.weights
    first, second = peers.two_copy_ranks(workload.problem.mask[0])
    used = first >= 0
    on_first = torch.where(used, first_shares.double().cpu(), 0.0) * weights
    loads = workload.problem.fixed.clone()
    loads.index_add_(1, first[used], on_first[:, used])
    loads.index_add_(1, second[used], (weights - on_first)[:, used])
    largest: Floats = loads.amax(1).numpy()
    return largest


def _gaps(workload: Workload, first_shares: torch.Tensor) -> Floats:
    """Relative gaps to HiGHS's optimum; infinite for shares that are not finite."""
    largest = _largest_loads(workload, first_shares)
    gaps: Floats = np.full(len(workload), np.inf)
    finite = np.isfinite(largest)
    gaps[finite] = 1 - workload.optima[finite] / np.maximum(largest[finite], 1e-300)
    return gaps


def _affine_scaling(
    workload: Workload, timer: Timer, device: torch.device | str, tolerance: float
) -> Row | str:
    from lplb_triton.bench import peers

    try:
        peer = peers.AffineScaling(workload.problem.mask[0], device)
    except ValueError as error:
        return str(error)
    weights, fixed = workload.loads(device)
    x = peer.solve(weights, fixed).double().cpu()
    infeasible = _violations(workload, x) > FEASIBLE
    columns = workload.placement.max_columns
    inexact = ~infeasible & (_gaps(workload, x[:, :columns].clamp(0, 1)) > tolerance)
    launches = _singles(peer.solve, weights, fixed)
    rotated = timer.rotation(launches)
    return {
        "us": statistics(_in_rounds(timer, launches, rotated)),
        "rotated_us": rotated,
        "infeasible": int(infeasible.sum()),
        "inexact": int(inexact.sum()),
    }


def _violations(workload: Workload, x: torch.Tensor) -> Floats:
    """Largest violation of each standard form, in units of its largest number.

    ``x`` is `peers.AffineScaling`'s answer; what is not finite violates by infinity.
    """
    from lplb_triton.bench import peers

    weights, fixed = workload.problem.weights, workload.problem.fixed
    first, second = peers.two_copy_ranks(workload.problem.mask[0])
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


def _singles(
    solve: Callable[..., object], weights: torch.Tensor, fixed: torch.Tensor, *more: torch.Tensor
) -> list[Launch]:
    """One launch per instance; each has run once, since rows may differ in alignment."""
    tables = (weights, fixed, *more)
    launches: list[Launch] = [
        partial(solve, *(table[index : index + 1] for table in tables))
        for index in range(len(weights))
    ]
    for launch in launches:
        launch()
    return launches


def smallest_sweeps(
    reached: Callable[[NDArray[np.int64]], NDArray[np.bool_]], n: int, limit: int
) -> NDArray[np.int64]:
    """Smallest number of sweeps of each instance that reaches the gap.

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
    # ``low - 1`` sweeps are too few. Doubling first spares instances that need few sweeps the
    # many of the limit.
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


def _edge_balancing(
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
        return _gaps(workload, peer.solve(weights, fixed, on_device)) <= tolerance

    sweeps = smallest_sweeps(reached, len(workload), max_sweeps)
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
    launches = _singles(peer.solve, weights[index], fixed[index], needed)
    rotated = timer.rotation(launches)
    # Nothing tells it when to stop, so without that knowledge it needs the worst instance's number.
    alike = _singles(peer.solve, weights[index], fixed[index], needed.amax().expand_as(needed))
    return {
        **row,
        "us": statistics(_in_rounds(timer, launches, rotated)),
        "alike_us": statistics(_in_rounds(timer, alike, rotated)),
        "rotated_us": rotated,
        "sweeps": statistics(sweeps[there].tolist()),
    }


def _original(workload: Workload, timer: Timer, device: torch.device | str) -> Row | str:
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
        rotated = timer.rotation(launches)
        times = _in_rounds(timer, launches, rotated)
    except Exception as error:  # Whatever a foreign package raises must not end the run.
        return f"not timed: {type(error).__name__}: {error}"
    # Where its own test fails it answers 0.5 everywhere.
    return {"us": statistics(times), "rotated_us": rotated, "refused": len(workload) - available}


def copy_bandwidth(timer: Timer, device: torch.device | str, n_bytes: int = 1 << 29) -> float:
    """Bytes read and written per second by a copy on the device.

    Parameters
    ----------
    timer, device
        As for `solve_row`.
    n_bytes : int
        Size of what is copied; far larger than the caches.

    Returns
    -------
    float
        Bytes per second, both directions counted.
    """
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2e6 * n_bytes / timer.per_call(partial(target.copy_, source), 400.0)


def pipeline_placement(shape: str, rng: np.random.Generator) -> Placement:
    """Make the placement of a pipeline row: a shape with 256 experts.

    Parameters
    ----------
    shape : str
        As for `lplb_triton.testing.instances.shape_placement`.
    rng : numpy.random.Generator
        Source of the history.

    Returns
    -------
    Placement
    """
    return shape_placement(shape, rng, n_experts=PIPELINE_EXPERTS)


def check_ids(
    placement: Placement, idx: torch.Tensor, out: torch.Tensor, solution: Solution
) -> None:
    """Refuse physical ids that aren't copies of the logical ones, or miss the plan.

    Parameters
    ----------
    placement : Placement
        Of the balancer.
    idx, out : torch.Tensor
        Logical ids and what `Balancer.run` made of them.
    solution : Solution
        The plan for these ids.

    Raises
    ------
    WrongAnswerError
        If an id is no copy of its expert, or a rank's load is off by a token or more per slot.
    """
    logical, physical = idx.cpu().reshape(-1), out.cpu().reshape(-1).long()
    on = logical >= 0
    if bool((physical[~on] != -1).any()) or bool((physical[on] < 0).any()):
        raise WrongAnswerError(f"{placement!r}: -1 and ids were exchanged")
    logical, physical = logical[on].long(), physical[on]
    if not torch.equal(placement.phy2log[physical].long(), logical):
        raise WrongAnswerError(f"{placement!r}: a physical id is no copy of its logical id")
    counts = torch.bincount(logical, minlength=placement.n_logical)
    ranks = placement.rank_of_slot[physical].long()
    loads = torch.bincount(ranks, minlength=placement.ep_size)
    plan = placement.rank_loads(counts, on_cpu(solution))[0]
    if bool(((loads - plan).abs() >= placement.slots_per_rank).any()):
        raise WrongAnswerError(f"{placement!r}: rank loads miss the plan by more than rounding")


def on_cpu(solution: Solution) -> Solution:
    """Copy all of a solution to the CPU at once, rather than number by number."""
    return Solution(
        solution.shares.cpu(),
        solution.max_load.cpu(),
        solution.lower_bound.cpu(),
        solution.gap.cpu(),
        solution.iterations.cpu(),
        solution.status.cpu(),
        solution.tolerance,
    )


def pipeline_row(
    shape: str,
    tokens: int,
    timer: Timer,
    device: torch.device | str,
    *,
    tolerance: float,
    bandwidth: float,
    per_family: int = BATCHES_PER_FAMILY,
    seed: int = SEED,
) -> Row:
    """Time `Balancer.run` and its parts on batches of every load family, without load sync.

    Parameters
    ----------
    shape : str
        A shape of 256 experts.
    tokens : int
        Tokens of a batch, each routed to eight different experts.
    timer, device, tolerance
        As for `solve_row`.
    bandwidth : float
        Bytes per second of the device's memory, for the floor.
    per_family : int
        Batches of each load family.
    seed : int
        Seed of the routing.

    Returns
    -------
    dict
        Times in microseconds: ``run_us`` by batch, ``rotated_us`` the mean over one graph of
        all batches. ``bytes`` are the ids read twice and written once, ``floor_us`` what they
        take at ``bandwidth``. ``host_us`` and ``allocations_per_call`` (``None`` on a CPU) are
        of an eager call.

    Raises
    ------
    WrongAnswerError
        If ids or plan fail their gates.
    """
    rng = np.random.default_rng(seed)
    placement = pipeline_placement(shape, rng)
    balancer = Balancer(placement, device=device, tolerance=tolerance)
    balancer.warmup()
    batches = [idx.to(device) for idx in _route(tokens, placement.n_logical, per_family, seed)]
    counted, solved, cumulative = [], [], []
    for idx in batches:
        counts, running = balancer.count(idx)
        solution = balancer.solve(counts)
        if bool((solution.status != Status.CERTIFIED).any()):
            raise WrongAnswerError(f"{shape}, {tokens} tokens: not certified")
        check_ids(placement, idx, balancer.run(idx), solution)
        counted.append((counts, running))
        solved.append(solution)
        cumulative.append(balancer.cumulative_shares(solution.shares))
    n_bytes = 3 * batches[0].numel() * batches[0].element_size()
    parts: dict[str, list[Launch]] = {
        "run": [partial(balancer.run, idx) for idx in batches],
        "count": [partial(balancer.count, idx) for idx in batches],
        "solve": [partial(run_solver(balancer), counts) for counts, _ in counted],
        "select": [
            partial(balancer.select, idx, shares, running)
            for idx, shares, (_, running) in zip(batches, cumulative, counted, strict=True)
        ],
    }
    for launch in parts["select"][:1]:
        launch()
    rotated = timer.rotation(parts["run"])
    times = {name: statistics(_in_rounds(timer, parts[name], rotated)) for name in ("run", "solve")}
    seconds, allocations = host_seconds(parts["run"], torch.device(device))
    return {
        "shape": shape,
        "ranks": placement.ep_size,
        "experts": placement.n_logical,
        "tokens": tokens,
        "bytes": n_bytes,
        "floor_us": 1e6 * n_bytes / bandwidth,
        "run_us": times["run"],
        "rotated_us": rotated,
        "count_us": timer.rotation(parts["count"]),
        "solve_us": times["solve"]["median"],
        "select_us": timer.rotation(parts["select"]),
        "iterations": statistics([float(solution.iterations.max()) for solution in solved]),
        "host_us": 1e6 * float(np.median(seconds)),
        "allocations_per_call": allocations,
    }


@functools.cache
def _route(tokens: int, n_experts: int, per_family: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Batches of every load family: top-8 of noisy scores, int64 ``[tokens, 8]``.

    A token's eight experts are different, which flattens the loads as it does in a model.
    """
    rng = np.random.default_rng(seed)
    batches = []
    for family in (f for f in PUBLISHED_FAMILIES for _ in range(per_family)):
        popularity = np.maximum(FAMILIES[family](rng, n_experts), 1e-12).astype(np.float32)
        # The largest of log(p) + Gumbel noise is the smallest of Exp(1) / p.
        scores = rng.standard_exponential((tokens, n_experts), dtype=np.float32) / popularity
        batches.append(torch.from_numpy(np.argpartition(scores, TOP_K, axis=1)[:, :TOP_K].copy()))
    return tuple(batches)


def host_seconds(runs: Sequence[Launch], device: torch.device) -> tuple[list[float], float | None]:
    """Wall time of eager calls that aren't waited for, and allocations.

    Parameters
    ----------
    runs : sequence of callable
        Calls to make in turn.
    device : torch.device
        Where they launch their kernels.

    Returns
    -------
    seconds : list of float
        Of every call.
    allocations : float or None
        Per call; None on a CPU.
    """

    def allocated() -> int:
        return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])

    on_gpu = device.type == "cuda"
    calls, bursts = (HOST_CALLS, HOST_BURSTS) if on_gpu else (3, 1)
    for run in runs:
        run()
    before = allocated() if on_gpu else 0
    seconds = []
    for _ in range(bursts):
        if on_gpu:
            torch.cuda.synchronize(device)
        for run in itertools.islice(itertools.cycle(runs), calls):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
    allocations = (allocated() - before) / len(seconds) if on_gpu else None
    return seconds, allocations


def first_call(shape: str, device: str = "cuda") -> float:
    """Seconds of the first `Balancer.run` of this process.

    Imports, placement and the start of CUDA and of Triton's driver are left out.

    Parameters
    ----------
    shape : str
        A shape of 256 experts.
    device : str
        Where to run.

    Returns
    -------
    float
    """
    rng = np.random.default_rng(SEED)
    balancer = Balancer(pipeline_placement(shape, rng), device=device)
    idx = torch.zeros(128, TOP_K, dtype=torch.int64, device=device)
    if device == "cuda":
        from triton.runtime import driver

        driver.active.get_current_target()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    balancer.run(idx)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def first_call_row(shape: str, device: str = "cuda") -> Row:
    """Time the first call in fresh processes, with an empty and then with a full kernel cache.

    Parameters
    ----------
    shape : str
        A shape of 256 experts.
    device : str
        Where to run.

    Returns
    -------
    dict
        ``cold_s`` and ``warm_s``, seconds.

    Raises
    ------
    RuntimeError
        If a process fails; the message holds the end of what it printed.
    """
    code = (
        f"from lplb_triton.bench.timing import first_call; print(first_call({shape!r}, {device!r}))"
    )
    root = str(Path(lplb_triton.__file__).resolve().parent.parent)
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": paths}
        for name in ("cold_s", "warm_s"):
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"first call of {shape} failed: {done.stderr[-800:]}")
            found[name] = float(done.stdout.split()[-1])
    return {"shape": shape, **found}
