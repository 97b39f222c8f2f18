"""lplb-bench placement: cases, rows, the command and its outputs."""

import json

import numpy as np
import pytest
import torch

from lplb_triton import Placement
from lplb_triton.bench import cli, placement
from lplb_triton.traces.trace import Trace, save


@pytest.fixture
def trace():
    rng = np.random.default_rng(0)
    mean = rng.lognormal(0, 1, (2, 1, 16)) * 100
    counts = (mean * rng.lognormal(0, 0.3, (24, 2, 2, 16))).astype(np.int64)
    return Trace(counts, np.arange(24))


def test_cases_split_history_from_test(trace):
    """Each layer is a case, with the first batches as history and the rest as test."""
    cases = placement.trace_cases(trace, 0.5)
    assert len(cases) == 2
    assert cases[1].history.equal(torch.from_numpy(trace.counts[:12, 1].sum(1)))
    assert cases[1].test.equal(torch.from_numpy(trace.counts[12:, 1]))


def test_synthetic_cases_are_the_seeds(trace):
    """Each seed draws a history of its own, the same one in every call."""
    one, two = placement.synthetic_cases(32, (3, 4))
    assert one.name == "seed 3" and not one.history.equal(two.history)
    assert one.history.equal(placement.synthetic_cases(32, (3,))[0].history)
    assert (one.history.sum(1) - placement.SYNTHETIC_TOKENS).abs().max() <= 32


def test_command_writes_every_output(trace, tmp_path, capsys):
    """The command writes JSON, Markdown and a picture, without sizes that don't fit."""
    path = tmp_path / "loads.npz"
    save(path, trace)
    published = tmp_path / "eplb.py"
    published.write_text("from lplb_triton import rebalance_experts\n")
    arguments = [
        "placement",
        "--trace",
        str(path),
        "--ep",
        "4,5",
        "--slots",
        "1",
        "--device",
        "cpu",
    ]
    arguments += [
        "--trials",
        "40",
        "--published",
        str(published),
        "--json",
        str(tmp_path / "a.json"),
    ]
    arguments += [
        "--expert-bytes",
        "1000000000",
        "--markdown",
        "-",
        "--png",
        str(tmp_path / "a.png"),
    ]
    assert cli.main(arguments) == cli.OK
    report = json.loads((tmp_path / "a.json").read_text())
    (row,) = report["rows"]
    assert (row["ep"], row["slots"], len(row["cases"])) == (4, 1, 2)
    for values in row["methods"].values():
        assert all(
            whole >= lp - 1e-9 for whole, lp in zip(values["integer"], values["lp"], strict=True)
        )
    home = {name: values for name, values in row["methods"].items() if name.startswith("home")}
    # One redundant slot a rank is all that isn't at home; a re-placement fills nothing else.
    assert len(home) == 3
    for values in home.values():
        assert values["remote"] == [1.0, 1.0] and max(values["moved"]) <= 4
    assert min(row["methods"]["eplb"]["remote"]) > 1
    assert report["expert_bytes"] == 1_000_000_000
    excess = {name: np.mean(values["lp"]) for name, values in row["methods"].items()}
    assert excess["place"] < excess["eplb"]
    assert report["published"]["same"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "place/EPLB" in printed
    moved = np.mean(row["methods"]["eplb"]["moved"])
    even = np.mean(row["methods"]["eplb"]["even"])
    remote = np.mean(row["methods"]["eplb"]["remote"])
    assert any(
        line.startswith(f"| 4 | 1 | EPLB | {100 * even:.2f}% |")
        and line.endswith(f"| {remote:.2f} | {moved:.1f} | {moved:.2f} |")
        for line in printed.splitlines()
    )


def test_remote_slots_and_moved_weights_are_counted():
    """Slots away from an expert's home are remote, and weights that a rank lacked are moved."""
    # Four experts on two ranks, three slots each: experts 2 and 0 have a copy away from home.
    before = Placement.from_phy2log([0, 1, 2, 2, 3, 0], 2)
    assert placement.count_remote(before) == 2
    assert placement.count_moved(before, before) == 0
    # The same weights in other slots of their ranks, and then expert 1 in place of 0 on rank 1.
    shuffled = Placement.from_phy2log([2, 1, 0, 0, 3, 2], 2)
    assert placement.count_moved(before, shuffled) == 0 and placement.count_remote(shuffled) == 2
    assert placement.count_moved(before, Placement.from_phy2log([0, 1, 2, 2, 3, 1], 2)) == 1


def test_moves_are_counted(monkeypatch):
    """At a penalty of 1, priced placements move nothing where EPLB moves weights."""
    for name, value in (("SYNTHETIC_HISTORY", 24), ("SYNTHETIC_TEST", 8), ("DRIFT_STEPS", 1)):
        monkeypatch.setattr(placement, name, value)
    found = placement.measure_moves(8, 1, 1.0, torch.device("cpu"), trials=20)["methods"]
    assert found["priced"]["moved"] == 0 < found["eplb"]["moved"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ep", "7"], "--ep"),
        (["--layers", "99"], "--layers"),
        (["--published", "missing.py"], "--published"),
        (["--json", "-", "--markdown", "-"], "--json"),
    ],
)
def test_wrong_use(trace, tmp_path, capsys, arguments, message):
    """Sizes, layers and files that don't fit are refused by the option's name."""
    save(tmp_path / "loads.npz", trace)
    base = ["placement", "--trace", str(tmp_path / "loads.npz"), "--device", "cpu", "--trials", "1"]
    base += ["--slots", "1"] + (["--ep", "4"] if "--ep" not in arguments else [])
    assert cli.main([*base, *arguments]) == cli.USAGE
    assert message in capsys.readouterr().err
