"""Mehrotra's primal-dual method for the min-max LP of one group.

Equation numbers refer to docs/method.md. Numbers by copy are dense tiles [G, C], those by column
[1, C] and those by rank [G]; ranks and columns are padded to powers of two, G and C. Everything is
float32 in units of the mean rank load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.solve.levelling import _cut_bound
from lplb_triton.kernels.solve.tiles import _add2, _column_sum, _inverse, _max_and_add

# Start, step and centering of the method (equations 4, 8 and 9), light columns (10).
START_MARGIN = tl.constexpr(0.1)
START_CENTERING = tl.constexpr(0.03)
STEP_FACTOR = tl.constexpr(0.99)
MIN_CENTERING = tl.constexpr(0.01)
REGULARIZATION = tl.constexpr(0.03)
LIGHT_PART = tl.constexpr(0.05)
# Where there is no copy, x and z hold these: x / z and every change come out as nothing.
FAR = tl.constexpr(1e30)
NEAR = tl.constexpr(1e-30)


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
def _normal_matrix(product, slack, on, G: tl.constexpr):
    """Make the matrix of equations 5 and 7, [G, G], from ``V V^T``; where ``on`` isn't, that of 1.

    Off-diagonal first, the diagonal from its row sums (no subtraction). Adding rho * ones changes
    nothing, since dy sums to 0.
    """
    off_diagonal = tl.arange(0, G)[:, None] != tl.arange(0, G)[None, :]
    product = tl.where(off_diagonal, product, 0.0)
    diagonal = tl.where(on, tl.sum(product, 1) + slack, 1.0)
    rho = tl.max(tl.where(on, diagonal, 0.0)) * REGULARIZATION
    one = tl.where(on, 1.0, 0.0)
    both_on = (one[:, None] * one[None, :]) > 0
    return tl.where(off_diagonal, -product, diagonal[:, None]) + tl.where(both_on, rho, 0.0)


@triton.jit
def _factor(v, slack, rank_on, G: tl.constexpr):
    """S, lower triangular, with ``S.T @ S`` the inverse of the matrix of equations 5 and 7.

    ``v`` [G, C]; as [G / 4, 4, G].
    """
    product = tl.dot(v, tl.trans(v), input_precision="ieee")
    return _inverse_factor(_normal_matrix(product, slack, rank_on, G), G)


@triton.jit
def _apply(factor, rhs, G: tl.constexpr):
    """``S.T @ (S @ rhs)``, [G]; rhs is 0 where there is no rank."""
    half = tl.sum(factor * rhs[None, None, :], 2)
    return tl.sum(tl.reshape(factor * half[:, :, None], (G, G)), 0)


@triton.jit
def _step(rate):
    """Largest step in [0, 1] for the largest relative decrease per unit step (equation 9)."""
    return 1.0 / tl.maximum(rate, 1.0)


@triton.jit
def _largest(by_copy, by_rank):
    """Largest of numbers by copy [G, C] and by rank [G]."""
    return tl.max(tl.maximum(by_copy, by_rank[:, None]))


@triton.jit
def _lower_bound(y, fixed, w, copy):
    """Load that no plan can beat, from any multipliers ``y`` >= 0 (equation 3)."""
    # No y is larger than their sum, so it stands for "no copy here" (a column without any copy
    # has no weight).
    total, fixed_part = tl.reduce((y, y * fixed), 0, _add2)
    cheapest = tl.min(tl.where(copy, y[:, None], total), 0, keep_dims=True)
    return (fixed_part + tl.sum(w * cheapest)) / total


@triton.jit
def _newton(
    best, best_load, bound, weights, fixed, copy, rank_on, n_ranks, total, tolerance, aim,
    max_iterations, G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Improve the plan ``best``, shares [G, C], and its bound until the gap is at most ``aim``.

    weights [1, C], fixed [G], loads and bound in the caller's unit, ``total`` the sum of all; no
    weight is on a column with fewer than two copies. ``copy`` [G, C] says where copies are,
    ``rank_on`` [G] where ranks are. Returns plan, bound, iterations.
    """
    n_copies = _column_sum(copy.to(tl.float32))
    n_ranks = n_ranks.to(tl.float32)
    unit = total / n_ranks
    w_all = weights / unit
    f = fixed / unit
    best_load = best_load / unit
    bound = bound / unit

    # Equation 4: the even split, y uniform, every product x z a part of the mean of s y.
    copies = tl.maximum(n_copies, 1.0)
    even = tl.where(copy, 1.0 / copies, 0.0)
    heavy = w_all > tolerance * LIGHT_PART / C
    w = tl.where(heavy, w_all, 0.0)
    active = copy & (w > 0)
    light = w_all - w
    base = f + tl.sum(light * even, 1)
    load = base + tl.sum(w * even, 1)
    even_load = tl.max(load)
    t = even_load + tl.maximum(even_load - 1.0, 1e-6) * START_MARGIN
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

    iterations = 0
    while (best_load - bound > best_load * aim) & (iterations < max_iterations):
        iterations += 1
        inverse_z = _inverse(z)
        d = x * inverse_z
        d_columns = tl.where(heavy, _column_sum(d), 1.0)
        root = tl.rsqrt(d_columns)
        inverse_d = root * root
        inverse_y = _inverse(y)
        slack = s * inverse_y
        v = d * (w * root)
        factor = _factor(v, slack, rank_on, G)
        ones = _apply(factor, one, G)

        # Equation 8, predictor. h = dz / z, e = dy / y; then dx / x = -1 - h, ds / s = -1 - e.
        w_mean = w * inverse_d
        affine_load = tl.sum(d * w_mean, 1)
        rhs_affine = tl.where(rank_on, base + affine_load, 0.0)
        u = _apply(factor, rhs_affine, G)
        t_new, ones_sum = tl.reduce((u, ones), 0, _add2)
        inverse_ones = 1.0 / ones_sum
        t_new *= inverse_ones
        dy = _minus_product(t_new, ones, u)
        dy_copies = dy[:, None]
        shift = inverse_d + w_mean * _column_sum(d * dy_copies)
        h = inverse_z * _minus_product(1.0, shift, w * dy_copies)
        e = dy * inverse_y
        primal = _step(1.0 + _largest(h, e))
        dual = _step(_largest(-h, -e))
        affine = products * (1.0 - dual) + (primal - dual) * (t_new - t)
        ratio = tl.maximum(affine, 0.0) / products
        ratio *= ratio
        target = products / n_products * tl.minimum(tl.maximum(ratio * ratio, MIN_CENTERING), 1.0)

        # Corrector. moved = D q' = x + x (target - dx dz) / (x z) - x.
        moved = tl.fma(x, tl.fma(h, h, h), inverse_z * target)
        moved_columns = _column_sum(moved)
        slack_moved = target * inverse_y + s * (e + e * e)
        rhs = _minus_product(d, w_mean * moved_columns, w * moved)
        rhs = tl.sum(rhs, 1) + slack_moved
        u = _apply(factor, rhs_affine + tl.where(rank_on, rhs, 0.0), G)
        t_new = tl.sum(u) * inverse_ones
        dy = _minus_product(t_new, ones, u)
        dy_copies = dy[:, None]
        shift = w_mean * _column_sum(d * dy_copies)
        shift = inverse_d * (1.0 - moved_columns) + shift
        h = inverse_z * _minus_product(1.0, shift, w * dy_copies)
        e = dy * inverse_y
        x_full = _minus_product(x, h, moved)

        # Equation 9: the full step, with what is negative cut off, gives a plan and a bound,
        # and the plan's loads another (equation 19).
        plan = tl.maximum(x_full, 0.0)
        plan *= _inverse(tl.where(heavy, _column_sum(plan), 1.0))
        loads = base + tl.sum(w * plan, 1)
        # Triton's maximum passes over NaN, a sum doesn't: a broken iterate is never kept.
        new_load, load_sum = tl.reduce((loads, loads), 0, _max_and_add)
        new_y = tl.where(rank_on, tl.maximum(y + dy, 0.0), 0.0)
        new_bound = _lower_bound(new_y, f, w_all, copy)
        better = (new_load < best_load) & (load_sum == load_sum)
        best = tl.where(better, tl.where(active, plan, even), best)
        best_load = tl.where(better, new_load, best_load)
        lowest = tl.min(tl.where(copy, loads[:, None], float("inf")), 0, keep_dims=True)
        cut = _cut_bound(loads, f, w_all, lowest, rank_on, new_load, aim)
        new_bound = tl.where(load_sum == load_sum, tl.maximum(new_bound, cut), new_bound)
        bound = tl.where(new_bound > bound, new_bound, bound)

        # Equation 9: how far the iterate itself may go.
        dx = tl.where(active, x_full - x, 0.0)
        ds = tl.where(rank_on, slack_moved - s - slack * dy, 0.0)
        primal = _largest(-dx * _inverse(x), -ds * _inverse(s))
        primal = _step(primal * (1.0 / STEP_FACTOR))
        dual = _step(_largest(-h, -e) * (1.0 / STEP_FACTOR))
        dt = t_new - t
        products += primal * dt + dual * (n_products * target - products - dt)
        products = tl.maximum(products, 1e-12)
        x = tl.fma(dx, primal, x)
        z = tl.fma(z * h, dual, z)
        s += primal * ds
        y += tl.where(rank_on, dual * dy, 0.0)
        t += primal * dt
    return best, bound * unit, iterations
