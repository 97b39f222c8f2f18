"""lplb-bench frameworks: both frameworks on two ranks over gloo, and the parts of the loop."""

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import gloo
import pytest
import torch
import torch.multiprocessing as mp
from helpers import megatron_cpu

from lplb_triton import chain
from lplb_triton.bench import cli, tables
from lplb_triton.bench.commands import frameworks
from lplb_triton.bench.frameworks import compare, routing
from lplb_triton.bench.frameworks.even import split_evenly
from lplb_triton.bench.frameworks.model import Framework, Trained
from lplb_triton.bench.frameworks.ranks import VARIABLES, Ranks, read_ranks
from lplb_triton.bench.frameworks.sizes import SIZES
from lplb_triton.bench.frameworks.timing import LayerTimer, Mark
from lplb_triton.bench.options import UsageError

pytest.importorskip("rich")
MODULES = {"megatron": "megatron.core", "transformers": "transformers"}
OPTIONS = ["--device", "cpu", "--layers", "1", "--steps", "3", "--imbalance", "1.4"]


def be_a_rank(rank, framework, port, folder):
    """Run the command as torchrun would start it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    if framework == "megatron":
        megatron_cpu.pretend_cuda()
    files = ["--json", f"{folder}/{rank}.json", "--markdown", f"{folder}/{rank}.md"]
    code = cli.main(["frameworks", "--framework", framework, *OPTIONS, *files])
    (folder / f"code{rank}").write_text(str(code))


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework",
    ["megatron", pytest.param("transformers", marks=pytest.mark.integrations)],
)
def test_both_routings(framework, tmp_path):
    """Losses agree, the LP evens the ranks out, and rank 0 alone writes figures and tables."""
    pytest.importorskip(MODULES[framework])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    gloo.context()
    mp.start_processes(be_a_rank, (framework, port, tmp_path), 2, start_method="forkserver")
    codes = [(tmp_path / f"code{rank}").read_text() for rank in range(2)]
    assert not (tmp_path / "1.json").exists() and not (tmp_path / "1.md").exists()
    report = json.loads((tmp_path / "0.json").read_text())
    assert codes == ["0", "0"], report["faults"]
    assert list(report["routings"]) == ["balanced", "skewed"] and report["faults"] == []
    assert report["environment"]["megatron-core" if framework == "megatron" else framework]
    for name, rows in report["routings"].items():
        assert list(rows) == ["none", "even", "lp"]
        for row in rows.values():
            step, moe = row["step_ms"], row["moe_ms"]
            assert 0 < moe["median"] < step["median"] <= step["p99"]
            assert len(row["losses"]) == SIZES["cpu"].warm_up + 3
            # Every step has a batch of its own.
            assert len(set(row["losses"])) == len(row["losses"])
            assert row["losses"] == pytest.approx(rows["none"]["losses"], abs=1e-5)
            assert row["loss_difference"] <= 1e-5
            # The loads of the methods are those of the same batches and routers.
            before = rows["none"]["imbalance_before"]
            assert row["imbalance_before"] == pytest.approx(before, abs=0.02), name
        assert rows["none"]["imbalance_after"] == rows["none"]["imbalance_before"]
    skewed = report["routings"]["skewed"]
    assert skewed["none"]["imbalance_before"] >= 1.4
    assert skewed["lp"]["imbalance_after"] < skewed["even"]["imbalance_after"] < 1.4
    assert skewed["lp"]["imbalance_after"] < 1.05
    assert report["routings"]["balanced"]["none"]["imbalance_before"] < 1.2
    text = (tmp_path / "0.md").read_text()
    assert f"### {framework}, skewed routing: imbalance" in text and "| lp | 1.0" in text


class Scored(torch.nn.Module):
    """A router that scores tokens by their own first components."""

    def __init__(self, experts, top_k):
        super().__init__()
        self.bias, self.top_k = torch.zeros(experts), top_k

    def forward(self, x):
        """Return the choices [tokens, top_k]."""
        return (x[:, : len(self.bias)].sigmoid() + self.bias).topk(self.top_k).indices


class FakeModel(Trained):
    """Routers only."""

    def __init__(self, sizes):
        self.routers = [Scored(sizes.experts, sizes.top_k) for _ in range(sizes.layers)]
        self.biases = [router.bias for router in self.routers]

    moe_layers = balances = ()

    def compute_loss(self, batch):
        """Route."""
        for router in self.routers:
            router(batch)

    def update(self):
        """Nothing learns."""

    def count_choices(self, output):
        """Count ids."""
        return torch.bincount(output.flatten(), minlength=len(self.biases[0]))


class FakeFramework(Framework):
    """Tokens that prefer the last experts; all ranks in one process."""

    def __init__(self, sizes):
        ranks = Ranks(0, 0, 2, torch.device("cpu"))
        super().__init__(
            sizes, SimpleNamespace(**vars(ranks), on_gpu=False, sum=torch.Tensor.double)
        )

    def build(self, method):
        """Build a model."""
        return FakeModel(self.sizes)

    def make_batch(self, number):
        """Draw a batch, which the number decides."""
        generator = self.make_generator(number)
        x = torch.randn(self.sizes.tokens, self.sizes.experts, generator=generator)
        return x + torch.linspace(0, 2, self.sizes.experts)

    def close(self):
        """Nothing is kept."""


def fake(**changes):
    return FakeFramework(replace(SIZES["cpu"], tokens=512, **changes))


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (8, 1)])
@pytest.mark.parametrize("wanted", [1.3, 1.8])
def test_biases(experts, top_k, wanted):
    """Balanced routing is even though tokens prefer some experts; skewed routing is as asked."""
    framework = fake(experts=experts, top_k=top_k)
    model = framework.build("none")
    free = routing.average_imbalance(routing.count_loads(model, framework, range(4)), 2)
    assert (free > 1.2).all()
    found = routing.find_biases(model, framework, wanted)
    assert not torch.stack(list(model.biases)).any()
    reached = {}
    for name, biases in found.items():
        model.set_biases(biases)
        loads = routing.count_loads(model, framework, range(8))
        assert loads.sum() == 8 * 512 * top_k * framework.sizes.layers
        reached[name] = routing.average_imbalance(loads, 2)
    assert (reached["balanced"] < 1.1).all()
    assert (reached["skewed"] >= wanted).all() and (reached["skewed"] < wanted + 0.12).all()


def test_an_imbalance_out_of_reach():
    """Where a token chooses more experts than a rank has, the message says what is possible."""
    framework = fake(experts=4, top_k=3)
    with pytest.raises(UsageError, match=r"1\.9 can't be reached with top-3 of 4 experts on 2"):
        routing.find_biases(framework.build("none"), framework, 1.9)


def test_even_split():
    """The tokens of an expert go to its copies in turn, also with another placement."""
    balancer = SimpleNamespace(run=None)
    balance = SimpleNamespace(balancer=balancer, device=torch.device("cpu"))
    split_evenly(balance)
    ids = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 7]], dtype=torch.int32)
    for hot in (0, 7):
        load = torch.ones(8)
        load[hot] = 9
        balance.placement = chain(load, 2, redundant_per_rank=1, keep_home=True)
        slots = balancer.run(ids)
        assert slots.dtype == torch.int32 and slots.shape == ids.shape
        assert torch.equal(balance.placement.phy2log[slots.long()].int(), ids)
        copies = balance.placement.logcnt[0]
        counts = torch.bincount(slots[:, 0])
        assert counts[counts > 0].tolist() == [4 // copies] * copies


def test_times_of_layers():
    """The time of layers lies within that of the pass, counts each pass once, and is positive."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(256, 256) for _ in range(2)]
    timer = LayerTimer(layers)
    x = torch.randn(64, 256, requires_grad=True)
    begin = Mark(False)
    layers[1](layers[0](x)).sum().backward()
    whole = begin.measure_ms(Mark(False))
    assert 0 < timer.read_ms() < whole
    assert timer.read_ms() == 0
    with torch.no_grad():
        layers[0](x)
    assert timer.read_ms() == 0


