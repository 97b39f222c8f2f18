"""Solve a group by cells: from counts to shares through memory, for any placement.

A *cell* is the share of one column on one of its ranks; a group's cells are numbered by column,
then by rank. The plan is ``x``, the tokens of each cell (levelling.py). Equation numbers refer to
docs/method.md.

The padded sizes are G ranks, C columns, R rows (rows.py), S slots of a rank and COPIES copies of
replicated experts, of which there are at least as many as cells. LANES is the number of threads.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton.kernels.count import load_counts
from lplb_triton.kernels.solve.certificate import BOUND_ALLOWANCE, check_first_bound
from lplb_triton.kernels.solve.group_tables import load_copy_parts, load_rank_experts, load_tables
from lplb_triton.kernels.solve.levelling import (
    MAX_FIRST_SWEEPS,
    ROUNDED_FRACTION,
    choose_aimed_gap,
    compute_loads,
    level_plan,
    round_plan,
)
from lplb_triton.kernels.solve.potentials import level_by_steps
from lplb_triton.kernels.solve.tiles import SHARE_ONE, add3, max_add_max_max, units_to_shares


class FirstLoads(NamedTuple):
    """Loads of the even splits, and the first bound."""

    fixed: Any
    """[G] float32, loads of experts that one rank holds."""
    load: Any
    """[G] float32, loads of the split that is even over ranks."""
    copy_split_peak: Any
    """Largest load of the split that is even over copies."""
    peak: Any
    """Largest of ``load``, 0 if counts are invalid."""
    total: Any
    """Sum of ``load``."""
    bound: Any
    """A load that no plan can beat, 0 if counts are invalid."""
    invalid: Any
    """Whether counts are invalid."""


class Scratch(NamedTuple):
    """Addresses of the parts of a group's scratch, of `solve_scratch` words.

    They are float32 unless something else is said.
    """

    loads: Any
    """[n_ranks]"""
    weights: Any
    """[n_columns]"""
    x: Any
    """[n_shared] tokens of each cell."""
    tokens: Any
    """[n_shared] tokens of each cell once the plan is rounded."""
    running: Any
    """[n_shared] int32, rounded shares summed over the column up to each cell, in units."""
    units: Any
    """[n_shared] int32, rounded share of each cell in units."""
    vectors: Any
    """[2, n_ranks] and [2 R], for steps by potentials."""


@triton.jit
def sum_first_loads(
    counts,  # [G S] float32, counts of the experts of each rank's slots
    part,  # [G S] float32, from `load_rank_experts`
    copy_part,  # [G S] float32, from `load_copy_parts`
    complete,  # bool, whether all counts are there; all loads are infinite otherwise
    n_ranks,
    G: tl.constexpr,
    S: tl.constexpr,
):
    """Sum counts over the slots of ranks; returns `FirstLoads`."""
    alone = tl.where(part == 1.0, counts, 0.0).reshape(G, S)
    even = (counts * part).reshape(G, S)
    fixed, load, copy_split = tl.reduce((alone, even, (counts * copy_part).reshape(G, S)), 1, add3)
    fixed = tl.where(complete, fixed, float("inf"))
    load = tl.where(complete, load, float("inf"))
    peak, total, largest_fixed, copy_split_peak = tl.reduce(
        (load, load, fixed, copy_split), 0, max_add_max_max
    )
    peak, total, bound, invalid = check_first_bound(peak, total, largest_fixed, n_ranks)
    return FirstLoads(fixed, load, copy_split_peak, peak, total, bound, invalid)


@triton.jit
def load_member_counts(counts_ptr, members, MEMBERS: tl.constexpr):
    """Load the counts of the first members of columns, a tuple of [C] float32."""
    counts = ()
    for k in tl.static_range(MEMBERS):
        counts += (load_counts(counts_ptr, members[k]),)
    return counts


@triton.jit
def sum_column_weights(
    counts_ptr,  # [n_logical] int32
    first_counts,  # tuple of [C], counts of the first MEMBERS members of each column
    tables,
    most_members,  # most members of a column
    n_columns,
    invalid,  # bool, whether counts are invalid: all weights are 0 then
    C: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Sum counts over the members of columns, [C] float32."""
    weights = first_counts[0]
    for k in tl.static_range(1, MEMBERS):
        weights += first_counts[k]
    if most_members > MEMBERS:
        col = tl.arange(0, C)
        first = tl.load(tables.column_start + col, mask=col < n_columns, other=0)
        end = tl.load(tables.column_start + col + 1, mask=col < n_columns, other=0)
        for j in range(MEMBERS, most_members):
            member = tl.load(tables.column_members + first + j, mask=first + j < end, other=-1)
            weights += load_counts(counts_ptr, member)
    return tl.where(invalid, 0.0, weights)


