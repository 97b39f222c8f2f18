r"""Train a small mixture-of-experts language model on one device and record its expert loads.

The batch of every step is divided among simulated source ranks (``--sources``). Each has its own
part of the text, file by file, as the ranks of data-parallel training do, so the experts that are
hot differ from rank to rank and from batch to batch. The routing decisions of the training steps
themselves are counted per step, layer, source rank and logical expert; stretches of early and of
late training are saved with `lplb_triton.traces.trace`.

The packaged trace, ``bench/data/moe256.npz``, was made on one H100 with::

    python examples/train_moe.py --device cuda --steps 1400 --expert-hidden 128 --lr 3e-4 \
        --bias-rate 3e-5 --tokens-per-source 32 --seq-len 32 --log-every 50 --record-from 300 \
        --record-early 100 --record-late 100 --record bench/data/moe256.npz

that is 256 experts in each of 4 layers, top-8, 32 source ranks with 32 tokens each, and steps 300
to 399 and the last 100 of 1400 recorded (1.75 MB). In the first steps routing moves faster than any
placement from history can follow; from about step 300 on recent loads predict the next ones. The
small bias rate leaves a skew that lasts, as a light balancing rule does in practice. The defaults
(128 tokens per source, 50 + 50 batches) make a file of about the same size. Whole batches are
always recorded, never a part of one.

The text is the source code of Python's own standard library, or ``--text PATH``. The model is a
pre-norm decoder with causal attention; each layer's feed-forward block is a mixture of SwiGLU
experts. The router scores every expert (sigmoid or softmax, in float32), adds a bias per expert to
choose the top-k, and weighs their outputs by the scores without the bias. After every step the
bias of each expert moves by ``--bias-rate`` towards an even load.

A small run on a CPU::

    python examples/train_moe.py --device cpu --experts 16 --top-k 2 --layers 2 --sources 4 \
        --hidden 64 --expert-hidden 64 --seq-len 64 --tokens-per-source 64 --steps 100
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import math
import os
import platform
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lplb_triton.traces import trace as traces

# Ranks over which the progress lines lay out the experts to show an imbalance.
SHOWN_RANKS = 32
# Runs of letters, a line break with the indentation after it, runs of spaces, or one byte.
_PIECE = re.compile(rb"[A-Za-z]+|\n *| +|.", re.DOTALL)
_BYTES = 256
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Config:
    """Settings of one run; the command line has an option for each.

    Raises
    ------
    ValueError
        If a setting is out of range or two of them don't fit together.
    """

    steps: int = 3000
    device: str = "auto"
    experts: int = 256
    top_k: int = 8
    layers: int = 4
    hidden: int = 512
    expert_hidden: int = 256
    vocab: int = 4096
    sources: int = 32
    tokens_per_source: int = 128
    seq_len: int = 128
    router: str = "sigmoid"
    bias_rate: float = 1e-3
    aux_loss: float = 0.0
    expert_matmul: str = "auto"
    lr: float = 1e-3
    warmup: int = 100
    seed: int = 0
    time_limit: float = math.inf
    log_every: int = 50
    text: str | None = None
    text_bytes: int = 16_000_000
    record: str | None = None
    record_early: int = 50
    record_late: int = 50
    record_every: int = 1
    record_from: int = 0

    def __post_init__(self) -> None:
        """Check the settings before anything expensive starts."""
        positive = (
            "steps experts top_k layers hidden expert_hidden sources tokens_per_source seq_len "
            "log_every text_bytes record_every"
        )
        for name in positive.split():
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("warmup", "record_early", "record_late", "record_from", "seed"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("bias_rate", "aux_loss"):
            value = getattr(self, name)
            self._require(0 <= value < math.inf, name, "finite and at least 0")
        self._require(0 < self.lr < math.inf, "lr", "finite and above 0")
        self._require(self.time_limit > 0, "time_limit", "above 0 seconds")
        self._require(self.top_k <= self.experts, "top_k", f"at most experts ({self.experts})")
        # Rows of 16 bytes in bfloat16, which the grouped matrix product asks for.
        self._require(self.hidden % 8 == 0, "hidden", "a multiple of 8")
        self._require(self.expert_hidden % 8 == 0, "expert_hidden", "a multiple of 8")
        self._require(_BYTES <= self.vocab <= 65536, "vocab", f"from {_BYTES} to 65536")
        self._require(
            self.tokens_per_source % self.seq_len == 0,
            "tokens_per_source",
            f"a multiple of seq_len ({self.seq_len})",
        )
        self._require(self.router in ("sigmoid", "softmax"), "router", "sigmoid or softmax")
        self._require(
            self.expert_matmul in ("auto", "grouped", "loop"),
            "expert_matmul",
            "auto, grouped or loop",
        )
        if self.record is not None:
            self._require(self.record.endswith(".npz"), "record", "a path ending in .npz")
            self._require(
                Path(self.record).parent.is_dir(), "record", "a path in an existing folder"
            )
            self._require(
                self.record_early + self.record_late >= 1,
                "record_early",
                "at least 1 unless record_late is",
            )
            self._require(
                self.record_from < self.steps, "record_from", f"below steps ({self.steps})"
            )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, one stretch per source rank.

    Parameters
    ----------
    tokens
        int64 [total tokens], the ranks' streams one after the other.
    starts, lengths
        int64 [sources], where each rank's stream begins in ``tokens`` and how long it is.
    digest
        SHA-256 of the text that was tokenised, as hexadecimal digits.
    size
        Bytes of that text.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    digest: str
    size: int


@dataclass(frozen=True)
class Result:
    """Outcome of `train`.

    Parameters
    ----------
    losses
        float32 [steps done] on the CPU: cross entropy of each step in nats per token.
    imbalance
        float32 [steps done] on the CPU: largest over mean rank load, mean over the layers, with
        the experts laid out contiguously over the ranks.
    bias
        float32 [layers, experts] on the CPU: the final selection bias.
    trace
        The recorded batches, or None if ``record`` was not set.
    """

    losses: Tensor
    imbalance: Tensor
    bias: Tensor
    trace: traces.Trace | None


def read_documents(text: str | None, limit: int, seed: int) -> list[bytes]:
    """Collect the files to train on, in an order that depends on ``seed`` only.

    Parameters
    ----------
    text
        A file, a folder (every file below it), or None for the standard library's sources.
    limit
        Stop after this many bytes.
    seed
        Seed of the shuffle.

    Returns
    -------
    list of bytes
        Contents of the files; the last one is cut where ``limit`` is reached.

    Raises
    ------
    FileNotFoundError
        If ``text`` names nothing that exists, or the standard library's sources are not installed.
    """
    if text is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        # Installed packages live below the standard library's folder but are not part of it.
        paths = [
            path
            for path in root.rglob("*.py")
            if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
        ]
        if not paths:
            raise FileNotFoundError("text: the standard library's sources are missing; name a file")
    else:
        root = Path(text)
        if not root.exists():
            raise FileNotFoundError(f"text: no such file or folder: {text!r}")
        paths = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    random.Random(seed).shuffle(paths)
    documents: list[bytes] = []
    for path in paths:
        content = path.read_bytes()[:limit]
        limit -= len(content)
        if content:
            documents.append(content)
        if limit == 0:
            break
    return documents


def build_corpus(config: Config) -> Corpus:
    """Read, tokenise and share out the text.

    The vocabulary has the 256 bytes and the most frequent longer pieces (words, indentation); a
    piece outside it is spelt in bytes. Whole files go to the source rank that has least so far;
    only files that are too long for an even division are cut.

    Parameters
    ----------
    config
        Settings; those for text, vocabulary, sources and seed are used.

    Returns
    -------
    Corpus
        On the CPU.

    Raises
    ------
    FileNotFoundError
        See `read_documents`.
    ValueError
        If there is too little text for the source ranks.
    """
    documents = read_documents(config.text, config.text_bytes, config.seed)
    size = sum(map(len, documents))
    digest = hashlib.sha256(b"".join(documents)).hexdigest()

    frequency: Counter[bytes] = Counter()
    for document in documents:
        frequency.update(_PIECE.findall(document))
    longer = sorted(
        (piece for piece in frequency if len(piece) > 1),
        key=lambda piece: (-frequency[piece], piece),
    )
    known = {bytes([value]): [value] for value in range(_BYTES)}
    for index, piece in enumerate(longer[: config.vocab - _BYTES]):
        known[piece] = [_BYTES + index]

    encoded = []
    for document in documents:
        ids: list[int] = []
        for piece in _PIECE.findall(document):
            ids.extend(known.get(piece) or piece)
        encoded.append(np.array(ids, dtype=np.int64))

    total = sum(map(len, encoded))
    longest = max(config.seq_len + 1, total // (4 * config.sources))
    streams: list[list[np.ndarray]] = [[] for _ in range(config.sources)]
    lengths = [0] * config.sources
    for ids_of_document in encoded:
        for begin in range(0, len(ids_of_document), longest):
            part = ids_of_document[begin : begin + longest]
            rank = lengths.index(min(lengths))
            streams[rank].append(part)
            lengths[rank] += len(part)
    if min(lengths) < config.seq_len + 1:
        raise ValueError(
            f"text must give each of the {config.sources} sources at least seq_len + 1 = "
            f"{config.seq_len + 1} tokens, got {total} tokens in all"
        )
    joined = np.concatenate([part for stream in streams for part in stream])
    ends = np.cumsum(lengths)
    return Corpus(
        tokens=torch.from_numpy(joined),
        starts=torch.from_numpy(ends - np.array(lengths)),
        lengths=torch.tensor(lengths),
        digest=digest,
        size=size,
    )


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draw_begins(config: Config, corpus: Corpus) -> Tensor:
    """Draw where every sequence of the run begins.

    On the CPU, so that every device sees the same batches.

    Parameters
    ----------
    config
        Settings.
    corpus
        The text.

    Returns
    -------
    Tensor
        int64 [steps, sources, sequences of a source in a batch], positions in ``corpus.tokens``.
    """
    sequences = config.tokens_per_source // config.seq_len
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.rand(
        (config.steps, config.sources, sequences), dtype=torch.float64, generator=generator
    )
    last = (corpus.lengths - config.seq_len).view(-1, 1)
    return corpus.starts.view(-1, 1) + (drawn * last).to(torch.int64)


class _Dispatch(torch.autograd.Function):
    """Copy each token once per chosen expert, ordered by expert.

    Autograd's own gradient of an index is a scatter with atomics; as ``order`` is a permutation,
    a gather by its inverse gives the same, faster and in a fixed order of summation.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        per_choice = grad[inverse].view(-1, ctx.top_k, grad.shape[-1])
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return per_choice.sum(1, dtype=dtype).to(grad.dtype), None, None, None


