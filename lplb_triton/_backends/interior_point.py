"""The Triton back end with the interior-point kernel, in a launch of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lplb_triton import kernels
from lplb_triton._backends.counters import add_metrics, add_to_counter, count_statuses
from lplb_triton._backends.layer import Layer
from lplb_triton._backends.triton import TritonBackend
from lplb_triton.placement import Placement
from lplb_triton.solution import Solution, Status

__all__ = ["InteriorPointBackend", "solve_counts"]

# Tokens of a copy are rounded to multiples of 2**-20, so that their sums are exact in any order.
TOKEN_BITS = 20


class InteriorPointBackend(TritonBackend):
    """Solves by the interior-point kernel, between kernels that count and select."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer, dense=True)
        on_gpu = layer.device.type == "cuda"
        # The interior-point kernel writes no report. Groups without a plan because of their counts
        # are counted on the device, copied to host memory, and compared with what was raised for.
        self._invalid = torch.zeros(1, dtype=torch.int64, device=layer.device)
        self._invalid_on_host = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._invalid_view = self._invalid_on_host.numpy()
        self._invalid_raised = 0

    def balance(self, idx: torch.Tensor, certified: torch.Tensor, n_sms: int) -> torch.Tensor:
        """See `Backend.balance`."""
        self.raise_on_report()
        self.check_values(idx)
        layer = self.layer
        exchange = None if layer.communicator is None else layer.communicator.exchange
        counters = certified, layer.solves, layer.uncertified
        out, total = self._balance(
            idx, counters, n_sms, layer.traffic, layer.metrics, exchange, layer.times,
            layer.node_traffic,
        )  # fmt: skip
        self.record(total)
        return out

    def _balance(
        self,
        idx: torch.Tensor,
        counters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        n_sms: int,
        traffic: torch.Tensor,
        metrics: torch.Tensor,
        exchange: Callable[..., None] | None,
        times: torch.Tensor | None,
        numbers: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `balance` says with other counters (certified, solves, uncertified) and sums.

        ``times`` are as in `make_time_plan`, ``numbers`` as in `make_near_plan`. Returns physical
        ids, and the counts of all ranks.
        """
        layer, p = self.layer, self.layer.placement
        counts, running = self.count_by_program(idx, n_sms)
        total, gathered = counts, None
        if exchange is not None:
            total = torch.empty_like(counts)
            if layer.quotas == "global":
                gathered = counts.new_empty(p.ep_size, p.n_logical)
            exchange(counts, layer.version, total, gathered)
        solution = self._solve(total, *counters)
        cumulative = self.cumulative_shares(solution.shares)
        near = self.make_near_plan(numbers=numbers)
        if near is not None and gathered is not None:
            stats = torch.stack((solution.max_load, solution.lower_bound, solution.gap)).float()
            kernels.plan_near(gathered, total, cumulative, stats, solution.status, near)
            solution = replace(solution, max_load=stats[0], gap=stats[2])
        add_metrics(metrics, p, self.tables.views["home_rank"], total, solution)
        by_time = self.make_time_plan(times=times)
        if by_time is not None:
            kernels.plan_time(total, cumulative, solution.status, by_time)
        if gathered is not None:
            mine = torch.empty_like(cumulative)
            kernels.divide_quotas(cumulative, self.quotas_of(gathered, mine, traffic))
            cumulative = mine
        return self.select_by_program(idx, cumulative, running), total

    def solve(self, counts: torch.Tensor, certified: torch.Tensor) -> Solution:
        """See `Backend.solve`."""
        self.raise_on_report()
        layer = self.layer
        return self._solve(counts, certified, layer.solves, layer.uncertified)

    def _solve(
        self,
        counts: torch.Tensor,
        certified: torch.Tensor,
        solves: torch.Tensor,
        uncertified: torch.Tensor,
    ) -> Solution:
        """Solve and add to the counters, without a host sync."""
        layer = self.layer
        solution = solve_counts(
            counts, layer.placement, self.tables.views, layer.tolerance, layer.max_iterations
        )
        count_statuses(solution.status, certified, solves, uncertified)
        add_to_counter(self._invalid, solution.status == Status.INVALID)
        self._invalid_on_host.copy_(self._invalid, non_blocking=True)
        return solution

    def raise_on_report(self) -> None:
        """See `Backend.raise_on_report`."""
        super().raise_on_report()
        if self._invalid_view[0] > self._invalid_raised:
            self._invalid_raised = int(self._invalid_view[0])
            self.raise_for_input("counts")

    def warmup_kernels(self, counters: torch.Tensor, narrow: torch.Tensor) -> None:
        """See `TritonBackend.warmup_kernels`."""
        traffic, metrics = (torch.zeros_like(x) for x in (self.layer.traffic, self.layer.metrics))
        exchange = None if self.layer.communicator is None else self._exchange_alone
        times, numbers = (
            None if own is None else torch.zeros_like(own)
            for own in (self.layer.times, self.layer.node_traffic)
        )
        for dtype in (torch.int64, torch.int32):
            idx = self.warmup_ids(dtype)
            for certified in (counters[0], narrow):
                self._balance(
                    idx, (certified, counters[1], counters[2]), self.layer.default_n_sms, traffic,
                    metrics, exchange, times, numbers,
                )  # fmt: skip

    def _exchange_alone(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None = None,
    ) -> None:
        """Write what an exchange would if no other rank had tokens; local."""
        total.copy_(counts)
        if gathered is not None:
            gathered.zero_()
            gathered[self.layer.rank].copy_(counts)


def solve_counts(
    counts: torch.Tensor,
    placement: Placement,
    tables: dict[str, torch.Tensor],
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Solve every group for ``counts`` ``[n_logical]`` int32, without a wait for the device.

    The programs are those of `Placement.problem`, but made from tables on the device, so that a
    CUDA graph can capture this and use another placement from its next replay on. All sums are
    exact, so every rank finds the same plan, in whatever order its GPU adds. A negative count makes
    its group invalid.

    Parameters
    ----------
    counts : torch.Tensor
        On the device of the tables.
    placement : Placement
        Only its sizes matter.
    tables : dict
        `lplb_triton._backends.tables.DeviceTables.views` with those of the interior-point kernel.
    tolerance, max_iterations
        As for `lplb_triton.solve`.

    Returns
    -------
    Solution
        In float32.
    """
    p = placement
    loads = counts.double().masked_fill(counts < 0, torch.inf)
    n_columns = p.n_group * p.max_columns
    sums = torch.zeros(p.ep_size + n_columns, dtype=torch.float64, device=counts.device)
    sums.index_add_(0, tables["fold_target"], loads)
    fixed = sums[: p.ep_size].float().reshape(p.n_group, p.group_size)
    weights = sums[p.ep_size :].float().reshape(p.n_group, p.max_columns)
    results = kernels.solve(
        weights, fixed, tables["mask"], _shares_even_over_copies(counts, p, tables),
        tolerance, max_iterations,
    )  # fmt: skip
    return Solution(*results, tolerance)


def _shares_even_over_copies(
    counts: torch.Tensor, placement: Placement, tables: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return shares of columns if every expert is split evenly over its copies.

    ``[n_group, group_size, max_columns]`` float32, 0 for columns without tokens. The solver's plan
    is never worse than this one.
    """
    p = placement
    per_copy = (counts.long().clamp(min=0) << TOKEN_BITS) // tables["n_copies"]
    # The last element collects the copies that belong to no column.
    tokens = torch.zeros(p.ep_size * p.max_columns + 1, dtype=torch.int64, device=counts.device)
    tokens.index_add_(0, tables["copy_target"], per_copy[tables["copy_expert"]])
    by_cell = tokens[:-1].reshape(p.n_group, p.group_size, p.max_columns)
    total = by_cell.sum(1, keepdim=True).clamp(min=1)
    return (by_cell.double() / total.double()).float()
