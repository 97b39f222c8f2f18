"""Steps by potentials: moves of tokens that level many ranks at once.

A step finds a potential for every rank, moves each cell's tokens by its rank's and brings columns
back to their sums. Levelling along edges (levelling.py) reaches neighbours, a step reaches as far
as tokens can go. Equation numbers refer to docs/method.md.

Numbers by cell are taken by rows (`Rows`). Numbers by rank that every thread needs, such as those
in scalar products, are tuples of [32]: every warp then holds all of them, and none has to wait for
another.
"""

# Triton's tuples grow.
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

from lplb_triton.kernels.solve.levelling import _cut_bound, _sweep
from lplb_triton.kernels.solve.rows import (
    _cell_numbers,
    _least_of_columns,
    _load_by_cell,
    _load_by_rank,
    _load_cells_of_ranks,
    _load_rows,
    _load_vector,
    _rank_numbers,
    _row_numbers,
    _store_by_cell,
    _store_by_rank,
    _store_vector,
    _sum_columns,
    _sum_of_ranks,
)
from lplb_triton.kernels.solve.tiles import _largest_load, _shares

# Sweeps between two steps.
SWEEPS = tl.constexpr(8)
# Steps of the method of conjugate residuals for the potentials.
RESIDUAL_STEPS = tl.constexpr(8)
# A cell with more than this part of its column's tokens has some that it can give.
SOME = tl.constexpr(1e-6)
# Steps that are made whole; the length of later ones is looked for.
WHOLE_STEPS = tl.constexpr(3)
# Rounds of the projection on a column's plans, at most.
ROUNDS = tl.constexpr(5)
# A residual whose product with its image is below this part of the largest such is round-off.
ROUND_OFF = tl.constexpr(1e-9)


