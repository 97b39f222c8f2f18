"""The kernels that solve one batch: a program for each group of ranks, one launch.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.interior_point import SHARE_ONE, STATUS_CERTIFIED, _solve_group
from lplb_triton.kernels.sync import _sum_over_ranks
from lplb_triton.kernels.tokens import (
    _await_previous,
    _load_counts,
    _start_dependents,
    _sum_rows,
)


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
    weights = tl.load(weights_ptr + program * n_columns + col, mask=col_on, other=0.0)
    fixed = tl.load(fixed_ptr + program * n_ranks + rank, mask=rank_on, other=0.0)
    copy = tl.load(mask_ptr + program * mask_stride + cell, mask=inside, other=0) != 0
    units, max_load, lower_bound, gap, iterations, status = _solve_group(
        weights[None, :], fixed, copy, rank_on, n_ranks, tolerance, max_iterations,
        shares_ptr, stats_ptr, ints_ptr, 0, 0, n_columns, cell, inside, G, C, 0,
    )  # fmt: skip
    shares = units.to(tl.float32) * (1.0 / SHARE_ONE)
    tl.store(shares_ptr + program * n_ranks * n_columns + cell, shares, mask=inside)
    _store_certificate(
        stats_ptr, ints_ptr, program, tl.num_programs(0),
        max_load, lower_bound, gap, iterations, status,
    )  # fmt: skip


@triton.jit
def _counts_of(counts_ptr, expert, wait):
    """Load counts (see `_load_counts`); what is missing makes the program invalid."""
    return _load_counts(counts_ptr, expert, wait).to(tl.float32)


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
    mask_ptr, fixed_experts_ptr,
    column_first_ptr, column_start_ptr, column_members_ptr, longest_column_ptr,
    shared_copies_ptr, shared_cells_ptr, copy_index_ptr, copy_multiplicity_ptr, most_on_a_rank_ptr,
    edges_ptr, n_classes_ptr,
    shares_ptr, units_ptr, cumulative_ptr, stats_ptr, ints_ptr, loads_ptr,
    certified_ptr, solves_ptr,
    tolerance, max_iterations, n_ranks, n_columns, n_slots, n_shared, n_logical, n_rows, n_sums,
    most_classes, width,
    total_ptr, gathered_ptr, addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
    own_rank, n_peers, capacity, timeout_ms, channel,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, COPIES: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """Solve the groups of one batch, straight from counts by logical expert.

    Programs 0 .. n_sums - 1 first turn counts by program into running sums and totals, as
    `_running_sum_kernel` does, while the others set up; with ``n_sums`` 0 the counts are there.
    Program ``n_sums + group`` folds counts into weights and fixed loads, solves, and writes the
    cumulative share of every copy (equation 12). Programs that sum wait for none, so the
    waiting ends whatever else is on the GPU. With CHANNELS above 0, for one group and
    ``n_sums`` > 0, those counts are this rank's, and the group's program sums them over ranks
    first; arguments from total_ptr on are as for `_sum_over_ranks`, and otherwise not looked at.

    Shapes as in ``placement.Structure``; running [n_rows, n_logical] and counts [n_logical]
    int32, shares [n_group, n_ranks, n_columns] float32 and units (int32, running over ranks),
    cumulative [n_physical] int32, of which it writes the copies of replicated experts:
    shared_copies and their cells, [n_group, n_shared], padded with -1. edges
    [n_group, most_classes, width] int64 as for `_level_edges`; LANES is the number of threads;
    loads [n_group, n_ranks] float32 is scratch. ``certified`` [1] rises by one if the group is
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
        first_cell = group * n_ranks * n_columns
        cell = first_cell + rank[:, None] * n_columns + col[None, :]
        copy = tl.load(mask_ptr + cell, mask=inside, other=0) != 0
        slot = tl.arange(0, S)[None, :]
        expert = tl.load(
            fixed_experts_ptr + (group * n_ranks + rank[:, None]) * n_slots + slot,
            mask=rank_on[:, None] & (slot < n_slots), other=-1,
        )  # fmt: skip
        member = tl.load(column_first_ptr + group * n_columns + col, mask=col_on, other=-1)
        longest = tl.load(longest_column_ptr + group)
        most_on_a_rank = tl.load(most_on_a_rank_ptr)
        n_classes = tl.load(n_classes_ptr + group)
        wait = n_sums > 0
        _await_previous(PDL)
        if CHANNELS > 0:
            # Only this program waits for other ranks, and the next kernel of the stream, which
            # would wait for it, takes no room on the GPU before they have come: whatever a rank
            # needs in order to come can run, however many streams wait (docs/sync.md).
            _sum_over_ranks(
                counts_ptr, total_ptr, gathered_ptr,
                addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
                own_rank, n_peers, capacity, timeout_ms, channel, n_logical,
                CHANNELS, BLOCK, GATHER, CLOCK, LANES, True,
            )  # fmt: skip
            _start_dependents(PDL)
            tl.debug_barrier()
            counts_ptr = total_ptr
            wait = False
        fixed = tl.sum(_counts_of(counts_ptr, expert, wait), 1)
        weights = _counts_of(counts_ptr, member, wait)
        if longest > 1:
            start_ptrs = column_start_ptr + group * (n_columns + 1) + col
            first = tl.load(start_ptrs, mask=col_on, other=0)
            last = tl.load(start_ptrs + 1, mask=col_on, other=0)
            for j in range(1, longest):
                there = first + j < last
                member = tl.load(column_members_ptr + first + j, mask=there, other=-1)
                weights += _counts_of(counts_ptr, member, wait)

        units, max_load, lower_bound, gap, iterations, status = _solve_group(
            weights[None, :], fixed, copy, rank_on, n_ranks, tolerance, max_iterations,
            shares_ptr + first_cell, loads_ptr + group * n_ranks,
            edges_ptr + group * most_classes * width, n_classes, width, n_columns,
            cell - first_cell, inside, G, C, LANES,
        )  # fmt: skip
        tl.store(units_ptr + cell, tl.cumsum(units, 0), mask=inside)
        shares = units.to(tl.float32) * (1.0 / SHARE_ONE)
        tl.store(shares_ptr + cell, shares, mask=inside)
        tl.debug_barrier()
        at = tl.arange(0, COPIES)
        shared_ptrs = shared_copies_ptr + group * n_shared + at
        cell_ptrs = shared_cells_ptr + group * n_shared + at
        for block in range(0, n_shared, COPIES):
            there = block + at < n_shared
            shared = tl.load(shared_ptrs, mask=there, other=-1)
            shared_cell = tl.load(cell_ptrs, mask=there, other=-1)
            _store_cumulative(
                cumulative_ptr, units_ptr, shares_ptr, copy_index_ptr, copy_multiplicity_ptr,
                most_on_a_rank, shared, shared_cell, shared >= 0,
            )  # fmt: skip
            shared_ptrs += COPIES
            cell_ptrs += COPIES
        _store_certificate(
            stats_ptr, ints_ptr, group, tl.num_programs(0) - n_sums,
            max_load, lower_bound, gap, iterations, status,
        )  # fmt: skip
        certified = (status == STATUS_CERTIFIED).to(tl.int32)
        tl.atomic_add(certified_ptr, certified.to(certified_ptr.dtype.element_ty))
        tl.atomic_add(solves_ptr, tl.full((), 1, solves_ptr.dtype.element_ty))
