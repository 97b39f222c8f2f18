"""All-gather on the host with a bounded wait, which names the ranks that are missing."""

from __future__ import annotations

import datetime
import time
from typing import Any

import torch
import torch.distributed as dist

from lplb_triton.sync._base import SyncError
from lplb_triton.sync._rendezvous import group_store

__all__ = ["gather_rows"]

# Seconds that ranks wait for one another's reports after a failure on the host.
GRACE = 2.0


def gather_rows(
    rows: torch.Tensor,
    message: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    timeout: float,
    call: str,
    epoch: int,
    key: str,
) -> None:
    """Gather tensors on CPUs within the time-out.

    Parameters
    ----------
    rows : torch.Tensor
        ``[ranks, n]``, where the messages go, by rank.
    message : torch.Tensor
        ``[n]`` of the same dtype, this rank's.
    group : torch.distributed.ProcessGroup
        The ranks.
    timeout : float
        Bound on the wait, in seconds.
    call : str
        What failed, for the error.
    epoch : int
        Number of the call.
    key : str
        Where ranks report a failure in the group's store: a name for this kind of call.

    Raises
    ------
    SyncError
        If a rank didn't come, or died; naming it if it can be found.
    """
    begun = time.monotonic()
    try:
        work = dist.all_gather(list(rows.unbind(0)), message, group=group, async_op=True)
        if work is not None:
            work.wait(datetime.timedelta(seconds=timeout))
    except Exception as error:
        left = timeout - (time.monotonic() - begun)
        where = f"lplb_triton/{key}/{epoch}/"
        absent = _find_ranks_without_report(group, where, max(0.0, left) + GRACE)
        names = f"ranks {list(absent)}" if absent else "a rank that could not be found"
        raise SyncError(
            f"epoch {epoch} of {call} failed on rank {dist.get_rank(group)}: {names} did not "
            f"come within {timeout:g} s, or died ({error})",
            absent,
            epoch,
        ) from error


def _find_ranks_without_report(
    group: dist.ProcessGroup, key: str, patience: float
) -> tuple[int, ...]:
    """Return the ranks that don't report this failure within ``patience`` seconds."""
    try:
        store: Any = group_store(group)
        store.set(f"{key}{dist.get_rank(group)}", b"1")
        absent = set(range(group.size()))
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
    except Exception:
        # The store ended with the rank that serves it, so no report can be read.
        return ()
    return tuple(sorted(absent))
