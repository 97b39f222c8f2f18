"""Sums over batches that tell how well they were balanced, for `Balancer.metrics`."""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton._layout import N_METRICS, Metric

BEFORE = tl.constexpr(int(Metric.BEFORE))
AFTER = tl.constexpr(int(Metric.AFTER))
STATIC = tl.constexpr(int(Metric.STATIC))
BOUND = tl.constexpr(int(Metric.BOUND))
GAP = tl.constexpr(int(Metric.GAP))
STEPS = tl.constexpr(int(Metric.STEPS))
FETCHED = tl.constexpr(int(Metric.FETCHED))
LANES = tl.constexpr(N_METRICS)


@triton.jit
def find_load_at_home(counts, is_home, G: tl.constexpr, S: tl.constexpr):
    """Find the largest load of a rank if every token went to its expert's home.

    ``counts`` and ``is_home`` [G S] are by rank and slot.
    """
    return tl.max(tl.sum(tl.where(is_home, counts, 0.0).reshape(G, S), 1), 0)


@triton.jit
def add_metrics(
    metrics_ptr,  # [N_METRICS] float64
    n_ranks,
    total,  # float32, sum of the loads
    before,  # float32, largest load with every token at its expert's home
    after,  # float32, largest load of the plan
    static,  # float32, largest load of the plan of static copies
    bound,  # float32, load that no plan of static copies can beat
    gap,  # float32
    steps,  # steps by potentials
    n_fetched,  # experts fetched to live slots
):
    """Add a group's batch to the sums; one without tokens, or with invalid counts, adds nothing."""
    lane = tl.arange(0, LANES)
    counted = (total > 0.0) & (total < float("inf"))
    mean = tl.where(counted, total / n_ranks, 1.0)
    # The first lane counts batches.
    value = tl.where(lane == BEFORE, before / mean, 1.0)
    value = tl.where(lane == AFTER, after / mean, value)
    value = tl.where(lane == STATIC, static / mean, value)
    value = tl.where(lane == BOUND, bound / mean, value)
    value = tl.where(lane == GAP, gap, value)
    value = tl.where(lane == STEPS, steps.to(tl.float32), value)
    value = tl.where(lane == FETCHED, n_fetched.to(tl.float32), value)
    # Relaxed order is enough, since the sums are read after this launch.
    amounts = tl.where(counted, value, 0.0).to(tl.float64)
    tl.atomic_add(metrics_ptr + lane, amounts, mask=counted, sem="relaxed")
