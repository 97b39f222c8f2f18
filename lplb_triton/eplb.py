"""Expert placement from a load history, to be computed anew every few hundred steps.

:func:`rebalance_experts` gives the same answer as ``rebalance_experts`` of DeepSeek's Expert
Parallelism Load Balancer (EPLB, https://github.com/deepseek-ai/EPLB, MIT licence), bit for bit,
ties included. The method is theirs; this implementation is independent of their code and handles
all layers of a model at once instead of one after the other.

Bit-identity rests on four facts, which the code below must keep:

1. loads are float32, and every division by a copy count is a float32 division;
2. equally loaded items are packed in the order in which ``torch.sort`` leaves them (its default,
   unstable mode, called on a matrix of the same shape);
3. the load of a pack is accumulated in float32, one item after the other, and of several least
   loaded packs with room the first takes the item;
4. of several experts with the largest load per copy the first gets the next copy.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb_triton._checks import (
    check_real,
    nearest_divisors,
    nearest_multiples,
    on_host,
    would_do,
)

__all__ = ["check_weight", "rebalance", "rebalance_experts"]

_IntArray = npt.NDArray[np.int64]

_CPU = torch.device("cpu")
# Totals up to this keep pack loads finite, so that infinity can mark a full pack.
_LARGEST_TOTAL = torch.finfo(torch.float32).max / 2


def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the copies of every expert and the GPU of every copy from recorded loads.

    If `num_nodes` divides `num_groups`, the policy is hierarchical: whole expert groups are packed
    onto nodes, experts are replicated within their node, then the copies are packed onto the GPUs
    of that node. Otherwise it is global: groups and nodes are ignored. Both packing steps take the
    items from heaviest to lightest and give each to the least loaded pack that has room;
    replication gives every further copy to the expert with the largest load per copy.

    Parameters
    ----------
    weight : torch.Tensor
        ``[num_layers, num_experts]``, load (e.g. tokens) of each logical expert; finite and
        non-negative, any real dtype, any device. The computation is float32 on the CPU.
    num_replicas : int
        Physical experts per layer: a multiple of `num_gpus`, at least ``num_experts``.
    num_groups : int
        Expert groups (the router's groups); under the hierarchical policy a divisor of
        ``num_experts``.
    num_nodes : int
        Servers; under the hierarchical policy a divisor of `num_gpus`.
    num_gpus : int
        GPUs that share one layer. GPU ``r`` holds the physical experts
        ``r * num_replicas / num_gpus`` up to the next GPU's first.

    Returns
    -------
    phy2log : torch.Tensor
        ``[num_layers, num_replicas]`` int64, logical expert of each physical expert.
    log2phy : torch.Tensor
        ``[num_layers, num_experts, K]`` int64, physical experts of each logical expert, padded
        with -1; ``K`` is the largest entry of `logcnt`.
    logcnt : torch.Tensor
        ``[num_layers, num_experts]`` int64, copies of each logical expert.

        All three are on the CPU.

    Raises
    ------
    TypeError
        If `weight` is not a tensor of a real dtype or a number is not an integer.
    ValueError
        If a shape, a value or a divisibility is not as stated above, or if the loads of a layer
        add up to more than half the largest float32.

    Notes
    -----
    Method, argument names and results are those of DeepSeek's EPLB,
    https://github.com/deepseek-ai/EPLB (MIT licence). What that program leaves to assertions
    or to a late failure is reported here as an error that names the argument.

    The copies of one expert are equally loaded, so ties are the rule. Their order is that of
    ``torch.sort``, which may differ between processors and versions of torch: where several
    processes need the same placement, compute it in one and broadcast it.
    """
    load = check_weight("weight", weight, "[num_layers, num_experts]")
    n_logical = load.shape[1]
    n_physical = _positive_int("num_replicas", num_replicas)
    n_groups = _positive_int("num_groups", num_groups)
    n_nodes = _positive_int("num_nodes", num_nodes)
    n_gpus = _positive_int("num_gpus", num_gpus)
    if n_physical < n_logical:
        raise ValueError(
            f"num_replicas must be at least the number of logical experts, {n_logical} "
            f"(weight.shape[1]), got {n_physical}"
        )
    if n_physical % n_gpus:
        raise ValueError(
            f"num_replicas must be a multiple of num_gpus ({n_gpus}), got {n_physical}"
            f"{would_do(nearest_multiples(n_gpus, n_physical, n_logical))}"
        )
    if n_groups % n_nodes == 0:
        if n_logical % n_groups:
            raise ValueError(
                f"num_groups must divide the number of logical experts, {n_logical} "
                f"(weight.shape[1]), got {n_groups}"
                f"{would_do(nearest_divisors(n_logical, n_groups))}"
            )
        if n_gpus % n_nodes:
            sizes = [n for n in nearest_multiples(n_nodes, n_gpus) if n_physical % n == 0]
            raise ValueError(
                f"num_gpus must be a multiple of num_nodes ({n_nodes}), got {n_gpus}"
                f"{would_do(sizes)}"
            )
    return rebalance(load, n_physical, n_groups, n_nodes, n_gpus)