class _Collect(torch.autograd.Function):
    """Bring the experts' outputs back into the order of the tokens' choices."""

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def _grouped_mm() -> Callable[..., Tensor] | None:
    """Torch's matrix product over ragged groups of rows, under its old or its new name."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def expert_outputs(x: Tensor, w_in: Tensor, w_out: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """Apply to each row the SwiGLU block of its expert.

    Parameters
    ----------
    x
        Rows ordered by expert, [rows, hidden].
    w_in
        [experts, hidden, 2 * expert_hidden], gate and value side by side.
    w_out
        [experts, expert_hidden, hidden].
    ends
        int32 [experts], the end of each expert's rows.
    grouped
        Use torch's grouped matrix product in bfloat16, which needs no sizes on the host;
        otherwise loop over the experts that have rows, in the dtype of ``x``.

    Returns
    -------
    Tensor
        [rows, hidden], in the dtype of ``x``.
    """
    if grouped:
        matmul = _grouped_mm()
        if matmul is None:
            raise RuntimeError("expert_matmul 'grouped' needs a torch with grouped_mm; use 'loop'")
        low = torch.bfloat16
        gate, value = matmul(x.to(low), w_in.to(low), offs=ends).chunk(2, dim=-1)
        return matmul(functional.silu(gate) * value, w_out.to(low), offs=ends).to(x.dtype)
    outputs = []
    begin = 0
    # Unbound all at once: the gradient of indexing one expert is as large as all of them.
    weights = zip(w_in.to(x.dtype).unbind(), w_out.to(x.dtype).unbind(), strict=True)
    for end, (weight_in, weight_out) in zip(ends.tolist(), weights, strict=True):
        if end > begin:
            gate, value = (x[begin:end] @ weight_in).chunk(2, dim=-1)
            outputs.append((functional.silu(gate) * value) @ weight_out)
        begin = end
    # Without any row the result still depends on its inputs: a rank without tokens takes part in
    # the backward pass.
    return torch.cat(outputs) if outputs else x @ w_in[0].to(x.dtype) @ w_in[0].to(x.dtype).t()


def check_grouped(device: torch.device) -> None:
    """Compare the grouped matrix product with the loop on ragged groups, gradients too.

    The grouped product is young and its alignment rules changed between releases, so a run does
    not rely on it unseen.

    Parameters
    ----------
    device
        Where to compare.

    Raises
    ------
    RuntimeError
        If they differ by more than bfloat16's rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0, 7, 1, 0, 45, 3, 8, 0])
    ends = sizes.cumsum(0).to(device=device, dtype=torch.int32)
    shapes = ((int(sizes.sum()), 32), (8, 32, 48), (8, 24, 32))
    values = [torch.randn(shape, generator=generator) / 4 for shape in shapes]
    factor = torch.randn(shapes[0], generator=generator).to(device)
    found = []
    for grouped in (True, False):
        leaves = [
            value.to(device=device, dtype=torch.bfloat16).float().requires_grad_()
            for value in values
        ]
        output = expert_outputs(leaves[0], leaves[1], leaves[2], ends, grouped)
        (output * factor).sum().backward()
        found.append([output.detach()] + [leaf.grad for leaf in leaves])
    for name, got, expected in zip(("output", "x", "w_in", "w_out"), *found, strict=True):
        error = float((got - expected).norm() / expected.norm())
        # Three roundings of 2**-9 each along the way; a wrong group is off by about 1.
        if not error < 0.02:
            raise RuntimeError(
                f"torch's grouped matrix product is wrong here ({name}: relative error "
                f"{error:.3g}); run with --expert-matmul loop"
            )


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
            float32 [tokens, experts], what the weights were picked from, each row scaled to sum 1.
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
            [tokens, hidden], the source ranks' tokens one rank after the other.

        Returns
        -------
        y : Tensor
            [tokens, hidden].
        counts : Tensor
            int32 [sources, experts], assignments per source rank and expert.
        aux : Tensor
            Scalar; 1 when load and scores are even, more when both lean to the same experts.
        """
        config = self.config
        tokens = x.shape[0]
        ids, weights, scores = self.route(x)
        counts = count_assignments(ids, config.sources, config.experts)
        load = counts.sum(0)

        order = ids.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=x.device)
        rows = _Dispatch.apply(x, order, inverse, config.top_k)
        ends = load.cumsum(0).to(torch.int32)
        y = expert_outputs(rows, self.w_in, self.w_out, ends, self.grouped)
        y = _Collect.apply(y, order, inverse).view(tokens, config.top_k, -1)
        y = (wide(y) * weights[..., None]).sum(1).to(x.dtype)
        aux = (load * scores.mean(0)).sum() * (config.experts / (tokens * config.top_k))
        return y, counts, aux

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float) -> None:
        """Move the selection bias by ``rate`` towards an even load.

        Parameters
        ----------
        load
            [experts], assignments in the batch just trained on.
        rate
            Step of the bias, in units of the scores.
        """
        load = load.float()
        self.bias += rate * (load.mean() - load).sign()


def count_assignments(ids: Tensor, sources: int, experts: int) -> Tensor:
    """Count routed assignments per source rank and expert, without waiting for the device.

    Parameters
    ----------
    ids
        int64 [tokens, top_k], each source rank's tokens contiguous and equally many.
    sources, experts
        Sizes of the result.

    Returns
    -------
    Tensor
        int32 [sources, experts].
    """
    source = torch.arange(sources, device=ids.device).view(sources, 1)
    cell = (source * experts + ids.view(sources, -1)).flatten()
    counts = torch.zeros(sources * experts, dtype=torch.int32, device=ids.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell, dtype=torch.int32)).view(sources, -1)


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
        # Last, as every weight is drawn from one generator.
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
            int64 [sequences, seq_len], the source ranks' sequences one rank after the other.

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


class Recorder:
    """Keeps the counts of the first and of the last recorded steps on the device.

    The late stretch is a ring, so the run may end at any step (on a time limit, say) and still
    has its last batches.

    Parameters
    ----------
    config
        Settings; those named ``record_*`` are used.
    device
        Where the counts are.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        shape = (config.layers, config.sources, config.experts)
        capacity = config.record_early + config.record_late
        self.counts = torch.zeros((capacity, *shape), dtype=torch.int32, device=device)
        self.steps = [-1] * capacity

    def add(self, step: int, counts: Tensor) -> None:
        """Keep the counts of a step if it is one to record; only enqueues a copy.

        Parameters
        ----------
        step
            Number of the step.
        counts
            int32 [layers, sources, experts].
        """
        config = self.config
        index, skipped = divmod(step - config.record_from, config.record_every)
        if index < 0 or skipped:
            return
        if index >= config.record_early:
            if config.record_late == 0:
                return
            index = config.record_early + (index - config.record_early) % config.record_late
        self.counts[index].copy_(counts)
        self.steps[index] = step

    def trace(self, meta: dict[str, object]) -> traces.Trace:
        """Copy everything to the host.

        Parameters
        ----------
        meta
            Description to store with it.

        Returns
        -------
        lplb_triton.traces.trace.Trace
            Batches in the order of their steps.

        Raises
        ------
        RuntimeError
            If no step was recorded.
        """
        slots = sorted((step, slot) for slot, step in enumerate(self.steps) if step >= 0)
        if not slots:
            raise RuntimeError("nothing was recorded: the run ended before step record_from")
        counts = self.counts.cpu().numpy()[[slot for _, slot in slots]]
        steps = np.array([step for step, _ in slots], dtype=np.int64)
        return traces.Trace(counts=counts, steps=steps, meta=dict(meta))


