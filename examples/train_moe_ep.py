r"""Train an expert-parallel mixture-of-experts language model, balanced batch by batch.

Every process is one rank: it reads its own text, holds its part of the experts of every layer and
all of the rest of the model. On GPUs, one process each::

    torchrun --nproc-per-node 2 examples/train_moe_ep.py --balance none,eplb,lplb \
        --experts 256 --top-k 8 --hidden 2048 --expert-hidden 768 --layers 2 --tokens 8192

On a CPU, N gloo processes::

    python examples/train_moe_ep.py --processes 4 --balance none,eplb,lplb --experts 16 --top-k 2 \
        --layers 2 --hidden 64 --expert-hidden 64 --seq-len 64 --tokens 256 --steps 200

``--balance`` names one or several runs, made one after the other from the same start:

none  experts in order, no replicas
eplb  a placement with replicas by load history, tokens spread evenly over the copies
lplb  the same placement, tokens spread by the linear program of each batch

All three compute the same function. The loss curves agree up to the order of sums; how far apart
that alone drives two runs is shown by ``--reverse-sums``. The text, the tokeniser and the dense
part of the model are those of `train_moe.py`; the layer itself is in `expert_parallel.py`.

A checkpoint (``--checkpoint FOLDER``) holds the experts in logical order, one file per rank;
``--resume`` continues from it with any number of ranks that divides the experts and streams.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import expert_parallel
import torch
import torch.distributed as dist

# Its functions keep the default group that there is when it is imported: none, at this place.
import torch.distributed.nn
import torch.multiprocessing as mp
import train_moe as moe
from expert_parallel import ParallelMoE
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lplb_triton import Placement
from lplb_triton.bench import tables
from lplb_triton.traces import trace as traces
from lplb_triton.traces.record import Recorder

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
        """Check what `train_moe.Config` doesn't."""
        unknown = set(self.runs) - set(expert_parallel.BALANCES)
        if unknown:
            raise ValueError(f"balance must name {expert_parallel.BALANCES}, got {unknown}")
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

    def model(self, ranks: int) -> moe.Config:
        """Settings of the model and its text for a number of ranks."""
        streams = self.streams or ranks
        if streams % ranks or self.experts % ranks:
            raise ValueError(
                f"streams ({streams}) and experts ({self.experts}) must be multiples of the "
                f"{ranks} ranks"
            )
        shared = {option.name for option in fields(moe.Config)} & {f.name for f in fields(self)}
        return moe.Config(
            **{name: getattr(self, name) for name in shared},
            sources=streams,
            tokens_per_source=self.microbatches * self.tokens * ranks // streams,
        )


