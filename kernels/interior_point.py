"""The min-max LP by an interior-point method: one program per group, one launch.

Equation numbers refer to docs/method.md. A group is a dense ``[G, C]`` tile (ranks x columns)
with a mask of the copies, both padded to powers of two; vectors over ranks are ``[G]``, over
columns ``[C]``. Everything is float32 in units of the mean rank load.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Start and step of the method (equations 4 and 9), and the light columns of equation 10.
START_MARGIN = tl.constexpr(0.1)
STEP_FACTOR = tl.constexpr(0.99)
MIN_CENTERING = tl.constexpr(0.01)
REGULARIZATION = tl.constexpr(0.03)
LIGHT_PART = tl.constexpr(0.05)
# The loop aims a little lower than the tolerance, so that rounding the shares keeps it.
TARGET_PART = tl.constexpr(0.98)
# Taken off the bound for the round-off of its float32 sums (2**-20; equation 3).
BOUND_ALLOWANCE = tl.constexpr(9.5367431640625e-07)
SHARE_ONE = tl.constexpr(1 << 24)

STATUS_CERTIFIED = tl.constexpr(0)
STATUS_GAP = tl.constexpr(1)
STATUS_INVALID = tl.constexpr(2)


@triton.jit
def _safe_divide(a, b, keep, other):
    """Divide a by b where ``keep``, ``other`` elsewhere, never by what is masked."""
    return tl.where(keep, a / tl.where(keep, b, 1.0), other)


@triton.jit
def _invert(matrix, G: tl.constexpr):
    """Inverse of a symmetric positive definite ``[G, G]`` tile, by symmetric sweeps.

    Needs no pivoting: every Schur complement of such a matrix is positive definite again.
    """
    row = tl.arange(0, G)[:, None]
    col = tl.arange(0, G)[None, :]
    for k in range(G):
        at_row = row == k
        at_col = col == k
        pivot_row = tl.sum(tl.where(at_row, matrix, 0.0), 0)[None, :]
        pivot_col = tl.sum(tl.where(at_col, matrix, 0.0), 1)[:, None]
        pivot = tl.sum(tl.where(at_row & at_col, matrix, 0.0))
        scale = 1.0 / pivot
        swept = matrix - pivot_col * (pivot_row * scale)
        swept = tl.where(at_row, pivot_row * scale, swept)
        swept = tl.where(at_col, pivot_col * scale, swept)
        matrix = tl.where(at_row & at_col, -scale, swept)
    return -matrix


@triton.jit
def _gram(v, G: tl.constexpr, C: tl.constexpr):
    """``v @ v.T`` in full float32 precision, ``[G, G]``."""
    if G < 16:
        gram = tl.sum(v[:, None, :] * v[None, :, :], 2)
    else:
        gram = tl.dot(v, tl.trans(v), input_precision="ieee")
    return gram


@triton.jit
def _column_mean(d, d_column, value):
    """D-weighted mean of ``value`` over the copies of each column, ``[C]``."""
    return tl.sum(d * value, 0) / d_column


@triton.jit
def _refined_product(matrix, inverse, rhs):
    """Multiply ``inverse @ rhs`` with one step of iterative refinement, ``[G]`` (equation 7).

    An explicit inverse in float32 loses more digits than a factorisation; the residual gives
    them back. Symmetric tiles, so rows serve as columns.
    """
    u = tl.sum(inverse * rhs[None, :], 1)
    residual = rhs - tl.sum(matrix * u[None, :], 1)
    return u + tl.sum(inverse * residual[None, :], 1)


@triton.jit
def _direction(
    x, s, y, w, active, rank_on, d, d_column, wd, matrix, inverse, inverse_one,
    target_xz, target_sy,
):  # fmt: skip
    """Newton direction (dx, dz, ds, dy) for complementarity targets (equations 5 and 6)."""
    q = _safe_divide(target_xz, x, active, 0.0)
    q_mean = _column_mean(d, d_column, q)[None, :]
    rhs = tl.sum(wd * (q - q_mean), 1) + tl.where(rank_on, target_sy / y, 0.0)
    u = _refined_product(matrix, inverse, rhs)
    dt = tl.sum(u) / tl.sum(inverse_one)
    dy = u - dt * inverse_one
    dy_tile = tl.broadcast_to(dy[:, None], d.shape)
    slope = w[None, :] * (dy_tile - _column_mean(d, d_column, dy_tile)[None, :])
    dx = d * (q - q_mean - slope)
    dz = tl.where(active, slope + q_mean, 0.0)
    ds = tl.where(rank_on, dt - tl.sum(w[None, :] * dx, 1), 0.0)
    return dx, dz, ds, dy


@triton.jit
def _step_length(tile, d_tile, vector, d_vector):
    """Largest step at which both stay non-negative (equation 9)."""
    rate_tile = tl.max(tl.where(d_tile < 0, -d_tile / tile, 0.0))
    rate_vector = tl.max(tl.where(d_vector < 0, -d_vector / vector, 0.0))
    return 1.0 / tl.maximum(tl.maximum(rate_tile, rate_vector), 1e-30)


@triton.jit
def _lower_bound(y, fixed, w, copy, rank_on):
    """Load that no plan can beat, from any multipliers ``y`` >= 0 (equation 3)."""
    y = tl.where(rank_on, y, 0.0)
    y = y / tl.sum(y)
    # y <= 1, so the 1 stands for "no copy here" (a column without any copy has no weight).
    cheapest = tl.min(tl.where(copy, y[:, None], 1.0), 0)
    return tl.sum(y * fixed) + tl.sum(w * cheapest)


@triton.jit
def _quantize(shares, copy, G: tl.constexpr):
    """Shares as multiples of 2**-24 that sum to exactly 1 per column (equation 11), int32."""
    units = tl.where(copy, (shares * SHARE_ONE + 0.5).to(tl.int32), 0)
    missing = -tl.sum(units, 0) + SHARE_ONE
    rank = tl.arange(0, G)[:, None]
    top = tl.max(tl.where(copy, units, -1), 0)[None, :]
    first_top = tl.min(tl.where(copy & (units == top), rank, G), 0)[None, :]
    return tl.where(copy & (rank == first_top), units + missing[None, :], units)


@triton.jit
def _interior_point(
    weights, fixed, copy, rank_on, best_ptrs, tolerance, max_iterations,
    G: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Solve one group; the best plan ends up, quantised, at ``best_ptrs``.

    Parameters
    ----------
    weights, fixed : ``[C]``, ``[G]`` float32
        Loads in the caller's unit.
    copy, rank_on : ``[G, C]``, ``[G]`` int1
        Where copies are; which ranks are no padding.
    best_ptrs : ``[G, C]`` pointers to float32
        Scratch during the loop, then the shares.

    Returns
    -------
    max_load, lower_bound, gap, iterations, status : scalars
    """
    n_copies = tl.sum(copy.to(tl.float32), 0)
    inf = float("inf")
    bad_weight = tl.where((weights >= 0) & (weights < inf), 0, 1)
    bad_fixed = tl.where((fixed >= 0) & (fixed < inf), 0, 1)
    homeless = tl.where((weights > 0) & (n_copies == 0), 1, 0)
    invalid = tl.max(tl.maximum(bad_weight, homeless)) + tl.max(bad_fixed) > 0
    weights = tl.where(invalid, 0.0, weights)
    fixed = tl.where(invalid, 0.0, fixed)

    n_ranks = tl.sum(rank_on.to(tl.float32))
    total = tl.sum(weights) + tl.sum(fixed)
    unit = tl.where(total > 0, total / n_ranks, 1.0)
    w_all = weights / unit
    f = fixed / unit

    # Equation 4: the even split, y uniform, every product x z equal to the mean of s y.
    even = tl.where(copy, 1.0 / tl.maximum(n_copies, 1.0)[None, :], 0.0)
    tl.store(best_ptrs, even, mask=copy)
    heavy = (w_all > tolerance * LIGHT_PART / C) & (n_copies > 1.5)
    active = copy & heavy[None, :]
    w = tl.where(heavy, w_all, 0.0)
    base = f + tl.sum(tl.where(heavy[None, :], 0.0, w_all[None, :] * even), 1)
    load = base + tl.sum(w[None, :] * even, 1)
    best_load = tl.max(load)
    mean_load = tl.sum(load) / n_ranks
    pinned = f + tl.sum(tl.where(copy & (n_copies == 1.0)[None, :], w_all[None, :], 0.0), 1)
    bound = tl.maximum(mean_load, tl.max(pinned))

    t = best_load + tl.maximum(best_load - mean_load, 1e-6) * START_MARGIN
    s = tl.where(rank_on, t - load, 1.0)
    y = tl.where(rank_on, 1.0 / n_ranks, 1.0)
    x = tl.where(active, even, 1.0)
    z = (tl.sum(tl.where(rank_on, s * y, 0.0)) / n_ranks) / x
    n_products = tl.sum(active.to(tl.float32)) + n_ranks
    off_diagonal = tl.arange(0, G)[:, None] != tl.arange(0, G)[None, :]
    both_on = rank_on[:, None] & rank_on[None, :]

    iterations = 0
    while (best_load - bound > best_load * (tolerance * TARGET_PART)) & (
        iterations < max_iterations
    ):
        iterations += 1
        d = _safe_divide(x, z, active, 0.0)
        d_column = tl.maximum(tl.sum(d, 0), 1e-37)
        wd = w[None, :] * d
        # Equation 5: off-diagonal first, the diagonal from its row sums (no subtraction).
        v = wd * tl.rsqrt(d_column)[None, :]
        matrix = tl.where(off_diagonal, _gram(v, G, C), 0.0)
        diagonal = tl.where(rank_on, tl.sum(matrix, 1) + s / y, 1.0)
        # Equation 7: adding rho * ones changes nothing, since dy sums to 0.
        rho = tl.max(tl.where(rank_on, diagonal, 0.0)) * REGULARIZATION
        matrix = tl.where(off_diagonal, -matrix, diagonal[:, None]) + tl.where(both_on, rho, 0.0)
        inverse = _invert(matrix, G)
        inverse_one = _refined_product(matrix, inverse, rank_on.to(tl.float32))

        # Equation 8: predictor, then corrector.
        xz = tl.where(active, x * z, 0.0)
        sy = tl.where(rank_on, s * y, 0.0)
        mu = (tl.sum(xz) + tl.sum(sy)) / n_products
        dx, dz, ds, dy = _direction(
            x, s, y, w, active, rank_on, d, d_column, wd, matrix, inverse, inverse_one, -xz, -sy
        )
        primal = tl.minimum(_step_length(x, dx, s, ds), 1.0)
        dual = tl.minimum(_step_length(z, dz, y, dy), 1.0)
        affine = tl.sum(tl.where(active, (x + primal * dx) * (z + dual * dz), 0.0)) + tl.sum(
            tl.where(rank_on, (s + primal * ds) * (y + dual * dy), 0.0)
        )
        ratio = affine / n_products / mu
        target = mu * tl.minimum(tl.maximum(ratio * ratio * ratio, MIN_CENTERING), 1.0)
        dx, dz, ds, dy = _direction(
            x, s, y, w, active, rank_on, d, d_column, wd, matrix, inverse, inverse_one,
            target - xz - dx * dz, target - sy - ds * dy,
        )  # fmt: skip
        primal = tl.minimum(_step_length(x, dx, s, ds) * STEP_FACTOR, 1.0)
        dual = tl.minimum(_step_length(z, dz, y, dy) * STEP_FACTOR, 1.0)
        x += primal * dx
        z += dual * dz
        s += primal * ds
        y += dual * dy

        plan = tl.where(active, x, 0.0)
        plan_sum = tl.where(heavy, tl.sum(plan, 0), 1.0)
        plan = tl.where(active, plan / plan_sum[None, :], even)
        loads = base + tl.sum(w[None, :] * plan, 1)
        new_load = tl.max(loads)
        # Triton's maximum passes over NaN, a sum doesn't: a broken iterate is never kept.
        load_sum = tl.sum(loads)
        if (new_load < best_load) & (load_sum == load_sum):
            tl.store(best_ptrs, plan, mask=copy)
            best_load = new_load
        new_bound = _lower_bound(y, f, w_all, copy, rank_on)
        bound = tl.where(new_bound > bound, new_bound, bound)

    best = tl.load(best_ptrs, mask=copy, other=0.0)
    units = _quantize(best, copy, G)
    shares = units.to(tl.float32) * (1.0 / SHARE_ONE)
    tl.store(best_ptrs, shares, mask=copy)
    max_load = tl.max(fixed + tl.sum(weights[None, :] * shares, 1))
    lower_bound = tl.minimum(bound * unit * (1.0 - BOUND_ALLOWANCE), max_load)
    gap = _safe_divide(max_load - lower_bound, max_load, max_load > 0, 0.0)
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


