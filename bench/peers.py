"""Two other ways to solve the same programs, for comparison with the interior-point kernel.

Both are written here from the published descriptions and share no code with the library's
solvers. Both take columns with copies on exactly two ranks, as the fixed topologies have them, and
return the part of every column that its first copy takes (the copy on the lower rank).

``AffineScaling``
    What DeepSeek's LPLB does: a few steps of primal affine scaling on the dense standard form
    of the program, from a Big-M start. No bound, so no certificate. Better than there: the step
    is as long as the largest entry of the whole direction allows, and the direction is projected
    twice, without which float32 makes many answers infeasible.
``EdgeBalancing``
    Coloured edge balancing: the two ranks of every column even out their loads, one colour of
    the columns after the other, sweep by sweep. No bound either; how many sweeps are enough
    has to be known beforehand.
"""

# Bodies of kernels are Triton's language, not Python's, and their compile-time constants are
# written in capitals, as in Triton itself; launchers are typed and named like everything else.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False, disable-error-code=assignment

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = ["AffineScaling", "EdgeBalancing", "color_edges", "two_copy_ranks"]

# LPLB divides by the largest expert and takes 1000. Over the six published load families a
# smaller price in units of the largest number leaves fewer answers infeasible or inexact.
BIG_M = 10.0
STEP_FACTOR = tl.constexpr(0.999)
# Pivots of a matrix with unit diagonal; float32 cannot tell smaller ones from zero.
LEAST_PIVOT = tl.constexpr(1e-12)
# Lanes of a warp; each holds one rank, or several where there are more.
LANES = 32


