"""Exchange of counts by a kernel that writes into every rank's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lplb_triton.sync._base import Communicator, SyncError
from lplb_triton.sync._channels import CHANNELS, Channels, Stream
from lplb_triton.sync._faults import fault_error
from lplb_triton.sync._rendezvous import barrier

if TYPE_CHECKING:
    from lplb_triton import kernels
    from lplb_triton.sync._memory import SharedMemory


class PeerCommunicator(Communicator):
    """Exchange by the protocol of docs/sync.md, in memory that all ranks of the group can write.

    ``memory`` is this rank's buffer with the addresses of all ranks' buffers; ``capacity`` is the
    most counts that a call may have.
    """

    waits_on_device = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: float,
        ranks_per_node: int,
        memory: SharedMemory,
        capacity: int,
    ) -> None:
        super().__init__(group, device, timeout, ranks_per_node)
        self.kind = f"p2p({memory.name})"
        self.capacity = capacity
        self._memory: SharedMemory | None = memory
        _held[id(memory)] = memory
        self.endpoint = Endpoint(memory.addresses, self.rank, device, capacity, self.timeout)
        self._error: SyncError | None = None
        self._channels = Channels(self.kind, self._stream)

    def exchange(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None = None,
    ) -> None:
        """See `Communicator.exchange`."""
        channel = self.begin(counts.numel())
        self.endpoint.exchange(counts, version, total, gathered, channel)

    def begin(self, n: int) -> kernels.Channel:
        """Check that a call with ``n`` counts may begin, and return the stream's channel.

        This is for kernels that contain the exchange; they take `Endpoint.exchange_arguments`.
        """
        self._check_open()
        self._raise_on_failure()
        if n > self.capacity:
            raise ValueError(f"counts must have at most {self.capacity} elements, got {n}")
        return self._channels.of(self._handle())

    def bind(self, channel: int) -> None:
        """See `Communicator.bind`."""
        self._channels.bind(self._handle(), channel)

    def _handle(self) -> int:
        """Return the driver's handle of the current stream."""
        # Going through a torch.cuda.Stream object costs as much host time as a launch.
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def _stream(self) -> Stream:
        """Return the current stream."""
        return Stream(self._handle(), torch.cuda.current_stream(self.device).stream_id)

    def prepare(self, n: int) -> None:
        """See `Communicator.prepare`."""
        self.endpoint.prepare(n)

    def failed(self) -> bool:
        """See `Communicator.failed`."""
        return self._error is not None or self.endpoint.failed()

    def _raise_on_failure(self) -> None:
        """Raise the error of the first call that failed, if the host can see one already."""
        if self._error is None and self.endpoint.failed():
            openings = self._channels.openings
            self._error = fault_error(self, self.endpoint.status_view, openings)
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """See `Communicator.check`."""
        torch.cuda.synchronize(self.device)
        self._raise_on_failure()

    def _release(self, failed: bool) -> None:
        memory = self._memory
        if memory is None:
            return
        if not failed:
            torch.cuda.synchronize(self.device)
            failed = self.endpoint.failed()
        if failed:
            # Late ranks may still write to this memory, so it stays allocated.
            return
        # No rank may free memory that another still reads.
        barrier(self.group, f"closing {self.kind}", self.timeout)
        self._memory = None
        with torch.cuda.device(self.device):
            memory.free()
        del _held[id(memory)]


# Memory that no collective `close` has freed. It is kept until the process ends, since other ranks
# may still write to it.
_held: dict[int, SharedMemory] = {}


class Endpoint:
    """One rank's side of the exchange: its state, and the launches."""

    def __init__(
        self,
        addresses: list[int],
        rank: int,
        device: torch.device,
        capacity: int,
        timeout: float,
    ) -> None:
        from lplb_triton import kernels

        self._kernels = kernels
        self._buffer: torch.Tensor | None = None  # only if the endpoint owns its memory
        self._rank = rank
        self._capacity = capacity
        self._timeout_ms = max(1, round(timeout * 1000))
        self._device = device
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._gates = torch.zeros(CHANNELS, dtype=torch.int32, device=device)
        self._epochs = torch.zeros(CHANNELS, dtype=torch.int32, device=device)
        self._status = torch.zeros(
            kernels.status_words(len(addresses)),
            dtype=torch.int64,
            device="cpu",
            pin_memory=device.type == "cuda",
        )
        # Kernels write to this host memory, so the host reads it without a wait for the device.
        self.status_view = self._status.numpy()

    @staticmethod
    def words(n_ranks: int, capacity: int) -> int:
        """Return the size of a rank's buffer in 64-bit words."""
        from lplb_triton import kernels

        return CHANNELS * kernels.channel_words(n_ranks, capacity)

    def failed(self) -> bool:
        """Whether a kernel has reported a fault."""
        return bool(self.status_view[0])

    def exchange(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None,
        channel: kernels.Channel,
    ) -> None:
        """Launch the exchange on the current stream."""
        arguments = self.exchange_arguments(version, total, gathered)
        self._kernels.sum_over_ranks(counts, arguments, channel)

    def exchange_arguments(
        self, version: torch.Tensor, total: torch.Tensor, gathered: torch.Tensor | None
    ) -> kernels.Exchange:
        """Return the arguments of a kernel that contains the exchange."""
        return self._kernels.Exchange(
            total, gathered, self._addresses, self._gates, self._epochs, version, self._status,
            self._rank, self._capacity, self._timeout_ms,
        )  # fmt: skip

    def solo_endpoint(self) -> Endpoint:
        """Make an endpoint of a group of one, whose exchanges compile and load the kernels."""
        words = self.words(1, self._capacity)
        buffer = torch.zeros(words, dtype=torch.int64, device=self._device)
        endpoint = Endpoint([buffer.data_ptr()], 0, self._device, self._capacity, 1.0)
        endpoint._buffer = buffer
        return endpoint

    def prepare(self, n: int) -> None:
        """Compile and load the kernels for ``n`` counts."""
        on = self._device
        solo = self.solo_endpoint()
        counts = torch.zeros(n, dtype=torch.int32, device=on)
        version = torch.zeros(1, dtype=torch.int32, device=on)
        first = self._kernels.FIRST_CHANNEL
        for gathered in (None, torch.empty(1, n, dtype=torch.int32, device=on)):
            solo.exchange(counts, version, torch.empty_like(counts), gathered, first)
        if on.type == "cuda":
            torch.cuda.synchronize(on)
