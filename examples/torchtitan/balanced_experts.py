"""Replicas and per-batch balance of experts in torchtitan 0.3.0, run by its own trainer.

The overrides below are named on torchtitan's command line, with this folder on PYTHONPATH:

    torchrun --nproc-per-node 8 -m torchtitan.train --module deepseek_v3 --config deepseek_v3_16b \
        --parallelism.expert_parallel_degree 8 --override.imports \
        'balanced_experts.balance={"redundant": 1}' 'balanced_experts.rebalance={"every": 100}' \
        balanced_experts.report balanced_experts.save_ids

- ``balance`` gives each rank ``redundant`` more expert slots, and routes every batch by the LP.
- ``rebalance`` chooses the copies anew from the loads of the last ``every`` optimizer steps.
- ``report`` adds the imbalance before and after to torchtitan's metrics.
- ``save_ids`` has selective checkpointing keep the routing, so that no batch is solved twice.

Parameters stay torchtitan's own, in its order and under its names, so a checkpoint doesn't know
whether it was written with replicas.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import derive, override
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
from torchtitan.tools.logging import logger

from lplb_triton.integrations.layers import (
    LayerBalance,
    attach,
    keep_redundant_rows,
    measure_imbalance,
    rebalance_layers,
    stack_slots,
)


class BalancedExperts(RoutedExperts):
    """torchtitan's routed experts with redundant slots, routed by the LP of each batch."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        redundant: int = 1
        """Redundant slots per rank."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.redundant = config.redundant
        self.balance: LayerBalance | None = None
        self._slots: tuple[torch.Tensor, ...] = ()

    def parallelize(self, parallel_dims: Any) -> None:
        """Prepare for the EP group that the layer is distributed over."""
        super().parallelize(parallel_dims)
        mesh = parallel_dims.get_optional_mesh("ep")
        if mesh is None:
            raise ValueError("balanced experts need --parallelism.expert_parallel_degree >= 2")
        if type(self.token_dispatcher) is not AllToAllTokenDispatcher:
            raise TypeError(
                "balanced experts need torchtitan's standard all-to-all dispatcher, "
                f"got {type(self.token_dispatcher).__name__}"
            )
        device = torch.device(mesh.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self.balance = LayerBalance(
            self.inner_experts.num_experts,
            group=mesh.get_group(),
            device=device,
            redundant=self.redundant,
        )
        # FSDP gathers the parameters before the block's forward pass, so slots are made inside it.
        self.inner_experts.forward = self._compute_slots

    # Names of arguments are those by which torchtitan finds their placements.
    def forward(
        self,
        x_BLD: torch.Tensor,  # noqa: N803
        topk_scores_BLK: torch.Tensor,  # noqa: N803
        topk_expert_ids_BLK: torch.Tensor,  # noqa: N803
        num_local_tokens_per_expert_E: torch.Tensor,  # noqa: N803
    ) -> torch.Tensor:
        """Compute as torchtitan does, with physical ids and the counts that go with them."""
        balance = self.balance
        if balance is None:
            raise ValueError("balanced experts need --parallelism.expert_parallel_degree >= 2")
        if torch.compiler.is_compiling():
            raise ValueError('balanced experts are not for --compile.components "model"')
        slot_ids = balance.route(topk_expert_ids_BLK)
        flat, n_slots = slot_ids.reshape(-1), balance.placement.n_physical
        # torch.bincount would wait for the GPU.
        counts = num_local_tokens_per_expert_E.new_zeros(n_slots)
        counts = counts.scatter_add(0, flat, torch.ones_like(flat, dtype=counts.dtype))
        output = super().forward(x_BLD, topk_scores_BLK, slot_ids, counts)
        slots, self._slots = self._slots, ()
        return attach(output, slots, balance.plan)

    def _compute_slots(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Run the inner experts' own forward pass on the slots' weights."""
        inner, plan = self.inner_experts, self.balance.plan
        own = {name: _local(one) for name, one in inner.named_parameters(recurse=False)}
        for name, one in own.items():
            if len(one) != plan.n_local:
                raise ValueError(f"{name} must hold {plan.n_local} whole experts, got {len(one)}")
        originals = list(own.values())
        self._slots = slots = stack_slots(plan, originals, reuse_gradients=True)
        view = _View(inner, dict(zip(own, slots, strict=True)))
        with keep_redundant_rows(plan, originals, slots):
            return type(inner).forward(view, x, counts)


