"""The units of shares, and the offset at which their rounding to whole tokens begins.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout

SHARE_BITS = tl.constexpr(_layout.SHARE_BITS)
SHARE_MASK = tl.constexpr(_layout.SHARE_ONE - 1)
SHARE_HALF = tl.constexpr(_layout.SHARE_ONE // 2)
OFFSET_BY_RANK = tl.constexpr(_layout.OFFSET_BY_RANK)
OFFSET_BY_EXPERT = tl.constexpr(_layout.OFFSET_BY_EXPERT)


@triton.jit
def compute_rounding_offset(rank, expert):
    """Return the offset of a rank's rounding of an expert (equation 13); all are int64."""
    return (expert * OFFSET_BY_EXPERT + rank * OFFSET_BY_RANK + SHARE_HALF) & SHARE_MASK
