"""Memory that every rank of a group can write to, from torch or from nvshmem4py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from lplb_triton.sync._rendezvous import all_gather_objects

__all__ = ["SharedMemory", "allocate"]


class SharedMemory(NamedTuple):
    """One rank's buffer, and the addresses of all ranks' buffers as seen from this GPU."""

    name: str
    buffer: torch.Tensor
    addresses: list[int]
    free: Callable[[], None]
    """Frees the buffer; collective."""
    peers: tuple[torch.Tensor, ...] = ()
    """All ranks' buffers as tensors of this GPU, from torch's symmetric memory only."""


def allocate(
    provider: str,
    words: int,
    group: dist.ProcessGroup,
    device: torch.device,
    timeout: float,
    purpose: str | None = None,
    instead: str = "sync='distributed'",
) -> SharedMemory:
    """Allocate ``words`` int64 on every rank, at first zero; collective.

    ``purpose`` says in messages what the memory is for, by default a communicator, and ``instead``
    what needs none.

    Raises ``RuntimeError`` on every rank if it failed on any, and `SyncError` if one doesn't come
    within ``timeout`` seconds.
    """
    make = {"symmetric": _allocate_symmetric, "nvshmem": _allocate_nvshmem}[provider]
    problem: str | None = None
    memory: SharedMemory | None = None
    purpose = purpose or f"sync={provider!r}"
    # The libraries wait for every rank without a bound, so all ranks must first have arrived here
    # and have loaded the library.
    try:
        _import(provider)
    except Exception as error:
        problem = _describe_error(error)
    _raise_for_first_problem(
        all_gather_objects(group, f"loading {purpose}", timeout, problem), purpose, instead
    )
    with torch.cuda.device(device):
        try:
            memory = make(words, group, device, timeout)
            memory.buffer.zero_()
            torch.cuda.synchronize(device)
        except Exception as error:
            problem = _describe_error(error)
    # Every rank's buffer is zero before any rank writes to it.
    problems = all_gather_objects(group, f"sharing memory for {purpose}", timeout, problem)
    _raise_for_first_problem(problems, purpose, instead)
    return cast(SharedMemory, memory)


def _describe_error(error: Exception) -> str:
    """Return type and message of an error."""
    return f"{type(error).__name__}: {error}"


def _raise_for_first_problem(problems: list[str | None], purpose: str, instead: str) -> None:
    """Raise the same error on every rank, for the first rank that had a problem."""
    for rank, text in enumerate(problems):
        if text is not None:
            raise RuntimeError(
                f"memory for {purpose} could not be shared by all ranks; rank {rank}: {text}. "
                f"{instead} needs none"
            )


def _import(provider: str) -> Any:
    """Import the library that a provider of memory needs."""
    if provider == "symmetric":
        import torch.distributed._symmetric_memory as symmetric

        return symmetric
    try:
        import nvshmem.core as nvshmem
    except ImportError as error:
        raise ImportError(
            "nvshmem4py is not installed: pip install 'lplb_triton[nvshmem]'"
        ) from error
    nvshmem.get_version()  # loads the library itself
    return nvshmem


def _allocate_symmetric(
    words: int, group: dist.ProcessGroup, device: torch.device, timeout: float
) -> SharedMemory:
    """Allocate from torch's symmetric memory (its CUDA back end)."""
    symmetric = _import("symmetric")
    buffer = symmetric.empty(words, dtype=torch.int64, device=device)
    handle: Any = symmetric.rendezvous(buffer, group.group_name)
    rank = dist.get_rank(group)
    addresses = [
        handle.get_buffer(peer, (words,), torch.int64).data_ptr() for peer in range(group.size())
    ]
    # If tensors share an allocation, the handle's addresses are those of its beginning.
    offset = buffer.data_ptr() - addresses[rank]
    peers = tuple(
        handle.get_buffer(peer, (words,), torch.int64, offset // 8) for peer in range(group.size())
    )
    held: list[Any] = [buffer, handle]
    return SharedMemory("symmetric", buffer, [at + offset for at in addresses], held.clear, peers)


def _allocate_nvshmem(
    words: int, group: dist.ProcessGroup, device: torch.device, timeout: float
) -> SharedMemory:
    """Allocate from NVSHMEM's symmetric heap, through nvshmem4py."""
    nvshmem = _import("nvshmem")
    _init_nvshmem(nvshmem, group, device, timeout)
    if nvshmem.n_pes() != group.size():
        raise RuntimeError(
            f"NVSHMEM is initialised over {nvshmem.n_pes()} processes, all of which would have to "
            f"allocate; the group has {group.size()}"
        )
    # NVSHMEM numbers its processes by the group that it was initialised over, which may differ.
    pes = all_gather_objects(group, "finding NVSHMEM's processes", timeout, nvshmem.my_pe())
    buffer = nvshmem.tensor((words,), dtype=torch.int64)
    addresses = []
    for peer, pe in enumerate(pes):
        there = buffer if peer == dist.get_rank(group) else nvshmem.get_peer_tensor(buffer, pe)
        addresses.append(there.data_ptr())
    return SharedMemory("nvshmem", buffer, addresses, lambda: nvshmem.free_tensor(buffer))


def _init_nvshmem(
    nvshmem: Any, group: dist.ProcessGroup, device: torch.device, timeout: float
) -> None:
    """Initialise NVSHMEM over the group, unless the program has already; collective."""
    mine = nvshmem.init_status() in _usable_states(nvshmem)
    ready = all_gather_objects(group, "asking for NVSHMEM's state", timeout, mine)
    if all(ready):
        return
    if any(ready):
        missing = [rank for rank, done in enumerate(ready) if not done]
        raise RuntimeError(f"NVSHMEM is initialised on some ranks, but not on {missing}")
    from cuda.core import Device

    # NVLink multicast is turned off: not every host allows it, and no kernel here needs it.
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    rank = dist.get_rank(group)
    uid = nvshmem.get_unique_id(empty=rank != 0)
    uid = all_gather_objects(group, "initialising NVSHMEM", timeout, uid if rank == 0 else None)[0]
    gpu = Device(device.index)
    gpu.set_current()
    nvshmem.init(device=gpu, uid=uid, rank=rank, nranks=group.size(), initializer_method="uid")


def _usable_states(nvshmem: Any) -> tuple[Any, ...]:
    """Return the states in which NVSHMEM's heap can be used."""
    status = nvshmem.InitStatus
    return status.STATUS_IS_INITIALIZED, status.STATUS_LIMITED_MPG, status.STATUS_FULL_MPG
