"""Predict whether balancing pays for a model, a batch size and a load; no printing.

The time of a layer is that of the expert products of its slowest rank, which `gemm` models.
Everything made from it is a prediction. Communication, routing and attention are left out.
"""

from __future__ import annotations

from lplb_triton.bench.advise.check import check_row
from lplb_triton.bench.advise.gemm import GemmModel, Point, fit
from lplb_triton.bench.advise.gpu_times import measure
from lplb_triton.bench.advise.models import MODELS, Model
from lplb_triton.bench.advise.overhead import overhead_us
from lplb_triton.bench.advise.predict import advise, possible_slots
from lplb_triton.bench.advise.table import packaged

__all__ = [
    "MODELS",
    "GemmModel",
    "Model",
    "Point",
    "advise",
    "check_row",
    "fit",
    "measure",
    "overhead_us",
    "packaged",
    "possible_slots",
]
