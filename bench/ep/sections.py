"""Name the sections, and say where each of them can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from lplb_triton.bench.ep import train
from lplb_triton.bench.ep.exchange import time_exchange
from lplb_triton.bench.ep.kill import kill_one
from lplb_triton.bench.ep.layer.run import measure_layer
from lplb_triton.bench.ep.pipeline import time_pipeline
from lplb_triton.bench.ep.sizes import KINDS
from lplb_triton.bench.ep.verify import verify_sync
from lplb_triton.bench.ep.weights import measure_weights
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.types import Row

__all__ = ["SECTIONS", "Section", "reason_to_skip"]


@dataclass(frozen=True)
class Section:
    """One section of ``lplb-bench ep``.

    Attributes
    ----------
    work
        Function that runs on every rank, for one variant, and returns the figures.
    variants
        Back ends, routings, or redundant slots per rank.
    seconds
        Limit for each variant.
    """

    work: Callable[[Worker, str], Row]
    variants: tuple[str, ...]
    seconds: float


SECTIONS = {
    "verify": Section(verify_sync, KINDS, 150.0),
    "time": Section(time_exchange, KINDS, 90.0),
    "pipeline": Section(time_pipeline, KINDS, 150.0),
    "kill": Section(kill_one, KINDS, 60.0),
    "weights": Section(measure_weights, ("1", "2"), 90.0),
    "live": Section(measure_layer, ("layer",), 420.0),
    "train": Section(train.train, ("skewed", "learned", "even"), 150.0),
}


def reason_to_skip(section: str, variant: str, ranks: int, device: str) -> str | None:
    """Say why a section can't run here, or return None."""
    if section in ("train", "live"):
        if (train.EXAMPLES / "train_moe_ep.py").is_file():
            return None
        return "needs the examples folder of a checkout, which an installed package lacks"
    if section == "weights":
        return None
    if device == "cpu" and variant != "distributed":
        return "needs GPUs"
    if variant == "nvshmem" and importlib.util.find_spec("nvshmem") is None:
        return "nvshmem4py is not installed"
    if variant == "hierarchical" and (ranks < 4 or ranks % 2):
        return "needs two domains of several ranks"
    if section == "kill" and device == "cuda" and variant in ("distributed", "hierarchical"):
        return "NCCL itself decides what becomes of a dead rank"
    return None
