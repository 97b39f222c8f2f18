"""The bound that a solve begins with, and the certificate that it ends with (equation 3).

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.solve.tiles import max_add_max

# The fraction of the bound that is taken off for the round-off of its float32 sums, 2**-20.
BOUND_ALLOWANCE = tl.constexpr(9.5367431640625e-07)

# Values of `lplb_triton.Status`.
STATUS_CERTIFIED = tl.constexpr(_layout.STATUS_CERTIFIED)
STATUS_GAP = tl.constexpr(_layout.STATUS_GAP)
STATUS_INVALID = tl.constexpr(_layout.STATUS_INVALID)


@triton.jit
def compute_first_bound(load, fixed, n_ranks):
    """Bound the optimum by the mean load and the largest fixed load, before any iteration.

    ``load`` and ``fixed`` [G] float32 are the first plan's loads and the part of them that no plan
    can move. Returns what `check_first_bound` does.
    """
    max_load, total, largest_fixed = tl.reduce((load, load, fixed), 0, max_add_max)
    return check_first_bound(max_load, total, largest_fixed, n_ranks)


@triton.jit
def check_first_bound(max_load, total, largest_fixed, n_ranks):
    """Bound the optimum as `compute_first_bound` does, from reductions that the caller has made.

    Returns the first plan's largest load, the sum of its loads, the bound, and whether the loads
    are invalid, that is, whether their sum is infinite or NaN; load and bound are 0 then.
    """
    invalid = (total < float("inf")) == 0
    bound = tl.maximum(largest_fixed, total / n_ranks.to(tl.float32))
    return tl.where(invalid, 0.0, max_load), total, tl.where(invalid, 0.0, bound), invalid


@triton.jit
def certify(max_load, bound, tolerance, invalid):
    """Judge a plan by its largest load and a bound (equation 3).

    Returns largest load, lower bound, relative gap and status, scalars.
    """
    inf = float("inf")
    max_load = tl.where(invalid, 0.0, max_load)
    lower_bound = tl.minimum(bound * (1.0 - BOUND_ALLOWANCE), max_load)
    gap = (max_load - lower_bound) / tl.where(max_load > 0, max_load, 1.0)
    gap = tl.where(invalid, inf, gap)
    status = tl.where(gap <= tolerance, STATUS_CERTIFIED, STATUS_GAP)
    status = tl.where(invalid, STATUS_INVALID, status)
    return tl.where(invalid, inf, max_load), lower_bound, gap, status


@triton.jit
def store_certificate(
    stats_ptr,  # [3, B] float32: largest load, lower bound and gap of each instance
    ints_ptr,  # [2, B] int32: iterations and status of each instance
    instance,
    n_instances,
    max_load,
    lower_bound,
    gap,
    iterations,
    status,
):
    """Write one instance's numbers; B is ``n_instances``."""
    tl.store(stats_ptr + instance, max_load)
    tl.store(stats_ptr + n_instances + instance, lower_bound)
    tl.store(stats_ptr + 2 * n_instances + instance, gap)
    tl.store(ints_ptr + instance, iterations)
    tl.store(ints_ptr + n_instances + instance, status)