def rank_imbalance(counts: Tensor) -> Tensor:
    """Largest over mean rank load with the experts laid out contiguously.

    Parameters
    ----------
    counts
        Integers [layers, sources, experts].

    Returns
    -------
    Tensor
        float32 scalar, mean over the layers. Ranks: `SHOWN_RANKS`, or the largest common divisor
        with the number of experts.
    """
    layers, _, experts = counts.shape
    ranks = math.gcd(experts, SHOWN_RANKS)
    load = counts.sum(1).view(layers, ranks, -1).sum(-1).float()
    return (load.amax(1) / load.mean(1)).mean()


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


def _learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def _optimizer(
    weights: Iterable[nn.Parameter], config: Config, device: torch.device
) -> torch.optim.Optimizer:
    weights = list(weights)
    decayed = [weight for weight in weights if weight.ndim >= 2]
    others = [weight for weight in weights if weight.ndim < 2]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, config.lr, (0.9, 0.95), weight_decay=0.1, fused=fused)


def _describe(config: Config, corpus: Corpus, device: torch.device, grouped: bool, done: int):
    """Say what a reader of the trace needs to know, with no paths of the machine."""
    settings = asdict(config)
    for name in ("text", "record", "device"):
        del settings[name]
    if math.isinf(config.time_limit):
        del settings["time_limit"]
    python = f"{platform.python_implementation()} {platform.python_version()}"
    if config.text is None:
        text = f"standard library sources of {python}"
    else:
        text = "given with --text"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "made_by": "examples/train_moe.py",
        "model": (
            f"decoder-only language model trained from scratch, {config.layers} MoE layers of "
            f"{config.experts} SwiGLU experts, {config.router} router, top-{config.top_k}"
        ),
        "top_k": config.top_k,
        "tokens_per_source": config.tokens_per_source,
        "hardware": hardware,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": python,
        "torch": str(torch.__version__),
        "expert_matmul": "grouped bfloat16" if grouped else "loop",
        "steps_done": done,
        "text": {"source": text, "bytes": corpus.size, "sha256": corpus.digest},
        "settings": settings,
    }


