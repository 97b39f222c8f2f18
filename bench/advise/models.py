"""Sizes of mixture-of-experts layers, of published models among them."""

from __future__ import annotations

from typing import NamedTuple

from lplb_triton.costs.gemm import BYTES

__all__ = ["BYTES", "MATRICES", "MODELS", "PUBLISHED", "Model", "Published"]

# Matrices of an expert: they take 6 * hidden * inner bytes.
MATRICES = 3


class Model(NamedTuple):
    """Sizes of a mixture-of-experts layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


class Published(NamedTuple):
    """A published model."""

    sizes: Model
    layers: int
    """Layers that have routed experts, without those that predict further tokens."""
    repository: str
    """Where its ``config.json`` is, on huggingface.co."""


PUBLISHED = {
    "deepseek-v3": Published(Model(7168, 2048, 256, 8), 58, "deepseek-ai/DeepSeek-V3"),
    "kimi-k2": Published(Model(7168, 2048, 384, 8), 60, "moonshotai/Kimi-K2-Instruct"),
    "glm-4.5": Published(Model(5120, 1536, 160, 8), 89, "zai-org/GLM-4.5"),
    "minimax-m2": Published(Model(3072, 1536, 256, 8), 62, "MiniMaxAI/MiniMax-M2"),
    "qwen3-235b-a22b": Published(Model(4096, 1536, 128, 8), 94, "Qwen/Qwen3-235B-A22B"),
    "qwen3-next-80b-a3b": Published(
        Model(2048, 512, 512, 10), 48, "Qwen/Qwen3-Next-80B-A3B-Instruct"
    ),
    "gpt-oss-120b": Published(Model(2880, 2880, 128, 4), 36, "openai/gpt-oss-120b"),
    "llama-4-maverick": Published(
        Model(5120, 8192, 128, 1), 24, "meta-llama/Llama-4-Maverick-17B-128E-Instruct"
    ),
    "mixtral-8x7b": Published(Model(4096, 14336, 8, 2), 32, "mistralai/Mixtral-8x7B-v0.1"),
    "olmoe-1b-7b": Published(Model(2048, 1024, 64, 8), 16, "allenai/OLMoE-1B-7B-0924"),
}
MODELS = {name: published.sizes for name, published in PUBLISHED.items()}
