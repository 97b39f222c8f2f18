"""The kernels that solve one batch: a program for each group of ranks, one launch.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.interior_point import _newton, _newton_in_memory
from lplb_triton.kernels.levelling import _balance
from lplb_triton.kernels.sync import _sum_over_ranks
from lplb_triton.kernels.tiles import SHARE_ONE, _column_sum, _max_add_max, _quantize, _shares
from lplb_triton.kernels.tokens import (
    _await_counts,
    _await_previous,
    _start_dependents,
    _sum_rows,
)

# The gap that is aimed at, as a part of the tolerance.
TARGET_PART = tl.constexpr(0.98)
# That and what rounding may take of it: a level plan that gets here needs no Newton's method.
ROUNDED_PART = tl.constexpr(0.99)
# Taken off the bound for the round-off of its float32 sums (2**-20; equation 3).
BOUND_ALLOWANCE = tl.constexpr(9.5367431640625e-07)

STATUS_CERTIFIED = tl.constexpr(0)
STATUS_GAP = tl.constexpr(1)
STATUS_INVALID = tl.constexpr(2)


@triton.jit
def _solve_group(
    weights, fixed, units, last, rank_on, n_ranks, tolerance, max_iterations,
    x_ptr, scratch_ptr, edges_ptr, n_classes, width, n_columns, cell, inside,
    G: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Solve one group: by levelling along edges if that gets there, else by Newton's method.

    Parameters
    ----------
    weights, fixed : ``[1, C]``, ``[G]`` float32
        Loads, at least 0; a fixed load that is not finite makes the group invalid. No weight
        is on a column with fewer than two copies.
    units : ``[G, C]`` int32
        The even split in units of 2**-24, above 0 where a copy is.
    last : ``[1, C]`` int32
        Rank of a column's last copy.
    rank_on : ``[G]`` int1
        Which ranks are no padding, and so the first ``n_ranks``.
    x_ptr .. inside
        As for `_balance`; with ``LANES`` 0 there are no edges, and they aren't looked at.

    Returns
    -------
    units : ``[G, C]`` int32
        Shares in units of 2**-24.
    max_load, lower_bound, gap, iterations, status : scalars
    """
    inf = float("inf")
    copy = units > 0
    rank = tl.arange(0, G)[:, None]
    load = fixed + tl.sum(_shares(units) * weights, 1)
    max_load, total, bound = tl.reduce((load, load, fixed), 0, _max_add_max)
    invalid = (total < inf) == 0
    max_load = tl.where(invalid, 0.0, max_load)
    bound = tl.where(invalid, 0.0, tl.maximum(bound, total / n_ranks.to(tl.float32)))
    aim = (tolerance - BOUND_ALLOWANCE) * TARGET_PART
    if LANES > 0:
        units, max_load, bound = _balance(
            units, max_load, bound, load, weights, fixed, copy, rank, last, rank_on,
            n_ranks, aim, x_ptr, scratch_ptr, edges_ptr, n_classes, width, n_columns, cell, inside,
            G, LANES,
        )  # fmt: skip
    iterations = max_iterations * 0
    if max_load - bound > max_load * ((tolerance - BOUND_ALLOWANCE) * ROUNDED_PART):
        plan = _shares(units)
        if LANES > 0:
            col = tl.arange(0, C)
            row = tl.arange(0, G)
            tl.store(x_ptr + cell, tl.where(copy, plan, -1.0), mask=inside)
            tl.store(scratch_ptr + n_ranks + row, fixed, mask=rank_on)
            tl.store(
                scratch_ptr + 2 * n_ranks + col[None, :], weights, mask=col[None, :] < n_columns
            )
            tl.debug_barrier()
            bound, iterations = _newton_in_memory(
                x_ptr, scratch_ptr, n_ranks, n_columns, max_load, bound, total, tolerance, aim,
                max_iterations, G, C,
            )  # fmt: skip
            tl.debug_barrier()
            plan = tl.where(copy, tl.load(x_ptr + cell, mask=inside, other=0.0), 0.0)
        else:
            plan, bound, iterations = _newton(
                plan, max_load, bound, weights, fixed, copy, rank_on, n_ranks, total, tolerance,
                aim, max_iterations, G, C, False,
            )  # fmt: skip
        units = _quantize(plan, rank, last)
        max_load = tl.max(fixed + tl.sum(_shares(units) * weights, 1))
    lower_bound = tl.minimum(bound * (1.0 - BOUND_ALLOWANCE), max_load)
    gap = (max_load - lower_bound) / tl.where(max_load > 0, max_load, 1.0)
    status = tl.where(gap <= tolerance, STATUS_CERTIFIED, STATUS_GAP)
    status = tl.where(invalid, STATUS_INVALID, status)
    max_load = tl.where(invalid, inf, max_load)
    gap = tl.where(invalid, inf, gap)
    return units, max_load, lower_bound, gap, iterations, status


