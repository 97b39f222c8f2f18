"""Real traffic: recorded traces and seeded draws, and the solve's time on each of their batches.

A *case* is what a kernel is compiled for and how experts are placed: experts, ranks, placement,
redundant slots. A *load set* is a history, by which a case places its experts, and the batches that
are timed after it. Placements of one case have the same sizes, so that its kernel is compiled once.

Drawn load sets keep the history that they were drawn from, expected tokens, and differ from it
batch by batch:

============  ====================================================================================
``jitter``    lognormal popularity; every batch multiplies each expert by a lognormal of its own
``rotating``  lognormal popularity; every batch moves it on by some experts
``burst``     lognormal popularity; in every batch a few experts are many times as popular
============  ====================================================================================
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import Balancer, Placement, Problem, Solution, Status, place
from lplb_triton._threads import one_thread
from lplb_triton.bench.balance import make_placement
from lplb_triton.bench.placement import impossible
from lplb_triton.bench.timing import (
    Timer,
    check_ids,
    check_plan,
    on_cpu,
    run_solver,
    statistics,
)
from lplb_triton.testing.verify import optima_of
from lplb_triton.traces.trace import Trace

__all__ = [
    "BATCHES",
    "CASES",
    "DRAWN",
    "RUN_BATCHES",
    "RUN_CASES",
    "TRIALS",
    "Case",
    "Checked",
    "Loads",
    "Prepared",
    "check",
    "cores",
    "drawn",
    "experts_for",
    "pooled",
    "prepare",
    "preparations",
    "product",
    "recorded",
    "row",
    "run_row",
]

Floats = NDArray[np.float64]
Row = dict[str, Any]

# Tokens of a drawn batch, and experts that each of them goes to.
TOKENS, TOP_K = 32768, 8
# Of the jitter families: standard deviations of the logarithms, of popularity and of a batch.
SIGMAS, JITTERS = (0.5, 0.8, 1.0), (0.2, 0.3, 0.5)
ROTATING_SIGMA, ROTATION = 1.0, 3
BURST_SIGMA, BURST_EXPERTS, BURST_TIMES = 0.5, 3, (5.0, 30.0)
DRAWN = ("jitter", "rotating", "burst")
# Batches of a drawn load set where nothing is said; of a trace it is every one.
BATCHES = 12
# Effort of `place` where nothing is said: its own takes minutes from 64 ranks on.
TRIALS = 100
# Numbers of steps by potentials that are told apart; the last stands for more too.
STEPS = ("0", "1", "2", "3+")


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for, and how experts are placed.

    Attributes
    ----------
    experts, ep
        Logical experts, and ranks.
    placement
        As for `lplb_triton.bench.balance.make_placement`.
    slots
        Redundant slots per rank.
    """

    experts: int
    ep: int
    placement: str
    slots: int

    def __str__(self) -> str:
        """One line for people."""
        plural = "" if self.slots == 1 else "s"
        return f"{self.experts} experts, EP {self.ep}, {self.placement}, {self.slots} slot{plural}"

    def refusal(self) -> str | None:
        """Why there is no such placement, or None where there is one."""
        reason = impossible(self.experts, self.ep, self.slots)
        if reason is None:
            # The search needs what EPLB needs, and takes longer.
            kind = "eplb" if self.placement == "place" else self.placement
            try:
                make_placement(kind, torch.ones(self.experts), self.ep, self.slots)
            except ValueError as error:
                reason = str(error)
        return reason


