"""Advice on the objective of a balancer, by predicted times."""

import pytest

from lplb_triton.bench import advise, cli
from lplb_triton.bench.advise import objective
from lplb_triton.bench.placement import synthetic_cases
from lplb_triton.bench.tables.advise import make_objective_grid
from lplb_triton.costs.gemm import PACKAGED

MODEL = advise.Model(7168, 2048, 32, 4)


@pytest.fixture(autouse=True, scope="module")
def few_sizes():
    """Two sizes and one batch are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "OBJECTIVE_GRID", (8, 16384))
        patch.setattr(objective, "BATCHES", 1)
        yield


@pytest.fixture(scope="module")
def rows(few_sizes):
    """Advice for eight ranks, one or two slots."""
    return advise.advise_objective(MODEL, PACKAGED, synthetic_cases(32, (0,)), 8, 100, (1, 2))


def test_every_size_has_every_way(rows):
    """Sizes ascend, the one asked for among them, and each way says on what it is placed."""
    assert [row["tokens"] for row in rows] == sorted({*objective.OBJECTIVE_GRID, 100})
    for row in rows:
        assert row["placed"]["none"] is None
        assert {row["placed"][way]["slots"] for way in ("even", "tokens", "time")} <= {1, 2}
        layer = row["layer_us"]
        # Each is on its own best placement, so that of tokens bounds that of time.
        assert layer["time"] <= layer["tokens"] * 1.01


def test_the_best_counts_what_a_plan_takes(rows):
    """The best way has the least time with what it adds, and large batches are balanced."""
    for row in rows:
        sums = {way: row["layer_us"][way] + row["added_us"][way] for way in row["layer_us"]}
        assert sums[row["best"]] == min(sums.values())
        assert row["added_us"]["time"] == row["added_us"]["tokens"] + objective.TIME_US
        assert row["added_us"]["none"] == row["added_us"]["even"] == 0
    assert rows[-1]["best"] in ("tokens", "time")


def test_training_takes_three_times_as_long(rows):
    """With training the products count three times, and what a plan takes once."""
    trained = advise.advise_objective(
        MODEL, PACKAGED, synthetic_cases(32, (0,)), 8, 100, (1, 2), training=True
    )
    for one, other in zip(rows, trained, strict=True):
        assert other["layer_us"]["none"] == pytest.approx(3 * one["layer_us"]["none"])
        assert other["added_us"] == one["added_us"]


def test_the_command_recommends(capsys):
    """The command says which objective is the best one for the tokens asked for."""
    line = "advise --gemm table --model gpt-oss-120b --ep 8 --slots 1 --tokens 16384"
    assert cli.main(line.split()) == 0
    out = capsys.readouterr().out
    assert "Predicted: objectives" in out
    assert "With 16384 tokens per rank: objective=" in out


@pytest.mark.parametrize(
    ("best", "said"),
    [
        ("none", "With 9 tokens per rank: no copies; no plan of a batch pays."),
        ("even", "With 9 tokens per rank: an even split; no plan of a batch pays."),
        ("tokens", "With 9 tokens per rank: objective='tokens' on chain 1."),
        ("time", "With 9 tokens per rank: objective='time' on chain 1; lplb_triton.place("),
    ],
)
def test_what_is_said(best, said):
    """The note names the best way, its placement, and where a plan doesn't pay."""
    ways = ("none", "even", "tokens", "time")
    row = {
        "tokens": 9,
        "layer_us": dict.fromkeys(ways, 12345.6),
        "placed": dict.fromkeys(ways, {"placement": "chain", "slots": 1}),
        "best": best,
    }
    grid = make_objective_grid({"objective": [row], "options": {"tokens": 9}})
    assert grid.notes[1].startswith(said)
    assert grid.rows == [("9", *["12346"] * 4, "chain 1", best)]


@pytest.mark.parametrize(
    "sizes", [["--experts", "4096", "--ep", "4"], ["--experts", "16", "--tokens", "2147483647"]]
)
def test_what_no_plan_by_time_takes_is_left_out(capsys, sizes):
    """Where a rank has too many experts, or a batch too many rows, there is no such table."""
    layer = ["advise", "--hidden", "64", "--inner", "64", "--top-k", "2", "--slots", "1"]
    assert cli.main([*layer, *sizes, "--gemm", "table"]) == cli.OK
    said = capsys.readouterr().out
    assert "What it costs" in said and "objective=" not in said
