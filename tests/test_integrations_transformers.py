"""The implementation ``"lplb"`` inside transformers, against its plain all-to-all.

Losses of plain and balanced training may differ by four roundings of float32, and weights after
training by twice what they differ by from a run that began with a rounding error in each weight.
"""

import importlib
import sys
import types

import pytest
import torch
from helpers.transformers_runs import run_training

from lplb_triton.integrations._transformers_memory import ExpertMemory

pytest.importorskip("transformers", minversion="5.24")
lplb = importlib.import_module("lplb_triton.integrations.transformers")

LOSS_TOLERANCE = 4 * 2**-23
EP2 = {"ep_size": 2, "fsdp_size": 2}
EP4 = {"ep_size": 4, "fsdp_size": 4}
EP2_FSDP2 = {"ep_size": 2, "fsdp_size": 4}
EP2_TP2 = {"ep_size": 2, "tp_size": 2}
integrations = pytest.mark.integrations


def compare_training(folder, model, layout, **options):
    """Train plainly, with a rounding error, and balanced; check that all agree; return results."""
    runs = {
        "plain": {"ep": "all_to_all", **options},
        "rounded": {"ep": "all_to_all", "perturbed": True, **options},
        "lplb": {"ep": "lplb", **options},
    }
    results = run_training(folder, model, layout, runs)
    check_equal(results["plain"], results["lplb"], results["rounded"])
    return results


def check_equal(plain, balanced, rounded):
    """Check losses, state dicts, layouts of parameters, and that balancing was of use."""
    assert plain["losses"][-1] < plain["losses"][0]
    assert balanced["losses"] == pytest.approx(plain["losses"], rel=LOSS_TOLERANCE, abs=0)
    assert balanced["evaluated"] == pytest.approx(plain["evaluated"], rel=LOSS_TOLERANCE, abs=0)
    assert balanced["local"] == plain["local"]
    assert plain["state"] and balanced["state"].keys() == plain["state"].keys()
    assert find_largest_difference(plain, balanced) <= 2 * find_largest_difference(plain, rounded)


def find_largest_difference(one, other):
    """Return the largest difference of any weight of two results."""
    pairs = [(tensor, other["state"][name]) for name, tensor in one["state"].items()]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def check_imbalances(result):
    """Check that the imbalance fell in each layer, after the first rebalancing."""
    later = [one for measured in result["imbalances"][1:] for one in measured.values()]
    assert later and all(1 <= after < before for before, after in later)


@pytest.mark.slow
def test_training_is_that_of_plain_expert_parallelism(tmp_path):
    """Losses, weights and their layout are plain EP's, and no home weight is copied."""
    results = compare_training(tmp_path, "qwen3_moe", EP2, steps=6, rebalance=2)
    check_imbalances(results["lplb"])
    assert not any(results["plain"]["extended"].values())
    assert results["lplb"]["extended"] and all(results["lplb"]["extended"].values())


@integrations
@pytest.mark.parametrize("layout", [EP2, EP4, EP2_FSDP2], ids=["ep2", "ep4", "ep2-fsdp2"])
@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_models_and_layouts(tmp_path, model, layout):
    """Every model trains as with plain EP in 20 steps, also where FSDP shards experts."""
    results = compare_training(tmp_path, model, layout)
    check_imbalances(results["lplb"])
    whole = layout["ep_size"] == layout["fsdp_size"]
    assert set(results["lplb"]["extended"].values()) == {whole}
    # What FSDP gathers, and the slots put together from it, is gone after a pass.
    assert results["lplb"]["held"] == (len(results["lplb"]["extended"]) if whole else 0)


@integrations
def test_ranks_that_share_a_batch(tmp_path):
    """Under tensor parallelism each rank balances the part of the batch that it sends."""
    results = compare_training(tmp_path, "qwen3_moe", EP2_TP2)
    check_imbalances(results["lplb"])
    assert all(results["lplb"]["extended"].values())


@integrations
@pytest.mark.parametrize("layout", [EP2, EP2_FSDP2], ids=["ep2", "ep2-fsdp2"])
@pytest.mark.parametrize(("kind", "micro"), [("reentrant", 1), ("not_reentrant", 2)])
def test_checkpointing(tmp_path, kind, micro, layout):
    """Recomputed layers, and micro-batches in flight, change neither losses nor weights.

    Both together aren't tried with reentrant checkpoints, where FSDP itself goes on with old
    weights after a step: plain training differs there from training without checkpoints.
    """
    options = {"checkpointing": kind, "micro_batches": micro, "steps": 8}
    compare_training(tmp_path, "qwen3_moe", layout, **options)


@integrations
@pytest.mark.parametrize("layout", [EP2, EP2_FSDP2], ids=["ep2", "ep2-fsdp2"])
def test_several_forward_passes(tmp_path, layout):
    """Micro-batches in flight change neither losses nor weights."""
    compare_training(tmp_path, "gpt_oss", layout, micro_batches=3, steps=8)


@integrations
@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_other_implementations_of_experts(tmp_path, experts):
    """The experts' own forward may be any of transformers'."""
    compare_training(tmp_path, "qwen3_moe", EP2, experts=experts, steps=8)


@integrations
@pytest.mark.parametrize("layout", [EP2, EP2_FSDP2], ids=["ep2", "ep2-fsdp2"])
def test_frozen_experts(tmp_path, layout):
    """Experts that are not trained get no gradients, and all others are plain EP's."""
    compare_training(tmp_path, "gpt_oss", layout, frozen=True, steps=8)


