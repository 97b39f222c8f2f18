"""The time of ranks, by their active experts, tiles and rows (equation 28 of docs/method.md)."""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.lanes import load_lanes


@triton.jit
def find_times(
    active,
    narrow,
    wide,
    rows,
    table,  # addresses of a [2, ACTIVE, TILES] float32 table, one for each rank
    slopes,  # what a narrow tile, a wide tile and a row add, microseconds
    wide_rows,  # rows of a rank from which tiles are wide
    CANDIDATES: tl.constexpr,
    LANES: tl.constexpr,
    ACTIVE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Return the microseconds of ranks from the sums over their cells, [CANDIDATES, LANES]."""
    is_wide = rows >= wide_rows
    tiles = tl.where(is_wide, wide, narrow)
    over = tl.maximum(tiles - (TILES - 1), 0)
    at = (tl.where(is_wide, ACTIVE, 0) + active) * TILES + (tiles - over)
    by_tile = over.to(tl.float32) * tl.where(is_wide, slopes[1], slopes[0])
    base = load_lanes(table + at, at >= 0, CANDIDATES, LANES)
    return (base + rows.to(tl.float32) * slopes[2]) + by_tile


@triton.jit
def count_active(rows):
    """Return 1 for a cell with rows, else 0."""
    return (rows > 0).to(tl.int32)


@triton.jit
def count_tiles(rows, BITS: tl.constexpr):
    """Count the tiles of 2**BITS rows that ``rows`` take."""
    # The shift keeps the sign, so 0 rows take none.
    return ((rows - 1) >> BITS) + 1
