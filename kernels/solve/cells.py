"""The way from counts to shares for any placement: by cells, through memory.

A cell is a column's share of one rank (levelling.py). Equation numbers refer to docs/method.md.
"""

# Triton's tuples grow.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton.kernels.count import load_counts
from lplb_triton.kernels.solve.levelling import (
    COPIES_AT_ONCE,
    FIRST_SWEEPS,
    ROUNDED_PART,
    _aim,
    _balance,
    _load_rank_cells,
    _rank_loads,
    _round,
)
from lplb_triton.kernels.solve.potentials import _level_by_steps
from lplb_triton.kernels.solve.tiles import (
    BOUND_ALLOWANCE,
    SHARE_ONE,
    _add3,
    _max_add_max_max,
    _shares,
    _valid_start,
)


@triton.jit
def _touch(ptr, n, EACH: tl.constexpr, LANES: tl.constexpr):
    """Look at one of every EACH words from ``ptr`` on, as many as there are threads."""
    at = EACH * tl.arange(0, LANES)
    return tl.load(ptr + at, mask=at < n, other=0)


@triton.jit
def _store_cumulative(
    cumulative_ptr, upto_ptr, units_ptr, copy_index_ptr, copy_multiplicity_ptr, multiplicity,
    copy, cell, inside,
):  # fmt: skip
    """Write the cumulative shares of ``copy``, which lie in ``cell`` (equation 12).

    A cell of -1 says that one rank holds all copies. ``upto`` are the cells' shares summed over
    their column, in units: copies of one expert ascend by rank. ``multiplicity`` is the largest.
    """
    spread = inside & (cell >= 0)
    cumulative = tl.load(upto_ptr + cell, mask=spread, other=SHARE_ONE)
    if multiplicity > 1:
        # Several copies on one rank divide its share as evenly as integers allow.
        here = tl.load(units_ptr + cell, mask=spread, other=SHARE_ONE)
        index = tl.load(copy_index_ptr + copy, mask=inside, other=0).to(tl.int64) + 1
        among = tl.load(copy_multiplicity_ptr + copy, mask=inside, other=1).to(tl.int64)
        part = index * here.to(tl.int64) // among
        cumulative = cumulative - here + part.to(tl.int32)
    tl.store(cumulative_ptr + copy, cumulative, mask=inside)


class Extents(NamedTuple):
    """Numbers of a group, as in `SolveTables` but for the last."""

    n_cells: Any
    most_members: Any
    most_copies: Any
    most_cells: Any
    multiplicity: Any
    n_classes: Any
    most_sweeps: Any


class GroupTables(NamedTuple):
    """What is loaded of a group's tables before there are counts."""

    cell_column: Any
    """By cell, [COPIES], as the next two: the first cell of its column, and how many it has."""
    cell_first: Any
    cell_copies: Any
    shared: Any
    """Copies of replicated experts, [COPIES], and their cells."""
    shared_cell: Any
    members: Any
    """By column, [C]: a tuple of its first members."""
    start: Any
    """Its first cell,"""
    n_copies: Any
    """how many it has,"""
    first_ranks: Any
    """and a tuple of the ranks of the first ones."""
    first_cells: Any
    """Of each rank, as `_load_rank_cells` gives them."""
    extents: Extents


