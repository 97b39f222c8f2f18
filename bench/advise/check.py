"""Compare predictions with measured times."""

from __future__ import annotations

from typing import Any

import torch

from lplb_triton.bench.advise.gpu_times import time_rank
from lplb_triton.bench.advise.models import Model
from lplb_triton.bench.measure.simulate import split_tokens
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.placement import Case, make_by_history
from lplb_triton.costs.gemm import GemmModel

__all__ = ["compare_times"]


def compare_times(
    name: str,
    model: Model,
    gemm: GemmModel,
    case: Case,
    ep: int,
    tokens: int,
    weights: tuple[torch.Tensor, torch.Tensor],
    timer: Timer,
    device: torch.device | str,
) -> dict[str, Any]:
    """Compare a prediction with measured times: EPLB's placement, one slot, one batch, both splits.

    Parameters
    ----------
    name, model
        Name and sizes of the model.
    gemm
        Model of the times.
    case
        Loads.
    ep, tokens
        Ranks, and tokens of each.
    weights
        Weights of all experts of a rank, including the redundant slot.
    timer, device
        Timer of the launches, and the device that they run on.

    Returns
    -------
    dict
        ``model``, ``ep``, ``tokens``; by ``even`` and ``lp``: ``measured_us`` of the slowest rank,
        ``predicted_us``, their relative ``error``, and ``rows`` by expert and ``us`` of all
        ``ranks``.
    """
    placement = make_by_history("eplb", case.history, ep, 1, torch.device("cpu"), None)
    counts = case.test[0].sum(0).double()
    counts = (counts * (tokens * model.top_k * ep / counts.sum())).round().long()
    row: dict[str, Any] = {"model": name, "ep": ep, "tokens": tokens}
    for split, balance in (("even", "even"), ("lp", "lplb")):
        rows = split_tokens(placement, counts, balance, 1e-3)
        ranks = [
            {"rows": rank, "us": time_rank(rank, weights, timer, device)} for rank in rows.tolist()
        ]
        measured = max(rank["us"] for rank in ranks)
        predicted = float(gemm(model.hidden, model.inner, rows.double().numpy()).max())
        row[split] = {
            "measured_us": measured,
            "predicted_us": predicted,
            "error": predicted / measured - 1,
            "ranks": ranks,
        }
    return row
