"""Check and time solves on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from lplb_triton import Balancer, Placement, Status
from lplb_triton.bench.measure.timer import (
    Timer,
    WrongAnswerError,
    compute_statistics,
    copy_to_cpu,
)
from lplb_triton.bench.measure.workload import make_solver
from lplb_triton.bench.types import Row
from lplb_triton.testing.verify import SLACK

__all__ = ["compile_solves", "time_plans"]

# Kernels that are compiled at once.
COMPILERS = 8


def compile_solves(
    placements: Sequence[Placement], device: torch.device | str, tolerance: float
) -> None:
    """Compile the solving kernels of placements side by side, which takes seconds for each size.

    Parameters
    ----------
    placements
        Which the back end of the device takes.
    device
        A GPU.
    tolerance
        Certified gap asked of every LP.
    """

    def solve_once(balancer: Balancer) -> None:
        counts = torch.ones(balancer.placement.n_logical, dtype=torch.int32, device=device)
        make_solver(balancer)(counts)

    balancers = [_make(placement, device, tolerance) for placement in placements]
    with ThreadPoolExecutor(COMPILERS) as pool:
        # The list makes an error of a thread appear here.
        list(pool.map(solve_once, balancers))


def time_plans(
    placement: Placement,
    batches: torch.Tensor,
    timer: Timer,
    device: torch.device | str,
    tolerance: float,
) -> Row:
    """Time the solve of every batch, all groups in one launch, after checking every plan.

    Parameters
    ----------
    placement
        Which the back end of the device takes.
    batches
        ``[batches, n_logical]`` int64 tokens on the CPU.
    timer, device
        Timer of the launches, and the device that they run on.
    tolerance
        Certified gap asked of every LP.

    Returns
    -------
    dict
        ``us``, statistics over the batches, and ``uncertified``, batches with a gap above the
        tolerance.

    Raises
    ------
    WrongAnswerError
        If plan and bound contradict those of the twin; nothing is timed then.
    """
    balancer = _make(placement, device, tolerance)
    twin = Balancer(placement, device="cpu", backend="torch", rank=0, tolerance=tolerance)
    uncertified = 0
    on_device = batches.to(device, torch.int32)
    for number, counts in enumerate(batches):
        found, ours = copy_to_cpu(balancer.solve(on_device[number])), twin.solve(counts)
        loads = placement.rank_loads(counts, found).reshape(placement.n_group, -1).amax(1)
        small = SLACK * loads.clamp(min=1.0)
        wrong = (
            ((loads - found.max_load).abs() > small)
            | (found.lower_bound > ours.max_load + small)
            | (ours.lower_bound > loads + small)
        )
        if bool(wrong.any()):
            raise WrongAnswerError(
                f"{placement}, batch {number}: the largest load {float(loads.max()):.8g} or its "
                "bound contradicts the twin's"
            )
        uncertified += bool((found.status != Status.CERTIFIED).any())
    counts = torch.zeros_like(on_device[0])
    times = timer.time_batches(partial(make_solver(balancer), counts), counts, on_device)
    return {"us": compute_statistics(times), "uncertified": uncertified}


def _make(placement: Placement, device: torch.device | str, tolerance: float) -> Balancer:
    return Balancer(placement, device=device, rank=0, tolerance=tolerance)
