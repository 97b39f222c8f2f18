"""Dispatch and combine over the ranks of a group, by torch.distributed or by DeepEP."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.deep_ep_buffer import make_buffer
from moe.experts import Collect, Dispatch, count_assignments, wide


class Exchange(torch.autograd.Function):
    """Send rows to their ranks; the backward pass sends their gradients back."""

    @staticmethod
    def forward(ctx, rows: Tensor, out: list[int], into: list[int], group) -> Tensor:
        ctx.way_back = into, out, group
        received = rows.new_empty((sum(into), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), into, out, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Exchange.apply(grad, *ctx.way_back), None, None, None


def invert(order: Tensor) -> Tensor:
    """Return the inverse of a permutation."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


class Route(NamedTuple):
    """Data that `AllToAll.combine` needs to send the rows of one batch back."""

    order: Tensor
    inverse: Tensor
    out: list[int]
    into: list[int]
    by_slot: Tensor
    by_source: Tensor
    weights: Tensor


class AllToAll:
    """Dispatch and combine by `torch.distributed.all_to_all_single`, one row per choice.

    Parameters
    ----------
    group
        The EP group.
    n_physical
        Slots over all ranks.
    reverse
        Order the rows of each slot backwards. This changes only the order in which gradients are
        summed, and so shows how much rounding alone changes a loss curve.
    """

    def __init__(self, group: dist.ProcessGroup, n_physical: int, reverse: bool = False) -> None:
        self.group, self.reverse = group, reverse
        self.n_physical, self.ranks = n_physical, group.size()

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Route]:
        """Send every token to its slots.

        Parameters
        ----------
        x
            [tokens, hidden].
        slots
            int64 [tokens, top_k], physical expert ids.
        weights
            [tokens, top_k], for `combine`.

        Returns
        -------
        rows : Tensor
            [rows, hidden], sorted by this rank's slots.
        ends : Tensor
            int32 [slots per rank], the end of each slot's rows.
        route : Route
            For `combine`.
        """
        order = slots.flatten().argsort(stable=True)
        inverse = invert(order)
        sent = count_assignments(slots, 1, self.n_physical)[0].long()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        received = received.view(self.ranks, -1)
        # The host waits here, and only here, to learn how many rows it will receive.
        out, into = torch.stack([sent.view(self.ranks, -1).sum(1), received.sum(1)]).tolist()

        rows = Dispatch.apply(x, order, inverse, slots.shape[1])
        rows = Exchange.apply(rows, out, into, self.group)
        # Rows arrive sorted by source rank, then slot; the products need them sorted by slot.
        slot = torch.arange(received.shape[1], device=x.device).repeat(self.ranks)
        slot = slot.repeat_interleave(received.flatten(), output_size=sum(into))
        if self.reverse:
            by_slot = slot.numel() - 1 - slot.flip(0).argsort(stable=True)
        else:
            by_slot = slot.argsort(stable=True)
        by_source = invert(by_slot)
        rows = Collect.apply(rows, by_source, by_slot)
        ends = received.sum(0).cumsum(0).to(torch.int32)
        return rows, ends, Route(order, inverse, out, into, by_slot, by_source, weights)

    def combine(self, y: Tensor, route: Route) -> Tensor:
        """Bring the experts' outputs back and add up each token's, weighted.

        Parameters
        ----------
        y
            [rows, hidden], one output for each dispatched row.
        route
            Of `dispatch`.

        Returns
        -------
        Tensor
            [tokens, hidden].
        """
        y = Collect.apply(y, route.by_slot, route.by_source)
        y = Exchange.apply(y, route.into, route.out, self.group)
        y = Collect.apply(y, route.order, route.inverse)
        weights = route.weights
        y = y.view(*weights.shape, y.shape[-1])
        return (wide(y) * weights[..., None]).sum(1).to(y.dtype)

    def close(self) -> None:
        """Do nothing: this transport holds no buffers."""


class _DeepDispatch(torch.autograd.Function):
    """DeepEP's dispatch; its gradient is a combine."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, weights: Tensor, buffer: Any, n_physical: int):
        received, local, factors, handle, sizes = buffer.dispatch(
            x, topk_idx=slots, topk_weights=weights, num_experts=n_physical
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(local)
        ctx.set_materialize_grads(True)
        # `combine` needs the handle; autograd returns it as it is, since it is no tensor.
        return received, local, factors, handle, sizes

    @staticmethod
    def backward(ctx, grad: Tensor, _, grad_factors: Tensor, *__):
        grad, grad_weights, _ = ctx.buffer.combine(
            grad.contiguous(), handle=ctx.handle, topk_weights=grad_factors.contiguous()
        )
        return grad, None, grad_weights, None, None


class _DeepCombine(torch.autograd.Function):
    """DeepEP's combine; its gradient is a dispatch with the same handle."""

    @staticmethod
    def forward(ctx, y: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y, handle=handle)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


class DeepEP:
    """Dispatch and combine by DeepEP, version 1 or 2: one row per token and rank.

    Parameters
    ----------
    group
        The EP group, NCCL.
    n_physical
        Slots over all ranks.
    tokens, hidden, top_k
        Largest batch of a rank, and the layer's sizes.
    buffer
        An ``ElasticBuffer``, or a `moe.deep_ep_buffer.LegacyBuffer` around DeepEP 1's ``Buffer``,
        to use; by default a new one of the installed release.

    Raises
    ------
    ModuleNotFoundError
        If there is no ``deep_ep``.
    ValueError
        If DeepEP 1 is to serve one rank only, or (at the first dispatch) more than 128 slots a
        rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        n_physical: int,
        *,
        tokens: int,
        hidden: int,
        top_k: int,
        buffer: Any = None,
    ) -> None:
        if buffer is None:
            buffer = make_buffer(group, tokens=tokens, hidden=hidden, top_k=top_k)
        self.buffer, self.n_physical, self.ranks = buffer, n_physical, group.size()

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Send every token to its slots, as `AllToAll.dispatch` does."""
        low = x.to(torch.bfloat16)
        received, local, factors, handle, sizes = _DeepDispatch.apply(
            low, slots, weights.float(), self.buffer, self.n_physical
        )
        # DeepEP sends a token to a rank once: copy it for each slot of this rank that it chose.
        row, choice = (local >= 0).nonzero(as_tuple=True)
        slot = local[row, choice].long()
        by_slot = slot.argsort(stable=True)
        row, choice = row[by_slot], choice[by_slot]
        if isinstance(sizes, list):
            rows = torch.tensor(sizes, device=x.device)
        else:
            rows = torch.bincount(slot, minlength=self.n_physical // self.ranks)
        ends = rows.cumsum(0)
        way = handle, row, factors[row, choice], received, x.dtype
        return received[row].to(x.dtype), ends.to(torch.int32), way

    def combine(self, y: Tensor, way: Any) -> Tensor:
        """Combine as `AllToAll.combine` does, but weight and add up on the expert's rank."""
        handle, row, factors, received, dtype = way
        total = torch.zeros(received.shape, dtype=torch.float32, device=y.device)
        total = total.index_add(0, row, y.float() * factors[:, None])
        return _DeepCombine.apply(total.to(torch.bfloat16), self.buffer, handle).to(dtype)

    def close(self) -> None:
        """Free the buffer; collective."""
        if hasattr(self.buffer, "destroy"):
            self.buffer.destroy()
