"""Mehrotra's primal-dual method for the program of one group (equations 4 to 10).

Equation numbers refer to docs/method.md. Numbers by copy are dense tiles [G, C], those by column
[1, C] and those by rank [G], where G and C are the numbers of ranks and columns, padded to powers
of two. All are float32, loads in units of the mean rank load.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lplb_triton.kernels.solve.levelling import compute_cut_bound
from lplb_triton.kernels.solve.linear_system import factorize, solve_factored, subtract_product
from lplb_triton.kernels.solve.tiles import add2, max_add, reciprocal, sum_columns

# The start (equation 4), the steps and the centering (equations 8 and 9), and the loads of light
# columns (equation 10).
START_MARGIN = tl.constexpr(0.1)
START_CENTERING = tl.constexpr(0.03)
STEP_FACTOR = tl.constexpr(0.99)
MIN_CENTERING = tl.constexpr(0.01)
LIGHT_FRACTION = tl.constexpr(0.05)
# The values of x and z where there is no copy; x / z and all changes come out as 0 there.
NO_COPY_X = tl.constexpr(1e-30)
NO_COPY_Z = tl.constexpr(1e30)


class Program(NamedTuple):
    """The program (1) of a group in units of the mean load."""

    weights: Any
    """[1, C], tokens of all columns, w_e of the bound."""
    active_weights: Any
    """[1, C], the same, 0 for light columns (equation 10)."""
    fixed: Any
    """[G], f_g of the bound."""
    base: Any
    """[G], fixed loads and those of light columns."""
    even: Any
    """[G, C], shares of the even split."""
    copy: Any
    """[G, C] bool, where copies are."""
    active: Any
    """[G, C] bool, copies whose share the method changes."""
    heavy: Any
    """[1, C] bool, columns that aren't light."""
    is_rank: Any
    """[G] bool, False in the padding."""


class System(NamedTuple):
    """What both solves of an iteration share (equation 5)."""

    d: Any
    """[G, C], D = x / z."""
    inverse_d: Any
    """[1, C], 1 / d_e."""
    mean_weights: Any
    """[1, C], w_e / d_e."""
    inverse_z: Any
    """[G, C]"""
    inverse_y: Any
    """[G]"""
    slack: Any
    """[G], s / y."""
    factor: Any
    """The factor S of the matrix, by fours."""
    ones: Any
    """[G], v = M^-1 1."""


class Direction(NamedTuple):
    """The corrector's direction (equation 8)."""

    x_full: Any
    """[G, C], x + dx."""
    h: Any
    """[G, C], dz / z."""
    e: Any
    """[G], dy / y."""
    dy: Any
    """[G]"""
    new_s: Any
    """[G], s + ds + (s / y) dy."""
    new_t: Any
    """t + dt, a scalar."""


@triton.jit
def _find_step_length(rate):
    """Find the longest step, at most 1, from the largest relative decrease (equation 9)."""
    return 1.0 / tl.maximum(rate, 1.0)


@triton.jit
def _find_largest(by_copy, by_rank):
    """Find the largest of numbers by copy [G, C] and by rank [G], a scalar."""
    return tl.max(tl.maximum(by_copy, by_rank[:, None]))


@triton.jit
def _compute_dual_bound(y, fixed, weights, copy):
    """Find a load that no plan can beat from any multipliers ``y`` >= 0, [G] (equation 3)."""
    # Where there is no copy, the sum of all y takes the place of y, since no y exceeds it. (A
    # column without copies has no weight.)
    total, fixed_part = tl.reduce((y, y * fixed), 0, add2)
    cheapest = tl.min(tl.where(copy, y[:, None], total), 0, keep_dims=True)
    return (fixed_part + tl.sum(weights * cheapest)) / total


@triton.jit
def _build_program(weights, fixed, copies, copy, is_rank, tolerance, C: tl.constexpr):
    """Make the `Program`; ``copies`` [1, C] float32 are at least 1 (equation 10)."""
    even = tl.where(copy, 1.0 / copies, 0.0)
    heavy = weights > tolerance * LIGHT_FRACTION / C
    active_weights = tl.where(heavy, weights, 0.0)
    active = copy & (active_weights > 0)
    light = weights - active_weights
    base = fixed + tl.sum(light * even, 1)
    return Program(weights, active_weights, fixed, base, even, copy, active, heavy, is_rank)


