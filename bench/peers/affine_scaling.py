"""Primal affine scaling on the dense standard form, which is LPLB's method."""

# Bodies of kernels are Triton's language, not Python's, and their compile-time constants are
# written in capitals, as in Triton itself; launchers are typed and named like everything else.
# ruff: noqa: N803
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False, disable-error-code=assignment

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lplb_triton.bench.peers.pairs import check_loads, find_copy_ranks

__all__ = [
    "AffineScaling",
]


# LPLB divides by the largest expert and takes 1000. Over the six published load families a
# smaller price in units of the largest number leaves fewer answers infeasible or inexact.
BIG_M = 10.0

STEP_FACTOR = tl.constexpr(0.999)

# Pivots of a matrix with unit diagonal; float32 cannot tell smaller ones from zero.
LEAST_PIVOT = tl.constexpr(1e-12)


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
        first, second = find_copy_ranks(mask)
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
        check_loads(weights, fixed, self.n_ranks, self.n_columns, self.device)
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
