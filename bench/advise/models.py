"""Sizes of mixture-of-experts layers, of published models among them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BYTES", "LAYERS", "MATRICES", "MODELS", "UNCHECKED", "Model"]

# Bytes of a weight, and of an expert's three matrices: 6 * hidden * inner.
BYTES, MATRICES = 2, 3


class Model(NamedTuple):
    """Sizes of a mixture-of-experts layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


# As in the models' published configurations (config.json of each).
MODELS = {
    "deepseek-v3": Model(7168, 2048, 256, 8),
    "qwen3-235b-a22b": Model(4096, 1536, 128, 8),
    "mixtral-8x7b": Model(4096, 14336, 8, 2),
    "gpt-oss-120b": Model(2880, 2880, 128, 4),
}
# Those whose predictions aren't held against measured times.
UNCHECKED = ("gpt-oss-120b",)
# MoE layers, from the same configurations; the first three of DeepSeek-V3's 61 layers are dense.
LAYERS = {"deepseek-v3": 58, "qwen3-235b-a22b": 94, "mixtral-8x7b": 32, "gpt-oss-120b": 36}
