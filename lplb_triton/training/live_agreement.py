"""The plan of a batch's live slots as the host sees it, and whether all ranks have the same."""

from __future__ import annotations

import zlib

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lplb_triton.live import LivePlan
from lplb_triton.placement import Placement
from lplb_triton.sync import SyncError
from lplb_triton.sync._rendezvous import all_gather_objects

__all__ = ["checksum_experts", "read_experts", "require_same_plan"]


def read_experts(live: LivePlan | torch.Tensor, placement: Placement) -> NDArray[np.int32]:
    """Copy the experts of a batch's live slots to the host, ``[ep_size, live_per_rank]`` int32.

    It waits for the device.

    Raises
    ------
    TypeError, ValueError
        If ``live`` is no such plan of ``placement``.
    """
    experts = live.experts if isinstance(live, LivePlan) else live
    if not isinstance(experts, torch.Tensor):
        raise TypeError(f"live must be Balancer.live or its experts, got {type(experts).__name__}")
    shape = placement.ep_size, placement.live_per_rank
    if tuple(experts.shape) != shape or experts.dtype != torch.int32:
        raise ValueError(
            f"live must be int32 of shape {shape} (ep_size, live_per_rank), "
            f"got {experts.dtype} of shape {tuple(experts.shape)}"
        )
    found: NDArray[np.int32] = experts.detach().cpu().contiguous().numpy().copy()
    if found.size and not -1 <= found.min() <= found.max() < placement.n_logical:
        raise ValueError(
            f"live must hold experts below {placement.n_logical}, or -1 for none, "
            f"got {found.min()} to {found.max()}"
        )
    return found


def checksum_experts(experts: NDArray[np.int32]) -> int:
    """Return a checksum of the experts of all live slots."""
    return zlib.crc32(np.ascontiguousarray(experts).tobytes())


def require_same_plan(
    group: dist.ProcessGroup,
    purpose: str,
    timeout: float,
    mine: tuple[int, int],
    device: torch.device | None = None,
) -> None:
    """Raise a SyncError on every rank unless all come with the same two numbers; collective.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Ranks that take part.
    purpose : str
        What the caller is doing, for messages.
    timeout : float
        Bound on the wait over the store of the process group, in seconds.
    mine : tuple of int
        What the ranks are to have in common, such as the layer's number and the checksum of
        the plan.
    device : torch.device or None
        A GPU exchanges the numbers by a collective of the group, which is as fast as a small
        message, and waits as long as the group does. None, or a CPU, takes the store, which
        names ranks that don't come.
    """
    theirs: list[tuple[int, ...]]
    if device is not None and device.type == "cuda":
        own = torch.tensor(mine, dtype=torch.int64, device=device)
        everyone = own.new_empty((group.size(), len(mine)))
        dist.all_gather_into_tensor(everyone, own, group=group)
        theirs = [tuple(one) for one in everyone.tolist()]
    else:
        theirs = all_gather_objects(group, purpose, timeout, mine)
    others = tuple(rank for rank, one in enumerate(theirs) if one != mine)
    if others:
        raise SyncError(
            f"{purpose} failed on rank {dist.get_rank(group)}: ranks {list(others)} came with "
            "another plan or for another layer: all ranks take the same layers in the same order, "
            "by the plan of the same batch",
            others,
            0,
        )
