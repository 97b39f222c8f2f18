"""Sums over batches that tell how well they were balanced, for `Balancer.metrics`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lplb_triton._layout import N_METRICS, STATUS_INVALID, Metric
from lplb_triton.kernels.count import load_counts
from lplb_triton.kernels.pdl import await_previous

BEFORE = tl.constexpr(int(Metric.BEFORE))
AFTER = tl.constexpr(int(Metric.AFTER))
STATIC = tl.constexpr(int(Metric.STATIC))
BOUND = tl.constexpr(int(Metric.BOUND))
GAP = tl.constexpr(int(Metric.GAP))
STEPS = tl.constexpr(int(Metric.STEPS))
FETCHED = tl.constexpr(int(Metric.FETCHED))
LANES = tl.constexpr(N_METRICS)
INVALID = tl.constexpr(STATUS_INVALID)


@triton.jit
def add_metrics(
    metrics_ptr,  # [N_METRICS] float64, see `Metric`
    counts_ptr,  # [n_logical] int32, tokens of each expert over all ranks
    home_experts_ptr,  # [n_group, n_ranks, n_slots] int32, experts at home in their slots, or -1
    stats_ptr,  # [3, n_group] float32: largest load, lower bound, gap
    ints_ptr,  # [2, n_group] int32: steps, status
    live_out_ptr,  # [n_live + 4] int32, the plan of live slots, if there are any
    group,
    n_group,
    n_ranks,  # ranks of a group
    n_slots,  # slots of a rank
    n_live,  # live slots of all ranks
    PDL: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
):
    """Add a group's batch to the sums; one without tokens, or with invalid counts, adds nothing."""
    index = tl.arange(0, G * S)
    rank, slot = index // S, index % S
    at = (group * n_ranks + rank) * n_slots + slot
    is_slot = (rank < n_ranks) & (slot < n_slots)
    expert = tl.load(home_experts_ptr + at, mask=is_slot, other=-1)
    await_previous(PDL)
    loads = tl.sum(load_counts(counts_ptr, expert).reshape(G, S), 1)
    total, before = tl.sum(loads, 0), tl.max(loads, 0)
    static = tl.load(stats_ptr + group)
    bound = tl.load(stats_ptr + n_group + group)
    gap = tl.load(stats_ptr + 2 * n_group + group)
    steps = tl.load(ints_ptr + group)
    status = tl.load(ints_ptr + n_group + group)
    after, n_fetched = static, n_live * 0
    if n_live > 0:
        after = tl.load(live_out_ptr + n_live).to(tl.float32, bitcast=True)
        n_fetched = tl.load(live_out_ptr + n_live + 3)
    counted = (total > 0.0) & (status != INVALID)
    scale = n_ranks / tl.where(counted, total, 1.0)
    before = tl.where(counted, before, 0.0)
    lane = tl.arange(0, LANES)
    # The first lane counts batches.
    value = tl.where(lane == BEFORE, before * scale, 1.0)
    value = tl.where(lane == AFTER, after * scale, value)
    value = tl.where(lane == STATIC, static * scale, value)
    value = tl.where(lane == BOUND, bound * scale, value)
    value = tl.where(lane == GAP, gap, value)
    value = tl.where(lane == STEPS, steps.to(tl.float32), value)
    value = tl.where(lane == FETCHED, n_fetched.to(tl.float32), value)
    # Relaxed order is enough, since the sums are read after this launch.
    amounts = tl.where(counted, value, 0.0).to(tl.float64)
    tl.atomic_add(metrics_ptr + lane, amounts, sem="relaxed")


class BatchMetrics(NamedTuple):
    """What the metrics of a batch are made of, and the sums that they are added to."""

    sums: torch.Tensor
    """[N_METRICS] float64."""
    counts: torch.Tensor
    """[n_logical] int32, over all ranks."""
    home_experts: torch.Tensor
    """[n_group, n_ranks, n_slots] int32."""
    stats: torch.Tensor
    """[3, n_group] float32."""
    ints: torch.Tensor
    """[2, n_group] int32."""
    live_out: torch.Tensor | None
    """[G L + 4] int32, see `Live.out`; None without live slots."""

    def args(self) -> tuple[Any, ...]:
        """Return the run-time arguments of `select_kernel`, the plan of live slots last."""
        live_out = self.live_out
        return (
            *self[:5], *self.home_experts.shape[1:],
            0 if live_out is None else live_out.numel() - 4,
            self.ints if live_out is None else live_out,
        )  # fmt: skip

    def constants(self) -> tuple[int, int]:
        """Return G and S."""
        _, n_ranks, n_slots = self.home_experts.shape
        return triton.next_power_of_2(n_ranks), triton.next_power_of_2(n_slots)


def no_metrics_args(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return arguments that a kernel without metrics doesn't read."""
    return (*[tensor] * 5, 0, 0, 0, tensor)
