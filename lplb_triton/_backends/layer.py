"""The state of one MoE layer that a balancer shares with its back end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar, overload

import torch

from lplb_triton._layout import CHANNELS, N_METRICS, TIME_REPORTED
from lplb_triton._locality import Locality, new_traffic_numbers
from lplb_triton.placement import Placement
from lplb_triton.solution import SolveError

if TYPE_CHECKING:
    import torch.distributed as dist

    from lplb_triton._backends.recorder import LoadRecorder
    from lplb_triton.costs import TimeCost
    from lplb_triton.live import LiveRules
    from lplb_triton.sync import Communicator

__all__ = ["Layer", "LayerAttribute", "create_layer"]

T = TypeVar("T")


@dataclass(eq=False)
class Layer:
    """One MoE layer on one rank: its settings, its placement, its group and its counters.

    The attributes are those of `lplb_triton.Balancer` of the same names, and besides:

    Attributes
    ----------
    metrics : torch.Tensor
        ``[N_METRICS]`` float64 on the device, sums over groups and batches; see `_layout.Metric`.
    version : torch.Tensor
        ``[1]`` int32 on the device, checksum of the placement; sent with the counts.
    live : LiveRules or None
        How live slots are filled; None for a placement without them.
    live_versions : torch.Tensor or None
        ``[channels]`` int32 on the device, with live slots: checksum of the placement and of the
        last plan, by channel of the exchange; sent with the counts.
    resident : torch.Tensor or None
        ``[ep_size, live_per_rank]`` int32 on the device: what live slots hold, if they keep it.
    cost : TimeCost or None
        What plans are made by with ``objective="time"``; None with ``"tokens"``.
    times : torch.Tensor or None
        ``[n_group, TIME_REPORTED]`` float32 on the device, with a cost: see `PlanTimes`.
    locality : Locality
        Ranks of a node, and whether plans keep tokens near.
    node_traffic : torch.Tensor or None
        ``[n_group, NEAR_REPORTED]`` float32 on the device, with near plans: see `NodeTraffic`.
    recorder : LoadRecorder or None
        Adds up the loads of batches; None if that was never asked for.
    blocked : str or None
        Why the layer can't be used; None if it can.
    checked : tuple of int
        ``uncertified`` and ``solves`` at the last call of `raise_on_uncertified`.
    """

    device: torch.device
    backend: str
    placement: Placement
    rank: int
    quotas: str
    solver: str
    tolerance: float
    max_iterations: int
    certified: torch.Tensor
    solves: torch.Tensor
    uncertified: torch.Tensor
    traffic: torch.Tensor
    metrics: torch.Tensor
    version: torch.Tensor
    default_n_sms: int
    live: LiveRules | None = None
    live_versions: torch.Tensor | None = None
    resident: torch.Tensor | None = None
    cost: TimeCost | None = None
    times: torch.Tensor | None = None
    locality: Locality = Locality(None, None)
    node_traffic: torch.Tensor | None = None
    group: dist.ProcessGroup | None = None
    communicator: Communicator | None = None
    recorder: LoadRecorder | None = None
    blocked: str | None = None
    checked: tuple[int, int] = (0, 0)

    def write_version(self, version: int) -> None:
        """Write the checksum of a placement; forget the last plan, and what live slots hold."""
        self.version.fill_(version)
        if self.live_versions is not None:
            self.live_versions.fill_(version)
        if self.resident is not None:
            self.resident.fill_(-1)

    def check_open(self) -> None:
        """Raise if the layer can't be used."""
        if self.blocked is not None:
            raise RuntimeError(self.blocked)

    def raise_on_uncertified(self) -> None:
        """Raise if groups have ended above the tolerance since the last call of this."""
        now = int(self.uncertified), int(self.solves)
        before, self.checked = self.checked, now
        if now[0] < before[0] or now[1] < before[1]:
            # The caller has reset the counters.
            before = 0, 0
        above, solved = now[0] - before[0], now[1] - before[1]
        if above:
            raise SolveError(
                f"{above} of {solved} groups ended with a gap above the tolerance "
                f"{self.tolerance:g} since the last such check, or the start"
            )


def create_layer(
    placement: Placement,
    device: torch.device,
    backend: str,
    *,
    rank: int,
    quotas: str,
    solver: str,
    tolerance: float,
    max_iterations: int,
    live: LiveRules | None = None,
    cost: TimeCost | None = None,
    locality: Locality = Locality(None, None),  # noqa: B008
    checked: tuple[int, int] = (0, 0),
) -> Layer:
    """Make a layer without a group, with counters at zero."""

    def zeros(n: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(n, dtype=dtype, device=device)

    return Layer(
        device, backend, placement, rank, quotas, solver, tolerance, max_iterations,
        certified=zeros(1, torch.int64),
        solves=zeros(1, torch.int64),
        uncertified=zeros(1, torch.int64),
        traffic=zeros(3, torch.int64),
        metrics=zeros(N_METRICS, torch.float64),
        version=zeros(1, torch.int32),
        default_n_sms=_default_n_sms(device),
        live=live,
        live_versions=zeros(CHANNELS, torch.int32) if live else None,
        resident=_empty_slots(placement, device) if live and live.resident else None,
        cost=cost,
        times=zeros(placement.n_group * TIME_REPORTED, torch.float32).view(-1, TIME_REPORTED)
        if cost
        else None,
        locality=locality,
        node_traffic=None
        if locality.slack is None
        else new_traffic_numbers(placement.n_group, device),
        checked=checked,
    )  # fmt: skip


def _empty_slots(placement: Placement, device: torch.device) -> torch.Tensor:
    """Return live slots that hold nothing."""
    shape = placement.ep_size, placement.live_per_rank
    return torch.full(shape, -1, dtype=torch.int32, device=device)


# Programs per launch on a CPU, by default.
CPU_PROGRAMS = 4
# Programs per launch on a GPU, at most: the solving kernel sums as many rows of counts at once.
MOST_PROGRAMS = 256


def _default_n_sms(device: torch.device) -> int:
    """Return the default number of programs that count and select."""
    if device.type != "cuda":
        return CPU_PROGRAMS
    # Two programs on each multiprocessor hide each other's memory latency.
    n_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(2 * n_multiprocessors, MOST_PROGRAMS)


class LayerAttribute(Generic[T]):
    """An attribute of a balancer that is stored in its layer, ``_layer``, under the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        """Keep the attribute's name."""
        self._name = name

    @overload
    def __get__(self, balancer: None, owner: type) -> LayerAttribute[T]: ...

    @overload
    def __get__(self, balancer: object, owner: type) -> T: ...

    def __get__(self, balancer: object, owner: type) -> LayerAttribute[T] | T:
        """Return the layer's value."""
        if balancer is None:
            return self
        value: T = getattr(balancer._layer, self._name)  # type: ignore[attr-defined]
        return value

    def __set__(self, balancer: object, value: T) -> None:
        """Change the layer's value."""
        setattr(balancer._layer, self._name, value)  # type: ignore[attr-defined]
