"""Plans by levelling ranks along edges, and the bound that goes with them.

Equation numbers refer to docs/method.md; tiles as in `interior_point`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.tiles import _add2, _inverse, _quantize, _shares

# Classes of edges that balancing goes through before the interior-point method takes over,
# sweeps before the next look at the plan, as a multiple of those before the last, and
# how far an edge goes beyond level once the first sweeps were not enough.
MOST_CLASSES = tl.constexpr(256)
GROWTH = tl.constexpr(3)
EXACT_SWEEPS = tl.constexpr(4)
RELAXATION = tl.constexpr(1.5)


@triton.jit
def _cut_bound(loads, fixed, weights, copy, rank_on):
    """Load that no plan can beat, from the most loaded ranks (equation 19).

    Tokens that can't leave a set of ranks bound its mean load; the sets are all that hold the
    ranks from some load on.
    """
    lowest = tl.min(tl.where(copy, loads[:, None], float("inf")), 0, keep_dims=True)
    member = (loads[None, :] >= loads[:, None]) & rank_on[None, :]
    size, inside = tl.reduce(
        (tl.where(member, 1.0, 0.0), tl.where(member, fixed[None, :], 0.0)), 1, _add2
    )
    inside += tl.sum(tl.where(lowest >= loads[:, None], weights, 0.0), 1)
    return tl.max(inside / size)


@triton.jit
def _load_edges(ptrs, on, width, x_ptr, loads_ptr):
    """Where the loads and shares of the two ends of one class's edges are, and which exist."""
    first = tl.load(ptrs, mask=on, other=-1)
    second = tl.load(ptrs + width, mask=on, other=0)
    first_cell = tl.load(ptrs + 2 * width, mask=on, other=0)
    second_cell = tl.load(ptrs + 3 * width, mask=on, other=0)
    return (
        first >= 0, loads_ptr + first, loads_ptr + second, x_ptr + first_cell, x_ptr + second_cell
    )  # fmt: skip


@triton.jit
def _level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, part, LANES: tl.constexpr):
    """Move tokens along the edges of all classes, one class after the other (equation 18).

    edges [n_classes, 4, width] int32 hold the two ranks of an edge and the cells of their
    shares, -1 where there is none; no rank is twice in a class. ``part`` of the difference
    between the ranks moves, 0.5 to level them. Every element of these tiles is in one thread.
    What the next class needs of its edges is there before this class has ended.
    """
    lane = tl.arange(0, LANES)
    ptrs = edges_ptr + lane
    on, first_load_ptrs, second_load_ptrs, first_x_ptrs, second_x_ptrs = _load_edges(
        ptrs, lane < width, width, x_ptr, loads_ptr
    )
    for k in range(n_classes):
        ptrs += 4 * width
        following = _load_edges(ptrs, (lane < width) & (k + 1 < n_classes), width, x_ptr, loads_ptr)
        first_load = tl.load(first_load_ptrs, mask=on, other=0.0)
        second_load = tl.load(second_load_ptrs, mask=on, other=0.0)
        first_x = tl.load(first_x_ptrs, mask=on, other=0.0)
        second_x = tl.load(second_x_ptrs, mask=on, other=0.0)
        moved = (second_load - first_load) * part
        moved = tl.minimum(tl.maximum(moved, -first_x), second_x)
        tl.store(first_load_ptrs, first_load + moved, mask=on)
        tl.store(second_load_ptrs, second_load - moved, mask=on)
        tl.store(first_x_ptrs, first_x + moved, mask=on)
        tl.store(second_x_ptrs, second_x - moved, mask=on)
        on, first_load_ptrs, second_load_ptrs, first_x_ptrs, second_x_ptrs = following
        tl.debug_barrier()


@triton.jit
def _sweep(
    x_ptr, loads_ptr, edges_ptr, done, end, n_classes, width, n_ranks, peak, bound, aim,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sweep over all edges after ``done`` sweeps until ``end``, or until ``bound`` is near.

    ``peak`` is the largest load of the plan before, and far from the bound. Returns the number
    of sweeps.
    """
    rank = tl.arange(0, G)
    while (done < end) & (peak - bound > peak * aim):
        tl.debug_barrier()
        part = tl.where(done >= EXACT_SWEEPS, 0.5 * RELAXATION, 0.5)
        _level_edges(x_ptr, loads_ptr, edges_ptr, n_classes, width, part, LANES)
        done += 1
        if done < end:
            peak = tl.max(tl.load(loads_ptr + rank, mask=rank < n_ranks, other=0.0))
    return done


@triton.jit
def _balance(
    units, best_load, bound, load, weights, fixed, copy, rank, last, rank_on, n_ranks, aim,
    x_ptr, loads_ptr, edges_ptr, n_classes, width, cell, inside,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Improve the plan ``units`` [G, C], with loads ``load``, until its gap is at most ``aim``.

    x, shares in tokens by cell, and loads [n_ranks] float32 are scratch, in global memory, which a
    single multiprocessor keeps in its cache. The plan is looked at after 1, 3, 9, .. sweeps
    over all edges, or when its largest load is near the bound, and left after MOST_CLASSES
    classes of them. Returns units, largest load, bound.
    """
    tl.store(x_ptr + cell, _shares(units) * weights, mask=inside)
    tl.store(loads_ptr + tl.arange(0, G), load, mask=rank_on)
    inverse = _inverse(tl.where(weights > 0, weights, 1.0))
    done = n_classes * 0
    while (
        (best_load - bound > best_load * aim) & (done * n_classes < MOST_CLASSES) & (n_classes > 0)
    ):
        most = tl.cdiv(n_classes * 0 + MOST_CLASSES, n_classes)
        end = tl.minimum(tl.maximum(done * GROWTH, 1), most)
        done = _sweep(
            x_ptr, loads_ptr, edges_ptr, done, end, n_classes, width,
            n_ranks, best_load, bound, aim, G, LANES,
        )  # fmt: skip
        shares = tl.load(x_ptr + cell, mask=inside, other=0.0) * inverse
        new_units = _quantize(shares, rank, last)
        load = fixed + tl.sum(_shares(new_units) * weights, 1)
        new_load = tl.max(load)
        bound = tl.maximum(bound, _cut_bound(load, fixed, weights, copy, rank_on))
        better = new_load < best_load
        # A column without tokens stays as it was.
        units = tl.where(better, tl.where(weights > 0, new_units, units), units)
        best_load = tl.where(better, new_load, best_load)
    return units, best_load, bound
