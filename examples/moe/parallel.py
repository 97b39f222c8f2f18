r"""An expert-parallel mixture of experts whose replicas are balanced batch by batch.

The parts of `train_moe_ep.py` that any training code needs, in the order in which a batch passes
through them:

1. `ParallelMoE.physical`   maps logical to physical expert ids; balancing changes this step only
2. ``dispatch``             sends every token to the ranks of its physical experts (all-to-all)
3. expert products          use the slot weights that `lplb_triton.Replicas` keeps in sync, or with
                            live slots those that `lplb_triton.spread` sends in each batch
4. ``combine``              sends the outputs back, weighted and added up

Two transports in `moe.transports` have these functions (``dispatch``, ``combine``, ``close``):
`AllToAll`, with torch.distributed, and `DeepEP`, with DeepEP's buffer of version 1 or 2 where
``deep_ep`` is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lplb_triton import Balancer, Placement, Replicas
from moe.experts import count_assignments, expert_outputs, find_grouped_mm
from moe.live_weights import LiveWeights, place_at_home
from moe.model import MoE
from moe.settings import Config
from moe.transports import AllToAll, DeepEP

BALANCES = ("none", "eplb", "lplb", "live")


def even_placement(experts: int, ranks: int, redundant: int) -> Placement:
    """Place experts without a history: in order, or by EPLB for equal loads."""
    if redundant == 0:
        return Placement(torch.arange(experts), ranks)
    return Placement.from_history(torch.ones(experts), ranks, redundant_per_rank=redundant)


def place_experts(balance: str, load: Tensor, ranks: int, redundant: int) -> Placement:
    """Place the experts of a run with copies by their loads ``[experts]``."""
    if balance == "live":
        return place_at_home(load, ranks, redundant)
    return Placement.from_history(load, ranks, redundant_per_rank=redundant)


class ParallelMoE(MoE):
    """The mixture of `moe.model.MoE` with its experts spread over the ranks of a group.

    Parameters
    ----------
    config
        Settings of the model.
    layer
        Number of the layer; with the seed it determines the experts' weights, whatever the
        number of ranks.
    balance
        ``none``, ``eplb`` (tokens of an expert spread evenly over its copies), ``lplb``, or
        ``live`` (lplb, with experts at home and live slots).
    placement
        Slots of the experts; the same on all ranks.
    group, device, dtype
        The EP group, this rank's device, and the dtype of the products.
    transport
        `AllToAll` or `DeepEP`.
    even_routing
        Ignore the router's choice and give every expert the same number of tokens, which shows
        the time with a perfect balance.
    timer
        Takes the times at which the layer starts and ends, forward and backward.
    """

    def __init__(
        self,
        config: Config,
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
        self.grouped = dtype == torch.bfloat16 and find_grouped_mm() is not None
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
        params = {"w_in": self.w_in, "w_out": self.w_out}
        self.live = balance == "live"
        if self.live:
            self.replicas = LiveWeights(placement, params, group=group, device=device, dtype=dtype)
        else:
            self.replicas = Replicas(placement, params, group=group, dtype=dtype)
        self.balancer = None
        if balance != "none":
            self.balancer = Balancer(placement, group=group, device=device)
            self.balancer.warmup()
        self.lplb = balance in ("lplb", "live")
        self._set_even_shares()
        self.served: list[Tensor] = []
        # Called with the logical ids of every batch, if they are recorded.
        self.record: Callable[[Tensor], None] | None = None

    def _set_even_shares(self) -> None:
        """Compute the cumulative shares of an even split, for ``eplb``."""
        counts = self.replicas.placement.logcnt.tolist()
        shares = [(1 << 24) * (copy + 1) // count for count in counts for copy in range(count)]
        self.even_shares = torch.tensor(shares, dtype=torch.int32, device=self.replicas.device)

    def move(self, placement: Placement, optimizer: torch.optim.Optimizer) -> None:
        """Move experts, their optimizer state and the balancer's tables to another placement."""
        if self.balancer is not None:
            placement = self.balancer.update_placement(placement)
        self.replicas.move(placement, optimizer)
        self._set_even_shares()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of every token; see `moe.model.MoE.route`."""
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
            Scalar 0: there is no auxiliary loss here, only the selection bias.
        """
        if self.timer is not None:
            x = self.timer.stamp(x, begins=True)
        ids, weights, _ = self.route(x)
        if self.record is not None:
            self.record(ids)
        counts = count_assignments(ids, 1, self.config.experts)
        # Rows travel in the dtype of the products.
        low = x.to(self.dtype)
        slot_ids = self.physical(ids)
        if self.live:
            # Ranks compare what live slots hold before they send tokens there.
            plan, slot_weights = self.replicas.send(self.balancer.live)
        else:
            slot_weights = self.replicas.weights
        rows, ends, route = self.transport.dispatch(low, slot_ids, weights)
        y = expert_outputs(rows, slot_weights["w_in"], slot_weights["w_out"], ends, self.grouped)
        if self.live:
            y = self.replicas.join(y, plan, slot_weights)
        y = self.transport.combine(y, route)
        self.served.append(ends[-1])
        if self.timer is not None:
            y = self.timer.stamp(y, begins=False)
        return y, counts, weights.new_zeros(())
