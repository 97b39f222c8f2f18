"""A whole batch as a few launches on fixed buffers, prepared once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from lplb_triton.kernels.count import (
    COUNT_CHUNK_AT,
    COUNT_IDX_AT,
    COUNT_N_IDS_AT,
    count_call,
    sum_call,
)
from lplb_triton.kernels.exchange import FIRST_CHANNEL, Channel, Exchange
from lplb_triton.kernels.launch import (
    KernelCall,
    PreparedKernel,
    compile_calls,
    is_interpreted,
    is_profiled,
    launch_call,
    use_device,
)
from lplb_triton.kernels.live.launch import Live
from lplb_triton.kernels.metrics import BatchMetrics
from lplb_triton.kernels.near.launch import NearPlan, plan_near_call
from lplb_triton.kernels.quotas import Quotas, divide_call
from lplb_triton.kernels.select import (
    SELECT_CHUNK_AT,
    SELECT_IDX_AT,
    SELECT_N_IDS_AT,
    SELECT_OUT_AT,
    SelectTables,
    select_call,
)
from lplb_triton.kernels.solve.launch import (
    CERTIFIED_AT,
    CHANNEL_FROM_END,
    LIVE_OUT_FROM_END,
    OPENING_FROM_END,
    SOLVES_AT,
    UNCERTIFIED_AT,
    Settings,
    SolveBuffers,
    SolveTables,
    solve_counts_call,
)
from lplb_triton.kernels.time.launch import TimePlan, plan_time_call


class Pipeline:
    """Count, solve and select on fixed buffers: three launches.

    With ``quotas`` there is one more, and with ``time`` or ``near``.

    Counts may be summed over ranks within the second launch (``exchange``), or by the caller
    between two launches; the latter takes one more launch, which sums this rank's own counts.

    On GPUs that support it, solve, the plan that is made of its own, and select start early and do
    what needs no counts or shares.

    Parameters
    ----------
    running, report, rank
        As for `count_by_program`, `solve_counts` and `select`.
    buffers, solve_tables, select_tables
        As for `solve_counts` and `select`; they must stay where they are.
    exchange : Exchange or None
        Of counts with other ranks; only for one group.
    quotas : Quotas or None
        Of all ranks, for shares that are divided by the counts that are gathered.
    live : Live or None
        For a placement with live slots; ``out`` of it is replaced in each run.
    metrics : BatchMetrics or None
        Sums that each run adds to; ``live_out`` of it is replaced likewise.
    time : TimePlan or None
        Replaces the shares of the solve by those of a plan by time.
    near : NearPlan or None
        Replaces them by those of a plan that keeps tokens near; needs ``quotas``.
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
        live: Live | None = None,
        metrics: BatchMetrics | None = None,
        time: TimePlan | None = None,
        near: NearPlan | None = None,
    ) -> None:
        self._metrics, self._time, self._near = metrics, time, near
        self._running, self._report, self._buffers = running, report, buffers
        self._solve_tables, self._select_tables, self._rank = solve_tables, select_tables, rank
        self._exchange, self._quotas, self._live = exchange, quotas, live
        self._device = running.device.index
        if not is_interpreted():
            self._current_stream = triton.runtime.driver.active.get_current_stream
        self._prepared: dict[
            tuple[torch.dtype, torch.dtype, float, int, int], list[PreparedKernel]
        ] = {}

    def run(
        self,
        idx: torch.Tensor,
        out: torch.Tensor,
        chunk: int,
        settings: Settings,
        channel: Channel = FIRST_CHANNEL,
        between: Callable[[], None] | None = None,
        live_out: torch.Tensor | None = None,
    ) -> None:
        """Write physical ids of contiguous ``idx`` to ``out``.

        ``channel`` is the exchange's. ``between`` takes the place of an exchange: it is called
        once this rank's counts are in the last row of ``running``, and leaves totals in
        ``buffers.counts``; both on the current stream. ``live_out`` is `Live.out` of this run.
        """
        if live_out is not None and self._live is not None:
            self._live = self._live._replace(out=live_out)
            if self._metrics is not None:
                self._metrics = self._metrics._replace(live_out=live_out)
        n_first = 1 if between is None else 2
        key = idx.dtype, settings.certified.dtype, *settings[3:], n_first
        prepared = self._prepared.get(key)
        if prepared is None:
            calls = self._calls(idx, out, chunk, settings, channel, between is not None)
            if is_interpreted():
                for at, (call, _) in enumerate(calls):
                    if at == n_first and between is not None:
                        between()
                    launch_call(call)
                return
            compiled = compile_calls([call for call, _ in calls])
            prepared = self._prepared[key] = [
                PreparedKernel(call, kernel, early)
                for (call, early), kernel in zip(calls, compiled, strict=True)
            ]
        count, solve, select = prepared[0], prepared[n_first], prepared[-1]
        ids, n_ids = idx.data_ptr(), idx.numel()
        count.args[COUNT_IDX_AT] = ids
        count.args[COUNT_N_IDS_AT], count.args[COUNT_CHUNK_AT] = n_ids, chunk
        solve.args[CERTIFIED_AT] = settings.certified.data_ptr()
        solve.args[SOLVES_AT] = settings.solves.data_ptr()
        solve.args[UNCERTIFIED_AT] = settings.uncertified.data_ptr()
        solve.args[solve.n_args - OPENING_FROM_END] = channel.opening
        solve.args[solve.n_args - CHANNEL_FROM_END] = channel.number
        if live_out is not None:
            solve.args[solve.n_args - LIVE_OUT_FROM_END] = live_out.data_ptr()
            select.args[select.n_args - 1] = live_out.data_ptr()
        select.args[SELECT_IDX_AT], select.args[SELECT_OUT_AT] = ids, out.data_ptr()
        select.args[SELECT_N_IDS_AT], select.args[SELECT_CHUNK_AT] = n_ids, chunk
        stream, profiled = self._current_stream(self._device), is_profiled()
        with use_device(self._device):
            for kernel in prepared[:n_first]:
                kernel.launch(stream, profiled)
            if between is not None:
                between()
            for kernel in prepared[n_first:]:
                kernel.launch(stream, profiled)

    def _calls(
        self,
        idx: torch.Tensor,
        out: torch.Tensor,
        chunk: int,
        settings: Settings,
        channel: Channel,
        split: bool,
    ) -> list[tuple[KernelCall, bool]]:
        """Prepare all launches; returns them and whether each may start early.

        A kernel may start early only if it waits by itself for the one before, and only behind
        a kernel that lets it start. ``split`` is whether the caller sums counts in between.
        """
        running, buffers = self._running, self._buffers
        calls = [(count_call(idx, running, buffers.counts, self._report, chunk), False)]
        fixed = buffers, self._solve_tables, settings, self._report
        if split:
            calls.append((sum_call(running, buffers.counts), False))
            calls.append((solve_counts_call(None, *fixed, live=self._live), False))
        else:
            solve = solve_counts_call(running, *fixed, self._exchange, channel, self._live)
            calls.append((solve, True))
        cumulative = buffers.cumulative
        counts = buffers.counts if self._exchange is None else self._exchange.total
        if self._time is not None:
            calls.append((plan_time_call(counts, cumulative, buffers.ints[1], self._time), True))
        if self._near is not None and self._quotas is not None:
            near = plan_near_call(
                self._quotas.gathered, counts, cumulative, buffers.stats, buffers.ints[1],
                self._near,
            )  # fmt: skip
            calls.append((near, True))
        if self._quotas is not None:
            calls.append((divide_call(cumulative, self._quotas), False))
            cumulative = self._quotas.mine
        select = select_call(
            idx, out, running, cumulative, self._select_tables, self._report, chunk, self._rank,
            live=None if self._live is None else self._live.copies, metrics=self._metrics,
        )  # fmt: skip
        calls.append((select, self._quotas is None))
        return calls
