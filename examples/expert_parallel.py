r"""An expert-parallel mixture of experts whose replicas are balanced batch by batch.

The parts of `train_moe_ep.py` that any training code needs, in the order in which a batch passes
through them:

1. `ParallelMoE.physical`   logical into physical expert ids: the only step that balancing changes
2. ``dispatch``             every token to the ranks of its physical experts (all-to-all)
3. expert products          on the slot weights that `lplb_triton.Replicas` keeps true
4. ``combine``              the outputs back, weighted and added up

Two transports have these three functions (``dispatch``, ``combine``, ``close``): `AllToAll`, with
torch.distributed, and `DeepEP`, with DeepEP's ``ElasticBuffer`` where ``deep_ep`` is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import train_moe as moe
from torch import Tensor, nn

from lplb_triton import Balancer, Placement, Replicas

BALANCES = ("none", "eplb", "lplb")


class _Exchange(torch.autograd.Function):
    """Send rows to their ranks; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, out: list[int], into: list[int], group) -> Tensor:
        ctx.way_back = into, out, group
        received = rows.new_empty((sum(into), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), into, out, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Exchange.apply(grad, *ctx.way_back), None, None, None


def invert(order: Tensor) -> Tensor:
    """Return the inverse of a permutation."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


class Route(NamedTuple):
    """What `AllToAll.combine` needs to send the rows of one batch back."""

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
        Order the rows of each slot backwards. The function is the same, the order in which its
        gradients are summed isn't: that shows how much rounding alone moves a loss curve.
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
        sent = moe.count_assignments(slots, 1, self.n_physical)[0].long()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        received = received.view(self.ranks, -1)
        # The one place where the host waits: it must know how many rows to expect.
        out, into = torch.stack([sent.view(self.ranks, -1).sum(1), received.sum(1)]).tolist()

        rows = moe._Dispatch.apply(x, order, inverse, slots.shape[1])
        rows = _Exchange.apply(rows, out, into, self.group)
        # Rows come by source rank, then slot; the products want them by slot.
        slot = torch.arange(received.shape[1], device=x.device).repeat(self.ranks)
        slot = slot.repeat_interleave(received.flatten(), output_size=sum(into))
        if self.reverse:
            by_slot = slot.numel() - 1 - slot.flip(0).argsort(stable=True)
        else:
            by_slot = slot.argsort(stable=True)
        by_source = invert(by_slot)
        rows = moe._Collect.apply(rows, by_source, by_slot)
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
        y = moe._Collect.apply(y, route.by_slot, route.by_source)
        y = _Exchange.apply(y, route.into, route.out, self.group)
        y = moe._Collect.apply(y, route.order, route.inverse)
        weights = route.weights
        y = y.view(*weights.shape, y.shape[-1])
        return (moe.wide(y) * weights[..., None]).sum(1).to(y.dtype)

    def close(self) -> None:
        """Nothing to free."""


class _DeepDispatch(torch.autograd.Function):
    """DeepEP's dispatch; its gradient is a combine."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, weights: Tensor, buffer: Any, n_physical: int):
        received, local, factors, handle, _ = buffer.dispatch(
            x, topk_idx=slots, topk_weights=weights, num_experts=n_physical
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(local)
        ctx.set_materialize_grads(True)
        # The handle rides along for `combine`; autograd passes what isn't a tensor through.
        return received, local, factors, handle

    @staticmethod
    def backward(ctx, grad: Tensor, _, grad_factors: Tensor, __):
        grad, grad_weights, _ = ctx.buffer.combine(
            grad.contiguous(), handle=ctx.handle, topk_weights=grad_factors.contiguous()
        )
        return grad, None, grad_weights, None, None


class _DeepCombine(torch.autograd.Function):
    """DeepEP's combine; its gradient is a dispatch along the same way."""

    @staticmethod
    def forward(ctx, y: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y, handle=handle)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


class DeepEP:
    """Dispatch and combine by DeepEP's ``ElasticBuffer``: one row per token and rank.

    Parameters
    ----------
    group
        The EP group, NCCL.
    n_physical
        Slots over all ranks.
    tokens, hidden, top_k
        Largest batch of a rank, and the layer's sizes.
    buffer
        An ``ElasticBuffer`` to use; by default a new one.

    Raises
    ------
    ModuleNotFoundError
        If there is no ``deep_ep``.
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
            from deep_ep import ElasticBuffer

            buffer = ElasticBuffer(
                group, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=top_k
            )
        self.buffer, self.n_physical, self.ranks = buffer, n_physical, group.size()

    def dispatch(self, x: Tensor, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Like `AllToAll.dispatch`."""
        low = x.to(torch.bfloat16)
        received, local, factors, handle = _DeepDispatch.apply(
            low, slots, weights.float(), self.buffer, self.n_physical
        )
        # A token that chose several slots of this rank came once: copy it for each of them.
        row, choice = (local >= 0).nonzero(as_tuple=True)
        slot = local[row, choice].long()
        by_slot = slot.argsort(stable=True)
        row, choice = row[by_slot], choice[by_slot]
        ends = torch.bincount(slot, minlength=self.n_physical // self.ranks).cumsum(0)
        way = handle, row, factors[row, choice], received, x.dtype
        return received[row].to(x.dtype), ends.to(torch.int32), way

    def combine(self, y: Tensor, way: Any) -> Tensor:
        """Like `AllToAll.combine`; outputs are weighted and added up where they were computed."""
        handle, row, factors, received, dtype = way
        total = torch.zeros(received.shape, dtype=torch.float32, device=y.device)
        total = total.index_add(0, row, y.float() * factors[:, None])
        return _DeepCombine.apply(total.to(torch.bfloat16), self.buffer, handle).to(dtype)

    def close(self) -> None:
        """Free the buffer; collective."""
        if hasattr(self.buffer, "destroy"):
            self.buffer.destroy()


def even_placement(experts: int, ranks: int, redundant: int) -> Placement:
    """Start without a history: experts in order, EPLB's choice of replicas for equal loads."""
    if redundant == 0:
        return Placement(torch.arange(experts), ranks)
    return Placement.from_history(torch.ones(experts), ranks, redundant_per_rank=redundant)


class ParallelMoE(moe.MoE):
    """The mixture of `train_moe.MoE` with its experts spread over the ranks of a group.

    Parameters
    ----------
    config
        Settings of the model.
    layer
        Number of the layer; with the seed it determines the experts' weights, whatever the
        number of ranks.
    balance
        ``none``, ``eplb`` (tokens of an expert spread evenly over its copies) or ``lplb``.
    placement
        Where experts are; the same on all ranks.
    group, device, dtype
        The EP group, this rank's device, and the dtype of the products.
    transport
        `AllToAll` or `DeepEP`.
    even_routing
        Ignore the router's choice and give every expert the same number of tokens: what a
        perfect balance costs.
    timer
        Notes when the layer starts and ends, forward and backward.
    """

    def __init__(
        self,
        config: moe.Config,
        layer: int,
        *,
        balance: str,
        placement: Placement,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        transport: AllToAll | DeepEP,
        even_routing: bool = False,
        timer: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.transport, self.timer = config, transport, timer
        self.even_routing, self.group, self.dtype = even_routing, group, dtype
        self.grouped = dtype == torch.bfloat16 and moe._grouped_mm() is not None
        hidden, inner = config.hidden, config.expert_hidden
        wide = torch.promote_types(dtype, torch.float32)
        self.router = nn.Parameter(torch.randn(config.experts, hidden, dtype=wide) * hidden**-0.5)
        self.register_buffer("bias", torch.zeros(config.experts, dtype=wide))
        own = config.experts // group.size()
        self.w_in = nn.Parameter(torch.empty(own, hidden, 2 * inner, dtype=wide, device=device))
        self.w_out = nn.Parameter(torch.empty(own, inner, hidden, dtype=wide, device=device))
        generator = torch.Generator(device)
        for row in range(own):
            expert = dist.get_rank(group) * own + row
            generator.manual_seed((config.seed * 1000 + layer) * 100_000 + expert)
            with torch.no_grad():
                self.w_in[row].normal_(std=hidden**-0.5, generator=generator)
                scale = (2 * config.layers * inner) ** -0.5
                self.w_out[row].normal_(std=scale, generator=generator)
        self.replicas = Replicas(
            placement, {"w_in": self.w_in, "w_out": self.w_out}, group=group, dtype=dtype
        )
        self.balancer = None
        if balance != "none":
            self.balancer = Balancer(placement, group=group, device=device)
            self.balancer.warmup()
        self.lplb = balance == "lplb"
        self._index()
        self.served: list[Tensor] = []
        # Called with the logical ids of every batch, where they are recorded.
        self.record: Callable[[Tensor], None] | None = None

    def _index(self) -> None:
        """Cumulative shares of an even split, for ``eplb``."""
        counts = self.replicas.placement.logcnt.tolist()
        shares = [(1 << 24) * (copy + 1) // count for count in counts for copy in range(count)]
        self.even_shares = torch.tensor(shares, dtype=torch.int32, device=self.replicas.device)

    def move(self, placement: Placement, optimizer: torch.optim.Optimizer) -> None:
        """Use another placement: the balancer's tables, the experts and their optimizer state."""
        if self.balancer is not None:
            placement = self.balancer.update_placement(placement)
        self.replicas.move(placement, optimizer)
        self._index()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of every token; see `train_moe.MoE.route`."""
        ids, weights, scores = super().route(x)
        if self.even_routing:
            choices = torch.arange(ids.numel(), device=x.device) + dist.get_rank(self.group)
            ids = (choices % self.config.experts).view_as(ids)
            weights = scores.gather(1, ids)
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights, scores

    def physical(self, ids: Tensor) -> Tensor:
        """Choose a copy for every logical id: [tokens, top_k] to [tokens, top_k]."""
        if self.balancer is None:
            return ids
        if self.lplb:
            return self.balancer.run(ids)
        _, running = self.balancer.count(ids)
        return self.balancer.select(ids, self.even_shares, running)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer to this rank's tokens.

        Parameters
        ----------
        x
            [tokens, hidden].

        Returns
        -------
        y : Tensor
            [tokens, hidden].
        counts : Tensor
            int32 [1, experts], this rank's assignments.
        aux : Tensor
            Scalar 0: balance is kept by the selection bias here.
        """
        if self.timer is not None:
            x = self.timer.stamp(x, begins=True)
        ids, weights, _ = self.route(x)
        if self.record is not None:
            self.record(ids)
        counts = moe.count_assignments(ids, 1, self.config.experts)
        # Rows travel in the dtype of the products.
        low = x.to(self.dtype)
        rows, ends, route = self.transport.dispatch(low, self.physical(ids), weights)
        slot_weights = self.replicas.weights
        y = moe.expert_outputs(
            rows, slot_weights["w_in"], slot_weights["w_out"], ends, self.grouped
        )
        y = self.transport.combine(y, route)
        self.served.append(ends[-1])
        if self.timer is not None:
            y = self.timer.stamp(y, begins=False)
        return y, counts, weights.new_zeros(())