def train(config: Config, log: Callable[[str], object] = print) -> Result:
    """Train the model and record what the settings ask for.

    Nothing waits for the device between two progress lines: losses, imbalances and counts stay
    there until the end.

    Parameters
    ----------
    config
        Settings. The trace is returned, not written; `main` writes it.
    log
        Called with each progress line.

    Returns
    -------
    Result
        Losses, imbalances, final bias and trace.

    Raises
    ------
    FileNotFoundError, ValueError
        If the text or the device cannot be used.
    RuntimeError
        If the grouped matrix product is wrong on this device, or the loss is no longer finite.
    """
    begun = time.monotonic()
    device = pick_device(config.device)
    grouped = config.expert_matmul == "grouped"
    if config.expert_matmul == "auto":
        grouped = device.type == "cuda" and _grouped_mm() is not None
    if grouped:
        check_grouped(device)
    corpus = build_corpus(config)
    tokens = corpus.tokens.to(device)
    log(f"text: {corpus.size} bytes, {tokens.numel()} tokens; device: {device}")

    torch.manual_seed(config.seed)
    with device:
        model = MoELanguageModel(config, lambda layer: MoE(config, grouped))
    optimizer = _optimizer(model.parameters(), config, device)

    begins = draw_begins(config, corpus).view(config.steps, -1, 1).to(device)
    window = torch.arange(config.seq_len + 1, device=device)

    recorder = Recorder(config, device) if config.record is not None else None
    losses = torch.zeros(config.steps, device=device)
    imbalance = torch.zeros(config.steps, device=device)
    per_step = config.sources * config.tokens_per_source
    done = logged = 0
    last_time = time.monotonic()
    for step in range(config.steps):
        batch = tokens[begins[step] + window]
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, counts, aux = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        (loss + config.aux_loss * aux).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.bias_rate > 0:
            for block, block_counts in zip(model.blocks, counts, strict=True):
                block.experts.balance(block_counts.sum(0), config.bias_rate)
        if recorder is not None:
            recorder.add(step, counts)
        losses[step] = loss.detach()
        imbalance[step] = rank_imbalance(counts)

        done = step + 1
        if done % config.log_every and done < config.steps:
            continue
        mean_loss = losses[logged:done].mean().item()
        mean_imbalance = imbalance[logged:done].mean().item()
        now = time.monotonic()
        log(
            f"step {done:5d}  loss {mean_loss:.4f}  "
            f"{(done - logged) * per_step / (now - last_time):.0f} tokens/s  "
            f"imbalance {mean_imbalance:.3f}"
        )
        logged, last_time = done, now
        if not math.isfinite(mean_loss):
            raise RuntimeError(f"the loss is {mean_loss} by step {done}; try a smaller --lr")
        if now - begun > config.time_limit:
            log(f"time limit of {config.time_limit:g} s reached after {done} steps")
            break

    trace = None
    if recorder is not None:
        trace = recorder.trace(_describe(config, corpus, device, grouped, done))
    bias = torch.stack([block.experts.bias for block in model.blocks])
    return Result(losses[:done].cpu(), imbalance[:done].cpu(), bias.cpu(), trace)


