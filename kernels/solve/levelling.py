"""Levelling along edges (equation 18), and the bound of a level plan (equation 19).

Equation numbers refer to docs/method.md. A *cell* is the share of one column on one of its ranks;
a group's cells are numbered by column, then by rank. A plan is ``x``, the tokens of each cell. Its
*peak* is the largest load of a rank while the plan is being made; the largest load of the rounded
plan is called ``max_load``. The *aimed gap* is the relative gap at which levelling ends.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.solve.tiles import (
    FINE_ONE,
    SHARE_ONE,
    add2,
    find_largest_load,
    reciprocal,
    round_running_sums,
    to_fine_units,
    units_to_shares,
)

# Cells of a rank that are summed at once; the table of a rank's cells is padded to whole blocks of
# that many.
RANK_CELLS = tl.constexpr(_layout.RANK_CELLS)
# Fields of the words of edges.
FIELD_BITS = tl.constexpr(_layout.FIELD_BITS)
FIELD_MASK = tl.constexpr(_layout.FIELD_MASK)
# Copies of a column whose ranks are loaded at once.
COPIES_AT_ONCE = tl.constexpr(_layout.COPIES_AT_ONCE)
# The aimed gap is this fraction of the tolerance, or less where rounding may cost much, but not
# less than the second fraction.
TARGET_FRACTION = tl.constexpr(0.98)
LEAST_TARGET_FRACTION = tl.constexpr(0.75)
# A rounded plan is good enough if its gap is at most this fraction of the tolerance.
ROUNDED_FRACTION = tl.constexpr(0.99)
# Most sweeps before the first step by potentials.
MAX_FIRST_SWEEPS = tl.constexpr(16)
# The first EXACT_SWEEPS sweeps of a run move the fraction of the difference between two ranks that
# levels them; later ones over-relax.
EXACT_SWEEPS = tl.constexpr(2)
EXACT_FRACTION = tl.constexpr(0.5)
RELAXED_FRACTION = tl.constexpr(0.75)
# The number of sets of ranks that are tried for a bound, and how far below the peak the last set
# reaches, in aimed gaps. Each set reaches four times as far as the one before (equation 19).
N_CUTS = tl.constexpr(4)
DEEPEST_CUT = tl.constexpr(25.6)
# The peak is steady once a sweep takes no more than this fraction of the aimed gap off it.
STEADY_FRACTION = tl.constexpr(0.5)


@triton.jit
def choose_aimed_gap(target, n_ranks):
    """Choose the gap to aim at, so that rounding by at most ``n_ranks`` units keeps ``target``."""
    rounded = target * ROUNDED_FRACTION - n_ranks.to(tl.float32) * (1.0 / SHARE_ONE)
    return tl.maximum(tl.minimum(target * TARGET_FRACTION, rounded), target * LEAST_TARGET_FRACTION)


@triton.jit
def compute_cut_thresholds(peak, aimed_gap):
    """Compute the load from which on ranks belong to each set of equation 19, [N_CUTS, 1]."""
    step = tl.arange(0, N_CUTS)[:, None].to(tl.float32)
    return peak - peak * (aimed_gap * DEEPEST_CUT) * tl.exp2(2.0 * step - 2 * (N_CUTS - 1))


@triton.jit
def compute_cut_bound(
    loads,  # [G] float32
    fixed,  # [G] float32, the part of the loads that no plan can move
    weights,  # [1, C] float32, tokens of each column
    lowest,  # [1, C] float32, least load of each column's ranks
    is_rank,  # [G] bool, False in the padding
    peak,
    aimed_gap,
):
    """Find a load that no plan can beat, from sets of the most loaded ranks (equation 19)."""
    thresholds = compute_cut_thresholds(peak, aimed_gap)
    member = (loads[None, :] >= thresholds) & is_rank[None, :]
    # ``kept`` are the tokens that cannot leave a set of ranks.
    size, kept = tl.reduce(
        (tl.where(member, 1.0, 0.0), tl.where(member, fixed[None, :], 0.0)), 1, add2
    )
    kept += tl.sum(tl.where(lowest >= thresholds, weights, 0.0), 1)
    return tl.max(kept / size)


@triton.jit
def load_rank_cells(rank_cells_ptr, first, n_ranks, G: tl.constexpr):
    """Load the numbers of RANK_CELLS cells of each rank, from its ``first`` one on.

    Returns [G RANK_CELLS] int32, the cells of a rank side by side, -1 after its last.
    """
    index = tl.arange(0, G * RANK_CELLS)
    rank = index // RANK_CELLS
    entry = (first + index % RANK_CELLS) * n_ranks + rank
    return tl.load(rank_cells_ptr + entry, mask=rank < n_ranks, other=-1)


@triton.jit
def compute_loads(
    fixed,  # [G] float32
    tokens_ptr,  # [n_cells] float32
    first_cells,  # [G RANK_CELLS] int32, the first cells of each rank by `load_rank_cells`
    rank_cells_ptr,  # [n, n_ranks] int32, all cells of each rank
    n_ranks,
    most_cells,  # most cells of a rank
    G: tl.constexpr,
):
    """Compute rank loads [G] from fixed loads and the tokens of cells."""
    tokens = tl.load(tokens_ptr + first_cells, mask=first_cells >= 0, other=0.0)
    for first in range(RANK_CELLS, most_cells, RANK_CELLS):
        cell = load_rank_cells(rank_cells_ptr, first, n_ranks, G)
        tokens += tl.load(tokens_ptr + cell, mask=cell >= 0, other=0.0)
    return fixed + tl.sum(tokens.reshape(G, RANK_CELLS), 1)


@triton.jit
def _load_ranks_of_copies(cell_rank_ptr, start, n_copies, first):
    """Load the ranks of COPIES_AT_ONCE copies of each column, from its ``first`` one on.

    ``start`` and ``n_copies`` [C] are the number of each column's first cell and how many cells it
    has. Returns a tuple of [C] int32, -1 where there is no such copy.
    """
    ranks = ()
    for k in tl.static_range(COPIES_AT_ONCE):
        nth = first + k
        ranks += (tl.load(cell_rank_ptr + start + nth, mask=nth < n_copies, other=-1),)
    return ranks


@triton.jit
def _find_lowest_by_column(loads_ptr, first_ranks, cell_rank_ptr, start, n_copies, most_copies):
    """Find the least load of each column's ranks, [C]; infinite for a column without copies.

    ``first_ranks``, ``start`` and ``n_copies`` are those of `LoadedTables`, ``cell_rank`` [n_cells]
    int32 the rank of each cell.
    """
    inf = float("inf")
    lowest = tl.full(start.shape, inf, tl.float32)
    # The ranks of the first copies are loaded already, and each round loads those of the next.
    ranks = first_ranks
    copies = COPIES_AT_ONCE
    while copies < most_copies + COPIES_AT_ONCE:
        for k in tl.static_range(COPIES_AT_ONCE):
            load = tl.load(loads_ptr + ranks[k], mask=ranks[k] >= 0, other=inf)
            lowest = tl.minimum(lowest, load)
        ranks = _load_ranks_of_copies(cell_rank_ptr, start, n_copies, copies)
        copies += COPIES_AT_ONCE
    return lowest


@triton.jit
def _load_peak(loads_ptr, n_ranks, G: tl.constexpr):
    """Find the largest of loads [n_ranks] float32 in memory; every warp loads all of them."""
    SLICE: tl.constexpr = min(G, 32)
    rank = tl.arange(0, SLICE)
    loads = tl.load(loads_ptr + rank, mask=rank < n_ranks, other=0.0)
    for h in tl.static_range(1, G // SLICE):
        rank = h * SLICE + tl.arange(0, SLICE)
        loads = tl.maximum(loads, tl.load(loads_ptr + rank, mask=rank < n_ranks, other=0.0))
    return find_largest_load(loads)


@triton.jit
def round_plan(
    x_ptr,  # [n_cells] float32, tokens of each cell; overwritten
    tokens_ptr,  # [n_cells] float32, written: tokens that the rounded shares stand for
    running_ptr,  # [n_cells] int32, written: units of a column's cells up to each one
    units_ptr,  # [n_cells] int32, written: shares in units
    weights,  # [N] float32, tokens of each cell's column
    first,  # [N] int32, the first cell of its column
    copies,  # [N] int32, how many cells its column has
    is_cell,  # [N] bool, False in the padding
):
    """Round a plan to whole units of each column (equation 11).

    A column without tokens is split evenly.
    """
    cell = tl.arange(0, weights.shape[0])
    has_tokens = weights > 0
    x = tl.load(x_ptr + cell, mask=is_cell, other=0.0)
    share = tl.where(has_tokens, x * reciprocal(tl.where(has_tokens, weights, 1.0)), 1.0 / copies)
    fine = tl.where(is_cell, to_fine_units(share), 0)
    # Sums run over all cells, modulo 2**32: their differences within a column are exact.
    running = tl.cumsum(fine, 0)
    sums_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    # Several threads may hold the same cell: all of them must have read x before it is overwritten.
    tl.debug_barrier()
    tl.store(sums_ptr + cell, running, mask=is_cell)
    tl.debug_barrier()
    last = first + copies - 1
    total = tl.load(sums_ptr + last, mask=is_cell, other=FINE_ONE)
    earlier = tl.load(sums_ptr + first - 1, mask=is_cell & (first > 0), other=0)
    total -= earlier
    running -= earlier
    lower = round_running_sums(running - fine, total)
    upper = tl.where(cell == last, SHARE_ONE, round_running_sums(running, total))
    tl.store(tokens_ptr + cell, units_to_shares(upper - lower) * weights, mask=is_cell)
    tl.store(running_ptr + cell, upper, mask=is_cell)
    tl.store(units_ptr + cell, upper - lower, mask=is_cell)


@triton.jit
def level_edges(
    x_ptr,  # [n_cells] float32, tokens of each cell; updated
    loads_ptr,  # [n_ranks] float32, updated
    edges_ptr,  # [n_classes + 1, width] int64, see below
    n_classes,
    width,  # most edges of a class
    fraction,  # how much of the difference between two ranks moves; 0.5 levels them
    LANES: tl.constexpr,  # number of threads
):
    """Level all edges once, one class after the other (equation 18).

    A word of edges holds four fields, from the lowest: the edge's second rank, its first rank, its
    second cell and its first cell; -1 is no edge. The tiles have one element per thread. The next
    class's edges are loaded before this class moves tokens, so that their latency is hidden. All
    warps execute the instructions of a class even if it has edges for few of them.
    """
    lane = tl.arange(0, LANES)
    ptrs = edges_ptr + lane
    edge = tl.load(ptrs, mask=lane < width, other=-1)
    for _ in range(n_classes):
        ranks = edge.to(tl.int32)
        cells = (edge >> (2 * FIELD_BITS)).to(tl.int32)
        is_edge = ranks >= 0
        first_load_ptrs = loads_ptr + (ranks >> FIELD_BITS)
        second_load_ptrs = loads_ptr + (ranks & FIELD_MASK)
        first_x_ptrs = x_ptr + ((cells >> FIELD_BITS) & FIELD_MASK)
        second_x_ptrs = x_ptr + (cells & FIELD_MASK)
        ptrs += width
        edge = tl.load(ptrs, mask=lane < width, other=-1)
        first_load = tl.load(first_load_ptrs, mask=is_edge)
        second_load = tl.load(second_load_ptrs, mask=is_edge)
        first_x = tl.load(first_x_ptrs, mask=is_edge)
        second_x = tl.load(second_x_ptrs, mask=is_edge)
        moved = (second_load - first_load) * fraction
        moved = tl.minimum(tl.maximum(moved, -first_x), second_x)
        tl.store(first_load_ptrs, first_load + moved, mask=is_edge)
        tl.store(second_load_ptrs, second_load - moved, mask=is_edge)
        tl.store(first_x_ptrs, first_x + moved, mask=is_edge)
        tl.store(second_x_ptrs, second_x - moved, mask=is_edge)
        tl.debug_barrier()


@triton.jit
def sweep_until_bound_is_due(
    x_ptr,  # [n_cells] float32, updated as by `level_edges`
    loads_ptr,  # [n_ranks] float32, updated as by `level_edges`
    edges_ptr,  # as for `level_edges`
    sweeps,  # sweeps that were made before
    most_sweeps,
    n_classes,
    width,
    n_ranks,
    peak,
    bound,
    aimed_gap,
    G: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sweep until the bound of equation 19 should be computed.

    It is due after the first sweep, after ``most_sweeps``, and when the peak is steady and at
    least 1.5 times as many sweeps have been made as when it was last due. Sweeps also end when the
    peak is within the aimed gap of ``bound``. Returns the number of sweeps so far and the peak.
    """
    sweeps_at_last_bound = sweeps
    # False, as a Triton value, so that the loop can carry it.
    due = sweeps < 0
    while due == 0:
        tl.debug_barrier()
        fraction = tl.where(sweeps >= EXACT_SWEEPS, RELAXED_FRACTION, EXACT_FRACTION)
        level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, fraction, LANES)
        sweeps += 1
        new_peak = _load_peak(loads_ptr, n_ranks, G)
        steady = (peak - new_peak <= new_peak * aimed_gap * STEADY_FRACTION) & (
            2 * sweeps >= 3 * sweeps_at_last_bound
        )
        due = (sweeps == 1) | (sweeps >= most_sweeps) | steady
        due |= new_peak - bound <= new_peak * aimed_gap
        peak = new_peak
    return sweeps, peak


