"""The cost of plans by time: tables, files, and fits to measured times."""

import copy
import json
import pickle

import numpy as np
import pytest
from helpers.balancers import DEVICE
from helpers.time_plans import COST

from lplb_triton import TimeCost
from lplb_triton.bench import cli
from lplb_triton.bench.advise import packaged
from lplb_triton.bench.advise.calibrate import calibrate
from lplb_triton.bench.tables import make_calibration_grid
from lplb_triton.costs.gemm import PACKAGED, GemmModel, Point


def table_of(**changes):
    """Return arguments of a small cost, some changed."""
    table = np.add.outer(np.arange(2) * 2.0, np.add.outer(np.arange(4) * 5.0, np.arange(6.0)))
    return {"table": table, "slopes": (1.0, 2.0), "per_row": 0.01, **changes}


def test_a_models_table_is_the_model():
    """For whole rows of all sizes, the table predicts what the fitted model does."""
    rng = np.random.default_rng(0)
    cost = TimeCost.for_model(7168, 2048)
    for most in (8, 200, 900):
        rows = rng.integers(0, most, (50, 9)) * (rng.random((50, 9)) < 0.7)
        expected = PACKAGED(7168, 2048, rows.astype(float))
        assert cost.predict(rows) == pytest.approx(expected, rel=1e-4)
        # Steps that are half as high are never above whole ones.
        assert (cost.predict(rows, smoothed=True) <= cost.predict(rows)).all()
    many = rng.integers(9000, 12000, (20, 9))
    assert cost.predict(many) == pytest.approx(PACKAGED(7168, 2048, many.astype(float)), rel=0.02)
    assert cost.predict(np.zeros((3, 5), dtype=int)).tolist() == [0, 0, 0]


def test_packaged_numbers_are_the_fit_to_the_packaged_times():
    """The package's own numbers are what fitting the table of measured times gives."""
    fitted = packaged(7168, 2048)
    for name in ("base", "bandwidth", "narrow", "wide"):
        assert getattr(PACKAGED, name) == pytest.approx(getattr(fitted, name), rel=1e-3)


def test_costs_are_saved_and_loaded(tmp_path):
    """A loaded cost equals the saved one; equal costs give equal files, and changes are noticed."""
    path, again = tmp_path / "cost.json", tmp_path / "again.json"
    COST.save(path)
    TimeCost.for_model(2048, 768).save(again)
    assert TimeCost.load(path) == COST and path.read_bytes() == again.read_bytes()
    assert TimeCost.load(path).source == COST.source
    assert hash(TimeCost.load(path)) == hash(COST)
    assert TimeCost.for_model(2048, 769).checksum != COST.checksum
    content = json.loads(path.read_text())

    def refuse(match, **changes):
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(ValueError, match=match):
            TimeCost.load(path)

    refuse("'sha256' does not match", cost={**content["cost"], "per_row": 0.5})
    refuse("upgrade the package", format_version=2)
    refuse("not a file of a cost", format="something else")
    refuse("has unknown members: 'more'", more=1)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TimeCost.load(path)
    with pytest.raises(FileNotFoundError):
        TimeCost.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"table": np.zeros((2, 3))}, "table must be"),
        ({"table": -np.ones((2, 3, 4))}, "table must hold finite times"),
        ({"table": np.ones((2, 3, 4)) * np.arange(4, 0, -1)}, "table must not fall"),
        ({"smoothed": np.ones((2, 4, 7))}, "smoothed must have the shape"),
        ({"table": "many"}, "table must be an array of numbers"),
        ({"sides": (128, 200)}, "sides must be powers of two"),
        ({"sides": (1, 2)}, "sides must be at least 2"),
        ({"slopes": (1.0,)}, "slopes must be a pair"),
        ({"slopes": 1.0}, "slopes must be a pair"),
        ({"slopes": (1.0, 1e39)}, "slopes must be in"),
        ({"per_row": -1.0}, "per_row must be in"),
        ({"per_row": float("nan")}, "per_row must be in"),
        ({"wide_from": 0}, "wide_from must be at least 1"),
        ({"wide_from": 2**20 + 1}, "wide_from must be at most 1048576"),
    ],
)
def test_bad_costs_are_refused_by_name(changes, match):
    """Arguments that make no cost are named."""
    TimeCost(**table_of())
    with pytest.raises(ValueError, match=match):
        TimeCost(**table_of(**changes))


