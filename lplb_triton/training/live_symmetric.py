"""Pulls over NVLink from symmetric memory, planned on the device and without a host in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lplb_triton._layout import MAX_RANKS
from lplb_triton.sync import SyncError
from lplb_triton.sync._memory import SharedMemory, allocate
from lplb_triton.sync._rendezvous import all_gather_objects, barrier
from lplb_triton.training.live_engines import require_no_capture
from lplb_triton.training.live_peer import LivePeer, LiveTables, fault_error
from lplb_triton.training.live_rows import LiveRows
from lplb_triton.training.live_transport import Transport

if TYPE_CHECKING:
    from lplb_triton.training.live_layer import LiveFetch, LiveLayer

__all__ = ["SymmetricTransport"]

# Memory that no collective `close` has freed. It is kept until the process ends, since other ranks
# may still read it.
_held: dict[int, SharedMemory] = {}


class SymmetricTransport(Transport):
    """One stream of its own for pulls; gradients return on the stream of the backward pass."""

    kind = "symmetric"

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        slots: int,
        timeout: float,
        n_sms: int,
        name: str,
    ) -> None:
        if group.size() > MAX_RANKS:
            raise ValueError(
                f"transport='symmetric' takes at most {MAX_RANKS} ranks, got {group.size()}"
            )
        self._group, self._device, self._slots = group, device, slots
        self._timeout, self._n_sms, self._name = timeout, n_sms, name
        self._rank = dist.get_rank(group)
        self._error: SyncError | None = None
        self._memories: list[SharedMemory] = []
        self._staged: dict[int, list[tuple[int, torch.Tensor]]] = {}
        self._tables: dict[int, LiveTables] = {}
        self._peer: LivePeer | None = None
        self._bytes = {"signals": 0, "gradients": 0, "staged": 0, "in_place": 0}
        # Copies take few multiprocessors, which products that were launched before would not free.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        # A pull begins behind the first event and ends at the second one.
        self._begin = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def peer(self) -> LivePeer:
        """Side of this rank in the protocol."""
        assert self._peer is not None
        return self._peer

    def allocate(self, n_bytes: int, what: str) -> SharedMemory:
        """Allocate bytes that other ranks can read, at first zero; collective."""
        memory = allocate(
            "symmetric", max(2, -(-n_bytes // 16) * 2), self._group, self._device, self._timeout,
            f"{self._name} (transport='symmetric')", "transport='messages'",
        )  # fmt: skip
        _held[id(memory)] = memory
        self._memories.append(memory)
        self._bytes[what] += memory.buffer.nbytes
        return memory

    def add(self, layer: LiveLayer) -> None:
        """See `Transport.add`."""
        if self._peer is None:
            self._make_peer(layer.rows)
        rows, n_home = layer.rows, int(layer.homes[:, 1].max()) + 1
        places = [self._find(source) for source in layer.sources]
        staged = [number for number, place in enumerate(places) if place is None]
        purpose = f"adding a layer to {self._name}"
        everyone = all_gather_objects(self._group, purpose, self._timeout, places)
        for number, by_rank in enumerate(zip(*everyone, strict=True)):
            if len({place is None for place in by_rank}) > 1:
                raise ValueError(
                    f"sources[{number}] must be made by LiveSlots.empty on all ranks or on none"
                )
        offsets, total = {}, 0
        for number in staged:
            offsets[number] = total
            total += rows.units[number] * n_home
        memory = self.allocate(16 * total, "staged") if staged else None
        # By tensor, on every rank: the memory, and the byte of it where the rows begin.
        found: list[list[tuple[SharedMemory, int]]] = []
        self._staged[layer.number] = []
        for number in range(len(places)):
            if number in offsets:
                assert memory is not None
                words = memory.buffer.view(torch.int32)
                view = rows.view_rows(words, number, n_home, offsets[number])
                self._staged[layer.number].append((number, view))
                found.append([(memory, 16 * offsets[number])] * len(everyone))
            else:
                if any(at[1] % 16 for at in (theirs[number] for theirs in everyone) if at):
                    raise ValueError(
                        f"sources[{number}] must begin at a multiple of 16 bytes in memory of "
                        "LiveSlots.empty on all ranks"
                    )
                _require_units(number, rows)
                places_there = [theirs[number] for theirs in everyone]
                found.append([(self._memories[at[0]], at[1]) for at in places_there if at])
        self._tables[layer.number] = self._make_tables(layer, found)
        self._stage(layer, everything=True)
        torch.cuda.synchronize(self._device)
        # From here on every rank may read.
        barrier(self._group, purpose, self._timeout)

    def _make_tables(
        self, layer: LiveLayer, found: Sequence[Sequence[tuple[SharedMemory, int]]]
    ) -> LiveTables:
        """Make the tables of a layer, whose rows are where ``found`` says, by tensor and rank."""
        addresses, sources = [], []
        for by_rank in found:
            places = list(enumerate(by_rank))
            addresses.append([memory.addresses[rank] + begin for rank, (memory, begin) in places])
            if self._n_sms == 0:
                sources.append(
                    [
                        memory.peers[rank].view(torch.int32)[begin // 4 :]
                        for rank, (memory, begin) in places
                    ]
                )
        return LiveTables(
            layer.rows, layer.homes_on_device, addresses, layer.number, sources or None
        )

    def _make_peer(self, rows: LiveRows) -> None:
        """Allocate signals and the memory for gradients, and load the kernels; collective."""
        signals = self.allocate(8 * LivePeer.words(), "signals")
        returned = self.allocate(2 * 16 * rows.gradient_units, "gradients")
        self._peer = LivePeer(
            signals.addresses, returned.addresses, self._rank, self._device, self._slots,
            self._timeout, self._n_sms,
        )  # fmt: skip
        self._peer.warm(rows)

    def _find(self, source: torch.Tensor) -> tuple[int, int] | None:
        """Return in which memory a tensor begins, and at which byte of it; None for others."""
        at = source.data_ptr()
        for number, memory in enumerate(self._memories):
            begin = memory.buffer.data_ptr()
            if begin <= at < begin + memory.buffer.nbytes:
                return number, at - begin
        return None

    def _stage(self, layer: LiveLayer, everything: bool = False) -> None:
        """Copy weights to where other ranks read them: those that may have changed."""
        with torch.no_grad():
            for number, view in self._staged[layer.number]:
                if everything or layer.may_have_changed(number):
                    view.copy_(layer.sources[number].detach()[: len(view)])

    def start(self, fetch: LiveFetch) -> None:
        """See `Transport.start`."""
        self._require_startable()
        current = torch.cuda.current_stream(self._device.index)
        fetch.begun_on = current.cuda_stream
        # Products that read what the slots held before have been launched by now.
        self._begin.record(current)
        self._stream.wait_event(self._begin)
        self._pull(fetch, self._stream, compare=True)
        self._end.record(self._stream)

    def _pull(
        self, fetch: LiveFetch, stream: torch.cuda.Stream | None = None, *, compare: bool
    ) -> None:
        """Launch the copies of a pull on a stream, by default the current one."""
        tables = self._tables[fetch.layer.number]
        fetch.experts = self.peer.pull(
            tables, fetch.plan, fetch.memory, held=fetch.layer.held, compare=compare,
            experts=fetch.experts, stream=stream,
        )  # fmt: skip

    def _require_startable(self) -> None:
        """Raise a RuntimeError if the host must read a plan within a capture."""
        if self._n_sms == 0:
            require_no_capture()

    def finish(self, fetch: LiveFetch) -> None:
        """See `Transport.finish`."""
        current = torch.cuda.current_stream(self._device.index)
        # The event is that of the last pull, before which all others end.
        current.wait_event(self._end)
        if current.cuda_stream != fetch.begun_on:
            # Torch would hand out their memory again, once they are dropped, to the stream that
            # they were made on, which doesn't wait for this one.
            for used in (fetch.memory, fetch.plan):
                used.record_stream(current)

    def refill(self, fetch: LiveFetch) -> None:
        """See `Transport.refill`."""
        self._require_startable()
        self._pull(fetch, compare=False)

    def return_gradients(
        self, fetch: LiveFetch, own: Sequence[torch.Tensor], live: Sequence[torch.Tensor]
    ) -> None:
        """See `Transport.return_gradients`."""
        tables = self._tables[fetch.layer.number]
        self.peer.begin_return(tables, fetch.plan, live)
        self.peer.exchange(tables, fetch.plan)
        self.peer.end_return(tables, own)

    def enter_update(self) -> None:
        """See `Transport.enter_update`."""
        if self._peer is not None:
            self._peer.enter_update()

    def exit_update(self, layers: Sequence[LiveLayer]) -> None:
        """See `Transport.exit_update`."""
        for layer in layers:
            self._stage(layer)
            if layer.held is not None:
                layer.held.fill_(-1)
                on_host = self._tables[layer.number].on_host
                if on_host is not None:
                    on_host.forget()
        if self._peer is not None:
            self._peer.exit_update()

    def raise_on_failure(self) -> None:
        """See `Transport.raise_on_failure`."""
        if self._error is None and self._peer is not None and self._peer.failed():
            self._error = fault_error(self._peer, self._name, self._timeout)
        if self._error is not None:
            raise self._error

    def count_bytes(self) -> dict[str, int]:
        """See `Transport.count_bytes`."""
        return dict(self._bytes)

    def close(self, failed: bool) -> None:
        """See `Transport.close`."""
        if not failed:
            torch.cuda.synchronize(self._device)
            failed = self._peer is not None and self._peer.failed()
        if failed:
            # Late ranks may still read this memory, so it stays allocated.
            return
        barrier(self._group, f"closing {self._name}", self._timeout)
        with torch.cuda.device(self._device):
            for memory in self._memories:
                memory.free()
                del _held[id(memory)]
        self._memories.clear()
        self._tables.clear()


def _require_units(number: int, rows: LiveRows) -> None:
    """Raise unless a tensor's rows follow one another at multiples of 16 bytes."""
    n_bytes = rows.kinds[number].row_bytes
    if n_bytes % 16:
        raise ValueError(
            f"sources[{number}] was made by LiveSlots.empty, so its rows must be multiples of 16 "
            f"bytes, got {n_bytes}: give an ordinary tensor, which is staged"
        )