@triton.jit
def _scalar_product(a, b, G: tl.constexpr):
    """Scalar product of two vectors by rank."""
    total = a[0] * b[0]
    for h in tl.static_range(1, G // min(G, 32)):
        total += a[h] * b[h]
    return tl.sum(total)


@triton.jit
def _add_scaled(a, scale, b, G: tl.constexpr):
    """Compute ``a + scale b`` of vectors by rank."""
    result = ()
    for h in tl.static_range(G // min(G, 32)):
        result += (a[h] + b[h] * scale,)
    return result


@triton.jit
def _less(a, b, G: tl.constexpr):
    """Subtract a scalar from a vector by rank."""
    result = ()
    for h in tl.static_range(G // min(G, 32)):
        result += (a[h] - b,)
    return result


@triton.jit
def _ratio(a, b, least):
    """Divide scalars; 0 where the divisor isn't above ``least``."""
    known = b > least
    return tl.where(known, a / tl.where(known, b, 1.0), 0.0)


@triton.jit
def _free_cells(x, loads_ptr, rows, sums_ptr):
    """Tell which cells a step may change (equation 20)."""
    load = _load_by_rank(loads_ptr, rows)
    some = rows.there & (x > rows.weights * SOME)
    total, n = _sum_columns(load, some, rows, sums_ptr)
    low = load < total / tl.maximum(n, 1.0)
    return rows.there & (rows.weights > 0) & (some | low)


@triton.jit
def _find_potentials(
    loads, mean, free, rows, rank_cells, cells_ptr, vector_ptr, product_ptr, sums_ptr, n_ranks,
    G: tl.constexpr,
):  # fmt: skip
    """Find the potentials that level loads along free cells, as far as they go (equation 21).

    loads is a vector by rank and ``mean`` its mean; cells [n_cells], ``vector`` and ``product``
    [n_ranks] and ``sums`` are scratch.
    """
    residual, potential = (), ()
    for h in tl.static_range(G // min(G, 32)):
        there = h * min(G, 32) + tl.arange(0, min(G, 32)) < n_ranks
        residual += (tl.where(there, loads[h] - mean, 0.0),)
        potential += (loads[h] * 0.0,)
    direction = potential
    image = potential
    size = mean * 0.0
    largest = size
    for _ in range(RESIDUAL_STEPS):
        _store_vector(vector_ptr, residual, n_ranks, G)
        tl.debug_barrier()
        # The Laplacian times the residual: by cell, then by rank.
        values = _load_by_rank(vector_ptr, rows)
        total, n = _sum_columns(values, free, rows, sums_ptr)
        flow = tl.where(free, values - total / tl.maximum(n, 1.0), 0.0)
        _store_by_cell(cells_ptr, flow, rows)
        tl.debug_barrier()
        _store_by_rank(product_ptr, _sum_of_ranks(cells_ptr, rank_cells, n_ranks, G), n_ranks)
        tl.debug_barrier()
        product = _load_vector(product_ptr, n_ranks, G)
        new_size = _scalar_product(residual, product, G)
        # Once the residual is round-off there is nothing to gain.
        largest = tl.maximum(largest, new_size)
        again = _ratio(new_size, size, largest * ROUND_OFF)
        size = new_size
        direction = _add_scaled(residual, again, direction, G)
        image = _add_scaled(product, again, image, G)
        length = _ratio(size, _scalar_product(image, image, G), 0.0)
        length = tl.where(size > largest * ROUND_OFF, length, 0.0)
        potential = _add_scaled(potential, length, direction, G)
        residual = _add_scaled(residual, -length, image, G)
    return potential


@triton.jit
def _project(y, free, rows, sums_ptr):
    """Bring numbers by cell to tokens, none below 0 and a column's weight in sum (equation 22).

    A cell gets what it is above a level that is the same for its column. Cells that aren't above
    the level that fits all are left out of the next. Cells that aren't free get nothing.
    """
    on = free
    level = rows.weights * 0.0
    for _ in range(tl.minimum(rows.most_copies, ROUNDS)):
        total, n = _sum_columns(y, on, rows, sums_ptr)
        level = (total - rows.weights) / tl.maximum(n, 1.0)
        on = on & (y > level)
    tokens = tl.where(on, y - level, 0.0)
    # What round-off took or gave, and what the last level left out.
    total, n = _sum_columns(tokens, on, rows, sums_ptr)
    even = rows.weights / tl.maximum(rows.copies, 1).to(tl.float32)
    return tl.where(total > 0, tokens * (rows.weights / tl.where(total > 0, total, 1.0)), even)


@triton.jit
def _step(
    x_ptr, loads_ptr, fixed_ptr, cells_ptr, vectors_ptr, sums_ptr, rows, rank_cells, mean, steps,
    n_ranks, G: tl.constexpr,
):  # fmt: skip
    """Make one step by potentials after ``steps`` others (equations 20 to 23).

    x [n_cells] and loads [n_ranks] are rewritten, fixed loads [n_ranks] read; cells [n_cells],
    vectors [2, n_ranks] and ``sums`` are scratch. ``mean`` is that of all loads. Returns the
    largest load.
    """
    product_ptr = vectors_ptr + n_ranks
    x = _load_by_cell(x_ptr, rows)
    loads = _load_vector(loads_ptr, n_ranks, G)
    free = _free_cells(x, loads_ptr, rows, sums_ptr)
    potential = _find_potentials(
        loads, mean, free, rows, rank_cells, cells_ptr, vectors_ptr, product_ptr, sums_ptr,
        n_ranks, G,
    )  # fmt: skip
    _store_vector(vectors_ptr, potential, n_ranks, G)
    tl.debug_barrier()
    y = _project(x - _load_by_rank(vectors_ptr, rows), free, rows, sums_ptr)
    _store_by_cell(cells_ptr, y, rows)
    rank = _rank_numbers(G)
    fixed = tl.load(fixed_ptr + rank, mask=rank < n_ranks, other=0.0)
    tl.debug_barrier()
    _store_by_rank(product_ptr, fixed + _sum_of_ranks(cells_ptr, rank_cells, n_ranks, G), n_ranks)
    tl.debug_barrier()
    new = _load_vector(product_ptr, n_ranks, G)
    if steps >= WHOLE_STEPS:
        # Where the sum of squares is least on the way.
        change = _add_scaled(new, -1.0, loads, G)
        # Changes sum to 0; less their mean, loads don't multiply what round-off left of that sum.
        slope = -_scalar_product(_less(loads, mean, G), change, G)
        length = _ratio(slope, _scalar_product(change, change, G), 0.0)
        length = tl.maximum(tl.minimum(length, 1.0), 0.0)
        y = x + (y - x) * length
        new = _add_scaled(loads, length, change, G)
    _store_by_cell(x_ptr, y, rows)
    _store_vector(loads_ptr, new, n_ranks, G)
    peak = new[0]
    for h in tl.static_range(1, G // min(G, 32)):
        peak = tl.maximum(peak, new[h])
    return _largest_load(peak)


@triton.jit
def _cut_bound_of_rows(loads_ptr, fixed_ptr, rows, sums_ptr, n_ranks, peak, aim, G: tl.constexpr):
    """Find the bound of equation 19 for loads and fixed loads [n_ranks] in memory."""
    R: tl.constexpr = rows.weights.shape[0]
    rank = tl.arange(0, G)
    rank_on = rank < n_ranks
    loads = tl.load(loads_ptr + rank, mask=rank_on, other=0.0)
    fixed = tl.load(fixed_ptr + rank, mask=rank_on, other=0.0)
    lowest = _least_of_columns(_load_by_rank(loads_ptr, rows), rows.there, rows, sums_ptr)
    # A column counts once, where its first row is.
    counts = (_row_numbers(R) == rows.first) & (_cell_numbers(R) == 0)
    weights = tl.max(tl.where(counts, rows.weights, 0.0), 1)
    return _cut_bound(
        loads, fixed, weights[None, :], tl.max(lowest, 1)[None, :], rank_on, peak, aim
    )


@triton.jit
def _store_tokens(x_ptr, units_ptr, rows):
    """Write the tokens that units [n_cells] of 2**-24 stand for to x [n_cells]."""
    units = tl.load(units_ptr + rows.cells, mask=rows.there, other=0)
    _store_by_cell(x_ptr, _shares(units) * rows.weights, rows)


@triton.jit(noinline=True)
def _level_by_steps(
    x_ptr, units_ptr, loads_ptr, fixed_ptr, weights_ptr, cells_ptr, vectors_ptr, sums_ptr,
    edges_ptr, rows_ptr, rank_cells_ptr, peak, bound, mean, aim, max_steps, n_classes, most_copies,
    most_cells, n_rows, n_ranks, width, G: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Improve a plan by steps by potentials, each with up to SWEEPS sweeps; a function of its own.

    Few batches need it: the others have its registers, and it compiles sooner. The plan is units
    [n_cells] of 2**-24 by cell, with largest load ``peak``; x [n_cells] gets a better one, in
    tokens. fixed loads [n_ranks] and weights [n_columns] are read; loads [n_ranks], cells
    [n_cells], vectors [2, n_ranks] and ``sums`` [2 R] are scratch. Tables as in `SolveTables`.
    Returns a bound and the number of steps.
    """
    rows = _load_rows(rows_ptr, weights_ptr, n_rows, most_copies, R)
    rank_cells = _load_cells_of_ranks(rank_cells_ptr, most_cells, n_ranks, G)
    _store_tokens(x_ptr, units_ptr, rows)
    rank = _rank_numbers(G)
    fixed = tl.load(fixed_ptr + rank, mask=rank < n_ranks, other=0.0)
    tl.debug_barrier()
    _store_by_rank(loads_ptr, fixed + _sum_of_ranks(x_ptr, rank_cells, n_ranks, G), n_ranks)
    tl.debug_barrier()
    steps = max_steps * 0
    peak_before = peak
    while (peak - bound > peak * aim) & (steps < max_steps):
        peak = _step(
            x_ptr, loads_ptr, fixed_ptr, cells_ptr, vectors_ptr, sums_ptr, rows, rank_cells,
            mean, steps, n_ranks, G,
        )  # fmt: skip
        steps += 1
        done = steps * 0
        while (peak - bound > peak * aim) & (done < SWEEPS):
            done, peak = _sweep(
                x_ptr, loads_ptr, edges_ptr, done, SWEEPS, n_classes, width, n_ranks, peak, bound,
                aim, G, LANES,
            )  # fmt: skip
            if peak - bound > peak * aim:
                cut = _cut_bound_of_rows(
                    loads_ptr, fixed_ptr, rows, sums_ptr, n_ranks, peak, aim, G
                )  # fmt: skip
                bound = tl.maximum(bound, cut)
        tl.debug_barrier()
    if (peak <= peak_before) == 0:
        # A step may raise the largest load, and be the last.
        _store_tokens(x_ptr, units_ptr, rows)
    tl.debug_barrier()
    return bound, steps