def make_rows(**changes):
    row = {"imbalance_before": 1.6, "loss_difference": 0.0}
    return {"none": row, "lp": {**row, **changes}}


def test_faults():
    """Losses that differ or are no numbers, and a skew below the one asked for, are faults."""
    assert compare.find_faults("skewed", make_rows(), 1e-4, 1.5) == []
    for wrong in (1e-3, math.nan):
        (fault,) = compare.find_faults("balanced", make_rows(loss_difference=wrong), 1e-4, 1.5)
        assert "losses of lp and none differ" in fault
    (fault,) = compare.find_faults("skewed", make_rows(), 1e-4, 1.7)
    assert fault == "skewed: the imbalance without balancing is 1.600, not 1.7"
    assert compare.find_faults("balanced", make_rows(), 1e-4, 1.7) == []


def test_figures_that_are_no_numbers():
    """What JSON can't hold becomes null, and the table says so."""
    statistics = {"median": 1.0, "p99": 2.0}
    rows = make_rows(loss_difference=math.nan, losses=[1.0, math.inf])
    for row in rows.values():
        row.update(imbalance_after=1.0, idle_layers=0, step_ms=statistics, moe_ms=statistics)
    found = frameworks.drop_non_finite(rows)
    assert found["lp"]["losses"] == [1.0, None] and found["lp"]["loss_difference"] is None
    assert found["none"] == rows["none"]
    options = {"framework": "megatron", "ranks": 2, "dtype": "bfloat16", **vars(SIZES["cuda"])}
    report = {"options": options, "faults": ["on purpose"], "routings": {"skewed": found}}
    (grid,) = tables.make_frameworks_grids(report)
    assert grid.rows[1] == ("lp", "1.000", "1.00", "2.00", "1.00", "2.00", "n/a")
    assert grid.notes[-1] == "failed: on purpose"


