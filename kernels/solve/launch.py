"""Launchers of the kernels that solve the linear program, with the sizes they are compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from lplb_triton import _layout
from lplb_triton.kernels.count import SUM_EXPERTS, SUM_ROWS
from lplb_triton.kernels.exchange import FIRST_CHANNEL, Channel, Exchange, choose_block
from lplb_triton.kernels.launch import KernelCall, launch_call, supports_pdl
from lplb_triton.kernels.live.launch import NO_LIVE, Live, no_live_args
from lplb_triton.kernels.solve.counts_kernel import solve_counts_kernel
from lplb_triton.kernels.solve.dense_kernel import solve_dense_kernel
from lplb_triton.kernels.solve.expand_kernel import expand_kernel

# Shares that one program spreads.
EXPAND_BLOCK = 512


class SolveTables(NamedTuple):
    """Device tables that the counts solver reads, int32; experts as in ``placement.Structure``.

    A group's cells, the shares of its columns on their ranks, are numbered by column, then by rank,
    and there are at most as many as copies of replicated experts, ``n_shared``. -1 is padding.
    Numbers of columns of a table stand in _layout.py.
    """

    rank_experts: torch.Tensor
    """[n_group, group_size, slots_per_rank] experts of each rank's slots, each in one of them."""
    rank_parts: torch.Tensor
    """float32 of the same shape: the part of an expert's load that an even split over ranks leaves
    in the slot."""
    extents: torch.Tensor
    """[n_group, N_EXTENTS], see `_layout.Extent`."""
    pairs: torch.Tensor
    """[n_group, classes of edges, group_size] int64, words as in pairs.py; no classes if the first
    placement's columns aren't pairs."""
    cells: torch.Tensor
    """[n_group, N_CELL_FIELDS, n_shared], see `_layout.CellField`."""
    cell_start: torch.Tensor
    """[n_group, max_columns + 1] first cell of each column."""
    rows: torch.Tensor
    """[n_group, ROW_WORDS n_rows], one after the other: [n_rows, ROW_CELLS] ranks of each row's
    cells, -1 for none, and by row, [n_rows] each, its first cell, the first row of the column, how
    many cells that has (0 where there is no row), and the column. There are as many rows as
    redundant slots, at least one."""
    rank_cells: torch.Tensor
    """[n_group, n, group_size] each rank's cells, then -1; n is a multiple of RANK_CELLS."""
    first_members: torch.Tensor
    """[n_group, MEMBERS, max_columns] first members of each column."""
    first_ranks: torch.Tensor
    """[n_group, COPIES_AT_ONCE, max_columns] ranks of each column's first cells, -1 for none."""
    column_start: torch.Tensor
    column_members: torch.Tensor
    shared_copies: torch.Tensor
    """[n_group, n_shared] copies of replicated experts."""
    shared_cells: torch.Tensor
    """[n_group, n_shared] their cells, -1 if one rank holds all copies."""
    copy_index: torch.Tensor
    copy_multiplicity: torch.Tensor
    edges: torch.Tensor
    """[n_group, most_classes + 1, width] int64, words as in levelling.py."""
    copy_parts: torch.Tensor
    """float32 as ``rank_parts``, of an even split over copies."""
    slot_cells: torch.Tensor
    """Cells of ``rank_experts``, -1 if one rank holds all copies."""


# How many of the tables every solve reads. They come first among a kernel's arguments, together
# with all else that every solve needs, since arguments are read through a cache line by line.
FIRST_TABLES = 4


class ExpandTables(NamedTuple):
    """Device tables that tell where a dense plan's shares are among those by copy, int32."""

    cell_number: torch.Tensor
    """[n_group, max_columns, group_size] the cell of a column on a rank, -1 for none."""
    cell_ends: torch.Tensor
    """[n_group, 2, n_shared] the last copy in each cell of its column's first expert, and the copy
    before the first, -1 if there is none."""


class SolveBuffers(NamedTuple):
    """What a solve from counts writes."""

    counts: torch.Tensor
    """[n_logical] int32."""
    cumulative: torch.Tensor
    """[n_copies] int32."""
    stats: torch.Tensor
    """[3, n_group] float32: largest load, lower bound and gap."""
    ints: torch.Tensor
    """[2, n_group] int32: iterations and status."""
    scratch: torch.Tensor
    """[n_group, `solve_scratch`] float32."""


