"""Launchers: sizes and configurations for every kernel, nothing of the method itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from lplb_triton.kernels.interior_point import _solve_counts_kernel, _solve_lp_kernel
from lplb_triton.kernels.tokens import _count_kernel, _running_sum_kernel, _select_kernel

# Ids that one program handles at a time. The select kernel compares all pairs of a block.
COUNT_BLOCK = 256
SELECT_BLOCK = 256
# Rows and experts of one program that sums counts.
SUM_ROWS = 256
SUM_EXPERTS = 4
# A thread that fuses its own product into a sum over lanes rounds differently from the lane
# that sends it. All threads must hold the same bits: they take the same branches by them.
SOLVE_OPTIONS = {"enable_fp_fusion": False}

P = ParamSpec("P")
R = TypeVar("R")

# Compiled kernels by what they were compiled for. Triton's own launch looks at every argument
# anew; nothing here is specialised on values or alignment, so the dtypes say it all.
_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any, grid: int, args: tuple[Any, ...], constants: tuple[int, ...], **options: Any
) -> None:
    """Launch ``kernel`` on the current device and stream; compile it on its first call.

    ``args`` are the run-time arguments, ``constants`` the compile-time ones, which every kernel
    here takes last.
    """
    if isinstance(kernel, InterpretedFunction):
        kernel[(grid,)](*args, *constants)
        return
    device = torch.cuda.current_device()
    dtypes = tuple([a.dtype for a in args if isinstance(a, torch.Tensor)])
    key = (kernel, device, constants, dtypes)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(grid,)](*args, *constants, **options)
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled[(grid, 1, 1)](*args, *constants, stream=stream)


def _on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Make the first argument's GPU the current one: Triton launches there."""

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = args[0]
        context: AbstractContextManager[object] = nullcontext()
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            if torch.cuda.current_device() != tensor.device.index:
                context = torch.cuda.device(tensor.device)
        with context:
            return launcher(*args, **kwargs)

    return launch


class SolveTables(NamedTuple):
    """Device tables that the counts solver reads; shapes as in ``placement.Structure``."""

    mask: torch.Tensor
    fixed_experts: torch.Tensor
    column_first: torch.Tensor
    column_start: torch.Tensor
    column_members: torch.Tensor
    longest_column: torch.Tensor
    copy_cell: torch.Tensor
    copy_index: torch.Tensor
    copy_multiplicity: torch.Tensor
    most_on_a_rank: torch.Tensor


class SelectTables(NamedTuple):
    """Device tables that the select kernel reads."""

    copy_start: torch.Tensor
    copy_slot: torch.Tensor
    search_steps: torch.Tensor


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, under Triton's interpreter."""
    return isinstance(_solve_lp_kernel, InterpretedFunction)


def _tile(n_ranks: int, n_columns: int) -> tuple[int, int]:
    """Pad the tile of a group: whole warps of columns, and two blocks of four pivots."""
    return max(8, triton.next_power_of_2(n_ranks)), max(32, triton.next_power_of_2(n_columns))