@triton.jit
def level_plan(
    peak,  # largest of ``load``
    bound,  # a load that no plan can beat
    load,  # [G] float32, rank loads of the plan x
    weights,  # [C] float32
    fixed,  # [G] float32
    is_rank,  # [G] bool
    n_ranks,
    aimed_gap,
    x_ptr,  # [n_cells] float32, tokens of each cell; improved in place
    loads_ptr,  # [n_ranks] float32, written: loads of the improved plan
    edges_ptr,  # as for `level_edges`
    n_classes,
    most_sweeps,
    width,
    first_ranks,  # as for `_find_lowest_by_column`, and so are the next four
    cell_rank_ptr,
    start,
    n_copies,
    most_copies,
    G: tl.constexpr,
    LANES: tl.constexpr,
):
    """Level a plan by sweeps over all edges (equation 18); returns the best bound.

    Sweeps go on until the peak is within the aimed gap of the bound, which is computed when
    `sweep_until_bound_is_due` says so, or for ``most_sweeps``. x and loads are in global memory,
    which stays in the cache of the one multiprocessor that uses it.
    """
    tl.store(loads_ptr + tl.arange(0, G), load, mask=is_rank)
    # Zero, as a Triton value, so that the loop can carry it.
    sweeps = n_classes * 0
    while (peak - bound > peak * aimed_gap) & (sweeps < most_sweeps):
        sweeps, peak = sweep_until_bound_is_due(
            x_ptr, loads_ptr, edges_ptr, sweeps, most_sweeps, n_classes, width,
            n_ranks, peak, bound, aimed_gap, G, LANES,
        )  # fmt: skip
        if peak - bound > peak * aimed_gap:
            load = tl.load(loads_ptr + tl.arange(0, G), mask=is_rank, other=0.0)
            lowest = _find_lowest_by_column(
                loads_ptr, first_ranks, cell_rank_ptr, start, n_copies, most_copies
            )
            cut = compute_cut_bound(
                load, fixed, weights[None, :], lowest[None, :], is_rank, peak, aimed_gap
            )
            bound = tl.maximum(bound, cut)
    return bound
