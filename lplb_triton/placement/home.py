"""Placements that leave every expert on its home rank and choose only the redundant slots.

Frameworks shard experts in order: rank r owns experts ``r * n_local`` to ``(r + 1) * n_local - 1``,
and optimizer states, shards and checkpoints follow. If the first ``n_local`` slots of every rank
hold these experts, another placement moves nothing but copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lplb_triton.placement.placement import Placement

__all__ = ["choose_home_slots", "is_at_home"]

# Ranks whose load exceeds the least one by no more than this, in mean rank loads, are all taken
# for nearly empty, and the one that is farthest from the expert's other copies is chosen.
NEARLY_LEAST_LOAD = 0.3


def choose_home_slots(
    load: NDArray[np.float64], ranks: int, spare: int, *, spread_out: bool
) -> NDArray[np.int64]:
    """Choose the experts of every slot when all experts stay at home.

    Copies are made one by one. The next goes to the expert whose load per copy, times the load of
    its home rank, is largest, and lies on the least loaded rank that has a free slot and no copy.
    Loads are those of an even split. An expert is repeated on a rank only if the rank has all
    others too.

    Parameters
    ----------
    load
        ``[n_logical]``, mean load of each expert.
    ranks
        Number of ranks; divides ``n_logical``.
    spare
        Redundant slots per rank.
    spread_out
        Whether a copy may lie on any nearly empty rank, and takes the one that is farthest from
        the expert's other copies in the graph that copies make of the ranks: then load can flow
        between any two ranks over few others.

    Returns
    -------
    numpy.ndarray
        ``[ranks, n_local + spare]`` int64; the first ``n_local`` of a row are its home experts.
    """
    n_logical = len(load)
    n_local = n_logical // ranks
    home = np.arange(n_logical) // n_local
    total = load.sum()
    weight = load / total * ranks if total > 0 else np.zeros(n_logical)
    rank_load = weight.reshape(ranks, n_local).sum(1)
    held = np.zeros((n_logical, ranks), dtype=np.bool_)
    held[np.arange(n_logical), home] = True
    distance = np.where(np.eye(ranks, dtype=np.bool_), 0, ranks)
    copies = np.ones(n_logical)
    # With this many slots a rank has every expert, and more slots can only repeat one.
    useful = min(spare, n_logical - n_local)
    free = np.full(ranks, useful)
    chosen: list[list[int]] = [[] for _ in range(ranks)]
    for _ in range(ranks * useful):
        order = np.lexsort((copies, -weight / copies * rank_load[home]))
        may = ~held[order] & (free > 0)
        expert = int(order[may.any(1).argmax()])
        allowed = np.flatnonzero(~held[expert] & (free > 0))
        holders = np.flatnonzero(held[expert])
        if spread_out:
            least = rank_load[allowed].min()
            allowed = allowed[rank_load[allowed] <= least + NEARLY_LEAST_LOAD]
            apart = distance[np.ix_(holders, allowed)].min(0)
        else:
            apart = np.zeros(len(allowed))
        rank = int(allowed[np.lexsort((rank_load[allowed], -apart))[0]])
        if spread_out:
            for holder in holders:
                _join_ranks(distance, int(holder), rank)
        rank_load[holders] -= weight[expert] / copies[expert]
        copies[expert] += 1
        held[expert, rank] = True
        rank_load[held[expert]] += weight[expert] / copies[expert]
        free[rank] -= 1
        chosen[rank].append(expert)
    repeats = np.resize(np.argsort(-load, kind="stable"), spare - useful)
    rows = np.arange(n_logical).reshape(ranks, n_local)
    slots = [[*rows[rank], *chosen[rank], *repeats] for rank in range(ranks)]
    return np.array(slots, dtype=np.int64)


def _join_ranks(distance: NDArray[np.int64], one: int, other: int) -> None:
    """Update the distances between all ranks after an edge between two of them."""
    if distance[one, other] > 1:
        through = np.minimum(
            distance[:, [one]] + distance[[other]], distance[:, [other]] + distance[[one]]
        )
        np.minimum(distance, through + 1, out=distance)


def is_at_home(placement: Placement) -> bool:
    """Return whether the first slots of every rank hold its home experts in order."""
    n_local, rest = divmod(placement.n_logical, placement.ep_size)
    if rest:
        return False
    first = placement.phy2log.numpy().reshape(placement.ep_size, -1)[:, :n_local].reshape(-1)
    return bool((first == np.arange(placement.n_logical)).all())
