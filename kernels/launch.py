"""Launchers: sizes and configurations for every kernel, nothing of the method itself."""

from __future__ import annotations

import copy
import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from lplb_triton.kernels.driver import DriverLaunch, UnsupportedError
from lplb_triton.kernels.solve.counts_kernel import solve_counts_kernel
from lplb_triton.kernels.solve.dense_kernel import solve_dense_kernel
from lplb_triton.kernels.solve.spread_kernel import spread_kernel
from lplb_triton.kernels.tokens import (
    BAD_COUNTS,
    BAD_CUMULATIVE,
    BAD_RUNNING,
    REPORT_ID,
    REPORT_INPUT,
    _count_kernel,
    _running_sum_kernel,
    _select_kernel,
)

# Ids that one program handles at a time. The select kernel compares all pairs of a block.
COUNT_BLOCK = 256
SELECT_BLOCK = 256
# Rows and experts of one program that sums counts.
SUM_ROWS = 256
SUM_EXPERTS = 4
# Shares that one program spreads.
SPREAD_BLOCK = 512
# Counts that one pass of an exchange between ranks handles.
EXCHANGE_BLOCK = 256

# What kernels report of inputs that aren't ids.
REPORTED_INPUTS = {
    int(BAD_COUNTS.value): "counts",
    int(BAD_RUNNING.value): "running",
    int(BAD_CUMULATIVE.value): "cumulative",
}

# Compiled kernels by what they were compiled for. Triton's own launch looks at every argument
# anew; nothing here is specialised on values or alignment, so the dtypes say it all.
_compiled: dict[tuple[Any, ...], Any] = {}


class _Call(NamedTuple):
    """A kernel and all that a launch of it needs.

    ``args`` are the run-time arguments, a tensor first, ``constants`` the compile-time ones,
    which every kernel here takes last.
    """

    kernel: Any
    grid: int
    args: tuple[Any, ...]
    constants: tuple[int | bool, ...]
    options: dict[str, Any]


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    """Whether a kernel can start before the one ahead of it has ended, in a graph too.

    Needs Hopper or newer, and a driver of CUDA 12.3, whose graphs have such edges.
    """
    if device.type != "cuda" or is_interpreted() or torch.version.hip is not None:
        return False
    version = ctypes.c_int()
    failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    recent = not failed and version.value >= 12030
    return recent and torch.cuda.get_device_capability(device) >= (9, 0)