# What is timed where nothing is said.
CASES = tuple(
    Case(*sizes)
    for sizes in (
        (256, 8, "eplb", 1),
        (256, 8, "chain", 1),
        (128, 16, "place", 1),
        (256, 16, "eplb", 2),
        (256, 32, "eplb", 1),
        (256, 32, "eplb", 2),
        (256, 32, "chain", 1),
        (256, 32, "place", 2),
        (256, 32, "torus:4x8", 2),
        (256, 64, "eplb", 1),
        (256, 64, "eplb", 2),
        (256, 64, "eplb", 4),
        (256, 64, "chain", 1),
        (256, 64, "chain", 2),
        (256, 64, "place", 1),
        (256, 64, "place", 2),
        (384, 64, "eplb", 1),
        (512, 64, "eplb", 2),
        (288, 72, "eplb", 2),
        (288, 72, "chain", 1),
        (288, 96, "place", 1),
        (288, 144, "eplb", 2),
        (256, 128, "eplb", 2),
        (256, 256, "eplb", 1),
    )
)

# Of the whole run, and how many batches of a layer of a trace.
RUN_CASES = (
    Case(256, 8, "eplb", 1),
    Case(256, 32, "eplb", 2),
    Case(256, 64, "eplb", 2),
    Case(256, 64, "chain", 1),
)
RUN_BATCHES = 25


def experts_for(ep: int) -> int:
    """Return the number of experts where none is said: 256, or 288 for 72, 96 or 144 ranks."""
    return 288 if 256 % ep and 288 % ep == 0 else 256


def product(
    experts: Sequence[int] | None,
    eps: Sequence[int],
    placements: Sequence[str],
    slots: Sequence[int],
) -> tuple[list[Case], list[tuple[Case, str]]]:
    """Combine sizes and placements.

    Parameters
    ----------
    experts
        None for those of `experts_for`.
    eps, placements, slots
        All combinations of these.

    Returns
    -------
    tuple
        The cases that can be placed, and the others with the reason.
    """
    possible, others = [], []
    for ep in eps:
        for n_experts in (experts_for(ep),) if experts is None else experts:
            for placement in placements:
                for n_slots in slots:
                    case = Case(n_experts, ep, placement, n_slots)
                    reason = case.refusal()
                    if reason is None:
                        possible.append(case)
                    else:
                        others.append((case, reason))
    return possible, others


@dataclass(frozen=True, eq=False)
class Loads:
    """A history and the batches after it.

    Attributes
    ----------
    kind
        One of `DRAWN`, or what the trace is called.
    name
        Distinguishes the load sets of a kind.
    history
        ``[n, experts]``, tokens by batch (one row of expected ones for drawn loads).
    batches
        ``[B, experts]`` int32, tokens summed over source ranks.
    """

    kind: str
    name: str
    history: torch.Tensor
    batches: torch.Tensor

    @property
    def experts(self) -> int:
        """Number of logical experts."""
        return int(self.batches.shape[1])


def recorded(trace: Trace, source: str, most: int | None = None) -> list[Loads]:
    """Cut each layer of a trace in two: the first half places, the second is timed.

    Gaps are no boundary here. Placements of the packaged trace are as old as they get: made early
    in training, used late.

    Parameters
    ----------
    trace
        At least two batches.
    source
        What it is called.
    most
        Batches of a layer to time at most, evenly spread; None for all.

    Returns
    -------
    list of Loads
        One per layer.

    Raises
    ------
    ValueError
        If there is only one batch.
    """
    half = trace.batches // 2
    if half < 1:
        raise ValueError(f"{source} has one batch, which leaves none to place by")
    counts = trace.totals()
    timed = trace.batches - half
    chosen = half + np.linspace(0, timed - 1, min(timed, most or timed)).round().astype(int)
    return [
        Loads(
            source,
            f"layer {layer}",
            torch.from_numpy(counts[:half, layer].copy()),
            torch.from_numpy(counts[chosen, layer].astype(np.int32)),
        )
        for layer in range(trace.layers)
    ]


