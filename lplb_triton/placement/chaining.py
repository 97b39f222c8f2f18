"""A placement for the linear program from mean loads alone, in milliseconds.

EPLB gives the copies of its hottest experts to whichever ranks have room. For the program it
matters that load can flow from any rank to any other. So the copied experts are laid along a
closed walk over all ranks: an expert's copies are on consecutive ranks of the walk, and the next
expert starts where it ends. With one spare slot a rank the walk is a ring; with more it goes
around again with another step, which makes a graph of short distances. The experts with one copy
then fill the ranks, heaviest first, each to the least loaded one with room.

A placement without a repeat on any rank exists whenever no expert has more copies than there are
ranks and no rank more slots than there are experts. The walk finds it as long as a rank with room
lacks the expert at hand; where none does, one exchange makes room on another rank.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton._checks import check_integer, nearest_divisors, on_host, would_do
from lplb_triton.placement import Placement
from lplb_triton.placement.moves import domains_of

__all__ = ["chain"]

# Steps of the second and later rounds of the walk, in parts of the ranks; far from simple ratios.
STEPS = (0.382, 0.236, 0.309, 0.146)


def chain(
    load: torch.Tensor,
    ep_size: int,
    *,
    redundant_per_rank: int = 1,
    ranks_per_domain: int | None = None,
) -> Placement:
    """Place and replicate experts along a closed walk over the ranks, by their mean loads.

    Every further copy goes to the expert with the largest load per copy, as in EPLB, but not to
    a rank that has one already: an expert is repeated on a rank only if the rank has all others
    too. Costs about what EPLB costs; `lplb_triton.place` goes on from here.

    Parameters
    ----------
    load : torch.Tensor
        ``[n_logical]``, mean load of each logical expert, finite and non-negative, any real dtype,
        any device.
    ep_size : int
        Number of ranks; divides ``n_logical``.
    redundant_per_rank : int
        Redundant slots per rank.
    ranks_per_domain : int or None
        Consecutive ranks that form a node or NVLink domain; divides `ep_size`. All copies of an
        expert then lie in one domain, and the domains are the groups of the placement.

    Returns
    -------
    Placement
        One LP group over all ranks, or one for each domain.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Examples
    --------
    >>> chain(torch.tensor([8.0, 1.0, 1.0, 2.0]), 2)
    Placement(4 experts in 6 slots, 2 ranks, 1 group(s), up to 2 copies)
    """
    weight = scaled_rows(checked_load("load", load, (1,)))[0]
    n_logical = len(weight)
    ranks = check_ranks(ep_size, ranks_per_domain, n_logical)
    spare = check_integer("redundant_per_rank", redundant_per_rank, 0)
    n_domains = int(domains_of(ranks, ranks_per_domain)[-1]) + 1
    size = ranks // n_domains
    domains = np.arange(n_logical).reshape(1, -1)
    if n_domains > 1:
        even = Placement.from_history(torch.from_numpy(weight), n_domains, redundant_per_rank=0)
        domains = even.phy2log.long().numpy().reshape(n_domains, -1)
    slots = [
        [experts[i] for held in _chain(weight[experts], size, spare) for i in held]
        for experts in domains
    ]
    return Placement(np.concatenate(slots), ranks, n_logical=n_logical, n_group=n_domains)


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


def checked_load(name: str, load: object, dimensions: tuple[int, ...]) -> NDArray[np.float64]:
    """Return loads as ``[batches, n_logical]`` float64 on the CPU, or raise naming them."""
    if not isinstance(load, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(load).__name__}")
    if load.is_complex():
        raise TypeError(f"{name} must have a real dtype, got {load.dtype}")
    if load.ndim not in dimensions or load.numel() == 0:
        shapes = " or ".join({1: "[n_logical]", 2: "[batches, n_logical]"}[n] for n in dimensions)
        raise ValueError(
            f"{name} must have shape {shapes}, without an axis of length 0, got {list(load.shape)}"
        )
    array: NDArray[np.float64] = on_host(name, load).double().numpy().reshape(-1, load.shape[-1])
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(f"{name} must be finite and not negative")
    return array


def scaled_rows(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide each row by a power of two, exactly, so that sums neither overflow nor vanish."""
    _, exponent = np.frexp(load.max(1, keepdims=True))
    scaled: NDArray[np.float64] = np.ldexp(load, -exponent)
    return scaled