class Settings(NamedTuple):
    """Numbers that a solve from counts takes, and counters, [1] int32 or int64, that it raises."""

    certified: torch.Tensor
    """Rises by one for each group that is certified,"""
    solves: torch.Tensor
    """for each group,"""
    uncertified: torch.Tensor
    """and for each group whose gap is too wide."""
    tolerance: float
    max_iterations: int


# Positions of the arguments that change from batch to batch, among those of `solve_counts_call`:
# the counters of the settings, and, counted from the end, opening and number of the channel.
CERTIFIED_AT = 2 + FIRST_TABLES + len(SolveBuffers._fields) - 1
SOLVES_AT, UNCERTIFIED_AT = CERTIFIED_AT + 1, CERTIFIED_AT + 2
OPENING_FROM_END, CHANNEL_FROM_END = 2, 1
# The plan of live slots is the last argument before those of the exchange.
N_EXCHANGE_ARGS = 13
LIVE_OUT_FROM_END = N_EXCHANGE_ARGS + 1


def pad_tile(n_ranks: int, n_columns: int) -> tuple[int, int]:
    """Pad a group's ranks to two blocks of four pivots, and its columns to whole warps."""
    return max(8, triton.next_power_of_2(n_ranks)), max(32, triton.next_power_of_2(n_columns))


