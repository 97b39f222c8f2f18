"""Reports of a failed call, by which ranks find out who is missing, and bounded use of the store.

The client of a process group's key-value store waits without a bound for an answer. If the host
that serves the store is cut off, and no packet says so, that lasts until the kernel gives up the
connection, which takes many minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["GRACE", "find_ranks_without_report", "group_store", "run_within"]

# Seconds that ranks wait for one another's reports after a failure, beyond the time-out.
GRACE = 2.0

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
    group: dist.ProcessGroup, call: int, patience: float
) -> tuple[int, ...] | None:
    """Report that a call has failed here, and return the ranks that don't report it.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Ranks whose reports are read.
    call : int
        Number of the call, the same on every rank.
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
    store: Any, rank: int, size: int, call: int, patience: float
) -> tuple[int, ...]:
    """Write this rank's report, and wait for those of the others."""
    key = f"lplb_triton/failed/{call}/"
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
