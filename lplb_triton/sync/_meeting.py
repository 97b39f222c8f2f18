"""Bounded meetings of a group's ranks on the host, through the process group's key-value store.

Whatever is collective here but isn't part of a batch (making a balancer, a new placement, closing)
goes through `meet`. The collectives of a process group wait for as long as the group says, some for
ever, and none of them says who is missing.
"""

from __future__ import annotations

import pickle
import socket
import threading
import time
import weakref
from typing import Any, NamedTuple

import torch.distributed as dist

from lplb_triton.sync._base import SyncError

__all__ = ["meet", "node_sizes"]

# Seconds between two looks at the store: at first, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.05
# Seconds in which the ranks that time out agree on one answer.
GRACE = 2.0

# Meetings so far, by group. Weak: nothing here may keep a process group alive.
_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _Outcome(NamedTuple):
    """What a meeting ended with, the same for every rank."""

    everyone: list[tuple[str, Any]] | None
    """By rank, what it came for and what it brought; ``None`` if somebody was missing."""
    absent: tuple[int, ...]


def meet(group: dist.ProcessGroup, purpose: str, timeout: float, mine: object = None) -> list[Any]:
    """Wait until every rank has come, and return what each of them brought; collective.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Ranks that take part; all of them make the same meetings in the same order.
    purpose : str
        What the caller is doing, such as ``"Balancer.update_placement"``. Ranks that come for
        different purposes are an error on every rank.
    timeout : float
        Bound on the wait, in seconds.
    mine : object
        Anything that can be pickled.

    Returns
    -------
    list
        ``mine`` of every rank, by rank.

    Raises
    ------
    SyncError
        On every rank: if a rank didn't come in time, or came for something else. It names them.
    """
    size = group.size()
    if size == 1:
        return [mine]
    rank = dist.get_rank(group)
    with _lock:
        number = _meetings[group] = _meetings.get(group, 0) + 1
    try:
        outcome = _hold(_store(group), number, rank, size, timeout, pickle.dumps((purpose, mine)))
    except dist.DistError as error:
        raise SyncError(
            f"{purpose} failed on rank {rank}: the store of the process group can't be reached, so "
            f"the process that serves it has probably ended ({error})",
            (),
            number,
        ) from error
    if outcome.everyone is None:
        raise SyncError(
            f"{purpose} failed on rank {rank}: ranks {list(outcome.absent)} did not come within "
            f"{timeout:g} s",
            outcome.absent,
            number,
        )
    others = [r for r, (theirs, _) in enumerate(outcome.everyone) if theirs != purpose]
    if others:
        came = ", ".join(f"rank {r} came for {outcome.everyone[r][0]}" for r in others)
        raise SyncError(f"{purpose} failed on rank {rank}: {came}", tuple(others), number)
    return [brought for _, brought in outcome.everyone]


def node_sizes(group: dist.ProcessGroup, timeout: float) -> int:
    """Consecutive ranks that share a host, 1 if hosts don't hold equally many; collective."""
    hosts = meet(group, "finding the group's hosts", timeout, socket.gethostname())
    size = hosts.count(hosts[0])
    if len(hosts) % size:
        return 1
    blocks = [hosts[i : i + size] for i in range(0, len(hosts), size)]
    even = all(len(set(block)) == 1 for block in blocks)
    distinct = len({block[0] for block in blocks}) == len(blocks)
    return size if even and distinct else 1


def _store(group: dist.ProcessGroup) -> Any:
    """Key-value store that the group's ranks share."""
    return dist.distributed_c10d._get_process_group_store(group)


def _hold(
    store: Any, number: int, rank: int, size: int, timeout: float, message: bytes
) -> _Outcome:
    """Leave this rank's message in the store and wait for the outcome, which is written once.

    Rank 0 collects; who runs out of time first, of all ranks, writes who is absent.
    """
    key = f"lplb_triton/meeting/{number}"
    names = [f"{key}/{r}" for r in range(size)]
    end = f"{key}/end"
    store.set(names[rank], message)
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    here = [r == rank for r in range(size)]
    messages: list[Any] = [message if here[r] else None for r in range(size)]
    while not store.check([end]):
        if rank == 0:
            for r in range(size):
                if not here[r] and store.check([names[r]]):
                    here[r], messages[r] = True, store.get(names[r])
                    pause = FIRST_PAUSE
            if all(here):
                everyone = [pickle.loads(text) for text in messages]
                return _end(store, number, names, end, _Outcome(everyone, ()))
        if time.monotonic() > deadline:
            absent = tuple(r for r in range(size) if not store.check([names[r]]))
            # Nobody is absent if the last one has just come: then rank 0 is about to say so.
            if absent or time.monotonic() > deadline + GRACE:
                return _end(store, number, names, end, _Outcome(None, absent))
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return _Outcome(*pickle.loads(store.get(end)))


def _end(store: Any, number: int, names: list[str], end: str, outcome: _Outcome) -> _Outcome:
    """Write the outcome, unless another rank has; returns the one that counts."""
    first = _Outcome(*pickle.loads(store.compare_set(end, "", pickle.dumps(tuple(outcome)))))
    if first.everyone is not None:
        # Everybody has come, and so has read how the meeting before ended.
        for name in names:
            store.delete_key(name)
        store.delete_key(f"lplb_triton/meeting/{number - 1}/end")
    return first
