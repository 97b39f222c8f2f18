"""Measure a rank's expert products on a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from lplb_triton.bench.advise.models import Model
from lplb_triton.bench.advise.table import split_rows
from lplb_triton.bench.measure.simulate import run_experts
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.costs.gemm import PAIRS, GemmModel, Point, fit

__all__ = ["measure", "time_rank"]

# Pause after a measurement, as a multiple of its duration.
REST = 2.0
# Rows of the measurements, up to those of a rank with CALIBRATION_TOKENS.
CALIBRATION_ROWS, CALIBRATION_TOKENS = (256, 1024, 4096, 16384, 65536), 8192


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
    # The start of a graph is negligible beside work of half a millisecond (at 600 TFLOP/s).
    if total * 2 * (w_in[0].numel() + w_out[0].numel()) > 3e11:
        took = timer.time_rotation([launch])
    else:
        took = timer.time_call(launch, 100.0)
    time.sleep(REST * (time.perf_counter() - begun))
    return took
