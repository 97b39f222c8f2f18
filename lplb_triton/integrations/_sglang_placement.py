"""SGLang's placement entry point, backed by `lplb_triton.eplb.rebalance_experts`."""

from __future__ import annotations

import enum

import numpy as np
import torch

from lplb_triton import eplb
from lplb_triton._checks import check_integer
from lplb_triton.integrations._checks import check_int_map, check_load, check_sizes, describe_fault

__all__ = ["EplbAlgorithm", "compute_algorithm", "rebalance_experts"]


class EplbAlgorithm(enum.Enum):
    """SGLang's placement algorithms that EPLB implements."""

    deepseek = enum.auto()
    """Global: groups and nodes are ignored."""
    deepseek_hierarchical = enum.auto()
    """Expert groups are packed onto nodes first."""
    elasticity_aware = enum.auto()
    """As ``deepseek``, on the ranks that are active."""
    elasticity_aware_hierarchical = enum.auto()
    """As ``deepseek_hierarchical`` if all ranks are active, else as ``elasticity_aware``."""


_HIERARCHICAL = (EplbAlgorithm.deepseek_hierarchical, EplbAlgorithm.elasticity_aware_hierarchical)
_ELASTIC = (EplbAlgorithm.elasticity_aware, EplbAlgorithm.elasticity_aware_hierarchical)


def compute_algorithm(raw_algorithm: str, num_groups: int | None, num_nodes: int) -> EplbAlgorithm:
    """Choose the algorithm from SGLang's ``--eplb-algorithm``.

    Parameters
    ----------
    raw_algorithm : str
        ``"auto"``, or the name of an `EplbAlgorithm`.
    num_groups : int or None
        Expert groups of the model, None if it has none.
    num_nodes : int
        Servers.

    Returns
    -------
    EplbAlgorithm
        Under ``"auto"``, hierarchical if there are groups and nodes divide them.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If ``raw_algorithm`` is another name, or a number is below 1.
    """
    nodes = check_integer("num_nodes", num_nodes)
    if raw_algorithm != "auto":
        return _find_algorithm("raw_algorithm", raw_algorithm)
    if num_groups is not None and check_integer("num_groups", num_groups) % nodes == 0:
        return EplbAlgorithm.deepseek_hierarchical
    return EplbAlgorithm.deepseek


def _find_algorithm(name: str, algorithm: object) -> EplbAlgorithm:
    """Return the member of that name, or of the name of a member of SGLang's own enum."""
    wanted = algorithm.name if isinstance(algorithm, enum.Enum) else algorithm
    if not isinstance(wanted, str) or wanted not in EplbAlgorithm.__members__:
        known = ", ".join(EplbAlgorithm.__members__)
        raise ValueError(f"{name} must be one of {known}, got {wanted!r}")
    return EplbAlgorithm[wanted]


