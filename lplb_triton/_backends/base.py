"""The interface of the back ends of `lplb_triton.Balancer`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from lplb_triton import reference
from lplb_triton._backends.layer import Layer
from lplb_triton._backends.tables import DeviceTables
from lplb_triton._checks import check_id_values
from lplb_triton._layout import MAX_COUNT, SHARE_ONE
from lplb_triton.solution import Solution

__all__ = ["Backend", "chunk_size"]

# Chunks of the batch start on whole multiples of this many ids.
CHUNK_ALIGNMENT = 128


def chunk_size(n_ids: int, n_programs: int) -> int:
    """Return ids per program: an even part, rounded up to a multiple of CHUNK_ALIGNMENT."""
    part = -(-n_ids // n_programs)
    return max(1, -(-part // CHUNK_ALIGNMENT)) * CHUNK_ALIGNMENT


class Backend(ABC):
    """Counts, solves and selects for one layer, with arguments whose kinds have been checked.

    Attributes
    ----------
    layer : Layer
        The balancer's layer; the balancer may change its placement, rank and communicator.
    tables : DeviceTables
        The placement's index tables on the device.
    live_out : torch.Tensor or None
        ``[ep_size * live_per_rank + 4]`` int32, the last plan of live slots; None before there is
        one.
    """

    def __init__(self, layer: Layer, tables: DeviceTables) -> None:
        self.layer, self.tables = layer, tables
        self.live_out: torch.Tensor | None = None

    @property
    @abstractmethod
    def checks_on_host(self) -> bool:
        """Whether the host reads values of arguments, and raises at once for bad ones.

        Otherwise kernels report them, so that the host never waits for the device.
        """

    def run(self, idx: torch.Tensor, certified: torch.Tensor | None, n_sms: int) -> torch.Tensor:
        """Do what `Balancer.run` says; ``certified`` is the layer's own counter by default.

        Called by the balancer, and by the operators of `lplb_triton._torch_op`.
        """
        layer = self.layer
        layer.check_open()
        if layer.communicator is not None and idx.numel() * layer.placement.ep_size > MAX_COUNT:
            # This bound keeps sums in int32, however many ids the other ranks have.
            ranks = layer.placement.ep_size
            raise ValueError(
                f"idx must have fewer than 2**31 elements over the {ranks} ranks of the group, "
                f"{(MAX_COUNT + 1) // ranks} on each, got {idx.numel()}"
            )
        if layer.quotas == "global" and idx.numel() >= SHARE_ONE:
            # Equation 17 of docs/method.md needs counts below this.
            raise ValueError(
                f"idx must have fewer than 2**24 elements with quotas='global', got {idx.numel()}"
            )
        certified = layer.certified if certified is None else certified
        return self.balance(idx.contiguous(), certified, n_sms)

    def record(self, counts: torch.Tensor) -> None:
        """Add a batch's counts, summed over the ranks, to the recorded loads, if that is on."""
        if self.layer.recorder is not None:
            self.layer.recorder.add(counts)

    def check_values(self, idx: torch.Tensor) -> None:
        """Raise for ids out of range, unless the kernels report them."""
        if self.checks_on_host:
            check_id_values("idx", idx, self.layer.placement.n_logical)

    def cumulative_shares(self, shares: torch.Tensor) -> torch.Tensor:
        """Return cumulative shares by copy, ``[n_copies]`` int32 in units of 2**-24."""
        views = self.tables.views
        return reference.cumulative_shares(
            shares,
            views["copy_cell"],
            views["copy_index"],
            views["copy_multiplicity"],
            views["copy_start"],
        )

    def check_selection(
        self, idx: torch.Tensor, cumulative: torch.Tensor, running: torch.Tensor
    ) -> None:
        """Raise for bad values of the arguments of `select`, unless the kernels report them."""
        self.check_values(idx)
        if self.checks_on_host:
            counts, start = running[-1], self.tables.views["copy_start"]
            reference.check_counts_of("running", idx, counts)
            reference.check_cumulative(counts, cumulative, start, self.layer.rank)

    @abstractmethod
    def count(self, idx: torch.Tensor, n_sms: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `Balancer.count` says, for contiguous ids."""

    @abstractmethod
    def balance(self, idx: torch.Tensor, certified: torch.Tensor, n_sms: int) -> torch.Tensor:
        """Count, sum over ranks, solve and select, for contiguous ids."""

    @abstractmethod
    def solve(self, counts: torch.Tensor, certified: torch.Tensor) -> Solution:
        """Solve every group for ``counts`` ``[n_logical]`` int32, and add to the counters."""

    def solve_by_copy(self, counts: torch.Tensor, certified: torch.Tensor) -> object:
        """Solve as `run` does, which may leave out what only `solve` returns."""
        return self.solve(counts, certified)

    def plan_shares(self, counts: torch.Tensor, certified: torch.Tensor) -> torch.Tensor:
        """Return cumulative shares by copy of the plan in use, by tokens or by time."""
        solution = self.solve(counts, certified)
        cumulative = self.cumulative_shares(solution.shares)
        if self.layer.cost is None:
            return cumulative
        return self.plan_by_time(counts, cumulative, solution.status)

    @abstractmethod
    def plan_by_time(
        self, counts: torch.Tensor, cumulative: torch.Tensor, status: torch.Tensor
    ) -> torch.Tensor:
        """Return the cumulative shares of a plan by time, and write its times.

        ``cumulative`` ``[n_copies]`` int32 and ``status`` ``[n_group]`` int32 are those of the
        token plan; the former may be overwritten.
        """

    @abstractmethod
    def select(
        self, idx: torch.Tensor, cumulative: torch.Tensor, running: torch.Tensor
    ) -> torch.Tensor:
        """Do what `Balancer.select` says, for contiguous ids and cumulative shares."""

    def warmup(self) -> None:  # noqa: B027
        """Compile every kernel that `run` uses; local to this rank."""

    def raise_on_report(self) -> None:  # noqa: B027
        """Raise for what kernels have reported so far, without a wait for the device."""

    def follow_communicator(self) -> None:  # noqa: B027
        """Drop what belongs to an earlier communicator; called when the layer has another."""
