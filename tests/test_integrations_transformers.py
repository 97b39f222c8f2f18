"""The implementation ``"lplb"`` inside transformers, against its plain all-to-all.

Losses of plain and balanced training may differ by four roundings of float32, and weights after
training by four times what they differ by from a run that began with a rounding error in each.
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
LAYOUTS = {
    "ep2": EP2,
    "ep4": {"ep_size": 4, "fsdp_size": 4},
    "ep2-fsdp2": {"ep_size": 2, "fsdp_size": 4},
    "ep2-tp2": {"ep_size": 2, "tp_size": 2},
}
SHARDED = ("ep2", "ep4", "ep2-fsdp2")
FEW = {"steps": 8, "rebalance": 2}
# Name of a case: its options, and the layouts that it is trained in.
CASES = {
    "qwen3_moe": ({"model": "qwen3_moe"}, tuple(LAYOUTS)),
    "mixtral": ({"model": "mixtral"}, SHARDED),
    "deepseek_v3": ({"model": "deepseek_v3"}, SHARDED),
    "gpt_oss": ({"model": "gpt_oss"}, SHARDED),
    "trainer": ({"model": "qwen3_moe", "trainer": True}, ("ep2", "ep4")),
    # Reentrant checkpoints with several forward passes aren't tried: FSDP itself goes on with old
    # weights after a step there, so that plain training differs from that without checkpoints.
    "reentrant": (
        {"model": "qwen3_moe", "checkpointing": "reentrant", **FEW},
        ("ep2", "ep2-fsdp2"),
    ),
    "not_reentrant": (
        {"model": "qwen3_moe", "checkpointing": "not_reentrant", "micro_batches": 2, **FEW},
        ("ep2", "ep2-fsdp2"),
    ),
    "micro_batches": ({"model": "gpt_oss", "micro_batches": 3, **FEW}, ("ep2", "ep2-fsdp2")),
    "frozen": ({"model": "gpt_oss", "frozen": True, **FEW}, ("ep2", "ep2-fsdp2")),
    "eager": ({"model": "qwen3_moe", "experts": "eager", **FEW}, ("ep2",)),
    "batched_mm": ({"model": "qwen3_moe", "experts": "batched_mm", **FEW}, ("ep2",)),
}
integrations = pytest.mark.integrations


def list_runs(options, label=""):
    """Return the runs that are compared: plain, plain with a rounding error, and balanced."""
    return {
        f"{label}plain": {"ep": "all_to_all", **options},
        f"{label}rounded": {"ep": "all_to_all", "perturbed": True, **options},
        f"{label}lplb": {"ep": "lplb", **options},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Give a function that returns results of all cases in a layout, which are trained once."""
    made = {}

    def train(layout):
        if layout not in made:
            runs = {}
            for case, (options, layouts) in CASES.items():
                if layout in layouts:
                    runs.update(list_runs(options, f"{case} "))
            folder = tmp_path_factory.mktemp("trained")
            made[layout] = run_training(folder, LAYOUTS[layout], runs, limit=800)
        return made[layout]

    return train


def check_equal(plain, balanced, rounded):
    """Check losses, state dicts, layouts of parameters, and that training was of use."""
    assert plain["losses"][-1] < plain["losses"][0]
    assert balanced["losses"] == pytest.approx(plain["losses"], rel=LOSS_TOLERANCE, abs=0)
    assert balanced["evaluated"] == pytest.approx(plain["evaluated"], rel=LOSS_TOLERANCE, abs=0)
    assert balanced["local"] == plain["local"]
    assert plain["state"] and balanced["state"].keys() == plain["state"].keys()
    assert find_largest_difference(plain, balanced) <= 4 * find_largest_difference(plain, rounded)


def find_largest_difference(one, other):
    """Return the largest difference of any weight of two results."""
    pairs = [(tensor, other["state"][name]) for name, tensor in one["state"].items()]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def check_imbalances(result):
    """Check that replicas lower the imbalance, and raise it by roundings at most."""
    later = [one for measured in result["imbalances"][1:] for one in measured.values()]
    assert later and all(1 <= after <= before + 0.02 for before, after in later)
    assert sum(after for _, after in later) < sum(before for before, _ in later)


@integrations
def test_live_slots_train_as_plain_expert_parallelism_does(tmp_path):
    """With a live slot on each rank, losses, weights and their layout are plain EP's."""
    runs = list_runs({"model": "qwen3_moe", "steps": 6, "rebalance": 2})
    runs["live"] = {**runs.pop("lplb"), "live": 1}
    results = run_training(tmp_path, EP2, runs)
    check_equal(results["plain"], results["live"], results["rounded"])
    check_imbalances(results["live"])
    assert not any(results["live"]["extended"].values())


