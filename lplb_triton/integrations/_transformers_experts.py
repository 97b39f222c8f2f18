"""An expert-parallel implementation of transformers with replicas; it imports transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP

from lplb_triton.integrations._layer import BALANCE_ABOVE, LayerBalance
from lplb_triton.integrations._transformers_memory import ExpertMemory
from lplb_triton.training.spread import attach

__all__ = ["BalancedEP", "find_layers"]

# Where an experts module refers to its implementation.
ATTRIBUTE = "lplb_expert_parallel"


class BalancedEP(AllToAllEP):  # type: ignore[misc]
    """transformers' all-to-all, with copies of experts on other ranks that share their tokens.

    Where all ranks of the EP group share one batch, evaluation runs transformers' all-reduce, in
    which each rank computes its own experts for all tokens, and copies would be of no use.

    Parameters
    ----------
    experts : torch.nn.Module
        An experts module whose parameters are distributed over the EP group.
    ep_mesh, tp_mesh : DeviceMesh
        EP group, and group of the ranks that hold the same batch.
    redundant : int
        Redundant slots per rank.
    balance_above : float
        As for `LayerBalance`.
    live : int
        Live slots per rank.

    Attributes
    ----------
    n_experts : int
        Experts of the layer, on all ranks together.
    balance : LayerBalance or None
        Made in the first forward pass, which is when the device is known.
    """

    def __init__(
        self,
        experts: Any,
        ep_mesh: Any,
        tp_mesh: Any,
        *,
        redundant: int,
        balance_above: float = BALANCE_ABOVE,
        live: int = 0,
    ) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._experts, self._redundant = experts, redundant
        self._balance_above, self._live = balance_above, live
        self._n_local = int(experts.num_experts)
        self._run_experts = experts.forward
        self._all_reduce = AllReduceEP(experts, ep_mesh, tp_mesh) if self.shares_batch else None
        self._memory = ExpertMemory(experts, self._n_local, redundant, lends_memory=not live)
        self._first_load: torch.Tensor | None = None
        self.balance: LayerBalance | None = None
        self.n_experts = self._n_local * ep_mesh.size()
        # The all-to-all numbers its receivers' experts by this count.
        self.num_local_experts = self._n_local + redundant + live
        setattr(experts, ATTRIBUTE, self)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> Any:
        """Return the weighted expert output of each token; collective over the EP group."""
        learns = self._experts.training or (torch.is_grad_enabled() and hidden_states.requires_grad)
        if self._all_reduce is not None and not learns:
            return self._all_reduce(hidden_states, top_k_index, top_k_weights)
        originals = self._memory.take_originals()
        balance = self._get_balance(hidden_states.device)
        slot_ids = self._route(balance, top_k_index)
        plan = balance.batch_plan
        slots = self._memory.make_slots(plan, originals)

        def run_experts(*args: torch.Tensor) -> Any:
            with self._memory.replace_parameters(plan, originals, slots):
                expert_output = self._run_experts(*args)
            # What goes back through the all-to-all, in whose backward pass every rank takes part.
            # The layer's own output must not be a view, which FSDP warns of.
            return attach(expert_output, list(slots.values()), plan)

        self.experts_forward = run_experts
        try:
            return super().__call__(hidden_states, slot_ids, top_k_weights)
        finally:
            # The closure would keep the slots' weights alive until the next call.
            self.experts_forward = self._run_experts

    def _get_balance(self, device: torch.device) -> LayerBalance:
        """Return the layer's balance; the first call makes it, and is collective."""
        if self.balance is None:
            self.balance = self._make_balance(device)
        return self.balance

    # It communicates, and makes what no graph may hold.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _make_balance(self, device: torch.device) -> LayerBalance:
        return LayerBalance(
            self.n_experts,
            group=self.ep_mesh.get_group(),
            device=device,
            redundant=self._redundant,
            balance_above=self._balance_above,
            live=self._live,
            load=self._first_load,
        )

    def _route(self, balance: LayerBalance, top_k_index: torch.Tensor) -> torch.Tensor:
        """Return the ids of slots for the tokens that this rank sends.

        Ranks that share a batch send a part of it each, which the all-to-all cuts off itself. So
        each part is balanced as the batch of its rank, and the rows of other ranks stay as is.
        """
        n_parts = self.tp_mesh.size()
        if n_parts == 1:
            return balance.route(top_k_index)
        size = -(-len(top_k_index) // n_parts)
        part = slice(size * self.tp_mesh.get_local_rank(), None)
        own = top_k_index[part][:size]
        ids = top_k_index.clone()
        ids[part][:size] = balance.route(own)
        return ids

    def use_load(self, load: torch.Tensor) -> None:
        """Place copies by loads ``[n_experts]``; collective once the layer has run.

        Before that it is what the first placement is made from.
        """
        if self.balance is None:
            self._first_load = load
        else:
            self.balance.rebalance(load)


def find_layers(model: torch.nn.Module) -> dict[str, BalancedEP]:
    """Return the model's experts modules that run with replicas, by name.

    Raises
    ------
    ValueError
        If there are none.
    """
    found = {
        name: layer
        for name, module in model.named_modules()
        if isinstance(layer := getattr(module, ATTRIBUTE, None), BalancedEP)
    }
    if not found:
        raise ValueError(
            "the model has no experts module that runs with replicas: load it with "
            'distributed_config=DistributedConfig(ep_size=..., ep_implementation="lplb")'
        )
    return found
