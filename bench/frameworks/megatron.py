"""Megatron-Core: MoE layers with residuals, DDP and the distributed optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lplb_triton.bench.frameworks.model import Framework, Trained
from lplb_triton.bench.frameworks.ranks import Ranks
from lplb_triton.bench.frameworks.sizes import Sizes
from lplb_triton.bench.options import UsageError
from lplb_triton.integrations._megatron_checks import import_megatron
from lplb_triton.integrations.layers import LayerBalance
from lplb_triton.integrations.megatron import Balancing, balance

__all__ = ["MegatronCore"]

SEED = 1


class _Layers(Trained):
    """MoE layers that were wrapped for data parallelism."""

    def __init__(
        self, ddp: Any, optimizer: Any, layers: Sequence[Any], balancing: Balancing | None
    ) -> None:
        self._ddp, self._optimizer, self._balancing = ddp, optimizer, balancing
        self.moe_layers = layers
        self.routers: list[Any] = [layer.router for layer in layers]
        self.biases = [router.expert_bias for router in self.routers]

    @property
    def balances(self) -> list[LayerBalance]:
        """The layers' balances."""
        return [] if self._balancing is None else list(self._balancing.layers.values())

    def compute_loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Have the model tell the next component from each component of its input."""
        output = self._ddp(batch.requires_grad_(torch.is_grad_enabled()))
        loss: torch.Tensor = (output.float() - batch.detach().float().roll(1, -1)).square().mean()
        return loss

    def update(self) -> None:
        """Reduce the gradients, and step."""
        self._ddp.finish_grad_sync()
        self._optimizer.step()
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()

    def count_choices(self, output: Any) -> torch.Tensor:
        """Add up the router's map ``[tokens, experts]``."""
        counts: torch.Tensor = output[1].sum(0)
        return counts


class MegatronCore(Framework):
    """Builds layers with ``SequentialMLP`` and the all-to-all; EP over all ranks."""

    def __init__(self, sizes: Sizes, ranks: Ranks) -> None:
        super().__init__(sizes, ranks)
        _check_device(ranks)
        moe_utils = import_megatron("transformer.moe.moe_utils")
        # Release 0.16.1 reads this name also where there is no Transformer Engine to import it of.
        vars(moe_utils).setdefault("te_general_gemm", None)
        import_megatron("parallel_state").initialize_model_parallel(
            expert_model_parallel_size=ranks.size
        )
        import_megatron("tensor_parallel.random").model_parallel_cuda_manual_seed(SEED)
        self._config = self._make_config()
        # Weights of the first model, which the others get.
        self._weights: list[torch.Tensor] | None = None

    def _make_config(self) -> Any:
        sizes = self.sizes
        return import_megatron("transformer.transformer_config").TransformerConfig(
            num_layers=sizes.layers,
            hidden_size=sizes.hidden,
            num_attention_heads=1,
            ffn_hidden_size=sizes.expert_hidden,
            moe_ffn_hidden_size=sizes.expert_hidden,
            num_moe_experts=sizes.experts,
            moe_router_topk=sizes.top_k,
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type="none",
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_dtype="fp32",
            moe_grouped_gemm=False,
            expert_model_parallel_size=self.ranks.size,
            # What experts add is about as large as what they are given.
            init_method_std=sizes.hidden**-0.5,
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=nn.functional.silu,
            bias_activation_fusion=False,
            use_cpu_initialization=not self.ranks.on_gpu,
            params_dtype=self.dtype,
            bf16=self.dtype == torch.bfloat16,
            gradient_accumulation_fusion=False,
        )

    def build(self, method: str) -> Trained:
        """Build layers; ``none`` leaves them as they are."""
        stack = _make_stack(self._config)
        stack.to(self.ranks.device, self.dtype)
        with torch.no_grad():
            for layer in stack.layers:
                # The router would make it float32 again in its first forward pass.
                layer.router.expert_bias.data = layer.router.expert_bias.float()
            self._copy_weights(stack)
        balancing = None if method == "none" else balance(stack, self.sizes.redundant)
        distributed, optimizers = import_megatron("distributed"), import_megatron("optimizer")
        ddp = distributed.DistributedDataParallel(
            self._config,
            distributed.DistributedDataParallelConfig(
                use_distributed_optimizer=True, grad_reduce_in_fp32=True, overlap_grad_reduce=False
            ),
            stack,
        )
        settings = optimizers.OptimizerConfig(
            optimizer="adam",
            lr=self.sizes.learning_rate,
            bf16=self.dtype == torch.bfloat16,
            params_dtype=self.dtype,
            use_distributed_optimizer=True,
        )
        optimizer = optimizers.get_megatron_optimizer(settings, [ddp])
        return _Layers(ddp, optimizer, list(stack.layers), balancing)

    def _copy_weights(self, stack: nn.Module) -> None:
        """Give a model the weights of the first one, whose routers become the same on all ranks."""
        parameters = list(stack.parameters())
        if self._weights is not None:
            for mine, given in zip(parameters, self._weights, strict=True):
                mine.copy_(given)
            return
        for mine in parameters:
            if getattr(mine, "allreduce", True):
                dist.broadcast(mine, src=0)
        self._weights = [one.detach().clone() for one in parameters]

    def make_batch(self, number: int) -> torch.Tensor:
        """Make hidden states ``[tokens, 1, hidden]``."""
        shape = (self.sizes.tokens, 1, self.sizes.hidden)
        generator = self.make_generator(number)
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device=self.ranks.device)
        return x.to(self.dtype)

    def close(self) -> None:
        """Let go of Megatron's process groups."""
        import_megatron("parallel_state").destroy_model_parallel()


def _check_device(ranks: Ranks) -> None:
    """Raise an error unless the device is the one on which Megatron-Core makes its tensors."""
    try:
        found = torch.empty(0, device=torch.cuda.current_device()).device.type
    except (AssertionError, RuntimeError) as error:
        raise UsageError(f"argument --framework: megatron-core needs a GPU: {error}") from error
    if found != ranks.device.type:
        raise UsageError(
            f"argument --device: megatron-core makes tensors on {found}, so its models can't be "
            f"on {ranks.device.type}"
        )


def _make_stack(config: Any) -> Any:
    """Make MoE layers with residuals, and nothing else."""
    layers = [_make_layer(config, number + 1) for number in range(config.num_layers)]

    # Its base class is Megatron's, which is imported only now.
    class Stack(import_megatron("transformer.module").MegatronModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(config=config)
            self.layers = nn.ModuleList(layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)[0]
            return x

    return Stack()


def _make_layer(config: Any, number: int) -> Any:
    """Make a layer; releases differ in what stands for a layer's parts."""
    specs = import_megatron("models.gpt.moe_module_specs")
    layer = import_megatron("transformer.moe.moe_layer").MoELayer
    spec = specs.get_moe_module_spec(
        use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False
    )
    takes_parts = "submodules" in inspect.signature(layer.__init__).parameters
    if takes_parts and hasattr(spec, "submodules"):
        return layer(config, spec.submodules, layer_number=number)
    return spec(config, layer_number=number)
