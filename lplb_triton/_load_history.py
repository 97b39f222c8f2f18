"""The loads of experts that a balancer has seen, for placements."""

from __future__ import annotations

import torch

from lplb_triton._backends.layer import Layer
from lplb_triton._backends.recorder import LoadRecorder
from lplb_triton._checks import check_flag, check_number
from lplb_triton._torch_op import opaque

__all__ = ["LoadHistory"]


class LoadHistory:
    """The part of `Balancer` that records loads where that is asked for."""

    _layer: Layer

    @opaque
    def record_loads(self, recording: bool = True, *, decay: float = 1.0) -> None:
        """Start to add up the loads of what `run` balances, from zero; or stop.

        From then on a call of `run` has one more small launch. A CUDA graph records if recording
        was on while it was captured, with the decay of that time.

        Parameters
        ----------
        recording : bool
            Whether to record from the next call on. Without it, what was recorded stays.
        decay : float
            What every further batch multiplies the loads before it by, above 0 and at most 1. The
            default adds up; 0.99 weighs the latest 100 batches or so.

        Raises
        ------
        TypeError, ValueError
            Naming the argument.
        """
        recording = check_flag("recording", recording)
        decay = check_number("decay", decay, 1.0)
        if not decay:
            raise ValueError("decay must be above 0, got 0")
        layer = self._layer
        if layer.recorder is None:
            if not recording:
                return
            # It is kept for good: graphs that were captured meanwhile write to its memory.
            layer.recorder = LoadRecorder(layer.placement.n_logical, layer.device)
        if recording:
            layer.recorder.start(decay)
        else:
            layer.recorder.recording = False

    @opaque
    def load_history(self, *, reset: bool = False) -> torch.Tensor:
        """Return the loads that were recorded; waits for nothing, and isn't collective.

        It is what `lplb_triton.chain`, `lplb_triton.place`, `Placement.from_history` and the
        integrations take. Batches that activation checkpointing computes again count once.

        Parameters
        ----------
        reset : bool
            Whether to start anew from zero.

        Returns
        -------
        torch.Tensor
            ``[n_logical]`` float64 on the device, fresh: choices of each logical expert over the
            whole group (of what this process gave, without a group), decayed. It is the same on
            all ranks if all started, and reset, before the same batch. Calls on other streams are
            in it as far as the current stream has waited for them. All are 0 where no batch came
            since `record_loads` or the last reset: a placement made from that is one for equal
            loads, so look at ``loads.any()`` first, which waits for the device.

        Raises
        ------
        RuntimeError
            If nothing was ever recorded: see `record_loads`.
        """
        reset = check_flag("reset", reset)
        recorder = self._layer.recorder
        if recorder is None:
            raise RuntimeError("no loads are recorded: call record_loads first")
        loads = recorder.read()
        if reset:
            recorder.reset()
        return loads
