"""Counters of solved and certified groups, changed on the device."""

from __future__ import annotations

import torch

from lplb_triton._layout import N_METRICS, Metric
from lplb_triton.placement import Placement
from lplb_triton.solution import Solution, Status

__all__ = ["add_metrics", "add_to_counter", "count_statuses"]


def count_statuses(
    status: torch.Tensor, certified: torch.Tensor, solves: torch.Tensor, uncertified: torch.Tensor
) -> None:
    """Add the groups with each status to the counters, without a host sync.

    ``status`` is ``[n_group]`` int32 of a `Solution`; the counters have one element each.
    """
    # A caller's counter that was made in inference mode can be changed in that mode only.
    with torch.inference_mode(certified.is_inference()):
        add_to_counter(certified, status == Status.CERTIFIED)
    add_to_counter(solves, torch.ones_like(status))
    add_to_counter(uncertified, status == Status.GAP)


def add_metrics(
    metrics: torch.Tensor,
    placement: Placement,
    home_rank: torch.Tensor,
    counts: torch.Tensor,
    solution: Solution,
) -> None:
    """Add each group's numbers to ``metrics``, as the solving kernel does, without a host sync.

    ``home_rank`` and ``counts`` are ``[n_logical]``. Live slots are not in it.
    """
    loads = torch.zeros(placement.ep_size, dtype=torch.float64, device=counts.device)
    loads.index_add_(0, home_rank, counts.double())
    by_group = loads.view(placement.n_group, -1)
    mean = by_group.mean(1)
    counted = (mean > 0) & (solution.status != Status.INVALID)
    amounts = torch.zeros(placement.n_group, N_METRICS, dtype=torch.float64, device=counts.device)
    amounts[:, Metric.BATCHES] = 1.0
    amounts[:, Metric.BEFORE] = by_group.amax(1) / mean
    amounts[:, Metric.AFTER] = amounts[:, Metric.STATIC] = solution.max_load.double() / mean
    amounts[:, Metric.BOUND] = solution.lower_bound.double() / mean
    amounts[:, Metric.GAP] = solution.gap.double()
    amounts[:, Metric.STEPS] = solution.iterations.double()
    total = torch.where(counted[:, None], amounts, 0.0).sum(0)
    metrics.index_add_(0, torch.arange(N_METRICS, device=counts.device), total)


def add_to_counter(counter: torch.Tensor, amounts: torch.Tensor) -> None:
    """Add a sum to a counter of one element, atomically, since other streams may add to it too."""
    first = torch.zeros(1, dtype=torch.int64, device=counter.device)
    counter.view(-1).index_add_(0, first, amounts.sum().reshape(1).to(counter.dtype))
