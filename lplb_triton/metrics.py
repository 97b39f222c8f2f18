"""How well batches were balanced, from sums that the solving kernel adds to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lplb_triton._layout import N_METRICS, Metric

__all__ = ["Metrics", "MetricsReader"]

# Sums and counters of a layer that a reading takes together.
N_READ = N_METRICS + 2 + 3


class Metrics(NamedTuple):
    """Means over the batches between two readings; a batch of several groups counts for each.

    An imbalance is the largest load of a rank over the mean load of the group's ranks. Without any
    batch with tokens, all but the numbers of batches are NaN.
    """

    batches: int
    """Batches with tokens."""
    imbalance_before: float
    """With every token at its expert's home, the first slot in `Placement.log2phy`, as without
    replicas."""
    imbalance_after: float
    """By the plans, live slots included."""
    imbalance_static: float
    """By the plans of the static copies; the same without live slots."""
    bound: float
    """What no plan of the static copies can beat."""
    gap: float
    """Relative gap of the plans of static copies."""
    certified: float
    """Part of the plans that are within the tolerance."""
    steps: float
    """Steps by potentials, or interior-point iterations."""
    fetched: float
    """Experts fetched to live slots, over all ranks."""
    kept_on_rank: float
    """Part of this rank's tokens that stayed on it; NaN unless ``quotas="global"``."""
    kept_on_node: float
    """The same for its node."""

    def __str__(self) -> str:
        """Return one line: batches, imbalance before and after, its bound, and certificates."""
        if not self.batches:
            return "no batches since the last reading"
        return (
            f"{self.batches} batch{'es' if self.batches > 1 else ''}, imbalance "
            f"{self.imbalance_before:.3f} -> {self.imbalance_after:.3f} (bound {self.bound:.3f}), "
            f"{_format_percent(self.certified)} certified"
        )


class MetricsReader:
    """Reads the sums of one layer; each reading is about the batches since the one before.

    Parameters
    ----------
    sources : tuple of torch.Tensor
        The layer's sums ``[N_METRICS]`` float64, ``certified`` and ``solves`` ``[1]``, and
        ``traffic`` ``[3]``, on the device.
    """

    def __init__(self, sources: tuple[torch.Tensor, ...]) -> None:
        self._sources = sources
        self._last = [0.0] * N_READ
        self._copy: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def read(self) -> Metrics:
        """Wait for the device, and return what happened since the last reading."""
        self._copy = self._event = None
        return self._compare(self._gather().tolist())

    def poll(self) -> Metrics | None:
        """Return what a copy that an earlier call has started says, and start another.

        It never waits for the device: None if no copy has ended yet.
        """
        found = None
        if self._copy is not None:
            if self._event is not None and not self._event.query():  # type: ignore[no-untyped-call]
                return None
            found = self._compare(self._copy.tolist())
        gathered = self._gather()
        self._event = None
        if gathered.is_cuda:
            pinned = torch.empty(N_READ, dtype=torch.float64, device="cpu", pin_memory=True)
            self._copy = pinned.copy_(gathered, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(gathered.device))
        else:
            self._copy = gathered
        return found

    def _gather(self) -> torch.Tensor:
        """Return all sums and counters in one tensor on the device."""
        return torch.cat([source.double() for source in self._sources])

    def _compare(self, now: list[float]) -> Metrics:
        """Return what was added since the last reading; counters that were reset began at zero."""
        since = [a - b if a >= b else a for a, b in zip(now, self._last, strict=True)]
        self._last = now
        sums, (certified, solves, on_rank, on_node, tokens) = since[:N_METRICS], since[N_METRICS:]
        n = sums[Metric.BATCHES]

        def mean(which: Metric) -> float:
            return _divide(sums[which], n)

        return Metrics(
            round(n), mean(Metric.BEFORE), mean(Metric.AFTER), mean(Metric.STATIC),
            mean(Metric.BOUND), mean(Metric.GAP), _divide(certified, solves), mean(Metric.STEPS),
            mean(Metric.FETCHED), _divide(on_rank, tokens), _divide(on_node, tokens),
        )  # fmt: skip


def _format_percent(part: float) -> str:
    """Return a part as a whole percentage that is 100 only where nothing is missing."""
    return f"{math.floor(100 * part)}%" if part == part else "n/a"


def _divide(part: float, whole: float) -> float:
    """Return a quotient, NaN where there is nothing to divide by."""
    return part / whole if whole else float("nan")