@integrations
def test_bfloat16(tmp_path):
    """In bfloat16 losses agree to its rounding."""
    runs = {name: {"ep": name, "dtype": "bfloat16"} for name in ("all_to_all", "lplb")}
    results = run_training(tmp_path, "qwen3_moe", EP2, runs)
    plain, balanced = results["all_to_all"], results["lplb"]
    assert balanced["losses"] == pytest.approx(plain["losses"], rel=2**-8)
    assert all(one.dtype == torch.bfloat16 for one in balanced["state"].values())
    check_imbalances(balanced)


@integrations
@pytest.mark.parametrize("layout", [EP2, EP4], ids=["ep2", "ep4"])
def test_trainer(tmp_path, layout):
    """The Trainer trains as with plain EP, and its log holds the imbalances of every step."""
    results = compare_training(tmp_path, "qwen3_moe", layout, trainer=True)
    found = results["lplb"]["imbalances"]
    assert len(found) == 20
    assert all(1 <= after < before for before, after in found[4:])


@integrations
def test_checkpoints_are_exchanged(tmp_path):
    """What one implementation saves the other loads, and both go on alike."""
    results = run_training(
        tmp_path,
        "mixtral",
        EP2,
        {
            "plain": {"ep": "all_to_all", "steps": 4, "save": "of_plain"},
            "lplb": {"ep": "lplb", "steps": 4, "rebalance": 1, "save": "of_lplb"},
            "plain goes on": {"ep": "all_to_all", "load": "of_plain", "steps": 4},
            "plain from lplb": {"ep": "all_to_all", "load": "of_lplb", "steps": 4},
            "lplb from plain": {"ep": "lplb", "load": "of_plain", "steps": 4},
            "rounded": {"ep": "all_to_all", "load": "of_plain", "steps": 4, "perturbed": True},
        },
    )
    for name in ("plain from lplb", "lplb from plain"):
        check_equal(results["plain goes on"], results[name], results["rounded"])
    files = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("of_plain", "of_lplb")]
    assert files[0] == files[1]


def test_names_and_slots_are_checked():
    """A name that is no string, or a count below one, is refused by name."""
    with pytest.raises(TypeError, match="name must be a string, got int"):
        lplb.register(3)
    with pytest.raises(ValueError, match="redundant must be at least 1, got 0"):
        lplb.register("other", redundant=0)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        lplb.Rebalance(every=0)


@pytest.mark.parametrize("call", [lplb.rebalance, lplb.measure_imbalance])
def test_models_without_replicas_are_refused(call):
    """A model that was loaded without the implementation is told how to load it."""
    with pytest.raises(ValueError, match='ep_implementation="lplb"'):
        call(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(4, 3, dtype=torch.uint8), "buffer"),
        (torch.zeros(4, 3), "buffer"),
        (torch.zeros(3), "parameter"),
        (torch.zeros(4, 3).to(torch.float8_e4m3fn), "parameter"),
    ],
)
def test_tensors_that_cannot_be_copied_are_named(tensor, kind):
    """Tensors of an experts module that hold no row of weights per expert are refused by name."""
    experts = torch.nn.Module()
    experts.weights = torch.nn.Parameter(torch.zeros(4, 2))
    if kind == "buffer":
        experts.register_buffer("scale", tensor)
    else:
        experts.scale = torch.nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(ValueError, match="Module.scale can't have copies on other ranks"):
        ExpertMemory(experts, 4, 1).take_originals()


def test_experts_without_parameters_are_refused():
    """An experts module whose weights lie in modules of its own is refused."""
    with pytest.raises(ValueError, match="Module has no parameters of its own"):
        ExpertMemory(torch.nn.Module(), 4, 1).take_originals()


def test_imbalances_join_logs_of_training_only(monkeypatch):
    """The callback adds mean imbalances to logs with a loss, also where the Trainer keeps them."""
    layers = {"first": lplb.Imbalance(1.5, 1.25), "second": lplb.Imbalance(2.0, 1.0)}
    monkeypatch.setattr(lplb, "measure_imbalance", lambda model: layers)
    for name, joined in (("loss", True), ("eval_loss", False)):
        logs, state = {name: 2.0}, types.SimpleNamespace(log_history=[{name: 2.0}])
        lplb.Rebalance().on_log(None, state, None, logs=logs, model=None)
        expected = {"imbalance_before": 1.75, "imbalance_after": 1.125} if joined else {}
        assert logs == {name: 2.0, **expected} and state.log_history == [logs]


def test_rebalancing_keeps_what_was_measured(monkeypatch):
    """The callback rebalances at multiples of its steps, and logs what came before that."""
    found, calls = {"layer": lplb.Imbalance(2.0, 1.5)}, []
    monkeypatch.setattr(lplb, "measure_imbalance", lambda model: dict(found))

    def rebalance(model):
        calls.append(model)
        found.clear()

    monkeypatch.setattr(lplb, "rebalance", rebalance)
    callback, logs = lplb.Rebalance(every=3), {"loss": 1.0}
    for step in range(1, 5):
        state = types.SimpleNamespace(global_step=step, log_history=[{}])
        callback.on_step_end(None, state, None, model=step)
    assert calls == [3]
    callback.on_log(None, state, None, logs=logs, model=4)
    assert logs["imbalance_after"] == 1.5


def test_missing_transformers_is_named(monkeypatch):
    """Without transformers, or with too old a one, the error says what to install."""
    monkeypatch.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
    monkeypatch.delitem(sys.modules, "lplb_triton.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'lplb_triton\[integrations\]'"):
        importlib.import_module("lplb_triton.integrations.transformers")
