"""Plans of one LP, of an LP for each group, and of two levels of LPs, by the twins on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lplb_triton import Balancer, Placement, Problem, Solution, solve
from lplb_triton.bench.balance import expand_shares
from lplb_triton.bench.scale.loads import ScaleLoads

__all__ = ["Outcome", "join_ranks", "plan_even", "plan_levels", "plan_programs"]


class Outcome(NamedTuple):
    """How well batches are balanced.

    Attributes
    ----------
    imbalance
        Largest over mean rank load of each batch.
    gap
        The largest certified relative gap of an LP; 0 where there is none.
    across_local, across_global
        Part of the assignments that leave their node, in the mean: where each rank divides its own
        tokens by the shares (``quotas="local"``), and where nodes keep what their copies take
        (``quotas="global"``).
    """

    imbalance: list[float]
    gap: float
    across_local: float
    across_global: float


def plan_even(placement: Placement, loads: ScaleLoads) -> Outcome:
    """Split the tokens of each expert evenly over its copies.

    Parameters
    ----------
    placement
        Where experts are.
    loads
        With the placement's experts.
    """
    experts = placement.phy2log.long()
    slots = 1.0 / placement.logcnt.double()[experts].reshape(placement.ep_size, -1)
    parts = torch.zeros(placement.ep_size, placement.n_logical, dtype=torch.float64, device="cpu")
    parts.scatter_add_(1, experts.reshape(placement.ep_size, -1), slots)
    return _judge([parts] * len(loads.test), loads, 0.0)


def plan_programs(placement: Placement, loads: ScaleLoads, tolerance: float) -> Outcome:
    """Solve the LP of each group of the placement.

    Parameters
    ----------
    placement
        Where experts are.
    loads
        With the placement's experts.
    tolerance
        Certified gap asked of every LP.
    """
    balancer = Balancer(placement, device="cpu", backend="torch", rank=0, tolerance=tolerance)
    solutions = [balancer.solve(counts) for counts in loads.test]
    parts = [_expand(placement, solution) for solution in solutions]
    return _judge(parts, loads, max(float(one.gap.max()) for one in solutions))


def plan_levels(placement: Placement, group: int, loads: ScaleLoads, tolerance: float) -> Outcome:
    """Divide the tokens among groups of ranks by an LP, then in each group by an LP of its own.

    Parameters
    ----------
    placement
        Of one LP group.
    group
        Consecutive ranks of a group, at most 128, since the LPs within groups are dense ones.
    loads
        With the placement's experts.
    tolerance
        Certified gap asked of every LP.
    """
    joined = join_ranks(placement, group)
    between = Balancer(joined, device="cpu", backend="torch", rank=0, tolerance=tolerance)
    outer = [between.solve(counts) for counts in loads.test]
    held = _held(placement).reshape(-1, group, placement.n_logical)
    # An LP within a group has the experts of several of its ranks; others' tokens are fixed.
    several = held.sum(1) > 1
    parts, gap = [], max(float(one.gap.max()) for one in outer)
    for counts, solution in zip(loads.test, outer, strict=True):
        by_group = _expand(joined, solution)
        found, inner_gap = _plan_groups(held, several, by_group * counts, tolerance)
        within = torch.where(several[:, None], found, held.double())
        parts.append((within * by_group[:, None]).reshape(placement.ep_size, -1))
        gap = max(gap, inner_gap)
    return _judge(parts, loads, gap)


def join_ranks(placement: Placement, group: int) -> Placement:
    """Return a placement whose ranks are the groups of ranks of another one.

    Parameters
    ----------
    placement
        Of one LP group.
    group
        Consecutive ranks that are joined.
    """
    return Placement.from_phy2log(
        placement.phy2log, placement.ep_size // group, n_logical=placement.n_logical
    )


def _plan_groups(
    held: torch.Tensor, several: torch.Tensor, tokens: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, float]:
    """Solve all groups' LPs; return shares ``[groups, group, n_logical]`` and the largest gap."""
    n_groups, size, _ = held.shape
    n_columns = max(1, int(several.sum(1).max()))
    # Columns of a group: its experts on several ranks, then padding.
    order = several.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_columns]
    real = several.gather(1, order)
    mask = held.gather(2, order[:, None].expand(-1, size, -1)) & real[:, None]
    weights = torch.where(real, tokens.gather(1, order), 0.0)
    fixed = (held * torch.where(several, 0.0, tokens)[:, None]).sum(2)
    solution = solve(Problem(weights, fixed, mask), tolerance=tolerance, backend="torch")
    shares = torch.zeros(held.shape, dtype=torch.float64, device="cpu")
    shares.scatter_(2, order[:, None].expand(-1, size, -1), solution.shares.double())
    return shares, float(solution.gap.max())


def _held(placement: Placement) -> torch.Tensor:
    """Return ``[ep_size, n_logical]`` bool, whether a rank holds an expert."""
    held = torch.zeros(placement.ep_size, placement.n_logical, dtype=torch.bool, device="cpu")
    held.scatter_(1, placement.phy2log.long().reshape(placement.ep_size, -1), True)
    return held


def _expand(placement: Placement, solution: Solution) -> torch.Tensor:
    """Return ``[ep_size, n_logical]`` float64, the part of an expert's tokens that a rank takes."""
    return torch.from_numpy(expand_shares(placement, solution.shares))


def _judge(parts: list[torch.Tensor], loads: ScaleLoads, gap: float) -> Outcome:
    """Judge plans ``[ep_size, n_logical]`` of the batches."""
    imbalance, local, near = [], [], []
    nodes = loads.by_node.shape[1]
    for part, counts, sent in zip(parts, loads.test, loads.by_node, strict=True):
        ranks = (part * counts).sum(1)
        imbalance.append(float(ranks.max() / ranks.mean()))
        taken = part.reshape(nodes, -1, part.shape[1]).sum(1)
        total = float(sent.sum())
        local.append(1 - float((sent * taken).sum()) / total)
        near.append(1 - float(torch.minimum(sent, taken * counts).sum()) / total)
    return Outcome(imbalance, gap, float(np.mean(local)), float(np.mean(near)))
