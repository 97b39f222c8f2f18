"""Predict whether balancing pays for a model, a batch size and a load; nothing here prints.

The time of a layer is the time of the expert products on its slowest rank, which `gemm` models.
All figures are predictions. Routing and attention are left out, and so is communication but for
`advise_network`.
"""

from __future__ import annotations

from lplb_triton.bench.advise.check import compare_times
from lplb_triton.bench.advise.gpu_times import RankTimer, measure, time_rank
from lplb_triton.bench.advise.hf_config import ConfigSizes, read_config
from lplb_triton.bench.advise.live import (
    GIGABYTES_PER_SECOND,
    advise_live,
    count_live_bytes,
    suggest_live_above,
    suggest_live_cost,
)
from lplb_triton.bench.advise.models import MODELS, PUBLISHED, Model, Published
from lplb_triton.bench.advise.network import (
    NETWORK_GIGABYTES_PER_SECOND,
    NODE_GIGABYTES_PER_SECOND,
    Network,
    advise_network,
    choose_network_row,
)
from lplb_triton.bench.advise.objective import TIME_US, advise_objective
from lplb_triton.bench.advise.overhead import predict_overhead_us
from lplb_triton.bench.advise.predict import advise, select_slots
from lplb_triton.bench.advise.table import packaged
from lplb_triton.costs.gemm import GemmModel, Point, fit

__all__ = [
    "GIGABYTES_PER_SECOND",
    "MODELS",
    "NETWORK_GIGABYTES_PER_SECOND",
    "NODE_GIGABYTES_PER_SECOND",
    "PUBLISHED",
    "ConfigSizes",
    "GemmModel",
    "Model",
    "Network",
    "Point",
    "Published",
    "RankTimer",
    "TIME_US",
    "advise",
    "advise_live",
    "advise_network",
    "choose_network_row",
    "advise_objective",
    "compare_times",
    "count_live_bytes",
    "fit",
    "measure",
    "predict_overhead_us",
    "packaged",
    "read_config",
    "select_slots",
    "suggest_live_above",
    "suggest_live_cost",
    "time_rank",
]
