"""The min-max LP by an interior-point method: one program per group, one launch.

Equation numbers refer to docs/method.md. A group is a dense ``[G, C]`` tile (ranks x columns)
with a mask of the copies, both padded to powers of two; vectors over ranks are ``[G]``, over
columns ``[C]``. Everything is float32 in units of the mean rank load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.tokens import _await_previous, _start_dependents, _sum_rows

# Start, step and centering of the method (equations 4, 8 and 9), light columns (10).
START_MARGIN = tl.constexpr(0.1)
START_CENTERING = tl.constexpr(0.03)
STEP_FACTOR = tl.constexpr(0.99)
MIN_CENTERING = tl.constexpr(0.01)
REGULARIZATION = tl.constexpr(0.03)
LIGHT_PART = tl.constexpr(0.05)
TARGET_PART = tl.constexpr(0.98)
# Taken off the bound for the round-off of its float32 sums (2**-20; equation 3).
BOUND_ALLOWANCE = tl.constexpr(9.5367431640625e-07)
SHARE_ONE = tl.constexpr(1 << 24)
# Where there is no copy, x and z hold these: x / z and every change come out as nothing.
FAR = tl.constexpr(1e30)
NEAR = tl.constexpr(1e-30)

# Classes of edges that balancing goes through before the interior-point method takes over, and
# how far it goes beyond level once the first sweeps were not enough.
MOST_CLASSES = tl.constexpr(256)
EXACT_SWEEPS = tl.constexpr(4)
RELAXATION = tl.constexpr(1.5)

# Looks at counts that another program has to write, before giving up.
MOST_POLLS = tl.constexpr(1 << 22)

STATUS_CERTIFIED = tl.constexpr(0)
STATUS_GAP = tl.constexpr(1)
STATUS_INVALID = tl.constexpr(2)


@triton.jit
def _inverse(x):
    """Compute 1 / x for positive x, in two instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _minus_product(a, b, c):
    """Compute ``c - a b``, rounded once; not for what crosses lanes (equation 11)."""
    return tl.fma(-a, b, c)


@triton.jit
def _or4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 | b0, a1 | b1, a2 | b2, a3 | b3


@triton.jit
def _four_rows(panel):
    """Split a ``[4, G]`` tile into its rows; bits, so that what is not there adds nothing."""
    row = tl.arange(0, 4)[:, None]
    bits = panel.to(tl.int32, bitcast=True)
    a, b, c, d = tl.reduce(
        (
            tl.where(row == 0, bits, 0),
            tl.where(row == 1, bits, 0),
            tl.where(row == 2, bits, 0),
            tl.where(row == 3, bits, 0),
        ),
        0,
        _or4,
    )
    return (
        a.to(tl.float32, bitcast=True),
        b.to(tl.float32, bitcast=True),
        c.to(tl.float32, bitcast=True),
        d.to(tl.float32, bitcast=True),
    )


