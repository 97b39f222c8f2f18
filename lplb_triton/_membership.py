"""A layer's membership in its EP group: placement, rank and communicator, outside of batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.distributed as dist

from lplb_triton._backends.base import Backend
from lplb_triton._backends.layer import Layer
from lplb_triton._consensus import LayerPlacement, agree_on_placements
from lplb_triton.placement import Placement
from lplb_triton.sync._base import Communicator, group_timeout, message_version
from lplb_triton.sync._connect import acquire, release
from lplb_triton.sync._rendezvous import barrier

__all__ = ["Membership", "wait_for_device", "warn_if_no_group"]

_ADVICE = (
    "Give the EP group as group= to sum counts over it. If counts are global as they are, say so: "
    "quotas='replicated' where every rank holds all tokens of the group, rank= elsewhere"
)


class Membership:
    """One layer's part in its group.

    Parameters
    ----------
    layer : Layer
        Its group, rank, communicator, placement and version are changed here.
    backend : Backend
        Its tables are written here.
    layer_id : tuple of int
        Distinguishes the layer from others of this process.
    own_rank : int or None
        The rank that the caller has given; None takes the group's.
    sync : str or Communicator
        As for `lplb_triton.Balancer`.
    timeout : float or None
        Bound on each wait in seconds; None takes the group's.

    Attributes
    ----------
    saved_ranks : tuple of int or None
        Global ranks of the group that the layer had when it was saved to a file, or lost by a
        failure; None if it has its group or never had one.
    """

    def __init__(
        self,
        layer: Layer,
        backend: Backend,
        layer_id: tuple[int, ...],
        *,
        own_rank: int | None,
        sync: str | Communicator,
        timeout: float | None,
    ) -> None:
        self.layer, self.backend, self.layer_id = layer, backend, layer_id
        self.own_rank, self.sync, self.timeout = own_rank, sync, timeout
        self.saved_ranks: tuple[int, ...] | None = None
        self._n_copies = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Settings that are the same on all ranks, such as quotas, solver, objective and locality.

        Back ends make the checksum of a plan of live slots in different ways.
        """
        layer = self.layer
        live = "" if layer.live is None else f"{layer.live}, {layer.backend}"
        cost = layer.cost
        objective = "tokens" if cost is None else f"time, cost {cost.checksum & 0xFFFFFFFF:08x}"
        ranks_per_node, slack = layer.locality
        locality = "none" if slack is None else f"node, slack {slack!r}"
        if ranks_per_node is not None:
            locality += f", {ranks_per_node} ranks a node"
        return layer.quotas, layer.solver, live, objective, locality

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """Global ranks of the layer's group, or `saved_ranks` if it has no group now."""
        if self.layer.group is None:
            return self.saved_ranks
        return tuple(dist.get_process_group_ranks(self.layer.group))

    def wait_limit(self, group: dist.ProcessGroup | None) -> float:
        """Return the seconds that a rank waits for the others of ``group``."""
        if self.timeout is not None:
            return self.timeout
        return 0.0 if group is None else group_timeout(group, self.layer.device)

    def join(
        self,
        purpose: str,
        group: dist.ProcessGroup | None,
        sync: str | Communicator,
        warmup: Callable[[], None],
        domain_size: int | None = None,
    ) -> None:
        """Take rank 0's placement, this rank's number and a communicator; collective.

        ``warmup`` is `Balancer.warmup`. It is not kept, since the balancer owns this object.
        """
        layer, communicator = self.layer, None
        if group is not None and group.size() != layer.placement.ep_size:
            raise ValueError(f"group must have {layer.placement.ep_size} ranks, got {group.size()}")
        limit = self.wait_limit(group)
        proposed = [LayerPlacement(layer.placement, self.layer_id)]
        agreed = agree_on_placements(group, purpose, limit, proposed, self.kinds)[0]
        replicated = layer.quotas == "replicated"
        if group is not None and not replicated:
            communicator = self._acquire(group, sync, domain_size)
        self._release()
        self.sync, self.saved_ranks = sync, None
        layer.group, layer.communicator, layer.blocked = group, communicator, None
        if group is not None and self.own_rank is None and not replicated:
            layer.rank = dist.get_rank(group)
        self.backend.follow_communicator()
        self.write_idle(agreed)
        if communicator is not None and communicator.waits_on_device:
            self._load_kernels(purpose, communicator, warmup, limit)

    def _load_kernels(
        self, purpose: str, communicator: Communicator, warmup: Callable[[], None], limit: float
    ) -> None:
        """Load all kernels on all ranks, before any kernel waits for another rank."""
        try:
            warmup()
            barrier(communicator.group, f"{purpose}, kernels loaded", limit)
        except BaseException:
            self._release(local=True)
            # The layer is blocked: without a communicator it would take this rank's counts for
            # those of all ranks.
            self.saved_ranks = tuple(dist.get_process_group_ranks(communicator.group))
            self.layer.blocked = f"{purpose} failed here: call set_group(group) on every rank"
            self.layer.group = self.layer.communicator = None
            self.backend.follow_communicator()
            raise

    def close(self, *, local: bool) -> None:
        """Release the communicator, once; collective unless ``local``."""
        if self.layer.blocked is None:
            self.layer.blocked = "this Balancer is closed"
            self._release(local)

    def copy_from(self, other: Membership) -> None:
        """Become a member of the group of ``other``, sharing its communicator; local."""
        other._n_copies += 1
        self.layer_id = (*other.layer_id, other._n_copies)
        self.sync = other.sync
        layer, source = self.layer, other.layer
        layer.group, layer.rank, layer.blocked = source.group, source.rank, source.blocked
        layer.communicator = source.communicator
        self.backend.follow_communicator()
        if layer.blocked is None and self._is_shared(layer.communicator):
            layer.communicator.users += 1
        self.write_idle(LayerPlacement(source.placement, self.layer_id))

    def write(self, agreed: LayerPlacement) -> None:
        """Write a placement into the tables; the caller keeps the device idle."""
        self.backend.tables.write(agreed.placement)
        version = agreed.version
        if self.layer.live is not None:
            # A rank with other rules would send tokens to other experts' weights.
            version = message_version(str((version, tuple(self.layer.live))).encode())
        if self.layer.cost is not None:
            # A rank with another cost would divide its tokens by another plan.
            version = message_version(str((version, self.layer.cost.digest)).encode())
        if self.layer.locality.slack is not None:
            # So would a rank with another slack, or other nodes.
            version = message_version(str((version, tuple(self.layer.locality))).encode())
        self.layer.write_version(version)
        self.layer.placement, self.layer_id = agreed

    def write_idle(self, agreed: LayerPlacement) -> None:
        """Write a placement into the tables, with a wait for the device before and after."""
        wait_for_device(self.layer.device)
        self.write(agreed)
        wait_for_device(self.layer.device)

    def _acquire(
        self, group: dist.ProcessGroup, sync: str | Communicator, domain_size: int | None
    ) -> Communicator:
        """Return the given communicator over the group, or the shared one; collective."""
        device = self.layer.device
        if not isinstance(sync, Communicator):
            n_logical = self.layer.placement.n_logical
            return acquire(group, sync, device, self.timeout, n_logical, domain_size)
        if sync.group is not group or sync.device != device:
            raise ValueError(f"sync must be over the group and on {device}")
        return sync

    def _release(self, local: bool = False) -> None:
        """Release a communicator that `_acquire` has shared; collective unless ``local``."""
        communicator = self.layer.communicator
        if self._is_shared(communicator):
            release(communicator, local)

    def _is_shared(self, communicator: Communicator | None) -> TypeGuard[Communicator]:
        """Whether ``communicator`` exists and was made by `_acquire`, not given by the caller."""
        return communicator is not None and not isinstance(self.sync, Communicator)


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warn_if_no_group(placement: Placement, stacklevel: int, advice: str = _ADVICE) -> None:
    """Warn if no group is given although torch.distributed has one that fits the placement."""
    if not dist.is_available() or not dist.is_initialized() or placement.ep_size == 1:
        return
    if dist.get_world_size() == placement.ep_size:
        warnings.warn(
            f"torch.distributed has {placement.ep_size} ranks, as many as the placement, but no "
            f"group is given, so each rank balances its own tokens alone. {advice}",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
