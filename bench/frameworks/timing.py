"""Times of steps and of MoE layers, forward and backward, by events of the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lplb_triton.bench.measure.timer import make_event

__all__ = ["LayerTimer", "Mark"]


class Mark:
    """A point in time: on a GPU when the work before it is done, on a CPU when it is made."""

    def __init__(self, on_gpu: bool) -> None:
        self._event = make_event() if on_gpu else None
        self._seconds = 0.0
        if self._event is not None:
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def measure_ms(self, later: Mark) -> float:
        """Return the milliseconds from here to a later mark; the device has reached both."""
        if self._event is None or later._event is None:
            return 1e3 * (later._seconds - self._seconds)
        return float(self._event.elapsed_time(later._event))


class _Passing(torch.autograd.Function):
    """The identity, which notes when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, marks: dict[str, Mark], name: str) -> torch.Tensor:
        ctx.marks, ctx.name = marks, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.marks[ctx.name] = Mark(grad.is_cuda)
        return grad, None, None


class LayerTimer:
    """Times the forward and the backward passes of some layers.

    Parameters
    ----------
    layers
        Their first argument, by position, and their output, or its first part, are hidden states
        that need gradients.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._spans: list[dict[str, Mark]] = []
        for layer in layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled():
            return None
        marks = {"forward": Mark(args[0].is_cuda)}
        self._spans.append(marks)
        return (_Passing.apply(args[0], marks, "backward done"), *args[1:])  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        hidden, *others = output if isinstance(output, tuple) else (output,)
        marks = self._spans[-1]
        marks["forward done"] = Mark(hidden.is_cuda)
        hidden = _Passing.apply(hidden, marks, "backward")  # type: ignore[no-untyped-call]
        return (hidden, *others) if isinstance(output, tuple) else hidden

    def read_ms(self) -> float:
        """Return the milliseconds of all layers since the last call; the device is done."""
        total = sum(
            marks[name].measure_ms(marks[f"{name} done"])
            for marks in self._spans
            for name in ("forward", "backward")
        )
        self._spans.clear()
        return total
