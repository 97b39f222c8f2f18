"""The kernel that solves a batch of dense programs, as `lplb_triton.solve` takes them.

Equation numbers refer to docs/method.md. The padded sizes are G ranks and C columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.solve.certificate import (
    BOUND_ALLOWANCE,
    certify,
    compute_first_bound,
    store_certificate,
)
from lplb_triton.kernels.solve.interior_point import iterate
from lplb_triton.kernels.solve.levelling import ROUNDED_FRACTION, choose_aimed_gap
from lplb_triton.kernels.solve.tiles import quantize_shares, sum_columns, units_to_shares


@triton.jit
def _check_loads(weights, fixed, copy, n_copies):
    """Make fixed loads infinite if a load is negative or not finite, or a weight has no copy.

    Also adds the weights of columns with one copy to the fixed loads. Returns weights [1, C], 0
    where they aren't allowed, fixed loads [G], and which columns have one copy, [1, C] bool.
    """
    inf = float("inf")
    allowed = (weights >= 0) & (weights < inf) & ((weights == 0) | (n_copies > 0))
    weights = tl.where(allowed, weights, 0.0)
    fixed = tl.where((fixed >= 0) & (tl.min(allowed.to(tl.int32)) > 0), fixed, inf)
    single = n_copies == 1.0
    fixed += tl.sum(tl.where(copy & single, weights, 0.0), 1)
    return weights, fixed, single


@triton.jit
def _make_plan(start, even):
    """Make a plan of any numbers [G, C]: shares that sum to 1 per column, else the even split."""
    start = tl.where(start > 0, tl.minimum(start, 1.0), 0.0)
    total = sum_columns(start)
    return tl.where(total > 0, start / tl.where(total > 0, total, 1.0), even)


@triton.jit
def _compare_start(start, even, rank, last, fixed, weights, units, load):
    """Take another first plan if its largest load is smaller than that of the even split.

    ``start`` and ``even`` are shares [G, C], ``rank`` and ``last`` as for `quantize_shares`;
    ``units`` [G, C] and ``load`` [G] are those of the even split. Returns units and load.
    """
    start = _make_plan(start, even)
    start_units = quantize_shares(start, rank, last)
    start_load = fixed + tl.sum(units_to_shares(start_units) * weights, 1)
    better = tl.max(start_load) < tl.max(load)
    return tl.where(better, start_units, units), tl.where(better, start_load, load)


@triton.jit(
    do_not_specialize=["mask_stride", "max_iterations", "n_ranks", "n_columns"],
    do_not_specialize_on_alignment=["weights_ptr", "fixed_ptr", "mask_ptr"],
)
def solve_dense_kernel(
    weights_ptr,  # [B, n_columns] float32, tokens of each column
    fixed_ptr,  # [B, n_ranks] float32, loads that no plan can move
    mask_ptr,  # [B or 1, n_ranks, n_columns] int8, where copies are
    mask_stride,  # from one instance's mask to the next, 0 if all share one
    start_ptr,  # [B, n_ranks, n_columns] float32, a plan to compare with the even split
    shares_ptr,  # [B, n_ranks, n_columns] float32, every element is written
    stats_ptr,  # [3, B] float32, written: largest load, lower bound, gap
    ints_ptr,  # [2, B] int32, written: iterations, status
    tolerance,  # float32, relative gap to reach
    max_iterations,
    n_ranks,
    n_columns,
    G: tl.constexpr,  # ranks and columns, padded to powers of two
    C: tl.constexpr,
    HAS_START: tl.constexpr,  # whether ``start`` is read
):
    """Solve instance ``program_id(0)`` of a batch (equations 3 to 11). Grid (B,)."""
    instance = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, G)
    col = tl.arange(0, C)
    is_rank = rank < n_ranks
    is_col = col < n_columns
    in_tile = is_rank[:, None] & is_col[None, :]
    entry = rank[:, None] * n_columns + col[None, :]
    weights = tl.load(weights_ptr + instance * n_columns + col, mask=is_col, other=0.0)[None, :]
    fixed = tl.load(fixed_ptr + instance * n_ranks + rank, mask=is_rank, other=0.0)
    copy = tl.load(mask_ptr + instance * mask_stride + entry, mask=in_tile, other=0) != 0
    n_copies = sum_columns(copy.to(tl.float32))
    weights, fixed, single = _check_loads(weights, fixed, copy, n_copies)
    last = tl.max(tl.where(copy, rank[:, None], -1), 0, keep_dims=True)
    even = tl.where(copy, 1.0 / tl.maximum(n_copies, 1.0), 0.0)
    units = quantize_shares(even, rank[:, None], last)
    # The method has no choice in a column with one copy, whose tokens are in the fixed loads.
    weights = tl.where(single, 0.0, weights)
    load = fixed + tl.sum(units_to_shares(units) * weights, 1)
    if HAS_START:
        start = tl.load(
            start_ptr + instance * n_ranks * n_columns + entry, mask=in_tile & copy, other=0.0
        )
        units, load = _compare_start(start, even, rank[:, None], last, fixed, weights, units, load)
    max_load, total, bound, invalid = compute_first_bound(load, fixed, n_ranks)
    iterations = max_iterations * 0
    target = tolerance - BOUND_ALLOWANCE
    if max_load - bound > max_load * (target * ROUNDED_FRACTION):
        plan, bound, iterations = iterate(
            units_to_shares(units), max_load, bound, weights, fixed, copy, is_rank, n_ranks, total,
            tolerance, choose_aimed_gap(target, n_ranks), max_iterations, G, C,
        )  # fmt: skip
        units = quantize_shares(plan, rank[:, None], last)
        max_load = tl.max(fixed + tl.sum(units_to_shares(units) * weights, 1))
    max_load, lower_bound, gap, status = certify(max_load, bound, tolerance, invalid)
    shares_ptrs = shares_ptr + instance * n_ranks * n_columns + entry
    tl.store(shares_ptrs, units_to_shares(units), mask=in_tile)
    store_certificate(
        stats_ptr, ints_ptr, instance, tl.num_programs(0),
        max_load, lower_bound, gap, iterations, status,
    )  # fmt: skip