def choose_dense_warps(ranks: int, columns: int) -> int:
    """Return the warps of `solve`: the quickest of those tried on an H100."""
    if ranks == 8:
        return min(8, columns // 32)
    if ranks <= 32:
        return 4 if columns <= 64 else 8
    return 8 if ranks == 64 and columns <= 64 else 16


def choose_counts_warps(ranks: int, n_shared: int) -> int:
    """Return the warps of `solve_counts`: the quickest on an H200, more for large tiles of rows.

    Without shared copies there is nothing to solve, and all warps find the same live slots.
    """
    if n_shared == 0 and ranks <= 256:
        return 4
    warps = 4 if ranks <= 64 else 8 if ranks <= 256 else 16
    return min(16, max(warps, pad_rows(n_shared) // 64))


def make_options(warps: int) -> dict[str, Any]:
    """Return compile options: that many warps, all their registers, no fused multiply-add.

    Without ``maxnreg`` ptxas takes half of the registers for the largest tiles, and spills. A
    thread that fuses its own product into a sum over lanes rounds differently from the lane that
    sends it, but all threads must hold the same bits, since they take the same branches by them. No
    loop here has loads that are worth a pipeline, and trying takes the compiler time.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False, "num_stages": 1}
    if warps == 16 and torch.version.hip is None:
        options["maxnreg"] = 128
    return options


def pad_rows(n_shared: int) -> int:
    """Pad the rows of a group that may have so many shared copies to whole warps."""
    return max(32, int(triton.next_power_of_2(max(1, n_shared // 2))))


def solve_scratch(tables: SolveTables) -> int:
    """Count the words of scratch that a group takes: by rank, column, cell and row, and thread.

    The solving kernel computes this too.
    """
    n_ranks, n_shared = tables.rank_experts.shape[1], tables.shared_copies.shape[1]
    n_columns = tables.first_members.shape[2]
    rows = pad_rows(n_shared)
    threads = 32 * choose_counts_warps(pad_tile(n_ranks, n_columns)[0], n_shared)
    return (
        _layout.SCRATCH_BY_RANK * n_ranks
        + _layout.SCRATCH_BY_COLUMN * n_columns
        + _layout.SCRATCH_BY_CELL * n_shared
        + _layout.SCRATCH_BY_ROW * rows
        + threads
    )


def solve(
    weights: torch.Tensor,
    fixed: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve a batch of programs; returns shares, max_load, lower_bound, gap, iterations, status.

    ``weights`` [B, C], ``fixed`` [B, G], ``mask`` [B or 1, G, C] bool, ``start`` [B, G, C].
    """
    batch, n_columns = weights.shape
    n_ranks = fixed.shape[1]
    device = weights.device
    weights = weights.to(torch.float32).contiguous()
    fixed = fixed.to(torch.float32).contiguous()
    mask = mask.contiguous().view(torch.int8)
    shares = torch.empty(batch, n_ranks, n_columns, dtype=torch.float32, device=device)
    stats = torch.empty(3, batch, dtype=torch.float32, device=device)
    ints = torch.empty(2, batch, dtype=torch.int32, device=device)
    if batch:
        sizes = pad_tile(n_ranks, n_columns)
        stride = 0 if mask.shape[0] == 1 else n_ranks * n_columns
        first = shares if start is None else start.to(torch.float32).contiguous()
        args = (
            weights, fixed, mask, stride, first, shares, stats, ints,
            tolerance, max_iterations, n_ranks, n_columns,
        )  # fmt: skip
        options = make_options(choose_dense_warps(*sizes))
        launch_call(
            KernelCall(solve_dense_kernel, batch, args, (*sizes, start is not None), options)
        )
    return shares, stats[0], stats[1], stats[2], ints[0], ints[1]


def solve_counts_call(
    running: torch.Tensor | None,
    buffers: SolveBuffers,
    tables: SolveTables,
    settings: Settings,
    report: torch.Tensor,
    exchange: Exchange | None = None,
    channel: Channel = FIRST_CHANNEL,
    live: Live | None = None,
) -> KernelCall:
    """Prepare `solve_counts`, with an ``exchange`` for counts that are summed over ranks first.

    ``live`` is for a placement with live slots.
    """
    n_group, n_ranks, n_slots = tables.rank_experts.shape
    _, n_members, n_columns = tables.first_members.shape
    n_shared = tables.shared_copies.shape[1]
    n_logical = buffers.counts.numel()
    ranks, columns = pad_tile(n_ranks, n_columns)
    slots, copies = triton.next_power_of_2(n_slots), triton.next_power_of_2(max(1, n_shared))
    n_sums = 0 if running is None else triton.cdiv(n_logical, SUM_EXPERTS)
    args = (
        buffers.counts if running is None else running, buffers.counts, *tables[:FIRST_TABLES],
        *buffers[1:], *settings, n_ranks, n_columns, n_slots, n_shared,
        n_logical, 0 if running is None else running.shape[0], n_sums,
        *tables.edges.shape[1:], *tables[FIRST_TABLES:], report,
        *(live.args() if live else no_live_args(buffers.counts)),
        *(exchange.args(channel) if exchange else (*[buffers.counts] * 7, 0, 0, 0, 0, 0, 0)),
    )  # fmt: skip
    rows = pad_rows(n_shared)
    warps = choose_counts_warps(ranks, n_shared)
    constants = (
        ranks, columns, rows, max(2, slots), max(32, copies), n_members,
        SUM_ROWS, SUM_EXPERTS, tables.pairs.shape[1], 32 * warps,
        supports_pdl(buffers.counts.device),
        *(exchange.constants() if exchange else (0, choose_block(n_logical), 0, 0)),
        *(live.constants() if live else NO_LIVE),
    )  # fmt: skip
    options = make_options(warps)
    return KernelCall(solve_counts_kernel, n_sums + n_group, args, constants, options)


def solve_counts(
    running: torch.Tensor | None,
    buffers: SolveBuffers,
    tables: SolveTables,
    settings: Settings,
    report: torch.Tensor,
) -> None:
    """Solve every group of one batch from its counts by logical expert.

    ``buffers.counts`` are given, or with ``running`` [n_sms, n_logical] int32 (counts by
    program, as `count_by_program` leaves both) summed in the same launch. Negative counts make a
    group invalid, and ``report`` [2] int64 says so.
    """
    launch_call(solve_counts_call(running, buffers, tables, settings, report))


def expand_shares(cumulative: torch.Tensor, shares: torch.Tensor, tables: ExpandTables) -> None:
    """Write to ``shares`` [n_group, group_size, max_columns] float32 what copies of columns take.

    ``cumulative`` [n_copies] int32 as `solve_counts` leaves it.
    """
    n_group, n_ranks, n_columns = shares.shape
    grid = n_group * triton.cdiv(n_ranks * n_columns, EXPAND_BLOCK)
    args = (cumulative, *tables, shares, n_ranks, n_columns, tables.cell_ends.shape[2])
    if grid:
        launch_call(KernelCall(expand_kernel, grid, args, (EXPAND_BLOCK,), {"num_warps": 4}))
