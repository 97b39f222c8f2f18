"""Sums of the loads that a layer has balanced, on the device."""

from __future__ import annotations

import torch

from lplb_triton._backends.workspace import find_stream

__all__ = ["LoadRecorder"]

# Streams with sums of their own; further ones share the last.
N_STREAMS = 8


class LoadRecorder:
    """Adds the counts of every batch to decayed sums, one row of them for each stream.

    Calls on several streams may overlap, and a sum that two of them change at once would lose one
    of the batches.

    Parameters
    ----------
    n_logical : int
        Number of logical experts.
    device : torch.device
        Where counts are.

    Attributes
    ----------
    recording : bool
        Whether batches are added.
    decay : float
        What a batch multiplies the sum before it by.
    """

    def __init__(self, n_logical: int, device: torch.device) -> None:
        self.recording, self.decay = True, 1.0
        self._device = device
        self._sums = torch.zeros(N_STREAMS, n_logical, dtype=torch.float64, device=device)
        self._rows = list(self._sums.unbind())
        self._numbers: dict[object, int] = {}

    def start(self, decay: float) -> None:
        """Start from zero with a decay."""
        self.recording, self.decay = True, decay
        # The next batch may be captured in a graph, and torch loads its kernel with the first call.
        self.add(torch.zeros(self._sums.shape[1], dtype=torch.int32, device=self._device))
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        self._sums.zero_()

    def read(self) -> torch.Tensor:
        """Return the sums over all streams, ``[n_logical]`` float64."""
        return self._sums.sum(0)

    def write(self, loads: torch.Tensor) -> None:
        """Replace what was recorded."""
        self._sums.zero_()
        self._rows[0].copy_(loads)

    def add(self, counts: torch.Tensor) -> None:
        """Add one batch's counts ``[n_logical]`` int32, in one launch.

        A batch that the backward pass computes again was added by the forward pass.
        """
        if not self.recording or torch._C._current_graph_task_id() != -1:
            return
        stream = find_stream(self._device)
        number = self._numbers.setdefault(stream, min(len(self._numbers), N_STREAMS - 1))
        row = self._rows[number]
        torch.add(counts, row, alpha=self.decay, out=row)
