"""The torchtitan example, run by torchtitan's own entry point: the same losses and checkpoints."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

pytest.importorskip("torchtitan")
# The example's folder has the package's name, and other tests put its parent on the path.
if importlib.util.find_spec("torchtitan.trainer") is None:
    pytest.skip("torchtitan is not installed", allow_module_level=True)
pytestmark = [
    pytest.mark.integrations,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("LPLB_TEST_INTEGRATIONS") != "1",
        reason="takes minutes: set LPLB_TEST_INTEGRATIONS=1, as make test-torchtitan does",
    ),
]

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "examples" / "torchtitan", ROOT / "tests" / "helpers")
STEPS, SAVED, EVERY, RANKS = 6, 3, 2, 4
# What a rank's router chooses in a step: 2 sequences of 64 tokens, 3 experts each.
CHOICES = 2 * 64 * 3
BALANCED = (
    'balanced_experts.balance={"redundant": 1}',
    f'balanced_experts.rebalance={{"every": {EVERY}}}',
    "balanced_experts.report",
)


def launch(folder, *arguments, ranks=RANKS, records="records", perturb=False):
    """Run torchtitan's entry point in a process per rank, and return what became of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(ROOT / "tests/helpers/torchtitan_cpu.py")]
    command += ["--module", "torchtitan_cpu", "--config", "tiny", "--dump_folder", str(folder)]
    command += ["--parallelism.spmd_backend", "partial_dtensor", "--training.steps", str(STEPS)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, FOLDERS)),
        "RECORDS": str(folder / records),
        "PERTURB": "1" if perturb else "",
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        command + list(arguments), env=environment, capture_output=True, text=True, timeout=400
    )


def train(folder, name, *overrides, perturb=False, resume=None, extra=()):
    """Train with EP 2 beside FSDP 2; return what each rank logged, by step."""
    arguments = ["--parallelism.expert_parallel_degree", "2", "--checkpoint.enable"]
    arguments += ["--checkpoint.interval", str(SAVED), "--checkpoint.folder", resume or name]
    if resume:
        arguments += ["--checkpoint.load_step", str(SAVED), "--checkpoint.load_only"]
    arguments += ["--override.imports", "torchtitan_cpu.plain_attention", *overrides, *extra]
    records = f"{name}.records"
    done = launch(folder, *arguments, records=records, perturb=perturb)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [(folder / f"{records}.{rank}").read_text().splitlines() for rank in range(RANKS)]
    return [[json.loads(line) for line in lines] for lines in ranks]


def losses(run):
    return torch.tensor([step["loss"] for step in run[0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("torchtitan")


@pytest.fixture(scope="module")
def plain(folder):
    return train(folder, "plain")


@pytest.fixture(scope="module")
def noise(folder, plain):
    """By how much losses differ if expert weights start one unit in the last place away."""
    difference = losses(train(folder, "perturbed", perturb=True)) - losses(plain)
    found = float(difference.abs().max())
    assert 0 < found < 1e-3, "the perturbed run doesn't tell what noise is"
    return found


@pytest.fixture(scope="module")
def balanced(folder):
    return train(folder, "balanced", *BALANCED, "balanced_experts.save_ids")


def test_losses_stay_the_same(plain, balanced, noise):
    """Losses with replicas, two placements later too, differ from plain ones by noise."""
    assert len(plain[0]) == len(balanced[0]) == STEPS
    assert float((losses(balanced) - losses(plain)).abs().max()) <= 3 * noise


def test_imbalance_is_reported_by_torchtitan(balanced):
    """Metrics of every step hold the imbalance before and after, the latter the smaller one."""
    for step in balanced[0]:
        assert 1 <= step["moe_imbalance/after"] < step["moe_imbalance/before"]
    assert balanced[0][-1]["moe_imbalance/after"] < 1.05


def test_loads_are_counted_once_and_batches_solved_once(balanced):
    """Recomputed regions neither count again nor solve again: their ids were kept."""
    for rank in balanced:
        for step in rank:
            since = (step["step"] - 1) % EVERY + 1
            for layer in step["layers"]:
                assert layer["load"] == CHOICES * since
                assert layer["solves"] == step["step"]


def test_each_ep_group_has_placements_of_its_own(balanced):
    """Ranks of a group agree, and groups that saw other tokens chose other copies."""
    slots = [[[one["phy2log"] for one in step["layers"]] for step in rank] for rank in balanced]
    assert slots[0] == slots[1] and slots[2] == slots[3]
    assert slots[0] != slots[2]
    assert slots[0][0] != slots[0][-1], "no placement changed"


def test_checkpoints_hold_the_same(folder, plain, balanced):
    """A checkpoint written with replicas has the names and shapes of one without."""
    kept = []
    for name in ("plain", "balanced"):
        metadata = FileSystemReader(folder / name / f"step-{SAVED}").read_metadata()
        kept.append({k: getattr(v, "size", None) for k, v in metadata.state_dict_metadata.items()})
    assert kept[0] == kept[1]
    assert any("inner_experts.w1_EFD" in name for name in kept[0])


def test_resume_without_replicas(folder, plain, balanced, noise):
    """A run with replicas goes on without them as the plain run did."""
    resumed = train(folder, "to_plain", resume="balanced")
    assert [step["step"] for step in resumed[0]] == list(range(SAVED + 1, STEPS + 1))
    assert float((losses(resumed) - losses(plain)[SAVED:]).abs().max()) <= 3 * noise


def test_resume_with_replicas_and_without_checkpointing(folder, plain, noise):
    """A plain run goes on with replicas, also where autograd itself keeps what it needs."""
    extra = ("activation-checkpoint:none",)
    resumed = train(folder, "to_balanced", *BALANCED, resume="plain", extra=extra)
    assert [step["step"] for step in resumed[0]] == list(range(SAVED + 1, STEPS + 1))
    assert float((losses(resumed) - losses(plain)[SAVED:]).abs().max()) <= 3 * noise
    for step in resumed[0]:
        assert [one["solves"] for one in step["layers"]] == 2 * [step["step"] - SAVED]


@pytest.mark.parametrize(
    ("arguments", "override", "ranks", "message"),
    [
        ((), "balanced_experts.balance", 1, "expert_parallel_degree >= 2"),
        ((), 'balanced_experts.balance={"redundant": 0}', 1, "redundant must be a positive"),
        ((), 'balanced_experts.rebalance={"every": 0.5}', 1, "every must be a positive"),
        (
            ("--parallelism.expert_parallel_degree", "2", "--compile.enable")
            + ("--compile.components", "model", "--compile.backend", "aot_eager"),
            "balanced_experts.balance",
            2,
            "balanced experts are not for --compile.components",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, arguments, override, ranks, message):
    """A run without expert parallelism, bad settings and a compiled model end with a sentence."""
    overrides = ("--override.imports", "torchtitan_cpu.plain_attention", override)
    done = launch(tmp_path, *arguments, *overrides, ranks=ranks)
    assert done.returncode != 0
    assert message in done.stderr
