"""Pieces that the solvers share: sums over tiles of a group, and a quick inverse."""

from __future__ import annotations

import triton
import triton.language as tl


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
def _column_sum(tile):
    return tl.sum(tile, 0, keep_dims=True)
