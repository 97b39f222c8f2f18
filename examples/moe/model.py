"""A decoder-only language model with a mixture of experts in every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.experts import Collect, Dispatch, count_assignments, expert_outputs, wide
from moe.settings import Config


class MoE(nn.Module):
    """Mixture-of-experts feed-forward block with a bias-balanced top-k router.

    Parameters
    ----------
    config
        Settings.
    grouped
        Passed on to `expert_outputs`.
    """

    def __init__(self, config: Config, grouped: bool) -> None:
        super().__init__()
        self.config = config
        self.grouped = grouped
        experts, hidden, inner = config.experts, config.hidden, config.expert_hidden
        self.router = nn.Parameter(torch.randn(experts, hidden) * hidden**-0.5)
        self.w_in = nn.Parameter(torch.randn(experts, hidden, 2 * inner) * hidden**-0.5)
        scale = (2 * config.layers * inner) ** -0.5
        self.w_out = nn.Parameter(torch.randn(experts, inner, hidden) * scale)
        self.register_buffer("bias", torch.zeros(experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of every token.

        Parameters
        ----------
        x
            [tokens, hidden].

        Returns
        -------
        ids : Tensor
            int64 [tokens, top_k], distinct in each row.
        weights : Tensor
            float32 [tokens, top_k], each row sums to 1.
        scores : Tensor
            float32 [tokens, experts], scores of all experts, each row scaled to sum 1.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = wide(x) @ self.router.t()
            if self.config.router == "sigmoid":
                scores = logits.sigmoid()
            else:
                scores = logits.softmax(-1)
            with torch.no_grad():
                ids = (scores + self.bias).topk(self.config.top_k, dim=-1).indices
            weights = scores.gather(1, ids)
            weights = weights / weights.sum(-1, keepdim=True)
            scores = scores / scores.sum(-1, keepdim=True)
        return ids, weights, scores

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the block.

        Parameters
        ----------
        x
            [tokens, hidden], in order of the source ranks.

        Returns
        -------
        y : Tensor
            [tokens, hidden].
        counts : Tensor
            int32 [sources, experts], assignments per source rank and expert.
        aux : Tensor
            Scalar; 1 when load and scores are even, more when both favour the same experts.
        """
        config = self.config
        tokens = x.shape[0]
        ids, weights, scores = self.route(x)
        counts = count_assignments(ids, config.sources, config.experts)
        load = counts.sum(0)

        order = ids.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=x.device)
        rows = Dispatch.apply(x, order, inverse, config.top_k)
        ends = load.cumsum(0).to(torch.int32)
        y = expert_outputs(rows, self.w_in, self.w_out, ends, self.grouped)
        y = Collect.apply(y, order, inverse).view(tokens, config.top_k, -1)
        y = (wide(y) * weights[..., None]).sum(1).to(x.dtype)
        aux = (load * scores.mean(0)).sum() * (config.experts / (tokens * config.top_k))
        return y, counts, aux

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float) -> None:
        """Move the selection bias by ``rate`` towards an even load.

        Parameters
        ----------
        load
            [experts], assignments in the last batch.
        rate
            Step of the bias, in units of the scores.
        """
        load = load.float()
        self.bias += rate * (load.mean() - load).sign()


class Block(nn.Module):
    """Pre-norm causal attention, then a pre-norm mixture of experts.

    Parameters
    ----------
    config
        Settings.
    make_experts
        Makes the mixture: it takes [tokens, hidden] and returns what `MoE.forward` does.
    """

    def __init__(self, config: Config, make_experts: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.heads = config.hidden // math.gcd(config.hidden, 64)
        self.norm_attention = nn.LayerNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)
        self.norm_experts = nn.LayerNorm(config.hidden)
        # Made last, since all weights are drawn from one generator in this order.
        self.experts = make_experts()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the block to [sequences, seq_len, hidden]; see `MoE.forward` for the rest."""
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, hidden))
        y, counts, aux = self.experts(self.norm_experts(x).view(-1, hidden))
        return x + y.view_as(x), counts, aux


class MoELanguageModel(nn.Module):
    """Decoder-only language model with a mixture of experts in every layer.

    Parameters
    ----------
    config
        Settings.
    make_experts
        Makes the mixture of each layer from its number.
    """

    def __init__(self, config: Config, make_experts: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab, config.hidden)
        self.position = nn.Parameter(torch.randn(config.seq_len, config.hidden) * 0.02)
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(config, partial(make_experts, layer)) for layer in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the next token at every position.

        Parameters
        ----------
        tokens
            int64 [sequences, seq_len], in order of the source ranks.

        Returns
        -------
        logits : Tensor
            [sequences, seq_len, vocab].
        counts : Tensor
            int32 [layers, sources, experts].
        aux : Tensor
            Scalar, mean over the layers of `MoE`'s.
        """
        x = self.token(tokens) + self.position
        counts, aux = [], []
        for block in self.blocks:
            x, block_counts, block_aux = block(x)
            counts.append(block_counts)
            aux.append(block_aux)
        logits = functional.linear(self.norm(x), self.token.weight)
        return logits, torch.stack(counts), torch.stack(aux).mean()


def make_optimizer(
    weights: Iterable[nn.Parameter], config: Config, device: torch.device
) -> torch.optim.Optimizer:
    weights = list(weights)
    decayed = [weight for weight in weights if weight.ndim >= 2]
    others = [weight for weight in weights if weight.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, config.lr, (0.9, 0.95), weight_decay=0.1, fused=fused)


def compute_learning_rate(config: Config, step: int) -> float:
    """Return the rate of a linear warm-up, then of a cosine decay to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def pick_device(name: str) -> torch.device:
    """Resolve ``auto`` and check that the device can be used.

    Parameters
    ----------
    name
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns
    -------
    torch.device
        The device.

    Raises
    ------
    ValueError
        If it is neither a CPU nor a usable GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must exist, got {name!r} where torch sees {torch.cuda.device_count()} GPUs"
        )
    return device
