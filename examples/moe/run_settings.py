"""Settings of expert-parallel runs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from moe.parallel import BALANCES
from moe.settings import HELP as MODEL_HELP
from moe.settings import Config

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Settings:
    """Settings of the runs; the command line has an option for each.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    balance: str = "lplb"
    processes: int = 0
    device: str = "auto"
    steps: int = 200
    stop_at: int = 0
    experts: int = 64
    top_k: int = 4
    layers: int = 2
    hidden: int = 256
    expert_hidden: int = 128
    vocab: int = 2048
    seq_len: int = 128
    tokens: int = 1024
    microbatches: int = 1
    streams: int = 0
    redundant: int = 1
    replace_every: int = 50
    router: str = "sigmoid"
    router_bias: float = 0.0
    bias_rate: float = 0.0
    even_routing: bool = False
    dtype: str = "auto"
    transport: str = "auto"
    recompute: bool = False
    reverse_sums: bool = False
    lr: float = 1e-3
    warmup: int = 20
    seed: int = 0
    text: str | None = None
    text_bytes: int = 16_000_000
    log_every: int = 10
    skip: int = 10
    checkpoint: str | None = None
    checkpoint_every: int = 100
    resume: str | None = None
    record: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        """Check the settings that `moe.settings.Config` does not check."""
        unknown = set(self.runs) - set(BALANCES)
        if unknown:
            raise ValueError(f"balance must name {BALANCES}, got {unknown}")
        for name in ("microbatches", "replace_every", "checkpoint_every", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("processes", "streams", "redundant", "skip", "stop_at"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype must be auto or one of {[*DTYPES]}, got {self.dtype!r}")
        if self.transport not in ("auto", "torch", "deep_ep"):
            raise ValueError(f"transport must be auto, torch or deep_ep, got {self.transport!r}")
        if (self.checkpoint or self.resume or self.record) and len(self.runs) > 1:
            raise ValueError("balance must name one run to record, save or resume a checkpoint")
        if self.record and self.recompute:
            raise ValueError("record can't go with recompute: every batch would count twice")

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        return self.balance.split(",")

    def model(self, ranks: int) -> Config:
        """Return the settings of the model and its text for a number of ranks."""
        streams = self.streams or ranks
        if streams % ranks or self.experts % ranks:
            raise ValueError(
                f"streams ({streams}) and experts ({self.experts}) must be multiples of the "
                f"{ranks} ranks"
            )
        shared = {option.name for option in fields(Config)} & {f.name for f in fields(self)}
        return Config(
            **{name: getattr(self, name) for name in shared},
            sources=streams,
            tokens_per_source=self.microbatches * self.tokens * ranks // streams,
        )


HELP = {name: text for name, text in MODEL_HELP.items() if name != "sources"} | {
    "balance": "none, eplb, lplb or live, or several of them separated by commas",
    "stop_at": "leave off after this step, to be resumed; 0: go on to the last",
    "processes": "start so many gloo processes here; 0: this process is one rank (torchrun)",
    "tokens": "tokens of each rank in each microbatch",
    "microbatches": "microbatches whose gradients are added up in each step",
    "streams": "streams of text in all, which fixes the batches for any number of ranks; 0: ranks",
    "redundant": "redundant slots of each rank, for eplb, lplb and live (besides its live slot)",
    "replace_every": "steps between new placements",
    "router_bias": "constant preference of the router for experts with low numbers",
    "even_routing": "ignore the router: every expert gets the same number of tokens",
    "dtype": "of the products: bfloat16, float32, float64, or auto: bfloat16 on a GPU",
    "transport": "torch, deep_ep, or auto: deep_ep where it is installed and the dtype is bfloat16",
    "recompute": "recompute each block in the backward pass (activation checkpointing)",
    "reverse_sums": "sum gradients over tokens in the opposite order",
    "skip": "steps left out of the times",
    "checkpoint": "folder for checkpoints",
    "checkpoint_every": "steps between checkpoints",
    "resume": "folder of a checkpoint to go on from",
    "record": "write the expert loads of every batch to this .npz, one file per rank",
    "out": "folder for train.json and curves.png",
}
