"""Plans by levelling ranks along edges, and the bound that goes with them.

Equation numbers refer to docs/method.md. A *cell* is a column's share of one rank; a group's
cells are numbered by column, then by rank. ``start`` and ``n_copies`` [C] say which are a column's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.tiles import SHARE_ONE, _add2, _inverse, _max2, _shares

# Classes of edges that balancing goes through before the interior-point method takes over,
# and how far an edge goes beyond level once the first sweeps were not enough.
MOST_CLASSES = tl.constexpr(256)
EXACT_SWEEPS = tl.constexpr(3)
RELAXATION = tl.constexpr(1.5)
# The largest load is steady once a sweep takes no more than this part of the gap off it.
STEADY = tl.constexpr(0.5)
# Copies of a column that are looked at together.
COPIES_AT_ONCE = tl.constexpr(4)


@triton.jit
def _cut_bounds(loads, fixed, weights, lowest, rank_on):
    """Find loads that no plan can beat, [G], from the most loaded ranks (equation 19).

    Tokens that can't leave a set of ranks bound its mean load; the sets are all that hold the
    ranks from some load on. ``lowest`` [1, C] is the least of a column's ranks' loads.
    """
    member = (loads[None, :] >= loads[:, None]) & rank_on[None, :]
    size, inside = tl.reduce(
        (tl.where(member, 1.0, 0.0), tl.where(member, fixed[None, :], 0.0)), 1, _add2
    )
    inside += tl.sum(tl.where(lowest >= loads[:, None], weights, 0.0), 1)
    return inside / size


@triton.jit
def _columns_cells(start, n_copies, first):
    """Cells of all columns from their ``first`` copy on, [C, COPIES_AT_ONCE], and which exist."""
    copy = first + tl.arange(0, COPIES_AT_ONCE)[None, :]
    return start[:, None] + copy, copy < n_copies[:, None], copy


@triton.jit
def _rank_loads(fixed, tokens_ptr, rank_cells):
    """Add to the fixed loads of ranks, [G], the tokens by cell of their cells [G, n], -1 for none."""
    return fixed + tl.sum(tl.load(tokens_ptr + rank_cells, mask=rank_cells >= 0, other=0.0), 1)


@triton.jit
def _split_evenly(x_ptr, weights, start, n_copies, most_copies):
    """Give every copy of a column the same part of its tokens."""
    each = (weights / tl.maximum(n_copies, 1).to(tl.float32))[:, None]
    for first in range(0, most_copies, COPIES_AT_ONCE):
        cells, there, copy = _columns_cells(start, n_copies, first)
        tl.store(x_ptr + cells, tl.broadcast_to(each, cells.shape), mask=there)


@triton.jit
def _lowest_loads(loads_ptr, first_ranks, cell_rank_ptr, start, n_copies, most_copies):
    """Least load of a column's ranks, [C]; ``first_ranks`` are those of its first copies."""
    inf = float("inf")
    lowest = tl.full(start.shape, inf, tl.float32)
    ranks = first_ranks
    for first in range(COPIES_AT_ONCE, most_copies + COPIES_AT_ONCE, COPIES_AT_ONCE):
        loads = tl.load(loads_ptr + ranks, mask=ranks >= 0, other=inf)
        cells, there, copy = _columns_cells(start, n_copies, first)
        ranks = tl.load(cell_rank_ptr + cells, mask=there, other=-1)
        lowest = tl.minimum(lowest, tl.min(loads, 1))
    return lowest


