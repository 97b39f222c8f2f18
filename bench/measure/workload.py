"""Draw loads of six families on a placement, and check plans against HiGHS."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lplb_triton import Balancer, Placement, Problem, Solution, Status
from lplb_triton.bench.measure.timer import WrongAnswerError
from lplb_triton.bench.types import Floats
from lplb_triton.testing.instances import FAMILIES, draw_loads, shape_placement
from lplb_triton.testing.verify import SLACK, highs_optimum

__all__ = [
    "PUBLISHED_FAMILIES",
    "SEED",
    "Workload",
    "check_plan",
    "get_instance",
    "make_solver",
]


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

PUBLISHED_FAMILIES = tuple(FAMILIES)[:6]

SEED = 20


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
        """Return weights ``[B, C]`` and fixed loads ``[B, G]`` in float32 on a device."""
        return (
            self.problem.weights.to(device, torch.float32),
            self.problem.fixed.to(device, torch.float32),
        )

    def single(self, index: int, device: torch.device | str) -> Problem:
        """Return one instance on a device, in float32."""
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
        The optimum that another solver found.
    name : str
        Name of the instance in the message.
    certified : bool
        Whether to refuse also a feasible plan with a true bound that reports a gap wider than the
        tolerance.

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


def make_solver(balancer: Balancer) -> Callable[[torch.Tensor], object]:
    """Return the solve of `Balancer.run`: to shares by copy and a certificate, in one launch.

    `Balancer.solve` needs a second launch, which spreads the shares over ranks and columns.

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


def get_instance(workload: Workload, index: int) -> Problem:
    """Return one instance in float64 on the CPU, as `check_plan` takes it."""
    p = workload.problem
    return Problem(p.weights[index : index + 1], p.fixed[index : index + 1], p.mask)
