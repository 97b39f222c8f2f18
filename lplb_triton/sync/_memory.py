"""Memory that every rank of a group can write to, from either of two libraries."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lplb_triton.sync._base import gather_objects

__all__ = ["SharedMemory", "allocate"]


class SharedMemory(NamedTuple):
    """One rank's buffer, and where everybody's is as seen from this GPU."""

    name: str
    buffer: torch.Tensor
    addresses: list[int]
    free: Callable[[], None]
    """Give it back; collective."""


def allocate(
    provider: str, words: int, group: dist.ProcessGroup, device: torch.device
) -> SharedMemory:
    """Allocate ``words`` int64 on every rank, at first zero; collective.

    Raises ``RuntimeError`` on every rank if it failed on any.
    """
    make = {"symmetric": _symmetric, "nvshmem": _nvshmem}[provider]
    problem = None
    memory: SharedMemory | None = None
    with torch.cuda.device(device):
        try:
            memory = make(words, group, device)
            memory.buffer.zero_()
            torch.cuda.synchronize(device)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        # Everybody's buffer is zero before anybody writes to it.
        problems = gather_objects(problem, group)
    failed = {rank: text for rank, text in enumerate(problems) if text is not None}
    if failed or memory is None:
        rank, text = next(iter(failed.items()))
        raise RuntimeError(
            f"memory for sync={provider!r} could not be shared by all ranks; rank {rank}: {text}. "
            "sync='distributed' needs none"
        )
    return memory


def _symmetric(words: int, group: dist.ProcessGroup, device: torch.device) -> SharedMemory:
    """Symmetric memory of torch (its CUDA back end)."""
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(words, dtype=torch.int64, device=device)
    handle: Any = symmetric.rendezvous(buffer, group.group_name)
    rank = dist.get_rank(group)
    addresses = [
        handle.get_buffer(peer, (words,), torch.int64).data_ptr() for peer in range(group.size())
    ]
    # Where tensors share an allocation, handles count from its beginning.
    offset = buffer.data_ptr() - addresses[rank]
    held: list[Any] = [buffer, handle]
    return SharedMemory("symmetric", buffer, [at + offset for at in addresses], held.clear)


def _nvshmem(words: int, group: dist.ProcessGroup, device: torch.device) -> SharedMemory:
    """NVSHMEM's symmetric heap, through nvshmem4py."""
    try:
        import nvshmem.core as nvshmem
    except ImportError as error:
        raise ImportError(
            "nvshmem4py is not installed: pip install 'lplb_triton[nvshmem]'"
        ) from error
    _init_nvshmem(nvshmem, group, device)
    if nvshmem.n_pes() != group.size():
        raise RuntimeError(
            f"NVSHMEM is initialised over {nvshmem.n_pes()} processes, all of which would have to "
            f"allocate; the group has {group.size()}"
        )
    # The numbers of NVSHMEM's processes are those of the group it was initialised over.
    pes = gather_objects(nvshmem.my_pe(), group)
    buffer = nvshmem.tensor((words,), dtype=torch.int64)
    addresses = []
    for peer, pe in enumerate(pes):
        there = buffer if peer == dist.get_rank(group) else nvshmem.get_peer_tensor(buffer, pe)
        addresses.append(there.data_ptr())
    return SharedMemory("nvshmem", buffer, addresses, lambda: nvshmem.free_tensor(buffer))


def _init_nvshmem(nvshmem: Any, group: dist.ProcessGroup, device: torch.device) -> None:
    """Initialise NVSHMEM over the group, unless somebody has; collective."""
    nvshmem.get_version()  # loads the library, which the next call needs
    ready = gather_objects(nvshmem.init_status() in _usable(nvshmem), group)
    if all(ready):
        return
    if any(ready):
        missing = [rank for rank, done in enumerate(ready) if not done]
        raise RuntimeError(f"NVSHMEM is initialised on some ranks, but not on {missing}")
    from cuda.core import Device

    # Without NVLink multicast, which not every host allows and nothing here needs.
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    rank = dist.get_rank(group)
    wire: list[Any] = [nvshmem.get_unique_id(empty=rank != 0)]
    dist.broadcast_object_list(wire, src=dist.get_global_rank(group, 0), group=group)
    gpu = Device(device.index)
    gpu.set_current()
    nvshmem.init(device=gpu, uid=wire[0], rank=rank, nranks=group.size(), initializer_method="uid")


def _usable(nvshmem: Any) -> tuple[Any, ...]:
    """States in which NVSHMEM's heap can be used."""
    status = nvshmem.InitStatus
    return status.STATUS_IS_INITIALIZED, status.STATUS_LIMITED_MPG, status.STATUS_FULL_MPG
