"""The expert-parallel example: the same loss whatever the balance, the layer to 1e-10, resuming."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from helpers.texts import write_text

from lplb_triton import Placement
from lplb_triton.traces.trace import load as load_trace

# As when the script is run; processes that it starts import its neighbours too.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
moe, layers, script = map(importlib.import_module, ("train_moe", "expert_parallel", "train_moe_ep"))

SETTINGS = script.Settings(
    steps=10,
    experts=8,
    top_k=2,
    layers=2,
    hidden=16,
    expert_hidden=8,
    vocab=300,
    seq_len=16,
    tokens=32,
    streams=4,
    microbatches=2,
    replace_every=3,
    router_bias=0.3,
    bias_rate=1e-3,
    dtype="float64",
    log_every=5,
    warmup=2,
    skip=2,
    device="cpu",
)
RANKS = 4


def quiet(line):
    pass


def close(run, other, steps=slice(None)):
    torch.testing.assert_close(
        torch.tensor(run.losses[steps]), torch.tensor(other.losses[steps]), rtol=1e-10, atol=1e-10
    )


def check_runs(settings, group, folder):
    """Fifty steps of each balance, in float64, with placements that change: the same losses."""
    settings = replace(settings, steps=50, layers=1, microbatches=1, balance="none,eplb,lplb,live")
    lines = []
    none, eplb, lplb, live = script.train(settings, torch.device("cpu"), group, lines.append)
    assert len(none.losses) == 50 and sum(none.losses[-5:]) < sum(none.losses[:5]) - 0.5
    for run in (eplb, lplb, live):
        close(run, none)
        assert run.expert_state == none.expert_state
    assert none.expert_state["0.w_in.exp_avg"] == [2, 16, 16]
    assert none.imbalance == none.unbalanced and lplb.certified == 1.0
    late = slice(10, None)
    assert sum(none.imbalance[late]) > sum(eplb.imbalance[late]) > sum(lplb.imbalance[late])
    assert sum(live.imbalance[late]) < sum(lplb.imbalance[late])
    assert len(lplb.moe_ms) == len(lplb.step_ms) == 50
    assert all(0 < layer < step for layer, step in zip(lplb.moe_ms, lplb.step_ms, strict=True))
    assert (dist.get_rank() == 0) == any("tokens/s" in line for line in lines)

    reverse = replace(settings, stop_at=5, balance="none", reverse_sums=True)
    (reversed_,) = script.train(reverse, torch.device("cpu"), group, quiet)
    close(reversed_, none, slice(5))
    if dist.get_rank() == 0:
        summary = script.make_report(settings, [none, eplb, lplb], RANKS, torch.device("cpu"))
        assert [row["balance"] for row in summary["medians"]] == ["none", "eplb", "lplb"]
        assert str(folder) not in json.dumps(summary)
        script.draw_curves([none, lplb], folder / "curves.png")
        assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def check_resume(settings, group, folder):
    """Saved after 5 steps and resumed, with recomputation, on four ranks: the same curve."""
    whole = replace(settings, recompute=True)
    (full,) = script.train(whole, torch.device("cpu"), group, quiet)
    where = str(folder / "saved")
    for _ in range(2):  # the second time a checkpoint is there already
        saving = replace(settings, checkpoint=where, checkpoint_every=5, stop_at=5)
        script.train(saving, torch.device("cpu"), group, quiet)
    resumed = replace(settings, resume=where)
    (rest,) = script.train(resumed, torch.device("cpu"), group, quiet)
    assert len(rest.losses) == 5
    return full, rest


def check_layer(settings, group):
    """Forward and backward of one layer equal those of all experts on one rank."""
    rank = dist.get_rank(group)
    config = settings.model(RANKS)
    load = torch.tensor([9.0, 1, 5, 2, 2, 7, 1, 1])
    placement = Placement.from_history(load, RANKS, redundant_per_rank=1)
    shared = dict(group=group, device=torch.device("cpu"), dtype=torch.float64)
    found = {}
    for balance in ("none", "eplb", "lplb"):
        where = layers.even_placement(8, RANKS, 0) if balance == "none" else placement
        torch.manual_seed(3)
        layer = layers.ParallelMoE(
            config, 0, balance=balance, placement=where,
            transport=layers.AllToAll(group, where.n_physical), **shared,
        )  # fmt: skip
        torch.manual_seed(rank)
        # One rank without tokens takes part.
        x = torch.randn(0 if rank == 1 else 40, 16, dtype=torch.float64, requires_grad=True)
        y, counts, _ = layer(x)
        (y * torch.linspace(0, 1, 16)).sum().backward()
        layer.replicas.reduce_grads()
        grads = [torch.zeros(8, *p.shape[1:], dtype=p.dtype) for p in (layer.w_in, layer.w_out)]
        for grad, p in zip(grads, (layer.w_in, layer.w_out), strict=True):
            grad[layer.replicas.experts] = p.grad
            dist.all_reduce(grad, group=group)
        found[balance] = [y.detach(), x.grad, layer.router.grad, *grads]
        assert counts.sum() == x.shape[0] * 2
    for balance in ("eplb", "lplb"):
        for a, b in zip(found["none"], found[balance], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Buffer:
    """What `expert_parallel.DeepEP` uses of DeepEP's ElasticBuffer, over all-gather.

    Names and meaning of arguments and results are those of deep_ep/buffers/elastic.py as read in
    its version 2: received rows in order of source rank and token, expert ids local, -1 elsewhere.
    """

    def __init__(self, group):
        self.group, self.ranks, self.rank = group, group.size(), dist.get_rank(group)

    def gather(self, value):
        parts = [None] * self.ranks
        dist.all_gather_object(parts, value, group=self.group)
        return parts

    def dispatch(self, x, topk_idx=None, topk_weights=None, num_experts=None, handle=None):
        assert x.dtype == torch.bfloat16
        if handle is None:
            local = num_experts // self.ranks
            handle = SimpleNamespace(
                own=[(topk_idx // local == r).any(1).nonzero()[:, 0] for r in range(self.ranks)]
            )
            idx = [topk_idx[i] for i in handle.own]
            idx = torch.cat([part[self.rank] for part in self.gather(idx)])
            inside = idx // local == self.rank
            weights = self.gather([topk_weights.detach()[i] for i in handle.own])
            weights = torch.cat([part[self.rank] for part in weights])
            idx = torch.where(inside, idx - self.rank * local, -1)
            handle.inside, handle.sizes = inside, None
        else:
            idx = weights = None
        rows = self.gather([x.detach()[i] for i in handle.own])
        handle.sizes = [len(part[self.rank]) for part in rows]
        return torch.cat([part[self.rank] for part in rows]), idx, weights, handle, None

    def combine(self, x, handle, topk_weights=None):
        rows = [part[self.rank] for part in self.gather(list(x.split(handle.sizes)))]
        n = 1 + max((int(i.max()) for i in handle.own if len(i)), default=-1)
        total = torch.zeros(n, x.shape[1])
        weights = None
        for i, part in zip(handle.own, rows, strict=True):
            total[i] += part.float()
        if topk_weights is not None:
            masked = torch.where(handle.inside, topk_weights, 0)
            weights = torch.zeros(n, masked.shape[1])
            parts = [part[self.rank] for part in self.gather(list(masked.split(handle.sizes)))]
            for i, part in zip(handle.own, parts, strict=True):
                weights[i] += part
        return total.bfloat16(), weights, None


def check_deep_ep(settings, group):
    """DeepEP's way gives what all-to-all does, to bfloat16's rounding."""
    torch.manual_seed(dist.get_rank(group))
    n_physical = 12
    x = torch.randn(20, 16).bfloat16().float().requires_grad_()
    slots = torch.stack([torch.randperm(n_physical)[:3] for _ in range(20)])
    raw = torch.rand(20, 3).requires_grad_()
    scale = torch.arange(1.0, 4.0)[:, None]
    found = []
    for transport in (
        layers.AllToAll(group, n_physical),
        layers.DeepEP(group, n_physical, tokens=20, hidden=16, top_k=3, buffer=Buffer(group)),
    ):
        x.grad = raw.grad = None
        rows, ends, route = transport.dispatch(x, slots, raw)
        begin, parts = 0, []
        for factor, end in zip(scale, ends.tolist(), strict=True):
            parts.append(rows[begin:end] * factor)
            begin = end
        y = transport.combine(torch.cat(parts), route)
        y.square().sum().backward()
        transport.close()
        found.append((ends, y.detach(), x.grad, raw.grad))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


def check_ranks(rank, group, text, folder):
    settings = replace(SETTINGS, text=text)
    if group.size() == RANKS:
        check_layer(settings, group)
        check_deep_ep(settings, group)
        check_runs(settings, group, folder)
        full, rest = check_resume(settings, group, folder)
        close(rest, SimpleNamespace(losses=full.losses[5:]))
        if rank == 0:
            torch.save(full.losses, folder / "losses.pt")
    else:
        # The same streams, half the ranks, twice the tokens of each.
        resumed = replace(settings, tokens=64, resume=str(folder / "saved"))
        (rest,) = script.train(resumed, torch.device("cpu"), group, quiet)
        full = torch.load(folder / "losses.pt")
        close(rest, SimpleNamespace(losses=full[5:]))


def test_training_over_gloo(tmp_path):
    """Losses do not depend on the balance, and a run resumes on four or two ranks."""
    text = tmp_path / "text"
    text.mkdir()
    write_text(text)
    for ranks in (RANKS, 2):
        run_ranks(check_ranks, ranks, tmp_path, str(text), tmp_path)


def test_command_line(tmp_path, capfd):
    """The command writes losses and a trace, and refuses wrong folders and sizes."""
    write_text(tmp_path)
    arguments = (
        "--experts 4 --top-k 1 --layers 1 --hidden 16 --expert-hidden 8 --vocab 300 --seq-len 16 "
        f"--tokens 16 --steps 3 --balance none,lplb --text {tmp_path} --even-routing "
        f"--out {tmp_path}"
    )
    assert script.main(arguments.split()) == 0
    assert "lplb  step" in capfd.readouterr().out
    summary = json.loads((tmp_path / "train.json").read_text())
    assert [len(run["losses"]) for run in summary["runs"]] == [3, 3]
    # One rank; every expert has as many tokens as the others.
    assert summary["runs"][0]["unbalanced"] == [1.0] * 3
    path = tmp_path / "trace.npz"
    once = [arguments.replace("none,lplb", "lplb"), f" --microbatches 2 --record {path}"]
    assert script.main("".join(once).split()) == 0
    trace = load_trace(path)
    assert trace.steps.tolist() == [0, 1, 2] and (trace.counts == 8).all()
    (tmp_path / "file").touch()
    assert script.main(["--steps", "3", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capfd.readouterr().err
    assert script.main(["--experts", "5", "--processes", "2"]) == 1
    assert "must be multiples of the 2 ranks" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance": "none,best"}, "balance must name"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"redundant": -1}, "redundant must be at least 0, got -1"),
        ({"dtype": "int8"}, "dtype must be auto or one of"),
        ({"transport": "mpi"}, "transport must be auto, torch or deep_ep"),
        ({"balance": "none,lplb", "resume": "x"}, "balance must name one run"),
        ({"balance": "none,lplb", "record": "x.npz"}, "balance must name one run"),
        ({"record": "x.npz", "recompute": True}, "record can't go with recompute"),
    ],
)
def test_settings_reject(settings, message):
    """A wrong setting, or settings that exclude each other, are refused by name."""
    with pytest.raises(ValueError, match=message):
        script.Settings(**settings)


@pytest.mark.multigpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_two_gpus(dtype, tolerance, tmp_path):
    """On two GPUs all balances have the same losses to the dtype's precision."""
    write_text(tmp_path)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        str(Path(script.__file__)),
        *"--balance none,eplb,lplb --experts 16 --top-k 2 --layers 2 --hidden 64".split(),
        *"--expert-hidden 32 --vocab 300 --seq-len 16 --tokens 256 --steps 12".split(),
        *f"--replace-every 4 --redundant 2 --router-bias 0.3 --dtype {dtype}".split(),
        *("--transport", "torch", "--text", str(tmp_path), "--out", str(tmp_path / "out")),
    ]
    # Where the package isn't installed, only this process knows where it is.
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=240, env=where)
    runs = json.loads((tmp_path / "out" / "train.json").read_text())["runs"]
    assert runs[2]["certified"] == 1.0
    for run in runs[1:]:
        assert run["expert_state"] == runs[0]["expert_state"]
        difference = torch.tensor(run["losses"]) - torch.tensor(runs[0]["losses"])
        assert difference.abs().max() < tolerance
