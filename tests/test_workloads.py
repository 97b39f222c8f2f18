"""Workloads: what each promises, the adversary, and the command's verdict."""

import json

import numpy as np
import pytest
import torch

from lplb_triton import Placement, topologies
from lplb_triton.bench import cli, workloads
from lplb_triton.bench.workloads import Settings

SMALL = Settings(ranks=8, experts=32, batches=3, tokens=4096, seed=1)


@pytest.mark.parametrize("name", list(workloads.WORKLOADS))
def test_drawing(name):
    """The same seed draws the same workload, and another seed a different one."""
    case, again = workloads.draw(name, SMALL), workloads.draw(name, SMALL)
    assert torch.equal(case.test, again.test) and torch.equal(case.history, again.history)
    other = workloads.draw(name, Settings(8, 32, 3, 4096, seed=2))
    assert not torch.equal(case.test, other.test)
    assert case.history.shape == (workloads.HISTORY, 32) and case.test.shape == (3, 8, 32)
    assert case.test.dtype == case.history.dtype == torch.int64
    assert (case.test >= 0).all() and (case.test.sum((1, 2)) > 0).all()
    assert workloads.WORKLOADS[name].about


def test_what_they_promise():
    """Each workload has the skew, idle source, rotation or burst that its name says."""
    drawn = {name: workloads.draw(name, SMALL) for name in workloads.WORKLOADS}
    by_rank = {name: case.test.sum(1).reshape(3, 8, 4).sum(2) for name, case in drawn.items()}
    ratio = {name: loads.max(1)[0] / loads.double().mean(1) for name, loads in by_rank.items()}
    assert (ratio["uniform"] < 1.1).all()
    assert ratio["zipf"].mean() == pytest.approx(workloads.ZIPF_TARGET, rel=0.15)
    assert (by_rank["hot rank"].argmax(1) == 0).all() and (ratio["hot rank"] > 2).all()
    assert (drawn["idle source"].test[:, 0] == 0).all()
    assert (drawn["idle source"].test[:, 1:].sum(2) > 0).all()
    by_source = drawn["ragged sources"].test.sum(2).double()
    assert (by_source.max(1)[0] > 2 * by_source.mean(1)).all()
    hottest = drawn["rotating"].test.sum(1).argmax(1)
    assert len(set(hottest.tolist())) == 3
    sizes = drawn["burst"].test.sum((1, 2))
    assert sizes[-1] > 7 * sizes[0]


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [("no such", SMALL, "name must be one of"), ("uniform", Settings(5, 32), "ranks must divide")],
)
def test_wrong_arguments(name, settings, match):
    """An unknown workload or a wrong number of ranks is refused by name."""
    with pytest.raises(ValueError, match=match):
        workloads.draw(name, settings)


def test_the_adversary_beats_chance():
    """The adversary's counts are worse for a placement than the same counts shuffled."""
    placement = Placement.from_topology(topologies.from_name("ring:8"), 40, 32, 8)
    counts = workloads.adversary(placement, SMALL)
    assert counts.shape == (3, 8, 32) and counts.dtype == torch.int64
    assert counts.sum() == pytest.approx(3 * 8 * 4096, rel=0.01)
    worst = workloads.judge(placement, counts, 1e-3)
    rng = np.random.default_rng(0)
    shuffled = torch.from_numpy(rng.permuted(counts.numpy()[:, 0], axis=1)).unsqueeze(1)
    chance = workloads.judge(placement, shuffled.repeat(1, 8, 1), 1e-3)
    assert worst["highs"] > 1.1 * chance["highs"]


def test_judging():
    """An empty batch counts as balanced, and a plan above even or off HiGHS's optimum fails."""
    placement = Placement.from_phy2log(torch.tensor([0, 1, 1, 2]), 2, n_logical=3)
    found = workloads.judge(placement, torch.tensor([[[2, 8, 2]], [[0, 0, 0]]]), 1e-3)
    # 12 tokens over 2 ranks; the second batch is empty and counts as balanced.
    assert found["highs"] == pytest.approx(1.0) and found["lp"] == pytest.approx(1.0, rel=1e-3)
    assert workloads.passed(found, 1e-3)
    for change in ({"worse_than_even": 1}, {"distance": 2e-3}, {"distance": -1e-3}):
        assert not workloads.passed({**found, **change}, 1e-3)


def test_command(tmp_path, capsys, monkeypatch):
    """The command judges every placement, and fails if HiGHS's optimum is not met."""
    path = tmp_path / "w.json"
    common = "workloads --ep 8 --experts 64 --batches 2 --workload zipf,burst".split()
    some = [*common, "--slots", "2", "--placement", "none,eplb,chain,place,cube,torus:4x8"]
    assert cli.main([*some, "--json", str(path), "--markdown", "-"]) == cli.OK
    report = json.loads(path.read_text())
    assert len(report["rows"]) == 12 and list(report["about"]) == ["zipf", "burst"]
    assert sum("reason" in row for row in report["rows"]) == 2
    assert "| burst | chain |" in capsys.readouterr().out
    for row in report["rows"]:
        if "reason" not in row:
            assert row["passed"] and 1 <= row["highs"] <= row["lp"] * (1 + 1e-6)
            assert row["lp"] <= row["even"] * (1 + 1e-6)
    monkeypatch.setattr(workloads, "highs_optimum", lambda *job: 1.0)
    assert cli.main([*common, "--placement", "eplb"]) == cli.FAILED
    assert "distance from HiGHS" in capsys.readouterr().err
    assert cli.main([*common, "--ep", "7"]) == cli.USAGE
    assert "--ep: 7 does not divide" in capsys.readouterr().err
