"""A whole batch as a few launches on fixed buffers, prepared once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from lplb_triton.kernels.launch import (
    FIRST_CHANNEL,
    FIRST_TABLES,
    Channel,
    Exchange,
    SelectTables,
    Settings,
    SolveBuffers,
    SolveTables,
    _Call,
    _compile,
    _count_call,
    _current,
    _is_profiled,
    _launch,
    _Prepared,
    _select_call,
    _solve_counts_call,
    _sum_call,
    is_interpreted,
)
from lplb_triton.kernels.launch_sync import Quotas, _divide_call

# Where `Pipeline.run` finds the arguments that change from call to call.
SETTINGS_AT = 2 + FIRST_TABLES + len(SolveBuffers._fields) - 1
CHOICE_AT = 5 + len(SelectTables._fields)


class Pipeline:
    """Count, solve and select on fixed buffers: three launches, four with ``quotas``.

    Counts are summed over ranks by nobody, within the second launch (``exchange``), or between
    two launches by the caller; this adds a launch that sums each rank's own.

    On GPUs that can, solve and select start early and do what needs no counts or shares.

    Parameters
    ----------
    running, report, rank
        As for `count_by_program`, `solve_counts` and `select`.
    buffers, solve_tables, select_tables
        As for `solve_counts` and `select`; they must stay where they are.
    exchange : Exchange or None
        With other ranks; only for one group.
    quotas : Quotas or None
        Of all ranks, to be divided by what is gathered.
    """

    def __init__(
        self,
        running: torch.Tensor,
        report: torch.Tensor,
        buffers: SolveBuffers,
        solve_tables: SolveTables,
        select_tables: SelectTables,
        rank: int,
        exchange: Exchange | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self._running, self._report, self._buffers = running, report, buffers
        self._solve_tables, self._select_tables, self._rank = solve_tables, select_tables, rank
        self._exchange, self._quotas = exchange, quotas
        self._device = running.device.index
        if not is_interpreted():
            self._current_stream = triton.runtime.driver.active.get_current_stream
        self._prepared: dict[tuple[torch.dtype, torch.dtype, float, int, int], list[_Prepared]] = {}

    def run(
        self,
        idx: torch.Tensor,
        out: torch.Tensor,
        chunk: int,
        settings: Settings,
        channel: Channel = FIRST_CHANNEL,
        between: Callable[[], None] | None = None,
    ) -> None:
        """Write physical ids of contiguous ``idx`` to ``out``.

        ``channel`` is the exchange's. ``between``, which takes its place, is called once this
        rank's counts are in the last row of ``running``, and leaves totals in
        ``buffers.counts``; both on the current stream.
        """
        n_first = 1 if between is None else 2
        key = idx.dtype, settings.certified.dtype, *settings[3:], n_first
        prepared = self._prepared.get(key)
        if prepared is None:
            calls = self._calls(idx, out, chunk, settings, channel, between is not None)
            if is_interpreted():
                for at, (call, _) in enumerate(calls):
                    if at == n_first and between is not None:
                        between()
                    _launch(call)
                return
            compiled = _compile([call for call, _ in calls])
            prepared = self._prepared[key] = [
                _Prepared(call, kernel, early)
                for (call, early), kernel in zip(calls, compiled, strict=True)
            ]
        count, solve, choose = prepared[0], prepared[n_first], prepared[-1]
        ids, n_ids = idx.data_ptr(), idx.numel()
        count.args[0], count.args[4], count.args[5] = ids, n_ids, chunk
        solve.args[SETTINGS_AT] = settings.certified.data_ptr()
        solve.args[SETTINGS_AT + 1] = settings.solves.data_ptr()
        solve.args[SETTINGS_AT + 2] = settings.uncertified.data_ptr()
        solve.args[solve.n_args - 2] = channel.opening
        solve.args[solve.n_args - 1] = channel.number
        choose.args[0], choose.args[1] = ids, out.data_ptr()
        choose.args[CHOICE_AT], choose.args[CHOICE_AT + 1] = n_ids, chunk
        stream, profiled = self._current_stream(self._device), _is_profiled()
        with _current(self._device):
            for kernel in prepared[:n_first]:
                kernel.launch(stream, profiled)
            if between is not None:
                between()
            for kernel in prepared[n_first:]:
                kernel.launch(stream, profiled)

    def _calls(
        self, idx: torch.Tensor, out: torch.Tensor, chunk: int, settings: Settings,
        channel: Channel, split: bool,
    ) -> list[tuple[_Call, bool]]:  # fmt: skip
        """All launches, and whether they may start early.

        Only a kernel that waits by itself for the one before may, and only behind one that lets
        it start.
        """
        running, buffers = self._running, self._buffers
        calls = [(_count_call(idx, running, buffers.counts, self._report, chunk), False)]
        fixed = buffers, self._solve_tables, settings, self._report
        if split:
            calls.append((_sum_call(running, buffers.counts), False))
            calls.append((_solve_counts_call(None, *fixed), False))
        else:
            solve = _solve_counts_call(running, *fixed, self._exchange, channel)
            calls.append((solve, True))
        cumulative = buffers.cumulative
        if self._quotas is not None:
            calls.append((_divide_call(cumulative, self._quotas), False))
            cumulative = self._quotas.mine
        select = _select_call(
            idx, out, running, cumulative, self._select_tables, self._report, chunk, self._rank
        )
        calls.append((select, self._quotas is None))
        return calls