@triton.jit
def _start_point(program, copies, n_copies, n_ranks):
    """Start from the even split and uniform y, with every product x z equal (equation 4).

    Returns t, s, y, x, z, the number of all products x z and s y, and their sum.
    """
    load = program.base + tl.sum(program.active_weights * program.even, 1)
    even_load = tl.max(load)
    t = even_load + tl.maximum(even_load - 1.0, 1e-6) * START_MARGIN
    s = tl.where(program.is_rank, t - load, 1.0)
    y = tl.where(program.is_rank, 1.0 / n_ranks, 1.0)
    sy = tl.sum(tl.where(program.is_rank, s * y, 0.0))
    mu = sy / n_ranks * START_CENTERING
    x = tl.where(program.active, program.even, NO_COPY_X)
    z = tl.where(program.active, mu * copies, NO_COPY_Z)
    n_active = tl.sum(tl.where(program.heavy, n_copies, 0.0))
    n_products = n_active + n_ranks
    products = sy + mu * n_active
    return t, s, y, x, z, n_products, products


@triton.jit
def _build_system(program, s, y, x, z, one, G: tl.constexpr):
    """Build and factorize the `System` of an iterate (equations 5 and 7); ``one`` [G] is 1."""
    w = program.active_weights
    inverse_z = reciprocal(z)
    d = x * inverse_z
    d_columns = tl.where(program.heavy, sum_columns(d), 1.0)
    root = tl.rsqrt(d_columns)
    inverse_d = root * root
    inverse_y = reciprocal(y)
    slack = s * inverse_y
    v = d * (w * root)
    factor = factorize(v, slack, program.is_rank, G)
    ones = solve_factored(factor, one, G)
    return System(d, inverse_d, w * inverse_d, inverse_z, inverse_y, slack, factor, ones)


@triton.jit
def _predict(program, system, t, n_products, products, G: tl.constexpr):
    """Solve for the predictor, in relative changes h = dz / z and e = dy / y (equation 8).

    ``t`` is that of the iterate, ``products`` the sum of its n_products products. Returns h [G, C],
    e [G], the right-hand side [G], 1 / 1^T v, and the target sigma mu of the corrector.
    """
    w = program.active_weights
    affine_load = tl.sum(system.d * system.mean_weights, 1)
    rhs_affine = tl.where(program.is_rank, program.base + affine_load, 0.0)
    u = solve_factored(system.factor, rhs_affine, G)
    t_new, ones_sum = tl.reduce((u, system.ones), 0, add2)
    inverse_ones = 1.0 / ones_sum
    t_new *= inverse_ones
    dy = subtract_product(t_new, system.ones, u)
    dy_copies = dy[:, None]
    shift = system.inverse_d + system.mean_weights * sum_columns(system.d * dy_copies)
    h = system.inverse_z * subtract_product(1.0, shift, w * dy_copies)
    e = dy * system.inverse_y
    # dx / x = -1 - h and ds / s = -1 - e.
    primal = _find_step_length(1.0 + _find_largest(h, e))
    dual = _find_step_length(_find_largest(-h, -e))
    affine = products * (1.0 - dual) + (primal - dual) * (t_new - t)
    ratio = tl.maximum(affine, 0.0) / products
    ratio *= ratio
    target = products / n_products * tl.minimum(tl.maximum(ratio * ratio, MIN_CENTERING), 1.0)
    return h, e, rhs_affine, inverse_ones, target


@triton.jit
def _correct(program, system, x, s, h, e, rhs_affine, inverse_ones, target, G: tl.constexpr):
    """Solve for the corrector (equation 8); returns a `Direction`.

    ``x`` and ``s`` are those of the iterate, the other arguments what `_predict` returns.
    """
    w = program.active_weights
    # m of equation 8, D q' = x + x (target - dx dz) / (x z) - x.
    m = tl.fma(x, tl.fma(h, h, h), system.inverse_z * target)
    m_columns = sum_columns(m)
    new_s = target * system.inverse_y + s * (e + e * e)
    rhs = subtract_product(system.d, system.mean_weights * m_columns, w * m)
    rhs = tl.sum(rhs, 1) + new_s
    u = solve_factored(system.factor, rhs_affine + tl.where(program.is_rank, rhs, 0.0), G)
    t_new = tl.sum(u) * inverse_ones
    dy = subtract_product(t_new, system.ones, u)
    dy_copies = dy[:, None]
    shift = system.mean_weights * sum_columns(system.d * dy_copies)
    shift = system.inverse_d * (1.0 - m_columns) + shift
    h = system.inverse_z * subtract_product(1.0, shift, w * dy_copies)
    e = dy * system.inverse_y
    x_full = subtract_product(x, h, m)
    return Direction(x_full, h, e, dy, new_s, t_new)


