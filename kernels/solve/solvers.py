"""The kernels that solve one batch: a program for each group of ranks, one launch.

Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.count import await_counts, load_counts, sum_rows
from lplb_triton.kernels.exchange import exchange_counts
from lplb_triton.kernels.pdl import await_previous, start_dependents
from lplb_triton.kernels.report import BAD_COUNTS, REPORT_INPUT, write_report
from lplb_triton.kernels.solve.cells import (
    _column_weights,
    _counts_of_members,
    _fold,
    _load_cells,
    _load_copy_parts,
    _load_ranks,
    _solve_cells,
    _solve_cells_in_memory,
    _touch_tables,
)
from lplb_triton.kernels.solve.interior_point import _newton
from lplb_triton.kernels.solve.levelling import COPIES_AT_ONCE, RANK_CELLS, ROUNDED_PART, _aim
from lplb_triton.kernels.solve.pairs import _load_pairs, _solve_pairs, _weights_of_pairs
from lplb_triton.kernels.solve.rows import ROW_WORDS
from lplb_triton.kernels.solve.tiles import (
    BOUND_ALLOWANCE,
    _column_sum,
    _mean_and_bound,
    _quantize,
    _shares,
)

STATUS_CERTIFIED = tl.constexpr(_layout.STATUS_CERTIFIED)
STATUS_GAP = tl.constexpr(_layout.STATUS_GAP)
STATUS_INVALID = tl.constexpr(_layout.STATUS_INVALID)


@triton.jit
def _certify(max_load, bound, tolerance, invalid):
    """Largest load, lower bound, gap and status of a plan with that bound."""
    inf = float("inf")
    max_load = tl.where(invalid, 0.0, max_load)
    lower_bound = tl.minimum(bound * (1.0 - BOUND_ALLOWANCE), max_load)
    gap = (max_load - lower_bound) / tl.where(max_load > 0, max_load, 1.0)
    gap = tl.where(invalid, inf, gap)
    status = tl.where(gap <= tolerance, STATUS_CERTIFIED, STATUS_GAP)
    status = tl.where(invalid, STATUS_INVALID, status)
    return tl.where(invalid, inf, max_load), lower_bound, gap, status


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
    weights_ptr, fixed_ptr, mask_ptr, mask_stride, start_ptr, shares_ptr, stats_ptr, ints_ptr,
    tolerance, max_iterations, n_ranks, n_columns,
    G: tl.constexpr, C: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """Solve instance ``program_id(0)`` of a batch.

    weights [B, n_columns] and fixed [B, n_ranks] float32, mask [B or 1, n_ranks, n_columns]
    int8 (``mask_stride`` 0 if shared), shares [B, n_ranks, n_columns] float32 (every element is
    written), stats [3, B] float32, ints [2, B] int32. start [B, n_ranks, n_columns] float32 is
    another plan than the even split to begin with, looked at with HAS_START. Grid (B,).
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
    weights = tl.where(single, 0.0, weights)
    load = fixed + tl.sum(_shares(units) * weights, 1)
    if HAS_START:
        start = tl.load(
            start_ptr + program * n_ranks * n_columns + cell, mask=inside & copy, other=0.0
        )
        # Shares, whatever was given.
        start = tl.where(start > 0, tl.minimum(start, 1.0), 0.0)
        start_sum = _column_sum(start)
        start = tl.where(start_sum > 0, start / tl.where(start_sum > 0, start_sum, 1.0), even)
        start_units = _quantize(start, rank[:, None], last)
        start_load = fixed + tl.sum(_shares(start_units) * weights, 1)
        better = tl.max(start_load) < tl.max(load)
        units = tl.where(better, start_units, units)
        load = tl.where(better, start_load, load)
    max_load, total, bound, invalid = _mean_and_bound(load, fixed, n_ranks)
    iterations = max_iterations * 0
    target = tolerance - BOUND_ALLOWANCE
    if max_load - bound > max_load * (target * ROUNDED_PART):
        plan, bound, iterations = _newton(
            _shares(units), max_load, bound, weights, fixed, copy, rank_on, n_ranks, total,
            tolerance, _aim(target, n_ranks), max_iterations, G, C,
        )  # fmt: skip
        units = _quantize(plan, rank[:, None], last)
        max_load = tl.max(fixed + tl.sum(_shares(units) * weights, 1))
    max_load, lower_bound, gap, status = _certify(max_load, bound, tolerance, invalid)
    tl.store(shares_ptr + program * n_ranks * n_columns + cell, _shares(units), mask=inside)
    _store_certificate(
        stats_ptr, ints_ptr, program, tl.num_programs(0),
        max_load, lower_bound, gap, iterations, status,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "max_iterations", "n_ranks", "n_columns", "n_slots", "n_shared", "n_logical",
        "n_counts", "n_sums", "most_classes", "width",
        "own_rank", "n_peers", "capacity", "timeout_ms", "opening", "channel",
    ],
    do_not_specialize_on_alignment=["counts_ptr", "certified_ptr", "solves_ptr", "uncertified_ptr"],
)  # fmt: skip
def _solve_counts_kernel(
    running_ptr, counts_ptr, rank_experts_ptr, rank_parts_ptr, extents_ptr, pairs_ptr,
    cumulative_ptr, stats_ptr, ints_ptr, scratch_ptr, certified_ptr, solves_ptr,
    uncertified_ptr,
    tolerance, max_iterations, n_ranks, n_columns, n_slots, n_shared, n_logical, n_counts, n_sums,
    most_classes, width,
    cells_ptr, cell_start_ptr, rows_ptr, rank_cells_ptr, first_members_ptr,
    first_ranks_ptr, column_start_ptr, column_members_ptr, shared_copies_ptr, shared_cells_ptr,
    copy_index_ptr, copy_multiplicity_ptr, edges_ptr, copy_parts_ptr, slot_cells_ptr, report_ptr,
    total_ptr, gathered_ptr, addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
    own_rank, n_peers, capacity, timeout_ms, opening, channel,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, COPIES: tl.constexpr,
    MEMBERS: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr,
    LANES: tl.constexpr, PDL: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    GATHER: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Solve the groups of one batch, straight from counts by logical expert.

    Programs 0 .. n_sums - 1 first turn counts by program into running sums and totals, as
    `running_sum_kernel` does, while the others set up; with ``n_sums`` 0 the counts are there.
    Program ``n_sums + group`` folds counts into weights and fixed loads, solves, and writes the
    cumulative share of every copy (equation 12). Programs that sum wait for none, so the
    waiting ends whatever else is on the GPU. With CHANNELS above 0, for one group and
    ``n_sums`` > 0, those counts are this rank's, and the group's program sums them over ranks
    first: arguments from total_ptr on are as for `exchange_counts`.
    Otherwise they aren't looked at.

    Tables as in `SolveTables`; running [n_counts, n_logical] and counts [n_logical] int32;
    cumulative [n_physical] int32, of which it writes the copies of replicated experts;
    scratch [n_group, `solve_scratch`] float32; LANES is the number of threads. There are at most
    ``n_shared`` cells: every redundant slot makes at most two shared copies, and two cells.
    With PAIRS classes of edges above 0, groups of pairs are solved as pairs.py says.
    ``certified`` [1] rises by one if the group is certified, ``solves`` [1] always (int32 or
    int64), ``uncertified`` [1] if its gap is too wide. Counts that are none are said in ``report``
    [2] int64. Grid (n_sums + n_group,).
    """
    if CHANNELS == 0:
        start_dependents(PDL)
    program = tl.program_id(0)
    if program < n_sums:
        await_previous(PDL)
        sum_rows(running_ptr, counts_ptr, program, n_counts, n_logical, ROWS, EXPERTS)
    else:
        group = (program - n_sums).to(tl.int64)
        rank_experts_ptr += group * n_ranks * n_slots
        rank_parts_ptr += group * n_ranks * n_slots
        cells_ptr += group * 4 * n_shared
        cell_start_ptr += group * (n_columns + 1)
        rows_ptr += group * tl.maximum(n_shared // 2, 1) * ROW_WORDS
        # As in lplb_triton/_tables.py.
        most_on_a_rank = tl.maximum(tl.minimum(n_slots, n_columns), 1)
        rank_cells_ptr += group * n_ranks * tl.cdiv(most_on_a_rank, RANK_CELLS) * RANK_CELLS
        first_members_ptr += group * n_columns * MEMBERS
        first_ranks_ptr += group * n_columns * COPIES_AT_ONCE
        column_start_ptr += group * (n_columns + 1)
        shared_copies_ptr += group * n_shared
        shared_cells_ptr += group * n_shared
        edges_ptr += group * most_classes * width
        extents_ptr += group * 8
        copy_parts_ptr += group * n_ranks * n_slots
        slot_cells_ptr += group * n_ranks * n_slots
        n_scratch = 4 * n_ranks + n_columns + 4 * n_shared + 2 * R
        # `solve_scratch`.
        scratch_ptr += group * (n_scratch + LANES)
        expert, part = _load_ranks(rank_experts_ptr, rank_parts_ptr, n_ranks, n_slots, G, S)
        if PAIRS > 0:
            in_pairs = tl.load(extents_ptr + 7)
            most_sweeps = tl.load(extents_ptr + 6)
            pairs_ptr += group * PAIRS * n_ranks
            words, partners = _load_pairs(pairs_ptr, n_ranks, G, PAIRS)
        else:
            tables = _load_cells(
                cells_ptr, cell_start_ptr, rank_cells_ptr, first_members_ptr, first_ranks_ptr,
                shared_copies_ptr, shared_cells_ptr, extents_ptr, n_ranks, n_columns, n_shared,
                G, C, COPIES, MEMBERS,
            )  # fmt: skip
            copy_part = _load_copy_parts(copy_parts_ptr, n_ranks, n_slots, G, S)
        await_previous(PDL)
        complete = tl.full((), 1, tl.int1)
        if n_sums > 0:
            complete = await_counts(counts_ptr, n_logical, BLOCK)
        if CHANNELS > 0:
            # Only this program waits for other ranks, and the next kernel of the stream, which
            # would wait for it, takes no room on the GPU before they have come: whatever a rank
            # needs in order to come can run, however many streams wait (docs/sync.md).
            exchange_counts(
                counts_ptr, total_ptr, gathered_ptr,
                addresses_ptr, gates_ptr, epochs_ptr, version_ptr, status_ptr,
                own_rank, n_peers, capacity, timeout_ms, opening, channel, n_logical, complete,
                CHANNELS, BLOCK, GATHER, ON_GPU, LANES,
            )  # fmt: skip
            start_dependents(PDL)
            tl.debug_barrier()
            counts_ptr = total_ptr
        on_rank = load_counts(counts_ptr, expert)
        if PAIRS > 0:
            pair_weights = _weights_of_pairs(counts_ptr, words, PAIRS * ((G + 31) // 32))
            max_load = tl.full((), 0.0, tl.float32)
            bound = max_load
            invalid = tl.full((), 0, tl.int1)
            solved = invalid
            steps = max_iterations * 0
            if in_pairs > 0:
                fixed = tl.sum(tl.where(part == 1.0, on_rank, 0.0).reshape(G, S), 1)
                fixed = tl.where(complete, fixed, float("inf"))
                max_load, bound, invalid, solved = _solve_pairs(
                    words, partners, pair_weights, fixed, tolerance - BOUND_ALLOWANCE,
                    n_ranks, most_sweeps, cumulative_ptr, G, PAIRS,
                )  # fmt: skip
            if solved == 0:
                tl.debug_barrier()
                max_load, bound, steps, invalid = _solve_cells_in_memory(
                    counts_ptr, complete, in_pairs, bound, tolerance, max_iterations,
                    rank_experts_ptr, rank_parts_ptr, copy_parts_ptr, slot_cells_ptr,
                    cells_ptr, cell_start_ptr, rows_ptr, rank_cells_ptr, first_members_ptr,
                    first_ranks_ptr, column_start_ptr, column_members_ptr,
                    shared_copies_ptr, shared_cells_ptr, edges_ptr, extents_ptr,
                    copy_index_ptr, copy_multiplicity_ptr, cumulative_ptr, scratch_ptr,
                    n_ranks, n_columns, n_slots, n_shared, width,
                    G, C, R, S, COPIES, MEMBERS, LANES,
                )  # fmt: skip
        else:
            of_members = _counts_of_members(counts_ptr, tables.members, MEMBERS)
            extents = tables.extents
            _touch_tables(
                edges_ptr, extents.n_classes * width, rank_cells_ptr,
                n_ranks * extents.most_cells, cells_ptr, extents.n_cells,
                scratch_ptr + n_scratch, LANES,
            )  # fmt: skip
            fixed, load, other_peak, peak, total, bound, invalid = _fold(
                on_rank, part, copy_part, complete, n_ranks, G, S
            )  # fmt: skip
            weights = _column_weights(
                counts_ptr, of_members, column_start_ptr, column_members_ptr,
                extents.most_members, n_columns, invalid, C, MEMBERS,
            )  # fmt: skip
            max_load, bound, steps = _solve_cells(
                tables, weights, fixed, load, other_peak, 0, peak, total, bound, invalid, tolerance,
                max_iterations, counts_ptr, rank_experts_ptr, copy_parts_ptr, slot_cells_ptr,
                cells_ptr, rows_ptr, rank_cells_ptr, edges_ptr,
                copy_index_ptr, copy_multiplicity_ptr, cumulative_ptr, scratch_ptr,
                n_ranks, n_columns, n_slots, n_shared, width, G, C, R, COPIES, LANES,
            )  # fmt: skip
        max_load, lower_bound, gap, status = _certify(max_load, bound, tolerance, invalid)
        _store_certificate(
            stats_ptr, ints_ptr, group, tl.num_programs(0) - n_sums,
            max_load, lower_bound, gap, steps, status,
        )  # fmt: skip
        write_report(report_ptr, REPORT_INPUT, BAD_COUNTS, invalid)
        certified = (status == STATUS_CERTIFIED).to(tl.int32)
        one = tl.full((), 1, solves_ptr.dtype.element_ty)
        # Relaxed: who reads them comes after this launch anyway, and a fence takes its time.
        tl.atomic_add(certified_ptr, certified.to(certified_ptr.dtype.element_ty), sem="relaxed")
        tl.atomic_add(solves_ptr, one, sem="relaxed")
        uncertified = (status == STATUS_GAP).to(uncertified_ptr.dtype.element_ty)
        tl.atomic_add(uncertified_ptr, uncertified, sem="relaxed")


@triton.jit(do_not_specialize=["n_ranks", "n_columns", "n_shared"])
def _spread_kernel(
    cumulative_ptr, cell_number_ptr, cell_ends_ptr, shares_ptr, n_ranks, n_columns, n_shared,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn cumulative shares by copy into shares by rank and column, 0 where no copy is.

    cumulative [n_physical] int32, shares [n_group, n_ranks, n_columns] float32, tables as in
    `SpreadTables`. Grid (n_group cdiv(n_ranks n_columns, BLOCK),).
    """
    n = n_ranks * n_columns
    blocks = tl.cdiv(n, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    number_ptrs = cell_number_ptr + group * n + at % n_columns * n_ranks + at // n_columns
    cell = tl.load(number_ptrs, mask=inside, other=-1)
    copies_ptrs = cell_ends_ptr + group * 2 * n_shared + cell
    last = tl.load(copies_ptrs, mask=cell >= 0, other=-1)
    before = tl.load(copies_ptrs + n_shared, mask=cell >= 0, other=-1)
    units = tl.load(cumulative_ptr + last, mask=last >= 0, other=0)
    units -= tl.load(cumulative_ptr + before, mask=before >= 0, other=0)
    tl.store(shares_ptr + group * n + at, _shares(units), mask=inside)
