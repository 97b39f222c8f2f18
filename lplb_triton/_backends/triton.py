"""The Triton back end: what its two solvers have in common."""

from __future__ import annotations

import torch

from lplb_triton import kernels
from lplb_triton._backends.base import Backend, chunk_size
from lplb_triton._backends.layer import Layer
from lplb_triton._backends.tables import DeviceTables
from lplb_triton._backends.time_arrays import make_cost_arrays
from lplb_triton._objective import choose_margin
from lplb_triton.costs import TimeCost

__all__ = ["TritonBackend"]


class TritonBackend(Backend):
    """Counting, selecting and reports by kernels.

    Attributes
    ----------
    report : torch.Tensor
        ``[2]`` int64 in host memory, to which kernels write what is wrong with their arguments.
    report_view : numpy.ndarray
        The same memory, which the host reads without a wait for the device.
    """

    def __init__(self, layer: Layer, *, dense: bool = False) -> None:
        device = layer.device
        ranks_per_node, slack = layer.locality
        tables = DeviceTables(
            layer.placement, device, kernels=True, dense=dense, time=layer.cost is not None,
            near=None if slack is None else ranks_per_node,
        )  # fmt: skip
        super().__init__(layer, tables)
        views = self.tables.views
        self._time_rules = None if layer.cost is None else self._make_time_rules(layer.cost)
        self.select_tables = kernels.SelectTables(
            *(views[name] for name in kernels.SelectTables._fields)
        )
        self.report = torch.zeros(
            2, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda"
        )
        self.report_view = self.report.numpy()

    @property
    def checks_on_host(self) -> bool:
        """See `Backend.checks_on_host`."""
        return self.layer.device.type == "cpu"

    def count(self, idx: torch.Tensor, n_sms: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.count`."""
        self.raise_on_report()
        self.check_values(idx)
        return self.count_by_program(idx, n_sms)

    def count_by_program(self, idx: torch.Tensor, n_sms: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Count contiguous ids whose values have been checked or are reported by the kernel."""
        n_logical, device = self.layer.placement.n_logical, self.layer.device
        running = torch.empty(n_sms, n_logical, dtype=torch.int32, device=device)
        counts = torch.empty(n_logical, dtype=torch.int32, device=device)
        chunk = chunk_size(idx.numel(), n_sms)
        kernels.count_by_program(idx, running, counts, self.report, chunk)
        kernels.sum_by_program(running, counts)
        return counts, running

    def select(
        self, idx: torch.Tensor, cumulative: torch.Tensor, running: torch.Tensor
    ) -> torch.Tensor:
        """See `Backend.select`."""
        self.check_selection(idx, cumulative, running)
        self.raise_on_report()
        return self.select_by_program(idx, cumulative, running.contiguous())

    def select_by_program(
        self, idx: torch.Tensor, cumulative: torch.Tensor, running: torch.Tensor
    ) -> torch.Tensor:
        """Select for arguments whose values have been checked or are reported by the kernel."""
        out = torch.empty_like(idx)
        kernels.select(
            idx, out, running, cumulative, self.select_tables, self.report,
            chunk_size(idx.numel(), len(running)), self.layer.rank,
        )  # fmt: skip
        return out

    def quotas_of(
        self,
        gathered: torch.Tensor,
        mine: torch.Tensor,
        traffic: torch.Tensor,
        live: kernels.Live | None = None,
    ) -> kernels.Quotas:
        """Return the arguments by which quotas are divided among the communicator's ranks."""
        layer = self.layer
        if layer.communicator is None:
            raise RuntimeError("quotas of all ranks need a communicator")
        p, views = layer.placement, self.tables.views
        return kernels.Quotas(
            gathered, views["copy_start"], views["copy_slot"], views["copy_index"], mine,
            traffic, layer.rank, p.slots_per_rank,
            layer.locality.ranks_per_node or layer.communicator.ranks_per_node,
            p.redundant_per_group + 1 + (p.ep_size if p.live_per_rank else 0),
            None if live is None else live.copies,
        )  # fmt: skip

    def _make_time_rules(self, cost: TimeCost) -> kernels.TimeRules:
        """Copy a cost to the device."""
        layer = self.layer
        table, slopes = (
            torch.from_numpy(values).to(layer.device)
            for values in make_cost_arrays(cost, layer.placement.static_per_rank)
        )
        margin = choose_margin(layer.quotas)
        return kernels.TimeRules(table, slopes, cost.sides, cost.wide_from, margin)

    def time_plan_shape(self) -> tuple[int, int, int]:
        """Return the shape of the scratch of plans by time, int32."""
        p = self.layer.placement
        return p.n_group, kernels.TIME_PLANS, p.group_size * p.static_per_rank

    def make_time_plan(
        self, scratch: torch.Tensor | None = None, times: torch.Tensor | None = None
    ) -> kernels.TimePlan | None:
        """Return what plans by time take besides counts and shares; None without a cost.

        ``scratch`` has the shape of `time_plan_shape`, by default new memory. ``times`` stand for
        the layer's own.
        """
        layer, rules = self.layer, self._time_rules
        if rules is None or layer.times is None:
            return None
        views = self.tables.views
        tables = kernels.TimeTables(*(views[name] for name in kernels.TimeTables._fields))
        if scratch is None:
            shape = self.time_plan_shape()
            scratch = torch.empty(shape, dtype=torch.int32, device=layer.device)
        return kernels.TimePlan(tables, rules, scratch, layer.times if times is None else times)

    def near_scratch_shape(self) -> tuple[int, int, int]:
        """Return the shape of the scratch of near plans, int32."""
        p = self.layer.placement
        return p.n_group, kernels.NEAR_ROWS, p.group_size * p.static_per_rank

    def make_near_plan(
        self, scratch: torch.Tensor | None = None, numbers: torch.Tensor | None = None
    ) -> kernels.NearPlan | None:
        """Return what near plans take besides counts and the LP's plan; None without them.

        ``scratch`` has the shape of `near_scratch_shape`, by default new memory. ``numbers`` stand
        for the layer's own.
        """
        layer, (ranks_per_node, slack) = self.layer, self.layer.locality
        if slack is None or ranks_per_node is None or layer.node_traffic is None:
            return None
        views = self.tables.views
        tables = kernels.NearTables(*(views[name] for name in kernels.NearTables._fields))
        if scratch is None:
            shape = self.near_scratch_shape()
            scratch = torch.empty(shape, dtype=torch.int32, device=layer.device)
        numbers = layer.node_traffic if numbers is None else numbers
        return kernels.NearPlan(tables, scratch, numbers, slack, ranks_per_node)

    def plan_by_time(
        self, counts: torch.Tensor, cumulative: torch.Tensor, status: torch.Tensor
    ) -> torch.Tensor:
        """See `Backend.plan_by_time`."""
        plan = self.make_time_plan()
        if plan is None:
            raise RuntimeError("the balancer has no cost")
        kernels.plan_time(counts, cumulative, status, plan)
        return cumulative

    def warmup(self) -> None:
        """See `Backend.warmup`."""
        layer = self.layer
        counters = torch.zeros(3, 1, dtype=torch.int64, device=layer.device)
        narrow = torch.zeros(1, dtype=torch.int32, device=layer.device)
        self.warmup_kernels(counters, narrow)
        if layer.communicator is not None:
            layer.communicator.prepare(layer.placement.n_logical)
        if layer.device.type == "cuda":
            torch.cuda.synchronize(layer.device)

    def warmup_kernels(self, counters: torch.Tensor, narrow: torch.Tensor) -> None:
        """Launch every kernel of `balance` once, for int32 and int64 ids and counters.

        ``counters`` are three int64 counters that stand for the layer's own, ``narrow`` is an
        int32 one that stands for a caller's.
        """
        raise NotImplementedError

    def warmup_ids(self, dtype: torch.dtype) -> torch.Tensor:
        """Return two ids to warm kernels up with."""
        idx = torch.arange(2, device=self.layer.device).to(dtype)
        return idx % self.layer.placement.n_logical

    def raise_on_report(self) -> None:
        """See `Backend.raise_on_report`."""
        if self.report_view[0]:
            self.raise_for_input(kernels.read_report(self.report_view))

    def raise_for_input(self, what: str | None) -> None:
        """Raise the error about the argument ``what`` of an earlier call."""
        if what == "idx":
            raise RuntimeError(
                f"idx held {int(self.report_view[1])}, outside "
                f"[-1, {self.layer.placement.n_logical}), in an earlier call; such ids became -1"
            )
        if what == "counts":
            if self.layer.communicator is not None:
                # If the exchange has failed, the communicator's own error says more.
                self.layer.communicator.check()
            raise RuntimeError(
                "counts, or their sums over the ranks, were outside [0, 2**31) in an earlier call; "
                "its plan was the even split, with status INVALID"
            )
        if what == "running":
            raise RuntimeError(
                "running (of a Planner: local_workload_by_sm) didn't end with the counts of idx in "
                "an earlier call of select"
            )
        raise RuntimeError(
            "cumulative (of a Planner: o_weight) held no shares in an earlier call of select"
        )