def rebalance(
    load: torch.Tensor, n_physical: int, n_groups: int, n_nodes: int, n_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `rebalance_experts` does, for arguments that have been checked."""
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    n_layers, n_logical = load.shape
    # Local experts are numbered from 0 within their node. Local arrays have a row for each pair of
    # a layer and a node.
    local2log = _experts_by_node(load, n_groups, n_nodes)
    local_load = load.gather(1, local2log).view(n_layers * n_nodes, -1)
    local_of_copy, copy_index, local_count = _replicate(local_load, n_physical // n_nodes)

    load_of_copy = (local_load / local_count).gather(1, local_of_copy)
    copy_in_slot = _pack(load_of_copy, n_gpus // n_nodes)
    local_in_slot = local_of_copy.gather(1, copy_in_slot).view(n_layers, n_nodes, -1)
    first_of_node = torch.arange(n_nodes, device=_CPU).mul_(n_logical // n_nodes).view(1, -1, 1)
    phy2log = local2log.gather(1, (local_in_slot + first_of_node).view(n_layers, -1))

    logcnt = torch.empty_like(local2log)
    logcnt.scatter_(1, local2log, local_count.view(n_layers, -1))
    log2phy = torch.full(
        (n_layers, n_logical, int(logcnt.max())), -1, dtype=torch.int64, device=_CPU
    )
    index_in_slot = copy_index.gather(1, copy_in_slot).view(n_layers, -1)
    layer = torch.arange(n_layers, device=_CPU).unsqueeze(1)
    log2phy[layer, phy2log, index_in_slot] = torch.arange(n_physical, device=_CPU).expand(
        n_layers, -1
    )
    return phy2log, log2phy, logcnt


def check_weight(name: str, weight: object, shape: str) -> torch.Tensor:
    """Return loads of a stated shape as float32 on the CPU, or raise naming ``name``.

    Strides are kept, since the rounding of ``torch.sum`` depends on the layout.
    """
    weight = check_real(name, weight)
    if weight.ndim != shape.count(",") + 1 or weight.numel() == 0:
        raise ValueError(
            f"{name} must have shape {shape}, without an axis of length 0, got {list(weight.shape)}"
        )
    load = on_host(name, weight).float()
    if not bool(load.isfinite().all()):
        raise ValueError(f"{name} must be finite in float32, got NaN or an infinite value")
    if bool((load < 0).any()):
        raise ValueError(f"{name} must be non-negative, got {float(load.min()):g}")
    largest = float(load.sum(-1, dtype=torch.float64).max())
    if largest > _LARGEST_TOTAL:
        raise ValueError(
            f"{name} must add up to at most {_LARGEST_TOTAL:g} in a layer, got {largest:g}"
        )
    return load


def _positive_int(name: str, value: Any) -> int:
    """Return an int of at least 1, or raise naming ``name``; anything with `__index__` will do."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def _experts_by_node(load: torch.Tensor, n_groups: int, n_nodes: int) -> torch.Tensor:
    """Pack expert groups onto nodes, and list the experts node by node.

    Takes ``[num_layers, num_experts]`` loads and returns expert ids of that shape.
    """
    n_layers, n_experts = load.shape
    group_size = n_experts // n_groups
    group_load = load.view(n_layers, n_groups, group_size).sum(-1)
    group_in_slot = _pack(group_load, n_nodes)
    return (
        group_in_slot.unsqueeze(-1) * group_size + torch.arange(group_size, device=_CPU)
    ).flatten(1)


def _pack(load: torch.Tensor, n_packs: int) -> torch.Tensor:
    """Distribute the items of each row evenly over packs, heaviest first.

    Takes float32 ``[X, n]`` and returns int64 ``[X, n]``: the item in each slot. Pack ``p`` owns
    the ``n / n_packs`` slots from ``p * n / n_packs`` on.
    """
    n_rows, n_items = load.shape
    capacity = n_items // n_packs
    if capacity == 1:
        return torch.arange(n_items, device=_CPU).repeat(n_rows, 1)

    order = load.sort(-1, descending=True).indices
    # Each step of the loop reads one contiguous row. The loop uses numpy, whose calls on arrays
    # this small take about a quarter of the time of torch's.
    item_load = load.gather(1, order).T.contiguous().numpy()
    pack_load = np.zeros((n_rows, n_packs), dtype=np.float32)
    pack_items = np.zeros(n_rows * n_packs, dtype=np.int64)
    flat_load = pack_load.reshape(-1)
    first_pack = np.arange(n_rows, dtype=np.int64) * n_packs
    # The item that fills a pack sets the pack's load to infinity, so that argmin never selects a
    # full pack.
    surcharge = np.zeros(capacity, dtype=np.float32)
    surcharge[-1] = np.inf
    slots = np.empty((n_items, n_rows), dtype=np.int64)
    for step in range(n_items):
        pack = pack_load.argmin(1)
        pack += first_pack
        filled = pack_items[pack]
        slots[step] = pack * capacity + filled
        flat_load[pack] += item_load[step] + surcharge[filled]
        pack_items[pack] = filled + 1

    item_in_slot: _IntArray = np.empty(n_rows * n_items, dtype=np.int64)
    item_in_slot[slots.T] = order.numpy()
    return torch.from_numpy(item_in_slot).view(n_rows, n_items)


def _replicate(
    load: torch.Tensor, n_copies: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give each copy beyond one per expert to the expert with the largest load per copy.

    Takes float32 ``[X, n]``. Returns the expert of each copy and its number among the expert's
    copies, both int64 ``[X, n_copies]``, and the number of copies of each expert, int64 ``[X, n]``.
    """
    n_rows, n_experts = load.shape
    expert_of_copy = torch.arange(n_copies, device=_CPU).repeat(n_rows, 1)
    copy_index = torch.zeros_like(expert_of_copy)
    count = torch.ones((n_rows, n_experts), dtype=torch.int64, device=_CPU)

    total = load.numpy().reshape(-1)
    per_copy = load.numpy().copy()
    flat_per_copy = per_copy.reshape(-1)
    flat_count = count.numpy().reshape(-1)
    first_expert = np.arange(n_rows, dtype=np.int64) * n_experts
    new_expert, new_index = expert_of_copy.numpy(), copy_index.numpy()
    for copy in range(n_experts, n_copies):
        expert = per_copy.argmax(1)
        new_expert[:, copy] = expert
        expert += first_expert
        copies = flat_count[expert]
        new_index[:, copy] = copies
        copies += 1
        flat_count[expert] = copies
        flat_per_copy[expert] = total[expert] / copies.astype(np.float32)
    return expert_of_copy, copy_index, count
