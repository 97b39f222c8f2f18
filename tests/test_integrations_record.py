"""Recording models of transformers: counts of every pass, what is left out, and refusals."""

import logging
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo import context
from torch import nn

from lplb_triton.traces.record import merge, rank_path
from lplb_triton.traces.trace import load

transformers = pytest.importorskip("transformers", minversion="5.24")
record = pytest.importorskip("lplb_triton.integrations.transformers").record

TOP_K, EXPERTS, LAYERS = 2, 8, 2
SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=TOP_K,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def make_config(kind):
    """Return a configuration of two MoE layers with eight experts, top-2."""
    if kind == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **SMALL, head_dim=8, intermediate_size=64, moe_intermediate_size=16, num_experts=8
        )
    if kind == "mixtral":
        return transformers.MixtralConfig(**SMALL, intermediate_size=16, num_local_experts=8)
    if kind == "gpt_oss":
        return transformers.GptOssConfig(
            **SMALL, head_dim=8, intermediate_size=16, num_local_experts=8,
            layer_types=["full_attention"] * LAYERS,
        )  # fmt: skip
    return transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4, "num_hidden_layers": LAYERS + 1},
        intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8, n_group=2, topk_group=2,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip


def make_model(kind="mixtral"):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(make_config(kind), dtype=torch.float32)


def checkpoint_layers(model, **options):
    """Turn gradient checkpointing on, by the name that this release doesn't warn of."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable = newer or model.gradient_checkpointing_enable
    enable(options or None)


def draw_ids(shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_forward_passes_are_batches(tmp_path, kind):
    """Every forward pass is a batch in which a layer has tokens times top-k, as it routed them."""
    model, seen = make_model(kind), []
    model.model.layers[-1].mlp.experts.register_forward_pre_hook(
        lambda module, args: seen.append(args[1].flatten().bincount(minlength=EXPERTS))
    )
    with record(model, tmp_path / "t.npz", meta={"run": 7}) as recorder:
        for seed in range(3):
            model(input_ids=draw_ids((2, 16), seed))
    trace = load(recorder.path)
    assert trace.counts.shape == (3, LAYERS, 1, EXPERTS) and trace.steps.tolist() == [0, 1, 2]
    assert (trace.counts.sum(-1) == 2 * 16 * TOP_K).all()
    assert trace.counts[:, -1, 0].tolist() == [row.tolist() for row in seen]
    assert trace.meta["top_k"] == TOP_K and trace.meta["run"] == 7
    assert (trace.meta["hidden"], trace.meta["inner"]) == (32, 16)
    assert trace.meta["layer_names"] == list(recorder.layers) and len(recorder.layers) == LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_count_once(tmp_path, reentrant):
    """A training step under gradient checkpointing counts each token once, and hooks leave."""
    model = make_model().train()
    calls = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_layers(model, use_reentrant=reentrant)
    recorder = record(model, tmp_path / "t.npz")
    ids = draw_ids((2, 16))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    recorder.close()
    recorder.close()
    # The layers did run twice in each step.
    assert len(calls) == 4
    model(input_ids=ids)
    counts = load(tmp_path / "t.npz").counts
    assert counts.shape[0] == 2 and (counts.sum(-1) == 2 * 16 * TOP_K).all()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_generated_tokens_are_batches(tmp_path):
    """In `generate` the prompt is one batch and every further token another."""
    model = make_model().eval()
    with record(model, tmp_path / "t.npz"):
        model.generate(draw_ids((3, 5)), max_new_tokens=4, do_sample=False)
    sums = load(tmp_path / "t.npz").counts.sum(-1)[:, :, 0]
    assert sums.tolist() == [[3 * 5 * TOP_K] * LAYERS] + [[3 * TOP_K] * LAYERS] * 3


def test_compiled_layers_are_counted(tmp_path):
    """Passes of a compiled model count as those of the model itself do."""
    model = make_model()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with record(model, tmp_path / "t.npz"), torch.no_grad():
        for seed in range(3):
            model(input_ids=draw_ids((2, 16), seed))
    counts = load(tmp_path / "t.npz").counts
    assert counts.shape[0] == 3 and (counts.sum(-1) == 2 * 16 * TOP_K).all()


def test_a_failed_pass_is_left_out(tmp_path):
    """A forward pass that raises between two layers counts nowhere; those around it do."""
    model = make_model()
    with record(model, tmp_path / "t.npz") as recorder:
        model(input_ids=draw_ids((1, 4)))
        broken = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 // 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(input_ids=draw_ids((1, 6)))
        broken.remove()
        model(input_ids=draw_ids((1, 8)))
        recorder.save()
    sums = load(tmp_path / "t.npz").counts.sum(-1)[:, :, 0]
    assert sums.tolist() == [[4 * TOP_K] * LAYERS, [8 * TOP_K] * LAYERS]


def test_an_error_in_the_block_keeps_what_was_recorded(tmp_path, caplog):
    """After an error within a pass the file has the passes before it, and the hooks are gone."""
    model = make_model()
    caplog.set_level(logging.WARNING)
    with pytest.raises(ZeroDivisionError), record(model, tmp_path / "t.npz"):
        model(input_ids=draw_ids((1, 4)))
        model.model.layers[1].register_forward_pre_hook(lambda *_: 1 // 0)
        model(input_ids=draw_ids((1, 6)))
    assert load(tmp_path / "t.npz").counts.sum() == 4 * TOP_K * LAYERS
    assert "has 1 batches" in caplog.text and not model._forward_hooks


def test_wrong_models_are_refused(tmp_path):
    """What is no model, has no experts, or unequal layers, is refused with the layer's name."""
    path = tmp_path / "t.npz"
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        record("model", path)
    with pytest.raises(ValueError, match=r"model \(Linear\) has no experts module"):
        record(nn.Linear(2, 2), path)
    model = make_model()
    model.model.layers[1].mlp.experts.num_experts = 4
    with pytest.raises(ValueError, match=r"layers.0.*has 8, .*layers.1.*experts has 4"):
        record(model, path)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="layers.0.mlp.experts is expert-parallel and called with"):
        record(model, path)