def test_without_figures_there_is_no_table():
    """A report of a run that ended early has no tables."""
    report = {"options": {"framework": "megatron"}, "faults": [], "routings": {}}
    assert tables.make_frameworks_grids(report) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--imbalance", "1"], "expected a number above 1, got '1'"),
        (["--imbalance", "much"], "expected a number above 1"),
        (["--imbalance", "2"], "2 ranks have less than 2, got 2"),
        (["--routing", "balanced", "--imbalance", "1.2"], "only for the routing skewed"),
        (["--routing", "even"], "argument --routing"),
        (["--hidden", "40"], "expected a multiple of 32, got 40"),
        (["--experts", "7"], "expected a multiple of the 2 ranks, got 7"),
        (["--top-k", "9"], "at most all 8 experts, got 9"),
        (["--warm-up", "1"], "argument --warm-up"),
        (["--framework", "fairseq"], "argument --framework"),
    ],
)
def test_wrong_usage(arguments, message, capsys, monkeypatch):
    """Wrong options end with the usage code, and name the option, before ranks meet."""
    set_ranks(monkeypatch)
    try:
        code = cli.main(["frameworks", "--framework", "megatron", "--device", "cpu", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE
    assert message in capsys.readouterr().err


def set_ranks(monkeypatch, **changes):
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **changes}
    for name in VARIABLES:
        monkeypatch.setenv(name, given.get(name, "29500"))


def test_processes_that_torchrun_did_not_start(monkeypatch, capsys):
    """Without torchrun's variables, and with a single rank, the message says how to start."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    command = ["frameworks", "--framework", "transformers", "--device", "cpu"]
    assert cli.main(command) == cli.USAGE
    assert "torchrun --nproc-per-node 2 -m lplb_triton.bench" in capsys.readouterr().err
    set_ranks(monkeypatch, WORLD_SIZE="1")
    assert cli.main(command) == cli.USAGE
    assert "at least 2 ranks, torchrun started 1" in capsys.readouterr().err
    set_ranks(monkeypatch, RANK="first")
    with pytest.raises(UsageError, match="must be integers"):
        read_ranks("cpu")
    set_ranks(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="no GPU: torch finds 0"):
        read_ranks("cuda")


@pytest.mark.parametrize("found", [None, "meta"])
def test_megatron_without_its_device(found, monkeypatch):
    """Megatron-Core is refused on a CPU, whether there is a GPU or not."""
    pytest.importorskip("megatron.core")
    from lplb_triton.bench.frameworks.megatron import MegatronCore

    def find():
        if found is None:
            raise RuntimeError("no driver")
        return found

    monkeypatch.setattr(torch.cuda, "current_device", find)
    message = "needs a GPU: no driver" if found is None else "makes tensors on meta"
    with pytest.raises(UsageError, match=message):
        MegatronCore(SIZES["cpu"], Ranks(0, 0, 2, torch.device("cpu")))


@pytest.mark.parametrize("framework", MODULES)
def test_a_framework_that_is_missing(framework, monkeypatch, capsys):
    """A framework that can't be imported is named, with the way to install it."""

    def missing(*args):
        raise ImportError("no such package")

    monkeypatch.setattr(frameworks, "make_framework", missing)
    args = SimpleNamespace(framework=framework)
    with pytest.raises(UsageError, match=rf"{framework} can't be imported: no such package .*pip"):
        frameworks.import_and_compare(args, None, None, None)


def test_the_command_imports_no_framework():
    """Neither framework is imported before it is asked for."""
    for name in MODULES:
        assert importlib.util.find_spec(f"lplb_triton.bench.frameworks.{name}") is not None
    code = (
        "import sys; from lplb_triton.bench import cli; "
        "print([n for n in ('transformers', 'megatron') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
