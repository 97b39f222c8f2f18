"""Choice of a communicator for a group, and the communicators that balancers share."""

from __future__ import annotations

import ctypes
import socket
import weakref
from typing import Any

import torch
import torch.distributed as dist

from lplb_triton._checks import check_choice, check_integer, check_timeout, resolve_device
from lplb_triton.sync._base import Communicator, failed_groups, group_timeout
from lplb_triton.sync._distributed import DistributedCommunicator
from lplb_triton.sync._groups import split_group
from lplb_triton.sync._hierarchical import HierarchicalCommunicator
from lplb_triton.sync._memory import allocate
from lplb_triton.sync._peer import Endpoint, PeerCommunicator
from lplb_triton.sync._rendezvous import all_gather_objects, count_ranks_per_node

__all__ = ["KINDS", "acquire", "choose_sync", "connect", "deep_ep_domain", "release"]

KINDS = ("auto", "distributed", "symmetric", "nvshmem", "hierarchical")
DEFAULT_CAPACITY = 1024
# A message states its number of counts in 16 bits.
MAX_CAPACITY = (1 << 16) - 1

# Communicators that balancers share. The references are weak: a process group that this table kept
# alive would not end with `destroy_process_group`, but in the exiting interpreter, while its
# threads still run.
shared_communicators: weakref.WeakValueDictionary[tuple[Any, ...], Communicator] = (
    weakref.WeakValueDictionary()
)


def connect(
    group: dist.ProcessGroup,
    sync: str = "auto",
    *,
    device: torch.device | str | None = None,
    timeout: float | None = None,
    capacity: int = DEFAULT_CAPACITY,
    domain_size: int | None = None,
) -> Communicator:
    """Make a communicator over a process group; collective over it.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        The EP group.
    sync : {"auto", "distributed", "symmetric", "nvshmem", "hierarchical"}
        ``"distributed"``: all-gather by torch.distributed. ``"symmetric"``, ``"nvshmem"``: a
        kernel that writes into every rank's memory, from torch's symmetric memory or from
        nvshmem4py; at most 128 ranks, all of them within reach of one another.
        ``"hierarchical"``: ``"symmetric"`` within each domain (on a CPU ``"distributed"``), then
        torch.distributed across.
        ``"auto"``: on a CPU, and in a group of one, ``"distributed"``; if all ranks are on one
        host, each with a GPU of its own, and every GPU can do atomics on every other's memory,
        ``"symmetric"``; if that holds within each of several hosts with equally many consecutive
        ranks, ``"hierarchical"``; else ``"distributed"``. With ``domain_size`` these facts are
        taken from it, without a check.
    device : torch.device, str or None
        Device of the counts; by default the current GPU, or the CPU if there is none.
    timeout : float or None
        Bound on each wait in seconds; by default the group's own time-out, which is the only one
        that torch.distributed on a GPU takes.
    capacity : int
        The most counts in a call, below 2**16.
    domain_size : int or None
        Consecutive ranks that reach one another's memory; by default those of a host.

    Returns
    -------
    Communicator

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.
    RuntimeError
        If memory can't be shared, or a communicator over this group has failed before.
    SyncError
        If a rank doesn't come within the time-out.
    """
    check_choice("sync", sync, KINDS)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group, got {type(group).__name__}")
    on = resolve_device(device)
    timeout = None if timeout is None else check_timeout(timeout)
    capacity = check_integer("capacity", capacity)
    if capacity > MAX_CAPACITY:
        raise ValueError(f"capacity must be at most {MAX_CAPACITY}, got {capacity}")
    if domain_size is not None:
        domain_size = check_integer("domain_size", domain_size)
        if group.size() % domain_size:
            raise ValueError(f"domain_size must divide {group.size()} ranks, got {domain_size}")
    if group in failed_groups:
        raise RuntimeError(
            "a communicator over this group has failed: counts can be synchronised again over a "
            "new process group"
        )
    bound = group_timeout(group, on) if timeout is None else timeout
    if on.type == "cpu":
        if sync in ("symmetric", "nvshmem"):
            raise ValueError(f"sync={sync!r} needs a GPU, got device {on}")
        domain = domain_size or count_ranks_per_node(group, bound)
        if sync == "hierarchical":
            return _make_hierarchical(group, on, bound, capacity, domain)
        return DistributedCommunicator(group, on, timeout, domain)
    with torch.cuda.device(on):
        domain = domain_size or count_ranks_per_node(group, bound)
        chosen = choose_sync(group, on, domain, domain_size, bound) if sync == "auto" else sync
        if chosen == "distributed":
            return DistributedCommunicator(group, on, timeout, domain)
        if chosen == "hierarchical":
            return _make_hierarchical(group, on, bound, capacity, domain)
        return _make_peer(chosen, group, on, bound, capacity, domain)


def _make_peer(
    provider: str,
    group: dist.ProcessGroup,
    device: torch.device,
    timeout: float,
    capacity: int,
    ranks_per_node: int,
) -> PeerCommunicator:
    """Make a communicator by a kernel, on memory from ``provider``; collective."""
    from lplb_triton import kernels

    if group.size() > kernels.MAX_RANKS:
        raise ValueError(
            f"sync={provider!r} takes at most {kernels.MAX_RANKS} ranks, got {group.size()}"
        )
    memory = allocate(provider, Endpoint.words(group.size(), capacity), group, device, timeout)
    return PeerCommunicator(group, device, timeout, ranks_per_node, memory, capacity)


