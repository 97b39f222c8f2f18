"""Sizes of the sections, and the job that each process of a section gets."""

from __future__ import annotations

from dataclasses import dataclass

from lplb_triton.bench.ep.layer.sizes import LAYER_SIZES, LayerSizes
from lplb_triton.bench.types import Row

__all__ = ["KINDS", "N_COUNTS", "PER_GRAPH", "SIZES", "TIMEOUT", "Job", "Sizes"]

# Logical experts of every section but the training.
N_COUNTS = 256
# Exchanges in one CUDA graph.
PER_GRAPH = 100
# Time limit of the exchange and of NCCL, in seconds.
TIMEOUT = 60.0
KINDS = ("symmetric", "nvshmem", "distributed", "hierarchical")


@dataclass(frozen=True)
class Sizes:
    """How much every section does.

    Attributes
    ----------
    epochs : int
        Sums to verify, eagerly and again under graph replay.
    tokens : int
        Tokens per rank in a batch of the whole run, each with eight experts of 256.
    replays : int
        Timed replays of each graph; the first tenth is left out.
    training : dict
        Settings of examples/train_moe_ep.py.
    router_bias : float
        Its router's preference for experts with low numbers, for skewed routing.
    parity : float
        Difference of two loss curves (root of the mean square over the steps) that is always
        allowed.
    noise : float
        Factor on the difference that another order of sums makes, which is allowed too: a
        rounding error can route a token to another expert, after which the curves diverge.
    layer : LayerSizes
        Of the section ``live``.
    """

    epochs: int
    tokens: int
    replays: int
    training: Row
    router_bias: float
    parity: float
    noise: float = 3.0
    layer: LayerSizes = LAYER_SIZES["cuda"]


SIZES = {
    "cuda": Sizes(
        epochs=100_000,
        tokens=4096,
        replays=200,
        training={
            "experts": 256, "top_k": 8, "layers": 2, "hidden": 2048, "expert_hidden": 768,
            "vocab": 4096, "seq_len": 512, "tokens": 8192, "redundant": 4, "dtype": "bfloat16",
            "steps": 100, "skip": 40, "replace_every": 20, "log_every": 20,
            "text_bytes": 4_000_000, "transport": "torch", "lr": 3e-4,
        },
        router_bias=0.25,
        parity=0.01,
    ),
    "cpu": Sizes(
        epochs=500,
        tokens=64,
        replays=3,
        training={
            "experts": 16, "top_k": 2, "layers": 1, "hidden": 32, "expert_hidden": 16,
            "vocab": 512, "seq_len": 32, "tokens": 64, "redundant": 1, "dtype": "float64",
            "steps": 12, "skip": 4, "replace_every": 4, "log_every": 12,
            "text_bytes": 200_000, "transport": "torch",
        },
        router_bias=0.4,
        parity=1e-8,
        layer=LAYER_SIZES["cpu"],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Job of each process of a section: its name, back end or routing, and how much to do."""

    section: str
    variant: str
    ranks: int
    device: str
    sizes: Sizes
    folder: str
