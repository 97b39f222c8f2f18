"""Coloured edge balancing, which levels pairs of ranks and gives no bound."""

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

from lplb_triton.bench.peers.pairs import check_loads, color_edges, find_copy_ranks

__all__ = [
    "EdgeBalancing",
]


# Lanes of a warp; each holds one rank, or several where there are more.
LANES = 32


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
        first, second = find_copy_ranks(mask)
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
        check_loads(weights, fixed, self.n_ranks, self.n_columns, self.device)
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