@pytest.mark.slow
def test_training_is_that_of_plain_expert_parallelism(tmp_path):
    """Losses, weights and their layout are plain EP's, and no home weight is copied."""
    runs = list_runs({"model": "qwen3_moe", "steps": 6, "rebalance": 2})
    # On its own, since FSDP goes on otherwise after an evaluation that comes before all training.
    runs["given"] = {"ep": "lplb", "model": "qwen3_moe", "steps": 1, "given": True}
    results = run_training(tmp_path, EP2, runs)
    check_equal(results["plain"], results["lplb"], results["rounded"])
    check_imbalances(results["lplb"])
    assert not any(results["plain"]["extended"].values())
    assert results["lplb"]["extended"] and all(results["lplb"]["extended"].values())
    # By given loads, the other rank's redundant slot holds the expert with nearly all tokens.
    before, after, *errors = results["given"]["placed"]
    assert [[one[4] for one in before], [one[9] for one in after]] == [[7, 7], [1, 1]]
    assert errors[0].startswith("load must have shape (2, 8)") and "got (8,)" in errors[0]
    assert errors[1] == "load must be a tensor, got list"


@integrations
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (layout, case)
        for layout in LAYOUTS
        for case, (_, places) in CASES.items()
        if layout in places
    ],
)
def test_models_and_layouts(trained, layout, case):
    """Every case trains as with plain EP, in 20 steps if nothing else is said."""
    plain, rounded, balanced = (
        trained(layout)[f"{case} {name}"] for name in ("plain", "rounded", "lplb")
    )
    check_equal(plain, balanced, rounded)
    if case == "trainer":
        assert len(balanced["imbalances"]) == len(balanced["losses"]) == 20
        assert all(1 <= after <= before + 0.02 for before, after in balanced["imbalances"][4:])
    else:
        check_imbalances(balanced)
    # Memory is extended where each rank has its experts to itself. Elsewhere what FSDP gathers,
    # and the slots put together from it, is gone after a pass.
    whole = layout != "ep2-fsdp2"
    assert set(balanced["extended"].values()) == {whole}
    assert balanced["held"] == (len(balanced["extended"]) if whole else 0)


@integrations
@pytest.mark.timeout(600)
@pytest.mark.parametrize("option", ["dtype", "mixed"])
def test_bfloat16(tmp_path, option):
    """In bfloat16, also with float32 shards under FSDP, losses agree to its rounding."""
    options = {"model": "qwen3_moe", **({"dtype": "bfloat16"} if option == "dtype" else {})}
    runs = {name: {"ep": name, **options} for name in ("all_to_all", "lplb")}
    layout = {**EP2, "fsdp_mixed_precision": option == "mixed"}
    results = run_training(tmp_path, layout, runs)
    plain, balanced = results["all_to_all"], results["lplb"]
    assert balanced["losses"] == pytest.approx(plain["losses"], rel=2**-8)
    dtype = torch.bfloat16 if option == "dtype" else torch.float32
    assert all(one.dtype == dtype for one in balanced["state"].values())
    # Shards in another dtype than experts compute in are no memory for slots.
    assert set(balanced["extended"].values()) == {option == "dtype"}
    check_imbalances(balanced)


@integrations
@pytest.mark.timeout(600)
def test_checkpoints_are_exchanged(tmp_path):
    """What one implementation saves the other loads, and both go on alike."""
    plain, balanced = ({"ep": ep, "model": "mixtral", "steps": 4} for ep in ("all_to_all", "lplb"))
    runs = {
        "plain": {**plain, "save": "of_plain"},
        "lplb": {**balanced, "rebalance": 1, "save": "of_lplb"},
        "plain goes on": {**plain, "load": "of_plain"},
        "plain from lplb": {**plain, "load": "of_lplb"},
        "lplb from plain": {**balanced, "load": "of_plain"},
        "rounded": {**plain, "load": "of_plain", "perturbed": True},
    }
    results = run_training(tmp_path, EP2, runs)
    for name in ("plain from lplb", "lplb from plain"):
        check_equal(results["plain goes on"], results[name], results["rounded"])
    files = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("of_plain", "of_lplb")]
    assert files[0] == files[1] and "model.safetensors" in files[0]


def test_names_and_slots_are_checked():
    """A name that is no string, or a count below one, is refused by name."""
    with pytest.raises(TypeError, match="name must be a string, got int"):
        lplb.register(3)
    with pytest.raises(ValueError, match="redundant must be at least 1, got 0"):
        lplb.register("other", redundant=0)
    with pytest.raises(ValueError, match="live must be at most 2, got 3"):
        lplb.register("other", live=3)
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
