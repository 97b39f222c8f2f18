"""One expert-parallel run on one rank: steps, new placements and checkpoints."""

from __future__ import annotations

import importlib.util
import itertools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lplb_triton import Placement
from lplb_triton.traces.record import Recorder
from moe.experts import wide
from moe.model import MoELanguageModel, compute_learning_rate, make_optimizer
from moe.parallel import ParallelMoE, even_placement, place_experts
from moe.run_settings import DTYPES, Settings
from moe.timer import Timer
from moe.transports import AllToAll, DeepEP


@dataclass
class Run:
    """Figures of one run; lists have one entry per step."""

    balance: str
    losses: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    """Largest over mean number of rows that a rank's experts served, mean over the layers."""
    unbalanced: list[float] = field(default_factory=list)
    """The same for experts in order without replicas."""
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
        placement = even_placement(self.config.experts, self.ranks, redundant)
        if balance == "live":
            placement = place_experts(
                balance, torch.ones(self.config.experts), self.ranks, redundant
            )
        self.transport = self._make_transport(placement)

        def make_experts(layer: int) -> nn.Module:
            return ParallelMoE(
                self.config, layer, balance=balance, placement=placement, group=group,
                device=device, dtype=self.dtype, transport=self.transport,
                even_routing=settings.even_routing, timer=self.timer,
            )  # fmt: skip

        # Every rank draws the same dense weights here; experts have generators of their own.
        torch.manual_seed(settings.seed)
        model = MoELanguageModel(self.config, make_experts)
        self.model = model.to(device, torch.promote_types(self.dtype, torch.float32))
        self.layers: list[ParallelMoE] = [block.experts for block in self.model.blocks]
        preference = torch.linspace(settings.router_bias, 0, self.config.experts)
        for layer in self.layers:
            layer.bias += preference.to(layer.bias)
        self._make_optimizers()
        self.recorder = self._make_recorder()
        # Tokens of every expert since the last placement.
        shape = self.config.layers, self.config.experts
        self.load = torch.zeros(shape, dtype=torch.int64, device=device)
        self.step = 0

    def _make_optimizers(self) -> None:
        """Divide the parameters into experts and dense ones, with an optimizer for each part."""
        self.experts = {
            f"{index}.{name}": param
            for index, layer in enumerate(self.layers)
            for name, param in (("w_in", layer.w_in), ("w_out", layer.w_out))
        }
        expert_ids = {id(param) for param in self.experts.values()}
        self.dense = [param for param in self.model.parameters() if id(param) not in expert_ids]
        self.optimizers = {
            "dense": make_optimizer(self.dense, self.config, self.device),
            "experts": make_optimizer(self.experts.values(), self.config, self.device),
        }

    def _make_recorder(self) -> Recorder | None:
        """Make the recorder of expert loads, if the settings ask for one."""
        settings, config = self.settings, self.config
        if not settings.record:
            return None
        meta = {"made_by": "examples/train_moe_ep.py", "top_k": config.top_k}
        # All micro-batches of a step are one batch of the trace.
        recorder = Recorder(
            settings.record, config.experts, config.layers,
            adds_per_step=settings.microbatches, meta=meta,
        )  # fmt: skip
        for index, layer in enumerate(self.layers):
            layer.record = partial(recorder.add, index)
        return recorder

    def _make_transport(self, placement: Placement) -> Any:
        settings, n_physical = self.settings, placement.n_physical
        name = settings.transport
        if name == "auto":
            found = importlib.util.find_spec("deep_ep") is not None
            name = "deep_ep" if found and self.dtype == torch.bfloat16 else "torch"
        self.log(f"{self.run.balance}: tokens travel by {name}")
        if name == "deep_ep":
            return DeepEP(
                self.group, n_physical, tokens=settings.tokens, hidden=settings.hidden,
                top_k=settings.top_k,
            )  # fmt: skip
        return AllToAll(self.group, n_physical, settings.reverse_sums)

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
                self._gather_figures(fresh)
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
                self._replace_experts()
            if settings.checkpoint and self.step % settings.checkpoint_every == 0:
                self.save(Path(settings.checkpoint))
        self._gather_figures(fresh)
        self._summarize()
        return self.run

    def _backward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a step; return this rank's loss and the counts of all ranks."""
        parts = batch.chunk(self.settings.microbatches)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        counts = 0
        low = self.dtype == torch.bfloat16
        for part in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                logits, used, _ = self._forward(part[:, :-1])
            part_loss = functional.cross_entropy(
                wide(logits.flatten(0, 1)), part[:, 1:].flatten()
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
        """Reduce the gradients over the ranks, clip them, and take a step."""
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

        rate = compute_learning_rate(self.config, self.step)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for layer, load in zip(self.layers, counts, strict=True):
            layer.replicas.sync_weights()
            if self.config.bias_rate > 0:
                layer.balance(load, self.config.bias_rate)

    def _replace_experts(self) -> None:
        """Place the experts of every layer anew, by the loads since the last placement."""
        for layer, load in zip(self.layers, self.load.cpu(), strict=True):
            placement = place_experts(self.run.balance, load, self.ranks, self.settings.redundant)
            layer.move(placement, self.optimizers["experts"])
        self.load.zero_()

    def _gather_figures(self, fresh: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Copy the figures of the last steps to the host, with one wait for all of them."""
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

    def _summarize(self) -> None:
        self.run.step_ms, self.run.moe_ms = self.timer.read_milliseconds()
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
        with _order_logically(self.layers, optimizer):
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
        """Continue from a checkpoint, also one of another number of ranks; collective."""
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
        with _order_logically(self.layers, optimizer), torch.no_grad():
            for name, param in self.experts.items():
                for key in files[0][name]:
                    values = [file[name][key] for file in files]
                    # The number of steps is the same on all ranks; the rest has a row per expert.
                    value = torch.cat(values)[part] if values[0].ndim else values[0]
                    if key == "weight":
                        param.copy_(value)
                    else:
                        where = self.device if value.ndim or self.timer.cuda else "cpu"
                        optimizer.state[param][key] = value.to(where, copy=True)
        self.load = rest["load"].to(self.device)
        # With live slots, experts are at home whatever the checkpoint says.
        if self.run.balance in ("none", "live"):
            return
        for layer, phy2log in zip(self.layers, rest["phy2log"], strict=True):
            # A placement for other ranks or slots can't be used; the next one is made soon.
            if rest["ranks"] == self.ranks and len(phy2log) == layer.replicas.placement.n_physical:
                phy2log = phy2log.cpu()
                placement = Placement(phy2log, self.ranks, n_logical=self.config.experts)
                layer.move(placement, optimizer)


@contextmanager
def _order_logically(layers: list[ParallelMoE], optimizer: torch.optim.Optimizer):
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.replicas.logical_order(optimizer))
        yield
