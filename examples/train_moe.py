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

import datetime
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from moe.corpus import Corpus, build_corpus, draw_begins
from moe.experts import check_grouped, find_grouped_mm
from moe.model import MoE, MoELanguageModel, compute_learning_rate, make_optimizer, pick_device
from moe.settings import Config, parse_arguments
from torch import Tensor, nn
from torch.nn import functional

from lplb_triton.traces import trace as traces

# Ranks over which the progress lines lay out the experts to show an imbalance.
SHOWN_RANKS = 32


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


def measure_imbalance(counts: Tensor) -> Tensor:
    """Measure the largest over the mean rank load with the experts in order over the ranks.

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


def _describe(config: Config, corpus: Corpus, device: torch.device, grouped: bool, done: int):
    """Describe the run for a reader of the trace, without paths of this machine."""
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


def train_step(
    model: MoELanguageModel,
    optimizer: torch.optim.Optimizer,
    config: Config,
    step: int,
    batch: Tensor,
) -> tuple[Tensor, Tensor]:
    """Train on one batch.

    Parameters
    ----------
    model, optimizer, config
        What to train and how.
    step
        Number of the step, which sets the learning rate.
    batch
        int64 [sequences, seq_len + 1] token ids.

    Returns
    -------
    loss : Tensor
        Scalar without gradient, cross entropy in nats per token.
    counts : Tensor
        int32 [layers, sources, experts].
    """
    device = batch.device
    for group in optimizer.param_groups:
        group["lr"] = compute_learning_rate(config, step)
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
    return loss.detach(), counts


def train(config: Config, log: Callable[[str], object] = print) -> Result:
    """Train the model and record what the settings ask for.

    The host waits for the device only at progress lines; losses, imbalances and counts stay on
    the device until the end.

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
        grouped = device.type == "cuda" and find_grouped_mm() is not None
    if grouped:
        check_grouped(device)
    corpus = build_corpus(config)
    tokens = corpus.tokens.to(device)
    log(f"text: {corpus.size} bytes, {tokens.numel()} tokens; device: {device}")

    torch.manual_seed(config.seed)
    with device:
        model = MoELanguageModel(config, lambda layer: MoE(config, grouped))
    optimizer = make_optimizer(model.parameters(), config, device)

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
        loss, counts = train_step(model, optimizer, config, step, batch)
        if recorder is not None:
            recorder.add(step, counts)
        losses[step] = loss
        imbalance[step] = measure_imbalance(counts)

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
    config = parse_arguments(arguments, summary=(__doc__ or "").partition("\n")[0])
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
