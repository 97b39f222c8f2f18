"""Host-side collectives with a bounded wait, over the key-value store of a process group.

Every collective step outside of a batch (making a balancer, a new placement, closing) goes through
`all_gather_objects` or `barrier`. The collectives of a process group wait as long as the group's
time-out, some of them for ever, and none of them names the ranks that are missing.
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
from lplb_triton.sync._reports import GRACE, group_store, run_within

__all__ = ["all_gather_objects", "barrier", "count_ranks_per_node"]

# Seconds between two polls of the store: at first, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.0005, 0.05

# Number of rendezvous so far by group. The references are weak, so that no process group is kept
# alive by this table.
rendezvous_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _Outcome(NamedTuple):
    """How a rendezvous ended; the same on every rank."""

    messages: list[tuple[str, Any]] | None
    """Purpose and value of each rank, by rank; ``None`` if a rank was missing."""
    absent: tuple[int, ...]
    """Ranks that did not arrive within the time-out."""


def all_gather_objects(
    group: dist.ProcessGroup, purpose: str, timeout: float, value: object = None
) -> list[Any]:
    """Wait for every rank of the group, and return the value of each; collective.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Ranks that take part; all of them make the same calls in the same order.
    purpose : str
        What the caller is doing, such as ``"Balancer.update_placement"``. Different purposes
        are an error on every rank.
    timeout : float
        Bound on the wait, in seconds.
    value : object
        Anything that can be pickled.

    Returns
    -------
    list
        ``value`` of every rank, by rank.

    Raises
    ------
    SyncError
        On every rank, naming the ranks that did not arrive in time or had another purpose. No
        rank is named where the store of the process group can't be reached.
    """
    size = group.size()
    if size == 1:
        return [value]
    rank = dist.get_rank(group)
    with _lock:
        number = rendezvous_counts[group] = rendezvous_counts.get(group, 0) + 1
    message = pickle.dumps((purpose, value))
    try:
        store = group_store(group)
        outcome = run_within(
            timeout + 2 * GRACE,
            lambda: _wait_for_outcome(store, number, rank, size, timeout, message),
        )
    except (dist.DistError, TimeoutError) as error:
        raise SyncError(
            f"{purpose} failed on rank {rank}: the store of the process group can't be reached, so "
            "the process that serves it has probably ended, or the network between has failed "
            f"({error})",
            (),
            number,
        ) from error
    if outcome.messages is None:
        raise SyncError(
            f"{purpose} failed on rank {rank}: ranks {list(outcome.absent)} did not come within "
            f"{timeout:g} s",
            outcome.absent,
            number,
        )
    others = [r for r, (theirs, _) in enumerate(outcome.messages) if theirs != purpose]
    if others:
        came = ", ".join(f"rank {r} came for {outcome.messages[r][0]}" for r in others)
        raise SyncError(f"{purpose} failed on rank {rank}: {came}", tuple(others), number)
    return [theirs for _, theirs in outcome.messages]


def barrier(group: dist.ProcessGroup, purpose: str, timeout: float) -> None:
    """Wait for every rank of the group; collective. Errors are those of `all_gather_objects`."""
    all_gather_objects(group, purpose, timeout)


def count_ranks_per_node(group: dist.ProcessGroup, timeout: float) -> int:
    """Return how many consecutive ranks share a host; collective.

    The result is 1 if hosts don't hold equally many consecutive ranks.
    """
    hosts = all_gather_objects(group, "finding the group's hosts", timeout, socket.gethostname())
    size = hosts.count(hosts[0])
    if len(hosts) % size:
        return 1
    blocks = [hosts[i : i + size] for i in range(0, len(hosts), size)]
    even = all(len(set(block)) == 1 for block in blocks)
    distinct = len({block[0] for block in blocks}) == len(blocks)
    return size if even and distinct else 1


def _wait_for_outcome(
    store: Any, number: int, rank: int, size: int, timeout: float, message: bytes
) -> _Outcome:
    """Write this rank's message to the store and wait for the outcome, which is written once.

    Rank 0 collects the messages and writes the outcome. Whichever rank times out first writes
    which ranks are absent.
    """
    prefix = f"lplb_triton/meeting/{number}"
    message_keys = [f"{prefix}/{r}" for r in range(size)]
    outcome_key = f"{prefix}/end"
    store.set(message_keys[rank], message)
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    arrived = [r == rank for r in range(size)]
    received: list[Any] = [message if arrived[r] else None for r in range(size)]
    while not store.check([outcome_key]):
        if rank == 0:
            for r in range(size):
                if not arrived[r] and store.check([message_keys[r]]):
                    arrived[r], received[r] = True, store.get(message_keys[r])
                    pause = FIRST_PAUSE
            if all(arrived):
                outcome = _Outcome([pickle.loads(text) for text in received], ())
                return _write_outcome(store, number, message_keys, outcome_key, outcome)
        if time.monotonic() > deadline:
            absent = tuple(r for r in range(size) if not store.check([message_keys[r]]))
            # If no rank is absent, the last one has just arrived and rank 0 is about to write.
            if absent or time.monotonic() > deadline + GRACE:
                outcome = _Outcome(None, absent)
                return _write_outcome(store, number, message_keys, outcome_key, outcome)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return _Outcome(*pickle.loads(store.get(outcome_key)))


def _write_outcome(
    store: Any, number: int, message_keys: list[str], outcome_key: str, outcome: _Outcome
) -> _Outcome:
    """Write the outcome unless another rank has, and return the one that was written first."""
    written = store.compare_set(outcome_key, "", pickle.dumps(tuple(outcome)))
    first = _Outcome(*pickle.loads(written))
    if first.messages is not None:
        # Every rank has arrived, so every rank has read the outcome of the rendezvous before.
        for key in message_keys:
            store.delete_key(key)
        store.delete_key(f"lplb_triton/meeting/{number - 1}/end")
    return first