def test_wrong_calls_are_refused(tmp_path):
    """Calls around the recorded module, and ids that are no integers, raise naming the layer."""
    model = make_model()
    recorder = record(model, tmp_path / "t.npz")
    with pytest.raises(RuntimeError, match="layers.0.mlp.experts was called outside"):
        model.model(input_ids=draw_ids((1, 4)))
    name = "model.layers.0.mlp.experts"
    broken = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: (args[0], args[1].float(), args[2]), prepend=True
    )
    with pytest.raises(TypeError, match=rf"{name} .* must be called as .* got torch.float32"):
        model(input_ids=draw_ids((1, 4)))
    broken.remove()
    model(input_ids=draw_ids((1, 4)))
    recorder.close()
    assert load(tmp_path / "t.npz").counts.sum() == 4 * TOP_K * LAYERS


def record_expert_parallel(rank, folder):
    """Record one training step with two ranks' own batches, and one pass of a shared batch."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    from transformers.distributed.configuration_utils import DistributedConfig

    for name, sizes in (("own", {"fsdp_size": 2}), ("shared", {"tp_size": 2})):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model",
            dtype=torch.float32,
            distributed_config=DistributedConfig(ep_size=2, **sizes),
        )
        ids = draw_ids((1, 5 + rank if name == "own" else 5), rank if name == "own" else 3)
        with record(model, folder / f"{name}.npz"):
            if name == "own":
                checkpoint_layers(model)
                model.train()(input_ids=ids, labels=ids).loss.backward()
            else:
                model(input_ids=ids)
    dist.barrier()
    dist.destroy_process_group()
    # The model's meshes keep groups, whose threads would free tensors while the interpreter ends,
    # which can abort (pytorch/pytorch issue 190489).
    os._exit(0)


def test_expert_parallel_ranks_record_their_own_tokens(tmp_path):
    """Two ranks record what one would count of each one's tokens, and share a shared batch."""
    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    context()
    mp.start_processes(record_expert_parallel, (tmp_path,), 2, start_method="forkserver")
    merged = {
        name: merge([rank_path(tmp_path / f"{name}.npz", rank) for rank in range(2)])
        for name in ("own", "shared")
    }
    with record(model, tmp_path / "whole.npz"):
        for rank in range(2):
            model(input_ids=draw_ids((1, 5 + rank), rank))
        model(input_ids=draw_ids((1, 5), 3))
    whole = load(tmp_path / "whole.npz").counts
    assert merged["own"].counts[0, :, 0].tolist() == whole[0, :, 0].tolist()
    assert merged["own"].counts[0, :, 1].tolist() == whole[1, :, 0].tolist()
    assert merged["shared"].counts[0].sum(1).tolist() == whole[2, :, 0].tolist()
    assert merged["shared"].counts[0].sum(-1).tolist() == [[3 * TOP_K, 2 * TOP_K]] * LAYERS
