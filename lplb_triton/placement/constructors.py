"""Slot maps from topologies and from load histories, for the constructors of `Placement`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton._checks import check_integer, nearest_divisors, nearest_multiples, would_do
from lplb_triton.eplb import check_weight, rebalance
from lplb_triton.placement.arguments import to_loads
from lplb_triton.placement.home import choose_home_slots

__all__ = ["copy_over_topology", "replicate_at_home", "replicate_by_history"]


def copy_over_topology(
    r2o: torch.Tensor,
    n_routed_experts: int,
    n_logical_routed_experts: int,
    ep_size: int,
    workload: torch.Tensor | None,
    num_nodes: int,
) -> NDArray[np.int64]:
    """Return the slot map of `Placement.from_topology`, ``[n_physical]``.

    ``r2o`` has been validated; the other arguments are checked here.
    """
    group_size, num_redundants = r2o.shape
    n_physical = check_integer("n_routed_experts", n_routed_experts)
    n_logical = check_integer("n_logical_routed_experts", n_logical_routed_experts)
    ep_size = check_integer("ep_size", ep_size)
    num_nodes = check_integer("num_nodes", num_nodes)
    _check_topology_sizes(n_physical, n_logical, ep_size, group_size, num_redundants)
    n_local = n_logical // ep_size
    redundant = n_physical // ep_size - n_local
    n_group, combined = ep_size // group_size, redundant // num_redundants
    order = _order_experts(workload, n_logical, n_group, num_nodes, ep_size)
    order = order.reshape(n_group, group_size, n_local)
    originals = order[:, :, :redundant].reshape(n_group, group_size, combined, num_redundants)
    source = np.broadcast_to(r2o.numpy()[None, :, None, :], originals.shape)
    copies = np.take_along_axis(originals, source.astype(np.int64), axis=1)
    slots = np.concatenate([order, copies.reshape(n_group, group_size, redundant)], axis=2)
    return slots.reshape(-1)


def _check_topology_sizes(
    n_physical: int, n_logical: int, ep_size: int, group_size: int, num_redundants: int
) -> None:
    """Raise, naming the argument of `Placement.from_topology`, unless the sizes fit each other."""

    def fits(n_physical: int, n_logical: int, ep_size: int) -> bool:
        redundant = n_physical - n_logical
        return (
            ep_size % group_size == 0
            and n_logical % ep_size == 0
            and redundant % (ep_size * num_redundants) == 0
            and 0 < redundant <= n_logical
        )

    if fits(n_physical, n_logical, ep_size):
        return
    if ep_size % group_size:
        near = nearest_multiples(group_size, ep_size)
        raise ValueError(
            f"ep_size must be a multiple of the topology's {group_size} ranks, got {ep_size}"
            f"{would_do([n for n in near if fits(n_physical, n_logical, n)])}"
        )
    n_local, rest = divmod(n_logical, ep_size)
    if rest:
        near = nearest_multiples(ep_size, n_logical)
        raise ValueError(
            f"n_logical_routed_experts must be a multiple of ep_size {ep_size}, got {n_logical}"
            f"{would_do([n for n in near if fits(n_physical, n, ep_size)])}"
        )
    if num_redundants > n_local:
        raise ValueError(
            f"n_logical_routed_experts gives each rank {n_local} experts, fewer than the "
            f"topology's {num_redundants} columns"
        )
    near = nearest_multiples(ep_size * num_redundants, n_physical - n_logical)
    most = n_local // num_redundants * num_redundants * ep_size
    raise ValueError(
        f"n_routed_experts must give each of {ep_size} ranks a positive multiple of the "
        f"topology's {num_redundants} columns, at most its {n_local} logical experts, as "
        f"redundant slots, got {n_physical}{would_do([n_logical + min(n, most) for n in near])}"
    )


def _order_experts(
    workload: torch.Tensor | None, n_logical: int, n_group: int, num_nodes: int, ep_size: int
) -> NDArray[np.int64]:
    """Order the logical experts rank by rank, heaviest first where a history is given."""
    if workload is None:
        return np.arange(n_logical)
    load = to_loads("workload", workload)
    if load.shape != (n_logical,):
        raise ValueError(f"workload must have shape [{n_logical}], got {list(load.shape)}")
    weight = check_weight("workload", load, "[n_logical]")
    # The ranks' groups are consecutive experts here: a policy of nodes that don't divide them is
    # none, and those that do divide the ranks too.
    phy2log, _, _ = rebalance(weight.unsqueeze(0), n_logical, n_group, num_nodes, ep_size)
    by_rank = phy2log[0].reshape(ep_size, -1)
    heaviest = load[by_rank].argsort(dim=1, descending=True, stable=True)
    return by_rank.gather(1, heaviest).reshape(-1).numpy()


def replicate_by_history(
    load: torch.Tensor | NDArray[np.floating],
    ep_size: int,
    redundant_per_rank: int,
    num_groups: int,
    num_nodes: int,
) -> tuple[torch.Tensor, int]:
    """Return the slot map of `Placement.from_history`, ``[n_physical]``, and the experts in it."""
    weight = check_weight("load", to_loads("load", load), "[n_logical]")
    n_logical = len(weight)
    ep_size = check_integer("ep_size", ep_size)
    redundant = check_integer("redundant_per_rank", redundant_per_rank, 0)
    num_groups = check_integer("num_groups", num_groups)
    num_nodes = check_integer("num_nodes", num_nodes)
    in_nodes = num_groups % num_nodes == 0
    if n_logical % ep_size:
        near = nearest_divisors(n_logical, ep_size)
        raise ValueError(
            f"ep_size must divide the number of logical experts, {n_logical}, got {ep_size}"
            f"{would_do([n for n in near if not in_nodes or n % num_nodes == 0])}"
        )
    if in_nodes and n_logical % num_groups:
        near = nearest_divisors(n_logical, num_groups)
        raise ValueError(
            f"num_groups must divide the number of logical experts, {n_logical}, got "
            f"{num_groups}"
            f"{would_do([n for n in near if n % num_nodes or ep_size % num_nodes == 0])}"
        )
    if in_nodes and ep_size % num_nodes:
        raise ValueError(
            f"num_nodes must divide ep_size, {ep_size}, got {num_nodes}"
            f"{would_do(nearest_divisors(ep_size, num_nodes))}"
        )
    phy2log, _, _ = rebalance(
        weight.unsqueeze(0), n_logical + redundant * ep_size, num_groups, num_nodes, ep_size
    )
    return phy2log[0], n_logical


def replicate_at_home(
    load: torch.Tensor | NDArray[np.floating],
    ep_size: int,
    redundant_per_rank: int,
    num_groups: int,
    num_nodes: int,
) -> NDArray[np.int64]:
    """Return the slot map of `Placement.from_history` with experts at home, ``[n_physical]``."""
    weight = check_weight("load", to_loads("load", load), "[n_logical]").double().numpy()
    ep_size = check_integer("ep_size", ep_size)
    redundant = check_integer("redundant_per_rank", redundant_per_rank, 0)
    for name, value in (("num_groups", num_groups), ("num_nodes", num_nodes)):
        if check_integer(name, value) != 1:
            raise ValueError(f"{name} must be 1 where experts stay at home, got {value}")
    if len(weight) % ep_size:
        raise ValueError(
            f"ep_size must divide the number of logical experts, {len(weight)}, got {ep_size}"
            f"{would_do(nearest_divisors(len(weight), ep_size))}"
        )
    return choose_home_slots(weight, ep_size, redundant, spread_out=False).reshape(-1)