def _solve_warps(ranks: int, columns: int) -> int:
    """Warps for a tile: the quickest on an H100 (docs/benchmarks.md)."""
    if ranks <= 16:
        return min(8, max(1, columns // 32))
    if ranks == 32:
        return 4 if columns <= 64 else 8
    return 8 if ranks == 64 else 16


@_on_its_device
def solve(
    weights: torch.Tensor,
    fixed: torch.Tensor,
    mask: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve a batch of programs; returns shares, max_load, lower_bound, gap, iterations, status.

    ``weights`` [B, C], ``fixed`` [B, G], ``mask`` [B or 1, G, C] bool.
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
        ranks, columns = _tile(n_ranks, n_columns)
        stride = 0 if mask.shape[0] == 1 else n_ranks * n_columns
        _launch(
            _solve_lp_kernel, batch,
            (
                weights, fixed, mask, stride, shares, stats, ints,
                tolerance, max_iterations, n_ranks, n_columns,
            ),
            (ranks, columns),
            num_warps=_solve_warps(ranks, columns), **SOLVE_OPTIONS,
        )  # fmt: skip
    return shares, stats[0], stats[1], stats[2], ints[0], ints[1]


@_on_its_device
def solve_counts(
    counts: torch.Tensor,
    running: torch.Tensor | None,
    tables: SolveTables,
    shares: torch.Tensor,
    units: torch.Tensor,
    cumulative: torch.Tensor,
    stats: torch.Tensor,
    ints: torch.Tensor,
    certified: torch.Tensor,
    solves: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> None:
    """Solve every group of one batch from its counts by logical expert, into given buffers.

    ``counts`` [n_logical] int32: given, or with ``running`` [n_sms, n_logical] int32 (counts by
    program, as `count_by_program` leaves both) summed in the same launch;
    ``shares`` [n_group, G, C] float32, ``units`` likewise int32,
    ``cumulative`` [n_physical] int32, ``stats`` [3, n_group] float32, ``ints`` [2, n_group]
    int32; ``certified`` and ``solves`` one int32 or int64 element each, added to.
    """
    n_group, n_ranks, n_columns = shares.shape
    n_slots = tables.fixed_experts.shape[2]
    n_copies = cumulative.numel()
    ranks, columns = _tile(n_ranks, n_columns)
    n_logical = counts.numel()
    n_sums = 0 if running is None else triton.cdiv(n_logical, SUM_EXPERTS)
    slots, copies = triton.next_power_of_2(n_slots), triton.next_power_of_2(n_copies)
    _launch(
        _solve_counts_kernel, n_sums + n_group,
        (
            counts if running is None else running, counts,
            *tables, shares, units, cumulative, stats, ints, certified, solves,
            tolerance, max_iterations, n_ranks, n_columns, n_slots, n_copies,
            n_logical, 0 if running is None else running.shape[0], n_sums,
        ),
        (ranks, columns, max(2, slots), min(1024, max(32, copies)), SUM_ROWS, SUM_EXPERTS),
        num_warps=_solve_warps(ranks, columns), **SOLVE_OPTIONS,
    )  # fmt: skip


@_on_its_device
def count_by_program(
    idx: torch.Tensor,
    running: torch.Tensor,
    counts: torch.Tensor,
    status: torch.Tensor,
    chunk: int,
) -> None:
    """Count contiguous ``idx`` by chunk.

    ``running`` [n_sms, n_logical] int32 is written, and ``counts`` [n_logical] int32 becomes -1
    until `sum_by_program` or `solve_counts` has summed the rows; ``status`` is two int64 words
    that the kernel can reach (pinned host memory on a GPU).
    """
    n_rows, n_logical = running.shape
    _launch(
        _count_kernel, n_rows,
        (idx, running, counts, status, idx.numel(), chunk, n_logical),
        (_bins(n_logical), COUNT_BLOCK),
        num_warps=4,
    )  # fmt: skip


@_on_its_device
def sum_by_program(running: torch.Tensor, counts: torch.Tensor) -> None:
    """Turn ``running`` [n_sms, n_logical] int32 into running sums; ``counts`` gets the totals."""
    n_rows, n_logical = running.shape
    _launch(
        _running_sum_kernel, triton.cdiv(n_logical, SUM_EXPERTS),
        (running, counts, n_rows, n_logical), (SUM_ROWS, SUM_EXPERTS),
        num_warps=1,
    )  # fmt: skip


def _bins(n_logical: int) -> int:
    return max(16, int(triton.next_power_of_2(n_logical)))


@_on_its_device
def select(
    idx: torch.Tensor,
    out: torch.Tensor,
    running: torch.Tensor,
    cumulative: torch.Tensor,
    tables: SelectTables,
    chunk: int,
    rank: int,
) -> None:
    """Write physical ids of contiguous ``idx`` to ``out`` (same shape and dtype)."""
    n_rows, n_logical = running.shape
    _launch(
        _select_kernel, n_rows,
        (
            idx, out, running, cumulative, *tables,
            idx.numel(), chunk, n_logical, n_rows, rank,
        ),
        (_bins(n_logical), SELECT_BLOCK),
        num_warps=8,
    )  # fmt: skip
