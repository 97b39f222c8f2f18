"""Measure the times of steps and of the MoE layers in them."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor


class Timer:
    """Measure the times of steps and of the MoE layers in them, forward and backward.

    CUDA events take the time on a GPU, so that the host does not wait; on a CPU the clock does.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: dict[str, list[Any]] = {"step": []}
        self.layer_steps: list[tuple[int, int]] = []

    def mark(self, name: str) -> None:
        """Note the time."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.setdefault(name, []).append(event)

    def stamp(self, x: Tensor, begins: bool) -> Tensor:
        """Return ``x``, and note the time when the forward and the backward pass reach it."""
        return _Stamp.apply(x, self, begins)

    def end_step(self) -> None:
        """Note the end of a step."""
        self.mark("step")
        lengths = [len(self.marks.get(name, ())) for name in ("forward", "backward")]
        self.layer_steps.append((lengths[0], lengths[1]))

    def read_milliseconds(self) -> tuple[list[float], list[float]]:
        """Return the time of each step, and of all MoE layers in each step."""
        if self.cuda:
            torch.cuda.synchronize()

        def between(a: Any, b: Any) -> float:
            return a.elapsed_time(b) if self.cuda else 1e3 * (b - a)

        steps = [between(a, b) for a, b in itertools.pairwise(self.marks["step"])]
        layers, before = [], (0, 0)
        for after in self.layer_steps:
            total = 0.0
            for name, first, last in zip(("forward", "backward"), before, after, strict=True):
                marks = self.marks.get(name, [])[first:last]
                total += sum(between(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True))
            layers.append(total)
            before = after
        return steps, layers


class _Stamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, timer: Timer, begins: bool) -> Tensor:
        ctx.timer = timer
        timer.mark("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.timer.mark("backward")
        return grad, None, None
