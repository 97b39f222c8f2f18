"""Plans by levelling ranks along edges, and the bound that goes with them.

Equation numbers refer to docs/method.md; tiles as in `interior_point`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.tiles import _add2, _inverse, _max2, _quantize, _shares

# Classes of edges that balancing goes through before the interior-point method takes over,
# and how far an edge goes beyond level once the first sweeps were not enough.
MOST_CLASSES = tl.constexpr(256)
EXACT_SWEEPS = tl.constexpr(3)
RELAXATION = tl.constexpr(1.5)
# The largest load is steady once a sweep takes no more than this part of the gap off it.
STEADY = tl.constexpr(0.5)


@triton.jit
def _cut_bounds(loads, fixed, weights, copy, rank_on):
    """Find loads that no plan can beat, [G], from the most loaded ranks (equation 19).

    Tokens that can't leave a set of ranks bound its mean load; the sets are all that hold the
    ranks from some load on.
    """
    lowest = tl.min(tl.where(copy, loads[:, None], float("inf")), 0, keep_dims=True)
    member = (loads[None, :] >= loads[:, None]) & rank_on[None, :]
    size, inside = tl.reduce(
        (tl.where(member, 1.0, 0.0), tl.where(member, fixed[None, :], 0.0)), 1, _add2
    )
    inside += tl.sum(tl.where(lowest >= loads[:, None], weights, 0.0), 1)
    return inside / size


@triton.jit
def _level_edges(
    x_ptr, loads_ptr, edges_ptr, n_classes, width, n_columns, part, LANES: tl.constexpr
):
    """Move tokens along the edges of all classes, one class after the other (equation 18).

    edges [n_classes + 1, width, 2] int32 hold the two ranks of an edge (the first in the upper
    half) and its column, -1 where there is none; no rank is twice in a class. ``part`` of the
    difference between the ranks moves, 0.5 to level them. Every element of these tiles is in
    one thread. What the next class needs of its edges is asked for before this class moves
    anything; all warps execute what few of them have edges for, so instructions count.
    """
    lane = tl.arange(0, LANES)
    there = lane < width
    ptrs = edges_ptr + 2 * lane
    ranks = tl.load(ptrs, mask=there, other=-1)
    column = tl.load(ptrs + 1, mask=there)
    for _ in range(n_classes):
        on = ranks >= 0
        first = ranks >> 16
        second = ranks & 0xFFFF
        first_load_ptrs = loads_ptr + first
        second_load_ptrs = loads_ptr + second
        first_x_ptrs = x_ptr + (first * n_columns + column)
        second_x_ptrs = x_ptr + (second * n_columns + column)
        ptrs += 2 * width
        ranks = tl.load(ptrs, mask=there, other=-1)
        column = tl.load(ptrs + 1, mask=there)
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
    x_ptr, loads_ptr, edges_ptr, done, most, n_classes, width, n_columns, n_ranks, peak, bound,
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
        _level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, n_columns, part, LANES)
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
    units, even_load, bound, load, weights, fixed, copy, rank, last, rank_on, n_ranks, aim,
    x_ptr, loads_ptr, edges_ptr, n_classes, width, n_columns, cell, inside,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Improve the plan ``units`` [G, C], with loads ``load``, until its gap is at most ``aim``.

    x, shares in tokens by cell, and loads [n_ranks] float32 are scratch, in global memory, which a
    single multiprocessor keeps in its cache. Sweeps over all edges go on until the largest
    load is near the bound, which is looked for when `_sweep` says so, or for MOST_CLASSES
    classes of them. The plan is rounded once, at the end. Returns units, largest load, bound.
    """
    tl.store(x_ptr + cell, _shares(units) * weights, mask=inside)
    tl.store(loads_ptr + tl.arange(0, G), load, mask=rank_on)
    most = tl.cdiv(n_classes * 0 + MOST_CLASSES, tl.maximum(n_classes, 1))
    done = n_classes * 0
    peak = even_load
    while (peak - bound > peak * aim) & (done < most) & (n_classes > 0):
        done = _sweep(
            x_ptr, loads_ptr, edges_ptr, done, most, n_classes, width, n_columns,
            n_ranks, peak, bound, aim, G, LANES,
        )  # fmt: skip
        load = tl.load(loads_ptr + tl.arange(0, G), mask=rank_on, other=0.0)
        cuts = _cut_bounds(load, fixed, weights, copy, rank_on)
        peak, cut = tl.reduce((load, cuts), 0, _max2)
        bound = tl.maximum(bound, cut)
    best_load = even_load
    if done > 0:
        inverse = _inverse(tl.where(weights > 0, weights, 1.0))
        shares = tl.load(x_ptr + cell, mask=inside, other=0.0) * inverse
        new_units = _quantize(shares, rank, last)
        new_load = tl.max(fixed + tl.sum(_shares(new_units) * weights, 1))
        # A column without tokens stays as it was.
        units = tl.where(new_load < best_load, tl.where(weights > 0, new_units, units), units)
        best_load = tl.minimum(best_load, new_load)
    return units, best_load, bound
