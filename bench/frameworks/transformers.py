"""Hugging Face's transformers: a DeepSeek-V3 of few layers, FSDP beside expert parallelism."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

import lplb_triton.integrations.transformers as lplb
from lplb_triton.bench.frameworks.model import Framework, Trained
from lplb_triton.bench.frameworks.ranks import Ranks
from lplb_triton.bench.frameworks.sizes import Sizes
from lplb_triton.bench.options import UsageError
from lplb_triton.integrations._transformers_experts import find_layers
from lplb_triton.integrations.layers import LayerBalance

__all__ = ["Transformers"]

SEED = 0
# Longest sequence, and width of an attention head.
SEQUENCE, HEAD = 4096, 128


class _Model(Trained):
    """A causal language model."""

    def __init__(self, model: Any, balanced: bool, learning_rate: float, on_gpu: bool) -> None:
        self._model, self._balanced = model, balanced
        self.moe_layers: list[Any] = [layer.mlp for layer in model.model.layers]
        self.routers: list[Any] = [layer.gate for layer in self.moe_layers]
        self.biases = [router.e_score_correction_bias for router in self.routers]
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, fused=True if on_gpu else None
        )

    @property
    def balances(self) -> list[LayerBalance]:
        """The balances of layers that have run."""
        found = find_layers(self._model).values() if self._balanced else ()
        return [layer.balance for layer in found if layer.balance is not None]

    def compute_loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Predict tokens."""
        loss: torch.Tensor = self._model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def update(self) -> None:
        """Step; FSDP has reduced the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def count_choices(self, output: Any) -> torch.Tensor:
        """Count the router's choices ``[tokens, top_k]``."""
        experts = output[2].reshape(-1)
        n_experts = len(self.biases[0])
        counts = torch.zeros(n_experts, dtype=torch.int64, device=experts.device)
        return counts.scatter_add_(0, experts, torch.ones_like(experts))


class Transformers(Framework):
    """Builds models from a temporary checkpoint; EP and FSDP over all ranks."""

    def __init__(self, sizes: Sizes, ranks: Ranks) -> None:
        super().__init__(sizes, ranks)
        if sizes.tokens > SEQUENCE and sizes.tokens % SEQUENCE:
            raise UsageError(
                f"argument --tokens: above {SEQUENCE} expected a multiple of it, got {sizes.tokens}"
            )
        lplb.register("lplb", redundant=sizes.redundant)
        # Every model is loaded from a checkpoint, whose bars would stand between the tables.
        logging.disable_progress_bar()
        self._sequence = min(SEQUENCE, sizes.tokens)
        self._config = self._make_config()
        # Rank 0 of each host saves a checkpoint, and the others of the host read it.
        self._own: str | None = None
        if ranks.local_rank == 0:
            self._own = tempfile.mkdtemp(prefix="lplb-bench-")
            torch.manual_seed(SEED)
            with torch.device(ranks.device):
                model = AutoModelForCausalLM.from_config(self._config, dtype=self.dtype)
            with torch.no_grad():
                # Else attention's output, which is nearly the same for all tokens, would drown the
                # embeddings, and all tokens would choose the same experts.
                model.get_input_embeddings().weight.mul_(sizes.hidden**0.5)
            model.save_pretrained(self._own)
            del model
        folders: list[Any] = [None] * ranks.size
        dist.all_gather_object(folders, self._own)
        self._folder = folders[ranks.rank - ranks.local_rank]

    def _make_config(self) -> Any:
        sizes = self.sizes
        head = min(HEAD, sizes.hidden // 2)
        heads = sizes.hidden // head
        return DeepseekV3Config(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.expert_hidden,
            moe_intermediate_size=sizes.expert_hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            n_routed_experts=sizes.experts,
            num_experts_per_tok=sizes.top_k,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            q_lora_rank=None,
            kv_lora_rank=sizes.hidden // 4,
            qk_rope_head_dim=head // 2,
            qk_nope_head_dim=head,
            v_head_dim=head,
            initializer_range=sizes.hidden**-0.5,
            max_position_embeddings=self._sequence,
        )

    def build(self, method: str) -> Trained:
        """Load the checkpoint; ``none`` is transformers' own all-to-all."""
        balanced = method != "none"
        model = AutoModelForCausalLM.from_pretrained(
            self._folder,
            dtype=self.dtype,
            experts_implementation="grouped_mm",
            distributed_config=DistributedConfig(
                ep_size=self.ranks.size,
                fsdp_size=self.ranks.size,
                ep_implementation="lplb" if balanced else "all_to_all",
            ),
        )
        return _Model(model.train(), balanced, self.sizes.learning_rate, self.ranks.on_gpu)

    def make_batch(self, number: int) -> torch.Tensor:
        """Make tokens ``[sequences, length]`` int64."""
        shape = (self.sizes.tokens // self._sequence, self._sequence)
        generator = self.make_generator(number)
        return torch.randint(
            self.sizes.vocab, shape, generator=generator, dtype=torch.int64,
            device=self.ranks.device,
        )  # fmt: skip

    def close(self) -> None:
        """Delete the checkpoint."""
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
