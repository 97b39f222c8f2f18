"""Trains small models of transformers on the ranks of a gloo group; one rank of it.

Started by tests/helpers/transformers_runs.py with RANK and WORLD_SIZE set and the path of a folder,
in which ``spec.json`` says what to run and rank 0 leaves ``results.pt``.
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import gather_full_state_dict

import lplb_triton.integrations.transformers as lplb
from lplb_triton.integrations._transformers_experts import find_layers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
MODELS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, head_dim=8, intermediate_size=64, moe_intermediate_size=16, num_experts=8
    ),
    "mixtral": lambda: MixtralConfig(**SMALL, intermediate_size=16, num_local_experts=8),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        intermediate_size=64,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL,
        head_dim=8,
        intermediate_size=16,
        num_local_experts=8,
        layer_types=["full_attention"] * 2,
    ),
}


def make_tokens(rank, step):
    """Token ids [2, 24] of one rank's batch; small ones are common, so that routing is uneven."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return (torch.rand(2, 24, generator=generator) ** 3 * 64).long()


def load_model(folder, spec, run):
    """Load the model in its layout, with one rounding error in each weight if the run wants it."""
    lplb.register(live=run.get("live", 0))
    model = AutoModelForCausalLM.from_pretrained(
        folder / run.get("load", run["model"]),
        dtype=getattr(torch, run.get("dtype", "float32")),
        experts_implementation=run.get("experts", "grouped_mm"),
        distributed_config=DistributedConfig(**spec["layout"], ep_implementation=run["ep"]),
    )
    if run.get("perturbed"):
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                signs = torch.randn(local.shape, generator=torch.Generator().manual_seed(i)).sign()
                local.mul_(1 + 2**-23 * signs)
    if run.get("frozen"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" not in name)
    if run.get("checkpointing"):
        reentrant = run["checkpointing"] == "reentrant"
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def train(model, spec, run):
    """Train by a plain loop and return losses, averaged over the ranks, and imbalances."""
    batch = dist.get_rank() // spec["layout"].get("tp_size", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    micro, losses, found = run.get("micro_batches", 1), [], []
    for step in range(run.get("steps", 20)):
        loss = 0.0
        # All forward passes come before the first backward pass, as in a pipeline.
        for i in range(micro):
            ids = make_tokens(batch, micro * step + i)
            loss = loss + model(input_ids=ids, labels=ids).loss / micro
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        if run["ep"] == "lplb" and (step + 1) % run.get("rebalance", 4) == 0:
            measured = lplb.measure_imbalance(model)
            found.append({name: tuple(one) for name, one in measured.items()})
            lplb.rebalance(model)
    return losses, found


class Batches(torch.utils.data.Dataset):
    """Sequences in an order that gives every rank its own."""

    def __len__(self):
        """Return the number of sequences."""
        return 256

    def __getitem__(self, i):
        """Return a sequence with its labels."""
        ids = make_tokens(0, i)[0]
        return {"input_ids": ids, "labels": ids}


def train_by_trainer(model, folder, run):
    """Train by transformers' Trainer, and return the losses and imbalances of its log."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        max_steps=run.get("steps", 20),
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [lplb.Rebalance(every=run.get("rebalance", 4))] if run["ep"] == "lplb" else []
    trainer = Trainer(model=model, args=arguments, train_dataset=Batches(), callbacks=callbacks)
    trainer.train()
    steps = [one for one in trainer.state.log_history if "loss" in one]
    keys = ("imbalance_before", "imbalance_after")
    found = [tuple(one[key] for key in keys) for one in steps if keys[0] in one]
    return [one["loss"] for one in steps], found


def evaluate(model):
    """Return the loss of a batch that all ranks share, in evaluation mode and without a graph."""
    ids = make_tokens(0, 10**6)
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


def count_slots(model, ep_size):
    """Return how many tensors with the weights of all slots are alive, apart from parameters."""
    parameters = [one for name, one in model.named_parameters() if ".experts." in name]
    shapes = {(len(one) // ep_size + 1, *one.shape[1:]) for one in parameters}
    gc.collect()
    return sum(type(one) is torch.Tensor and one.shape in shapes for one in gc.get_objects())


def place_by_loads(model):
    """Place copies by given loads before and after the first pass; return what each led to."""
    layers, found = find_layers(model), []
    for hot in (7, 1):
        load = torch.ones(len(layers), 8)
        load[:, hot] = 100
        lplb.rebalance(model, load)
        evaluate(model)
        found.append([one.balance.placement.phy2log.tolist() for one in layers.values()])
    for load in (torch.ones(8), [1.0] * 8):
        try:
            lplb.rebalance(model, load)
        except (TypeError, ValueError) as error:
            found.append(str(error))
    model.train()
    return found


def carry_out(folder, spec, run):
    """Carry out one run and return what the tests look at."""
    model = load_model(folder, spec, run)
    placed = place_by_loads(model) if run.get("given") else None
    if run.get("trainer"):
        losses, imbalances = train_by_trainer(model, folder, run)
    else:
        losses, imbalances = train(model, spec, run)
    result = {
        "losses": losses,
        "imbalances": imbalances,
        "evaluated": evaluate(model),
        "placed": placed,
    }
    result["local"] = {
        name: (tuple(one.shape), tuple(one.to_local().shape))
        for name, one in model.named_parameters()
        if hasattr(one, "to_local")
    }
    n_slots = 8 // spec["layout"]["ep_size"] + 1
    result["extended"] = {
        name: one.to_local().untyped_storage().nbytes() == n_slots * one[0].numel() * one.itemsize
        for name, one in model.named_parameters()
        if ".experts." in name
    }
    result["held"] = count_slots(model, spec["layout"]["ep_size"])
    if "save" in run:
        model.save_pretrained(folder / run["save"])
        dist.barrier()
    if spec["layout"].get("fsdp_size", 1) > 1:
        state = gather_full_state_dict(model)
    else:
        state = {
            name: (one.full_tensor() if hasattr(one, "full_tensor") else one).clone()
            for name, one in model.state_dict().items()
        }
    result["state"] = state
    return result


def main():
    """Carry out all runs of the spec."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    spec = json.loads((folder / "spec.json").read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    if rank == 0:
        for name in {run["model"] for run in spec["runs"].values()}:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)
            model.save_pretrained(folder / name)
    dist.barrier()
    warnings.simplefilter("error")
    results = {name: carry_out(folder, spec, run) for name, run in spec["runs"].items()}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
