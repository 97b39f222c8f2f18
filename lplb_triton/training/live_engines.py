"""Copies of live experts' weights by a GPU's copy engines, which the host starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lplb_triton.training.live_rows import UNIT, LiveRows

__all__ = ["HostTables", "PlanReader", "copy_live_rows", "require_no_capture"]

_WORDS = UNIT // 4


class HostTables:
    """What the host needs to know of a layer to copy its rows.

    Parameters
    ----------
    homes : sequence of (int, int)
        Rank and static slot of each expert's original.
    sources : sequence of sequence of torch.Tensor
        By tensor and rank, int32 memory that begins with the tensor's first row there.
    slots : int
        Live slots of each rank.
    """

    def __init__(
        self,
        homes: Sequence[Sequence[int]],
        sources: Sequence[Sequence[torch.Tensor]],
        slots: int,
    ) -> None:
        self.homes, self.sources = homes, sources
        self.held = [-1] * slots

    def forget(self) -> None:
        """Note that slots hold nothing that is current."""
        self.held = [-1] * len(self.held)


class PlanReader:
    """Brings this rank's part of a plan to the host."""

    def __init__(self, device: torch.device, slots: int) -> None:
        on_gpu = device.type == "cuda"
        self._experts = torch.empty(slots, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self._event: torch.cuda.Event | None = None
        if on_gpu:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, experts: torch.Tensor) -> None:
        """Start to read ``[slots]`` int32 on the current stream."""
        self._experts.copy_(experts, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def finish(self) -> tuple[int, ...]:
        """Wait for it, and for what the stream was given before."""
        if self._event is not None:
            self._event.synchronize()
        return tuple(self._experts.tolist())


def copy_live_rows(
    rows: LiveRows,
    tables: HostTables,
    experts: Sequence[int],
    live: torch.Tensor,
    *,
    resident: bool = False,
) -> None:
    """Copy the rows of ``experts``, one for each slot, -1 for none, on the current stream.

    ``live`` ``[LiveRows.words]`` int32 is the memory of all tensors' slots. With ``resident`` slots
    that hold their expert already are left as they are.
    """
    for slot, expert in enumerate(experts):
        if expert < 0 or (resident and tables.held[slot] == expert):
            continue
        tables.held[slot] = expert
        rank, row = tables.homes[expert]
        for units, offset, by_rank in zip(rows.units, rows.offsets, tables.sources, strict=True):
            n = units * _WORDS
            target = live.narrow(0, offset * _WORDS + slot * n, n)
            target.copy_(by_rank[rank].narrow(0, row * n, n), non_blocking=True)


def require_no_capture() -> None:
    """Raise a RuntimeError while the current stream is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "LiveSlots(n_sms=0) reads each batch's plan on the host, which no CUDA graph can "
            "capture: make it with a number of multiprocessors"
        )
