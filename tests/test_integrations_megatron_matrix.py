"""Replicas in Megatron-Core with its other settings: EP groups, recompute, optimizers, capacity."""

import importlib.util
import json
import os

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers import megatron_cpu

if importlib.util.find_spec("megatron") is None or not importlib.util.find_spec("megatron.core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(
        os.environ.get("LPLB_TEST_INTEGRATIONS") != "1",
        reason="takes minutes: set LPLB_TEST_INTEGRATIONS=1",
    ),
]

LAYERS = {
    "plain": {},
    "two slots": {"redundant": 2},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "capacity": {"moe_expert_capacity_factor": 0.8},
    "capacity by position": {
        "moe_expert_capacity_factor": 1.0,
        "moe_token_drop_policy": "position",
    },
    "shared expert": {"moe_shared_expert_intermediate_size": 24},
    "overlapped shared expert": {
        "moe_shared_expert_intermediate_size": 24,
        "moe_shared_expert_overlap": True,
    },
    "bias": {"add_bias_linear": True, "bias_dropout_fusion": False},
    "top-1 on input": {
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_apply_probs_on_input": True,
    },
    "recomputed layer": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "expert bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",
    },
}
MODELS = {
    "recomputed model": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recomputed layers": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}
TRAININGS = {
    "plain": {},
    "overlapped reduction": {"overlap_grad_reduce": True},
    "overlapped gathering": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "wrapped before": {"wrapped_before": True},
}


def layer_loss(layer, step):
    return megatron_cpu.run_layer(layer, step)[2]


def compare(make, run, redundant=1, **settings):
    """Differences from the plain framework's gradients under three placements; tokens counted."""
    from lplb_triton.integrations.megatron import balance

    plain, ours = make(**settings), make(**settings)
    balancing = balance(ours, redundant, every=1)
    rows = []
    for step in range(3):
        worst = megatron_cpu.compare_pass(plain, ours, run, step)
        counted = [int(layer.load.sum()) for layer in balancing.layers.values()]
        rows.append({"worst": worst, "counted": counted, **balancing.step()})
    return rows


def compare_in_flight():
    """The same where three forward passes run before their backward passes."""
    from lplb_triton.integrations.megatron import balance

    plain, ours = megatron_cpu.make_model(), megatron_cpu.make_model()
    balancing = balance(ours, every=1)
    worst = []
    for step in range(2):
        for model in (plain, ours):
            model.zero_grad()
            losses = [megatron_cpu.run_model(model, 3 * step + i) for i in range(3)]
            for loss in losses:
                loss.backward()
        worst.append(
            megatron_cpu.worst_difference(
                megatron_cpu.gradients(plain), megatron_cpu.gradients(ours)
            )
        )
        balancing.step()
    return worst


def train(balanced, steps=50, wrapped_before=False, **settings):
    """Losses and gradient norms of steps with DDP and the distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from lplb_triton.integrations.megatron import balance

    model = megatron_cpu.make_model(torch.float32)
    balancing = balance([model], every=10) if balanced and not wrapped_before else None
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            **{"overlap_grad_reduce": False, **settings},
        ),
        model,
    )
    if balanced and wrapped_before:
        balancing = balance([ddp], every=10)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            use_distributed_optimizer=True,
            clip_grad=1.0,
            bf16=False,
            overlap_param_gather=settings.get("overlap_param_gather", False),
        ),
        [ddp],
    )
    rows = []
    for step in range(steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        with ddp.no_sync():
            megatron_cpu.run_model(ddp, 2 * step).backward()
        loss = megatron_cpu.run_model(ddp, 2 * step + 1)
        loss.backward()
        ddp.finish_grad_sync()
        _, norm, _ = optimizer.step()
        if balancing:
            balancing.step()
        rows.append([float(loss), float(norm)])
    return rows


def list_entries(model):
    """What a distributed checkpoint would write of a model: each part's place, and its numbers."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return [
        (part.key, part.global_shape, part.global_offset, part.replica_id, part.data)
        for part in nested_values(state)
        if isinstance(part, ShardedTensor)
    ]


