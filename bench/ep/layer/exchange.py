"""Dispatch, expert products in parts, and combine, made of the parts of ``examples/moe``.

Static and live slots may have their weights in different tensors. Then each tensor has a grouped
product of its own, whose rows are gathered on their way from the exchange and put in their places
on the way back, so that nothing is copied once more.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lplb_triton import kernels
from lplb_triton.bench.ep.train import EXAMPLES

__all__ = ["Layer", "Weights"]

# Weights of some slots: ``[slots, hidden, 2 * inner]`` and ``[slots, inner, hidden]``.
Weights = tuple[torch.Tensor, torch.Tensor]


class _Gather(torch.autograd.Function):
    """Divide rows among parts by their order; the gradient puts them in their places."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(inverse)
        return rows[order[:first]], rows[order[first:]]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _take(grads[0], grads[1], inverse), None, None, None


class _Scatter(torch.autograd.Function):
    """Put the rows of two parts in their places; the gradient gathers them."""

    @staticmethod
    def forward(
        ctx: Any,
        one: torch.Tensor,
        other: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.first = len(one)
        return _take(one, other, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][order[: ctx.first]], grads[0][order[ctx.first :]], None, None


def _take(one: torch.Tensor, other: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if one.is_cuda:
        return kernels.take_rows(one.contiguous(), other.contiguous(), index)
    return torch.cat((one, other))[index]


class _Route(NamedTuple):
    """What the rows of one batch need on their way back."""

    order: torch.Tensor
    inverse: torch.Tensor
    out: list[int]
    into: list[int]
    by_slot: torch.Tensor
    by_source: torch.Tensor
    """The inverse of ``by_slot``."""
    first: int
    """Rows of the first part."""
    ends: torch.Tensor
    """``[slots_per_rank]`` int32, where the rows of each slot end."""


class Layer:
    """The way of one rank's tokens to their slots and back, one row per choice.

    Parameters
    ----------
    group
        The EP group.
    reverse
        Put the rows of each slot in the opposite order, which shows what rounding alone changes.
    """

    def __init__(self, group: dist.ProcessGroup, reverse: bool = False) -> None:
        if str(EXAMPLES) not in sys.path:
            sys.path.append(str(EXAMPLES))
        self._transports = importlib.import_module("moe.transports")
        self._experts = importlib.import_module("moe.experts")
        self.group, self.reverse = group, reverse

    def dispatch(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        per_rank: int,
        static: int,
        beside: Callable[[], None],
    ) -> tuple[list[torch.Tensor], _Route]:
        """Send every token to its slots.

        Parameters
        ----------
        x
            ``[tokens, hidden]``.
        slots
            ``[tokens, top_k]`` int64, physical ids.
        per_rank
            Slots of a rank.
        static
            Slots of a rank whose rows are the first part.
        beside
            Is called once the rows are on their way.

        Returns
        -------
        parts : list of torch.Tensor
            ``[rows, hidden]`` by slot: one part if the others have no rows.
        route
            For `combine`.
        """
        ranks = self.group.size()
        order = slots.flatten().argsort(stable=True)
        inverse = self._transports.invert(order)
        sent = self._experts.count_assignments(slots, 1, ranks * per_rank)[0].long()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        received = received.view(ranks, -1)
        # The host waits here, and only here, to learn how many rows it will receive.
        by_rank = torch.stack(
            [sent.view(ranks, -1).sum(1), received.sum(1), received[:, :static].sum(1)]
        )
        out, into, first_rows = by_rank.tolist()
        rows = self._experts.Dispatch.apply(x, order, inverse, slots.shape[1])
        rows = self._transports.Exchange.apply(rows, out, into, self.group)
        beside()
        slot = torch.arange(per_rank, device=x.device).repeat(ranks)
        slot = slot.repeat_interleave(received.flatten(), output_size=sum(into))
        by_slot = slot.argsort(stable=True)
        if self.reverse:
            by_slot = slot.numel() - 1 - slot.flip(0).argsort(stable=True)
        ends = received.sum(0).cumsum(0).to(torch.int32)
        by_source = self._transports.invert(by_slot)
        first = sum(first_rows)
        route = _Route(order, inverse, out, into, by_slot, by_source, first, ends)
        if first < sum(into):
            return list(_Gather.apply(rows, by_slot, by_source, first)), route  # type: ignore[no-untyped-call]
        return [self._experts.Collect.apply(rows, by_source, by_slot)], route

    def compute(
        self, parts: Sequence[torch.Tensor], weights: Sequence[Weights], route: _Route
    ) -> list[torch.Tensor]:
        """Apply each row's expert; ``weights`` of the static slots, then of the live ones."""
        outputs, slot, row = [], 0, 0
        # Without rows of live slots there is one part.
        for rows, (w_in, w_out) in zip(parts, weights, strict=False):
            ends = route.ends[slot : slot + len(w_in)]
            ends = ends if row == 0 else ends - row
            grouped = rows.dtype == torch.bfloat16
            outputs.append(self._experts.expert_outputs(rows, w_in, w_out, ends, grouped))
            slot, row = slot + len(w_in), row + len(rows)
        return outputs

    def combine(
        self,
        outputs: Sequence[torch.Tensor],
        gates: torch.Tensor,
        route: _Route,
        attach: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Bring the outputs back and add up each token's, weighted: ``[tokens, hidden]``.

        ``attach`` is given the outputs of all slots before they are sent, so that in the backward
        pass it comes before the products.
        """
        if len(outputs) == 2:
            y = _Scatter.apply(*outputs, route.by_slot, route.by_source)  # type: ignore[no-untyped-call]
        else:
            y = self._experts.Collect.apply(outputs[0], route.by_slot, route.by_source)
        y = self._transports.Exchange.apply(attach(y), route.into, route.out, self.group)
        y = self._experts.Collect.apply(y, route.order, route.inverse)
        y = y.view(*gates.shape, y.shape[-1])
        wide = self._experts.wide(y)
        summed: torch.Tensor = (wide * gates[..., None]).sum(1).to(y.dtype)
        return summed
