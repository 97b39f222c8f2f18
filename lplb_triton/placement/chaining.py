"""A placement for the linear program from mean loads alone, in milliseconds.

EPLB gives the copies of its hottest experts to whichever ranks have free slots. The linear program
needs load to flow from any rank to any other. So the replicated experts are laid along a closed
walk over all ranks: an expert's copies are on consecutive ranks of the walk, and the next expert
starts where it ends. With one redundant slot per rank the walk is a ring. With more, the walk goes
around again with another step, which makes a graph of small diameter. The experts with one copy
then fill the ranks, heaviest first, each on the least loaded rank with a free slot.

A placement without a repeat on any rank exists whenever no expert has more copies than there are
ranks and no rank has more slots than there are experts. The walk finds it as long as some rank
with a free slot lacks the expert to be placed. Where none does, one exchange frees a slot on
another rank.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton._checks import (
    check_flag,
    check_integer,
    check_real,
    nearest_divisors,
    on_host,
    would_do,
)
from lplb_triton.placement import Placement
from lplb_triton.placement.arguments import average_batches
from lplb_triton.placement.home import choose_home_slots
from lplb_triton.placement.moves import number_domains
from lplb_triton.placement.node_slots import choose_node_slots
from lplb_triton.placement.nodes import (
    TrafficPrice,
    assign_groups,
    average_demand,
    check_nodes,
    sum_by_node,
)

__all__ = ["chain", "check_load", "check_ranks", "read_traffic", "scale_rows"]

# Steps of the second and later rounds of the walk, as fractions of the ranks. They are far from
# simple ratios, so that rounds join different ranks.
STEP_FRACTIONS = (0.382, 0.236, 0.309, 0.146)


def chain(
    load: torch.Tensor,
    ep_size: int,
    *,
    redundant_per_rank: int = 1,
    ranks_per_domain: int | None = None,
    keep_home: bool = False,
    ranks_per_node: int | None = None,
    traffic_price: float | None = None,
    num_groups: int | None = None,
) -> Placement:
    """Place and replicate experts along a closed walk over the ranks, by their mean loads.

    Every further copy goes to the expert with the largest load per copy, as in EPLB, but not to
    a rank that has one already: an expert is repeated on a rank only if the rank has all others
    too. It takes about as long as EPLB. `lplb_triton.place` starts its search from here.

    With `ranks_per_node`, tokens that leave their node have a price: hot experts get a copy in
    every node that sends them many tokens, and experts lie in the nodes that use them most.

    Parameters
    ----------
    load : torch.Tensor
        ``[n_logical]``, mean load of each logical expert, finite and non-negative, any real dtype,
        any device; or ``[batches, n_logical]``, of which each batch counts equally, whatever its
        total. With `ranks_per_node` also ``[batches, sources, n_logical]``, by the ranks or nodes
        that the tokens come from, in order: as many sources for each node. Without sources all
        nodes are taken to send the same.
    ep_size : int
        Number of ranks; divides ``n_logical``.
    redundant_per_rank : int
        Redundant slots per rank.
    ranks_per_domain : int or None
        Consecutive ranks that form a node or NVLink domain; divides `ep_size`. All copies of an
        expert then lie in one domain, and the domains are the groups of the placement.
    keep_home : bool
        Whether the first ``n_logical / ep_size`` slots of rank r hold experts
        ``r * n_logical / ep_size`` and following, in order, as frameworks shard them. Only the
        redundant slots are chosen then: every further copy lies on a nearly empty rank far from
        the expert's other copies, and another such placement moves nothing but copies.
    ranks_per_node : int or None
        Consecutive ranks of a node; divides `ep_size`, and isn't combined with
        `ranks_per_domain`. Copies may lie on any node.
    traffic_price : float or None
        Tokens of load that a token sent to another node is worth, at most 1e6; 1 by default. With 0
        the placement is the one without nodes. Needs `ranks_per_node`.
    num_groups : int or None
        Groups of consecutive experts, of which the router gives a token a few only: a multiple of
        the number of nodes that divides ``n_logical``. All copies of a group's experts then lie in
        one node, so that tokens go to no more nodes than groups, and the nodes are the groups of
        the placement; the price decides which groups lie in which node. Needs `ranks_per_node`.

    Returns
    -------
    Placement
        One LP group over all ranks, or one for each domain, or for each node with `num_groups`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Examples
    --------
    >>> chain(torch.tensor([8.0, 1.0, 1.0, 2.0]), 2)
    Placement(4 experts in 6 slots, 2 ranks, 1 group(s), up to 2 copies)
    """
    by_source = ranks_per_node is not None
    batches = check_load("load", load, (1, 2, 3) if by_source else (1, 2))
    ranks = check_ranks(ep_size, ranks_per_domain, batches.shape[1])
    traffic, groups, batches = read_traffic(
        "load", load, batches, ranks, ranks_per_node, traffic_price, ranks_per_domain, num_groups
    )
    # The loads of one batch stay as they are: an average would round them.
    if len(batches) > 1:
        batches = average_batches("load", torch.from_numpy(batches)).numpy().reshape(1, -1)
    weight = scale_rows(batches)[0]
    n_logical = len(weight)
    spare = check_integer("redundant_per_rank", redundant_per_rank, 0)
    stay = check_flag("keep_home", keep_home)
    if traffic is not None and groups is None:
        slots_by_rank = choose_node_slots(traffic, ranks, spare, keep_home=stay)
        return Placement(slots_by_rank.reshape(-1), ranks, n_logical=n_logical)
    if traffic is not None:
        ranks_per_domain = traffic.ranks_per_node
    n_domains = int(number_domains(ranks, ranks_per_domain)[-1]) + 1
    size = ranks // n_domains
    if stay:
        slots_at_home = [
            part[0] + choose_home_slots(weight[part], size, spare, spread_out=True)
            for part in np.arange(n_logical).reshape(n_domains, -1)
        ]
        flat = np.concatenate(slots_at_home).reshape(-1)
        return Placement(flat, ranks, n_logical=n_logical, n_group=n_domains)
    domains = np.arange(n_logical).reshape(1, -1)
    if traffic is not None and groups is not None:
        order = np.argsort(assign_groups(traffic, groups), kind="stable")
        domains = np.arange(n_logical).reshape(groups, -1)[order].reshape(n_domains, -1)
    elif n_domains > 1:
        even = Placement.from_history(torch.from_numpy(weight), n_domains, redundant_per_rank=0)
        domains = even.phy2log.long().numpy().reshape(n_domains, -1)
    slots = [
        [experts[i] for held in _chain_domain(weight[experts], size, spare) for i in held]
        for experts in domains
    ]
    return Placement(np.concatenate(slots), ranks, n_logical=n_logical, n_group=n_domains)


def read_traffic(
    name: str,
    load: torch.Tensor,
    batches: NDArray[np.float64],
    ranks: int,
    ranks_per_node: int | None,
    traffic_price: float | None,
    ranks_per_domain: int | None,
    num_groups: int | None,
) -> tuple[TrafficPrice | None, int | None, NDArray[np.float64]]:
    """Return the price of traffic, the groups of experts, and loads ``[batches, n_logical]``.

    ``batches`` are the loads of `check_load`. The price is None without ``ranks_per_node``, with
    one node, and where it is 0 and no groups have to stay together.
    """
    n_logical = batches.shape[1]
    options = check_nodes(
        ranks, ranks_per_node, traffic_price, ranks_per_domain, num_groups, n_logical
    )
    if options is None:
        return None, None, batches
    size, price, groups = options
    by_node = None
    if load.ndim == 3:
        by_node = sum_by_node(name, load, batches, ranks // size)
        batches = by_node.sum(1)
    if size == ranks or (not price and groups is None):
        return None, None, batches
    demand = average_demand(scale_rows(batches), by_node, ranks // size)
    return TrafficPrice(demand, price, size), groups, batches


def check_ranks(ep_size: object, ranks_per_domain: int | None, n_logical: int) -> int:
    """Return the number of ranks, or raise naming ``ep_size`` unless they divide the experts."""
    ranks = check_integer("ep_size", ep_size)
    if n_logical % ranks:
        sizes = nearest_divisors(n_logical, ranks) if ranks_per_domain is None else []
        raise ValueError(
            f"ep_size must divide the number of logical experts, {n_logical}, got {ranks}"
            f"{would_do(sizes)}"
        )
    return ranks


def check_load(name: str, load: object, dimensions: tuple[int, ...]) -> NDArray[np.float64]:
    """Return loads as ``[batches, n_logical]`` float64 on the CPU, or raise naming them.

    Loads by source give ``[batches * sources, n_logical]``.
    """
    load = check_real(name, load)
    if load.ndim not in dimensions or load.numel() == 0:
        names = {
            1: "[n_logical]",
            2: "[batches, n_logical]",
            3: "[batches, sources, n_logical]",
        }
        shapes = " or ".join(names[n] for n in dimensions)
        raise ValueError(
            f"{name} must have shape {shapes}, without an axis of length 0, got {list(load.shape)}"
        )
    array: NDArray[np.float64] = on_host(name, load).double().numpy().reshape(-1, load.shape[-1])
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} must be finite and not negative")
    return array


def scale_rows(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide each row by a power of two, exactly, so that sums neither overflow nor vanish."""
    _, exponent = np.frexp(load.max(1, keepdims=True))
    scaled: NDArray[np.float64] = np.ldexp(load, -exponent)
    return scaled


