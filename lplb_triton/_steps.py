"""The steps of `Balancer.run`, to be called one by one."""

from __future__ import annotations

import torch

from lplb_triton._backends.base import Backend
from lplb_triton._backends.layer import Layer
from lplb_triton._checks import (
    check_counter,
    check_counts,
    check_floating_point,
    check_ids,
    check_integer,
    counts_to_int32,
)
from lplb_triton._layout import SHARE_ONE
from lplb_triton._torch_op import opaque
from lplb_triton.solution import Solution

__all__ = ["BatchSteps"]


class BatchSteps:
    """The part of `Balancer` that counts, sums over ranks, solves and selects."""

    _layer: Layer
    _backend: Backend

    @opaque
    def count(
        self, idx: torch.Tensor, *, n_sms: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count this rank's tokens per logical expert.

        Parameters
        ----------
        idx, n_sms
            As for `run`.

        Returns
        -------
        counts : torch.Tensor
            ``[n_logical]`` int32, fresh.
        running : torch.Tensor
            ``[n_sms, n_logical]`` int32, fresh: row i counts what the first i + 1 programs see.
        """
        layer = self._layer
        check_ids("idx", idx, layer.device)
        n_sms = layer.default_n_sms if n_sms is None else check_integer("n_sms", n_sms)
        return self._backend.count(idx.contiguous(), n_sms)

    @opaque
    def sync(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum counts over the EP group; without a group they come back as they are.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` int32 or int64 in [0, 2**31).

        Returns
        -------
        torch.Tensor
            ``[n_logical]`` int32; fresh if there is a group. On a GPU, counts or sums out of range
            come out negative, and `solve` reports them as invalid.

        Raises
        ------
        TypeError, ValueError
            For counts of the wrong dtype, shape or device; on a CPU also for counts out of range.
        """
        layer = self._layer
        layer.check_open()
        counts = self._counts_to_int32(counts)
        if layer.communicator is None:
            return counts
        counts = counts.contiguous()
        total = torch.empty_like(counts)
        layer.communicator.exchange(counts, layer.version, total)
        return total

    def _counts_to_int32(self, counts: torch.Tensor) -> torch.Tensor:
        """Check counts by expert, and return them as int32."""
        shape = (self._layer.placement.n_logical,)
        counts = check_counts("counts", counts, shape, self._layer.device)
        return counts_to_int32("counts", counts, self._backend.checks_on_host)

    @opaque
    def solve(self, counts: torch.Tensor, *, certified: torch.Tensor | None = None) -> Solution:
        """Solve the LP of every group for counts summed over all ranks.

        With ``solver="levelling"`` this takes two launches: the first one is the solve of `run`,
        the second one writes the shares.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n_logical]`` int32 or int64 in [0, 2**31), tokens per logical expert over the EP
            group.
        certified : torch.Tensor or None
            One int32 or int64 element that rises by each group certified; by default the
            balancer's own.

        Returns
        -------
        Solution
            ``shares`` is ``[n_group, group_size, max_columns]``; fresh tensors.

        Raises
        ------
        TypeError, ValueError
            For counts of the wrong dtype, shape or device; on a CPU, and by the torch backend,
            also for counts out of range. On a GPU these make the status `Status.INVALID`.
        RuntimeError
            On a GPU, if an earlier call met counts or an id out of range; see `check`.
        """
        layer = self._layer
        certified = layer.certified if certified is None else certified
        check_counter("certified", certified, layer.device)
        return self._backend.solve(self._counts_to_int32(counts), certified)

    @opaque
    def share_slots(
        self, counts: torch.Tensor, *, certified: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the part of its expert's tokens that each slot gets, by the balancer's objective.

        With ``objective="time"`` it is the plan by time, which `solve` doesn't return, and `times`
        says what it takes.

        Parameters
        ----------
        counts, certified
            As for `solve`.

        Returns
        -------
        torch.Tensor
            ``[n_physical]`` float32, fresh; the slots of an expert add up to 1.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `solve` does; also with live slots and with ``locality="node"``, which only `run`
            plans.
        """
        layer, backend = self._layer, self._backend
        if layer.placement.live_per_rank:
            raise RuntimeError("live slots are planned by run only")
        if layer.locality.slack is not None:
            raise RuntimeError("plans that keep tokens near are made by run only")
        certified = layer.certified if certified is None else certified
        check_counter("certified", certified, layer.device)
        cumulative = backend.plan_shares(self._counts_to_int32(counts), certified)
        views = backend.tables.views
        starts = views["copy_start"].long()
        # An expert's last copy gets the rest, and its share needn't have been written.
        ends = cumulative.index_fill(0, starts[1:] - 1, SHARE_ONE)
        before = ends.roll(1).index_fill_(0, starts[:-1], 0)
        parts = (ends - before).float() / SHARE_ONE
        shares = torch.empty_like(parts)
        shares[views["copy_slot"].long()] = parts
        return shares

    @opaque
    def cumulative_shares(self, shares: torch.Tensor) -> torch.Tensor:
        """Return cumulative shares by copy, which `select` takes (method.md, equation 12).

        Parameters
        ----------
        shares : torch.Tensor
            ``[n_group, group_size, max_columns]`` float32 of a `Solution`.

        Returns
        -------
        torch.Tensor
            ``[n_copies]`` int32 in units of 2**-24, by copy in static slots.

        Raises
        ------
        TypeError, ValueError
            For shares of the wrong dtype, shape or device.
        """
        shares = check_floating_point("shares", shares)
        p, device = self._layer.placement, self._layer.device
        if shares.shape != (p.n_group, p.group_size, p.max_columns) or shares.device != device:
            raise ValueError(
                f"shares must have shape [{p.n_group}, {p.group_size}, {p.max_columns}] on "
                f"{device}, got {list(shares.shape)} on {shares.device}"
            )
        return self._backend.cumulative_shares(shares)

    @opaque
    def select(
        self, idx: torch.Tensor, cumulative: torch.Tensor, running: torch.Tensor
    ) -> torch.Tensor:
        """Return physical ids for given cumulative shares; quotas are met exactly.

        Parameters
        ----------
        idx : torch.Tensor
            As for `run`.
        cumulative : torch.Tensor
            ``[n_copies]`` int32 of `cumulative_shares`.
        running : torch.Tensor
            ``[n_sms, n_logical]`` int32 of `count` for the same ``idx``.

        Returns
        -------
        torch.Tensor
            Physical ids, contiguous, of the shape and dtype of ``idx``.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `run` does; also if ``running`` doesn't hold the counts of ``idx``, or if
            ``cumulative`` holds something else than cumulative shares.
        """
        p, device = self._layer.placement, self._layer.device
        check_ids("idx", idx, device)
        if running.ndim != 2 or running.shape[1] != p.n_logical or not len(running):
            raise ValueError(f"running must be [n_sms, {p.n_logical}], got {tuple(running.shape)}")
        for name, table in (("cumulative", cumulative), ("running", running)):
            if table.dtype != torch.int32 or table.device != device:
                raise ValueError(
                    f"{name} must be int32 on {device}, got {table.dtype} on {table.device}"
                )
        if cumulative.shape != (p.n_copies,):
            raise ValueError(
                f"cumulative must have shape [{p.n_copies}], got {tuple(cumulative.shape)}"
            )
        return self._backend.select(idx.contiguous(), cumulative.contiguous(), running)