HELP = {name: text for name, text in moe._HELP.items() if name != "sources"} | {
    "balance": "none, eplb or lplb, or several of them separated by commas",
    "stop_at": "leave off after this step, to be resumed; 0: go on to the last",
    "processes": "start so many gloo processes here; 0: this process is one rank (torchrun)",
    "tokens": "tokens of each rank in each microbatch",
    "microbatches": "microbatches whose gradients are added up in each step",
    "streams": "streams of text in all, which fixes the batches for any number of ranks; 0: ranks",
    "redundant": "redundant slots of each rank, for eplb and lplb",
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


class Timer:
    """Times of steps and of the MoE layers in them, forward and backward.

    CUDA events on a GPU, so that nothing waits; the clock on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: dict[str, list[Any]] = {"step": []}
        self.layer_steps: list[tuple[int, int]] = []

    def mark(self, name: str) -> None:
        """Note the time."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.setdefault(name, []).append(event)

    def stamp(self, x: Tensor, begins: bool) -> Tensor:
        """Return ``x``, noting when the forward and the backward pass come by."""
        return _Stamp.apply(x, self, begins)

    def end_step(self) -> None:
        """Note that a step is over."""
        self.mark("step")
        lengths = [len(self.marks.get(name, ())) for name in ("forward", "backward")]
        self.layer_steps.append((lengths[0], lengths[1]))

    def milliseconds(self) -> tuple[list[float], list[float]]:
        """Return the time of each step, and of all MoE layers in each step."""
        if self.cuda:
            torch.cuda.synchronize()

        def between(a: Any, b: Any) -> float:
            return a.elapsed_time(b) if self.cuda else 1e3 * (b - a)

        steps = [between(a, b) for a, b in itertools.pairwise(self.marks["step"])]
        layers, before = [], (0, 0)
        for after in self.layer_steps:
            total = 0.0
            for name, first, last in zip(("forward", "backward"), before, after, strict=True):
                marks = self.marks.get(name, [])[first:last]
                total += sum(between(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True))
            layers.append(total)
            before = after
        return steps, layers


class _Stamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, timer: Timer, begins: bool) -> Tensor:
        ctx.timer = timer
        timer.mark("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.timer.mark("backward")
        return grad, None, None


@dataclass
class Run:
    """What one run leaves behind; a row per step."""

    balance: str
    losses: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    """Largest over mean number of rows that a rank's experts served, mean over the layers."""
    unbalanced: list[float] = field(default_factory=list)
    """The same if experts lay in order without replicas."""
    step_ms: list[float] = field(default_factory=list)
    moe_ms: list[float] = field(default_factory=list)
    certified: float | None = None
    """Share of the LPs that were certified within the tolerance."""
    expert_state: dict[str, list[int]] = field(default_factory=dict)
    """Shapes of this rank's expert parameters and their optimizer state."""


class Trainer:
    """One run on one rank.

    Parameters
    ----------
    settings
        What to do.
    balance
        Which of the settings' runs.
    device
        This rank's.
    group
        The EP group; text is spread over the same ranks.
    log
        Called with progress lines on rank 0.
    """

    def __init__(
        self,
        settings: Settings,
        balance: str,
        device: torch.device,
        group: dist.ProcessGroup,
        log: Callable[[str], object],
    ) -> None:
        self.settings, self.device, self.group, self.log = settings, device, group, log
        self.rank, self.ranks = dist.get_rank(group), group.size()
        self.config = settings.model(self.ranks)
        self.run = Run(balance)
        self.timer = Timer(device)
        name = settings.dtype
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype = DTYPES[name]
        redundant = 0 if balance == "none" else settings.redundant
        placement = expert_parallel.even_placement(self.config.experts, self.ranks, redundant)
        self.transport = self._transport(placement)

        def make_experts(layer: int) -> nn.Module:
            return ParallelMoE(
                self.config, layer, balance=balance, placement=placement, group=group,
                device=device, dtype=self.dtype, transport=self.transport,
                even_routing=settings.even_routing, timer=self.timer,
            )  # fmt: skip

        # The same on every rank: experts have generators of their own.
        torch.manual_seed(settings.seed)
        model = moe.MoELanguageModel(self.config, make_experts)
        self.model = model.to(device, torch.promote_types(self.dtype, torch.float32))
        self.layers: list[ParallelMoE] = [block.experts for block in self.model.blocks]
        preference = torch.linspace(settings.router_bias, 0, self.config.experts)
        for layer in self.layers:
            layer.bias += preference.to(layer.bias)
        self.experts = {
            f"{index}.{name}": param
            for index, layer in enumerate(self.layers)
            for name, param in (("w_in", layer.w_in), ("w_out", layer.w_out))
        }
        mine = {id(param) for param in self.experts.values()}
        self.dense = [param for param in self.model.parameters() if id(param) not in mine]
        self.optimizers = {
            "dense": moe._optimizer(self.dense, self.config, device),
            "experts": moe._optimizer(self.experts.values(), self.config, device),
        }
        self.recorder: Recorder | None = None
        if settings.record:
            config = self.config
            meta = {"made_by": "examples/train_moe_ep.py", "top_k": config.top_k}
            # All micro-batches of a step are one batch of the trace.
            self.recorder = Recorder(
                settings.record, config.experts, config.layers,
                adds_per_step=settings.microbatches, meta=meta,
            )  # fmt: skip
            for index, layer in enumerate(self.layers):
                layer.record = partial(self.recorder.add, index)
        # Tokens of every expert since the last placement.
        shape = self.config.layers, self.config.experts
        self.load = torch.zeros(shape, dtype=torch.int64, device=device)
        self.step = 0

    def _transport(self, placement: Placement) -> Any:
        settings, n_physical = self.settings, placement.n_physical
        name = settings.transport
        if name == "auto":
            found = importlib.util.find_spec("deep_ep") is not None
            name = "deep_ep" if found and self.dtype == torch.bfloat16 else "torch"
        self.log(f"{self.run.balance}: tokens travel by {name}")
        if name == "deep_ep":
            return expert_parallel.DeepEP(
                self.group, n_physical, tokens=settings.tokens, hidden=settings.hidden,
                top_k=settings.top_k,
            )  # fmt: skip
        return expert_parallel.AllToAll(self.group, n_physical, settings.reverse_sums)

    def train(self, tokens: Tensor, begins: Tensor) -> Run:
        """Train from the current step to the last.

        Parameters
        ----------
        tokens
            int64, the text.
        begins
            int64 [steps, sequences of this rank in a step], where its sequences begin.
        """
        settings = self.settings
        window = torch.arange(self.config.seq_len + 1, device=self.device)
        fresh: list[tuple[Tensor, Tensor, Tensor]] = []
        logged, last_time = self.step, time.monotonic()
        last = min(settings.stop_at or settings.steps, settings.steps)
        self.timer.mark("step")
        while self.step < last:
            loss, counts = self._backward(tokens[begins[self.step][:, None] + window])
            self._update(counts)
            served = torch.stack([sum(layer.served) for layer in self.layers])
            for layer in self.layers:
                layer.served.clear()
            self.timer.end_step()
            fresh.append((loss, counts, served))
            self.load += counts
            self.step += 1
            if self.recorder is not None:
                self.recorder.step()
            replace = self.step % settings.replace_every == 0 and self.run.balance != "none"
            if self.step % settings.log_every == 0 or self.step == last:
                self._collect(fresh)
                now = time.monotonic()
                done = (self.step - logged) * settings.tokens * settings.microbatches * self.ranks
                self.log(
                    f"{self.run.balance:5s} step {self.step:5d}  loss {self.run.losses[-1]:.4f}  "
                    f"imbalance {self.run.unbalanced[-1]:.3f} -> {self.run.imbalance[-1]:.3f}  "
                    f"{done / (now - last_time):.0f} tokens/s"
                )
                logged, last_time = self.step, now
                if not math.isfinite(self.run.losses[-1]):
                    raise RuntimeError(f"the loss is {self.run.losses[-1]}; try a smaller --lr")
            if replace and self.step < settings.steps:
                self._replace()
            if settings.checkpoint and self.step % settings.checkpoint_every == 0:
                self.save(Path(settings.checkpoint))
        self._collect(fresh)
        self._finish()
        return self.run

    def _backward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of one step; returns this rank's part of the loss, and all ranks' counts."""
        parts = batch.chunk(self.settings.microbatches)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        counts = 0
        low = self.dtype == torch.bfloat16
        for part in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                logits, used, _ = self._forward(part[:, :-1])
            part_loss = functional.cross_entropy(
                moe.wide(logits.flatten(0, 1)), part[:, 1:].flatten()
            ) / (len(parts) * self.ranks)
            part_loss.backward()
            loss += part_loss.detach()
            counts = counts + used.sum(1, dtype=torch.int64)
        dist.all_reduce(counts, group=self.group)
        return loss, counts

    def _forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        if not self.settings.recompute:
            return model(tokens)
        x, counts = model.token(tokens) + model.position, []
        for block in model.blocks:
            x, used, aux = checkpoint(block, x, use_reentrant=False)
            counts.append(used)
        logits = functional.linear(model.norm(x), model.token.weight)
        return logits, torch.stack(counts), aux

    def _update(self, counts: Tensor) -> None:
        """Bring the gradients together, clip them, and take a step."""
        for layer in self.layers:
            layer.replicas.reduce_grads()
        grads = torch.cat([param.grad.flatten() for param in self.dense])
        dist.all_reduce(grads, group=self.group)
        pieces = grads.split([param.numel() for param in self.dense])
        for param, piece in zip(self.dense, pieces, strict=True):
            param.grad.copy_(piece.view_as(param))

        # An original's gradient is on one rank only, so the squares are added over the ranks.
        own = torch.stack([p.grad.double().square().sum() for p in self.experts.values()]).sum()
        dist.all_reduce(own, group=self.group)
        norm = (own + grads.double().square().sum()).sqrt()
        scale = (1.0 / norm).clamp(max=1.0)
        for param in itertools.chain(self.dense, self.experts.values()):
            param.grad.mul_(scale.to(param.dtype))

        rate = moe._learning_rate(self.config, self.step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for layer, load in zip(self.layers, counts, strict=True):
            layer.replicas.sync_weights()
            if self.config.bias_rate > 0:
                layer.balance(load, self.config.bias_rate)

    def _replace(self) -> None:
        """Place the experts of every layer by the loads since the last time."""
        for layer, load in zip(self.layers, self.load.cpu(), strict=True):
            placement = Placement.from_history(
                load, self.ranks, redundant_per_rank=self.settings.redundant
            )
            layer.move(placement, self.optimizers["experts"])
        self.load.zero_()

    def _collect(self, fresh: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Bring figures of the last steps to the host, with one wait for all of them."""
        if not fresh:
            return
        losses, counts, served = (torch.stack(part) for part in zip(*fresh, strict=True))
        fresh.clear()
        dist.all_reduce(losses, group=self.group)
        rows = [torch.empty_like(served) for _ in range(self.ranks)]
        dist.all_gather(rows, served, group=self.group)
        by_rank = torch.stack(rows).double()
        in_order = counts.unflatten(-1, (self.ranks, -1)).sum(-1).double()
        self.run.losses += losses.tolist()
        self.run.imbalance += (by_rank.amax(0) / by_rank.mean(0)).mean(-1).tolist()
        self.run.unbalanced += (in_order.amax(-1) / in_order.mean(-1)).mean(-1).tolist()

    def _finish(self) -> None:
        self.run.step_ms, self.run.moe_ms = self.timer.milliseconds()
        balancers = [layer.balancer for layer in self.layers if layer.balancer and layer.lplb]
        solves = sum(int(balancer.solves) for balancer in balancers)
        if solves:
            self.run.certified = sum(int(b.certified) for b in balancers) / solves
        state = self.optimizers["experts"].state
        for name, param in self.experts.items():
            self.run.expert_state[name] = list(param.shape)
            for key, value in state[param].items():
                self.run.expert_state[f"{name}.{key}"] = list(value.shape)

    def close(self) -> None:
        """Free what was allocated with the other ranks; collective."""
        for layer in self.layers:
            if layer.balancer is not None:
                layer.balancer.close()
        self.transport.close()

    def save(self, folder: Path) -> None:
        """Write a checkpoint, experts in logical order; collective.

        Parameters
        ----------
        folder
            Replaced as a whole once every rank has written its file.
        """
        fresh = folder.with_name(folder.name + ".new")
        fresh.mkdir(parents=True, exist_ok=True)
        phy2log = [layer.replicas.placement.phy2log for layer in self.layers]
        optimizer = self.optimizers["experts"]
        with _all_in_logical_order(self.layers, optimizer):
            experts = {
                name: {"weight": param.detach(), **optimizer.state[param]}
                for name, param in self.experts.items()
            }
            torch.save(experts, fresh / f"experts-{self.rank:03d}.pt")
        if self.rank == 0:
            names = {f"blocks.{name.replace('.', '.experts.')}" for name in self.experts}
            model = {k: v for k, v in self.model.state_dict().items() if k not in names}
            rest = {
                "step": self.step, "ranks": self.ranks, "model": model, "phy2log": phy2log,
                "optimizer": self.optimizers["dense"].state_dict(), "load": self.load.cpu(),
            }  # fmt: skip
            torch.save(rest, fresh / "rest.pt")
        dist.barrier(self.group)
        if self.rank == 0:
            old = folder.with_name(folder.name + ".old")
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            for path in old.glob("*"):
                path.unlink()
            if old.exists():
                old.rmdir()
        dist.barrier(self.group)

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from a checkpoint, also one of another number of ranks; collective."""
        rest = torch.load(folder / "rest.pt", map_location=self.device, weights_only=True)
        self.step = rest["step"]
        self.model.load_state_dict(rest["model"], strict=False)
        self.optimizers["dense"].load_state_dict(rest["optimizer"])
        files = [
            torch.load(
                folder / f"experts-{rank:03d}.pt", map_location="cpu", weights_only=True, mmap=True
            )
            for rank in range(rest["ranks"])
        ]
        own = self.config.experts // self.ranks
        part = slice(self.rank * own, (self.rank + 1) * own)
        optimizer = self.optimizers["experts"]
        with _all_in_logical_order(self.layers, optimizer), torch.no_grad():
            for name, param in self.experts.items():
                for key in files[0][name]:
                    values = [file[name][key] for file in files]
                    # A number of steps is the same everywhere; all else has a row per expert.
                    value = torch.cat(values)[part] if values[0].ndim else values[0]
                    if key == "weight":
                        param.copy_(value)
                    else:
                        where = self.device if value.ndim or self.timer.cuda else "cpu"
                        optimizer.state[param][key] = value.to(where, copy=True)
        self.load = rest["load"].to(self.device)
        if self.run.balance == "none":
            return
        for layer, phy2log in zip(self.layers, rest["phy2log"], strict=True):
            # Made for other ranks or slots it is of no use: the next one comes soon.
            if rest["ranks"] == self.ranks and len(phy2log) == layer.replicas.placement.n_physical:
                phy2log = phy2log.cpu()
                placement = Placement(phy2log, self.ranks, n_logical=self.config.experts)
                layer.move(placement, optimizer)


@contextmanager
def _all_in_logical_order(layers: list[ParallelMoE], optimizer: torch.optim.Optimizer):
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.replicas.logical_order(optimizer))
        yield


def train(
    settings: Settings,
    device: torch.device,
    group: dist.ProcessGroup,
    log: Callable[[str], object] = print,
) -> list[Run]:
    """Make all runs of the settings, one after the other; collective.

    Parameters
    ----------
    settings
        What to do.
    device
        This rank's.
    group
        The EP group.
    log
        Called with progress lines on rank 0.

    Returns
    -------
    list of Run
    """
    rank, ranks = dist.get_rank(group), group.size()
    config = settings.model(ranks)
    corpus = moe.build_corpus(config)
    tokens = corpus.tokens.to(device)
    begins = moe.draw_begins(config, corpus).unflatten(1, (ranks, -1))[:, rank].flatten(1)
    begins = begins.to(device)
    silent = rank != 0
    say = (lambda line: None) if silent else log
    say(f"text: {corpus.size} bytes, {tokens.numel()} tokens; {ranks} ranks, {device.type}")
    runs = []
    for balance in settings.runs:
        trainer = Trainer(settings, balance, device, group, say)
        if settings.resume:
            trainer.load_checkpoint(Path(settings.resume))
        # What was recorded is written also if training fails.
        with trainer.recorder or nullcontext():
            runs.append(trainer.train(tokens, begins))
        trainer.close()
        # Two runs' experts and optimizer states may not fit at once.
        del trainer
    return runs


def report(settings: Settings, runs: Sequence[Run], ranks: int, device: torch.device) -> dict:
    """Sum the runs up: medians over the steps after the first ``skip``."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    chosen = asdict(settings)
    for name in ("text", "checkpoint", "resume", "record", "out"):
        del chosen[name]
    summary = []
    for run in runs:
        row: dict[str, Any] = {"balance": run.balance, "final_loss": run.losses[-1]}
        for name in ("step_ms", "moe_ms", "imbalance", "unbalanced"):
            # The last is left out of nothing: short runs keep at least one step.
            values = getattr(run, name)
            row[name] = statistics.median(values[min(settings.skip, len(values) - 1) :])
        summary.append(row)
    return {
        "made_by": "examples/train_moe_ep.py",
        "hardware": hardware,
        "torch": str(torch.__version__),
        "ranks": ranks,
        "settings": chosen,
        "medians": summary,
        "runs": [asdict(run) for run in runs],
    }


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw loss and imbalance over the steps."""
    tables.require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        left.plot(run.losses, label=run.balance, linewidth=1)
        right.plot(run.imbalance, label=run.balance, linewidth=1)
    left.set(xlabel="step", ylabel="loss (nats per token)")
    right.set(xlabel="step", ylabel="imbalance (largest / mean rank)")
    left.legend()
    figure.savefig(path, dpi=120)


def work(rank: int, settings: Settings, store: str | None) -> None:
    """Be one rank: of `--processes` if there is a ``store``, else of torchrun's."""
    minutes = timedelta(minutes=10)
    if store is not None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank,
            world_size=max(settings.processes, 1), timeout=minutes,
        )  # fmt: skip
        device = torch.device("cpu")
    else:
        device = moe.pick_device(settings.device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # Losses and counts are gathered by the same group as tokens.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=minutes)
    try:
        runs = train(settings, device, dist.group.WORLD, lambda line: print(line, flush=True))
        if dist.get_rank() == 0:
            summary = report(settings, runs, dist.get_world_size(), device)
            for row in summary["medians"]:
                print(
                    f"{row['balance']:5s} step {row['step_ms']:.2f} ms, MoE layers "
                    f"{row['moe_ms']:.2f} ms, imbalance {row['imbalance']:.3f}"
                )
            if settings.out is not None:
                folder = Path(settings.out)
                (folder / "train.json").write_text(json.dumps(summary, indent=1) + "\n")
                draw(runs, folder / "curves.png")
    finally:
        # gloo's threads end with their group, if nothing keeps it. Else they let tensors go while
        # the interpreter ends, which now and then aborts (pytorch/pytorch issue 190489).
        gc.collect()
        dist.destroy_process_group()


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
    summary = (__doc__ or "").partition("\n")[0]
    settings = moe.parse_arguments(arguments, Settings, HELP, summary)
    try:
        if settings.out is not None:
            tables.require("matplotlib")
            # Before the training, so that its results are not lost.
            Path(settings.out).mkdir(parents=True, exist_ok=True)
            for name in ("train.json", "curves.png"):
                traces.check_writable(Path(settings.out) / name)
        if "LOCAL_RANK" in os.environ and not settings.processes:
            work(int(os.environ["LOCAL_RANK"]), settings, None)
            return 0
        settings.model(max(settings.processes, 1))
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(
                work, (settings, str(Path(folder) / "store")), nprocs=max(settings.processes, 1)
            )
    except (OSError, ValueError, RuntimeError, mp.ProcessRaisedException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