@triton.jit
def _round(x_ptr, cumulative_ptr, shares_ptr, tokens_ptr, weights, start, n_copies, most_copies):
    """Round tokens x by cell to whole units of their column (equation 11).

    Writes the rounded shares, their running sums over the copies of a column, and the tokens that
    they stand for. A column without tokens is split evenly.
    """
    some = (weights > 0)[:, None]
    inverse = _inverse(tl.where(some, weights[:, None], 1.0))
    even = (1.0 / tl.maximum(n_copies, 1).to(tl.float32))[:, None]
    before = n_copies * 0
    for first in range(0, most_copies, COPIES_AT_ONCE):
        cells, there, copy = _columns_cells(start, n_copies, first)
        x = tl.load(x_ptr + cells, mask=there, other=0.0)
        rounded = (tl.where(some, x * inverse, even) * SHARE_ONE + 0.5).to(tl.int32)
        rounded = tl.where(there, rounded, 0)
        upto = before[:, None] + tl.cumsum(rounded, 1)
        lower = tl.minimum(upto - rounded, SHARE_ONE)
        upto = tl.where(copy == n_copies[:, None] - 1, SHARE_ONE, tl.minimum(upto, SHARE_ONE))
        share = _shares(upto - lower)
        tl.store(cumulative_ptr + cells, _shares(upto), mask=there)
        tl.store(shares_ptr + cells, share, mask=there)
        tl.store(tokens_ptr + cells, share * weights[:, None], mask=there)
        before += tl.sum(rounded, 1)


@triton.jit
def _level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, part, LANES: tl.constexpr):
    """Move tokens along the edges of all classes, one class after the other (equation 18).

    edges [n_classes + 1, width] int64 hold, in four times 16 bits from the lowest, an edge's second
    and first rank and its second and first cell; -1 is none. No rank is twice in a class. ``part`` of
    the difference between the ranks moves, 0.5 to level them. Every element of these tiles is in
    one thread. The next class's edges are asked for before this class moves anything; all warps
    execute what few of them have edges for, so instructions count.
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
    x_ptr, loads_ptr, edges_ptr, done, most, n_classes, width, n_ranks, peak, bound,
    aim, G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sweep over all edges after ``done`` sweeps, until it is time for the next bound.

    That is after the first sweep, when the largest load is near ``bound``, when it has become
    steady (but not before half as many sweeps again), and after ``most`` sweeps. ``peak`` is the
    largest load so far. Returns the number of sweeps.
    """
    rank = tl.arange(0, G)
    before = done
    due = done < 0
    while due == 0:
        tl.debug_barrier()
        part = tl.where(done >= EXACT_SWEEPS, 0.5 * RELAXATION, 0.5)
        _level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, part, LANES)
        done += 1
        due = (done == 1) | (done >= most)
        if done > 1:
            now = tl.max(tl.load(loads_ptr + rank, mask=rank < n_ranks, other=0.0))
            steady = (peak - now <= now * aim * STEADY) & (2 * done >= 3 * before)
            due = due | steady | (now - bound <= now * aim)
            peak = now
    return done


@triton.jit
def _balance(
    peak, bound, load, weights, fixed, rank_on, n_ranks, aim, x_ptr, loads_ptr,
    edges_ptr, n_classes, width, first_ranks, cell_rank_ptr, start, n_copies, most_copies,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Improve the plan x, tokens by cell, with rank loads ``load``; returns a bound.

    x and loads [n_ranks] float32 are in global memory, which a single multiprocessor keeps in its
    cache. Sweeps over all edges go on until the largest load is within ``aim`` of the bound, which is
    looked for when `_sweep` says so, or for MOST_CLASSES classes of them.
    """
    tl.store(loads_ptr + tl.arange(0, G), load, mask=rank_on)
    most = tl.cdiv(n_classes * 0 + MOST_CLASSES, tl.maximum(n_classes, 1))
    done = n_classes * 0
    while (peak - bound > peak * aim) & (done < most) & (n_classes > 0):
        done = _sweep(
            x_ptr, loads_ptr, edges_ptr, done, most, n_classes, width,
            n_ranks, peak, bound, aim, G, LANES,
        )  # fmt: skip
        load = tl.load(loads_ptr + tl.arange(0, G), mask=rank_on, other=0.0)
        lowest = _lowest_loads(loads_ptr, first_ranks, cell_rank_ptr, start, n_copies, most_copies)
        cuts = _cut_bounds(load, fixed, weights[None, :], lowest[None, :], rank_on)
        peak, cut = tl.reduce((load, cuts), 0, _max2)
        bound = tl.maximum(bound, cut)
    return bound
