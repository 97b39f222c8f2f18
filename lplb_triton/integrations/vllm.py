"""vLLM's EPLB policy, backed by `lplb_triton.eplb.rebalance_experts`."""

from __future__ import annotations

import logging

import numpy as np
import torch

from lplb_triton import eplb
from lplb_triton._checks import check_integer
from lplb_triton.integrations._checks import (
    MAX_TOTAL_LOAD,
    EplbSizeError,
    check_int_map,
    check_load,
    check_sizes,
    describe_fault,
    find_usable,
)
from lplb_triton.placement.moves import keep_slots

__all__ = ["LplbEplbPolicy"]

_logger = logging.getLogger("lplb_triton")


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

        Never raises because of what the tensors hold: vLLM's asynchronous worker would end with a
        log line. If a load is NaN, infinite or negative, or a layer's total is out of range, an
        error is logged by the logger ``lplb_triton`` and the old map comes back. Where there is no
        old map, or it isn't a placement of these sizes, such a load counts as zero, and a layer's
        loads are scaled down where the total is too large.

        Parameters
        ----------
        weight : torch.Tensor
            ``[layers, num_logical]``, load of each logical expert, any real dtype and device.
        num_replicas : int
            Slots per layer: a multiple of ``num_ranks``, at least ``num_logical``.
        num_groups, num_nodes : int
            Expert groups and nodes; hierarchical if nodes divide groups, else global.
        num_ranks : int
            Expert-parallel ranks; rank r owns the r-th run of ``num_replicas / num_ranks`` slots.
        old_global_expert_indices : torch.Tensor or None
            ``[layers, slots]`` int, logical expert of each slot at present (any other number:
            none). As many experts as possible stay on their rank, and keep their slot there. The
            map may have more slots than ``num_replicas`` (the last ranks leave) or fewer (ranks
            join). If it can't consist of ranks with as many slots each, it binds nothing, and a
            warning is logged.

        Returns
        -------
        torch.Tensor
            ``[layers, num_replicas]`` int64 on the CPU, logical expert of each slot. The ranks'
            shares are those of `lplb_triton.eplb.rebalance_experts`; the old map decides which
            rank of the node takes which share, and in which order.

        Raises
        ------
        TypeError
            If an argument is not of the kind above.
        ValueError
            If sizes don't divide as above, or the old map has another number of layers than
            ``weight``. As in vLLM's own policy, it is an ``AssertionError`` too.
        """
        weight = check_load("weight", weight, ("layers", "num_logical"))
        n_logical = weight.shape[1]
        nodes, groups = ("num_nodes", num_nodes), ("num_groups", num_groups)
        if check_integer(*groups) % check_integer(*nodes):
            nodes, groups = ("num_nodes", 1), ("num_groups", 1)
        physical, ranks = ("num_replicas", num_replicas), ("num_ranks", num_ranks)
        check_sizes(n_logical, physical, ranks, groups, nodes)
        old = None
        if old_global_expert_indices is not None:
            old = _check_old_map(old_global_expert_indices, len(weight))
        load = weight.detach().cpu()
        fault = describe_fault("weight", load)
        if fault is not None:
            if old is not None and _is_placement(old, num_replicas, n_logical):
                _logger.error("%s: the old map stays", fault)
                return old
            _logger.error("%s: such loads count as zero, or a layer's are scaled down", fault)
            load = _mend_loads(load)
        new, _, _ = eplb.rebalance_experts(load, num_replicas, groups[1], nodes[1], num_ranks)
        if old is not None:
            old = _fit_to_ranks(old, num_replicas, num_ranks)
        if old is None:
            return new
        return keep_slots(_keep_ranks(new, old, n_logical, num_ranks, nodes[1]), old, num_ranks)


def _check_old_map(value: object, n_layers: int) -> torch.Tensor:
    """Return a copy of the old map as int64 on the CPU, or raise naming it."""
    name = "old_global_expert_indices"
    old = check_int_map(name, value, 2).detach().to("cpu", torch.int64, copy=True)
    if len(old) != n_layers:
        raise EplbSizeError(f"{name} must have {n_layers} layers like weight, got {len(old)}")
    return old.contiguous()


def _is_placement(phy2log: torch.Tensor, n_physical: int, n_logical: int) -> bool:
    """Whether a map has this many slots and gives every expert a slot in every layer."""
    if phy2log.shape[1] != n_physical or bool(((phy2log < 0) | (phy2log >= n_logical)).any()):
        return False
    return bool(_count_copies(phy2log.unsqueeze(1), n_logical).all())


def _mend_loads(load: torch.Tensor) -> torch.Tensor:
    """Replace loads that EPLB can't use by zero, and scale layers whose loads are too large."""
    load = load.float()
    load = torch.where(find_usable(load), load, 0.0)
    too_large = load.sum(1, keepdim=True, dtype=torch.float64) > MAX_TOTAL_LOAD
    return torch.where(too_large, load / (2 * load.shape[1]), load)


def _fit_to_ranks(old: torch.Tensor, n_physical: int, n_ranks: int) -> torch.Tensor | None:
    """Fit a map of more or fewer ranks to these ranks; slots of new ranks hold -1, no expert.

    Returns None if a rank had another number of slots.
    """
    n_slots = n_physical // n_ranks
    if old.shape[1] % n_slots:
        _logger.warning(
            "old_global_expert_indices has %d slots, not whole ranks of %d: it binds nothing",
            old.shape[1],
            n_slots,
        )
        return None
    fitted = old.new_full((len(old), n_physical), -1)
    shared = min(old.shape[1], n_physical)
    fitted[:, :shared] = old[:, :shared]
    return fitted


def _keep_ranks(
    new: torch.Tensor, old: torch.Tensor, n_logical: int, n_ranks: int, n_nodes: int
) -> torch.Tensor:
    """Assign the experts of a node's ranks to its ranks so that most experts stay where they are.

    Both maps are ``[layers, n_physical]``. Exchanging ranks of a node does not change the balance.
    """
    from scipy.optimize import linear_sum_assignment  # SciPy is slow to import

    shares = new.reshape(len(new) * n_nodes, n_ranks // n_nodes, -1)
    arriving = _count_copies(shares, n_logical)
    leaving = _count_copies(old.reshape(shares.shape), n_logical)
    stay = arriving.new_zeros(len(shares), shares.shape[1], shares.shape[1], dtype=torch.float32)
    # The smaller of two numbers is the count of those k that both of them reach.
    for k in range(1, int(torch.minimum(arriving.amax(), leaving.amax())) + 1):
        stay += (leaving >= k).float() @ (arriving >= k).float().transpose(1, 2)
    taken = [linear_sum_assignment(rows, maximize=True)[1] for rows in stay.numpy()]
    index = torch.from_numpy(np.stack(taken)).unsqueeze(2)
    return shares.gather(1, index.expand_as(shares)).reshape(new.shape)


def _count_copies(slots: torch.Tensor, n_logical: int) -> torch.Tensor:
    """Count each expert's slots, ``[X, ranks, slots]`` to ``[X, ranks, n_logical]`` int32."""
    held = (slots >= 0) & (slots < n_logical)
    copies = slots.new_zeros(*slots.shape[:2], n_logical, dtype=torch.int32)
    return copies.scatter_add_(2, slots.where(held, 0), held.int())
