"""Pieces that the solvers share: sums over tiles, a quick inverse, whole units, first bounds."""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout

# Shares are whole units of 2**-24 (equation 11).
SHARE_ONE = tl.constexpr(_layout.SHARE_ONE)
# They are summed as multiples of 2**-30 before they are rounded: 2**PART_BITS parts are a unit.
PART_BITS = tl.constexpr(6)
PARTS_HALF = tl.constexpr(1 << 5)
PARTS_ONE = tl.constexpr(1 << 30)
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
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _max_and_add(a0, a1, b0, b1):
    return tl.maximum(a0, b0), a1 + b1


@triton.jit
def _max_add_max(a0, a1, a2, b0, b1, b2):
    return tl.maximum(a0, b0), a1 + b1, tl.maximum(a2, b2)


@triton.jit
def _max_add_max_max(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), a1 + b1, tl.maximum(a2, b2), tl.maximum(a3, b3)


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
def _parts_of(shares):
    """Shares as int32 multiples of 2**-30."""
    return (shares * PARTS_ONE + 0.5).to(tl.int32)


@triton.jit
def _units_of(upto, total):
    """Round running sums of a column's parts, ``total`` in all, to units (equation 11).

    What ``total`` lacks of 1, or has too much, is spread over the column in proportion.
    """
    lack = (total - PARTS_ONE).to(tl.float32) * (-1.0 / PARTS_ONE)
    upto += (upto.to(tl.float32) * lack).to(tl.int32)
    return tl.minimum((upto + PARTS_HALF) >> PART_BITS, SHARE_ONE)


@triton.jit
def _quantize(shares, rank, last):
    """Shares [G, C] in units, int32, that sum to exactly 1 per column (equation 11).

    ``last`` [1, C] is the rank of a column's last copy; -1 in a column without copies, which gets
    nothing.
    """
    parts = _parts_of(shares)
    upto = tl.cumsum(parts, 0)
    total = _column_sum(parts)
    before = tl.where(rank > last, SHARE_ONE, _units_of(upto - parts, total))
    upto = tl.where(rank >= last, SHARE_ONE, _units_of(upto, total))
    return upto - before


@triton.jit
def _shares(units):
    """Units of 2**-24 as float32, exactly."""
    return units.to(tl.float32) * (1.0 / SHARE_ONE)


@triton.jit
def _mean_and_bound(load, fixed, n_ranks):
    """Largest of the first plan's loads, their sum, a bound, and whether they are no numbers."""
    max_load, total, bound = tl.reduce((load, load, fixed), 0, _max_add_max)
    return _valid_start(max_load, total, bound, n_ranks)


@triton.jit
def _valid_start(max_load, total, bound, n_ranks):
    """Finish `_mean_and_bound`, given the largest load, the sum, and the largest fixed load."""
    invalid = (total < float("inf")) == 0
    bound = tl.maximum(bound, total / n_ranks.to(tl.float32))
    return tl.where(invalid, 0.0, max_load), total, tl.where(invalid, 0.0, bound), invalid
