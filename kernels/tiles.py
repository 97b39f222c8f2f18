"""Pieces that the solvers share: sums over tiles, a quick inverse, whole units, first bounds."""

from __future__ import annotations

import triton
import triton.language as tl

# Shares are whole units of 2**-24 (equation 11).
SHARE_ONE = tl.constexpr(1 << 24)
# Taken off the bound for the round-off of its float32 sums (2**-20; equation 3).
BOUND_ALLOWANCE = tl.constexpr(9.5367431640625e-07)


@triton.jit
def _inverse(x):
    """Compute 1 / x for positive x, in two instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _max_and_add(a0, a1, b0, b1):
    return tl.maximum(a0, b0), a1 + b1


@triton.jit
def _max_add_max(a0, a1, a2, b0, b1, b2):
    return tl.maximum(a0, b0), a1 + b1, tl.maximum(a2, b2)


@triton.jit
def _largest_load(loads):
    """Largest of the loads, some above 0: as integers, which a warp compares at once.

    Loads just below 0, of round-off, come out as smaller than any other.
    """
    return tl.max(loads.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _column_sum(tile):
    return tl.sum(tile, 0, keep_dims=True)


@triton.jit
def _quantize(shares, rank, last):
    """Shares [G, C] in units, int32, that sum to exactly 1 per column.

    ``last`` [1, C] is the rank of a column's last copy, which gets what is missing to 1
    (equation 11); -1 in a column without copies, which gets nothing.
    """
    units = (shares * SHARE_ONE + 0.5).to(tl.int32)
    upto = tl.cumsum(units, 0)
    before = tl.minimum(upto - units, SHARE_ONE)
    upto = tl.where(rank >= last, SHARE_ONE, tl.minimum(upto, SHARE_ONE))
    before = tl.where(rank > last, SHARE_ONE, before)
    return upto - before


@triton.jit
def _shares(units):
    """Units of 2**-24 as float32, exactly."""
    return units.to(tl.float32) * (1.0 / SHARE_ONE)


@triton.jit
def _mean_and_bound(load, fixed, n_ranks):
    """Largest of the first plan's loads, their sum, a bound, and whether they are no numbers."""
    max_load, total, bound = tl.reduce((load, load, fixed), 0, _max_add_max)
    invalid = (total < float("inf")) == 0
    bound = tl.maximum(bound, total / n_ranks.to(tl.float32))
    return tl.where(invalid, 0.0, max_load), total, tl.where(invalid, 0.0, bound), invalid
