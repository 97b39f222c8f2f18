"""Steps by potentials: moves of tokens that level many ranks at once (equations 20 to 23).

A step finds a potential for every rank, moves as many tokens out of each free cell as the potential
of its rank says, and brings columns back to their sums. A sweep of levelling.py reaches the
neighbours of a rank; a step reaches as far as tokens can go. Numbers by cell are tiles, numbers by
rank are tiles or rank vectors, as rows.py defines them. Equation numbers refer to docs/method.md.
"""

# A variable of type tuple[()] is extended in loops, which mypy takes for a change of type.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.solve.levelling import compute_cut_bound, sweep_until_bound_is_due
from lplb_triton.kernels.solve.rows import (
    add_scaled,
    dot,
    find_least_by_column,
    load_at_cells,
    load_cells,
    load_cells_of_ranks,
    load_rank_vector,
    load_rows,
    number_positions,
    number_ranks,
    number_rows,
    store_by_rank,
    store_cells,
    store_rank_vector,
    subtract_scalar,
    sum_by_column,
    sum_by_rank,
)
from lplb_triton.kernels.solve.tiles import find_largest_load, units_to_shares

# Most sweeps after each step.
MAX_LATER_SWEEPS = tl.constexpr(8)
# Steps of the method of conjugate residuals for the potentials (equation 21).
RESIDUAL_STEPS = tl.constexpr(8)
# A cell has tokens if it has more than this fraction of its column's (equation 20).
EMPTY_FRACTION = tl.constexpr(1e-6)
# The step, counted from 1, from which on its length is searched for (equation 23).
FIRST_LINE_SEARCH = tl.constexpr(4)
# Most rounds of the projection (equation 22).
MAX_PROJECTION_ROUNDS = tl.constexpr(5)
# The residual is round-off once its product with its image is below this fraction of the largest
# such product (equation 21).
ROUND_OFF_FRACTION = tl.constexpr(1e-9)


@triton.jit
def _divide_or_zero(a, b, least):
    """Divide scalars; 0 where the divisor isn't above ``least``."""
    positive = b > least
    return tl.where(positive, a / tl.where(positive, b, 1.0), 0.0)


@triton.jit
def find_free_cells(x, loads_ptr, rows, by_row_ptr):
    """Find the cells that a step may change (equation 20), a tile of bool.

    ``x`` is a tile of tokens, ``loads`` [n_ranks] float32; ``by_row`` is for `sum_by_column`.
    """
    load = load_at_cells(loads_ptr, rows)
    has_tokens = rows.real & (x > rows.weights * EMPTY_FRACTION)
    total, n = sum_by_column(load, has_tokens, rows, by_row_ptr)
    low = load < total / tl.maximum(n, 1.0)
    return rows.real & (rows.weights > 0) & (has_tokens | low)


@triton.jit
def apply_laplacian(
    vector,  # rank vector
    free,  # tile of bool, free cells
    rows,
    rank_cells,
    by_cell_ptr,  # [n_cells] float32, scratch
    vector_ptr,  # [n_ranks] float32, scratch
    product_ptr,  # [n_ranks] float32, scratch
    by_row_ptr,  # [2 R] float32, scratch
    n_ranks,
    G: tl.constexpr,
):
    """Multiply the matrix L of the free cells by a rank vector (equation 20); a rank vector."""
    store_rank_vector(vector_ptr, vector, n_ranks, G)
    tl.debug_barrier()
    values = load_at_cells(vector_ptr, rows)
    total, n = sum_by_column(values, free, rows, by_row_ptr)
    flow = tl.where(free, values - total / tl.maximum(n, 1.0), 0.0)
    store_cells(by_cell_ptr, flow, rows)
    tl.debug_barrier()
    store_by_rank(product_ptr, sum_by_rank(by_cell_ptr, rank_cells, n_ranks, G), n_ranks)
    tl.debug_barrier()
    return load_rank_vector(product_ptr, n_ranks, G)