_HELP = {
    "steps": "training steps at most",
    "device": "auto, cpu, cuda or cuda:N",
    "experts": "logical experts in each layer",
    "top_k": "experts per token",
    "layers": "layers",
    "hidden": "width of the model",
    "expert_hidden": "inner width of an expert",
    "vocab": "size of the vocabulary, 256 for bytes only",
    "sources": "simulated source ranks",
    "tokens_per_source": "tokens of each source rank in each batch",
    "seq_len": "length of a sequence",
    "router": "sigmoid or softmax scores",
    "bias_rate": "step of the selection bias; 0 leaves it alone",
    "aux_loss": "weight of an auxiliary balancing loss",
    "expert_matmul": "grouped (bfloat16), loop, or auto: grouped on a GPU where torch has it",
    "lr": "highest learning rate",
    "warmup": "steps of linear warm-up",
    "seed": "seed of text order, weights and batches",
    "time_limit": "stop after this many seconds, at the next progress line",
    "log_every": "steps between progress lines",
    "text": "file or folder to train on; default: the standard library's sources",
    "text_bytes": "use at most this much text",
    "record": "write the recorded batches to this .npz",
    "record_early": "batches to keep from the start",
    "record_late": "batches to keep from the end",
    "record_every": "record every so many steps",
    "record_from": "first step to record",
}