def _current(device: int | None) -> AbstractContextManager[object]:
    """Make a GPU the current one, since Triton launches there."""
    if device is None or device == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _is_profiled() -> bool:
    """Whether somebody wants to be told of launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def _key(call: _Call) -> tuple[Any, ...]:
    dtypes = tuple([a.dtype for a in call.args if isinstance(a, torch.Tensor)])
    return call.kernel, call.args[0].device.index, call.constants, dtypes


def _build(call: _Call) -> Any:
    with _current(call.args[0].device.index):
        args, grid = (*call.args, *call.constants), (call.grid,)
        return call.kernel.warmup(*args, grid=grid, **call.options)


def _compile(calls: Sequence[_Call]) -> list[Any]:
    """Compiled kernels of these calls; those that are new are compiled side by side."""
    new = {key: call for call in calls if (key := _key(call)) not in _compiled}
    if new:
        with ThreadPoolExecutor(len(new)) as pool:
            _compiled.update(zip(new, pool.map(_build, new.values()), strict=True))
    return [_compiled[_key(call)] for call in calls]


def _launch(call: _Call) -> None:
    """Launch on the GPU of the tensors and its current stream, compiled on the first call."""
    kernel, grid, args, constants, _ = call
    if isinstance(kernel, InterpretedFunction):
        kernel[(grid,)](*args, *constants)
        return
    device = args[0].device.index
    compiled = _compiled.get(_key(call)) or _compile([call])[0]
    with _current(device):
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled[(grid, 1, 1)](*args, *constants, stream=stream)


class _Prepared:
    """A compiled kernel with its arguments, ready to launch.

    ``args`` takes other addresses and integers between launches; no tensor is kept. With
    ``early`` the kernel may start before the one ahead of it in its stream has ended, where the
    GPU can do that (programmatic dependent launch); it has to wait for that one by itself.
    """

    args: Any

    def __init__(self, call: _Call, compiled: Any, early: bool) -> None:
        self.n_args = len(call.args)
        self._grid, self._constants, self._compiled = call.grid, call.constants, compiled
        early = early and _has_pdl(call.args[0].device)
        self._direct: DriverLaunch | None = None
        if torch.version.hip is None:
            with _current(call.args[0].device.index), suppress(UnsupportedError):
                self._direct = DriverLaunch(compiled, call.args, call.grid, early)
                self.args = self._direct.words
        if self._direct is None:
            self.args = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in call.args]
            # The launcher, not the code, holds the attribute: the same code serves both ways.
            self._launcher = copy.copy(compiled.run)
            self._launcher.launch_pdl = early

    def launch(self, stream: int, profiled: bool) -> None:
        """Launch on a stream of the current device; ``profiled`` as `_is_profiled` says."""
        if profiled:
            # Triton's own way gathers what the hooks are told.
            args = self.args if self._direct is None else self._direct.values()
            grid = self._grid, 1, 1
            self._compiled[grid](*args, *self._constants, stream=stream)
        elif self._direct is not None:
            self._direct.launch(stream)
        else:
            compiled = self._compiled
            self._launcher(
                self._grid, 1, 1, stream, compiled.function, compiled.packed_metadata,
                None, None, None, *self.args, *self._constants,
            )  # fmt: skip


class SolveTables(NamedTuple):
    """Device tables that the counts solver reads, int32; experts as in ``placement.Structure``.

    A group's cells, the shares of its columns on their ranks, are numbered by column, then by rank,
    and there are at most as many as copies of replicated experts, ``n_shared``. -1 is padding.
    """

    rank_experts: torch.Tensor
    """[n_group, group_size, slots_per_rank] experts of each rank's slots, once each on a rank."""
    rank_parts: torch.Tensor
    """float32 likewise: which part of their load an even split over ranks leaves there."""
    extents: torch.Tensor
    """[n_group, 8] number of cells, most members of a column, most cells of a column and of a rank,
    most copies of an expert on a rank, number of classes of edges, most sweeps over them, whether
    the group is in ``pairs``."""
    pairs: torch.Tensor
    """[n_group, classes of edges, group_size] int64 as for `load_pairs`; none if the first
    placement isn't of that kind."""
    cells: torch.Tensor
    """[n_group, 4, n_shared] rank and column of each cell, that column's first cell and number of
    cells."""
    cell_start: torch.Tensor
    """[n_group, max_columns + 1] first cell of each column."""
    rows: torch.Tensor
    """[n_group, 12 n_rows], one after the other: [n_rows, 8] ranks of each row's cells, -1 for
    none, and by row, [n_rows] each, its first cell, the first row of the column, how many cells
    that has (0 where there is no row), and the column. There are as many rows as redundant slots,
    at least one."""
    rank_cells: torch.Tensor
    """[n_group, n, group_size] each rank's cells, -1 after the last; n is a multiple of eight."""
    first_members: torch.Tensor
    """[n_group, n, max_columns] first members of each column."""
    first_ranks: torch.Tensor
    """[n_group, 4, max_columns] ranks of the first cells of each column, -1 where there is none."""
    column_start: torch.Tensor
    column_members: torch.Tensor
    shared_copies: torch.Tensor
    """[n_group, n_shared] copies of replicated experts."""
    shared_cells: torch.Tensor
    """[n_group, n_shared] their cells, -1 if one rank holds all copies."""
    copy_index: torch.Tensor
    copy_multiplicity: torch.Tensor
    edges: torch.Tensor
    """[n_group, most_classes + 1, width] int64 as for `levelling.sweep`."""
    copy_parts: torch.Tensor
    """float32 as ``rank_parts``, for an even split over copies."""
    slot_cells: torch.Tensor
    """Cells of ``rank_experts``, -1 if one rank holds all copies."""


# Those that every solve reads come first among a kernel's arguments, together with all else that it
# needs: arguments are read through a cache, line by line.
FIRST_TABLES = 4