class _View:
    """A module with other weights: what its forward pass reads, and nothing that it could write."""

    def __init__(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        self.__dict__.update(weights, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part, as torchtitan's own experts do."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def find_balances(modules: Iterable[nn.Module]) -> list[LayerBalance]:
    """Return what balances the layers of these model parts, in their order."""
    found = [one for part in modules for one in part.modules() if isinstance(one, BalancedExperts)]
    return [one.balance for one in found if one.balance is not None]


class RebalancingOptimizers(OptimizersContainer):
    """torchtitan's optimizers; after every so many steps, copies are chosen anew."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        every: int = 100
        """Optimizer steps from one choice to the next."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        super().__init__(config, model_parts=model_parts)
        self.every, self.steps_done, self.due = config.every, 0, False
        self.register_step_post_hook(self._count_step)

    def _count_step(self, *_: object) -> None:
        self.steps_done += 1
        self.due = self.due or self.steps_done % self.every == 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero gradients, as the trainer does before each step, and choose copies if it is time.

        No graph needs the old placement by then, and the last step's imbalance has been reported.
        """
        super().zero_grad(set_to_none=set_to_none)
        if self.due:
            self.due = False
            rebalance_layers(find_balances(self.model_parts))


class ReportingMetrics(MetricsProcessor):
    """torchtitan's metrics with the imbalance of the model's MoE layers."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log as torchtitan does, and the mean imbalance over all layers and EP groups."""
        balances = find_balances(self.model_parts)
        layers = measure_imbalance(balances)
        device = balances[0].device if balances else torch.device(self.parallel_dims.device_type)
        sums = torch.tensor(
            [sum(one.before for one in layers), sum(one.after for one in layers), len(layers)],
            dtype=torch.float32,
            device=device,
        )
        dist.all_reduce(sums)  # the ranks of other EP groups and pipeline stages too
        before, after = (sums[:2] / sums[2].clamp(min=1)).tolist()
        found = {"moe_imbalance/before": before, "moe_imbalance/after": after}
        super().log(
            step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **found}
        )
        logger.info(f"step: {step:2}  MoE imbalance: {before:.3f} before, {after:.3f} after")


class IdSavingAC(SelectiveAC):
    """torchtitan's selective checkpointing, which keeps the balanced ids too."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        """Return torchtitan's operators and the one that solves a batch."""
        return super().get_save_ops() | {torch.ops.lplb_triton.balance.default}


def _check_positive(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


@override(target=RoutedExperts.Config, description="redundant experts, balanced per batch")
def balance(cfg: RoutedExperts.Config, *, redundant: int = 1) -> BalancedExperts.Config:
    return derive(cfg, BalancedExperts.Config, redundant=_check_positive("redundant", redundant))


@override(target=OptimizersContainer.Config, description="copies of experts chosen by load")
def rebalance(cfg: OptimizersContainer.Config, *, every: int = 100) -> RebalancingOptimizers.Config:
    return derive(cfg, RebalancingOptimizers.Config, every=_check_positive("every", every))


@override(target=MetricsProcessor.Config, description="imbalance of MoE layers in the metrics")
def report(cfg: MetricsProcessor.Config) -> ReportingMetrics.Config:
    return derive(cfg, ReportingMetrics.Config)


@override(target=SelectiveAC.Config, description="balanced ids are kept, not solved for again")
def save_ids(cfg: SelectiveAC.Config) -> IdSavingAC.Config:
    return derive(cfg, IdSavingAC.Config)