def compare_checkpoints():
    """Whether checkpoints have the same entries, and load into a model without replicas."""
    from lplb_triton.integrations.megatron import balance

    plain, ours = megatron_cpu.make_model(torch.float32), megatron_cpu.make_model(torch.float32)
    balance(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    plain.load_state_dict(ours.state_dict())
    rows = list(zip(list_entries(plain), list_entries(ours), strict=True))
    return {
        "parts": len(rows),
        "same places": all(a[:-1] == b[:-1] for a, b in rows),
        "same numbers": all(torch.equal(a[-1], b[-1]) for a, b in rows),
    }


def check(rank, group, folder, expert_parallel):
    megatron_cpu.start(expert_parallel)
    results = {"layers": {}, "models": {}, "trainings": {}}
    for name, settings in LAYERS.items():
        results["layers"][name] = compare(megatron_cpu.make_layer, layer_loss, **settings)
    results["layers"]["grouped"] = compare(megatron_cpu.make_grouped_layer, layer_loss)
    results["layers"]["grouped, two slots"] = compare(
        megatron_cpu.make_grouped_layer,
        layer_loss,
        redundant=2,
        add_bias_linear=False,
    )
    for name, settings in MODELS.items():
        results["models"][name] = compare(
            megatron_cpu.make_model, megatron_cpu.run_model, **settings
        )
    results["in flight"] = compare_in_flight()
    for name, settings in TRAININGS.items():
        steps = 50 if name == "plain" else 12
        results["trainings"][name] = [train(kind, steps, **settings) for kind in (False, True)]
    results["checkpoint"] = compare_checkpoints()
    dist.barrier()
    megatron_cpu.stop()
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module", params=[(2, 2), (4, 4), (4, 2)], ids=lambda p: f"{p[0]} EP{p[1]}")
def results(request, tmp_path_factory):
    """What all ranks found, in one start of the ranks for all tests."""
    ranks, expert_parallel = request.param
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks(check, ranks, folder, folder, expert_parallel)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [*LAYERS, "grouped", "grouped, two slots"])
def test_gradients_of_a_layer_equal_those_of_plain_megatron(results, name):
    """In float64 they differ by rounding only, with each setting and under three placements."""
    for one in results:
        assert max(row["worst"] for row in one["layers"][name]) < 1e-12


@pytest.mark.parametrize("name", [*MODELS])
def test_gradients_of_a_recomputed_model_equal_and_tokens_count_once(results, name):
    """Recomputing repeats the exchange, but the loads stay those of one forward pass."""
    for one in results:
        for row in one["models"][name]:
            assert row["worst"] < 1e-12
            assert row["counted"] == [2 * 16 * 2] * 2


def test_capacity_drops_tokens_before_they_are_counted(results):
    """Choices beyond an expert's capacity have no slot, and no load."""
    for one in results:
        assert all(row["counted"][0] < 24 * 2 * 2 for row in one["layers"]["capacity"])


def test_several_forward_passes_may_run_before_their_backward_passes(results):
    """As in a pipeline, each micro-batch's graph keeps its own copies."""
    for one in results:
        assert max(one["in flight"]) < 1e-12


@pytest.mark.parametrize("name", [*TRAININGS])
def test_training_with_the_distributed_optimizer_gives_the_same_losses(results, name):
    """Losses and gradient norms of 50 steps (12 of the variants) agree to float32 noise."""
    for one in results:
        plain, ours = torch.tensor(one["trainings"][name])
        assert plain[-1, 0] < plain[0, 0]
        torch.testing.assert_close(ours, plain, rtol=2e-4, atol=1e-5)


def test_distributed_checkpoints_are_those_of_plain_megatron(results):
    """Saving with replicas writes what saving without does, at the same places."""
    for one in results:
        assert one["checkpoint"]["parts"] > 20
        assert one["checkpoint"]["same places"]
        assert one["checkpoint"]["same numbers"]