def _chain_domain(load: NDArray[np.float64], ranks: int, spare: int) -> list[list[int]]:
    """List the experts of each rank of one domain."""
    # With this many redundant slots a rank has every expert; more slots can only repeat experts.
    useful = min(spare, len(load) - len(load) // ranks)
    count = _count_copies(load, ranks, useful * ranks)
    order = np.argsort(-load, kind="stable")
    shared = [int(expert) for expert in order if count[expert] > 1]
    # Heavy and light experts alternate, so that the shared load is even along the walk.
    shared = shared[0::2] + shared[1::2][::-1]
    n_slots = len(load) // ranks + useful
    held = _lay_along_walk(shared, count, ranks, n_slots)
    even = np.zeros(ranks)
    for rank, experts in enumerate(held):
        for expert in experts:
            even[rank] += load[expert] / count[expert]
    for single in order:
        if count[single] == 1:
            free_ranks = (r for r in range(ranks) if len(held[r]) < n_slots)
            rank = min(free_ranks, key=even.__getitem__)
            held[rank].append(int(single))
            even[rank] += load[single]
    repeats = np.resize(order, spare - useful).tolist()
    return [experts + repeats for experts in held]


def _lay_along_walk(
    shared: list[int], count: NDArray[np.int64], ranks: int, n_slots: int
) -> list[list[int]]:
    """List the experts of each rank when the copies of the shared ones lie along the walk."""
    steps = _choose_steps(ranks)

    def rank_at(place: int) -> int:
        """Rank at a place of the walk, which visits each rank once per round, from rank 0 on."""
        number, offset = divmod(place, ranks)
        return offset * steps[number % len(steps)] % ranks

    held: list[list[int]] = [[] for _ in range(ranks)]
    place = 0
    for expert in shared:
        for _ in range(count[expert]):
            # Two rounds of places contain a whole round, wherever they start.
            ahead = range(place, place + 2 * ranks)
            lacking = (p for p in ahead if expert not in held[rank_at(p)])
            free = next((p for p in lacking if len(held[rank_at(p)]) < n_slots), None)
            if free is None:
                # Fewer ranks have the expert than it has copies, so some full rank lacks it.
                free = next(p for p in ahead if expert not in held[rank_at(p)])
                _free_slot(held[rank_at(free)], held, n_slots)
            place = free
            held[rank_at(place)].append(expert)
    return held


def _free_slot(full: list[int], held: list[list[int]], n_slots: int) -> None:
    """Move an expert from a full rank to one with a free slot.

    That rank holds fewer experts, so it lacks at least one of the full rank's.
    """
    target = next(experts for experts in held if len(experts) < n_slots)
    moved = next(expert for expert in full if expert not in target)
    full.remove(moved)
    target.append(moved)


def _count_copies(load: NDArray[np.float64], max_copies: int, spare: int) -> NDArray[np.int64]:
    """Give each further copy to the expert with the largest load per copy, up to a maximum."""
    count = np.ones(len(load), dtype=np.int64)
    heap = [(-value, expert) for expert, value in enumerate(load)] if max_copies > 1 else []
    heapq.heapify(heap)
    for _ in range(spare):
        _, expert = heapq.heappop(heap)
        count[expert] += 1
        if count[expert] < max_copies:
            heapq.heappush(heap, (-load[expert] / count[expert], expert))
    return count


def _choose_steps(ranks: int) -> list[int]:
    """Choose the steps of the rounds of the walk, each coprime to the number of ranks."""
    coprime = [step for step in range(1, ranks // 2 + 1) if math.gcd(step, ranks) == 1] or [1]
    return [
        1,
        *(
            min(coprime, key=lambda step: abs(step - fraction * ranks))
            for fraction in STEP_FRACTIONS
        ),
    ]
