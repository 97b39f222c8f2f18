"""Replicas in Megatron-Core's own layers and models, two ranks over gloo."""

import importlib.util
import json

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers import megatron_cpu

if importlib.util.find_spec("megatron") is None or not importlib.util.find_spec("megatron.core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)

REFUSED = {
    "gradient_accumulation_fusion": True,
    "fp8": "e4m3",
    "moe_pad_expert_input_to_capacity": True,
    "delay_wgrad_compute": True,
    "overlap_moe_expert_parallel_comm": True,
    "cuda_graph_impl": "local",
    "transformer_impl": "inference_optimized",
    "moe_token_dispatcher_type": "flex",
}


class Writer:
    """A tensorboard writer that remembers."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, iteration):
        self.scalars.append((name, value, iteration))


def compare(make, run, crowd=False, **slots):
    """Differences from the plain framework's gradients before and after two new placements."""
    from lplb_triton.integrations.megatron import balance

    plain, ours = make(), make()
    for model in (plain, ours):
        for name, parameter in model.named_parameters():
            if "router.weight" in name and crowd:
                with torch.no_grad():
                    parameter.zero_()
                    parameter[:2] = 0.1
    before = dict(ours.named_parameters())
    names = list(ours.state_dict())
    balancing = balance(ours, every=1, **slots)
    assert names == list(ours.state_dict())
    assert all(one is before[name] for name, one in ours.named_parameters())
    rows = []
    for step in range(3):
        worst = megatron_cpu.compare_pass(plain, ours, run, step)
        rows.append({"worst": worst, **balancing.step()})
    return rows


def layer_loss(layer, step):
    return megatron_cpu.run_layer(layer, step)[2]


def crowded_loss(layer, step):
    return megatron_cpu.run_layer(layer, step, offset=4.0)[2]


def list_refusals():
    """What balance says of each setting that it refuses, and of other mistakes."""
    from lplb_triton.integrations.megatron import balance

    found = {}

    def attempt(name, model, **given):
        try:
            balance(model, **given)
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    layer = megatron_cpu.make_layer()
    for name, value in REFUSED.items():
        plain = getattr(layer.config, name)
        setattr(layer.config, name, value)
        attempt(name, layer)
        setattr(layer.config, name, plain)
    layer.experts.forward = layer.experts.forward
    attempt("patched", layer)
    del layer.experts.forward
    attempt("redundant", layer, redundant=0)
    attempt("live", layer, live=3)
    attempt("model", 3)
    balance(layer)
    attempt("twice", layer)
    return found


def log_steps():
    """What a writer gets from calls with the iteration's number, twice each."""
    from lplb_triton.integrations.megatron import balance

    layer, writer = megatron_cpu.make_layer(), Writer()
    balancing = balance(torch.nn.ModuleList([layer]), every=2)
    placed = []
    for iteration in range(5):
        for _ in range(2):
            placed.append(bool(balancing.step(iteration, writer=writer, per_layer_logging=True)))
            layer_loss(layer, iteration).backward()
    return {"placed": placed, "scalars": writer.scalars, "names": list(balancing.layers)}


def change_placement_in_between():
    """What a backward pass says that recomputes a layer after the placement changed."""
    from lplb_triton.integrations.megatron import balance

    layer = megatron_cpu.make_layer(recompute_granularity="selective", recompute_modules=["moe"])
    balancing = balance(layer, every=1)
    loss = layer_loss(layer, 0)
    balancing.step()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def check(rank, group, folder):
    megatron_cpu.start(2)
    results = {
        "layer": compare(megatron_cpu.make_layer, layer_loss),
        "crowded": compare(megatron_cpu.make_layer, crowded_loss, crowd=True),
        "live": compare(megatron_cpu.make_layer, layer_loss, redundant=0, live=1),
        "grouped live": compare(megatron_cpu.make_grouped_layer, layer_loss, live=1),
        "grouped": compare(megatron_cpu.make_grouped_layer, layer_loss),
        "model": compare(megatron_cpu.make_model, megatron_cpu.run_model),
        "refusals": list_refusals(),
        "log": log_steps(),
        "changed": change_placement_in_between(),
    }
    dist.barrier()
    megatron_cpu.stop()
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks found, in one start of the ranks for all tests."""
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks(check, 2, folder, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("what", ["layer", "crowded", "live", "grouped live", "grouped", "model"])
def test_gradients_equal_those_of_plain_megatron_under_every_placement(results, what):
    """Gradients of all parameters in float64 differ by rounding only, also after new placements."""
    for rows in results:
        assert max(row["worst"] for row in rows[what]) < 1e-12
        placed = rows[what][-1]
        assert placed["moe_imbalance_after"] < placed["moe_imbalance_before"]


def test_a_rank_takes_part_where_all_tokens_go_to_one_rank(results):
    """Two experts of one rank get all tokens, and with copies both ranks work."""
    last = results[0]["crowded"][-1]
    assert last["moe_imbalance_before"] == 2
    assert last["moe_imbalance_after"] < 1.3


@pytest.mark.parametrize("name", [*REFUSED, "patched", "redundant", "live", "model", "twice"])
def test_what_cannot_be_balanced_is_refused_by_name(results, name):
    """Each setting that copies can't be had with raises an error that names it, on all ranks."""
    named = {"patched": "experts", "twice": "once"}.get(name, name)
    kind = "TypeError" if name == "model" else "ValueError"
    for one in results:
        assert one["refusals"][name].startswith(kind)
        assert named in one["refusals"][name]


def test_a_step_is_counted_once_by_its_number_and_logged(results):
    """Copies are placed after the first step and every second one, and the writer is told."""
    log = results[0]["log"]
    assert log["placed"] == [False, False, True, False, False, False, True, False, False, False]
    assert log["names"] == ["0"]
    assert [(name, iteration) for name, _, iteration in log["scalars"]] == [
        (name, iteration)
        for iteration in (1, 3)
        for name in (
            "moe_imbalance_before",
            "moe_imbalance_after",
            "moe/imbalance_before_layer_0",
            "moe/imbalance_after_layer_0",
        )
    ]


def test_a_placement_may_not_change_before_a_layer_is_recomputed(results):
    """A backward pass that recomputes under another placement raises on every rank."""
    for one in results:
        assert "the placement changed" in one["changed"]
