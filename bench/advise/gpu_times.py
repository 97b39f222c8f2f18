"""Measure a rank's expert products on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import torch

from lplb_triton.bench.advise.models import BYTES, MATRICES, Model
from lplb_triton.bench.advise.table import split_rows
from lplb_triton.bench.measure.simulate import draw_experts, run_experts
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.costs.gemm import PAIRS, GemmModel, Point, fit

__all__ = ["RankTimer", "measure", "time_rank"]

# Pause after a measurement, as a multiple of its duration.
REST = 2.0
# Rows of the measurements, up to those of a rank with CALIBRATION_TOKENS.
CALIBRATION_ROWS, CALIBRATION_TOKENS = (256, 1024, 4096, 16384, 65536), 8192
# Work of half a millisecond at 600 TFLOP/s, beside which the start of a graph is negligible.
LONG_FLOPS = 3e11
# Time that the launches of one graph should take, and the most of them.
GRAPH_US, MOST_CALLS = 500.0, 10
# Bytes of other weights between two uses of the same ones, in sizes of the GPU's cache.
CACHES = 2


def measure(
    model: Model,
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
    name: str,
    pairs: int = PAIRS,
) -> tuple[GemmModel, list[Point]]:
    """Time a rank's products on a GPU and fit a model to them.

    Parameters
    ----------
    model
        Sizes.
    weights
        Of all experts of a rank, by `lplb_triton.bench.measure.simulate.draw_experts`.
    timer, device
        Timer of the launches, and the device that they run on.
    name
        Of the device.
    pairs
        Pairs of SMs it has.

    Returns
    -------
    tuple of GemmModel and list of Point
        The model, and what it was fitted to.
    """
    points = [
        Point(model.hidden, model.inner, rows, time_rank(rows, weights, timer, device))
        for total in CALIBRATION_ROWS
        if total <= CALIBRATION_TOKENS * model.top_k
        for rows in split_rows(total, len(weights[0]))
    ]
    return fit(points, f"measured on this {name}", pairs), points


def time_rank(
    rows: Sequence[int],
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
) -> float:
    """Time one rank's products in microseconds, and pause afterwards.

    At its power limit a GPU slows down: without the pause a measurement would affect the next.
    """
    ends = torch.tensor(rows, dtype=torch.int64, device="cpu").cumsum(0).to(torch.int32)
    total = int(ends[-1])
    if total == 0:
        return 0.0
    w_in, w_out = weights
    x = torch.randn(1, w_in.shape[1], dtype=torch.float32, device=device).to(torch.bfloat16)
    x = x.expand(total, -1).contiguous()
    launch = partial(run_experts, x, w_in, w_out, ends.to(device))
    begun = time.perf_counter()
    launch()
    if total * 2 * (w_in[0].numel() + w_out[0].numel()) > LONG_FLOPS:
        took = timer.time_rotation([launch])
    else:
        took = timer.time_call(launch, 100.0)
    time.sleep(REST * (time.perf_counter() - begun))
    return took


class RankTimer:
    """Times ranks of one size of experts, with weights that the GPU's cache doesn't hold.

    In a model the weights of other layers pass through the cache between two batches of a layer.
    So every launch of a graph reads the weights of other experts than the one before.

    Parameters
    ----------
    hidden, inner
        Sizes of an expert.
    slots
        The most experts of a rank.
    timer, device
        Timer of the launches, and the device that they run on.
    """

    def __init__(
        self, hidden: int, inner: int, slots: int, timer: Timer, device: torch.device | str
    ) -> None:
        self._flops_by_row = 2 * MATRICES * hidden * inner
        cached = CACHES * _find_cache_bytes(torch.device(device))
        expert = MATRICES * BYTES * hidden * inner
        self._sets = min(max(math.ceil(cached / expert), 1), MOST_CALLS)
        self._slots, self._timer, self._device = slots, timer, device
        self._w_in, self._w_out = draw_experts(hidden, inner, slots * self._sets, device)
        self._x = torch.zeros(0, hidden, dtype=torch.bfloat16, device=device)

    def __call__(self, rows: Sequence[int], about_us: float | None = None) -> float:
        """Time a rank whose experts have ``rows``, in microseconds; 0 without rows.

        ``about_us`` is an estimate, which decides how many launches a graph has.
        """
        total = sum(rows)
        if total == 0:
            return 0.0
        if total > len(self._x):
            one = torch.randn(1, self._x.shape[1], dtype=torch.float32, device=self._device)
            self._x = one.to(torch.bfloat16).expand(total, -1).contiguous()
        ends = torch.tensor(rows, dtype=torch.int64, device="cpu").cumsum(0).to(torch.int32)
        ends = ends.to(self._device)
        launches = [
            partial(
                run_experts,
                self._x[:total],
                self._w_in[first : first + len(rows)],
                self._w_out[first : first + len(rows)],
                ends,
            )
            for first in range(0, self._slots * self._sets, self._slots)
        ]
        begun = time.perf_counter()
        launches[0]()
        is_long = total * self._flops_by_row > LONG_FLOPS
        took = self._timer.time_rotation(
            launches[:1] if is_long else self._repeat(launches, about_us)
        )
        if is_long:
            time.sleep(REST * (time.perf_counter() - begun))
        return took

    def _repeat(
        self, launches: list[partial[torch.Tensor]], about_us: float | None
    ) -> list[partial[torch.Tensor]]:
        """Repeat the launches, one of each set of weights in turn, until a graph is long enough."""
        wanted = MOST_CALLS if about_us is None else round(GRAPH_US / max(about_us, 1.0))
        calls = min(max(wanted, len(launches)), MOST_CALLS)
        return [launches[i % len(launches)] for i in range(calls)]


def _find_cache_bytes(device: torch.device) -> int:
    """Return the size of a GPU's second-level cache; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
