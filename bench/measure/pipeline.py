"""Time a whole run and its parts."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from lplb_triton import Balancer, Placement, Solution, Status
from lplb_triton.bench.measure.loads import TOP_K
from lplb_triton.bench.measure.solve import BATCHES_PER_FAMILY
from lplb_triton.bench.measure.timer import (
    Launch,
    Timer,
    WrongAnswerError,
    compute_statistics,
    copy_to_cpu,
    time_in_rounds,
)
from lplb_triton.bench.measure.workload import PUBLISHED_FAMILIES, SEED, make_solver
from lplb_triton.bench.types import Row
from lplb_triton.testing.instances import FAMILIES, shape_placement

__all__ = [
    "make_pipeline_placement",
]


PIPELINE_SHAPES = ("cube", "eplb:32:2", "eplb:64:2")

PIPELINE_TOKENS = (128, 4096, 16384)

PIPELINE_EXPERTS = 256

# Eager calls in a burst, few enough for the launch queue, and the number of bursts.
HOST_CALLS, HOST_BURSTS = 100, 10


def measure_copy_bandwidth(
    timer: Timer, device: torch.device | str, n_bytes: int = 1 << 29
) -> float:
    """Measure how many bytes a copy on the device reads and writes per second.

    Parameters
    ----------
    timer, device
        As for `time_solve`.
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
    return 2e6 * n_bytes / timer.time_call(partial(target.copy_, source), 400.0)


def make_pipeline_placement(shape: str, rng: np.random.Generator) -> Placement:
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
    """Refuse physical ids that are no copies of the logical ones, or rank loads unlike the plan's.

    Parameters
    ----------
    placement : Placement
        Of the balancer.
    idx, out : torch.Tensor
        Logical ids, and the physical ids that `Balancer.run` returned for them.
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
    plan = placement.rank_loads(counts, copy_to_cpu(solution))[0]
    if bool(((loads - plan).abs() >= placement.slots_per_rank).any()):
        raise WrongAnswerError(f"{placement!r}: rank loads miss the plan by more than rounding")


def time_run(
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
        As for `time_solve`.
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
        If ids or plans fail their checks.
    """
    rng = np.random.default_rng(seed)
    placement = make_pipeline_placement(shape, rng)
    balancer = Balancer(placement, device=device, tolerance=tolerance)
    balancer.warmup()
    batches = [
        idx.to(device) for idx in draw_routed_batches(tokens, placement.n_logical, per_family, seed)
    ]
    parts, solved = _check_parts(balancer, batches, f"{shape}, {tokens} tokens")
    n_bytes = 3 * batches[0].numel() * batches[0].element_size()
    rotated = timer.time_rotation(parts["run"])
    times = {
        name: compute_statistics(time_in_rounds(timer, parts[name], rotated))
        for name in ("run", "solve")
    }
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
        "count_us": timer.time_rotation(parts["count"]),
        "solve_us": times["solve"]["median"],
        "select_us": timer.time_rotation(parts["select"]),
        "iterations": compute_statistics([float(solution.iterations.max()) for solution in solved]),
        "host_us": 1e6 * float(np.median(seconds)),
        "allocations_per_call": allocations,
    }


def _check_parts(
    balancer: Balancer, batches: Sequence[torch.Tensor], name: str
) -> tuple[dict[str, list[Launch]], list[Solution]]:
    """Check every batch; return launches of the run and of its parts, and the solutions."""
    counted, solved, cumulative = [], [], []
    for idx in batches:
        counts, running = balancer.count(idx)
        solution = balancer.solve(counts)
        if bool((solution.status != Status.CERTIFIED).any()):
            raise WrongAnswerError(f"{name}: not certified")
        check_ids(balancer.placement, idx, balancer.run(idx), solution)
        counted.append((counts, running))
        solved.append(solution)
        cumulative.append(balancer.cumulative_shares(solution.shares))
    parts: dict[str, list[Launch]] = {
        "run": [partial(balancer.run, idx) for idx in batches],
        "count": [partial(balancer.count, idx) for idx in batches],
        "solve": [partial(make_solver(balancer), counts) for counts, _ in counted],
        "select": [
            partial(balancer.select, idx, shares, running)
            for idx, shares, (_, running) in zip(batches, cumulative, counted, strict=True)
        ],
    }
    # The checks above have compiled the other kernels.
    parts["select"][0]()
    return parts, solved


@functools.cache
def draw_routed_batches(
    tokens: int, n_experts: int, per_family: int, seed: int
) -> tuple[torch.Tensor, ...]:
    """Draw batches of every load family: top-8 of noisy scores, int64 ``[tokens, 8]``.

    The eight experts of a token are different, which evens out the loads as it does in a model.
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
    """Measure wall time and allocations of eager calls, without waiting for the device.

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
