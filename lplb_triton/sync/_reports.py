"""Reports of a failed call, by which ranks find out who is missing, and bounded use of the store.

The client of a process group's key-value store waits without a bound for an answer. If the host
that serves the store is cut off, and no packet says so, that lasts until the kernel gives up the
connection, which takes many minutes.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = [
    "GRACE",
    "find_ranks_without_answer",
    "find_ranks_without_report",
    "group_store",
    "run_within",
]

# Seconds that ranks wait for one another's reports after a failure, beyond the time-out.
GRACE = 2.0

# Tag of the messages of `find_ranks_without_answer`, by which no other receives them.
ANSWER_TAG = 0x6C706C62

Result = TypeVar("Result")


def group_store(group: dist.ProcessGroup) -> Any:
    """Return the key-value store that the group's ranks share."""
    return dist.distributed_c10d._get_process_group_store(group)


def run_within(seconds: float, task: Callable[[], Result]) -> Result:
    """Return what ``task`` returns, or raise what it raises, or `TimeoutError` after ``seconds``.

    The task runs in a thread of its own. After a `TimeoutError` the thread still waits, without
    the interpreter's lock; it doesn't keep the process from ending.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(task())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def find_ranks_without_report(
    group: dist.ProcessGroup, call: str, patience: float
) -> tuple[int, ...] | None:
    """Report that a call has failed here, and return the ranks that don't report it.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Ranks whose reports are read.
    call : str
        Kind and number of the call, the same on every rank.
    patience : float
        Bound on the wait for reports, in seconds.

    Returns
    -------
    tuple of int or None
        Ranks of ``group``; None if its store can't be reached. The call returns within
        ``patience`` + `GRACE` seconds.
    """
    try:
        store, rank, size = group_store(group), dist.get_rank(group), group.size()
        return run_within(
            patience + GRACE, lambda: _wait_for_reports(store, rank, size, call, patience)
        )
    except Exception:
        # The store ended with the rank that serves it, or the network leads there no more.
        return None


def _wait_for_reports(
    store: Any, rank: int, size: int, call: str, patience: float
) -> tuple[int, ...]:
    """Write this rank's report, and wait for those of the others."""
    key = f"lplb_triton/{call}/"
    store.set(f"{key}{rank}", b"1")
    absent = set(range(size))
    begun = quiet_since = time.monotonic()
    while absent and time.monotonic() - begun < patience:
        reported = {r for r in absent if store.check([f"{key}{r}"])}
        if reported:
            absent -= reported
            quiet_since = time.monotonic()
        # All ranks but one have reported, so the remaining one is the absent rank.
        if len(absent) <= 1 and time.monotonic() - quiet_since > GRACE / 2:
            break
        time.sleep(0.02)
    return tuple(sorted(absent))


def find_ranks_without_answer(group: dist.ProcessGroup, seconds: float) -> tuple[int, ...]:
    """Send each rank a word, and return the ranks from which none comes; for gloo.

    Ranks do this where the store can't be reached after a failed call. They must not have failed
    over ``group`` itself, since gloo closes all connections of a group after a time-out, as here
    too if a rank is absent.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Ranks to ask.
    seconds : float
        Bound on the wait for all of them.
    """
    deadline = time.monotonic() + seconds
    rank, size = dist.get_rank(group), group.size()
    word = torch.ones(1, dtype=torch.int32, device="cpu")
    words = torch.zeros(size, 1, dtype=torch.int32, device="cpu")
    words[rank] = 1
    incoming, outgoing = {}, {}
    for other in range(size):
        if other != rank:
            try:
                incoming[other] = group.recv([words[other]], other, ANSWER_TAG)
                outgoing[other] = group.send([word], other, ANSWER_TAG)
            except RuntimeError:
                # This connection has ended, so the word stays 0.
                continue
    _wait_for_all(list(incoming.values()), deadline)
    absent = tuple(torch.nonzero(words[:, 0] == 0).flatten().tolist())
    # Those that have answered still wait for this rank's word.
    _wait_for_all([work for r, work in outgoing.items() if r not in absent], deadline)
    return absent


def _wait_for_all(works: list[Any], deadline: float) -> None:
    """Wait until every message has come or failed, at most until ``deadline``."""
    for work in works:
        left = max(0.001, deadline - time.monotonic())
        try:
            work.wait(datetime.timedelta(seconds=left))
        except RuntimeError:
            # After a time-out the others fail at once; what has come before is there.
            continue