def test_copies_are_read_only():
    """Copies, like the cost itself, can't be changed behind the checksum's back."""
    cost = TimeCost(**table_of())
    for one in (cost, copy.deepcopy(cost), pickle.loads(pickle.dumps(cost))):
        assert one == cost
        with pytest.raises(ValueError, match="read-only"):
            one.table[0, 1, 1] = 7.0


def test_bad_fits_are_refused_by_name():
    """Models that are none, and times that no fit can use, are named."""
    with pytest.raises(TypeError, match="model must be a GemmModel, got str"):
        TimeCost.for_model(64, 32, model="packaged")
    for us in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="points must have positive times"):
            TimeCost.fit([(64, 32, [1, 2], us)] * 8)


def test_calibration_predicts_the_times_that_it_was_given():
    """`lplb-bench calibrate` finds the numbers of a made-up GPU from the times of its products."""
    truth = GemmModel(30.0, 3e6, 3.5, 11.0, 0.0, 0.0, "made up")

    def time_rows(rows):
        return float(truth(2048, 768, np.array(rows, dtype=float)))

    cost, points, predicted = calibrate(2048, 768, 6, time_rows, "a test")
    assert cost.most_active == 6 and cost.wide_from == 129 and "a test" in cost.source
    assert predicted == pytest.approx([point.us for point in points], rel=0.02)
    rows = [
        {"rows": p.rows, "us": p.us, "predicted": us}
        for p, us in zip(points, predicted, strict=True)
    ]
    sizes = {"slots": 6, "hidden": 2048, "inner": 768, "cost": {"wide_from": 129}}
    grid = make_calibration_grid({"rows": rows, **sizes})
    assert len(grid.rows) == len(points) and "from 129 rows" in grid.notes[0]


def test_calibrate_needs_a_gpu(tmp_path, capsys, monkeypatch):
    """Without a GPU the command ends with a message, and writes nothing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "cost.json"
    if DEVICE == "cpu":
        assert cli.main(["calibrate", "--slots", "4", "-o", str(path)]) == cli.USAGE
        assert "GPU" in capsys.readouterr().err
    assert cli.main(["calibrate", "--slots", "4", "-o", "-"]) == cli.USAGE
    capsys.readouterr()
    # No cost has room for more, which is said before anything is measured.
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--slots", "1024", "-o", str(path)])
    assert "1023" in capsys.readouterr().err
    assert not path.exists()


def test_bad_rows_are_refused():
    """Rows that are negative or no integers, or in too many slots, are named."""
    cost = TimeCost(**table_of())
    for rows in ([-1], [0.5], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match="rows must be"):
            cost.predict(rows)


def test_a_fit_finds_the_threshold_and_the_times():
    """From times of a model whose tiles widen at another size, the fit finds that size."""
    truth = GemmModel(15.0, 2e6, 5.0, 14.0, 0.0, 0.0, "made up", few_rows=64)
    points = []
    for total in (72, 256, 512, 800, 1100, 4096, 16384):
        for rows in ([total // 8] * 8, [total - 7] + [1] * 7):
            us = float(truth(2048, 768, np.array(rows, dtype=float)))
            points.append(Point(2048, 768, rows, us))
    cost = TimeCost.fit(points, source="a test")
    assert cost.wide_from == 65 and "a test" in cost.source
    for point in points:
        assert cost.predict(point.rows) == pytest.approx(point.us, rel=0.02)
    with pytest.raises(ValueError, match="eight or more"):
        TimeCost.fit(points[:5])
    with pytest.raises(ValueError, match="one size"):
        TimeCost.fit([*points, Point(64, 64, [1], 1.0)])
    with pytest.raises(ValueError, match="positive times"):
        TimeCost.fit([*points[:-1], points[-1]._replace(us=0.0)])
