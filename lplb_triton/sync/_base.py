"""The interface of every communicator: sums of counts over the EP group."""

from __future__ import annotations

import datetime
import weakref
import zlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from lplb_triton._checks import MAX_TIMEOUT

__all__ = ["Communicator", "SyncError", "group_timeout", "message_version"]

# Groups over which a communicator has failed: they can't be used again. The references are weak for
# the reason given in _connect.py.
failed_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


class SyncError(RuntimeError):
    """A rank didn't come in time, or came with another call.

    Attributes
    ----------
    ranks : tuple of int
        Ranks of the EP group that caused the failure; empty if they aren't known.
    epoch : int
        Number of the call that failed, from 1.
    """

    def __init__(self, message: str, ranks: tuple[int, ...], epoch: int) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.epoch = epoch

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all arguments, so that other processes can load what a worker has raised."""
        return type(self), (str(self), self.ranks, self.epoch), self.__dict__


class Communicator(ABC):
    """Sums int32 counts over the ranks of a group; made by `lplb_triton.sync.connect`.

    All ranks make the same calls in the same order. A communicator is a context manager, which is
    closed on exit.

    Attributes
    ----------
    kind : str
        Name of the back end.
    group : torch.distributed.ProcessGroup
        Ranks that take part.
    rank, n_ranks : int
        This rank's number in the group, and the group's size.
    members : tuple of int
        Numbers in the EP group of the ranks of ``group``, by which errors name them. They differ
        from the numbers in ``group`` where that is a part of the EP group.
    ranks_per_node : int
        Consecutive ranks that share a node.
    timeout : float
        Bound on each wait, in seconds.
    """

    kind: str
    waits_on_device = False
    """Whether kernels wait for other ranks: then all must be loaded before the first call."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, timeout: float, ranks_per_node: int
    ) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.n_ranks = group.size()
        self.members = tuple(range(self.n_ranks))
        self.timeout = timeout
        self.ranks_per_node = ranks_per_node
        self.closed = False
        self.users = 0  # number of balancers that share the communicator

    @abstractmethod
    def exchange(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None = None,
    ) -> None:
        """Sum this call's counts over all ranks.

        Parameters
        ----------
        counts : torch.Tensor
            ``[n]`` int32, this rank's.
        version : torch.Tensor
            ``[1]`` int32 on the device; must be the same on all ranks.
        total : torch.Tensor
            ``[n]`` int32, is written: the sum, or -2 everywhere if the call failed.
        gathered : torch.Tensor or None
            ``[n_ranks, n]`` int32, is written: every rank's counts, or zeros and this rank's own
            counts if the call failed.

        Raises
        ------
        SyncError
            If an earlier call failed. If the host takes part in the exchange, also if this call
            fails.
        """

    @abstractmethod
    def check(self) -> None:
        """Wait for the device and raise `SyncError` if a call or a graph replay failed."""

    @abstractmethod
    def _release(self, failed: bool) -> None:
        """Free what the ranks share; collective unless a call ``failed``."""

    @abstractmethod
    def bind(self, channel: int) -> None:
        """Assign a channel to the current stream by number.

        A stream that has none gets a channel with its first call, which must then be the same call,
        by number, on every rank. Calls of one channel have the same order on every rank, calls of
        different channels may interleave. Back ends of torch.distributed have a single order for
        all streams and ignore this call.

        Parameters
        ----------
        channel : int
            From 0, below 64; the same on every rank. Streams whose calls never overlap may share
            one.
        """

    @abstractmethod
    def prepare(self, n: int) -> None:
        """Make sure that a call with ``n`` counts needs no compilation; local."""

    @abstractmethod
    def failed(self) -> bool:
        """Whether a call is known to have failed; doesn't wait for the device."""

    def close(self) -> None:
        """Free what is shared. Collective, and waits for all ranks; a second call does nothing.

        After a failed call it is local instead, and memory that other ranks may still write to
        isn't freed. Another communicator then needs a new process group.

        Raises
        ------
        SyncError
            If a rank doesn't come within the time-out. Nothing is freed then.
        """
        if not self.closed:
            self._end(self.failed())

    def abandon(self) -> None:
        """Close after a failure elsewhere: local, and nothing shared is freed."""
        if not self.closed:
            self._end(True)

    def _end(self, failed: bool) -> None:
        """Mark as closed and free what is shared; remember the group of a failed communicator."""
        self.closed = True
        try:
            self._release(failed)
        finally:
            if self.failed():
                failed_groups.add(self.group)

    def _check_open(self) -> None:
        """Raise if the communicator is closed."""
        if self.closed:
            raise RuntimeError(f"{self!r} is closed")

    def __enter__(self) -> Communicator:
        """Return the communicator."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it; after an exception locally, since other ranks may have had none."""
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __repr__(self) -> str:
        """Name the back end."""
        return self.kind


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    """Return the time-out of a process group in seconds, at most `MAX_TIMEOUT`."""
    options: Any = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", dist.default_pg_timeout)
    if not isinstance(timeout, datetime.timedelta):
        timeout = dist.default_pg_timeout
    return min(timeout.total_seconds(), MAX_TIMEOUT)


def message_version(*parts: bytes) -> int:
    """Return a CRC-32 of the parts as int32, which tells one placement from another."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc - (1 << 32) if crc >= 1 << 31 else crc
