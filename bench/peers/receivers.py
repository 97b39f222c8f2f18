"""Replicas chosen for one batch, as UltraEP publishes it, with senders that never receive.

What follows was written from what https://github.com/Dots-Infra/UltraEP (version 1.0.0, July 2026)
says and does; no code was taken from there. The facts that it was written from:

* Experts are at home in order, and every rank has the same number of slots for replicas, which are
  filled anew for each batch from its exact counts.
* For a given largest load T, ranks above T send and ranks below it receive, so no rank does both.
  That covers each sender's excess with the slack of receivers. Senders come in order of their load,
  the fullest first. A sender gives of its experts in order of their load, and of each to the
  receiver with the most slack that has a free slot and does not hold it. An expert keeps one token
  at home. T is feasible if every sender gets rid of its excess.
* First T is 1.01 times the mean load, then one and two hundredths of the fullest rank's load more.
  Here an even part of what the sender has left, over the receivers that could take some, is the
  least that a replica takes; otherwise the sender goes on to its next expert.
* If none of these is feasible, a search finds the smallest T that is, without that least part.

What differs here: the search halves one interval where theirs tries four values at a time, which
matters only where feasibility is not monotone in T; their smallest replica, 1,024 tokens by
default in that search, is an argument and 1 by default, which can only help with smaller batches;
all ranks form one NVLink domain. The division of tokens among source ranks is left out, as loads
do not depend on it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Replica", "ReplicaPlan", "plan_replicas"]

Ints = NDArray[np.int64]

# The first largest load that is tried, over the mean load; further ones are a part of the fullest
# rank's load higher.
FIRST_TARGET, STEP_PARTS, N_STEPS = 1.01, 100, 2


class Replica(NamedTuple):
    """Tokens of an expert that a rank takes in a slot."""

    expert: int
    rank: int
    tokens: int


class ReplicaPlan(NamedTuple):
    """Replicas for one batch."""

    replicas: tuple[Replica, ...]
    loads: Ints
    """[ep_size] tokens of each rank."""


class _Batch(NamedTuple):
    """Counts in forms that every attempt needs."""

    counts: Ints
    loads: Ints
    senders: list[int]
    """All ranks, the fullest first."""
    experts: list[list[int]]
    """The experts of each rank, the largest first."""
    slots: int
    least: int


def plan_replicas(counts: Ints, ep_size: int, slots: int, *, min_tokens: int = 1) -> ReplicaPlan:
    """Choose the replicas of a batch.

    Parameters
    ----------
    counts
        ``[n_logical]`` int64, tokens of each expert over all ranks.
    ep_size
        Number of ranks; divides ``n_logical``.
    slots
        Slots for replicas on each rank.
    min_tokens
        The fewest tokens that a replica takes in the search.

    Returns
    -------
    ReplicaPlan

    Raises
    ------
    ValueError
        If the counts are negative or not ``[n_logical]`` integers, or a size is out of range.
    """
    counts = _check(counts, ep_size, slots, min_tokens)
    per_rank = len(counts) // ep_size
    by_rank = counts.reshape(ep_size, per_rank)
    loads = by_rank.sum(1)
    order = np.argsort(-by_rank, axis=1, kind="stable") + np.arange(ep_size)[:, None] * per_rank
    senders = np.argsort(-loads, kind="stable").tolist()
    batch = _Batch(counts, loads, senders, order.tolist(), slots, min_tokens)
    replicas = _search(batch) if slots else []
    moved = loads.copy()
    for expert, rank, tokens in replicas:
        moved[expert // per_rank] -= tokens
        moved[rank] += tokens
    return ReplicaPlan(tuple(replicas), moved)


def _check(counts: Ints, ep_size: int, slots: int, min_tokens: int) -> Ints:
    counts = np.asarray(counts)
    if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError("counts must be [n_logical] integers from 0 on")
    if ep_size < 1 or len(counts) == 0 or len(counts) % ep_size:
        raise ValueError(f"ep_size must divide the {len(counts)} experts, got {ep_size}")
    if slots < 0 or min_tokens < 1:
        raise ValueError(
            f"slots must be at least 0 and min_tokens at least 1, got {slots} and {min_tokens}"
        )
    return counts.astype(np.int64)


def _search(batch: _Batch) -> list[Replica]:
    """Find replicas for the smallest largest load that the attempts reach."""
    highest = int(batch.loads.max())
    lowest = -(-int(batch.loads.sum()) // len(batch.loads))
    target = int(np.ceil(lowest * FIRST_TARGET))
    for _ in range(N_STEPS + 1):
        found = _cover_excess(batch, target, even_parts=True)
        if found is not None:
            return found
        target = min(highest, target + max(1, -(-highest // STEP_PARTS)))
    # Nothing has to move at the highest load.
    best: list[Replica] = []
    while lowest < highest:
        middle = (lowest + highest) // 2
        found = _cover_excess(batch, middle, even_parts=False)
        if found is None:
            lowest = middle + 1
        else:
            best, highest = found, middle
    return best


def _cover_excess(batch: _Batch, target: int, *, even_parts: bool) -> list[Replica] | None:
    """Move what is above ``target`` to ranks below it; None if some of it finds no place."""
    slack = np.maximum(target - batch.loads, 0)
    free = np.full(len(slack), batch.slots)
    replicas: list[Replica] = []
    for sender in batch.senders:
        need = int(batch.loads[sender]) - target
        if need <= 0:
            break
        if need > slack.sum():
            return None
        for expert in batch.experts[sender]:
            need = _move_expert(batch, expert, need, slack, free, replicas, even_parts)
            if need == 0:
                break
        if need > 0:
            return None
    return replicas


def _move_expert(
    batch: _Batch,
    expert: int,
    need: int,
    slack: Ints,
    free: Ints,
    replicas: list[Replica],
    even_parts: bool,
) -> int:
    """Move tokens of one expert; returns how many the sender still has to get rid of."""
    available = int(batch.counts[expert]) - 1
    # Senders have no slack, so the home rank needs no case of its own.
    open_slack = np.where(free > 0, slack, 0)
    while need > 0 and available > 0:
        receiver = int(open_slack.argmax())
        tokens = min(need, int(open_slack[receiver]), available)
        n_open = int((open_slack > 0).sum())
        least = max(1, -(-need // max(n_open, 1))) if even_parts else batch.least
        if tokens < least:
            break
        replicas.append(Replica(expert, receiver, tokens))
        slack[receiver] -= tokens
        free[receiver] -= 1
        # A rank holds an expert once.
        open_slack[receiver] = 0
        need -= tokens
        available -= tokens
    return need
