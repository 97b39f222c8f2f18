"""The torch back end, which takes placements of any size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lplb_triton import reference
from lplb_triton._backends.base import Backend, chunk_size
from lplb_triton._backends.counters import add_metrics, count_statuses
from lplb_triton._backends.layer import Layer
from lplb_triton._backends.tables import DeviceTables
from lplb_triton._layout import Metric
from lplb_triton._objective import choose_margin
from lplb_triton.placement import Placement
from lplb_triton.reference import levelling
from lplb_triton.reference.live import LiveCase, list_copies, plan_live
from lplb_triton.reference.near import plan_near, write_near_shares
from lplb_triton.reference.near_tables import NearTables, make_near_tables
from lplb_triton.reference.time import plan_time, write_shares
from lplb_triton.reference.time_tables import TimeTables, make_time_tables
from lplb_triton.solution import Solution, Status
from lplb_triton.sync._base import message_version

__all__ = ["TorchBackend"]

# The torch function of each solver.
SOLVE_FUNCTIONS = {"levelling": levelling.solve, "interior_point": reference.solve}


class TorchBackend(Backend):
    """Every step in torch; solves in float64."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, DeviceTables(layer.placement, layer.device, kernels=False))
        # Tables of the placement that batches were last planned by time for.
        self._time_tables: tuple[Placement, list[TimeTables]] | None = None
        # The same of near plans.
        self._near_tables: tuple[Placement, list[NearTables]] | None = None

    @property
    def checks_on_host(self) -> bool:
        """See `Backend.checks_on_host`."""
        return True

    def count(self, idx: torch.Tensor, n_sms: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.count`."""
        self.check_values(idx)
        n_logical = self.layer.placement.n_logical
        return reference.count_experts(idx, n_logical, chunk_size(idx.numel(), n_sms), n_sms)

    def balance(self, idx: torch.Tensor, certified: torch.Tensor, n_sms: int) -> torch.Tensor:
        """See `Backend.balance`."""
        self.check_values(idx)
        layer = self.layer
        counts, _ = reference.count_experts(idx, layer.placement.n_logical, max(1, idx.numel()), 1)
        total, gathered = counts, None
        if layer.communicator is not None:
            total = torch.empty_like(counts)
            if layer.quotas == "global":
                gathered = counts.new_empty(layer.placement.ep_size, layer.placement.n_logical)
            version = layer.version if layer.live_versions is None else layer.live_versions[:1]
            layer.communicator.exchange(counts, version, total, gathered)
        solution = self.solve(total, certified)
        self.record(total)
        cumulative = self.cumulative_shares(solution.shares)
        if layer.node_traffic is not None and gathered is not None:
            cumulative, solution = self._plan_near(gathered, cumulative, solution)
        home_rank = self.tables.views["home_rank"]
        add_metrics(layer.metrics, layer.placement, home_rank, total, solution)
        views = self.tables.views
        start, slot = views["copy_start"], views["copy_slot"]
        if layer.live is not None:
            start, slot, cumulative = self._plan_live_slots(total, cumulative, solution)
        if layer.cost is not None:
            cumulative = self.plan_by_time(total, cumulative, solution.status)
        if gathered is not None and layer.communicator is not None:
            holder = slot // layer.placement.slots_per_rank
            ranks_per_node = layer.locality.ranks_per_node or layer.communicator.ranks_per_node
            quotas, kept = reference.divide_quotas(
                gathered, cumulative, start, holder, ranks_per_node
            )
            cumulative = reference.shares_of_quotas(quotas[layer.rank], counts, start, layer.rank)
            layer.traffic += kept[layer.rank]
        return reference.assign_copies(idx, counts, cumulative, start, slot, layer.rank)

    def _plan_live_slots(
        self, counts: torch.Tensor, cumulative: torch.Tensor, solution: Solution
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Plan live slots on the host; returns first copies, slots and shares of all copies."""
        layer, p = self.layer, self.layer.placement
        if layer.live is None or layer.live_versions is None:
            raise RuntimeError("the placement has no live slots")
        copies = list_copies(p)
        case = LiveCase(p.ep_size, p.live_per_rank, *layer.live[:4])
        resident = None if layer.resident is None else layer.resident.cpu().numpy().copy()
        plan = plan_live(
            case,
            counts.cpu().numpy().astype(np.int64),
            cumulative.cpu().numpy().astype(np.int64),
            copies,
            float(solution.max_load),
            resident,
        )
        if layer.resident is not None:
            layer.resident.copy_(torch.from_numpy(plan.experts))
        mean = max(float(counts.sum()), 1.0) / p.ep_size
        layer.metrics[Metric.AFTER] += (plan.max_load - float(solution.max_load)) / mean
        held = np.full_like(plan.experts, -1) if resident is None else resident
        n_fetched = int(((plan.experts >= 0) & (plan.experts != held)).sum())
        layer.metrics[Metric.FETCHED] += n_fetched
        checksum = 0
        if plan.pieces or layer.resident is not None:
            checksum = message_version(str((plan.pieces, plan.experts.tolist())).encode())
        layer.live_versions.copy_(layer.version + checksum)
        numbers = np.array([plan.max_load, plan.bound, plan.gap], dtype=np.float32)
        experts = plan.experts.astype(np.int32).reshape(-1)
        words = np.concatenate([experts, numbers.view(np.int32), [np.int32(n_fetched)]])
        self.live_out = torch.from_numpy(words).to(layer.device)
        found = plan.copies.start, plan.copies.rank * p.slots_per_rank + plan.copies.place
        moved = [torch.from_numpy(a.astype(np.int32)) for a in (*found, plan.cumulative)]
        moved = [tensor.to(layer.device) for tensor in moved]
        return moved[0], moved[1], moved[2]

    def plan_by_time(
        self, counts: torch.Tensor, cumulative: torch.Tensor, status: torch.Tensor
    ) -> torch.Tensor:
        """See `Backend.plan_by_time`; plans on the host."""
        layer, p = self.layer, self.layer.placement
        if layer.cost is None or layer.times is None:
            raise RuntimeError("the balancer has no cost")
        if self._time_tables is None or self._time_tables[0] is not p:
            self._time_tables = p, make_time_tables(p)
        tokens = counts.cpu().numpy().astype(np.int64).clip(0)
        start = p.structure.copy_start.astype(np.int64)
        before = cumulative.cpu().numpy().astype(np.int64)
        after, found = before.copy(), []
        margin = choose_margin(layer.quotas)
        for tables, state in zip(self._time_tables[1], status.tolist(), strict=True):
            plan = plan_time(tables, layer.cost, tokens, before, start, margin)
            # Invalid counts keep the even split of the solve.
            if state != Status.INVALID:
                write_shares(tables, plan, tokens, after, start)
            found.append([*plan.times.tolist(), float(plan.choice)])
        layer.times.copy_(torch.tensor(found, dtype=torch.float32, device="cpu"))
        return torch.from_numpy(after.astype(np.int32)).to(layer.device)

    def _plan_near(
        self, gathered: torch.Tensor, cumulative: torch.Tensor, solution: Solution
    ) -> tuple[torch.Tensor, Solution]:
        """Plan a batch near its tokens on the host; returns shares and new loads."""
        layer, p = self.layer, self.layer.placement
        ranks_per_node, slack = layer.locality
        if slack is None or ranks_per_node is None or layer.node_traffic is None:
            raise RuntimeError("the balancer has no locality")
        if self._near_tables is None or self._near_tables[0] is not p:
            self._near_tables = p, make_near_tables(p, ranks_per_node)
        tokens = gathered.cpu().numpy().astype(np.int64)
        start = p.structure.copy_start.astype(np.int64)
        before = cumulative.cpu().numpy().astype(np.int64)
        after, numbers = before.copy(), np.zeros(layer.node_traffic.shape, dtype=np.float32)
        largest = solution.max_load.clone()
        for group, tables in enumerate(self._near_tables[1]):
            bound = float(solution.lower_bound[group])
            plan = plan_near(tables, tokens, before, start, bound, slack)
            if plan is None or int(solution.status[group]) == Status.INVALID:
                continue
            write_near_shares(tables, plan, after)
            numbers[group] = plan.numbers
            if plan.choice:
                largest[group] = float(plan.max_load)
        layer.node_traffic.copy_(torch.from_numpy(numbers))
        gap = (largest - solution.lower_bound) / largest
        gap = torch.where(largest == solution.max_load, solution.gap, gap)
        shares = torch.from_numpy(after.astype(np.int32)).to(layer.device)
        return shares, replace(solution, max_load=largest, gap=gap)

    def solve(self, counts: torch.Tensor, certified: torch.Tensor) -> Solution:
        """See `Backend.solve`."""
        layer = self.layer
        if counts.device.type == "cpu" and bool((counts < 0).any()):
            raise ValueError("counts, summed over the ranks, must be below 2**31")
        solution = SOLVE_FUNCTIONS[layer.solver](
            layer.placement.problem(counts), layer.tolerance, layer.max_iterations, torch.float64
        )
        count_statuses(solution.status, certified, layer.solves, layer.uncertified)
        return solution

    def select(
        self, idx: torch.Tensor, cumulative: torch.Tensor, running: torch.Tensor
    ) -> torch.Tensor:
        """See `Backend.select`."""
        self.check_selection(idx, cumulative, running)
        views = self.tables.views
        return reference.assign_copies(
            idx, running[-1], cumulative, views["copy_start"], views["copy_slot"], self.layer.rank
        )