def _make_hierarchical(
    group: dist.ProcessGroup,
    device: torch.device,
    timeout: float,
    capacity: int,
    domain: int,
) -> HierarchicalCommunicator:
    """Make a communicator for domains of ``domain`` consecutive ranks; collective."""
    size = group.size()
    if not 1 < domain < size:
        raise ValueError(
            f"sync='hierarchical' needs several domains of several ranks, got {size} ranks in "
            f"domains of {domain}"
        )
    on_cpu = device.type == "cpu"
    longest_wait = timeout if on_cpu else group_timeout(group, device)
    inner_group, outer_group = split_group(group, domain, timeout, longest_wait)
    inner: Communicator
    if on_cpu:
        inner = DistributedCommunicator(inner_group, device, timeout, domain)
        outer = DistributedCommunicator(outer_group, device, timeout, 1)
    else:
        inner = _make_peer("symmetric", inner_group, device, timeout, capacity, domain)
        outer = DistributedCommunicator(outer_group, device, None, 1)
    return HierarchicalCommunicator(group, device, domain, inner, outer)


def choose_sync(
    group: dist.ProcessGroup, device: torch.device, domain: int, given: int | None, timeout: float
) -> str:
    """Apply the rule of ``sync="auto"``; all ranks reach the same result.

    ``given`` is ``domain`` if the caller has stated it, else None.
    """
    if group.size() == 1:
        return "distributed"
    reached = given is not None
    if not reached:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        here = socket.gethostname(), uuid
        everyone = all_gather_objects(group, "finding the group's GPUs", timeout, here)
        uuids = [name for host, name in everyone if host == here[0]]
        mine = _reaches_all(device, uuid, uuids)
        purpose = "asking which GPUs reach one another"
        reached = all(all_gather_objects(group, purpose, timeout, mine))
    if not reached or domain == 1:
        return "distributed"
    return "symmetric" if domain == group.size() else "hierarchical"


def _reaches_all(device: torch.device, uuid: str, uuids: list[str]) -> bool:
    """Whether this GPU can do atomics on all the others' memory, and no two ranks share a GPU."""
    if len(set(uuids)) != len(uuids):
        return False
    visible = {
        str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())
    }
    others = [visible.get(other) for other in uuids if other != uuid]
    return all(
        other is not None and _supports_peer_atomics(device.index, other) for other in others
    )


def _supports_peer_atomics(source: int, target: int) -> bool:
    """Ask the CUDA driver whether a GPU can do native atomics on another's memory."""
    if torch.version.cuda is None:
        return False
    driver = ctypes.CDLL("libcuda.so.1")
    native_atomics_supported = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    value = ctypes.c_int()
    error = driver.cuDeviceGetP2PAttribute(
        ctypes.byref(value), native_atomics_supported, source, target
    )
    return error == 0 and value.value == 1


def acquire(
    group: dist.ProcessGroup,
    sync: str,
    device: torch.device,
    timeout: float | None,
    n: int,
    domain_size: int | None = None,
) -> Communicator:
    """Return the communicator that balancers with these settings share; collective.

    Every call needs one call of `release`.
    """
    capacity = max(DEFAULT_CAPACITY, 1 << (n - 1).bit_length())
    # The communicator holds a reference to its group, so no other group can have this id meanwhile.
    key = (id(group), sync, device, timeout, capacity, domain_size)
    communicator = shared_communicators.get(key)
    state = "none" if communicator is None or communicator.closed else "usable"
    if communicator is not None and communicator.failed():
        state = "failed"
    # The ranks agree on it: where nothing refers to a communicator any more, it may exist on some
    # of them until their garbage is collected.
    bound = group_timeout(group, device) if timeout is None else timeout
    states = set(all_gather_objects(group, "sharing a communicator", bound, state))
    if communicator is None or states != {"usable"} and "failed" not in states:
        communicator = shared_communicators[key] = connect(
            group, sync, device=device, timeout=timeout, capacity=capacity,
            domain_size=domain_size,
        )  # fmt: skip
    elif "failed" in states:
        raise RuntimeError(f"{communicator!r} over this group has failed; use a new group")
    communicator.users += 1
    return communicator


def release(communicator: Communicator, local: bool = False) -> None:
    """Undo one `acquire`; the last release closes the communicator.

    This is collective, unless ``local`` is set: then the communicator is abandoned instead.
    """
    for key, known in list(shared_communicators.items()):
        if known is communicator:
            communicator.users -= 1
            if not communicator.users or communicator.failed():
                del shared_communicators[key]
                if local:
                    communicator.abandon()
                else:
                    communicator.close()
            return


def deep_ep_domain(buffer: Any) -> tuple[dist.ProcessGroup, int | None]:
    """Return the process group of a DeepEP buffer, and how many consecutive ranks NVLink joins.

    Of a ``deep_ep.Buffer`` this reads ``group`` and, if it has RDMA memory, the number of RDMA
    ranks of its ``runtime``; of a ``deep_ep.ElasticBuffer`` ``group`` and ``num_nvlink_ranks``.
    The number is None if the buffer doesn't state it.

    Raises
    ------
    TypeError
        If it has no process group of torch.distributed.
    """
    group = getattr(buffer, "group", None)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "buffer must have a process group of torch.distributed as its 'group', got "
            f"{type(buffer).__name__} with {type(group).__name__}"
        )
    domain = getattr(buffer, "num_nvlink_ranks", None)
    if domain is None:
        count = getattr(getattr(buffer, "runtime", None), "get_num_rdma_ranks", None)
        if callable(count):
            domain = group.size() // max(1, int(count()))
    return group, None if domain is None else check_integer("num_nvlink_ranks", domain)
