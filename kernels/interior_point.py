"""Mehrotra's primal-dual method for the min-max LP of one group.

Equation numbers refer to docs/method.md. Numbers by copy have one of the two forms of copies.py;
ranks and columns are padded to powers of two, G and C. Everything is float32 in units of the mean
rank load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.copies import (
    Cells,
    _as_row,
    _largest,
    _least_of_columns,
    _of_columns,
    _of_ranks,
    _sum_columns,
    _sum_ranks,
)
from lplb_triton.kernels.levelling import _cut_bound
from lplb_triton.kernels.tiles import _add2, _inverse, _max_and_add, _shares

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


@triton.jit(noinline=True)
def _factor_in_memory(
    values_ptr, vectors_ptr, factor_ptr, cell_number_ptr, n_ranks, n_columns, G: tl.constexpr
):
    """Write S of `_inverse_factor` to ``factor`` [G, G], from V by cell: a function of its own.

    ``vectors`` [2, G] is scratch and holds the slack to begin with. One row is eliminated after
    the other, which all threads get through memory, as they get V: short code, compiled sooner.
    """
    rank = tl.arange(0, G)
    on = rank < n_ranks
    product = tl.zeros((G, G), tl.float32)
    number_ptrs = cell_number_ptr + rank
    for _ in range(n_columns):
        cell = tl.load(number_ptrs, mask=on, other=-1)
        value = tl.load(values_ptr + cell, mask=cell >= 0, other=0.0)
        product += value[:, None] * value[None, :]
        number_ptrs += n_ranks
    t = _normal_matrix(product, tl.load(vectors_ptr + rank, mask=on, other=0.0), on, G)
    row = rank[:, None]
    column = rank[None, :]
    tl.debug_barrier()
    for k in range(G):
        # The other one may still be read.
        vector_ptr = vectors_ptr + k % 2 * G
        tl.store(tl.broadcast_to(vector_ptr + column, (G, G)), t, mask=row == k)
        tl.debug_barrier()
        root = tl.rsqrt(tl.load(vector_ptr + k))
        y = tl.where(rank == k, root, tl.load(vector_ptr + rank) * root)
        tl.store(factor_ptr + k * G + rank, tl.where(rank <= k, y, 0.0))
        # By symmetry y, transposed, is also what the rows below are to be reduced with.
        t = tl.where(column == k, 0.0, t)
        t = _minus_product(tl.broadcast_to(y[:, None], (G, G)), y[None, :], t)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _apply_in_memory(factor_ptr, vector_ptr, n_ranks, G: tl.constexpr):
    """Multiply a vector [n_ranks], in its place, by ``S.T @ S``."""
    rank = tl.arange(0, G)
    factor = tl.load(factor_ptr + rank[:, None] * G + rank[None, :])
    vector = tl.load(vector_ptr + rank, mask=rank < n_ranks, other=0.0)
    half = tl.sum(factor * vector[None, :], 1)
    tl.debug_barrier()
    tl.store(vector_ptr + rank, tl.sum(factor * half[:, None], 0), mask=rank < n_ranks)


@triton.jit
def _factor(v, slack, form, G: tl.constexpr, BY_CELL: tl.constexpr):
    """S, lower triangular, with ``S.T @ S`` the inverse of the matrix of equations 5 and 7.

    ``v`` by copy. As [G / 4, 4, G], or where it is in memory.
    """
    if BY_CELL:
        cell = tl.arange(0, v.shape[0])
        # Others may still use the last factor.
        tl.debug_barrier()
        tl.store(form.values_ptr + cell, v, mask=form.there)
        tl.store(form.vectors_ptr + tl.arange(0, G), slack, mask=form.rank_on)
        tl.debug_barrier()
        _factor_in_memory(
            form.values_ptr, form.vectors_ptr, form.factor_ptr, form.cell_number_ptr,
            form.n_ranks, form.n_columns, G,
        )  # fmt: skip
        factor = form.factor_ptr
    else:
        product = tl.dot(v, tl.trans(v), input_precision="ieee")
        factor = _inverse_factor(_normal_matrix(product, slack, form.rank_on, G), G)
    return factor


@triton.jit
def _apply(factor, rhs, form, G: tl.constexpr, BY_CELL: tl.constexpr):
    """``S.T @ (S @ rhs)``, [G]; rhs is 0 where there is no rank."""
    if BY_CELL:
        rank = tl.arange(0, G)
        tl.debug_barrier()
        tl.store(form.vectors_ptr + rank, rhs, mask=form.rank_on)
        tl.debug_barrier()
        _apply_in_memory(factor, form.vectors_ptr, form.n_ranks, G)
        tl.debug_barrier()
        result = tl.load(form.vectors_ptr + rank, mask=form.rank_on, other=0.0)
    else:
        half = tl.sum(factor * rhs[None, None, :], 2)
        result = tl.sum(tl.reshape(factor * half[:, :, None], (G, G)), 0)
    return result


@triton.jit
def _step(rate):
    """Largest step in [0, 1] for the largest relative decrease per unit step (equation 9)."""
    return 1.0 / tl.maximum(rate, 1.0)


@triton.jit
def _lower_bound(y, fixed, w, form, BY_CELL: tl.constexpr):
    """Load that no plan can beat, from any multipliers ``y`` >= 0 (equation 3)."""
    # No y is larger than their sum, so it stands for "no copy here" (a column without any copy
    # has no weight).
    total, fixed_part = tl.reduce((y, y * fixed), 0, _add2)
    cheapest = _least_of_columns(_of_ranks(y, form, BY_CELL), total, form, BY_CELL)
    return (fixed_part + tl.sum(w * cheapest)) / total


@triton.jit
def _newton(
    best, best_load, bound, weights, fixed, form, total, tolerance, aim, max_iterations,
    G: tl.constexpr, C: tl.constexpr, BY_CELL: tl.constexpr,
):  # fmt: skip
    """Improve the plan ``best``, shares by copy, and its bound until the gap is at most ``aim``.

    weights by column, fixed [G], loads and bound in the caller's unit, ``total`` the sum of all; no
    weight is on a column with fewer than two copies. Returns plan, bound, iterations.
    """
    copy = form.there
    rank_on = form.rank_on
    n_copies = _sum_columns(copy.to(tl.float32), form, BY_CELL)
    n_ranks = form.n_ranks.to(tl.float32)
    unit = total / n_ranks
    w_all = weights / unit
    f = fixed / unit
    best_load = best_load / unit
    bound = bound / unit

    # Equation 4: the even split, y uniform, every product x z a part of the mean of s y.
    copies = tl.maximum(n_copies, 1.0)
    even = tl.where(copy, _of_columns(1.0 / copies, form, BY_CELL), 0.0)
    heavy = w_all > tolerance * LIGHT_PART / C
    w_columns = tl.where(heavy, w_all, 0.0)
    w = _of_columns(w_columns, form, BY_CELL)
    active = copy & (w > 0)
    light = _of_columns(w_all - w_columns, form, BY_CELL)
    base = f + _sum_ranks(light * even, form, BY_CELL)
    load = base + _sum_ranks(w * even, form, BY_CELL)
    even_load = tl.max(load)
    t = even_load + tl.maximum(even_load - 1.0, 1e-6) * START_MARGIN
    s = tl.where(rank_on, t - load, 1.0)
    y = tl.where(rank_on, 1.0 / n_ranks, 1.0)
    sy = tl.sum(tl.where(rank_on, s * y, 0.0))
    mu = sy / n_ranks * START_CENTERING
    x = tl.where(active, even, NEAR)
    z = tl.where(active, mu * _of_columns(copies, form, BY_CELL), FAR)
    n_active = tl.sum(tl.where(heavy, n_copies, 0.0))
    n_products = n_active + n_ranks
    products = sy + mu * n_active
    one = tl.where(rank_on, 1.0, 0.0)

    iterations = 0
    while (best_load - bound > best_load * aim) & (iterations < max_iterations):
        iterations += 1
        inverse_z = _inverse(z)
        d = x * inverse_z
        d_columns = tl.where(heavy, _sum_columns(d, form, BY_CELL), 1.0)
        root = tl.rsqrt(d_columns)
        inverse_d = root * root
        inverse_y = _inverse(y)
        slack = s * inverse_y
        v = d * _of_columns(w_columns * root, form, BY_CELL)
        factor = _factor(v, slack, form, G, BY_CELL)
        ones = _apply(factor, one, form, G, BY_CELL)

        # Equation 8, predictor. h = dz / z, e = dy / y; then dx / x = -1 - h, ds / s = -1 - e.
        w_mean = w_columns * inverse_d
        affine_load = _sum_ranks(d * _of_columns(w_mean, form, BY_CELL), form, BY_CELL)
        rhs_affine = tl.where(rank_on, base + affine_load, 0.0)
        u = _apply(factor, rhs_affine, form, G, BY_CELL)
        t_new, ones_sum = tl.reduce((u, ones), 0, _add2)
        inverse_ones = 1.0 / ones_sum
        t_new *= inverse_ones
        dy = _minus_product(t_new, ones, u)
        dy_copies = _of_ranks(dy, form, BY_CELL)
        shift = inverse_d + w_mean * _sum_columns(d * dy_copies, form, BY_CELL)
        shift = _of_columns(shift, form, BY_CELL)
        h = inverse_z * _minus_product(1.0, shift, w * dy_copies)
        e = dy * inverse_y
        primal = _step(1.0 + _largest(h, e, BY_CELL))
        dual = _step(_largest(-h, -e, BY_CELL))
        affine = products * (1.0 - dual) + (primal - dual) * (t_new - t)
        ratio = tl.maximum(affine, 0.0) / products
        ratio *= ratio
        target = products / n_products * tl.minimum(tl.maximum(ratio * ratio, MIN_CENTERING), 1.0)

        # Corrector. moved = D q' = x + x (target - dx dz) / (x z) - x.
        moved = tl.fma(x, tl.fma(h, h, h), inverse_z * target)
        moved_columns = _sum_columns(moved, form, BY_CELL)
        slack_moved = target * inverse_y + s * (e + e * e)
        rhs = _minus_product(d, _of_columns(w_mean * moved_columns, form, BY_CELL), w * moved)
        rhs = _sum_ranks(rhs, form, BY_CELL) + slack_moved
        u = _apply(factor, rhs_affine + tl.where(rank_on, rhs, 0.0), form, G, BY_CELL)
        t_new = tl.sum(u) * inverse_ones
        dy = _minus_product(t_new, ones, u)
        dy_copies = _of_ranks(dy, form, BY_CELL)
        shift = w_mean * _sum_columns(d * dy_copies, form, BY_CELL)
        shift = _of_columns(inverse_d * (1.0 - moved_columns) + shift, form, BY_CELL)
        h = inverse_z * _minus_product(1.0, shift, w * dy_copies)
        e = dy * inverse_y
        x_full = _minus_product(x, h, moved)

        # Equation 9: the full step, with what is negative cut off, gives a plan and a bound,
        # and the plan's loads another (equation 19).
        plan = tl.maximum(x_full, 0.0)
        inverse_sum = _inverse(tl.where(heavy, _sum_columns(plan, form, BY_CELL), 1.0))
        plan *= _of_columns(inverse_sum, form, BY_CELL)
        loads = base + _sum_ranks(w * plan, form, BY_CELL)
        # Triton's maximum passes over NaN, a sum doesn't: a broken iterate is never kept.
        new_load, load_sum = tl.reduce((loads, loads), 0, _max_and_add)
        new_y = tl.where(rank_on, tl.maximum(y + dy, 0.0), 0.0)
        new_bound = _lower_bound(new_y, f, w_all, form, BY_CELL)
        better = (new_load < best_load) & (load_sum == load_sum)
        best = tl.where(better, tl.where(active, plan, even), best)
        best_load = tl.where(better, new_load, best_load)
        lowest = _of_ranks(loads, form, BY_CELL)
        lowest = _least_of_columns(lowest, float("inf"), form, BY_CELL)
        cut = _cut_bound(
            loads, f, _as_row(w_all, BY_CELL), _as_row(lowest, BY_CELL), rank_on,
            new_load, aim,
        )  # fmt: skip
        new_bound = tl.where(load_sum == load_sum, tl.maximum(new_bound, cut), new_bound)
        bound = tl.where(new_bound > bound, new_bound, bound)

        # Equation 9: how far the iterate itself may go.
        dx = tl.where(active, x_full - x, 0.0)
        ds = tl.where(rank_on, slack_moved - s - slack * dy, 0.0)
        primal = _largest(-dx * _inverse(x), -ds * _inverse(s), BY_CELL)
        primal = _step(primal * (1.0 / STEP_FACTOR))
        dual = _step(_largest(-h, -e, BY_CELL) * (1.0 / STEP_FACTOR))
        dt = t_new - t
        products += primal * dt + dual * (n_products * target - products - dt)
        products = tl.maximum(products, 1e-12)
        x = tl.fma(dx, primal, x)
        z = tl.fma(z * h, dual, z)
        s += primal * ds
        y += tl.where(rank_on, dual * dy, 0.0)
        t += primal * dt
    return best, bound * unit, iterations


@triton.jit(noinline=True)
def _newton_by_cells(
    units_ptr, x_ptr, scratch_ptr, cells_ptr, cell_start_ptr, rank_cells_ptr, cell_number_ptr,
    n_cells, most_copies, most_cells, n_ranks, n_columns, n_shared, best_load, bound,
    total, tolerance, aim, max_iterations, G: tl.constexpr, C: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """`_newton` on what lies in memory: a function of its own, with registers of its own.

    units [n_cells] int32 is the plan by cell, in units of 2**-24. scratch holds fixed loads
    [n_ranks] and weights [n_columns] after n_ranks other words. x [n_cells] gets the better
    plan, in tokens. Both are in scratch, of which nothing else is left. Tables as in `SolveTables`.
    Returns bound and iterations.
    """
    rank = tl.arange(0, G)
    col = tl.arange(0, C)
    cell = tl.arange(0, COPIES)
    rank_on = rank < n_ranks
    col_on = col < n_columns
    there = cell < n_cells
    fixed = tl.load(scratch_ptr + n_ranks + rank, mask=rank_on, other=0.0)
    weights = tl.load(scratch_ptr + 2 * n_ranks + col, mask=col_on, other=0.0)
    column = tl.load(cells_ptr + n_shared + cell, mask=there, other=0)
    start = tl.load(cell_start_ptr + col, mask=col_on, other=0)
    end = tl.load(cell_start_ptr + col + 1, mask=col_on, other=0)
    # What is there now is not needed once it is loaded.
    vectors_ptr = scratch_ptr + G * G
    form = Cells(
        there, rank_on, n_ranks, tl.load(cells_ptr + cell, mask=there, other=0), column,
        start, end - start, most_copies, rank_cells_ptr + rank, most_cells,
        cell_number_ptr, n_columns, scratch_ptr, vectors_ptr, vectors_ptr + 2 * G,
    )  # fmt: skip
    plan = _shares(tl.load(units_ptr + cell, mask=there, other=0))
    plan, bound, iterations = _newton(
        plan, best_load, bound, weights, fixed, form, total, tolerance, aim, max_iterations,
        G, C, True,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(x_ptr + cell, plan * tl.gather(weights, column, 0), mask=there)
    return bound, iterations
