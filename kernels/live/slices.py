"""Numbers by rank: tuples of slices of LANES ranks, one in each lane, which stay in registers."""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.live.arguments import LANES


@triton.jit
def find_largest(slices, SLICES: tl.constexpr):
    """Return the largest of numbers by rank."""
    largest = slices[0]
    for h in tl.static_range(1, SLICES):
        largest = tl.maximum(largest, slices[h])
    return tl.max(largest, 0)


@triton.jit
def sum_slices(slices, SLICES: tl.constexpr):
    """Return the sum of numbers by rank."""
    total = slices[0]
    for h in tl.static_range(1, SLICES):
        total += slices[h]
    return tl.sum(total, 0)


@triton.jit
def take(slices, rank, SLICES: tl.constexpr):
    """Return the number of one rank, which must not be negative."""
    lane = tl.arange(0, LANES)
    found = tl.where(lane == rank, slices[0], 0)
    for h in tl.static_range(1, SLICES):
        found = tl.where(lane + h * LANES == rank, slices[h], found)
    return tl.max(found, 0)


@triton.jit
def add_at(slices, rank, amount, SLICES: tl.constexpr):
    """Add to the number of one rank."""
    lane = tl.arange(0, LANES)
    added = ()
    for h in tl.static_range(SLICES):
        added += (tl.where(lane + h * LANES == rank, slices[h] + amount, slices[h]),)
    return added