@triton.jit
def find_potentials(
    loads,  # rank vector
    mean,  # mean of the loads
    free,  # tile of bool, free cells
    rows,
    rank_cells,
    by_cell_ptr,  # scratch for `apply_laplacian`, and so are the next three
    vector_ptr,
    product_ptr,
    by_row_ptr,
    n_ranks,
    G: tl.constexpr,
):
    """Find the potentials that level loads best by moves along free cells (equation 21).

    Returns a rank vector.
    """
    residual, potential = (), ()
    for h in tl.static_range(G // min(G, 32)):
        is_rank = h * min(G, 32) + tl.arange(0, min(G, 32)) < n_ranks
        residual += (tl.where(is_rank, loads[h] - mean, 0.0),)
        potential += (loads[h] * 0.0,)
    # These are p, L p and rho of equation 21, and the largest rho so far.
    direction = potential
    image = potential
    rho = mean * 0.0
    largest_rho = rho
    for _ in range(RESIDUAL_STEPS):
        product = apply_laplacian(
            residual, free, rows, rank_cells, by_cell_ptr, vector_ptr, product_ptr, by_row_ptr,
            n_ranks, G,
        )  # fmt: skip
        new_rho = dot(residual, product, G)
        # Once the residual is round-off, further steps would add nothing but noise.
        largest_rho = tl.maximum(largest_rho, new_rho)
        ratio = _divide_or_zero(new_rho, rho, largest_rho * ROUND_OFF_FRACTION)
        rho = new_rho
        direction = add_scaled(residual, ratio, direction, G)
        image = add_scaled(product, ratio, image, G)
        length = _divide_or_zero(rho, dot(image, image, G), 0.0)
        length = tl.where(rho > largest_rho * ROUND_OFF_FRACTION, length, 0.0)
        potential = add_scaled(potential, length, direction, G)
        residual = add_scaled(residual, -length, image, G)
    return potential


@triton.jit
def project_on_simplices(y, free, rows, by_row_ptr):
    """Project each column on the non-negative cells that add up to its tokens (equation 22).

    ``y`` is a tile of any numbers. Each round computes the level above which the numbers of the
    chosen cells add up to the column's tokens, and leaves out the cells that aren't above it. Cells
    that aren't ``free`` get nothing. Returns a tile.
    """
    chosen = free
    level = rows.weights * 0.0
    for _ in range(tl.minimum(rows.most_copies, MAX_PROJECTION_ROUNDS)):
        total, n = sum_by_column(y, chosen, rows, by_row_ptr)
        level = (total - rows.weights) / tl.maximum(n, 1.0)
        chosen = chosen & (y > level)
    tokens = tl.where(chosen, y - level, 0.0)
    # Scaling makes up for round-off, and for the cells that the last round left out.
    total, n = sum_by_column(tokens, chosen, rows, by_row_ptr)
    even = rows.weights / tl.maximum(rows.copies, 1).to(tl.float32)
    return tl.where(total > 0, tokens * (rows.weights / tl.where(total > 0, total, 1.0)), even)


@triton.jit
def step_by_potentials(
    x_ptr,  # [n_cells] float32, tokens of each cell; updated
    loads_ptr,  # [n_ranks] float32, updated
    fixed_ptr,  # [n_ranks] float32
    by_cell_ptr,  # [n_cells] float32, scratch
    vectors_ptr,  # [2, n_ranks] float32, scratch
    by_row_ptr,  # [2 R] float32, scratch
    rows,
    rank_cells,
    mean,  # mean of the loads
    steps,  # steps that were made before
    n_ranks,
    G: tl.constexpr,
):
    """Make one step by potentials (equations 20 to 23); returns the new peak."""
    product_ptr = vectors_ptr + n_ranks
    x = load_cells(x_ptr, rows)
    loads = load_rank_vector(loads_ptr, n_ranks, G)
    free = find_free_cells(x, loads_ptr, rows, by_row_ptr)
    potential = find_potentials(
        loads, mean, free, rows, rank_cells, by_cell_ptr, vectors_ptr, product_ptr, by_row_ptr,
        n_ranks, G,
    )  # fmt: skip
    store_rank_vector(vectors_ptr, potential, n_ranks, G)
    tl.debug_barrier()
    new_x = project_on_simplices(x - load_at_cells(vectors_ptr, rows), free, rows, by_row_ptr)
    store_cells(by_cell_ptr, new_x, rows)
    rank = number_ranks(G)
    fixed = tl.load(fixed_ptr + rank, mask=rank < n_ranks, other=0.0)
    tl.debug_barrier()
    store_by_rank(product_ptr, fixed + sum_by_rank(by_cell_ptr, rank_cells, n_ranks, G), n_ranks)
    tl.debug_barrier()
    new_loads = load_rank_vector(product_ptr, n_ranks, G)
    if steps >= FIRST_LINE_SEARCH - 1:
        # Go only as far as the sum of squared loads falls (equation 23).
        change = add_scaled(new_loads, -1.0, loads, G)
        # Changes sum to 0, so the mean makes no difference but to round-off, which is smaller
        # without it.
        slope = -dot(subtract_scalar(loads, mean, G), change, G)
        length = _divide_or_zero(slope, dot(change, change, G), 0.0)
        length = tl.maximum(tl.minimum(length, 1.0), 0.0)
        new_x = x + (new_x - x) * length
        new_loads = add_scaled(loads, length, change, G)
    store_cells(x_ptr, new_x, rows)
    store_rank_vector(loads_ptr, new_loads, n_ranks, G)
    peak = new_loads[0]
    for h in tl.static_range(1, G // min(G, 32)):
        peak = tl.maximum(peak, new_loads[h])
    return find_largest_load(peak)


@triton.jit
def _compute_cut_bound_by_rows(
    loads_ptr,  # [n_ranks] float32
    fixed_ptr,  # [n_ranks] float32
    rows,
    by_row_ptr,  # [2 R] float32, scratch
    n_ranks,
    peak,
    aimed_gap,
    G: tl.constexpr,
):
    """Compute the bound of equation 19 for loads in memory."""
    R: tl.constexpr = rows.weights.shape[0]
    rank = tl.arange(0, G)
    is_rank = rank < n_ranks
    loads = tl.load(loads_ptr + rank, mask=is_rank, other=0.0)
    fixed = tl.load(fixed_ptr + rank, mask=is_rank, other=0.0)
    lowest = find_least_by_column(load_at_cells(loads_ptr, rows), rows.real, rows, by_row_ptr)
    # A column counts once, at the first cell of its first row.
    counts = (number_rows(R) == rows.first) & (number_positions(R) == 0)
    weights = tl.max(tl.where(counts, rows.weights, 0.0), 1)
    return compute_cut_bound(
        loads, fixed, weights[None, :], tl.max(lowest, 1)[None, :], is_rank, peak, aimed_gap
    )


@triton.jit
def _store_tokens(x_ptr, units_ptr, rows):
    """Write to x [n_cells] float32 the tokens of shares in units [n_cells] int32."""
    units = tl.load(units_ptr + rows.cell, mask=rows.real, other=0)
    store_cells(x_ptr, units_to_shares(units) * rows.weights, rows)


@triton.jit(noinline=True)
def level_by_steps(
    x_ptr,  # [n_cells] float32, written: tokens of each cell in the improved plan
    units_ptr,  # [n_cells] int32, shares of the present plan in units
    loads_ptr,  # [n_ranks] float32, scratch
    fixed_ptr,  # [n_ranks] float32
    weights_ptr,  # [n_columns] float32
    by_cell_ptr,  # [n_cells] float32, scratch
    vectors_ptr,  # [2, n_ranks] float32, scratch
    by_row_ptr,  # [2 R] float32, scratch
    edges_ptr,  # tables, as in `SolveTables`
    rows_ptr,
    rank_cells_ptr,
    peak,  # largest load of the present plan
    bound,  # a load that no plan can beat
    mean,  # mean of the loads
    aimed_gap,
    max_steps,
    n_classes,
    most_copies,  # most cells of a column
    most_cells,  # most cells of a rank
    n_rows,
    n_ranks,
    width,  # most edges of a class
    G: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
):
    """Improve a plan by steps by potentials, with up to MAX_LATER_SWEEPS sweeps after each.

    Returns a bound and the number of steps. Few batches need this. Since it is not inlined, it
    takes no registers from the rest of the kernel, which compiles sooner.
    """
    rows = load_rows(rows_ptr, weights_ptr, n_rows, most_copies, R)
    rank_cells = load_cells_of_ranks(rank_cells_ptr, most_cells, n_ranks, G)
    _store_tokens(x_ptr, units_ptr, rows)
    rank = number_ranks(G)
    fixed = tl.load(fixed_ptr + rank, mask=rank < n_ranks, other=0.0)
    tl.debug_barrier()
    store_by_rank(loads_ptr, fixed + sum_by_rank(x_ptr, rank_cells, n_ranks, G), n_ranks)
    tl.debug_barrier()
    steps = max_steps * 0
    first_peak = peak
    while (peak - bound > peak * aimed_gap) & (steps < max_steps):
        peak = step_by_potentials(
            x_ptr, loads_ptr, fixed_ptr, by_cell_ptr, vectors_ptr, by_row_ptr, rows, rank_cells,
            mean, steps, n_ranks, G,
        )  # fmt: skip
        steps += 1
        sweeps = steps * 0
        while (peak - bound > peak * aimed_gap) & (sweeps < MAX_LATER_SWEEPS):
            sweeps, peak = sweep_until_bound_is_due(
                x_ptr, loads_ptr, edges_ptr, sweeps, MAX_LATER_SWEEPS, n_classes, width, n_ranks,
                peak, bound, aimed_gap, G, LANES,
            )  # fmt: skip
            if peak - bound > peak * aimed_gap:
                cut = _compute_cut_bound_by_rows(
                    loads_ptr, fixed_ptr, rows, by_row_ptr, n_ranks, peak, aimed_gap, G
                )
                bound = tl.maximum(bound, cut)
        tl.debug_barrier()
    if (peak <= first_peak) == 0:
        # Steps may raise the peak: the plan from before them is better, or the peak is NaN.
        _store_tokens(x_ptr, units_ptr, rows)
    tl.debug_barrier()
    return bound, steps
