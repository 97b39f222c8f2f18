"""Numbers by rank in slices [CANDIDATES, LANES], one rank in each lane and a warp for each row.

They stay in registers, and numbers of other ranks are shuffled within a warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Ranks of a warp's slice, and the most slices. More ranks than these hold are one large slice, and
# several ranks share a lane.
WARP, MOST_SLICES = 32, 4


def cut_slices(ranks: int) -> tuple[int, int]:
    """Return the slices that padded ranks are handled in, and the ranks of each."""
    slices = ranks // WARP
    return (slices, WARP) if slices <= MOST_SLICES else (1, ranks)


@triton.jit
def number_ranks(H: tl.constexpr, LANES: tl.constexpr, CANDIDATES: tl.constexpr):
    """Return the numbers of the ranks of slice H, [CANDIDATES, LANES]."""
    return tl.arange(0, CANDIDATES)[:, None] * 0 + (H * LANES + tl.arange(0, LANES)[None, :])


@triton.jit
def load_lanes(pointers, mask, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Load a block [ROWS, LANES], 0 where ``mask`` is not set, so that lanes keep their numbers.

    Triton 3.6 spreads the rows of a block over each warp where it doesn't see that addresses of a
    row follow each other; the numbers would then go through shared memory, with barriers. It leaves
    a single row as it is.
    """
    size: tl.constexpr = ROWS * LANES
    flat = tl.load(tl.reshape(pointers, (size,)), mask=tl.reshape(mask, (size,)), other=0)
    return tl.reshape(flat, (ROWS, LANES))


@triton.jit
def store_lanes(pointers, values, mask, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Store a block [ROWS, LANES] where ``mask`` is set; see `load_lanes`."""
    size: tl.constexpr = ROWS * LANES
    flat = tl.reshape(values, (size,))
    tl.store(tl.reshape(pointers, (size,)), flat, mask=tl.reshape(mask, (size,)))


@triton.jit
def take_partners(slices, partner, SLICES: tl.constexpr, LANES: tl.constexpr):
    """Return the number of each rank's partner, from the same candidate."""
    lane = partner & (LANES - 1)
    found = tl.gather(slices[0], lane, 1)
    for h in tl.static_range(1, SLICES):
        found = tl.where(partner >= h * LANES, tl.gather(slices[h], lane, 1), found)
    return found