@triton.jit
def _store_certificate(
    stats_ptr, ints_ptr, program, n_programs, max_load, lower_bound, gap, iterations, status
):
    """Write one instance's numbers; the arrays are [3, B] float32 and [2, B] int32."""
    tl.store(stats_ptr + program, max_load)
    tl.store(stats_ptr + n_programs + program, lower_bound)
    tl.store(stats_ptr + 2 * n_programs + program, gap)
    tl.store(ints_ptr + program, iterations)
    tl.store(ints_ptr + n_programs + program, status)


@triton.jit(
    do_not_specialize=["mask_stride", "max_iterations", "n_ranks", "n_columns"],
    do_not_specialize_on_alignment=["weights_ptr", "fixed_ptr", "mask_ptr"],
)
def _solve_lp_kernel(
    weights_ptr, fixed_ptr, mask_ptr, mask_stride, shares_ptr, stats_ptr, ints_ptr,
    tolerance, max_iterations, n_ranks, n_columns,
    G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Solve instance ``program_id(0)`` of a batch.

    weights [B, n_columns] and fixed [B, n_ranks] float32, mask [B or 1, n_ranks, n_columns]
    int8 (``mask_stride`` 0 if shared), shares [B, n_ranks, n_columns] float32 (every element is
    written), stats [3, B] float32, ints [2, B] int32. Grid (B,).
    """
    program = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, G)
    col = tl.arange(0, C)
    rank_on = rank < n_ranks
    col_on = col < n_columns
    inside = rank_on[:, None] & col_on[None, :]
    cell = rank[:, None] * n_columns + col[None, :]
    weights = tl.load(weights_ptr + program * n_columns + col, mask=col_on, other=0.0)[None, :]
    fixed = tl.load(fixed_ptr + program * n_ranks + rank, mask=rank_on, other=0.0)
    copy = tl.load(mask_ptr + program * mask_stride + cell, mask=inside, other=0) != 0
    n_copies = _column_sum(copy.to(tl.float32))
    inf = float("inf")
    # What may not be, weight without a copy too, makes the fixed loads infinite.
    allowed = (weights >= 0) & (weights < inf) & ((weights == 0) | (n_copies > 0))
    weights = tl.where(allowed, weights, 0.0)
    fixed = tl.where((fixed >= 0) & (tl.min(allowed.to(tl.int32)) > 0), fixed, inf)
    # One copy leaves no choice.
    single = n_copies == 1.0
    fixed += tl.sum(tl.where(copy & single, weights, 0.0), 1)
    last = tl.max(tl.where(copy, rank[:, None], -1), 0, keep_dims=True)
    even = tl.where(copy, 1.0 / tl.maximum(n_copies, 1.0), 0.0)
    units = _quantize(even, rank[:, None], last)
    units, max_load, lower_bound, gap, iterations, status = _solve_group(
        tl.where(single, 0.0, weights), fixed, units, last, rank_on, n_ranks,
        tolerance, max_iterations,
        shares_ptr, stats_ptr, ints_ptr, 0, 0, n_columns, cell, inside, G, C, 0,
    )  # fmt: skip
    tl.store(shares_ptr + program * n_ranks * n_columns + cell, _shares(units), mask=inside)
    _store_certificate(
        stats_ptr, ints_ptr, program, tl.num_programs(0),
        max_load, lower_bound, gap, iterations, status,
    )  # fmt: skip


@triton.jit
def _counts_of(counts_ptr, expert):
    """Load counts of experts, 0 where there is none (-1), never from a stale line of a cache.

    Counts below 0, of a failed exchange, come out infinite.
    """
    counts = tl.load(counts_ptr + expert, mask=expert >= 0, other=0, volatile=True)
    return tl.where(counts < 0, float("inf"), counts.to(tl.float32))


@triton.jit
def _store_cumulative(
    cumulative_ptr, units_ptr, shares_ptr, copy_index_ptr, copy_multiplicity_ptr, most_on_a_rank,
    copy, cell, inside,
):  # fmt: skip
    """Write the cumulative shares of ``copy``, which lie in ``cell`` (equation 12).

    A cell of -1 says that one rank holds all copies. ``units`` holds running sums over ranks:
    copies of one expert ascend by rank.
    """
    spread = inside & (cell >= 0)
    cumulative = tl.load(units_ptr + cell, mask=spread, other=SHARE_ONE)
    if most_on_a_rank > 1:
        # Several copies on one rank divide its share as evenly as integers allow.
        here = (tl.load(shares_ptr + cell, mask=spread, other=1.0) * SHARE_ONE).to(tl.int32)
        index = tl.load(copy_index_ptr + copy, mask=inside, other=0).to(tl.int64) + 1
        multiplicity = tl.load(copy_multiplicity_ptr + copy, mask=inside, other=1).to(tl.int64)
        part = index * here.to(tl.int64) // multiplicity
        cumulative = cumulative - here + part.to(tl.int32)
    tl.store(cumulative_ptr + copy, cumulative, mask=inside)


@triton.jit(
    do_not_specialize=[
        "max_iterations", "n_ranks", "n_columns", "n_slots", "n_shared", "n_logical",
        "n_rows", "n_sums", "most_classes", "width",
        "own_rank", "n_peers", "capacity", "timeout_ms", "channel",
    ],
    do_not_specialize_on_alignment=["counts_ptr", "certified_ptr", "solves_ptr"],
)  # fmt: skip
def _solve_counts_kernel(
    running_ptr, counts_ptr,
    even_units_ptr, column_last_ptr, fixed_experts_ptr,
    column_first_ptr, column_start_ptr, column_members_ptr, longest_column_ptr,
    shared_copies_ptr, shared_cells_ptr, copy_index_ptr, copy_multiplicity_ptr, most_on_a_rank_ptr,
    edges_ptr, n_classes_ptr,
    shares_ptr, units_ptr, cumulative_ptr, stats_ptr, ints_ptr, scratch_ptr,
    certified_ptr, solves_ptr,
    tolerance, max_iterations, n_ranks, n_columns, n_slots, n_shared, n_logical, n_rows, n_sums,
    most_classes, width,
    total_ptr, gathered_ptr, addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
    own_rank, n_peers, capacity, timeout_ms, channel,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, COPIES: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Solve the groups of one batch, straight from counts by logical expert.

    Programs 0 .. n_sums - 1 first turn counts by program into running sums and totals, as
    `_running_sum_kernel` does, while the others set up; with ``n_sums`` 0 the counts are there.
    Program ``n_sums + group`` folds counts into weights and fixed loads, solves, and writes the
    cumulative share of every copy (equation 12). Programs that sum wait for none, so the
    waiting ends whatever else is on the GPU. With CHANNELS above 0, for one group and
    ``n_sums`` > 0, those counts are this rank's, and the group's program sums them over ranks
    first: arguments from total_ptr on are as for `_sum_over_ranks`.
    Otherwise they aren't looked at.

    Shapes as in ``placement.Structure``; running [n_rows, n_logical] and counts [n_logical]
    int32, shares [n_group, n_ranks, n_columns] float32 and units (int32, running over ranks),
    cumulative [n_physical] int32, of which it writes the copies of replicated experts:
    shared_copies and their cells, [n_group, n_shared], padded with -1. edges
    [n_group, most_classes, width, 2] int32 as for `_level_edges`; LANES is the number of threads;
    scratch [n_group, 2 n_ranks + n_columns] float32
    is for loads, fixed loads and weights. ``certified`` [1] rises by one if the group is
    certified, ``solves`` [1] always (int32 or int64). Grid (n_sums + n_group,).
    """
    if CHANNELS == 0:
        _start_dependents(PDL)
    program = tl.program_id(0)
    if program < n_sums:
        _await_previous(PDL)
        _sum_rows(running_ptr, counts_ptr, program, n_rows, n_logical, ROWS, EXPERTS)
    else:
        group = (program - n_sums).to(tl.int64)
        rank = tl.arange(0, G)
        col = tl.arange(0, C)
        rank_on = rank < n_ranks
        col_on = col < n_columns
        inside = rank_on[:, None] & col_on[None, :]
        n_cells = n_ranks * n_columns
        group_shares_ptr = shares_ptr + group * n_cells
        cell = rank[:, None] * n_columns + col[None, :]
        units = tl.load(even_units_ptr + group * n_cells + cell, mask=inside, other=0)
        last = tl.load(column_last_ptr + group * n_columns + col, mask=col_on, other=-1)
        slot = tl.arange(0, S)[None, :]
        expert = tl.load(
            fixed_experts_ptr + (group * n_ranks + rank[:, None]) * n_slots + slot,
            mask=rank_on[:, None] & (slot < n_slots), other=-1,
        )  # fmt: skip
        member = tl.load(column_first_ptr + group * n_columns + col, mask=col_on, other=-1)
        longest = tl.load(longest_column_ptr + group)
        most_on_a_rank = tl.load(most_on_a_rank_ptr)
        n_classes = tl.load(n_classes_ptr + group)
        at = tl.arange(0, COPIES)
        shared_ptrs = shared_copies_ptr + group * n_shared + at
        cell_ptrs = shared_cells_ptr + group * n_shared + at
        shared = tl.load(shared_ptrs, mask=at < n_shared, other=-1)
        shared_cell = tl.load(cell_ptrs, mask=at < n_shared, other=-1)
        _await_previous(PDL)
        complete = tl.full((), 1, tl.int1)
        if n_sums > 0:
            complete = _await_counts(counts_ptr, n_logical, BLOCK)
        if CHANNELS > 0:
            # Only this program waits for other ranks, and the next kernel of the stream, which
            # would wait for it, takes no room on the GPU before they have come: whatever a rank
            # needs in order to come can run, however many streams wait (docs/sync.md).
            _sum_over_ranks(
                counts_ptr, total_ptr, gathered_ptr,
                addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
                own_rank, n_peers, capacity, timeout_ms, channel, n_logical, complete,
                CHANNELS, BLOCK, GATHER, ON_GPU, LANES,
            )  # fmt: skip
            _start_dependents(PDL)
            tl.debug_barrier()
            counts_ptr = total_ptr
        fixed = tl.sum(_counts_of(counts_ptr, expert), 1)
        fixed = tl.where(complete, fixed, float("inf"))
        weights = _counts_of(counts_ptr, member)
        if longest > 1:
            start_ptrs = column_start_ptr + group * (n_columns + 1) + col
            first = tl.load(start_ptrs, mask=col_on, other=0)
            end = tl.load(start_ptrs + 1, mask=col_on, other=0)
            for j in range(1, longest):
                there = first + j < end
                member = tl.load(column_members_ptr + first + j, mask=there, other=-1)
                weights += _counts_of(counts_ptr, member)

        units, max_load, lower_bound, gap, iterations, status = _solve_group(
            weights[None, :], fixed, units, last[None, :], rank_on, n_ranks,
            tolerance, max_iterations,
            group_shares_ptr, scratch_ptr + group * (2 * n_ranks + n_columns),
            edges_ptr + group * most_classes * width * 2, n_classes, width, n_columns,
            cell, inside, G, C, LANES,
        )  # fmt: skip
        tl.store(units_ptr + group * n_cells + cell, tl.cumsum(units, 0), mask=inside)
        tl.store(group_shares_ptr + cell, _shares(units), mask=inside)
        tl.debug_barrier()
        for block in range(0, n_shared, COPIES):
            _store_cumulative(
                cumulative_ptr, units_ptr, shares_ptr, copy_index_ptr, copy_multiplicity_ptr,
                most_on_a_rank, shared, shared_cell, shared >= 0,
            )  # fmt: skip
            there = block + COPIES + at < n_shared
            shared = tl.load(shared_ptrs + block + COPIES, mask=there, other=-1)
            shared_cell = tl.load(cell_ptrs + block + COPIES, mask=there, other=-1)
        _store_certificate(
            stats_ptr, ints_ptr, group, tl.num_programs(0) - n_sums,
            max_load, lower_bound, gap, iterations, status,
        )  # fmt: skip
        certified = (status == STATUS_CERTIFIED).to(tl.int32)
        tl.atomic_add(certified_ptr, certified.to(certified_ptr.dtype.element_ty))
        tl.atomic_add(solves_ptr, tl.full((), 1, solves_ptr.dtype.element_ty))