def rebalance_experts(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: EplbAlgorithm | enum.Enum | str,
    *,
    active_ranks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place and replicate the experts of every layer by recorded loads.

    Parameters
    ----------
    tokens_per_expert : torch.Tensor
        ``[steps, layers, num_logical]``, load of each logical expert at each recorded step, finite
        and non-negative; the steps are summed. Any real dtype and device.
    num_physical_experts : int
        Slots per layer.
    num_local_physical_experts : int
        Slots per layer and rank; divides ``num_physical_experts``.
    num_groups : int or None
        Expert groups; needed by the hierarchical algorithms only.
    num_nodes : int
        Servers; under a hierarchical algorithm a divisor of ``num_groups``.
    algorithm : EplbAlgorithm, enum.Enum or str
        One of `EplbAlgorithm`, the member of the same name of SGLang's enum, or the name.
    active_ranks : torch.Tensor or None
        ``[ranks]`` int, 1 for a rank that takes part, 0 for one that doesn't, on any device;
        entries beyond the last rank must be 0. Needed by the elasticity-aware algorithms, and read
        by them only.

    Returns
    -------
    physical_to_logical_map : torch.Tensor
        ``[layers, num_physical_experts]`` int64, logical expert of each slot; 0 for the slots of
        ranks that aren't active.
    logical_to_all_physical_map : torch.Tensor
        ``[layers, num_logical, K]`` int64, slots of each expert on active ranks, padded with -1;
        ``K`` is the largest entry of ``expert_count``.
    expert_count : torch.Tensor
        ``[layers, num_logical]`` int64, copies of each expert on active ranks.

        All three are on the CPU.

    Raises
    ------
    TypeError
        If an argument that must be a tensor isn't one, or a number is not an integer.
    ValueError
        For shapes, values or divisors that don't fit, and for SGLang's algorithms that aren't
        EPLB's.
    """
    chosen = _find_algorithm("algorithm", algorithm)
    tokens = check_load("tokens_per_expert", tokens_per_expert, ("steps", "layers", "num_logical"))
    n_physical = check_integer("num_physical_experts", num_physical_experts)
    n_local = check_integer("num_local_physical_experts", num_local_physical_experts)
    if n_physical % n_local:
        raise ValueError(
            f"num_local_physical_experts must divide num_physical_experts {n_physical}, "
            f"got {n_local}"
        )
    n_ranks = n_physical // n_local
    active = np.arange(n_ranks)
    if chosen in _ELASTIC:
        active = _find_active_ranks("active_ranks", active_ranks, n_ranks)
    groups, nodes = ("num_groups", 1), ("num_nodes", 1)
    if chosen in _HIERARCHICAL and active.size == n_ranks:
        if num_groups is None:
            raise ValueError(f"num_groups must be given for {chosen.name}, got None")
        groups, nodes = ("num_groups", num_groups), ("num_nodes", num_nodes)
    if active.size * n_local < tokens.shape[2] <= n_physical:
        raise ValueError(
            f"active_ranks must leave room for {tokens.shape[2]} experts, got {active.size} ranks "
            f"of {n_local} slots"
        )
    physical = ("num_physical_experts", n_physical)
    ranks = ("num_physical_experts / num_local_physical_experts", n_ranks)
    check_sizes(tokens.shape[2], physical, ranks, groups, nodes)
    load = tokens.detach().sum(0)
    fault = describe_fault("tokens_per_expert", load.cpu())
    if fault is not None:
        raise ValueError(fault)
    phy2log, log2phy, count = eplb.rebalance_experts(
        load, active.size * n_local, groups[1], nodes[1], active.size
    )
    if active.size == n_ranks:
        return phy2log, log2phy, count
    # Numbers of the slots of the active ranks among all slots.
    slots = torch.from_numpy((active[:, None] * n_local + np.arange(n_local)).reshape(-1))
    all_slots = phy2log.new_zeros(len(phy2log), n_physical)
    all_slots[:, slots] = phy2log
    return all_slots, torch.where(log2phy < 0, -1, slots[log2phy.clamp(min=0)]), count


def _find_active_ranks(name: str, active_ranks: torch.Tensor | None, n_ranks: int) -> np.ndarray:
    """Return the numbers of the active ranks, or raise naming ``name``."""
    if active_ranks is None:
        raise ValueError(f"{name} must be given for the elasticity-aware algorithms, got None")
    flags = check_int_map(name, active_ranks, 1).detach().cpu().numpy()
    if not np.isin(flags, (0, 1)).all():
        raise ValueError(f"{name} must hold 0 and 1")
    if len(flags) < n_ranks or flags[n_ranks:].any():
        raise ValueError(
            f"{name} must have an entry for each of {n_ranks} ranks and 0 beyond, got {len(flags)} "
            f"entries, the last 1 at {int(flags.nonzero()[0].max(initial=-1))}"
        )
    if not flags.any():
        raise ValueError(f"{name} must name at least one active rank")
    return np.flatnonzero(flags)
