"""torchtitan 0.3.0 on CPUs over gloo: shims that its own entry point needs, and a tiny model.

Run by torchrun with torchtitan's own arguments. Settings of tests come by the environment:
``RECORDS`` is a file for a line of JSON per logged step, ``PERTURB`` moves every expert weight by
one unit in the last place before the first step.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.cpu
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

# torchtitan asks for a device as soon as it is imported, so this comes before.
# ruff: noqa: E402
torch._utils._get_available_device_type = lambda: "cpu"

from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import override
from torchtitan.distributed import utils as distributed_utils
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import config_registry
from torchtitan.trainer import Trainer


class Bytes(BaseTokenizer):
    """A tokenizer, which torchtitan wants to have; the data below are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, **_):
        super().__init__()
        self.eos_id = 0

    def encode(self, text, **_):
        return list(text.encode())

    def decode(self, tokens, **_):
        return bytes(tokens).decode()

    def get_vocab_size(self):
        return 256


class Bigrams(BaseDataLoader):
    """Pairs of tokens, frequent ones more often, so that experts get uneven loads."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_rank, seq_len, local_batch_size, **_):
        self.generator = torch.Generator().manual_seed(dp_rank)
        self.shape, self.drawn, self.skipped = (local_batch_size, seq_len + 1), 0, 0
        # Ranks see other tokens, so that EP groups have loads of their own.
        self.shift = 50 * dp_rank

    def __iter__(self):
        while True:
            self.drawn += 1
            drawn = torch.rand(self.shape, generator=self.generator) ** 3 * 200
            tokens = (drawn.long() + self.shift) % 200
            tokens[:, 1::2] = (tokens[:, 0:-1:2] * 7 + 3) % 200
            if self.drawn <= self.skipped:
                continue
            positions = torch.arange(self.shape[1] - 1).expand(self.shape[0], -1)
            inputs = {"input": tokens[:, :-1].contiguous(), "positions": positions.contiguous()}
            yield inputs, tokens[:, 1:].contiguous()

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.skipped = state["drawn"]


def tiny():
    """DeepSeek-V3 as torchtitan debugs it, with two layers of experts instead of five."""
    config = config_registry.deepseek_v3_debugmodel()
    config.model_spec.model.layers = config.model_spec.model.layers[:3]
    config.tokenizer, config.dataloader = Bytes.Config(), Bigrams.Config()
    config.training.local_batch_size, config.training.seq_len = 2, 64
    config.training.disable_cuda_graphs = True
    config.training.mixed_precision_param = "float32"
    config.optimizer.implementation = "for-loop"
    config.debug.seed = 1
    return config


@override(target=FlexAttention.Config, description="flexible attention needs a compiler")
def plain_attention(cfg):
    return ScaledDotProductAttention.Config(
        param_init=cfg.param_init, sharding_config=cfg.sharding_config
    )


def apply_shims():
    """Give torchtitan what it asks of a GPU, and compute in float32 where it would in bfloat16."""
    torch.cpu.get_device_name = lambda *_: "cpu"
    properties = type("Properties", (), {"total_memory": 1 << 34})()
    torch.cpu.get_device_properties = lambda *_: properties
    torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda *_: None
    torch.cpu.memory_stats = lambda *_: {}
    torch.Tensor.bfloat16 = torch.Tensor.float
    # gloo knows no timeouts to set later, and no sums that are multiplied first.
    distributed_utils.set_pg_timeouts = lambda *_, **__: None
    set_factor = FSDPModule.set_gradient_divide_factor

    def sum_only(self, factor):
        set_factor(self, factor)
        self.set_force_sum_reduction_for_comms(True)

    FSDPModule.set_gradient_divide_factor = sum_only


def describe_balance(parts):
    """Return what a test wants to know of the layers that are balanced, of this rank."""
    balances = [one.balance for part in parts for one in part.modules() if hasattr(one, "balance")]
    return [
        {
            "load": int(one.load.sum()),
            "solves": int(one.balancer.solves),
            "phy2log": one.placement.phy2log.flatten().tolist(),
        }
        for one in balances
    ]


def record_steps(path):
    """Write what torchtitan logs to a file, a line of each rank and step."""
    log = MetricsProcessor.log

    def log_and_record(self, step, average, largest, norm, extra_metrics=None):
        log(self, step, average, largest, norm, extra_metrics)
        found = {"step": step, "loss": average, "norm": norm, **(extra_metrics or {})}
        found["layers"] = describe_balance(self.model_parts)
        with Path(f"{path}.{dist.get_rank()}").open("a") as file:
            file.write(json.dumps(found) + "\n")

    MetricsProcessor.log = log_and_record


def perturb_weights():
    """Have the trainer move expert weights by one unit in the last place before it starts."""
    train = Trainer.train

    def perturb_and_train(self):
        with torch.no_grad():
            for name, parameter in self.model_parts[0].named_parameters():
                if "inner_experts" in name:
                    local = parameter.to_local()
                    local.copy_(torch.nextafter(local, local + torch.randn_like(local)))
        return train(self)

    Trainer.train = perturb_and_train


if __name__ == "__main__":
    from torchtitan.train import main

    torch.set_num_threads(1)
    apply_shims()
    record_steps(os.environ["RECORDS"])
    if os.environ.get("PERTURB"):
        perturb_weights()
    sys.path.insert(0, str(Path(__file__).parent))
    main()
