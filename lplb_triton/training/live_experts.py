"""The experts of live slots in one batch, read on the host and compared between ranks."""

from __future__ import annotations

import zlib

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton.live import LivePlan
from lplb_triton.placement import Placement
from lplb_triton.sync._base import SyncError
from lplb_triton.sync._gather import gather_rows
from lplb_triton.training.routes import Ints

__all__ = ["read_experts"]

# What a rank sends instead of a checksum if its experts can't be used.
UNUSABLE = -1


def read_experts(
    experts: LivePlan | torch.Tensor,
    placement: Placement,
    group: dist.ProcessGroup | None,
    device: torch.device,
    timeout: float,
    epoch: int,
) -> Ints:
    """Return the experts of live slots, ``[ep_size, live_per_rank]`` int64 on the host.

    It is collective if there is a group: ranks whose experts differ would send rows that others
    don't expect.

    Raises
    ------
    TypeError, ValueError
        If the experts of this rank don't fit the placement.
    SyncError
        On every other rank then; on every rank if the experts differ between ranks; and if a rank
        doesn't come.
    """
    problem: Exception | None = None
    found: Ints = np.empty((0, 0), dtype=np.int64)
    try:
        found = _check_experts(experts, placement)
    except (TypeError, ValueError) as error:
        if group is None:
            raise
        problem = error
    if group is None:
        return found
    checksum = UNUSABLE if problem is not None else zlib.crc32(found.tobytes())
    rows = _gather_words(torch.tensor([epoch, checksum], device="cpu"), group, device, timeout)
    if problem is not None:
        raise problem
    _compare(rows, epoch, dist.get_rank(group))
    return found


def _check_experts(experts: LivePlan | torch.Tensor, placement: Placement) -> Ints:
    """Copy experts to the host, or raise if they don't fit."""
    if isinstance(experts, LivePlan):
        experts = experts.experts
    if not isinstance(experts, torch.Tensor):
        raise TypeError(f"experts must be a LivePlan or a tensor, got {type(experts).__name__}")
    if experts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"experts must be int32 or int64, got {experts.dtype}")
    shape = (placement.ep_size, placement.live_per_rank)
    if tuple(experts.shape) != shape:
        raise ValueError(
            f"experts must have a row for each rank and a column for each of its live slots, "
            f"{shape}, got shape {tuple(experts.shape)}"
        )
    found: Ints = experts.detach().cpu().numpy().astype(np.int64)
    if found.size and (found.min() < -1 or found.max() >= placement.n_logical):
        raise ValueError(
            f"experts must be in [-1, {placement.n_logical}), got values from {found.min()} to "
            f"{found.max()}"
        )
    return found


def _gather_words(
    words: torch.Tensor, group: dist.ProcessGroup, device: torch.device, timeout: float
) -> list[list[int]]:
    """Return the words of every rank."""
    rows = torch.empty((group.size(), len(words)), dtype=words.dtype, device=device)
    if device.type == "cpu":
        gather_rows(
            rows, words, group, timeout=timeout, call="SpreadPlan.fill", epoch=int(words[0]),
            key="filled",
        )  # fmt: skip
    else:
        # The time-out of the process group bounds this wait.
        dist.all_gather(list(rows.unbind(0)), words.to(device), group=group)
    everyone: list[list[int]] = rows.tolist()
    return everyone


def _compare(rows: list[list[int]], epoch: int, rank: int) -> None:
    """Raise a SyncError, the same on every rank, unless all ranks sent the same words."""
    unusable = tuple(r for r, row in enumerate(rows) if row[1] == UNUSABLE)
    if unusable:
        raise SyncError(
            f"call {epoch} of SpreadPlan.fill failed on rank {rank}: ranks {list(unusable)} came "
            "with experts that don't fit the placement",
            unusable,
            epoch,
        )
    other = tuple(r for r, row in enumerate(rows) if row != rows[0])
    if other:
        calls = ", ".join(
            f"rank {r} with call {number} and experts {checksum:08x}"
            for r, (number, checksum) in enumerate(rows)
        )
        raise SyncError(
            f"call {epoch} of SpreadPlan.fill failed on rank {rank}: the experts of live slots "
            f"must be the same on all ranks, ranks {list(other)} differ from rank 0 ({calls}); "
            "nothing was sent",
            other,
            epoch,
        )