@triton.jit
def _judge_full_step(program, direction, y, best, best_load, bound, aimed_gap):
    """Make a plan and a bound of the full step, with negative entries set to 0 (equation 9).

    Returns the best plan [G, C], its largest load and the best bound so far. The new bound is the
    better of those of equations 3 and 19.
    """
    plan = tl.maximum(direction.x_full, 0.0)
    plan *= reciprocal(tl.where(program.heavy, sum_columns(plan), 1.0))
    loads = program.base + tl.sum(program.active_weights * plan, 1)
    # Triton's maximum ignores NaN and a sum doesn't, so the sum shows a broken iterate.
    new_load, load_sum = tl.reduce((loads, loads), 0, max_add)
    new_y = tl.where(program.is_rank, tl.maximum(y + direction.dy, 0.0), 0.0)
    new_bound = _compute_dual_bound(new_y, program.fixed, program.weights, program.copy)
    better = (new_load < best_load) & (load_sum == load_sum)
    best = tl.where(better, tl.where(program.active, plan, program.even), best)
    best_load = tl.where(better, new_load, best_load)
    lowest = tl.min(tl.where(program.copy, loads[:, None], float("inf")), 0, keep_dims=True)
    cut = compute_cut_bound(
        loads, program.fixed, program.weights, lowest, program.is_rank, new_load, aimed_gap
    )
    new_bound = tl.where(load_sum == load_sum, tl.maximum(new_bound, cut), new_bound)
    bound = tl.where(new_bound > bound, new_bound, bound)
    return best, best_load, bound


@triton.jit
def _take_step(program, system, direction, t, s, y, x, z, products, target, n_products):
    """Move the iterate along the direction and stay inside (equation 9).

    Returns the new t, s, y, x, z and sum of products.
    """
    h, e = direction.h, direction.e
    dx = tl.where(program.active, direction.x_full - x, 0.0)
    ds = tl.where(program.is_rank, direction.new_s - s - system.slack * direction.dy, 0.0)
    primal = _find_largest(-dx * reciprocal(x), -ds * reciprocal(s))
    primal = _find_step_length(primal * (1.0 / STEP_FACTOR))
    dual = _find_step_length(_find_largest(-h, -e) * (1.0 / STEP_FACTOR))
    dt = direction.new_t - t
    products += primal * dt + dual * (n_products * target - products - dt)
    products = tl.maximum(products, 1e-12)
    x = tl.fma(dx, primal, x)
    z = tl.fma(z * h, dual, z)
    s += primal * ds
    y += tl.where(program.is_rank, dual * direction.dy, 0.0)
    t += primal * dt
    return t, s, y, x, z, products


@triton.jit
def iterate(
    best,  # [G, C], shares of the best plan so far
    best_load,  # its largest load
    bound,  # a load that no plan can beat
    weights,  # [1, C], tokens of each column, 0 for a column with fewer than two copies
    fixed,  # [G], loads that no plan can move
    copy,  # [G, C] bool, where copies are
    is_rank,  # [G] bool, False in the padding
    n_ranks,
    total,  # sum of all loads
    tolerance,
    aimed_gap,
    max_iterations,
    G: tl.constexpr,
    C: tl.constexpr,
):
    """Improve a plan and its bound until the gap is at most ``aimed_gap`` (equations 4 to 10).

    Loads and bound are in the caller's unit. Returns plan, bound and the number of iterations.
    """
    n_copies = sum_columns(copy.to(tl.float32))
    n_ranks = n_ranks.to(tl.float32)
    unit = total / n_ranks
    weights = weights / unit
    fixed = fixed / unit
    best_load = best_load / unit
    bound = bound / unit
    copies = tl.maximum(n_copies, 1.0)
    program = _build_program(weights, fixed, copies, copy, is_rank, tolerance, C)
    t, s, y, x, z, n_products, products = _start_point(program, copies, n_copies, n_ranks)
    one = tl.where(is_rank, 1.0, 0.0)

    iterations = 0
    while (best_load - bound > best_load * aimed_gap) & (iterations < max_iterations):
        iterations += 1
        system = _build_system(program, s, y, x, z, one, G)
        h, e, rhs_affine, inverse_ones, target = _predict(
            program, system, t, n_products, products, G
        )
        direction = _correct(program, system, x, s, h, e, rhs_affine, inverse_ones, target, G)
        best, best_load, bound = _judge_full_step(
            program, direction, y, best, best_load, bound, aimed_gap
        )
        t, s, y, x, z, products = _take_step(
            program, system, direction, t, s, y, x, z, products, target, n_products
        )
    return best, bound * unit, iterations
