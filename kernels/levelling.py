"""Plans by levelling ranks along edges, and the bound that goes with them.

Equation numbers refer to docs/method.md; tiles as in `interior_point`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.tiles import SHARE_ONE, _add2, _inverse, _quantize

# Classes of edges that balancing goes through before the interior-point method takes over, and
# how far it goes beyond level once the first sweeps were not enough.
MOST_CLASSES = tl.constexpr(256)
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
def _ends(edge, x_ptr, loads_ptr, n_columns):
    """Whether there is an edge, and where the loads and shares of its two ends are."""
    first = (edge & 0xFFFF).to(tl.int32)
    second = ((edge >> 16) & 0xFFFF).to(tl.int32)
    column_ptr = x_ptr + (edge >> 32).to(tl.int32)
    return (
        edge >= 0,
        loads_ptr + first,
        loads_ptr + second,
        column_ptr + first * n_columns,
        column_ptr + second * n_columns,
    )


@triton.jit
def _level_edges(
    x_ptr, loads_ptr, edges_ptr, n_steps, n_classes, width, n_columns, part, LANES: tl.constexpr
):
    """Move tokens along the edges of ``n_steps`` classes, one after the other (equation 18).

    edges [n_classes, width] int64 hold the two ranks (16 bits each) and the column of an edge,
    -1 where there is none; no rank is twice in a class. ``part`` of the difference between the
    ranks moves, 0.5 to level them. Every element of these tiles is in one thread. What the next
    class needs of its edges is there before this class has ended.
    """
    lane = tl.arange(0, LANES)
    begin = edges_ptr + lane
    ptrs = begin
    edge = tl.load(ptrs, mask=lane < width, other=-1)
    on, first_load_ptrs, second_load_ptrs, first_x_ptrs, second_x_ptrs = _ends(
        edge, x_ptr, loads_ptr, n_columns
    )
    k = 0
    for _ in range(n_steps):
        k = tl.where(k + 1 < n_classes, k + 1, 0)
        ptrs = tl.where(k > 0, ptrs + width, begin)
        following = tl.load(ptrs, mask=lane < width, other=-1)
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
        on, first_load_ptrs, second_load_ptrs, first_x_ptrs, second_x_ptrs = _ends(
            following, x_ptr, loads_ptr, n_columns
        )
        tl.debug_barrier()


@triton.jit
def _balance(
    units, upto, best_load, bound, load, weights, fixed, copy, rank, last, rank_on, aim,
    x_ptr, loads_ptr, edges_ptr, n_classes, width, n_columns, cell, inside,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Improve the plan ``units`` [G, C], with loads ``load``, until its gap is at most ``aim``.

    x [G, n_columns] and loads [G] float32 are scratch, in global memory, which a single
    multiprocessor keeps in its cache. The plan is looked at after 1, 2, 4, .. sweeps over all
    edges, and left after MOST_CLASSES classes of them. Returns units, running sums, largest
    load, bound.
    """
    tl.store(x_ptr + cell, weights * (units.to(tl.float32) * (1.0 / SHARE_ONE)), mask=inside)
    tl.store(loads_ptr + tl.arange(0, G), load, mask=rank_on)
    inverse = _inverse(tl.where(weights > 0, weights, 1.0))
    done = 0
    while (
        (best_load - bound > best_load * aim)
        & (done * n_classes < MOST_CLASSES)
        & (n_classes > 0)
    ):
        sweeps = tl.maximum(done, 1)
        part = tl.where(done >= EXACT_SWEEPS, 0.5 * RELAXATION, 0.5)
        tl.debug_barrier()
        _level_edges(
            x_ptr, loads_ptr, edges_ptr, sweeps * n_classes, n_classes, width, n_columns, part,
            LANES,
        )  # fmt: skip
        done += sweeps
        shares = tl.load(x_ptr + cell, mask=inside, other=0.0) * inverse
        new_units, new_upto = _quantize(shares, rank, last)
        load = fixed + tl.sum(new_units.to(tl.float32) * (weights * (1.0 / SHARE_ONE)), 1)
        new_load = tl.max(load)
        bound = tl.maximum(bound, _cut_bound(load, fixed, weights, copy, rank_on))
        better = new_load < best_load
        # A column without tokens stays as it was.
        units = tl.where(better, tl.where(weights > 0, new_units, units), units)
        upto = tl.where(better, tl.where(weights > 0, new_upto, upto), upto)
        best_load = tl.where(better, new_load, best_load)
    return units, upto, best_load, bound
