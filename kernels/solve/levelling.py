"""Plans by levelling ranks along edges, and the bound that goes with them.

Equation numbers refer to docs/method.md. A *cell* is a column's share of one rank. A group's
cells are numbered by column, then by rank.
"""

# Triton's tuples grow.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton import _layout
from lplb_triton.kernels.solve.tiles import (
    PARTS_ONE,
    SHARE_ONE,
    _add2,
    _inverse,
    _largest_load,
    _parts_of,
    _shares,
    _units_of,
)

# Cells of a rank that are summed at once; its table is padded to whole such blocks.
RANK_CELLS = tl.constexpr(_layout.RANK_CELLS)
# Copies of a column that are looked at side by side.
COPIES_AT_ONCE = tl.constexpr(_layout.COPIES_AT_ONCE)
# The gap that is aimed at, as a part of the tolerance: at most, and at least where rounding may
# cost much.
TARGET_PART = tl.constexpr(0.98)
LEAST_TARGET_PART = tl.constexpr(0.75)
# That and what rounding may take of it: a level plan that gets here needs no more.
ROUNDED_PART = tl.constexpr(0.99)
# Sweeps before steps by potentials take over.
FIRST_SWEEPS = tl.constexpr(16)
# How far an edge goes beyond level once the first sweeps were not enough.
EXACT_SWEEPS = tl.constexpr(2)
RELAXATION = tl.constexpr(1.5)
# Sets of ranks that a bound is taken from, and how far below the largest load the last one goes,
# in units of the gap that is aimed at; from one to the next it is a factor of four.
CUTS = tl.constexpr(4)
FARTHEST_CUT = tl.constexpr(25.6)
# The largest load is steady once a sweep takes no more than this part of the gap off it.
STEADY = tl.constexpr(0.5)


@triton.jit
def _aim(target, n_ranks):
    """Relative gap to aim at so that rounding, at most ``n_ranks`` units, leaves ``target``."""
    rounded = target * ROUNDED_PART - n_ranks.to(tl.float32) * (1.0 / SHARE_ONE)
    return tl.maximum(tl.minimum(target * TARGET_PART, rounded), target * LEAST_TARGET_PART)


@triton.jit
def _cut_loads(peak, aim):
    """Make the loads [CUTS, 1] from which on ranks are in the sets that bounds come from."""
    step = tl.arange(0, CUTS)[:, None].to(tl.float32)
    return peak - peak * (aim * FARTHEST_CUT) * tl.exp2(2.0 * step - 2 * (CUTS - 1))


@triton.jit
def _cut_bound(loads, fixed, weights, lowest, rank_on, peak, aim):
    """Find a load that no plan can beat, from the most loaded ranks (equation 19).

    Tokens that can't leave a set of ranks bound its mean load; the sets are those of all ranks
    from some load on, a few times ``aim`` below the largest, ``peak``. weights and ``lowest``,
    the least of a column's ranks' loads, are [1, C].
    """
    least = _cut_loads(peak, aim)
    member = (loads[None, :] >= least) & rank_on[None, :]
    size, inside = tl.reduce(
        (tl.where(member, 1.0, 0.0), tl.where(member, fixed[None, :], 0.0)), 1, _add2
    )
    inside += tl.sum(tl.where(lowest >= least, weights, 0.0), 1)
    return tl.max(inside / size)


@triton.jit
def _load_rank_cells(rank_cells_ptr, first, n_ranks, G: tl.constexpr):
    """Load the numbers of RANK_CELLS cells of each rank from its ``first`` one on, [G RANK_CELLS].

    Flat, those of a rank side by side, -1 after the last.
    """
    index = tl.arange(0, G * RANK_CELLS)
    rank = index // RANK_CELLS
    at = (first + index % RANK_CELLS) * n_ranks + rank
    return tl.load(rank_cells_ptr + at, mask=rank < n_ranks, other=-1)


