"""One MoE layer of Megatron-Core: its dispatcher for physical experts, and its experts."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from lplb_triton._checks import resolve_device
from lplb_triton.integrations._layer import LayerBalance
from lplb_triton.integrations._megatron_checks import find_kind
from lplb_triton.integrations._megatron_experts import (
    replace_grouped_forward,
    replace_sequential_forward,
)

__all__ = ["balance_layer"]


def balance_layer(
    label: str, layer: Any, redundant: int, live: int, balance_above: float
) -> LayerBalance:
    """Balance an MoE layer in place, and return what rebalances it; collective over its EP group.

    Its modules, parameters and configuration stay as they are. The token dispatcher is replaced by
    one of the same kind for as many experts as there are slots.
    """
    # Where Megatron initializes weights on the CPU, it moves them after the model provider.
    on_gpu = "nccl" in dist.get_backend(layer.ep_group)
    device = resolve_device(None) if on_gpu else next(layer.experts.parameters()).device
    balance = LayerBalance(
        layer.config.num_moe_experts,
        group=layer.ep_group,
        device=device,
        redundant=redundant,
        live=live,
        balance_above=balance_above,
    )
    _replace_dispatcher(layer, balance)
    replace = {"sequential": replace_sequential_forward, "grouped": replace_grouped_forward}
    replace[find_kind(label, layer.experts)](layer.experts, balance)
    return balance


def _replace_dispatcher(layer: Any, balance: LayerBalance) -> None:
    """Give a layer a token dispatcher whose experts are slots."""
    old = layer.token_dispatcher
    config = copy.copy(layer.config)
    config.num_moe_experts = balance.placement.n_physical
    n_slots = balance.placement.slots_per_rank
    first = balance.plan.rank * n_slots
    new = type(old)(
        n_slots,
        list(range(first, first + n_slots)),
        config=config,
        pg_collection=SimpleNamespace(ep=old.ep_group, expt_tp=old.tp_group, tp_ep=old.tp_ep_group),
    )
    if old.shared_experts is not None:
        new.set_shared_experts(old.shared_experts)
    physical = _PhysicalRouting(layer.config, balance)
    preprocess = new.dispatch_preprocess

    def dispatch_preprocess(
        hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        return preprocess(hidden_states, *physical(routing_map, probs))

    new.dispatch_preprocess = dispatch_preprocess
    layer.token_dispatcher = new


class _PhysicalRouting:
    """Turns the router's map and probabilities by expert into those by slot."""

    def __init__(self, config: Any, balance: LayerBalance) -> None:
        self.balance, self.top_k = balance, config.moe_router_topk
        # Without a capacity every token has all its choices.
        self.drops = config.moe_expert_capacity_factor is not None

    def __call__(
        self, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the map ``[tokens, slots]`` bool and the probabilities ``[tokens, slots]``.

        Both are given as ``[tokens, experts]``, True and not zero where a token chose an expert.
        """
        chosen = routing_map.to(torch.int8).topk(self.top_k, dim=1)
        experts = chosen.indices
        if self.drops:
            slots = self.balance.route(experts.masked_fill(chosen.values == 0, -1))
        else:
            slots = self.balance.route(experts)
        n_slots = self.balance.placement.n_physical
        taken = probs.gather(1, experts)
        if not self.drops:
            shape = (len(probs), n_slots)
            hits = torch.zeros(shape, dtype=torch.bool, device=probs.device)
            return (
                hits.scatter_(1, slots, True),
                torch.zeros(shape, dtype=probs.dtype, device=probs.device).scatter(1, slots, taken),
            )
        # Dropped choices go to a column that is cut off, with a probability of zero.
        shape = (len(probs), n_slots + 1)
        column = torch.where(slots < 0, n_slots, slots)
        hits = torch.zeros(shape, dtype=torch.bool, device=probs.device)
        hits.scatter_(1, column, True)
        spread_out = torch.zeros(shape, dtype=probs.dtype, device=probs.device)
        spread_out = spread_out.scatter(1, column, taken)
        return hits[:, :n_slots].contiguous(), spread_out[:, :n_slots].contiguous()