@triton.jit
def _divide_scratch(scratch_ptr, sizes):
    """Divide a group's scratch; returns `Scratch`."""
    weights_ptr = scratch_ptr + 2 * sizes.n_ranks
    x_ptr = weights_ptr + sizes.n_columns
    tokens_ptr = x_ptr + sizes.n_shared
    running_ptr = (tokens_ptr + sizes.n_shared).to(tl.pointer_type(tl.int32), bitcast=True)
    units_ptr = running_ptr + sizes.n_shared
    vectors_ptr = tokens_ptr + 3 * sizes.n_shared
    return Scratch(scratch_ptr, weights_ptr, x_ptr, tokens_ptr, running_ptr, units_ptr, vectors_ptr)


@triton.jit
def _store_cumulative(cumulative_ptr, scratch, tables, loaded):
    """Write the cumulative shares of the copies of replicated experts (equation 12).

    cumulative is [n_copies] int32. Copies of one expert ascend by rank, so that what earlier
    copies take is the running sum of the cells before.
    """
    copy, cell, multiplicity = loaded.shared, loaded.shared_cell, loaded.extents.multiplicity
    is_copy = copy >= 0
    has_cell = is_copy & (cell >= 0)
    cumulative = tl.load(scratch.running + cell, mask=has_cell, other=SHARE_ONE)
    if multiplicity > 1:
        # Several copies on one rank divide its share as evenly as integers allow.
        share = tl.load(scratch.units + cell, mask=has_cell, other=SHARE_ONE)
        index = tl.load(tables.copy_index + copy, mask=is_copy, other=0).to(tl.int64) + 1
        among = tl.load(tables.copy_multiplicity + copy, mask=is_copy, other=1).to(tl.int64)
        part = index * share.to(tl.int64) // among
        cumulative = cumulative - share + part.to(tl.int32)
    tl.store(cumulative_ptr + copy, cumulative, mask=is_copy)


@triton.jit
def _split_over_copies(counts_ptr, scratch, tables, n_cells, n_slots, COPIES: tl.constexpr):
    """Write to x the split that is even over copies."""
    cell = tl.arange(0, COPIES)
    is_cell = cell < n_cells
    slot = tl.load(tables.cells + cell, mask=is_cell, other=0) * n_slots
    tokens = tl.zeros((COPIES,), tl.float32)
    for _ in range(n_slots):
        own = is_cell & (tl.load(tables.slot_cells + slot, mask=is_cell, other=-1) == cell)
        expert = tl.load(tables.rank_experts + slot, mask=own, other=-1)
        part = tl.load(tables.copy_parts + slot, mask=own, other=0.0)
        tokens += load_counts(counts_ptr, expert) * part
        slot += 1
    tl.store(scratch.x + cell, tokens, mask=is_cell)