@triton.jit
def _rank_loads(
    fixed, tokens_ptr, first_cells, rank_cells_ptr, n_ranks, most_cells, G: tl.constexpr
):
    """Add to the fixed loads of ranks, [G], the tokens by cell of their cells.

    ``first_cells`` are the first of these, as `_load_rank_cells` gives them.
    """
    tokens = tl.load(tokens_ptr + first_cells, mask=first_cells >= 0, other=0.0)
    for first in range(RANK_CELLS, most_cells, RANK_CELLS):
        cell = _load_rank_cells(rank_cells_ptr, first, n_ranks, G)
        tokens += tl.load(tokens_ptr + cell, mask=cell >= 0, other=0.0)
    return fixed + tl.sum(tokens.reshape(G, RANK_CELLS), 1)


@triton.jit
def _ranks_of_copies(cell_rank_ptr, start, n_copies, first):
    """Load the ranks of COPIES_AT_ONCE copies of each column from its ``first`` on, -1 for none."""
    ranks = ()
    for k in tl.static_range(COPIES_AT_ONCE):
        at = first + k
        ranks += (tl.load(cell_rank_ptr + start + at, mask=at < n_copies, other=-1),)
    return ranks


@triton.jit
def _lowest_loads(loads_ptr, first_ranks, cell_rank_ptr, start, n_copies, most_copies):
    """Least load of a column's ranks, [C]; ``first_ranks`` are those of its first copies."""
    inf = float("inf")
    lowest = tl.full(start.shape, inf, tl.float32)
    ranks = first_ranks
    copies = COPIES_AT_ONCE
    while copies < most_copies + COPIES_AT_ONCE:
        for k in tl.static_range(COPIES_AT_ONCE):
            load = tl.load(loads_ptr + ranks[k], mask=ranks[k] >= 0, other=inf)
            lowest = tl.minimum(lowest, load)
        ranks = _ranks_of_copies(cell_rank_ptr, start, n_copies, copies)
        copies += COPIES_AT_ONCE
    return lowest


@triton.jit
def _peak(loads_ptr, n_ranks, G: tl.constexpr):
    """Largest of loads [n_ranks], by `_largest_load`; every warp looks at all."""
    LANES: tl.constexpr = min(G, 32)
    rank = tl.arange(0, LANES)
    loads = tl.load(loads_ptr + rank, mask=rank < n_ranks, other=0.0)
    for h in tl.static_range(1, G // LANES):
        rank = h * LANES + tl.arange(0, LANES)
        loads = tl.maximum(loads, tl.load(loads_ptr + rank, mask=rank < n_ranks, other=0.0))
    return _largest_load(loads)


@triton.jit
def _round(x_ptr, tokens_ptr, upto_ptr, units_ptr, weights, first, copies, there):
    """Round tokens x by cell to whole units of their column (equation 11).

    By cell, [N]: weights, ``first`` (the column's first cell), ``copies`` (how many it has) and
    ``there`` (whether there is such a cell). A column without tokens is split evenly.
    Writes by cell, [n_cells]: the shares and their running sums over each column, in units, and the
    tokens that they stand for; what was in x is lost.
    """
    cell = tl.arange(0, weights.shape[0])
    some = weights > 0
    x = tl.load(x_ptr + cell, mask=there, other=0.0)
    share = tl.where(some, x * _inverse(tl.where(some, weights, 1.0)), 1.0 / copies)
    parts = tl.where(there, _parts_of(share), 0)
    # Sums over all cells, modulo 2**32: their differences within a column are exact.
    upto = tl.cumsum(parts, 0)
    sums_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    # Several threads may hold a cell.
    tl.debug_barrier()
    tl.store(sums_ptr + cell, upto, mask=there)
    tl.debug_barrier()
    last = first + copies - 1
    total = tl.load(sums_ptr + last, mask=there, other=PARTS_ONE)
    before = tl.load(sums_ptr + first - 1, mask=there & (first > 0), other=0)
    total -= before
    upto -= before
    lower = _units_of(upto - parts, total)
    upto = tl.where(cell == last, SHARE_ONE, _units_of(upto, total))
    tl.store(tokens_ptr + cell, _shares(upto - lower) * weights, mask=there)
    tl.store(upto_ptr + cell, upto, mask=there)
    tl.store(units_ptr + cell, upto - lower, mask=there)


@triton.jit
def _level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, part, LANES: tl.constexpr):
    """Move tokens along the edges of all classes, one class after the other (equation 18).

    edges [n_classes + 1, width] int64 hold, in four times 16 bits from the lowest, an edge's
    second and first rank and its second and first cell; -1 is none. No rank is twice in a class.
    ``part`` of the difference between the ranks moves, 0.5 to level them. Every element of these
    tiles is in one thread. The next class's edges are asked for before this class moves anything;
    all warps execute what few of them have edges for, so instructions count.
    """
    lane = tl.arange(0, LANES)
    ptrs = edges_ptr + lane
    edge = tl.load(ptrs, mask=lane < width, other=-1)
    for _ in range(n_classes):
        ranks = edge.to(tl.int32)
        cells = (edge >> 32).to(tl.int32)
        on = ranks >= 0
        first_load_ptrs = loads_ptr + (ranks >> 16)
        second_load_ptrs = loads_ptr + (ranks & 0xFFFF)
        first_x_ptrs = x_ptr + ((cells >> 16) & 0xFFFF)
        second_x_ptrs = x_ptr + (cells & 0xFFFF)
        ptrs += width
        edge = tl.load(ptrs, mask=lane < width, other=-1)
        first_load = tl.load(first_load_ptrs, mask=on)
        second_load = tl.load(second_load_ptrs, mask=on)
        first_x = tl.load(first_x_ptrs, mask=on)
        second_x = tl.load(second_x_ptrs, mask=on)
        moved = (second_load - first_load) * part
        moved = tl.minimum(tl.maximum(moved, -first_x), second_x)
        tl.store(first_load_ptrs, first_load + moved, mask=on)
        tl.store(second_load_ptrs, second_load - moved, mask=on)
        tl.store(first_x_ptrs, first_x + moved, mask=on)
        tl.store(second_x_ptrs, second_x - moved, mask=on)
        tl.debug_barrier()


