"""The errors for what an exchange of counts found wrong: late ranks and differing calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lplb_triton._layout import STATUS_CHANNEL, STATUS_EPOCH, STATUS_FAULT, STATUS_FIELDS
from lplb_triton.sync._base import Communicator, SyncError
from lplb_triton.sync._channels import describe_mismatch


def mismatch_error(
    sync: Communicator,
    epoch: int,
    theirs: Mapping[int, Sequence[int]],
    mine: tuple[int, int] | None,
) -> SyncError:
    """Return the error for ranks whose placement version or number of counts differs.

    ``theirs`` has what each of them came with, by its number in the EP group.
    """
    calls = ", ".join(
        f"rank {rank} came with placement version {version & 0xFFFFFFFF:08x} and {n} counts"
        for rank, (version, n) in theirs.items()
    )
    here = ""
    if mine is not None:
        here = f"; here it was version {mine[0] & 0xFFFFFFFF:08x} and {mine[1]} counts"
    return SyncError(
        f"epoch {epoch} of {sync!r} failed on rank {sync.members[sync.rank]}: {calls}{here} "
        "(a version is of the placement and, with live slots, of their rules and the plan of the "
        "batch before)",
        tuple(theirs),
        epoch,
    )


def fault_error(
    sync: Communicator, status: Any, openings: Mapping[int, int] | None = None
) -> SyncError:
    """Return the error for the fault that a kernel has reported (see kernels/exchange.py).

    ``openings`` says how this rank opened each channel. If it is given, the word with the number
    of counts in a report has the other rank's opening in its upper bits.
    """
    from lplb_triton import kernels

    if sync.device.type == "cuda":
        # The details of the fault are complete only after this wait, which is bounded, as every
        # wait of the kernels is.
        torch.cuda.synchronize(sync.device)
    epoch, channel = int(status[STATUS_EPOCH]), int(status[STATUS_CHANNEL])
    fault = kernels.FAULTS[int(status[STATUS_FAULT])]
    by_rank = status[kernels.STATUS_FIRST :].reshape(STATUS_FIELDS, -1)
    reported = [int(rank) for rank in by_rank[0].nonzero()[0]]
    blamed = [sync.members[rank] for rank in reported]
    own_rank = sync.members[sync.rank]
    where = f"epoch {epoch} on channel {channel} of {sync!r} failed on rank {own_rank}"
    if fault == "mismatch":
        theirs = {
            sync.members[rank]: (int(by_rank[1, rank]), int(by_rank[2, rank])) for rank in reported
        }
        if openings is None:
            return mismatch_error(sync, epoch, theirs, None)
        mine = openings.get(channel, 0)
        opened = {rank: call >> kernels.COUNT_BITS for rank, (_, call) in theirs.items()}
        if any(other != mine for other in opened.values()):
            return SyncError(f"{where}: {describe_mismatch(mine, opened)}", tuple(opened), epoch)
        mask = (1 << kernels.COUNT_BITS) - 1
        unpacked = {rank: (version, call & mask) for rank, (version, call) in theirs.items()}
        return mismatch_error(sync, epoch, unpacked, None)
    if fault == "overlap":
        return SyncError(
            f"{where}: two calls were under way at once. Graphs that may be replayed at once are "
            "captured on different streams; streams that share a channel (bind) take turns",
            (own_rank,),
            epoch,
        )
    names = f"ranks {blamed} did not come" if blamed else "the last rank came just too late, not"
    return SyncError(f"{where}: {names} within {sync.timeout:g} s", tuple(blamed), epoch)
