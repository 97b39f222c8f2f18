"""All-gather on the host with a bounded wait, which names the ranks that are missing."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lplb_triton.sync._base import SyncError
from lplb_triton.sync._reports import GRACE, find_ranks_without_answer, find_ranks_without_report

__all__ = ["gather_rows"]


def gather_rows(
    rows: torch.Tensor,
    message: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    timeout: float,
    call: str,
    epoch: int,
    key: str,
    members: Sequence[int] | None = None,
    whole_group: dist.ProcessGroup | None = None,
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
    members : sequence of int or None
        By which numbers errors name the ranks, by default their own.
    whole_group : torch.distributed.ProcessGroup or None
        Ranks that make these calls at the same time, of which ``group`` is a part; by default
        there are no others.

    Raises
    ------
    SyncError
        If a rank didn't come, or died; naming it if it can be found.
    """
    rank = dist.get_rank(group)
    names = tuple(range(group.size())) if members is None else tuple(members)
    begun = time.monotonic()
    try:
        work = dist.all_gather(list(rows.unbind(0)), message, group=group, async_op=True)
        if work is not None:
            work.wait(datetime.timedelta(seconds=timeout))
    except Exception as error:
        others = tuple(name for i, name in enumerate(names) if i != rank)
        absent, text = _find_absent(
            group, whole_group or group, f"{key}/{epoch}", begun + timeout + GRACE, others
        )
        raise SyncError(
            f"epoch {epoch} of {call} failed on rank {names[rank]}: {text} did not come within "
            f"{timeout:g} s, or died ({error})",
            absent,
            epoch,
        ) from error


def _find_absent(
    group: dist.ProcessGroup,
    whole_group: dist.ProcessGroup,
    call: str,
    deadline: float,
    others: tuple[int, ...],
) -> tuple[tuple[int, ...], str]:
    """Return the ranks that are surely absent from a failed call, and a description."""
    patience = max(GRACE, deadline - time.monotonic())
    reported = find_ranks_without_report(whole_group, call, patience)
    if reported is not None:
        return reported, f"ranks {list(reported)}" if reported else f"one of ranks {list(others)}"
    absent: tuple[int, ...] = others if len(others) == 1 else ()
    if whole_group is not group:
        # Every rank gives up the store at most GRACE after the deadline, and then answers.
        seconds = max(GRACE, deadline + 2 * GRACE - time.monotonic())
        absent = find_ranks_without_answer(whole_group, seconds) or absent
    unsure = f"ranks {list(absent)}" if absent else f"one of ranks {list(others)}"
    return absent, f"the store of the process group can't be reached from here; {unsure}"