def parse_arguments(
    arguments: Sequence[str] | None = None,
    kind: type[Settings] = Config,
    help_of: dict[str, str] = _HELP,
    summary: str = (__doc__ or "").partition("\n")[0],
) -> Settings:
    """Read the command line.

    Parameters
    ----------
    arguments
        Arguments, or None for those of the process.
    kind
        Dataclass of the settings, one option for each field; None as default means a text.
    help_of
        One line about each field.
    summary
        What the program does.

    Returns
    -------
    Settings
        Checked settings. Prints a message and exits with status 2 when they are wrong.
    """
    parser = argparse.ArgumentParser(description=summary)
    for option in fields(kind):
        default = option.default
        flag = "--" + option.name.replace("_", "-")
        text = f"{help_of[option.name]} (default: {default})"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=help_of[option.name])
        else:
            reader = str if default is None else type(default)
            parser.add_argument(flag, type=reader, default=default, help=text)
    try:
        return kind(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Parameters
    ----------
    arguments
        Arguments, or None for those of the process.

    Returns
    -------
    int
        Exit status.
    """
    config = parse_arguments(arguments)
    try:
        if config.record is not None:
            traces.check_writable(config.record)
        device = pick_device(config.device)
        if device.type == "cuda":
            # cuBLAS reads this when it starts; without it its results can differ between runs.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
        result = train(config, log=lambda line: print(line, flush=True))
        if config.record is not None and result.trace is not None:
            traces.save(config.record, result.trace)
            size = Path(config.record).stat().st_size
            shape = " x ".join(map(str, result.trace.counts.shape))
            print(f"recorded {shape} counts: {config.record}, {size / 1e6:.2f} MB")
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
