"""Sizes of the models and of the run, by kind of device."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FRAMEWORKS", "METHODS", "ROUTINGS", "SIZES", "Sizes"]

FRAMEWORKS = ("megatron", "transformers")
METHODS = ("none", "even", "lp")
ROUTINGS = ("balanced", "skewed")


@dataclass(frozen=True)
class Sizes:
    """Model and run.

    Attributes
    ----------
    hidden, expert_hidden : int
        Widths of the model and of an expert.
    experts, top_k : int
        Experts of a layer on all ranks together, and how many of them a token chooses.
    layers : int
        MoE layers.
    tokens : int
        Tokens of a batch on each rank.
    redundant : int
        Redundant slots per rank and layer.
    steps, warm_up : int
        Steps that are timed, and steps before them, of each method.
    vocab : int
        Different tokens, where the model has an embedding.
    learning_rate : float
        Of Adam.
    parity : float
        Difference of two loss curves (root of the mean square over the steps) that is allowed.
    """

    hidden: int
    experts: int
    expert_hidden: int
    top_k: int
    layers: int
    tokens: int
    redundant: int
    steps: int
    warm_up: int
    vocab: int
    learning_rate: float
    parity: float


SIZES = {
    "cuda": Sizes(
        hidden=2048, experts=64, expert_hidden=1408, top_k=8, layers=2, tokens=8192, redundant=2,
        steps=20, warm_up=8, vocab=4096, learning_rate=1e-4, parity=0.01,
    ),
    "cpu": Sizes(
        hidden=32, experts=8, expert_hidden=16, top_k=2, layers=2, tokens=64, redundant=1,
        steps=4, warm_up=4, vocab=256, learning_rate=1e-3, parity=1e-4,
    ),
}  # fmt: skip