@triton.jit
def _load_cells(
    cells_ptr, cell_start_ptr, rank_cells_ptr, first_members_ptr, first_ranks_ptr,
    shared_copies_ptr, shared_cells_ptr, extents_ptr, n_ranks, n_columns, n_shared,
    G: tl.constexpr, C: tl.constexpr, COPIES: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Load `GroupTables`."""
    cell = tl.arange(0, COPIES)
    col = tl.arange(0, C)
    is_copy = cell < n_shared
    col_on = col < n_columns
    start = tl.load(cell_start_ptr + col, mask=col_on, other=0)
    members, first_ranks = (), ()
    for k in tl.static_range(MEMBERS):
        members += (tl.load(first_members_ptr + k * n_columns + col, mask=col_on, other=-1),)
    for k in tl.static_range(COPIES_AT_ONCE):
        ptrs = first_ranks_ptr + k * n_columns + col
        first_ranks += (tl.load(ptrs, mask=col_on, other=-1),)
    return GroupTables(
        tl.load(cells_ptr + n_shared + cell, mask=is_copy, other=0),
        tl.load(cells_ptr + 2 * n_shared + cell, mask=is_copy, other=0),
        tl.load(cells_ptr + 3 * n_shared + cell, mask=is_copy, other=1),
        tl.load(shared_copies_ptr + cell, mask=is_copy, other=-1),
        tl.load(shared_cells_ptr + cell, mask=is_copy, other=-1),
        members,
        start,
        tl.load(cell_start_ptr + col + 1, mask=col_on, other=0) - start,
        first_ranks,
        _load_rank_cells(rank_cells_ptr, 0, n_ranks, G),
        Extents(
            tl.load(extents_ptr), tl.load(extents_ptr + 1), tl.load(extents_ptr + 2),
            tl.load(extents_ptr + 3), tl.load(extents_ptr + 4), tl.load(extents_ptr + 5),
            tl.load(extents_ptr + 6),
        ),
    )  # fmt: skip


@triton.jit
def _touch_tables(
    edges_ptr, n_edges, rank_cells_ptr, n_rank_cells, cells_ptr, n_cells, touched_ptr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Fetch lines of tables that are walked through later at once, one by thread and table."""
    touched = _touch(edges_ptr, n_edges, 4, LANES).to(tl.int32)
    touched += _touch(rank_cells_ptr, n_rank_cells, 8, LANES)
    touched += _touch(cells_ptr, n_cells, 8, LANES)
    tl.store(touched_ptr + tl.arange(0, LANES), touched)


@triton.jit
def _load_ranks(
    rank_experts_ptr, rank_parts_ptr, n_ranks, n_slots, G: tl.constexpr, S: tl.constexpr
):
    """Load a group's tables by rank and slot, [G S]: flat, slots of a rank side by side."""
    index = tl.arange(0, G * S)
    rank = index // S
    slot = index % S
    at = rank * n_slots + slot
    there = (rank < n_ranks) & (slot < n_slots)
    expert = tl.load(rank_experts_ptr + at, mask=there, other=-1)
    return expert, tl.load(rank_parts_ptr + at, mask=there, other=0.0)


@triton.jit
def _load_copy_parts(copy_parts_ptr, n_ranks, n_slots, G: tl.constexpr, S: tl.constexpr):
    """Load the parts that a split which is even over copies leaves, [G S] as `_load_ranks`."""
    index = tl.arange(0, G * S)
    rank = index // S
    slot = index % S
    there = (rank < n_ranks) & (slot < n_slots)
    return tl.load(copy_parts_ptr + rank * n_slots + slot, mask=there, other=0.0)


@triton.jit
def _fold(on_rank, part, copy_part, complete, n_ranks, G: tl.constexpr, S: tl.constexpr):
    """Sum counts [G S] over the slots of ranks: fixed loads, and loads of the even splits.

    Returns fixed loads and those of the split that is even over ranks, [G], the largest load of the
    one that is even over copies, and the rest of `_mean_and_bound`. Without ``complete`` counts all
    is infinite.
    """
    alone = tl.where(part == 1.0, on_rank, 0.0).reshape(G, S)
    even = (on_rank * part).reshape(G, S)
    fixed, load, other = tl.reduce((alone, even, (on_rank * copy_part).reshape(G, S)), 1, _add3)
    fixed = tl.where(complete, fixed, float("inf"))
    load = tl.where(complete, load, float("inf"))
    peak, total, bound, other_peak = tl.reduce((load, load, fixed, other), 0, _max_add_max_max)
    peak, total, bound, invalid = _valid_start(peak, total, bound, n_ranks)
    return fixed, load, other_peak, peak, total, bound, invalid


@triton.jit
def _split_over_copies(
    counts_ptr, rank_experts_ptr, copy_parts_ptr, slot_cells_ptr, cells_ptr, n_cells, n_slots,
    x_ptr, COPIES: tl.constexpr,
):  # fmt: skip
    """Write tokens by cell of the split that is even over copies to x [n_cells]."""
    cell = tl.arange(0, COPIES)
    is_cell = cell < n_cells
    slot = tl.load(cells_ptr + cell, mask=is_cell, other=0) * n_slots
    tokens = tl.zeros((COPIES,), tl.float32)
    for _ in range(n_slots):
        mine = is_cell & (tl.load(slot_cells_ptr + slot, mask=is_cell, other=-1) == cell)
        expert = tl.load(rank_experts_ptr + slot, mask=mine, other=-1)
        part = tl.load(copy_parts_ptr + slot, mask=mine, other=0.0)
        tokens += load_counts(counts_ptr, expert) * part
        slot += 1
    tl.store(x_ptr + cell, tokens, mask=is_cell)


@triton.jit
def _solve_cells(
    tables, weights, fixed, load, other_peak, in_pairs, peak, total, bound, invalid, tolerance,
    max_steps, counts_ptr, rank_experts_ptr, copy_parts_ptr, slot_cells_ptr,
    cells_ptr, rows_ptr, rank_cells_ptr, edges_ptr,
    copy_index_ptr, copy_multiplicity_ptr, cumulative_ptr, scratch_ptr,
    n_ranks, n_columns, n_slots, n_shared, width,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, COPIES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Solve a group by cells; returns its largest load, a bound and steps by potentials.

    weights [C]; fixed and load [G], of the split that is even over ranks; ``other_peak`` is the
    largest load of the one that is even over copies, which takes the plan's place if it is better.
    With ``in_pairs`` 1 the cumulative shares are those of a level plan.
    """
    rank = tl.arange(0, G)
    col = tl.arange(0, C)
    cell = tl.arange(0, COPIES)
    rank_on = rank < n_ranks
    extents = tables.extents
    is_cell = cell < extents.n_cells
    shared = tables.shared
    # `solve_scratch`: loads and fixed loads by rank, weights by column, and by cell tokens, what
    # they are once rounded, and in units running sums and shares; for steps by potentials two
    # vectors by rank and two numbers by row.
    weights_ptr = scratch_ptr + 2 * n_ranks
    x_ptr = weights_ptr + n_columns
    tokens_ptr = x_ptr + n_shared
    upto_ptr = (tokens_ptr + n_shared).to(tl.pointer_type(tl.int32), bitcast=True)
    units_ptr = upto_ptr + n_shared
    vectors_ptr = tokens_ptr + 3 * n_shared
    target = tolerance - BOUND_ALLOWANCE
    aim = _aim(target, n_ranks)
    tl.store(weights_ptr + col, weights, mask=col < n_columns)
    tl.debug_barrier()
    cell_weights = tl.load(weights_ptr + tables.cell_column, mask=is_cell, other=0.0)
    if in_pairs == 0:
        tl.store(x_ptr + cell, cell_weights / tables.cell_copies, mask=is_cell)
        tl.debug_barrier()
        bound = _balance(
            peak, bound, load, weights, fixed, rank_on, n_ranks, aim, x_ptr, scratch_ptr,
            edges_ptr, extents.n_classes, tl.minimum(extents.most_sweeps, FIRST_SWEEPS), width,
            tables.first_ranks, cells_ptr, tables.start, tables.n_copies, extents.most_copies,
            G, LANES,
        )  # fmt: skip
    else:
        there = shared >= 0
        upto = tl.load(cumulative_ptr + shared, mask=there, other=0)
        second = there & (tables.shared_cell % 2 == 1)
        upto -= tl.load(cumulative_ptr + shared - 1, mask=second, other=0)
        shared_weights = tl.load(weights_ptr + tables.shared_cell // 2, mask=there, other=0.0)
        tl.store(x_ptr + tables.shared_cell, _shares(upto) * shared_weights, mask=there)
        tl.debug_barrier()
    # A level plan is rounded and judged; only one that is not good enough goes on.
    steps = max_steps * 0
    # Of the type that it will have.
    max_load = bound
    may_solve = invalid == 0
    # Where a rank has several copies of an expert, there are two even splits.
    may_split = may_solve & (extents.multiplicity > 1)
    going = 1
    while going > 0:
        going = 0
        _round(
            x_ptr, tokens_ptr, upto_ptr, units_ptr, cell_weights, tables.cell_first,
            tables.cell_copies, is_cell,
        )  # fmt: skip
        tl.debug_barrier()
        _store_cumulative(
            cumulative_ptr, upto_ptr, units_ptr, copy_index_ptr, copy_multiplicity_ptr,
            extents.multiplicity, shared, tables.shared_cell, shared >= 0,
        )  # fmt: skip
        loads = _rank_loads(
            fixed, tokens_ptr, tables.first_cells, rank_cells_ptr, n_ranks, extents.most_cells, G
        )
        max_load = tl.max(loads)
        if may_solve & (max_load - bound > max_load * (target * ROUNDED_PART)):
            may_solve = invalid  # which it is not
            going = 1
            tl.store(scratch_ptr + n_ranks + rank, fixed, mask=rank_on)
            tl.debug_barrier()
            bound, steps = _level_by_steps(
                x_ptr, units_ptr, scratch_ptr, scratch_ptr + n_ranks, weights_ptr, tokens_ptr,
                vectors_ptr, vectors_ptr + 2 * n_ranks, edges_ptr, rows_ptr, rank_cells_ptr,
                max_load, bound, total / n_ranks.to(tl.float32), aim, max_steps,
                extents.n_classes, extents.most_copies, extents.most_cells,
                tl.maximum(n_shared // 2, 1), n_ranks, width, G, R, LANES,
            )  # fmt: skip
            tl.debug_barrier()
        elif may_split:
            may_split = invalid  # which it is not
            if other_peak < max_load:
                going = 1
                tl.debug_barrier()
                _split_over_copies(
                    counts_ptr, rank_experts_ptr, copy_parts_ptr, slot_cells_ptr, cells_ptr,
                    extents.n_cells, n_slots, x_ptr, COPIES,
                )  # fmt: skip
                tl.debug_barrier()
    return max_load, bound, steps


@triton.jit
def _counts_of_members(counts_ptr, members, MEMBERS: tl.constexpr):
    """Load the counts of a tuple of experts by column."""
    counts = ()
    for k in tl.static_range(MEMBERS):
        counts += (load_counts(counts_ptr, members[k]),)
    return counts


@triton.jit
def _column_weights(
    counts_ptr, of_members, column_start_ptr, column_members_ptr, most_members, n_columns, invalid,
    C: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Sum counts over the members of columns, [C]; ``of_members`` are the first MEMBERS ones'."""
    weights = of_members[0]
    for k in tl.static_range(1, MEMBERS):
        weights += of_members[k]
    if most_members > MEMBERS:
        col = tl.arange(0, C)
        first = tl.load(column_start_ptr + col, mask=col < n_columns, other=0)
        end = tl.load(column_start_ptr + col + 1, mask=col < n_columns, other=0)
        for j in range(MEMBERS, most_members):
            member = tl.load(column_members_ptr + first + j, mask=first + j < end, other=-1)
            weights += load_counts(counts_ptr, member)
    return tl.where(invalid, 0.0, weights)


@triton.jit(noinline=True)
def _solve_cells_in_memory(
    counts_ptr, complete, in_pairs, known_bound, tolerance, max_steps,
    rank_experts_ptr, rank_parts_ptr, copy_parts_ptr, slot_cells_ptr,
    cells_ptr, cell_start_ptr, rows_ptr, rank_cells_ptr, first_members_ptr,
    first_ranks_ptr, column_start_ptr, column_members_ptr, shared_copies_ptr, shared_cells_ptr,
    edges_ptr, extents_ptr, copy_index_ptr, copy_multiplicity_ptr,
    cumulative_ptr, scratch_ptr, n_ranks, n_columns, n_slots, n_shared, width,
    G: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, COPIES: tl.constexpr,
    MEMBERS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`_solve_cells` as a function of its own, where it is rare: for that it compiles sooner.

    Also returns whether counts are invalid.
    """
    tables = _load_cells(
        cells_ptr, cell_start_ptr, rank_cells_ptr, first_members_ptr, first_ranks_ptr,
        shared_copies_ptr, shared_cells_ptr, extents_ptr, n_ranks, n_columns, n_shared,
        G, C, COPIES, MEMBERS,
    )  # fmt: skip
    expert, part = _load_ranks(rank_experts_ptr, rank_parts_ptr, n_ranks, n_slots, G, S)
    copy_part = _load_copy_parts(copy_parts_ptr, n_ranks, n_slots, G, S)
    on_rank = load_counts(counts_ptr, expert)
    fixed, load, other_peak, peak, total, bound, invalid = _fold(
        on_rank, part, copy_part, complete, n_ranks, G, S
    )
    weights = _column_weights(
        counts_ptr, _counts_of_members(counts_ptr, tables.members, MEMBERS),
        column_start_ptr, column_members_ptr,
        tables.extents.most_members, n_columns, invalid, C, MEMBERS,
    )  # fmt: skip
    max_load, bound, steps = _solve_cells(
        tables, weights, fixed, load, other_peak, in_pairs, peak, total,
        tl.maximum(bound, known_bound),
        invalid, tolerance, max_steps, counts_ptr, rank_experts_ptr, copy_parts_ptr,
        slot_cells_ptr, cells_ptr, rows_ptr, rank_cells_ptr, edges_ptr,
        copy_index_ptr, copy_multiplicity_ptr, cumulative_ptr, scratch_ptr,
        n_ranks, n_columns, n_slots, n_shared, width, G, C, R, COPIES, LANES,
    )  # fmt: skip
    return max_load, bound, steps, invalid