def two_copy_ranks(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of the two copies of every column.

    Parameters
    ----------
    mask : torch.Tensor
        ``[G, C]`` bool, whether a rank holds a copy of a column.

    Returns
    -------
    first, second : torch.Tensor
        ``[C]`` int64 on the CPU, the lower and the higher rank; -1 for a column without copies
        (padding).

    Raises
    ------
    ValueError
        If a column has one copy, or more than two.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [G, C], got {mask.dtype} {tuple(mask.shape)}")
    held = mask.cpu()
    copies = held.sum(0)
    wrong = torch.nonzero((copies != 2) & (copies != 0)).flatten()
    if wrong.numel():
        column = int(wrong[0])
        raise ValueError(
            f"mask must give every column two copies, column {column} has {int(copies[column])}"
        )
    rank = torch.arange(len(held), device="cpu").unsqueeze(1)
    second = torch.where(held, rank, -1).amax(0)
    first = torch.where(held, rank, len(held)).amin(0)
    return torch.where(copies == 2, first, -1), second


def color_edges(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Colour the edges of a multigraph so that no vertex has two of one colour.

    Takes edges in order; where no colour is free at both ends, two colours are swapped along a
    path (a Kempe chain). On a bipartite graph, as even rings, cubes and such tori are, the
    number of colours is the largest degree, which is the least possible.

    Parameters
    ----------
    first, second : torch.Tensor
        ``[C]`` int64, the two vertices of every edge; negative for no edge.

    Returns
    -------
    torch.Tensor
        ``[C]`` int64, colours from 0 on; -1 for no edge.
    """
    ends = list(zip(first.tolist(), second.tolist(), strict=True))
    colors = [-1] * len(ends)
    # at[vertex][color] is the edge of that colour at that vertex.
    at: dict[int, dict[int, int]] = {vertex: {} for pair in ends for vertex in pair}
    n_colors = 0
    for edge, (u, v) in enumerate(ends):
        if u < 0 or v < 0:
            continue
        free_u = [color for color in range(n_colors) if color not in at[u]]
        free_v = [color for color in range(n_colors) if color not in at[v]]
        pairs = [(a, b) for a in free_u for b in free_v]
        # A colour free at both ends needs no swap: its path is empty.
        pairs.sort(key=lambda pair: pair[0] != pair[1])
        for a, b in pairs:
            path, vertex, color = [], v, a
            while color in at[vertex]:
                path.append(at[vertex][color])
                vertex = sum(ends[path[-1]]) - vertex
                color = a + b - color
            if vertex != u:
                _swap_colors(path, a, b, ends, colors, at)
                colors[edge] = a
                break
        else:
            colors[edge] = n_colors
            n_colors += 1
        at[u][colors[edge]] = at[v][colors[edge]] = edge
    return torch.tensor(colors, dtype=torch.int64, device="cpu")


def _swap_colors(
    path: list[int],
    a: int,
    b: int,
    ends: list[tuple[int, int]],
    colors: list[int],
    at: dict[int, dict[int, int]],
) -> None:
    """Exchange the two colours of a path of edges."""
    for edge in path:
        for vertex in ends[edge]:
            del at[vertex][colors[edge]]
        colors[edge] = a + b - colors[edge]
    for edge in path:
        for vertex in ends[edge]:
            at[vertex][colors[edge]] = edge


@triton.jit
def _add_outer_products(
    tile, left_ptr, left_step, left_stride, right_ptr, length, M: tl.constexpr, N: tl.constexpr
):
    """Add a product to a tile ``[M, N]``, as the sum of ``length`` outer products.

    The vectors are ``left[k * left_step + m * left_stride]`` and ``right[k * N + n]``. They are
    short enough to be read straight into the tile's layout, whereas the operands of a float32
    ``tl.dot`` would fill the registers.
    """
    row = tl.arange(0, M)
    col = tl.arange(0, N)
    for k in tl.range(length, loop_unroll_factor=4):
        left = tl.load(left_ptr + k * left_step + row * left_stride)
        right = tl.load(right_ptr + k * N + col)
        tile += left[:, None] * right[None, :]
    return tile


@triton.jit
def _invert_factor(block, row, col, B: tl.constexpr):
    """Turn ``[D, I, 0]``, a tile of ``B`` rows, into ``[L^T, L^-1, 0]`` with ``D = L L^T``."""
    for k in tl.static_range(B):
        pivot_row = tl.sum(tl.where(row == k, block, 0.0), 0)[None, :]
        pivot_col = tl.sum(tl.where(col == k, block, 0.0), 1)[:, None]
        pivot = tl.maximum(tl.sum(tl.where(col == k, pivot_row, 0.0), 1), LEAST_PIVOT)[:, None]
        block -= tl.where(row > k, pivot_col / pivot, 0.0) * pivot_row
        block = tl.where(row == k, pivot_row * tl.rsqrt(pivot), block)
    return block


@triton.jit
def _eliminate(tile, n_pivots, panel_ptr, left_ptr, right_ptr, inverse_ptr, N: tl.constexpr,
               B: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Invert the first ``n_pivots`` rows and columns of a symmetric tile ``[N, N]`` in place.

    Gauss-Jordan elimination, ``B`` columns at a time. The tile is held transposed: entry
    ``[j, i]`` is row i, column j of the matrix. The other columns end up as the solutions for
    them as right-hand sides. With ``C`` the panel's columns, ``L L^T`` their pivot block and
    ``E`` the identity in its rows, the panel's columns become ``E``, and then all rows change by
    ``-(C - E) L^-T L^-1 R``. ``R`` are the pivot rows, with the identity in the panel: ``C^T``,
    with the sign changed where columns have been eliminated before.

    The block is worked on in ``W`` >= 2 B columns, at least one element per thread: with fewer
    Triton keeps several copies of it and converts between their layouts at every pivot.
    """
    i = tl.arange(0, N)[None, :]
    j = tl.arange(0, N)[:, None]
    k = tl.arange(0, B)[:, None]
    col = tl.arange(0, W)[None, :]
    for start in range(0, n_pivots, B):
        tl.debug_barrier()
        in_panel = (j >= start) & (j < start + B)
        tl.store(panel_ptr + (j - start) * N + i, tile, mask=in_panel)
        tl.debug_barrier()
        block = tl.load(panel_ptr + k * N + start + col, mask=col < B, other=0.0)
        block = _invert_factor(tl.where(col - B == k, 1.0, block), k, col, B)
        tl.store(inverse_ptr + k * B + col - B, block, mask=(col >= B) & (col < 2 * B))
        tl.debug_barrier()
        product = tl.zeros((B, N), tl.float32)
        product = _add_outer_products(product, inverse_ptr, 1, B, panel_ptr, B, B, N)
        here = (i >= start) & (i < start + B)
        identity = tl.load(inverse_ptr + k * B + i - start, mask=here, other=0.0)
        rows = tl.where(here, identity, tl.where(i < start, -product, product))
        tl.store(left_ptr + k * N + i, rows)
        tl.store(right_ptr + k * N + i, identity - product)
        tl.debug_barrier()
        tile = tl.where(in_panel, tl.where(i == j, 1.0, 0.0), tile)
        tile = _add_outer_products(tile, left_ptr, N, 1, right_ptr, B, N, N)
    return tile


@triton.jit
def _standard_form(
    weights, fixed, first, second, n_ranks, n_columns, big_m, V: tl.constexpr, N: tl.constexpr
):
    """Transposed constraints ``[V, N]``, one row per variable; the last column is the cost.

    Variables: C shares on the first copies, C on the second, G slacks, the largest load, the
    artificial variable. Constraints: G rank loads, C sums of shares. ``weights``, ``first`` and
    ``second`` are given by variable, ``fixed`` by constraint.
    """
    v = tl.arange(0, V)[:, None]
    i = tl.arange(0, N)[None, :]
    slack = v - 2 * n_columns
    is_share = slack < 0
    rank = tl.where(v < n_columns, first[:, None], second[:, None])
    of_rank = i < n_ranks
    of_column = (i >= n_ranks) & (i < n_ranks + n_columns)
    column = tl.where(v < n_columns, v, v - n_columns)
    form = tl.where(is_share & of_rank & (rank == i), weights[:, None], 0.0)
    form = tl.where(is_share & of_column & (column == i - n_ranks), 1.0, form)
    form = tl.where((slack == i) & of_rank, 1.0, form)
    form = tl.where((slack == n_ranks) & of_rank, -1.0, form)
    # The artificial variable's column is what A x misses of b at x = 1.
    right = tl.where(of_rank, -fixed[None, :], tl.where(of_column, 1.0, 0.0))
    missing = right - tl.sum(form, 0)[None, :]
    form = tl.where(slack == n_ranks + 1, missing, form)
    form = tl.where((i == N - 1) & (slack == n_ranks), 1.0, form)
    return tl.where((i == N - 1) & (slack == n_ranks + 1), big_m, form)


@triton.jit(do_not_specialize=["n_ranks", "n_columns"])
def _affine_scaling_kernel(
    weights_ptr, fixed_ptr, first_ptr, second_ptr, padding_ptr, x_ptr, scratch_ptr,
    n_ranks, n_columns, big_m,
    STEPS: tl.constexpr, V: tl.constexpr, N: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Solve instance ``program_id(0)`` by ``STEPS`` steps of primal affine scaling.

    With ``U = A diag(x)``, the cost as its last row and every row scaled to length 1, a step is:
    invert ``M = U U^T``, ``d`` = the cost's part that no constraint explains (projected twice),
    ``x *= 1 - 0.999 d / max(d)``. The scaling leaves ``d`` the same but for a factor, which the
    quotient takes away.

    weights [B, C] and fixed [B, G] float32, first and second [C] int32 (-1: padding), padding
    [N, N] float32 (1 on the diagonal where there is no constraint), x [B, 2 C + G + 2] float32
    (every element is written), scratch [B, V N + 3 B N + B B] float32. Grid (B,).
    """
    program = tl.program_id(0).to(tl.int64)
    n_vars = 2 * n_columns + n_ranks + 2
    n_rows = n_ranks + n_columns
    u_ptr = scratch_ptr + program * (V * N + 3 * B * N + B * B)
    panel_ptr = u_ptr + V * N
    left_ptr = panel_ptr + B * N
    right_ptr = left_ptr + B * N
    inverse_ptr = right_ptr + B * N

    v = tl.arange(0, V)
    i = tl.arange(0, N)
    column = tl.where(v < n_columns, v, v - n_columns)
    is_share = v < 2 * n_columns
    weights = tl.load(weights_ptr + program * n_columns + column, mask=is_share, other=0.0)
    first = tl.load(first_ptr + column, mask=is_share, other=-1)
    second = tl.load(second_ptr + column, mask=is_share, other=-1)
    fixed = tl.load(fixed_ptr + program * n_ranks + i, mask=i < n_ranks, other=0.0)
    unit = tl.maximum(tl.max(weights), tl.max(fixed))
    unit = tl.where(unit > 0, unit, 1.0)
    u = _standard_form(weights / unit, fixed / unit, first, second, n_ranks, n_columns, big_m, V, N)

    x = tl.full((V,), 1.0, tl.float32)
    u_ptrs = u_ptr + v[:, None] * N + i[None, :]
    row = tl.arange(0, N)[:, None]
    for _ in range(STEPS):
        u *= tl.rsqrt(tl.maximum(tl.sum(u * u, 0), 1e-30))[None, :]
        tl.store(u_ptrs, u)
        tl.debug_barrier()
        # Read rather than made here: the tile takes the layout of this load, whose rows of four
        # make a good register block.
        matrix = tl.load(padding_ptr + row * N + i[None, :])
        matrix = _add_outer_products(matrix, u_ptr, N, 1, u_ptr, n_vars, N, N)
        matrix = _eliminate(matrix, n_rows, panel_ptr, left_ptr, right_ptr, inverse_ptr, N, B, W)
        explained = tl.sum(tl.where(row == N - 1, matrix, 0.0), 0)
        direction = tl.where(i < n_rows, -explained, tl.where(i == N - 1, 1.0, 0.0))
        u = tl.load(u_ptrs)
        d = tl.sum(u * direction[None, :], 1)
        # Projected once more: the matrix is nearly singular in the last steps, and what float32
        # leaves of the constraints in ``d`` would make the answer infeasible.
        left = tl.where(i < n_rows, tl.sum(u * d[:, None], 0), 0.0)
        again = tl.sum(matrix * left[None, :], 1)
        again = tl.where(i < n_rows, again, 0.0)
        d -= tl.sum(u * again[None, :], 1)
        largest = tl.max(d)
        ratio = 1.0 - d * tl.where(largest > 0, STEP_FACTOR / largest, 0.0)
        x *= ratio
        u *= ratio[:, None]
    tl.store(x_ptr + program * n_vars + v, x, mask=v < n_vars)


@triton.jit(do_not_specialize=["n_ranks", "n_columns"])
def _edge_balancing_kernel(
    weights_ptr, fixed_ptr, partner_ptr, column_ptr, is_first_ptr, sweeps_ptr, shares_ptr,
    n_ranks, n_columns,
    COLORS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Solve instance ``program_id(0)`` by coloured edge balancing, in one warp.

    A lane is a rank. For each colour it holds the weight of its edge of that colour and how
    much of it lies on its own side. Both ends of an edge move the same amount with opposite
    sign, so loads need no scatter, and one shuffle per colour is all that the lanes exchange.

    weights [B, C] and fixed [B, G] float32; partner, column, is_first [COLORS, G] int32: the
    rank at the other end, the column, whether this end is the first (itself, -1, 0 where there
    is no edge); sweeps [B] int32, shares [B, C] float32 (written where there is an edge).
    Grid (B,).
    """
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, L)
    on = lane < n_ranks
    load = tl.load(fixed_ptr + program * n_ranks + lane, mask=on, other=0.0)
    # One entry per colour: tuples stay in registers, a two-dimensional tile would be spread
    # over the lanes.
    partner, column, weight, mine = (), (), (), ()
    for k in tl.static_range(COLORS):
        partner += (tl.load(partner_ptr + k * n_ranks + lane, mask=on, other=0),)
        column += (tl.load(column_ptr + k * n_ranks + lane, mask=on, other=-1),)
        weight += (
            tl.load(weights_ptr + program * n_columns + column[k], mask=column[k] >= 0, other=0.0),
        )
        mine += (0.5 * weight[k],)
        load += mine[k]
    for _ in range(tl.load(sweeps_ptr + program)):
        moved = ()
        for k in tl.static_range(COLORS):
            uphill = 0.5 * (tl.gather(load, partner[k], 0) - load)
            step = tl.maximum(tl.minimum(uphill, weight[k] - mine[k]), -mine[k])
            load += step
            moved += (mine[k] + step,)
        mine = moved
    for k in tl.static_range(COLORS):
        share = mine[k] / tl.where(weight[k] > 0, weight[k], 1.0)
        share = tl.where(weight[k] > 0, tl.minimum(tl.maximum(share, 0.0), 1.0), 0.5)
        is_first = tl.load(is_first_ptr + k * n_ranks + lane, mask=on, other=0) != 0
        tl.store(shares_ptr + program * n_columns + column[k], share, mask=is_first)


def _check_loads(
    weights: torch.Tensor, fixed: torch.Tensor, n_ranks: int, n_columns: int, device: torch.device
) -> None:
    """Raise unless the loads are float32, contiguous and of the sizes of the placement."""
    for name, value, size in (("weights", weights, n_columns), ("fixed", fixed, n_ranks)):
        if value.ndim != 2 or value.shape != (len(weights), size):
            raise ValueError(
                f"{name} must be [{len(weights)}, {size}], got shape {tuple(value.shape)}"
            )
        if value.dtype != torch.float32 or value.device != device or not value.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 on {device}, "
                f"got {value.dtype} on {value.device}"
            )


class AffineScaling:
    """Primal affine scaling with a Big-M start on the dense standard form, in one launch.

    Parameters
    ----------
    mask : torch.Tensor
        ``[G, C]`` bool, two copies per column (or none: padding).
    device : torch.device or str
        Where to solve.
    steps : int
        Steps; LPLB takes 5.
    big_m : float
        Cost of the artificial variable; loads are divided by the largest number first.
    num_warps : int or None
        Warps per program; by default what suits the size.
    block : int
        Columns that are eliminated together, a power of two; 16 costs digits.

    Raises
    ------
    ValueError
        If a column hasn't two copies, or there are more than 120 ranks and columns: the
        matrix has to fit the registers of one SM.
    """

    def __init__(
        self,
        mask: torch.Tensor,
        device: torch.device | str,
        *,
        steps: int = 5,
        big_m: float = BIG_M,
        num_warps: int | None = None,
        block: int = 8,
    ) -> None:
        first, second = two_copy_ranks(mask)
        self.n_ranks, self.n_columns = mask.shape
        n_rows = self.n_ranks + self.n_columns
        self._block = block
        # One row more than the eliminated ones holds the cost.
        self._rows = triton.next_power_of_2(triton.cdiv(n_rows, self._block) * self._block + 1)
        self._rows = max(16, self._rows)
        if self._rows > 128:
            raise ValueError(f"mask has {n_rows} ranks and columns, more than affine scaling takes")
        self.n_vars = 2 * self.n_columns + self.n_ranks + 2
        self._vars = triton.next_power_of_2(self.n_vars)
        self._steps, self._big_m = steps, big_m
        self._warps = {16: 1, 32: 2, 64: 4, 128: 8}[self._rows] if num_warps is None else num_warps
        self._ends = [ends.to(device, torch.int32) for ends in (first, second)]
        self.device = self._ends[0].device
        padding = torch.zeros(self._rows, dtype=torch.float32, device="cpu")
        padding[n_rows : self._rows - 1] = 1.0
        self._padding = torch.diag(padding).to(self.device)
        size = self._vars * self._rows + 3 * self._block * self._rows + self._block**2
        self._scratch_size = size
        self._scratch = torch.empty(1, size, dtype=torch.float32, device=self.device)

    def solve(self, weights: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """Solve a batch; no host sync.

        Parameters
        ----------
        weights, fixed : torch.Tensor
            ``[B, C]`` and ``[B, G]`` float32, contiguous.

        Returns
        -------
        torch.Tensor
            ``[B, 2 C + G + 2]`` float32: shares on the first copies, on the second, slacks, the
            largest load, the artificial variable. Nothing guarantees that they are feasible.
        """
        _check_loads(weights, fixed, self.n_ranks, self.n_columns, self.device)
        batch = len(weights)
        if len(self._scratch) < batch:
            self._scratch = self._scratch.new_empty(batch, self._scratch_size)
        x = torch.empty(batch, self.n_vars, dtype=torch.float32, device=self.device)
        if batch:
            _affine_scaling_kernel[(batch,)](
                weights, fixed, *self._ends, self._padding, x, self._scratch,
                self.n_ranks, self.n_columns, self._big_m,
                STEPS=self._steps, V=self._vars, N=self._rows, B=self._block,
                W=max(2 * self._block, 32 * self._warps // self._block),
                num_warps=self._warps,
            )  # fmt: skip
        return x


class EdgeBalancing:
    """Coloured edge balancing, one warp per program.

    Parameters
    ----------
    mask : torch.Tensor
        ``[G, C]`` bool, two copies per column (or none: padding).
    device : torch.device or str
        Where to solve.

    Attributes
    ----------
    n_colors : int
        Steps of one sweep.

    Raises
    ------
    ValueError
        If a column hasn't two copies.
    """

    def __init__(self, mask: torch.Tensor, device: torch.device | str) -> None:
        first, second = two_copy_ranks(mask)
        self.n_ranks, self.n_columns = mask.shape
        colors = color_edges(first, second)
        self.n_colors = int(colors.max()) + 1
        tables = np.zeros((3, self.n_colors, self.n_ranks), dtype=np.int32)
        tables[0] = np.arange(self.n_ranks)
        tables[1] = -1
        for column, (u, v, color) in enumerate(
            zip(first.tolist(), second.tolist(), colors.tolist(), strict=True)
        ):
            if color >= 0:
                tables[:, color, u] = v, column, 1
                tables[:, color, v] = u, column, 0
        self._tables = [torch.from_numpy(table).to(device) for table in tables]
        self.device = self._tables[0].device

    def solve(
        self, weights: torch.Tensor, fixed: torch.Tensor, sweeps: torch.Tensor
    ) -> torch.Tensor:
        """Balance a batch; no host sync.

        Parameters
        ----------
        weights, fixed : torch.Tensor
            ``[B, C]`` and ``[B, G]`` float32, contiguous.
        sweeps : torch.Tensor
            ``[B]`` int32, sweeps over all colours for each instance.

        Returns
        -------
        torch.Tensor
            ``[B, C]`` float32 in [0, 1], the first copies' shares; not written for padding.
        """
        _check_loads(weights, fixed, self.n_ranks, self.n_columns, self.device)
        batch = len(weights)
        if sweeps.shape != (batch,) or sweeps.dtype != torch.int32:
            raise ValueError(f"sweeps must be [{batch}] int32, got {tuple(sweeps.shape)}")
        shares = torch.empty(batch, self.n_columns, dtype=torch.float32, device=self.device)
        if batch:
            _edge_balancing_kernel[(batch,)](
                weights, fixed, *self._tables, sweeps, shares, self.n_ranks, self.n_columns,
                COLORS=self.n_colors, L=max(LANES, triton.next_power_of_2(self.n_ranks)),
                num_warps=1,
            )  # fmt: skip
        return shares
