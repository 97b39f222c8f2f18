"""The kernel that expands shares by copy to the dense shares of a `Solution`."""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.solve.tiles import units_to_shares


@triton.jit(do_not_specialize=["n_ranks", "n_columns", "n_shared"])
def expand_kernel(
    cumulative_ptr,  # [n_copies] int32, cumulative shares by copy (equation 12)
    cell_number_ptr,  # tables, as in `ExpandTables`
    cell_ends_ptr,
    shares_ptr,  # [n_group, n_ranks, n_columns] float32, written
    n_ranks,
    n_columns,
    n_shared,
    BLOCK: tl.constexpr,  # shares that one program writes
):
    """Turn cumulative shares by copy into shares by rank and column, 0 where no copy is.

    Grid (n_group cdiv(n_ranks n_columns, BLOCK),).
    """
    n = n_ranks * n_columns
    blocks = tl.cdiv(n, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_group = entry < n
    # The table is by column, then by rank.
    number_ptrs = cell_number_ptr + group * n + entry % n_columns * n_ranks + entry // n_columns
    cell = tl.load(number_ptrs, mask=in_group, other=-1)
    ends_ptrs = cell_ends_ptr + group * 2 * n_shared + cell
    last = tl.load(ends_ptrs, mask=cell >= 0, other=-1)
    previous = tl.load(ends_ptrs + n_shared, mask=cell >= 0, other=-1)
    units = tl.load(cumulative_ptr + last, mask=last >= 0, other=0)
    units -= tl.load(cumulative_ptr + previous, mask=previous >= 0, other=0)
    tl.store(shares_ptr + group * n + entry, units_to_shares(units), mask=in_group)