def _chain(load: NDArray[np.float64], ranks: int, spare: int) -> list[list[int]]:
    """Experts of each rank of one domain."""
    # With as many slots a rank has every expert, and more of them can only repeat one.
    useful = min(spare, len(load) - len(load) // ranks)
    count = _copies(load, ranks, useful * ranks)
    order = np.argsort(-load, kind="stable")
    shared = [int(expert) for expert in order if count[expert] > 1]
    # Heavy and light ones take turns, so that what is shared is even along the walk.
    shared = shared[0::2] + shared[1::2][::-1]
    room = len(load) // ranks + useful
    held = _walk(shared, count, ranks, room)
    even = np.zeros(ranks)
    for rank, experts in enumerate(held):
        for expert in experts:
            even[rank] += load[expert] / count[expert]
    for single in order:
        if count[single] == 1:
            rank = min((r for r in range(ranks) if len(held[r]) < room), key=even.__getitem__)
            held[rank].append(int(single))
            even[rank] += load[single]
    repeats = np.resize(order, spare - useful).tolist()
    return [experts + repeats for experts in held]


def _walk(shared: list[int], count: NDArray[np.int64], ranks: int, room: int) -> list[list[int]]:
    """Experts of each rank when the copies of the shared ones lie along the walk."""
    steps = _steps(ranks)

    def rank_at(place: int) -> int:
        """Rank at a place of the walk; every round begins at rank 0 and visits each rank once."""
        turn, at = divmod(place, ranks)
        return at * steps[turn % len(steps)] % ranks

    held: list[list[int]] = [[] for _ in range(ranks)]
    place = 0
    for expert in shared:
        for _ in range(count[expert]):
            # Wherever it starts, a stretch of two rounds has a whole one in it.
            ahead = range(place, place + 2 * ranks)
            lacking = (p for p in ahead if expert not in held[rank_at(p)])
            free = next((p for p in lacking if len(held[rank_at(p)]) < room), None)
            if free is None:
                # Fewer ranks have the expert than it has copies, so some full rank lacks it.
                free = next(p for p in ahead if expert not in held[rank_at(p)])
                _make_room(held[rank_at(free)], held, room)
            place = free
            held[rank_at(place)].append(expert)
    return held


def _make_room(full: list[int], held: list[list[int]], room: int) -> None:
    """Move an expert from a full rank to one with room.

    That rank holds fewer experts, so it lacks one of them.
    """
    free = next(experts for experts in held if len(experts) < room)
    moved = next(expert for expert in full if expert not in free)
    full.remove(moved)
    free.append(moved)


def _copies(load: NDArray[np.float64], most: int, spare: int) -> NDArray[np.int64]:
    """Give each further copy to the expert with the largest load per copy, up to ``most``."""
    count = np.ones(len(load), dtype=np.int64)
    heap = [(-value, expert) for expert, value in enumerate(load)] if most > 1 else []
    heapq.heapify(heap)
    for _ in range(spare):
        _, expert = heapq.heappop(heap)
        count[expert] += 1
        if count[expert] < most:
            heapq.heappush(heap, (-load[expert] / count[expert], expert))
    return count


def _steps(ranks: int) -> list[int]:
    """Choose the steps of the rounds of the walk, each prime to the number of ranks."""
    prime = [step for step in range(1, ranks // 2 + 1) if math.gcd(step, ranks) == 1] or [1]
    return [1, *(min(prime, key=lambda step: abs(step - part * ranks)) for part in STEPS)]