@triton.jit(do_not_specialize=["mask_stride", "max_iterations", "n_ranks", "n_columns"])
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
    best_ptrs = shares_ptr + program * n_ranks * n_columns + cell
    tl.store(best_ptrs, tl.zeros((G, C), dtype=tl.float32), mask=inside & ~copy)
    _, max_load, lower_bound, gap, iterations, status = _interior_point(
        weights, fixed, copy, rank_on, best_ptrs, tolerance, max_iterations, G, C
    )
    _store_certificate(
        stats_ptr, ints_ptr, program, tl.num_programs(0),
        max_load, lower_bound, gap, iterations, status,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["max_iterations", "n_ranks", "n_columns", "n_slots", "n_copies"],
    do_not_specialize_on_alignment=["counts_ptr", "certified_ptr", "solves_ptr"],
)
def _solve_counts_kernel(
    counts_ptr,
    mask_ptr, fixed_experts_ptr, column_start_ptr, column_members_ptr, longest_column_ptr,
    copy_cell_ptr, copy_index_ptr, copy_multiplicity_ptr, copy_group_ptr,
    shares_ptr, units_ptr, cumulative_ptr, stats_ptr, ints_ptr,
    certified_ptr, solves_ptr,
    tolerance, max_iterations, n_ranks, n_columns, n_slots, n_copies,
    G: tl.constexpr, C: tl.constexpr, S: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Solve group ``program_id(0)`` of one batch, straight from counts by logical expert.

    Folds counts into weights and fixed loads, solves, and writes the cumulative share of every
    copy (equation 12). Shapes as in ``placement.Structure``; counts [n_logical] int32, shares
    [n_group, n_ranks, n_columns] float32 and units (int32, running over ranks), cumulative
    [n_copies] int32. ``certified`` [1] rises by one if the group is certified, ``solves`` [1]
    always (int32 or int64). Grid (n_group,).
    """
    group = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, G)
    col = tl.arange(0, C)
    rank_on = rank < n_ranks
    col_on = col < n_columns
    inside = rank_on[:, None] & col_on[None, :]
    cell = group * n_ranks * n_columns + rank[:, None] * n_columns + col[None, :]
    copy = tl.load(mask_ptr + cell, mask=inside, other=0) != 0

    slot = tl.arange(0, S)[None, :]
    fixed_at = (group * n_ranks + rank[:, None]) * n_slots + slot
    expert = tl.load(
        fixed_experts_ptr + fixed_at, mask=rank_on[:, None] & (slot < n_slots), other=-1
    )
    fixed = tl.sum(tl.load(counts_ptr + expert, mask=expert >= 0, other=0).to(tl.float32), 1)

    start_ptrs = column_start_ptr + group * (n_columns + 1) + col
    first = tl.load(start_ptrs, mask=col_on, other=0)
    last = tl.load(start_ptrs + 1, mask=col_on, other=0)
    weights = tl.zeros((C,), dtype=tl.float32)
    for j in range(tl.load(longest_column_ptr + group)):
        there = first + j < last
        member = tl.load(column_members_ptr + first + j, mask=there, other=0)
        weights += tl.load(counts_ptr + member, mask=there, other=0).to(tl.float32)

    units, max_load, lower_bound, gap, iterations, status = _interior_point(
        weights, fixed, copy, rank_on, shares_ptr + cell, tolerance, max_iterations, G, C
    )
    _store_certificate(
        stats_ptr, ints_ptr, group, tl.num_programs(0),
        max_load, lower_bound, gap, iterations, status,
    )  # fmt: skip
    certified = (status == STATUS_CERTIFIED).to(tl.int32)
    tl.atomic_add(certified_ptr, certified.to(certified_ptr.dtype.element_ty))
    tl.atomic_add(solves_ptr, tl.full((), 1, solves_ptr.dtype.element_ty))

    # Equation 12: copies of one expert ascend by rank, so running sums over ranks do.
    tl.store(shares_ptr + cell, tl.zeros((G, C), dtype=tl.float32), mask=inside & ~copy)
    tl.store(units_ptr + cell, tl.cumsum(units, 0), mask=inside)
    tl.debug_barrier()
    for block in range(0, n_copies, COPIES):
        at = block + tl.arange(0, COPIES)
        mine = at < n_copies
        mine = mine & (tl.load(copy_group_ptr + at, mask=mine, other=-1) == group)
        where = tl.load(copy_cell_ptr + at, mask=mine, other=-1)
        shared = where >= 0
        running = tl.load(units_ptr + where, mask=shared, other=SHARE_ONE)
        here = tl.load(shares_ptr + where, mask=shared, other=1.0) * SHARE_ONE
        here = here.to(tl.int64)
        index = tl.load(copy_index_ptr + at, mask=mine, other=0).to(tl.int64)
        multiplicity = tl.load(copy_multiplicity_ptr + at, mask=mine, other=1).to(tl.int64)
        cumulative = running - here + (index + 1) * here // multiplicity
        tl.store(cumulative_ptr + at, cumulative.to(tl.int32), mask=mine)