def drawn(experts: int, n_batches: int, seed: int) -> list[Loads]:
    """Draw the jitter families, ``rotating`` and ``burst``.

    Parameters
    ----------
    experts
        Logical experts.
    n_batches
        Of each load set.
    seed
        Each load set depends on this, on its place in the list and on the number of experts only.

    Returns
    -------
    list of Loads
        Eleven.
    """
    draws: list[tuple[str, str, float, Callable[..., Floats]]] = [
        ("jitter", f"sigma {sigma}, jitter {spread}", sigma, partial(_jittered, spread=spread))
        for sigma in SIGMAS
        for spread in JITTERS
    ]
    draws.append(("rotating", f"by {ROTATION} experts", ROTATING_SIGMA, _rotated))
    draws.append(("burst", f"of {BURST_EXPERTS} experts", BURST_SIGMA, _burst))
    found = []
    for index, (kind, name, sigma, change) in enumerate(draws):
        rng = np.random.default_rng([seed, experts, index])
        popularity = rng.lognormal(0, sigma, experts)
        popularity /= popularity.sum()
        batches = np.empty((n_batches, experts), dtype=np.int32)
        for at, batch in enumerate(batches):
            loads = change(popularity, rng, at)
            batch[:] = rng.multinomial(TOKENS * TOP_K, loads / loads.sum())
        history = torch.from_numpy(popularity * (TOKENS * TOP_K))[None]
        found.append(Loads(kind, name, history, torch.from_numpy(batches)))
    return found


def _jittered(popularity: Floats, rng: np.random.Generator, at: int, spread: float) -> Floats:
    return popularity * rng.lognormal(0, spread, len(popularity))


def _rotated(popularity: Floats, rng: np.random.Generator, at: int) -> Floats:
    moved: Floats = np.roll(popularity, ROTATION * at)
    return moved


def _burst(popularity: Floats, rng: np.random.Generator, at: int) -> Floats:
    n_hot = min(BURST_EXPERTS, len(popularity))
    loads: Floats = popularity.copy()
    loads[rng.choice(len(loads), n_hot, replace=False)] *= rng.uniform(*BURST_TIMES, n_hot)
    return loads


@dataclass(frozen=True, eq=False)
class Prepared:
    """A load set under a case, with its optima.

    Attributes
    ----------
    case, loads
        As given.
    placement
        Made from the history.
    optima
        ``[B, n_group]`` by HiGHS.
    """

    case: Case
    loads: Loads
    placement: Placement
    optima: Floats


def prepare(case: Case, loads: Loads, trials: int = TRIALS) -> Prepared:
    """Place by the history, and solve every batch with HiGHS, in one thread.

    Parameters
    ----------
    case, loads
        With the same number of experts.
    trials
        Effort of `lplb_triton.place`.

    Returns
    -------
    Prepared
    """
    with one_thread():
        if case.placement == "place":
            placement = place(
                loads.history, case.ep, redundant_per_rank=case.slots, trials=trials, device="cpu"
            )
        else:
            placement = make_placement(case.placement, loads.history, case.ep, case.slots)
        optima = optima_of(placement.problem(loads.batches))
    return Prepared(case, loads, placement, optima.reshape(len(loads.batches), -1))


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def preparations(
    jobs: Sequence[tuple[Case, Loads]], trials: int, processes: int
) -> Iterator[Iterator[Prepared]]:
    """Prepare load sets in processes of one thread each, while the body takes them in order.

    Parameters
    ----------
    jobs
        Cases with their load sets.
    trials
        As for `prepare`.
    processes
        With 1 the caller's own process does it.

    Yields
    ------
    iterator of Prepared
        In the order of the jobs. What isn't taken when the body ends is given up.
    """
    if processes == 1:
        yield (prepare(case, loads, trials) for case, loads in jobs)
        return
    # A process that has started CUDA can't be forked.
    pool = ProcessPoolExecutor(
        min(processes, max(1, len(jobs))),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_interrupts,
    )
    try:
        futures = [pool.submit(prepare, case, loads, trials) for case, loads in jobs]
        yield (future.result() for future in futures)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts() -> None:
    """Let the process that started this one answer Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        `lplb_triton.bench.timing.GraphTimer` on a GPU.

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
        `lplb_triton.bench.timing.GraphTimer` on a GPU.
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