@triton.jit
def _pick(tile, here, axis: tl.constexpr):
    """Take the one slice of ``tile`` along ``axis`` at ``here``; bits, as above."""
    bits = tl.where(here, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def _at(row, i, G: tl.constexpr):
    """Element ``i`` of a ``[G]`` row."""
    index = tl.arange(0, G)
    if G <= 32:
        # A row lies in one warp: one shuffle.
        element = tl.gather(row, index * 0 + i, 0)
    else:
        element = _pick(row, index == i, 0)
    return element


@triton.jit
def _eliminate_four(t, k, G: tl.constexpr):
    """Eliminate rows 4k .. 4k + 3 of ``t`` [G / 4, 4, G] from the rows below (equation 7)."""
    Q: tl.constexpr = G // 4
    block = tl.arange(0, Q)[:, None, None]
    column = tl.arange(0, G)[None, None, :]
    i = tl.arange(0, G)
    p0, p1, p2, p3 = _four_rows(_pick(t, block == k, 0))
    # The 4 x 4 block of pivots, the same in every lane.
    a00 = _at(p0, 4 * k, G)
    a10, a11 = _at(p1, 4 * k, G), _at(p1, 4 * k + 1, G)
    a20, a21, a22 = _at(p2, 4 * k, G), _at(p2, 4 * k + 1, G), _at(p2, 4 * k + 2, G)
    a30, a31 = _at(p3, 4 * k, G), _at(p3, 4 * k + 1, G)
    a32, a33 = _at(p3, 4 * k + 2, G), _at(p3, 4 * k + 3, G)
    # Its Cholesky factor and, row by row, the inverse factor times [pivot rows | identity].
    own = i // 4 == k
    p0 = tl.where(own, tl.where(i % 4 == 0, 1.0, 0.0), p0)
    p1 = tl.where(own, tl.where(i % 4 == 1, 1.0, 0.0), p1)
    p2 = tl.where(own, tl.where(i % 4 == 2, 1.0, 0.0), p2)
    p3 = tl.where(own, tl.where(i % 4 == 3, 1.0, 0.0), p3)
    r0 = tl.rsqrt(a00)
    l10, l20, l30 = a10 * r0, a20 * r0, a30 * r0
    y0 = p0 * r0
    r1 = tl.rsqrt(_minus_product(l10, l10, a11))
    l21 = _minus_product(l20, l10, a21) * r1
    l31 = _minus_product(l30, l10, a31) * r1
    y1 = _minus_product(l10, y0, p1) * r1
    r2 = tl.rsqrt(_minus_product(l21, l21, _minus_product(l20, l20, a22)))
    l32 = _minus_product(l31, l21, _minus_product(l30, l20, a32)) * r2
    y2 = _minus_product(l21, y1, _minus_product(l20, y0, p2)) * r2
    r3 = tl.rsqrt(_minus_product(l32, l32, _minus_product(l31, l31, _minus_product(l30, l30, a33))))
    y3 = _minus_product(l32, y2, _minus_product(l31, y1, _minus_product(l30, y0, p3))) * r3
    # By symmetry these rows, transposed, are what the rows below are to be reduced with.
    which = tl.arange(0, 4)[:, None]
    rows = tl.where(which == 2, y2[None, :], y3[None, :])
    rows = tl.where(which == 0, y0[None, :], tl.where(which == 1, y1[None, :], rows))
    below = tl.broadcast_to(tl.reshape(rows, (4, Q, 4))[:, :, :, None], (4, Q, 4, G))
    which = tl.arange(0, 4)[:, None, None, None]
    shape: tl.constexpr = (Q, 4, G)
    reduced = tl.where(column // 4 == k, 0.0, t)
    reduced = _minus_product(
        _pick(below, which == 0, 0), tl.broadcast_to(y0[None, None, :], shape), reduced
    )
    reduced = _minus_product(
        _pick(below, which == 1, 0), tl.broadcast_to(y1[None, None, :], shape), reduced
    )
    reduced = _minus_product(
        _pick(below, which == 2, 0), tl.broadcast_to(y2[None, None, :], shape), reduced
    )
    reduced = _minus_product(
        _pick(below, which == 3, 0), tl.broadcast_to(y3[None, None, :], shape), reduced
    )
    return tl.where(block > k, reduced, tl.where(block == k, rows[None, :, :], t))


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _max_and_add(a0, a1, b0, b1):
    return tl.maximum(a0, b0), a1 + b1


@triton.jit
def _quarter(matrix, down: tl.constexpr, right: tl.constexpr, H: tl.constexpr):
    """Cut one of the four ``[H, H]`` blocks out of a ``[2 H, 2 H]`` tile."""
    rows = _pick(matrix.reshape(2, H, 2 * H), tl.arange(0, 2)[:, None, None] == down, 0)
    return _pick(rows.reshape(H, 2, H), tl.arange(0, 2)[None, :, None] == right, 1)


@triton.jit
def _inverse_factor(matrix, G: tl.constexpr):
    """S, lower triangular, with ``S.T @ S`` the inverse of ``matrix`` [G, G] (equation 7).

    Returned as [G / 4, 4, G]. Needs no pivoting: the matrix is positive definite.
    """
    if G == 64:
        # In halves: [[A, B], [B.T, C]] with S of A and S of C - B.T inv(A) B.
        H: tl.constexpr = G // 2
        upper = _inverse_factor_by_fours(_quarter(matrix, 0, 0, H), H).reshape(H, H)
        e = tl.dot(upper, _quarter(matrix, 0, 1, H), input_precision="ieee")
        rest = _quarter(matrix, 1, 1, H) - tl.dot(tl.trans(e), e, input_precision="ieee")
        lower = _inverse_factor_by_fours(rest, H).reshape(H, H)
        corner = tl.dot(tl.trans(e), upper, input_precision="ieee")
        corner = -tl.dot(lower, corner, input_precision="ieee")
        down = tl.arange(0, 2)[:, None, None, None]
        right = tl.arange(0, 2)[None, None, :, None]
        bottom = tl.where(right == 0, corner[None, :, None, :], lower[None, :, None, :])
        top = tl.where(right == 0, upper[None, :, None, :], 0.0)
        factor = tl.where(down == 0, top, bottom).reshape(G // 4, 4, G)
    else:
        factor = _inverse_factor_by_fours(matrix, G)
    return factor


@triton.jit
def _inverse_factor_by_fours(matrix, G: tl.constexpr):
    """`_inverse_factor` by eliminating four rows at a time."""
    Q: tl.constexpr = G // 4
    t = tl.reshape(matrix, (Q, 4, G))
    if Q <= 2:
        for k in tl.static_range(Q):
            t = _eliminate_four(t, k, G)
    else:
        for k in range(Q):
            t = _eliminate_four(t, k, G)
    row = 4 * tl.arange(0, Q)[:, None, None] + tl.arange(0, 4)[None, :, None]
    return tl.where(tl.arange(0, G)[None, None, :] <= row, t, 0.0)


@triton.jit
def _apply(factor, rhs, G: tl.constexpr):
    """``S.T @ (S @ rhs)``, [G]."""
    half = tl.sum(factor * rhs[None, None, :], 2)
    return tl.sum(tl.reshape(factor * half[:, :, None], (G, G)), 0)


@triton.jit
def _column_sum(tile):
    return tl.sum(tile, 0, keep_dims=True)


@triton.jit
def _step(rate):
    """Largest step in [0, 1] for the largest relative decrease per unit step (equation 9)."""
    return 1.0 / tl.maximum(rate, 1.0)


@triton.jit
def _lower_bound(y, fixed, w, copy):
    """Load that no plan can beat, from any multipliers ``y`` >= 0 (equation 3)."""
    # No y is larger than their sum, so it stands for "no copy here" (a column without any copy
    # has no weight).
    total, fixed_part = tl.reduce((y, y * fixed), 0, _add2)
    cheapest = tl.min(tl.where(copy, y[:, None], total), 0, keep_dims=True)
    return (fixed_part + tl.sum(w * cheapest)) / total


@triton.jit
def _cut_bound(loads, fixed, w, copy, rank_on):
    """Load that no plan can beat, from the most loaded ranks (equation 19).

    Tokens that can't leave a set of ranks bound its mean load; the sets are all that hold the
    ranks from some load on.
    """
    lowest = tl.min(tl.where(copy, loads[:, None], float("inf")), 0, keep_dims=True)
    member = (loads[None, :] >= loads[:, None]) & rank_on[None, :]
    size, inside = tl.reduce(
        (tl.where(member, 1.0, 0.0), tl.where(member, fixed[None, :], 0.0)), 1, _add2
    )
    inside += tl.sum(tl.where(lowest >= loads[:, None], w, 0.0), 1)
    return tl.max(inside / size)


@triton.jit
def _level_edges(
    x_ptr, loads_ptr, edges_ptr, n_steps, n_classes, width, n_columns, part, LANES: tl.constexpr
):
    """Move tokens along the edges of ``n_steps`` classes, one after the other (equation 18).

    edges [n_classes, width] int64 hold the two ranks (16 bits each) and the column of an edge,
    -1 where there is none; no rank is twice in a class. ``part`` of the difference between the
    ranks moves, 0.5 to level them. Every element of these tiles is in one thread.
    """
    lane = tl.arange(0, LANES)
    edge = tl.load(edges_ptr + lane, mask=lane < width, other=-1)
    k = 0
    for _ in range(n_steps):
        k = tl.where(k + 1 < n_classes, k + 1, 0)
        following = tl.load(edges_ptr + k * width + lane, mask=lane < width, other=-1)
        on = edge >= 0
        first = (edge & 0xFFFF).to(tl.int32)
        second = ((edge >> 16) & 0xFFFF).to(tl.int32)
        column = (edge >> 32).to(tl.int32)
        first_x_ptrs = x_ptr + first * n_columns + column
        second_x_ptrs = x_ptr + second * n_columns + column
        first_load = tl.load(loads_ptr + first, mask=on, other=0.0)
        second_load = tl.load(loads_ptr + second, mask=on, other=0.0)
        first_x = tl.load(first_x_ptrs, mask=on, other=0.0)
        second_x = tl.load(second_x_ptrs, mask=on, other=0.0)
        moved = (second_load - first_load) * part
        moved = tl.minimum(tl.maximum(moved, -first_x), second_x)
        tl.store(loads_ptr + first, first_load + moved, mask=on)
        tl.store(loads_ptr + second, second_load - moved, mask=on)
        tl.store(first_x_ptrs, first_x + moved, mask=on)
        tl.store(second_x_ptrs, second_x - moved, mask=on)
        tl.debug_barrier()
        edge = following


@triton.jit
def _balance(
    best, best_load, bound, load, base, fixed, w, w_all, copy, rank_on, target,
    x_ptr, loads_ptr, edges_ptr, n_classes, width, n_columns, cell, inside,
    G: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Improve the plan ``best`` [G, C] along edges until its gap is at most ``target``.

    x [G, n_columns] and loads [G] float32 are scratch, in global memory, which a single
    multiprocessor keeps in its cache. The plan is looked at after 1, 2, 4, .. sweeps over all
    edges, and left after MOST_CLASSES classes of them. Returns plan, load, bound.
    """
    tl.store(x_ptr + cell, w * best, mask=inside)
    tl.store(loads_ptr + tl.arange(0, G), load, mask=rank_on)
    done = 0
    while (
        (best_load - bound > best_load * target)
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
        x = tl.load(x_ptr + cell, mask=inside, other=0.0)
        total = _column_sum(x)
        plan = x * _inverse(tl.where(total > 0, total, 1.0))
        load = base + tl.sum(w * plan, 1)
        new_load = tl.max(load)
        bound = tl.maximum(bound, _cut_bound(load, fixed, w_all, copy, rank_on))
        better = new_load < best_load
        best = tl.where(better, plan, best)
        best_load = tl.where(better, new_load, best_load)
    return best, best_load, bound


@triton.jit
def _quantize(shares, copy, G: tl.constexpr):
    """Shares as multiples of 2**-24 that sum to exactly 1 per column (equation 11), int32."""
    units = tl.where(copy, (shares * SHARE_ONE + 0.5).to(tl.int32), 0)
    missing = -_column_sum(units) + SHARE_ONE
    # The largest share, the lowest rank among equals: one number to compare.
    key = units.to(tl.int64) * G + (G - 1 - tl.arange(0, G)[:, None])
    key = tl.where(copy, key, -1)
    return tl.where(copy & (key == tl.max(key, 0, keep_dims=True)), units + missing, units)


@triton.jit
def _interior_point(
    weights, fixed, copy, rank_on, n_ranks, tolerance, max_iterations,
    x_ptr, loads_ptr, edges_ptr, n_classes, width, n_columns, cell, inside,
    G: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Solve one group: by balancing along edges if that gets there, else by Newton's method.

    Parameters
    ----------
    weights, fixed : ``[1, C]``, ``[G]`` float32
        Loads in the caller's unit.
    copy, rank_on : ``[G, C]``, ``[G]`` int1
        Where copies are; which ranks are no padding, and so the first ``n_ranks``.
    x_ptr .. inside
        As for `_balance`; with ``LANES`` 0 there are no edges, and they aren't looked at.

    Returns
    -------
    units : ``[G, C]`` int32
        Shares in units of 2**-24.
    max_load, lower_bound, gap, iterations, status : scalars
    """
    n_copies = _column_sum(copy.to(tl.float32))
    inf = float("inf")
    # What may not be, weight without a copy too, makes the total infinite.
    allowed = (weights >= 0) & (weights < inf) & ((weights == 0) | (n_copies > 0))
    total = tl.sum(tl.where(allowed, weights, inf))
    total += tl.sum(tl.where((fixed >= 0) & (fixed < inf), fixed, inf))
    invalid = total == inf
    weights = tl.where(invalid, 0.0, weights)
    fixed = tl.where(invalid, 0.0, fixed)

    n_ranks = n_ranks.to(tl.float32)
    unit = tl.where((total > 0) & (total < inf), total / n_ranks, 1.0)
    w_all = weights / unit
    f = fixed / unit

    # Equation 4: the even split, y uniform, every product x z a part of the mean of s y.
    copies = tl.maximum(n_copies, 1.0)
    even = tl.where(copy, 1.0 / copies, 0.0)
    heavy = (w_all > tolerance * LIGHT_PART / C) & (n_copies > 1.5)
    active = copy & heavy
    w = tl.where(heavy, w_all, 0.0)
    base = f + tl.sum(tl.where(heavy, 0.0, w_all) * even, 1)
    load = base + tl.sum(w * even, 1)
    best_load, mean_load = tl.reduce((load, load), 0, _max_and_add)
    mean_load = mean_load / n_ranks
    pinned = f + tl.sum(tl.where(copy & (n_copies == 1.0), w_all, 0.0), 1)
    bound = tl.maximum(mean_load, tl.max(pinned))

    t = best_load + tl.maximum(best_load - mean_load, 1e-6) * START_MARGIN
    s = tl.where(rank_on, t - load, 1.0)
    y = tl.where(rank_on, 1.0 / n_ranks, 1.0)
    sy = tl.sum(tl.where(rank_on, s * y, 0.0))
    mu = sy / n_ranks * START_CENTERING
    x = tl.where(active, even, NEAR)
    z = tl.where(active, mu * copies, FAR)
    n_active = tl.sum(tl.where(heavy, n_copies, 0.0))
    n_products = n_active + n_ranks
    products = sy + mu * n_active
    one = tl.where(rank_on, 1.0, 0.0)
    off_diagonal = tl.arange(0, G)[:, None] != tl.arange(0, G)[None, :]
    both_on = (one[:, None] * one[None, :]) > 0
    best = even
    # The loop aims a little lower than the tolerance, so that rounding the shares keeps it.
    aim = tolerance * TARGET_PART
    if LANES > 0:
        best, best_load, bound = _balance(
            best, best_load, bound, load, base, f, w, w_all, copy, rank_on, aim,
            x_ptr, loads_ptr, edges_ptr, n_classes, width, n_columns, cell, inside, G, LANES,
        )  # fmt: skip

    iterations = 0
    while (best_load - bound > best_load * aim) & (iterations < max_iterations):
        iterations += 1
        inverse_z = _inverse(z)
        d = x * inverse_z
        d_column = tl.where(heavy, _column_sum(d), 1.0)
        root = tl.rsqrt(d_column)
        inverse_d = root * root
        inverse_y = _inverse(y)
        slack = s * inverse_y
        # Equation 5: off-diagonal first, the diagonal from its row sums (no subtraction).
        v = d * (w * root)
        matrix = tl.dot(v, tl.trans(v), input_precision="ieee")
        matrix = tl.where(off_diagonal, matrix, 0.0)
        diagonal = tl.where(rank_on, tl.sum(matrix, 1) + slack, 1.0)
        # Equation 7: adding rho * ones changes nothing, since dy sums to 0.
        rho = tl.max(tl.where(rank_on, diagonal, 0.0)) * REGULARIZATION
        matrix = tl.where(off_diagonal, -matrix, diagonal[:, None])
        factor = _inverse_factor(matrix + tl.where(both_on, rho, 0.0), G)
        ones = _apply(factor, one, G)

        # Equation 8, predictor. h = dz / z, e = dy / y; then dx / x = -1 - h, ds / s = -1 - e.
        w_mean = w * inverse_d
        rhs_affine = tl.where(rank_on, base + tl.sum(d * w_mean, 1), 0.0)
        u = _apply(factor, rhs_affine, G)
        t_new, ones_sum = tl.reduce((u, ones), 0, _add2)
        inverse_ones = 1.0 / ones_sum
        t_new *= inverse_ones
        dy = _minus_product(t_new, ones, u)
        shift = inverse_d + w_mean * _column_sum(d * dy[:, None])
        h = inverse_z * _minus_product(1.0, shift, w * dy[:, None])
        e = dy * inverse_y
        primal = _step(1.0 + tl.max(tl.maximum(h, e[:, None])))
        dual = _step(-tl.min(tl.minimum(h, e[:, None])))
        affine = products * (1.0 - dual) + (primal - dual) * (t_new - t)
        ratio = tl.maximum(affine, 0.0) / products
        ratio *= ratio
        target = products / n_products * tl.minimum(tl.maximum(ratio * ratio, MIN_CENTERING), 1.0)

        # Corrector. moved = D q' = x + x (target - dx dz) / (x z) - x.
        moved = tl.fma(x, tl.fma(h, h, h), inverse_z * target)
        moved_column = _column_sum(moved)
        slack_moved = target * inverse_y + s * (e + e * e)
        rhs = _minus_product(d, w_mean * moved_column, w * moved)
        rhs = rhs_affine + tl.where(rank_on, tl.sum(rhs, 1) + slack_moved, 0.0)
        u = _apply(factor, rhs, G)
        t_new = tl.sum(u) * inverse_ones
        dy = _minus_product(t_new, ones, u)
        shift = inverse_d * (1.0 - moved_column) + w_mean * _column_sum(d * dy[:, None])
        h = inverse_z * _minus_product(1.0, shift, w * dy[:, None])
        e = dy * inverse_y
        x_full = _minus_product(x, h, moved)

        # Equation 9: the full step, with what is negative cut off, gives a plan and a bound.
        plan = tl.maximum(x_full, 0.0)
        plan *= _inverse(tl.where(heavy, _column_sum(plan), 1.0))
        loads = base + tl.sum(w * plan, 1)
        # Triton's maximum passes over NaN, a sum doesn't: a broken iterate is never kept.
        new_load, load_sum = tl.reduce((loads, loads), 0, _max_and_add)
        new_bound = _lower_bound(tl.where(rank_on, tl.maximum(y + dy, 0.0), 0.0), f, w_all, copy)
        better = (new_load < best_load) & (load_sum == load_sum)
        best = tl.where(better, plan, best)
        best_load = tl.where(better, new_load, best_load)
        bound = tl.where(new_bound > bound, new_bound, bound)

        # Equation 9: how far the iterate itself may go.
        dx = tl.where(active, x_full - x, 0.0)
        ds = tl.where(rank_on, slack_moved - s - slack * dy, 0.0)
        primal = tl.max(tl.maximum(-dx * _inverse(x), (-ds * _inverse(s))[:, None]))
        primal = _step(primal * (1.0 / STEP_FACTOR))
        dual = _step(-tl.min(tl.minimum(h, e[:, None])) * (1.0 / STEP_FACTOR))
        dt = t_new - t
        products += primal * dt + dual * (n_products * target - products - dt)
        products = tl.maximum(products, 1e-12)
        x = tl.fma(dx, primal, x)
        z = tl.fma(z * h, dual, z)
        s += primal * ds
        y += tl.where(rank_on, dual * dy, 0.0)
        t += primal * dt

    units = _quantize(tl.where(active, best, even), copy, G)
    shares = units.to(tl.float32) * (1.0 / SHARE_ONE)
    max_load = tl.max(fixed + tl.sum(weights * shares, 1))
    lower_bound = tl.minimum(bound * unit * (1.0 - BOUND_ALLOWANCE), max_load)
    gap = (max_load - lower_bound) / tl.where(max_load > 0, max_load, 1.0)
    status = tl.where(gap <= tolerance, STATUS_CERTIFIED, STATUS_GAP)
    status = tl.where(invalid, STATUS_INVALID, status)
    max_load = tl.where(invalid, inf, max_load)
    lower_bound = tl.where(invalid, 0.0, lower_bound)
    gap = tl.where(invalid, inf, gap)
    return units, max_load, lower_bound, gap, iterations, status


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
    units, max_load, lower_bound, gap, iterations, status = _interior_point(
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
def _counts_of(counts_ptr, expert, most_polls):
    """Load counts of experts, 0 where there is none (-1), never from a stale line of a cache.

    Waits until all are there: `_count_kernel` left -1 in their places. What is missing after
    ``most_polls`` looks makes the program invalid.
    """
    counts = tl.where(expert >= 0, -1, 0)
    polls = 0
    while (tl.min(counts) < 0) & (polls < most_polls):
        polls += 1
        counts = tl.load(counts_ptr + expert, mask=expert >= 0, other=0, volatile=True)
    return counts.to(tl.float32)


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
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, COPIES: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Solve the groups of one batch, straight from counts by logical expert.

    Programs 0 .. n_sums - 1 first turn counts by program into running sums and totals, as
    `_running_sum_kernel` does, while the others set up; with ``n_sums`` 0 the counts are there.
    Program ``n_sums + group`` folds counts into weights and fixed loads, solves, and writes the
    cumulative share of every copy (equation 12). Programs that sum wait for none, so the
    waiting ends whatever else is on the GPU.

    Shapes as in ``placement.Structure``; running [n_rows, n_logical] and counts [n_logical]
    int32, shares [n_group, n_ranks, n_columns] float32 and units (int32, running over ranks),
    cumulative [n_physical] int32, of which it writes the copies of replicated experts:
    shared_copies and their cells, [n_group, n_shared], padded with -1. edges
    [n_group, most_classes, width] int64 as for `_level_edges`; LANES is the number of threads;
    loads [n_group, n_ranks] float32 is scratch. ``certified`` [1] rises
    by one if the group is certified, ``solves`` [1] always (int32 or int64).
    Grid (n_sums + n_group,).
    """
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
        # Seconds, or one look if nobody in this launch writes them.
        most_polls = tl.where(n_sums > 0, MOST_POLLS, 1)
        _await_previous(PDL)
        fixed = tl.sum(_counts_of(counts_ptr, expert, most_polls), 1)
        weights = _counts_of(counts_ptr, member, most_polls)
        if longest > 1:
            start_ptrs = column_start_ptr + group * (n_columns + 1) + col
            first = tl.load(start_ptrs, mask=col_on, other=0)
            last = tl.load(start_ptrs + 1, mask=col_on, other=0)
            for j in range(1, longest):
                there = first + j < last
                member = tl.load(column_members_ptr + first + j, mask=there, other=-1)
                weights += _counts_of(counts_ptr, member, most_polls)

        units, max_load, lower_bound, gap, iterations, status = _interior_point(
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
