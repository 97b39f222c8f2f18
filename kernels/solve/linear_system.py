"""The linear system of an iteration of the interior-point method (equations 5 and 7).

Equation numbers refer to docs/method.md. Matrices are float32 tiles [G, G] over ranks, where G is a
power of two. *By fours* they have the shape [G / 4, 4, G]: blocks of four rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The number rho of equation 7, as a fraction of the largest diagonal entry.
REGULARIZATION = tl.constexpr(0.03)


@triton.jit
def subtract_product(a, b, c):
    """Compute ``c - a b`` with one rounding; sums over lanes must not (end of equation 11)."""
    return tl.fma(-a, b, c)


@triton.jit
def _or4(a0, a1, a2, a3, b0, b1, b2, b3):
    """Combine the bits of four numbers, for `tl.reduce`."""
    return a0 | b0, a1 | b1, a2 | b2, a3 | b3


@triton.jit
def _split_rows(panel):
    """Split a tile [4, G] into its four rows [G].

    The reduction is over bits, so that a masked element adds nothing even if it is infinite or NaN.
    """
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
def _take_slice(tile, chosen, axis: tl.constexpr):
    """Take the one slice of a tile where ``chosen`` is true, by a sum of bits along ``axis``."""
    bits = tl.where(chosen, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def _take_element(row, i, G: tl.constexpr):
    """Take element ``i`` of a row [G], a scalar."""
    index = tl.arange(0, G)
    if G <= 32:
        # The row lies in one warp: a gather is one shuffle.
        element = tl.gather(row, index * 0 + i, 0)
    else:
        element = _take_slice(row, index == i, 0)
    return element


@triton.jit
def _eliminate_pivots(p0, p1, p2, p3, k, G: tl.constexpr):
    """Multiply C^-1 of equation 7 by four pivot rows, with the identity in place of the pivots.

    The rows [G] are rows 4k .. 4k + 3 of the matrix, and C is the Cholesky factor of their pivots,
    columns 4k .. 4k + 3. Returns four rows [G].
    """
    i = tl.arange(0, G)
    # The 4 x 4 block of pivots, the same in every lane.
    a00 = _take_element(p0, 4 * k, G)
    a10, a11 = _take_element(p1, 4 * k, G), _take_element(p1, 4 * k + 1, G)
    a20, a21, a22 = (
        _take_element(p2, 4 * k, G),
        _take_element(p2, 4 * k + 1, G),
        _take_element(p2, 4 * k + 2, G),
    )
    a30, a31 = _take_element(p3, 4 * k, G), _take_element(p3, 4 * k + 1, G)
    a32, a33 = _take_element(p3, 4 * k + 2, G), _take_element(p3, 4 * k + 3, G)
    # A row of the product follows as soon as the same row of the Cholesky factor is known.
    is_pivot = i // 4 == k
    p0 = tl.where(is_pivot, tl.where(i % 4 == 0, 1.0, 0.0), p0)
    p1 = tl.where(is_pivot, tl.where(i % 4 == 1, 1.0, 0.0), p1)
    p2 = tl.where(is_pivot, tl.where(i % 4 == 2, 1.0, 0.0), p2)
    p3 = tl.where(is_pivot, tl.where(i % 4 == 3, 1.0, 0.0), p3)
    r0 = tl.rsqrt(a00)
    l10, l20, l30 = a10 * r0, a20 * r0, a30 * r0
    y0 = p0 * r0
    r1 = tl.rsqrt(subtract_product(l10, l10, a11))
    l21 = subtract_product(l20, l10, a21) * r1
    l31 = subtract_product(l30, l10, a31) * r1
    y1 = subtract_product(l10, y0, p1) * r1
    r2 = tl.rsqrt(subtract_product(l21, l21, subtract_product(l20, l20, a22)))
    l32 = subtract_product(l31, l21, subtract_product(l30, l20, a32)) * r2
    y2 = subtract_product(l21, y1, subtract_product(l20, y0, p2)) * r2
    left = subtract_product(l31, l31, subtract_product(l30, l30, a33))
    r3 = tl.rsqrt(subtract_product(l32, l32, left))
    y3 = subtract_product(l32, y2, subtract_product(l31, y1, subtract_product(l30, y0, p3))) * r3
    return y0, y1, y2, y3


@triton.jit
def _eliminate_four(t, k, G: tl.constexpr):
    """Eliminate rows 4k .. 4k + 3 of ``t``, by fours, from the rows below (equation 7)."""
    Q: tl.constexpr = G // 4
    block = tl.arange(0, Q)[:, None, None]
    column = tl.arange(0, G)[None, None, :]
    p0, p1, p2, p3 = _split_rows(_take_slice(t, block == k, 0))
    y0, y1, y2, y3 = _eliminate_pivots(p0, p1, p2, p3, k, G)
    # By symmetry these rows, transposed, are also what the rows below are reduced by.
    which = tl.arange(0, 4)[:, None]
    rows = tl.where(which == 2, y2[None, :], y3[None, :])
    rows = tl.where(which == 0, y0[None, :], tl.where(which == 1, y1[None, :], rows))
    below = tl.broadcast_to(tl.reshape(rows, (4, Q, 4))[:, :, :, None], (4, Q, 4, G))
    which = tl.arange(0, 4)[:, None, None, None]
    shape: tl.constexpr = (Q, 4, G)
    reduced = tl.where(column // 4 == k, 0.0, t)
    reduced = subtract_product(
        _take_slice(below, which == 0, 0), tl.broadcast_to(y0[None, None, :], shape), reduced
    )
    reduced = subtract_product(
        _take_slice(below, which == 1, 0), tl.broadcast_to(y1[None, None, :], shape), reduced
    )
    reduced = subtract_product(
        _take_slice(below, which == 2, 0), tl.broadcast_to(y2[None, None, :], shape), reduced
    )
    reduced = subtract_product(
        _take_slice(below, which == 3, 0), tl.broadcast_to(y3[None, None, :], shape), reduced
    )
    return tl.where(block > k, reduced, tl.where(block == k, rows[None, :, :], t))


@triton.jit
def _take_quarter(matrix, lower: tl.constexpr, right: tl.constexpr, H: tl.constexpr):
    """Take one of the four blocks [H, H] of a matrix [2 H, 2 H]; 1 for the lower and right ones."""
    rows = _take_slice(matrix.reshape(2, H, 2 * H), tl.arange(0, 2)[:, None, None] == lower, 0)
    return _take_slice(rows.reshape(H, 2, H), tl.arange(0, 2)[None, :, None] == right, 1)


@triton.jit
def _compute_inverse_factor(matrix, G: tl.constexpr):
    """Compute S, lower triangular, with ``S^T S`` the inverse of a matrix [G, G] (equation 7).

    The matrix must be positive definite, so no pivoting is needed. S is returned by fours.
    """
    if G == 64:
        # The matrix is [[A, B], [B^T, D]], as in equation 7.
        H: tl.constexpr = G // 2
        s_a = _compute_inverse_factor_by_fours(_take_quarter(matrix, 0, 0, H), H).reshape(H, H)
        e = tl.dot(s_a, _take_quarter(matrix, 0, 1, H), input_precision="ieee")
        rest = _take_quarter(matrix, 1, 1, H) - tl.dot(tl.trans(e), e, input_precision="ieee")
        s_d = _compute_inverse_factor_by_fours(rest, H).reshape(H, H)
        corner = tl.dot(tl.trans(e), s_a, input_precision="ieee")
        corner = -tl.dot(s_d, corner, input_precision="ieee")
        lower = tl.arange(0, 2)[:, None, None, None]
        right = tl.arange(0, 2)[None, None, :, None]
        bottom = tl.where(right == 0, corner[None, :, None, :], s_d[None, :, None, :])
        top = tl.where(right == 0, s_a[None, :, None, :], 0.0)
        factor = tl.where(lower == 0, top, bottom).reshape(G // 4, 4, G)
    else:
        factor = _compute_inverse_factor_by_fours(matrix, G)
    return factor


@triton.jit
def _compute_inverse_factor_by_fours(matrix, G: tl.constexpr):
    """Compute what `_compute_inverse_factor` does by eliminating four rows at a time."""
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
def _build_normal_matrix(product, slack, is_rank, G: tl.constexpr):
    """Build the matrix M + rho 1 1^T of equations 5 and 7 from ``V V^T``, [G, G].

    ``slack`` [G] is ``s / y``. In the padding the matrix is the identity. The diagonal comes from
    row sums of the other entries, without subtraction. Adding rho changes no solution, since dy
    sums to 0.
    """
    off_diagonal = tl.arange(0, G)[:, None] != tl.arange(0, G)[None, :]
    product = tl.where(off_diagonal, product, 0.0)
    diagonal = tl.where(is_rank, tl.sum(product, 1) + slack, 1.0)
    rho = tl.max(tl.where(is_rank, diagonal, 0.0)) * REGULARIZATION
    one = tl.where(is_rank, 1.0, 0.0)
    both_ranks = (one[:, None] * one[None, :]) > 0
    return tl.where(off_diagonal, -product, diagonal[:, None]) + tl.where(both_ranks, rho, 0.0)


@triton.jit
def factorize(v, slack, is_rank, G: tl.constexpr):
    """Compute S of the matrix of equations 5 and 7 from V [G, C] and ``s / y`` [G], by fours."""
    product = tl.dot(v, tl.trans(v), input_precision="ieee")
    return _compute_inverse_factor(_build_normal_matrix(product, slack, is_rank, G), G)


@triton.jit
def solve_factored(factor, rhs, G: tl.constexpr):
    """Compute ``S^T (S rhs)``, [G]; ``rhs`` is 0 in the padding, ``factor`` from `factorize`."""
    half = tl.sum(factor * rhs[None, None, :], 2)
    return tl.sum(tl.reshape(factor * half[:, :, None], (G, G)), 0)