class SpreadTables(NamedTuple):
    """Device tables that tell where a dense plan's shares are among those by copy, int32."""

    cell_number: torch.Tensor
    """[n_group, max_columns, group_size] which cell is where, -1 where none is."""
    cell_ends: torch.Tensor
    """[n_group, 2, n_shared] the last copy in each cell of its column's first expert, and the copy
    before the first, -1 if there is none."""


class SelectTables(NamedTuple):
    """Device tables that the select kernel reads."""

    copy_start: torch.Tensor
    copy_slot: torch.Tensor
    search_steps: torch.Tensor


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, under Triton's interpreter."""
    return isinstance(solve_dense_kernel, InterpretedFunction)


def _tile(n_ranks: int, n_columns: int) -> tuple[int, int]:
    """Pad the tile of a group: whole warps of columns, and two blocks of four pivots."""
    return max(8, triton.next_power_of_2(n_ranks)), max(32, triton.next_power_of_2(n_columns))


def _newton_warps(ranks: int, columns: int) -> int:
    """Warps for `solve`: the quickest of those tried on an H100."""
    if ranks == 8:
        return min(8, columns // 32)
    if ranks <= 32:
        return 4 if columns <= 64 else 8
    return 8 if ranks == 64 and columns <= 64 else 16


def _solve_warps(ranks: int, rows: int) -> int:
    """Warps for `solve_counts`: what was best on an H200, more where tiles of rows are large."""
    warps = 4 if ranks <= 64 else 8 if ranks <= 256 else 16
    return min(16, max(warps, rows // 64))


def _solve_options(warps: int) -> dict[str, Any]:
    """Compile with that many warps, every register that each may have, and no fused products.

    Left to itself ptxas takes half of the registers for the largest tiles, and spills. A thread
    that fuses its own product into a sum over lanes rounds differently from the lane that sends
    it. All threads must hold the same bits: they take the same branches by them. No loop here has
    loads that are worth a pipeline, which takes time to find out.
    """
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False, "num_stages": 1}
    if warps == 16 and torch.version.hip is None:
        options["maxnreg"] = 128
    return options


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
        sizes = _tile(n_ranks, n_columns)
        stride = 0 if mask.shape[0] == 1 else n_ranks * n_columns
        first = shares if start is None else start.to(torch.float32).contiguous()
        args = (
            weights, fixed, mask, stride, first, shares, stats, ints,
            tolerance, max_iterations, n_ranks, n_columns,
        )  # fmt: skip
        options = _solve_options(_newton_warps(*sizes))
        _launch(_Call(solve_dense_kernel, batch, args, (*sizes, start is not None), options))
    return shares, stats[0], stats[1], stats[2], ints[0], ints[1]


class SolveBuffers(NamedTuple):
    """What a solve from counts writes.

    ``counts`` [n_logical], ``cumulative`` [n_physical], ``stats`` [3, n_group] float32, ``ints``
    [2, n_group], ``scratch`` [n_group, `solve_scratch`] float32; int32 where nothing is said.
    """

    counts: torch.Tensor
    cumulative: torch.Tensor
    stats: torch.Tensor
    ints: torch.Tensor
    scratch: torch.Tensor


def solve_scratch(tables: SolveTables) -> int:
    """Words of scratch that a group takes: by rank, by column, by cell, by row, one per thread.

    The solving kernel computes this too.
    """
    n_ranks, n_shared = tables.rank_experts.shape[1], tables.shared_copies.shape[1]
    n_columns = tables.first_members.shape[2]
    rows = _padded_rows(n_shared)
    threads = 32 * _solve_warps(_tile(n_ranks, n_columns)[0], rows)
    return 4 * n_ranks + n_columns + 4 * n_shared + 2 * rows + threads


def _padded_rows(n_shared: int) -> int:
    """Rows of a group that may have so many shared copies, padded to whole warps."""
    return max(32, int(triton.next_power_of_2(max(1, n_shared // 2))))


class Settings(NamedTuple):
    """Numbers that a solve from counts takes; those in tensors are added to."""

    certified: torch.Tensor
    solves: torch.Tensor
    uncertified: torch.Tensor
    tolerance: float
    max_iterations: int


class Channel(NamedTuple):
    """Where an exchange happens: calls of one channel come in the same order on every rank."""

    number: int
    opening: int = 0
    """How the channel came to be, in 15 bits; the same on every rank."""


FIRST_CHANNEL = Channel(0)


class Exchange(NamedTuple):
    """One rank's side of an exchange of counts [n] with other ranks; docs/sync.md.

    ``total`` [n] int32 gets their sum, ``gathered`` [n_ranks, n] int32, where it is given, every
    rank's counts. ``addresses`` [n_ranks] int64 of the buffers, ``gates`` and ``epochs``
    [channels] int32, ``version`` [1] int32, ``status`` [`status_words`] int64 in memory that the
    host can read. ``capacity`` is the most counts that the buffers hold.
    """

    total: torch.Tensor
    gathered: torch.Tensor | None
    addresses: torch.Tensor
    gates: torch.Tensor
    epochs: torch.Tensor
    version: torch.Tensor
    status: torch.Tensor
    rank: int
    capacity: int
    timeout_ms: int

    def args(self, channel: Channel) -> tuple[Any, ...]:
        """Run-time arguments of a kernel that does the exchange, the channel's last."""
        gathered = self.total if self.gathered is None else self.gathered
        return (
            self.total, gathered, *self[2:7],
            self.rank, self.addresses.numel(), self.capacity, self.timeout_ms,
            channel.opening, channel.number,
        )  # fmt: skip

    def constants(self) -> tuple[int, ...]:
        """Channels, block, whether to gather, and whether this is a GPU."""
        return (
            self.gates.numel(),
            _exchange_block(self.total.numel()),
            int(self.gathered is not None),
            int(not is_interpreted()),
        )


def _exchange_block(n: int) -> int:
    # A tile of eight rows has a word for each of up to 512 threads.
    return min(EXCHANGE_BLOCK, max(64, _bins(n)))


def _solve_counts_call(
    running: torch.Tensor | None, buffers: SolveBuffers, tables: SolveTables, settings: Settings,
    report: torch.Tensor, exchange: Exchange | None = None, channel: Channel = FIRST_CHANNEL,
) -> _Call:  # fmt: skip
    n_group, n_ranks, n_slots = tables.rank_experts.shape
    _, n_members, n_columns = tables.first_members.shape
    n_shared = tables.shared_copies.shape[1]
    n_logical = buffers.counts.numel()
    ranks, columns = _tile(n_ranks, n_columns)
    slots, copies = triton.next_power_of_2(n_slots), triton.next_power_of_2(max(1, n_shared))
    n_sums = 0 if running is None else triton.cdiv(n_logical, SUM_EXPERTS)
    args = (
        buffers.counts if running is None else running, buffers.counts, *tables[:FIRST_TABLES],
        *buffers[1:], *settings, n_ranks, n_columns, n_slots, n_shared,
        n_logical, 0 if running is None else running.shape[0], n_sums,
        *tables.edges.shape[1:], *tables[FIRST_TABLES:], report,
        *(exchange.args(channel) if exchange else (*[buffers.counts] * 7, 0, 0, 0, 0, 0, 0)),
    )  # fmt: skip
    rows = _padded_rows(n_shared)
    warps = _solve_warps(ranks, rows)
    constants = (
        ranks, columns, rows, max(2, slots), max(32, copies), n_members,
        SUM_ROWS, SUM_EXPERTS, tables.pairs.shape[1], 32 * warps,
        _has_pdl(buffers.counts.device),
        *(exchange.constants() if exchange else (0, _exchange_block(n_logical), 0, 0)),
    )  # fmt: skip
    options = _solve_options(warps)
    return _Call(solve_counts_kernel, n_sums + n_group, args, constants, options)


def _count_call(
    idx: torch.Tensor, running: torch.Tensor, counts: torch.Tensor, report: torch.Tensor, chunk: int
) -> _Call:
    n_rows, n_logical = running.shape
    args = (idx, running, counts, report, idx.numel(), chunk, n_logical)
    constants = (_bins(n_logical), COUNT_BLOCK, _has_pdl(idx.device))
    return _Call(_count_kernel, n_rows, args, constants, {"num_warps": 2})


def _sum_call(running: torch.Tensor, counts: torch.Tensor) -> _Call:
    n_rows, n_logical = running.shape
    grid = triton.cdiv(n_logical, SUM_EXPERTS)
    args = (running, counts, n_rows, n_logical)
    return _Call(_running_sum_kernel, grid, args, (SUM_ROWS, SUM_EXPERTS), {"num_warps": 1})


def _select_call(
    idx: torch.Tensor, out: torch.Tensor, running: torch.Tensor, cumulative: torch.Tensor,
    tables: SelectTables, report: torch.Tensor, chunk: int, rank: int, check: bool = False,
) -> _Call:  # fmt: skip
    n_rows, n_logical = running.shape
    args = (
        idx, out, running, cumulative, *tables, report,
        idx.numel(), chunk, n_logical, n_rows, rank,
    )  # fmt: skip
    constants = (_bins(n_logical), SELECT_BLOCK, _has_pdl(idx.device), check)
    return _Call(_select_kernel, n_rows, args, constants, {"num_warps": 8})


def _bins(n_logical: int) -> int:
    return max(16, int(triton.next_power_of_2(n_logical)))


def solve_counts(
    running: torch.Tensor | None, buffers: SolveBuffers, tables: SolveTables, settings: Settings,
    report: torch.Tensor,
) -> None:  # fmt: skip
    """Solve every group of one batch from its counts by logical expert.

    ``buffers.counts`` are given, or with ``running`` [n_sms, n_logical] int32 (counts by
    program, as `count_by_program` leaves both) summed in the same launch. Negative counts make a
    group invalid, and ``report`` [2] int64 says so.
    """
    _launch(_solve_counts_call(running, buffers, tables, settings, report))


def read_report(report: Any) -> str | None:
    """Take one report out of the words that kernels write to, and clear it.

    ``report`` [2] int64 as numpy has it. Returns which input was bad: ``"idx"``, of which the
    second word is an example, ``"counts"``, ``"running"`` or ``"cumulative"``; None if none was.
    """
    flags = report[:1].view("int32")
    at = REPORT_ID.value if flags[REPORT_ID.value] else REPORT_INPUT.value
    what = int(flags[at])
    flags[at] = 0
    if at == REPORT_ID.value:
        return "idx"
    return REPORTED_INPUTS.get(what)


def spread_shares(cumulative: torch.Tensor, shares: torch.Tensor, tables: SpreadTables) -> None:
    """Write to ``shares`` [n_group, group_size, max_columns] float32 what copies of columns take.

    ``cumulative`` [n_physical] int32 as `solve_counts` leaves it.
    """
    n_group, n_ranks, n_columns = shares.shape
    grid = n_group * triton.cdiv(n_ranks * n_columns, SPREAD_BLOCK)
    args = (cumulative, *tables, shares, n_ranks, n_columns, tables.cell_ends.shape[2])
    if grid:
        _launch(_Call(spread_kernel, grid, args, (SPREAD_BLOCK,), {"num_warps": 4}))


def count_by_program(
    idx: torch.Tensor, running: torch.Tensor, counts: torch.Tensor, report: torch.Tensor, chunk: int
) -> None:
    """Count contiguous ``idx`` by chunk.

    ``running`` [n_sms, n_logical] int32 is written, and ``counts`` [n_logical] int32 becomes -1
    until `sum_by_program` or `solve_counts` has summed the rows; ``report`` [2] int64 is memory
    that kernel and host can reach (pinned on a GPU), see `read_report`.
    """
    _launch(_count_call(idx, running, counts, report, chunk))


def sum_by_program(running: torch.Tensor, counts: torch.Tensor) -> None:
    """Turn ``running`` [n_sms, n_logical] int32 into running sums; ``counts`` gets the totals."""
    _launch(_sum_call(running, counts))


def select(
    idx: torch.Tensor, out: torch.Tensor, running: torch.Tensor, cumulative: torch.Tensor,
    tables: SelectTables, report: torch.Tensor, chunk: int, rank: int,
) -> None:  # fmt: skip
    """Write physical ids of contiguous ``idx`` to ``out`` (same shape and dtype).

    If ``running`` or ``cumulative`` don't fit, ``report`` [2] int64 says so.
    """
    _launch(_select_call(idx, out, running, cumulative, tables, report, chunk, rank, check=True))
