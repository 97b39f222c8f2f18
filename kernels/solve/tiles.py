"""Arithmetic that the solvers share: reductions, a quick reciprocal, and shares in whole units.

Equation numbers refer to docs/method.md. In tiles ``[G, C]`` the first axis is ranks and the second
columns, both padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout

# Shares are whole units of 2**-24 (equation 11).
SHARE_ONE = tl.constexpr(_layout.SHARE_ONE)
# Running sums of shares are of fine units, 2**-30, before they are rounded to units: 2**FINE_BITS
# of them are a unit.
FINE_BITS = tl.constexpr(6)
FINE_HALF = tl.constexpr(1 << 5)
FINE_ONE = tl.constexpr(1 << 30)


@triton.jit
def reciprocal(x):
    """Compute 1 / x for positive x in two instructions; the last bits may be wrong."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def add2(a0, a1, b0, b1):
    """Combine two sums, for `tl.reduce`."""
    return a0 + b0, a1 + b1


@triton.jit
def add3(a0, a1, a2, b0, b1, b2):
    """Combine three sums, for `tl.reduce`."""
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def max_add(a0, a1, b0, b1):
    """Combine a maximum and a sum, for `tl.reduce`."""
    return tl.maximum(a0, b0), a1 + b1


@triton.jit
def max_add_max(a0, a1, a2, b0, b1, b2):
    """Combine a maximum, a sum and a maximum, for `tl.reduce`."""
    return tl.maximum(a0, b0), a1 + b1, tl.maximum(a2, b2)


@triton.jit
def max_add_max_max(a0, a1, a2, a3, b0, b1, b2, b3):
    """Combine a maximum, a sum and two maxima, for `tl.reduce`."""
    return tl.maximum(a0, b0), a1 + b1, tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def find_largest_load(loads):
    """Find the largest of loads, float32 of any shape, at least one of them above 0.

    The bits are compared as integers, which a warp does in one instruction. Loads that round-off
    left just below 0 compare as less than all others.
    """
    return tl.max(loads.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def sum_columns(tile):
    """Sum a tile [G, C] over ranks, [1, C]."""
    return tl.sum(tile, 0, keep_dims=True)


@triton.jit
def to_fine_units(shares):
    """Round shares in float32 to fine units of 2**-30, int32."""
    return (shares * FINE_ONE + 0.5).to(tl.int32)


@triton.jit
def round_running_sums(running, total):
    """Round running sums of a column's shares to units (equation 11).

    ``running`` and ``total``, the sum of the whole column, are in fine units, int32. What the total
    lacks of 1, or exceeds it by, is spread over the column in proportion.
    """
    lack = (total - FINE_ONE).to(tl.float32) * (-1.0 / FINE_ONE)
    running += (running.to(tl.float32) * lack).to(tl.int32)
    return tl.minimum((running + FINE_HALF) >> FINE_BITS, SHARE_ONE)


@triton.jit
def quantize_shares(shares, rank, last):
    """Round shares [G, C] to units, int32, that sum to exactly 1 per column (equation 11).

    ``rank`` [G, 1] numbers the ranks. ``last`` [1, C] is the rank of a column's last copy; it is -1
    for a column without copies, which gets no units.
    """
    fine = to_fine_units(shares)
    running = tl.cumsum(fine, 0)
    total = sum_columns(fine)
    lower = tl.where(rank > last, SHARE_ONE, round_running_sums(running - fine, total))
    upper = tl.where(rank >= last, SHARE_ONE, round_running_sums(running, total))
    return upper - lower


@triton.jit
def units_to_shares(units):
    """Convert units of 2**-24 to shares in float32, exactly."""
    return units.to(tl.float32) * (1.0 / SHARE_ONE)
