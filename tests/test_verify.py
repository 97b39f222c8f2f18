"""The comparison with HiGHS: that it passes good answers and catches bad ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lplb_triton.bench import cli, verify


def test_command(tmp_path, capsys):
    path = tmp_path / "deep" / "verify.json"
    common = ["verify", "--device", "cpu", "--backend", "torch", "--instances", "17"]
    assert cli.main([*common, "--json", str(path)]) == cli.OK
    report = json.loads(path.read_text())
    assert [v["tolerance"] for v in report["verdicts"]] == [1e-3, 1e-4]
    assert all(v["instances"] >= 17 and v["not_certified"] == 0 for v in report["verdicts"])
    capsys.readouterr()
    assert cli.main([*common, "--json", "-"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["command"] == "verify"


@pytest.mark.parametrize(
    "arguments",
    [["--instances", "3,4"], ["--instances", "0"], ["--tolerance", "2"]],
)
def test_wrong_usage(arguments, capsys):
    try:
        code = cli.main(["verify", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE
    assert arguments[0] in capsys.readouterr().err


def _worse(field, change):
    def solver(problem, **kwargs):
        solution = verify_solve(problem, **kwargs)
        return replace(solution, **{field: change(getattr(solution, field))})

    verify_solve = verify.solve
    return solver


@pytest.mark.parametrize(
    ("field", "change", "counted"),
    [
        ("shares", lambda t: t * 0.9, "infeasible"),
        ("lower_bound", lambda t: t * 1.01 + 1, "bound_above_optimum"),
        ("max_load", lambda t: t * 0.99, "load_below_optimum"),
        ("status", torch.ones_like, "not_certified"),
    ],
)
def test_a_wrong_answer_is_counted(monkeypatch, field, change, counted):
    monkeypatch.setattr(verify, "solve", _worse(field, change))
    (verdict,) = verify.verify(17, tolerances=(1e-3,))
    assert getattr(verdict, counted) > 0
    assert verdict.sound == (counted == "not_certified")


def test_highs_on_a_problem_solved_by_hand():
    mask = np.array([[True, False], [True, True], [False, True]])
    optimum = verify.highs_optimum(np.array([6.0, 3.0]), np.array([0.0, 1.0, 2.0]), mask)
    assert optimum == pytest.approx(4.0)