@triton.jit
def _load_plan_of_pairs(cumulative_ptr, scratch, loaded):
    """Write to x the plan that `solve_pairs` left in cumulative [n_copies] int32.

    Cells 2 e and 2 e + 1 are the two copies of column e.
    """
    is_copy = loaded.shared >= 0
    units = tl.load(cumulative_ptr + loaded.shared, mask=is_copy, other=0)
    is_second = is_copy & (loaded.shared_cell % 2 == 1)
    units -= tl.load(cumulative_ptr + loaded.shared - 1, mask=is_second, other=0)
    weights = tl.load(scratch.weights + loaded.shared_cell // 2, mask=is_copy, other=0.0)
    tl.store(scratch.x + loaded.shared_cell, units_to_shares(units) * weights, mask=is_copy)


@triton.jit
def _level_even_split(
    scratch, tables, sizes, loaded, weights, first, is_rank, bound, aimed_gap,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Level the split that is even over ranks, which is in x (equation 18); returns a bound."""
    extents = loaded.extents
    return level_plan(
        first.peak, bound, first.load, weights, first.fixed, is_rank, sizes.n_ranks, aimed_gap,
        scratch.x, scratch.loads, tables.edges, extents.n_classes,
        tl.minimum(extents.most_sweeps, MAX_FIRST_SWEEPS), sizes.width, loaded.first_ranks,
        tables.cells, loaded.start, loaded.n_copies, extents.most_copies, G, LANES,
    )  # fmt: skip


@triton.jit
def _make_first_plan(
    scratch, tables, sizes, loaded, weights, first, has_plan, is_rank, is_cell, bound, aimed_gap,
    cumulative_ptr, G: tl.constexpr, C: tl.constexpr, COPIES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write to x a level plan, or the plan of pairs if there is one.

    Arguments are those of `solve_by_cells`. Returns the weight of each cell's column, [COPIES]
    float32, and a bound.
    """
    col = tl.arange(0, C)
    cell = tl.arange(0, COPIES)
    tl.store(scratch.weights + col, weights, mask=col < sizes.n_columns)
    tl.debug_barrier()
    cell_weights = tl.load(scratch.weights + loaded.cell_column, mask=is_cell, other=0.0)
    if has_plan == 0:
        tl.store(scratch.x + cell, cell_weights / loaded.cell_copies, mask=is_cell)
        tl.debug_barrier()
        bound = _level_even_split(
            scratch, tables, sizes, loaded, weights, first, is_rank, bound, aimed_gap, G, LANES
        )
    else:
        _load_plan_of_pairs(cumulative_ptr, scratch, loaded)
        tl.debug_barrier()
    return cell_weights, bound


@triton.jit
def _round_and_store(
    cumulative_ptr, scratch, tables, sizes, loaded, cell_weights, is_cell, fixed, G: tl.constexpr
):
    """Round the plan x and write its cumulative shares (equations 11 and 12).

    ``cell_weights`` and ``is_cell`` [COPIES] are by cell. Returns the largest load.
    """
    round_plan(
        scratch.x, scratch.tokens, scratch.running, scratch.units, cell_weights,
        loaded.cell_first, loaded.cell_copies, is_cell,
    )  # fmt: skip
    tl.debug_barrier()
    _store_cumulative(cumulative_ptr, scratch, tables, loaded)
    loads = compute_loads(
        fixed, scratch.tokens, loaded.first_cells, tables.rank_cells, sizes.n_ranks,
        loaded.extents.most_cells, G,
    )  # fmt: skip
    return tl.max(loads)


@triton.jit
def _improve_by_steps(
    scratch, tables, sizes, extents, first, max_load, bound, aimed_gap, max_steps,
    G: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write to x a better plan than the rounded one, by steps by potentials (equations 20 to 23).

    ``first`` is `FirstLoads`, ``max_load`` the largest load of the rounded plan. Returns a
    bound and the number of steps.
    """
    n_ranks = sizes.n_ranks
    rank = tl.arange(0, G)
    fixed_ptr = scratch.loads + n_ranks
    tl.store(fixed_ptr + rank, first.fixed, mask=rank < n_ranks)
    tl.debug_barrier()
    bound, steps = level_by_steps(
        scratch.x, scratch.units, scratch.loads, fixed_ptr, scratch.weights, scratch.tokens,
        scratch.vectors, scratch.vectors + 2 * n_ranks, tables.edges, tables.rows,
        tables.rank_cells, max_load, bound, first.total / n_ranks.to(tl.float32), aimed_gap,
        max_steps, extents.n_classes, extents.most_copies, extents.most_cells,
        tl.maximum(sizes.n_shared // 2, 1), n_ranks, sizes.width, G, R, LANES,
    )  # fmt: skip
    tl.debug_barrier()
    return bound, steps


@triton.jit
def solve_by_cells(
    tables,
    loaded,
    weights,  # [C] float32
    first,  # `FirstLoads`
    has_plan,  # 1 if cumulative holds a plan of pairs, 0 to level the even split over ranks
    bound,  # a load that no plan can beat
    tolerance,
    max_steps,
    enough,  # float32, no plan needs improvement if its bound exceeds this many times the mean
    counts_ptr,  # [n_logical] int32
    cumulative_ptr,  # [n_copies] int32, written for the copies of replicated experts
    scratch_ptr,  # [solve_scratch] float32
    sizes,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    COPIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Solve a group by cells (equations 11, 12 and 18 to 23).

    A level plan is rounded, written and judged. If its gap is too wide, steps by potentials improve
    it, and it is rounded, written and judged again. If the split that is even over copies still has
    a smaller peak, it replaces the plan in the same way. Returns the largest load, a bound and the
    number of steps.
    """
    is_rank = tl.arange(0, G) < sizes.n_ranks
    extents = loaded.extents
    is_cell = tl.arange(0, COPIES) < extents.n_cells
    scratch = _divide_scratch(scratch_ptr, sizes)
    target = tolerance - BOUND_ALLOWANCE
    aimed_gap = choose_aimed_gap(target, sizes.n_ranks)
    cell_weights, bound = _make_first_plan(
        scratch, tables, sizes, loaded, weights, first, has_plan, is_rank, is_cell, bound,
        aimed_gap, cumulative_ptr, G, C, COPIES, LANES,
    )  # fmt: skip
    steps = max_steps * 0
    # Variables of a loop keep the type that they have before it; the value doesn't matter.
    max_load = bound
    may_step = first.invalid == 0
    # The two even splits differ only where a rank has several copies of an expert.
    may_split = may_step & (extents.multiplicity > 1)
    unjudged = 1
    while unjudged > 0:
        unjudged = 0
        max_load = _round_and_store(
            cumulative_ptr, scratch, tables, sizes, loaded, cell_weights, is_cell, first.fixed, G
        )
        is_poor = max_load - bound > max_load * (target * ROUNDED_FRACTION)
        may_gain = bound * sizes.n_ranks <= enough * first.total
        if may_step & is_poor & may_gain:
            # This is False, since counts are valid here, and has the type that the loop carries.
            may_step = first.invalid
            unjudged = 1
            bound, steps = _improve_by_steps(
                scratch, tables, sizes, extents, first, max_load, bound, aimed_gap, max_steps,
                G, R, LANES,
            )  # fmt: skip
        elif may_split:
            may_split = first.invalid
            if first.copy_split_peak < max_load:
                unjudged = 1
                tl.debug_barrier()
                _split_over_copies(
                    counts_ptr, scratch, tables, extents.n_cells, sizes.n_slots, COPIES
                )
                tl.debug_barrier()
    return max_load, bound, steps


@triton.jit(noinline=True)
def load_and_solve_by_cells(
    counts_ptr,  # [n_logical] int32
    complete,  # bool, whether all counts are there
    has_plan,  # as for `solve_by_cells`
    known_bound,  # a load that no plan can beat
    tolerance,
    max_steps,
    enough,  # as for `solve_by_cells`
    tables,
    cumulative_ptr,  # [n_copies] int32
    scratch_ptr,  # [solve_scratch] float32
    sizes,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    COPIES: tl.constexpr,
    MEMBERS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Load a group's tables and `solve_by_cells`; also returns whether counts are invalid.

    A kernel that solves pairs in registers seldom needs this. Since it is not inlined, it takes no
    registers from that, and the kernel compiles sooner.
    """
    loaded = load_tables(tables, sizes, G, C, COPIES, MEMBERS)
    expert, part = load_rank_experts(tables, sizes, G, S)
    copy_part = load_copy_parts(tables, sizes, G, S)
    counts = load_counts(counts_ptr, expert)
    first = sum_first_loads(counts, part, copy_part, complete, sizes.n_ranks, G, S)
    weights = sum_column_weights(
        counts_ptr, load_member_counts(counts_ptr, loaded.members, MEMBERS), tables,
        loaded.extents.most_members, sizes.n_columns, first.invalid, C, MEMBERS,
    )  # fmt: skip
    max_load, bound, steps = solve_by_cells(
        tables, loaded, weights, first, has_plan, tl.maximum(first.bound, known_bound), tolerance,
        max_steps, enough, counts_ptr, cumulative_ptr, scratch_ptr, sizes, G, C, R, COPIES, LANES,
    )  # fmt: skip
    return max_load, bound, steps, first.invalid
