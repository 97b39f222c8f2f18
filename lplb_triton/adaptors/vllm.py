"""vLLM's EPLB policy, backed by `lplb_triton.eplb.rebalance_experts`."""

from __future__ import annotations

import torch

from lplb_triton import eplb
from lplb_triton.moves import keep_slots

__all__ = ["LplbEplbPolicy"]


class LplbEplbPolicy:
    """The rearrangement policy that vLLM's EPLB state calls, for all layers at once.

    It has the one class method of vLLM's ``AbstractEplbPolicy`` and is never instantiated, so it
    can stand in ``EPLB_POLICIES`` without deriving from that class; this module doesn't import
    vLLM.

    Examples
    --------
    >>> load = torch.tensor([[90, 10, 40, 60]])
    >>> old = LplbEplbPolicy.rebalance_experts(load, 6, 1, 1, 2)
    >>> LplbEplbPolicy.rebalance_experts(load.flip(1), 6, 1, 1, 2, old).shape
    torch.Size([1, 6])
    """

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Place and replicate the experts of every layer by their recorded loads.

        Parameters
        ----------
        weight : torch.Tensor
            ``[layers, num_logical]``, load of each logical expert; finite and non-negative, any
            real dtype and device.
        num_replicas : int
            Slots per layer: a multiple of ``num_ranks``, at least ``num_logical``.
        num_groups, num_nodes : int
            Expert groups and nodes; hierarchical if nodes divide groups, else global.
        num_ranks : int
            Expert-parallel ranks; rank r owns the r-th run of ``num_replicas / num_ranks`` slots.
        old_global_expert_indices : torch.Tensor or None
            ``[layers, num_replicas]`` int, logical expert of each slot now (-1: none). An expert
            that stays on its rank then keeps its slot there, so that its weights don't move. A
            map with another number of slots (ranks have joined or left) doesn't bind anything.

        Returns
        -------
        torch.Tensor
            ``[layers, num_replicas]`` int64 on the CPU, logical expert of each slot. Every rank
            holds the experts that `lplb_triton.eplb.rebalance_experts` gives it; the old map only
            decides their order.

        Raises
        ------
        TypeError
            If an argument is not of the kind above.
        ValueError
            If sizes don't divide as above, a load is negative or not finite, or the old map has
            another number of layers than ``weight``.
        """
        if isinstance(num_ranks, bool) or not isinstance(num_ranks, int):
            raise TypeError(f"num_ranks must be an int, got {type(num_ranks).__name__}")
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
        if isinstance(num_replicas, int) and num_replicas % num_ranks:
            raise ValueError(
                f"num_replicas must be a multiple of num_ranks {num_ranks}, got {num_replicas}"
            )
        old = old_global_expert_indices
        if old is not None:
            old = _checked_map(old)
        phy2log, _, _ = eplb.rebalance_experts(
            weight, num_replicas, num_groups, num_nodes, num_ranks
        )
        if old is None:
            return phy2log
        if old.shape[0] != phy2log.shape[0]:
            raise ValueError(
                f"old_global_expert_indices must have {phy2log.shape[0]} layers like weight, "
                f"got {old.shape[0]}"
            )
        if old.shape[1] != phy2log.shape[1]:
            return phy2log
        return keep_slots(phy2log, old, num_ranks)


def _checked_map(old: object) -> torch.Tensor:
    """Return the old map as int64 on the CPU, or raise naming it."""
    name = "old_global_expert_indices"
    if not isinstance(old, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(old).__name__}")
    if old.is_floating_point() or old.is_complex() or old.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {old.dtype}")
    if old.ndim != 2:
        raise ValueError(f"{name} must be [layers, num_replicas], got shape {tuple(old.shape)}")
    return old.detach().cpu().long()