@triton.jit
def _sweep(
    x_ptr, loads_ptr, edges_ptr, done, most_sweeps, n_classes, width, n_ranks, peak,
    bound, aim, G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sweep over all edges after ``done`` sweeps, until it is time for the next bound.

    That is after the first sweep, when the largest load is near ``bound``, when it has become
    steady (but not before half as many sweeps again), and after ``most_sweeps``. ``peak`` is the
    largest load so far. Returns the number of sweeps and the largest load.
    """
    before = done
    due = done < 0
    while due == 0:
        tl.debug_barrier()
        part = tl.where(done >= EXACT_SWEEPS, 0.5 * RELAXATION, 0.5)
        _level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, part, LANES)
        done += 1
        now = _peak(loads_ptr, n_ranks, G)
        steady = (peak - now <= now * aim * STEADY) & (2 * done >= 3 * before)
        due = (done == 1) | (done >= most_sweeps) | steady | (now - bound <= now * aim)
        peak = now
    return done, peak


@triton.jit
def _balance(
    peak, bound, load, weights, fixed, rank_on, n_ranks, aim, x_ptr, loads_ptr,
    edges_ptr, n_classes, most_sweeps, width, first_ranks, cell_rank_ptr, start, n_copies,
    most_copies, G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Improve the plan x, tokens by cell, with rank loads ``load``; returns a bound.

    x and loads [n_ranks] float32 are in global memory, which a single multiprocessor keeps in its
    cache. Sweeps over all edges go on until the largest load is within ``aim`` of the bound,
    which is looked for when `_sweep` says so, or for ``most_sweeps``.
    """
    tl.store(loads_ptr + tl.arange(0, G), load, mask=rank_on)
    done = n_classes * 0
    while (peak - bound > peak * aim) & (done < most_sweeps):
        done, peak = _sweep(
            x_ptr, loads_ptr, edges_ptr, done, most_sweeps, n_classes, width,
            n_ranks, peak, bound, aim, G, LANES,
        )  # fmt: skip
        if peak - bound > peak * aim:
            load = tl.load(loads_ptr + tl.arange(0, G), mask=rank_on, other=0.0)
            lowest = _lowest_loads(
                loads_ptr, first_ranks, cell_rank_ptr, start, n_copies, most_copies
            )
            cut = _cut_bound(load, fixed, weights[None, :], lowest[None, :], rank_on, peak, aim)
            bound = tl.maximum(bound, cut)
    return bound
