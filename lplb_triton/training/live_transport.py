"""What moves weights to live slots and gradients back: the interface, and the way by messages."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton._torch_op import outside_modes
from lplb_triton.sync import SyncError
from lplb_triton.sync._rendezvous import all_gather_objects
from lplb_triton.training.routes import add_way_back, plan_routes
from lplb_triton.training.transfer import start_copies, start_sums

if TYPE_CHECKING:
    from lplb_triton.training.live_layer import LiveFetch, LiveLayer

__all__ = ["MessageTransport", "Transport"]


class Transport(ABC):
    """Moves weights and gradients of one `LiveSlots`; all ranks make the same calls in order.

    Calls return before the work is done where the device does it. `update` of LiveSlots calls
    `enter_update` and `exit_update`.
    """

    kind: str

    @abstractmethod
    def add(self, layer: LiveLayer) -> None:
        """Make a new layer's weights readable for other ranks; collective."""

    @abstractmethod
    def start(self, fetch: LiveFetch) -> None:
        """Start to fill the memory of a fetch."""

    @abstractmethod
    def finish(self, fetch: LiveFetch) -> None:
        """Have the current stream wait for the pull that was started last."""

    @abstractmethod
    def refill(self, fetch: LiveFetch) -> None:
        """Fill the memory of an earlier pull again, on the current stream."""

    @abstractmethod
    def return_gradients(
        self, fetch: LiveFetch, own: Sequence[torch.Tensor], live: Sequence[torch.Tensor]
    ) -> None:
        """Add gradients of live slots to ``own``, those of the experts at home here.

        For each trained tensor ``own`` has ``[static_per_rank, ...]``, contiguous, and ``live``
        ``[live_per_rank, ...]``, this rank's, contiguous.
        """

    @abstractmethod
    def enter_update(self) -> None:
        """Wait until no rank reads the weights of this step any more."""

    @abstractmethod
    def exit_update(self, layers: Sequence[LiveLayer]) -> None:
        """Let other ranks read the new weights."""

    @abstractmethod
    def raise_on_failure(self) -> None:
        """Raise the `SyncError` of the first failure, if one is known."""

    @abstractmethod
    def count_bytes(self) -> dict[str, int]:
        """Return the bytes that this rank holds, by what for."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Free what is shared; collective unless ``failed``."""


class MessageTransport(Transport):
    """Messages of torch.distributed; the host reads the plan of each batch.

    Each pull compares the plans of all ranks, over the store of the process group.
    """

    kind = "messages"

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, name: str) -> None:
        self._group, self._timeout, self._name = group, timeout, name
        self._error: SyncError | None = None
        self._finish: Callable[[], None] | None = None

    def add(self, layer: LiveLayer) -> None:
        """See `Transport.add`; messages read the weights where they are."""

    def start(self, fetch: LiveFetch) -> None:
        """See `Transport.start`."""
        with outside_modes(), torch.no_grad():
            self._start(fetch)

    def _start(self, fetch: LiveFetch) -> None:
        """Check and compare the plan, and start the messages."""
        experts = fetch.plan.cpu().numpy()
        n_logical = fetch.layer.placement.n_logical
        if ((experts < -1) | (experts >= n_logical)).any():
            raise ValueError(
                f"live must hold experts in [0, {n_logical}), or -1 for none, got "
                f"{experts.min()}..{experts.max()}"
            )
        self._compare(fetch, experts)
        self._route(fetch, experts)
        self._begin(fetch)

    def _compare(self, fetch: LiveFetch, experts: np.ndarray) -> None:
        """Raise a SyncError unless all ranks pull for the same layer by the same plan."""
        if self._group is None:
            return
        mine = (fetch.layer.number, zlib.crc32(np.ascontiguousarray(experts).tobytes()))
        purpose = f"a pull of {self._name}"
        try:
            theirs = all_gather_objects(self._group, purpose, self._timeout, mine)
        except SyncError as error:
            self._error = error
            raise
        # All ranks name the same ones.
        others = tuple(rank for rank, one in enumerate(theirs) if one != theirs[0])
        if others:
            rank = dist.get_rank(self._group)
            self._error = SyncError(
                f"{purpose} failed on rank {rank}: ranks {list(others)} came with another plan or "
                "for another layer: all ranks pull the same layers in the same order, by the plan "
                "of the same batch",
                others,
                0,
            )
            raise self._error

    def _route(self, fetch: LiveFetch, experts: np.ndarray) -> None:
        """Plan what this rank sends, unless the layer's last pull had the same plan."""
        layer = fetch.layer
        key = experts.tobytes()
        if layer.routed is None or layer.routed[0] != key:
            flat = experts.reshape(-1).astype(np.int64)
            target = np.flatnonzero(flat >= 0)
            homes = layer.homes[flat[target]].astype(np.int64)
            n_static = layer.placement.static_per_rank
            routes = plan_routes(
                homes[:, 0] * n_static + homes[:, 1], n_static, target, experts.shape[1],
                experts.shape[0], fetch.slots.rank, fetch.slots.device,
            )  # fmt: skip
            layer.routed = key, add_way_back(routes, fetch.slots.device)
        fetch.traffic = layer.routed[1]

    def _begin(self, fetch: LiveFetch) -> None:
        """Start the messages with weights."""
        assert fetch.traffic is not None
        # What is empty holds zeros.
        fetch.memory.zero_()
        rows = fetch.layer.rows
        pairs = [
            (rows.view(fetch.memory, number), source.detach())
            for number, source in enumerate(fetch.layer.sources)
        ]
        self._finish = start_copies(pairs, fetch.traffic.weight_routes, self._group)

    def finish(self, fetch: LiveFetch) -> None:
        """See `Transport.finish`."""
        finish, self._finish = self._finish, None
        if finish is not None:
            with outside_modes(), torch.no_grad():
                finish()

    def refill(self, fetch: LiveFetch) -> None:
        """See `Transport.refill`."""
        self._begin(fetch)
        self.finish(fetch)

    def return_gradients(
        self, fetch: LiveFetch, own: Sequence[torch.Tensor], live: Sequence[torch.Tensor]
    ) -> None:
        """See `Transport.return_gradients`."""
        assert fetch.traffic is not None
        start_sums(live, fetch.traffic, self._group)(own)

    def enter_update(self) -> None:
        """See `Transport.enter_update`; what was sent is not read again."""

    def exit_update(self, layers: Sequence[LiveLayer]) -> None:
        """See `Transport.exit_update`."""

    def raise_on_failure(self) -> None:
        """See `Transport.raise_on_failure`."""
        if self._error is not None:
            raise self._error

    def count_bytes(self) -> dict[str, int]:
        """See `Transport.count_bytes`."""
        return {}

    def close(self, failed: bool) -> None:
        """See `Transport.close`; nothing is shared."""
