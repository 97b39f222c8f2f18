"""Live slots that hold weights: fetched for each batch, with gradients that return home."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from lplb_triton._checks import (
    check_choice,
    check_flag,
    check_integer,
    check_timeout,
    resolve_device,
)
from lplb_triton._torch_op import outside_modes
from lplb_triton.placement import Placement
from lplb_triton.sync._connect import choose_sync
from lplb_triton.sync._rendezvous import count_ranks_per_node
from lplb_triton.training.checks import TRAINABLE, Spec, check_on_all_ranks, describe_placement
from lplb_triton.training.live_layer import LiveFetch, LiveLayer
from lplb_triton.training.live_rows import DEFAULT_SMS, LiveRows, RowKind
from lplb_triton.training.live_transport import MessageTransport, Transport
from lplb_triton.training.rows import check_rows, describe_tensor, ordinary_tensors

if TYPE_CHECKING:
    from lplb_triton.balancer import Balancer

__all__ = ["LiveSlots"]

TRANSPORTS = ("auto", "messages", "symmetric")
BACKWARDS = ("pull", "keep")
MOST_SMS = 1024


class LiveSlots:
    """Memory for the live slots of all layers of one shape, and what fills it.

    Construction, `empty`, `add` and `close` are collective over the group.

    Parameters
    ----------
    live_per_rank : int
        Live slots of each rank, as in `Placement.with_live_slots`: 1 or 2.
    group : torch.distributed.ProcessGroup or None
        The EP group; None for a group of one rank.
    device : torch.device, str or None
        Device of the weights; by default the current GPU, or the CPU if there is none.
    transport : {"auto", "messages", "symmetric"}
        ``"symmetric"``: kernels read other ranks' memory (torch's symmetric memory, NVLink), by
        the plan on the device; nothing waits on the host, and CUDA graphs can capture it, but
        see ``n_sms``.
        ``"messages"``: torch.distributed sends the rows, after the host has read the plan.
        ``"auto"``: symmetric for a group of several ranks with GPUs that reach one another, as
        ``sync="auto"`` of `lplb_triton.sync.connect` finds out, else messages.
    n_sms : int
        Programs that copy weights with ``"symmetric"``, about as many multiprocessors. 0: copy
        engines do it instead, which slow products beside them less; the host waits for each
        batch's plan, so CUDA graphs can't capture pulls.
    backward : {"pull", "keep"}
        Whether the backward pass fetches weights again, or each call keeps memory of its own.
    reuse_gradients : bool
        Whether the backward pass may add to the memory of the static slots' gradients that it is
        given, instead of copying them. That is right where the weights are used by one operation,
        which makes a fresh gradient for them.
    resident : bool
        For inference: each layer has slots of its own that keep what they hold, as
        ``live_resident`` of `Balancer` assumes; only experts that differ are fetched.
    timeout : float
        Bound on each wait for another rank, in seconds.

    Attributes
    ----------
    transport : str
        ``"messages"`` or ``"symmetric"``.
    rank, ep_size, live_per_rank : int
        This rank's number, ranks of the group, and live slots of each.
    step : int
        Number of `update` blocks so far.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit, or that differs between ranks.

    Examples
    --------
    >>> from lplb_triton import LiveSlots, Placement
    >>> load = torch.tensor([90.0, 10.0, 40.0, 60.0])
    >>> placement = Placement.from_history(load, 1, redundant_per_rank=0, keep_home=True)
    >>> slots = LiveSlots(1, device="cpu")
    >>> w = torch.nn.Parameter(torch.randn(4, 8, 8))
    >>> layer = slots.add(placement.with_live_slots(1), w)
    >>> plan = torch.tensor([[2]], dtype=torch.int32)  # as Balancer.live.experts
    >>> pull = layer.pull(plan)
    >>> ((static, live),) = pull.wait()
    >>> bool((live[0] == w[2]).all())
    True
    """

    def __init__(
        self,
        live_per_rank: int,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        transport: str = "auto",
        n_sms: int = DEFAULT_SMS,
        backward: str = "pull",
        reuse_gradients: bool = False,
        resident: bool = False,
        timeout: float = 30.0,
    ) -> None:
        def check() -> Spec:
            self.live_per_rank = check_integer("live_per_rank", live_per_rank)
            if group is not None and not isinstance(group, dist.ProcessGroup):
                raise TypeError(f"group must be a process group, got {type(group).__name__}")
            self.device = resolve_device(device)
            check_choice("transport", transport, TRANSPORTS)
            check_choice("backward", backward, BACKWARDS)
            self.n_sms = check_integer("n_sms", n_sms, 0)
            if self.n_sms > MOST_SMS:
                raise ValueError(f"n_sms must be at most {MOST_SMS}, got {n_sms}")
            self.reuse_gradients = check_flag("reuse_gradients", reuse_gradients)
            self.resident = check_flag("resident", resident)
            if self.resident and backward == "keep":
                raise ValueError(
                    "backward must be 'pull' with resident=True, whose slots later batches "
                    "overwrite, got 'keep'"
                )
            self.timeout = check_timeout(timeout)
            if transport == "symmetric" and (group is None or self.device.type != "cuda"):
                raise ValueError(
                    f"transport='symmetric' needs a group and GPUs, got device {self.device} and "
                    f"{'no group' if group is None else 'a group'}"
                )
            return {"live_per_rank": live_per_rank, "transport": transport, "backward": backward,
                    "resident": resident}  # fmt: skip

        usable = isinstance(group, dist.ProcessGroup)
        check_on_all_ranks({"group": group} if usable and group is not None else {}, check)
        self.group, self._keep = group, backward == "keep"
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ep_size = 1 if group is None else group.size()
        self.step = 0
        self._layers: list[LiveLayer] = []
        self._memory: torch.Tensor | None = None
        self._holder: LiveFetch | None = None
        self._pending: LiveFetch | None = None
        self._updating = self._closed = False
        self._transport = self._make_transport(transport)
        self.transport = self._transport.kind

    def _make_transport(self, transport: str) -> Transport:
        """Make what moves the weights; collective."""
        if transport == "auto":
            transport = _choose_transport(self.group, self.device, self.timeout)
        name = f"LiveSlots({self.live_per_rank})"
        if transport == "messages":
            return MessageTransport(self.group, self.timeout, name)
        from lplb_triton.training.live_symmetric import SymmetricTransport

        assert self.group is not None
        return SymmetricTransport(
            self.group, self.device, self.live_per_rank, self.timeout, self.n_sms, name
        )

    def __repr__(self) -> str:
        """Name sizes, transport and layers."""
        return (
            f"LiveSlots({self.live_per_rank}, rank={self.rank} of {self.ep_size}, "
            f"transport={self.transport!r}, {len(self._layers)} layers)"
        )

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate a tensor whose weights other ranks read where they are; collective.

        Fill it before it is given to `add`, as the memory of parameters: then nothing is copied
        at each `update`.

        Parameters
        ----------
        shape : sequence of int
            ``[static_per_rank, ...]``, rows of a multiple of 16 bytes; the same on every rank.
        dtype : torch.dtype
            Any.

        Returns
        -------
        torch.Tensor
            Zeros. Its memory belongs to this object and lives until `close`.
        """
        self._require_usable()
        sizes = tuple(check_integer("shape", n, 0) for n in shape)
        if self.transport == "messages":
            return torch.zeros(sizes, dtype=dtype, device=self.device)
        from lplb_triton.training.live_symmetric import SymmetricTransport

        assert isinstance(self._transport, SymmetricTransport)
        n_bytes = torch.Size(sizes).numel() * dtype.itemsize
        memory = self._transport.allocate(n_bytes, "in_place")
        return memory.buffer.view(torch.uint8)[:n_bytes].view(dtype).view(sizes)

    def add(self, balancer: Balancer | Placement, *sources: torch.Tensor) -> LiveLayer:
        """Add a layer, whose weights other ranks may read from then on; collective.

        Parameters
        ----------
        balancer : Balancer or Placement
            Whose placement has ``live_per_rank`` live slots. Its placement may change later as
            long as each expert's original (``log2phy[e, 0]``) stays where it is.
        *sources : torch.Tensor
            ``[static_per_rank, ...]`` each: weights, scales and whatever else belongs to an
            expert, in any dtype, contiguous, the same shapes for all layers. Those made by `empty`
            are read in place. Others are staged: their rows are copied to symmetric memory here
            and at the end of each `update`, see `memory`.

        Returns
        -------
        LiveLayer

        Raises
        ------
        TypeError, ValueError
            On every rank, naming the argument that doesn't fit, or that differs between ranks.
        SyncError
            If a rank doesn't come within the time-out.
        """
        self._require_usable()
        rows: list[LiveRows] = []

        def check() -> Spec:
            placement = _check_layer(self, balancer)
            rows.append(self._check_sources(placement, sources))
            return {"placement": describe_placement(placement), "sources": rows[0].kinds}

        check_on_all_ranks({} if self.group is None else {"group": self.group}, check)
        with ordinary_tensors():
            if self._memory is None and not self._keep and not self.resident:
                self._memory = self.make_memory(rows[0])
            layer = LiveLayer(self, len(self._layers), balancer, sources, rows[0])
            self._transport.add(layer)
        self._layers.append(layer)
        return layer

    def _check_sources(self, placement: Placement, sources: Sequence[torch.Tensor]) -> LiveRows:
        """Return the rows of a layer's sources, or raise naming the one that doesn't fit."""
        if not sources:
            raise ValueError("sources must hold at least one tensor, got none")
        kinds = []
        for number, source in enumerate(sources):
            label = f"sources[{number}]"
            if not isinstance(source, torch.Tensor):
                raise TypeError(f"{label} must be a tensor, got {type(source).__name__}")
            check_rows(label, source, placement.static_per_rank, " (static slots)")
            if source.device != self.device:
                raise ValueError(f"{label} must be on {self.device}, got {source.device}")
            if not source.is_contiguous():
                raise ValueError(f"{label} must be contiguous, got strides {source.stride()}")
            if not source.numel():
                raise ValueError(f"{label} must not be empty, got {describe_tensor(source)}")
            trained = source.requires_grad
            if trained and source.dtype not in TRAINABLE:
                raise TypeError(
                    f"{label} must have requires_grad=False, since only float16, bfloat16, float32 "
                    f"and float64 can be trained, got {describe_tensor(source)}"
                )
            kinds.append(RowKind(tuple(source.shape[1:]), source.dtype, trained))
        rows = LiveRows(kinds, self.live_per_rank)
        if self._layers and rows.kinds != self._layers[0].rows.kinds:
            raise ValueError(
                "sources must be like those of the first layer: make other LiveSlots for other "
                f"shapes. They are {rows.kinds}, those were {self._layers[0].rows.kinds}"
            )
        return rows

    @property
    def keeps_memory(self) -> bool:
        """Whether each pull has memory of its own, which lasts until its backward pass."""
        return self._keep

    def make_memory(self, rows: LiveRows) -> torch.Tensor:
        """Make memory for the live slots of one layer, of int32, at first zero."""
        return torch.zeros(rows.words, dtype=torch.int32, device=self.device)

    def start(self, layer: LiveLayer, plan: torch.Tensor) -> LiveFetch:
        """Start a pull; see `LiveLayer.pull`."""
        self._require_usable()
        _check_plan(plan, self)
        layer.require_current()
        if self.resident and torch.is_grad_enabled() and layer.rows.trained:
            raise RuntimeError(
                "resident live slots are for inference: call under torch.no_grad(), or with "
                "sources that don't require gradients"
            )
        self._join()
        memory = layer.memory if self._memory is None else self._memory
        if memory is None:
            with outside_modes_and_grad():
                memory = self.make_memory(layer.rows)
        fetch = LiveFetch(layer, plan, memory, self.step)
        # Should this fail, nobody knows what the memory holds.
        self._holder = None
        self._transport.start(fetch)
        self._pending = self._holder = fetch
        return fetch

    def finish(self, fetch: LiveFetch) -> None:
        """Wait for a pull; see `LivePull.wait`."""
        if fetch is self._pending:
            self._join()
        elif self._keep:
            # Another stream may have waited for it.
            self._transport.finish(fetch)
        if not self._keep and not self.resident and fetch is not self._holder:
            raise RuntimeError(
                "another pull, a backward pass or an update has followed since this pull began, "
                "so the live slots hold other weights: wait for a pull before the next one, or "
                "use backward='keep'"
            )

    def _join(self) -> None:
        """Have the current stream wait for the pull that is under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._transport.finish(pending)

    def refill(self, fetch: LiveFetch) -> None:
        """Fetch a pull's weights again if the memory has held others since."""
        self._require_usable()
        self._join()
        if self._keep or fetch is self._holder:
            return
        self._holder = None
        self._transport.refill(fetch)
        self._holder = fetch

    def return_gradients(
        self, fetch: LiveFetch, own: Sequence[torch.Tensor], live: Sequence[torch.Tensor]
    ) -> None:
        """Add gradients of live slots to those of the originals; all ranks call it."""
        self._require_usable()
        self._join()
        self._transport.return_gradients(fetch, own, live)

    @contextmanager
    def update(self) -> Iterator[None]:
        """Change weights within this context; all ranks do so, as often and in the same order.

        On entry the current stream waits until no rank reads weights of this step any more. On
        exit, staged weights are copied again and published: pulls of other ranks wait for that.

        Raises
        ------
        RuntimeError
            If it is nested. After an exception within it, the new weights aren't published, so
            other ranks' pulls end with a `SyncError`, and this object can't be used any more.
        SyncError
            If an earlier call failed.

        Examples
        --------
        >>> with slots.update():  # doctest: +SKIP
        ...     optimizer.step()
        """
        self._require_usable()
        self._join()
        self._updating = True
        self._transport.enter_update()
        yield
        # After a failed wait another rank may still have read what was written.
        self._transport.raise_on_failure()
        with outside_modes_and_grad():
            self._transport.exit_update(self._layers)
        for layer in self._layers:
            layer.accept_changes()
        self.step += 1
        self._holder = None
        self._updating = False

    def memory(self) -> dict[str, int]:
        """Return the bytes that live slots take on this rank, by what for.

        Returns
        -------
        dict of str to int
            ``"live"``: the slots. ``"staged"``: copies of weights in symmetric memory.
            ``"in_place"``: tensors made by `empty`. ``"gradients"``: gradients on their way.
            ``"signals"``: words of the protocol. All but the first are of ``"symmetric"`` only;
            with ``backward="keep"`` each call takes ``"live"`` bytes more until its backward pass.
        """
        live = 0 if self._memory is None else self._memory.nbytes
        live += sum(0 if layer.memory is None else layer.memory.nbytes for layer in self._layers)
        if self._keep and self._layers:
            live = self._layers[0].rows.live_bytes
        none = dict.fromkeys(("staged", "in_place", "gradients", "signals"), 0)
        return {"live": live, **none, **self._transport.count_bytes()}

    def check(self) -> None:
        """Wait for the device and raise `SyncError` if a call or a graph replay failed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._transport.raise_on_failure()

    def _require_usable(self) -> None:
        """Raise if the object is closed or a call has failed."""
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")
        if self._updating:
            raise RuntimeError(
                "LiveSlots.update() is under way, or an exception ended it: weights are being "
                "written, so nothing else may be called within it"
            )
        self._transport.raise_on_failure()

    def close(self) -> None:
        """Free what is shared, tensors of `empty` too; collective. A second call does nothing.

        After a failed call it is local instead, and memory that other ranks may read isn't freed.
        """
        if not self._closed:
            self._join()
            self._closed = True
            self._transport.close(self._updating)

    def __enter__(self) -> LiveSlots:
        """Return the object."""
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
        elif not self._closed:
            self._closed = True
            self._transport.close(True)


@contextmanager
def outside_modes_and_grad() -> Iterator[None]:
    """Turn off what would record or replace work on memory that is ours."""
    with outside_modes(), torch.no_grad():
        yield


def _check_layer(slots: LiveSlots, balancer: Balancer | Placement) -> Placement:
    """Return the placement of a new layer, or raise."""
    placement = getattr(balancer, "placement", balancer)
    if not isinstance(placement, Placement):
        raise TypeError(f"balancer must be a Balancer or Placement, got {type(balancer).__name__}")
    if placement.ep_size != slots.ep_size:
        raise ValueError(
            f"balancer has a placement on {placement.ep_size} ranks, the group has {slots.ep_size}"
        )
    if placement.live_per_rank != slots.live_per_rank:
        raise ValueError(
            f"balancer has a placement with {placement.live_per_rank} live slots a rank, these are "
            f"LiveSlots({slots.live_per_rank})"
        )
    return placement


def _check_plan(plan: object, slots: LiveSlots) -> None:
    """Raise unless ``plan`` can name the experts of all live slots."""
    if not isinstance(plan, torch.Tensor):
        raise TypeError(f"live must be Balancer.live, got {type(plan).__name__}")
    shape = (slots.ep_size, slots.live_per_rank)
    if plan.shape != shape or plan.dtype != torch.int32 or plan.device != slots.device:
        raise ValueError(
            f"live must be int32 of shape {shape} on {slots.device}, got {describe_tensor(plan)}"
        )
    if not plan.is_contiguous():
        raise ValueError(f"live must be contiguous, got strides {plan.stride()}")


def _choose_transport(group: dist.ProcessGroup | None, device: torch.device, timeout: float) -> str:
    """Apply the rule of ``transport="auto"``; collective."""
    if group is None or group.size() == 1 or device.type != "cuda":
        return "messages"
    with torch.cuda.device(device):
        domain = count_ranks_per_node(group, timeout)
        sync = choose_sync(group, device, domain, None, timeout)
    return "symmetric" if sync == "symmetric" else "messages"
