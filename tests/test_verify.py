"""The comparison with HiGHS: that it passes good answers and catches bad ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lplb_triton.bench import cli, corpus, tables
from lplb_triton.bench.commands import verify as command
from lplb_triton.bench.measure.cases import Case
from lplb_triton.bench.tables.cells import format_share
from lplb_triton.testing import instances, verify


def test_command(tmp_path, capsys):
    """The command compares three parts at two tolerances, and all are certified."""
    path = tmp_path / "deep" / "verify.json"
    common = ["verify", "--device", "cpu", "--backend", "torch", "--instances", "17"]
    common += ["--batches", "1", "--most-ranks", "8"]
    assert cli.main([*common, "--json", str(path)]) == cli.OK
    report = json.loads(path.read_text())
    assert [(v["part"], v["tolerance"]) for v in report["verdicts"]] == [
        (part, tolerance) for part in tables.PARTS for tolerance in (1e-3, 1e-4)
    ]
    assert all(v["instances"] >= 17 and v["not_certified"] == 0 for v in report["verdicts"])
    assert (report["options"]["batches"], report["options"]["most_ranks"]) == (1, 8)
    shown = capsys.readouterr().out
    assert shown.count("100.00%") == 6 and "steps" not in shown
    titles = [line.split(",")[0].strip() for line in shown.splitlines() if "HiGHS" in line]
    assert titles == ["Random programs", "Real traffic", "Hard placements"]
    assert cli.main([*common, "--json", "-"]) == cli.OK
    assert json.loads(capsys.readouterr().out)["command"] == "verify"


@pytest.mark.parametrize(
    "arguments",
    [["--instances", "3,4"], ["--instances", "0"], ["--tolerance", "2"]],
)
def test_wrong_usage(arguments, capsys):
    """A wrong option is refused as wrong usage by its name."""
    try:
        code = cli.main(["verify", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == cli.USAGE
    assert arguments[0] in capsys.readouterr().err


def small_parts(n_batches=1):
    """Real traffic and hard placements that an interpreted kernel solves in seconds."""
    cases = (Case(32, 8, "eplb", 1), Case(32, 16, "chain", 2))
    names = [name for name, shape in corpus.HARD.items() if shape.ranks <= 16]
    names.append("12 to 60 copies on 64 ranks")
    shapes = {name: corpus.HARD[name] for name in names}
    return [
        corpus.make_traffic_part(n_batches, 0, cases),
        corpus.make_hard_part(n_batches, 0, shapes),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on the GPU, see below")
def test_kernel_on_real_traffic_and_hard_placements():
    """The kernel certifies traffic and hard placements within 1e-3."""
    pytest.importorskip("triton")
    for verdict in verify.compare(small_parts(), tolerances=(1e-3,), backend="triton"):
        assert verdict.from_counts and verdict.instances > 20
        assert verdict.sound and verdict.not_certified == 0


@pytest.mark.gpu
def test_kernel_on_all_traffic_and_hard_placements():
    """The kernel on a GPU certifies all of the corpus within 1e-3."""
    parts = [corpus.make_traffic_part(1, 1), corpus.make_hard_part(2, 1)]
    for verdict in verify.compare(parts, tolerances=(1e-3,), backend="triton", device="cuda"):
        assert verdict.sound and verdict.not_certified == 0


def test_cases_of_real_traffic():
    """Real traffic covers all EP sizes, has extreme batches, and is drawn the same again."""
    assert [str(case) for case in corpus.CASES if case.explain_impossible()] == []
    for placement in ("eplb", "chain"):
        here = [case for case in corpus.CASES if case.placement == placement]
        assert {case.ep for case in here} == {8, 16, 32, 64, 72, 96, 128, 144, 256}
        assert {case.slots for case in here} == {1, 2}
    part = corpus.make_traffic_part(8, 0, [Case(256, 8, "eplb", 1), Case(256, 128, "eplb", 1)])
    assert part.steps == [(f"256 experts, EP {ep}, eplb, 1 slot", 15) for ep in (8, 128)]
    found = list(part.instances)
    assert [len(each.counts) for each in found] == [11] + 14 * [8] + [5] + 14 * [2]
    assert found[0].families == 8 * ["packaged trace, layer 0"] + [
        "no tokens",
        "one expert, most copies",
        "one expert",
    ]
    none, most, one = found[0].counts[-3:]
    assert none.sum() == 0 and most.count_nonzero() == one.count_nonzero() == 1
    again = corpus.make_traffic_part(8, 0, [Case(256, 8, "eplb", 1)]).instances
    for each, other in zip(again, found, strict=False):
        assert each.placement == other.placement and torch.equal(each.counts, other.counts)


def copies_of(placement):
    """On how many ranks each expert is."""
    ranks = torch.arange(placement.n_physical) // placement.slots_per_rank
    return (torch.zeros(placement.n_logical, placement.ep_size, dtype=torch.bool)).index_put(
        (placement.phy2log.long(), ranks), torch.tensor(True)
    )


@pytest.mark.parametrize("name", corpus.HARD)
def test_hard_placements(name):
    """A hard placement has the copies or connected parts that its shape says."""
    shape = corpus.HARD[name]
    (instance,) = corpus.make_hard_part(2, 3, {name: shape}).instances
    held, n = copies_of(instance.placement), len(instances.FAMILIES)
    assert held.shape[1] == shape.ranks and instance.placement.slots_per_rank == shape.slots
    assert len(instance.counts) == n * (1 if shape.ranks >= 128 else 2) + 3
    if isinstance(shape, corpus.Wide):
        widest = held.sum(1).sort(descending=True).values[: len(shape.copies)]
        assert widest.tolist() == sorted(shape.copies, reverse=True)
        return
    # Ranks that copies join, by taking the square of who is joined with whom until it stays.
    joined = torch.eye(shape.ranks, dtype=torch.bool)
    for ranks in held[held.sum(1) > 1]:
        joined |= ranks & ranks.unsqueeze(1)
    for _ in range(shape.ranks.bit_length()):
        joined = (joined.float() @ joined.float()) > 0
    sizes = sorted(int(row.sum()) for row in torch.unique(joined, dim=0))
    assert sizes == sorted([1] * (shape.ranks - sum(shape.sizes)) + list(shape.sizes))


def test_parts():
    """Parts are as large as asked for, and their steps count their instances."""
    assert [part.name for part in corpus.make_parts(17, 0)] == ["random"]
    random, real, hard = corpus.make_parts(17, 0, 1, 16)
    assert random.as_problems and not real.as_problems and not hard.as_problems
    assert max(case.ep for case in corpus.CASES if (str(case), 15) in real.steps) == 16
    assert {corpus.HARD[name].ranks for name, _ in hard.steps} == {8, 16}
    assert sum(n for _, n in hard.steps) == len(list(hard.instances))


@pytest.mark.parametrize(
    ("part", "tolerance", "not_certified", "good"),
    [
        ("random", 1e-3, 1, False),
        ("random", 1e-4, 2, True),
        ("random", 1e-4, 3, False),
        ("traffic", 1e-3, 1, False),
        ("traffic", 1e-4, 500, True),
        ("hard", 1e-4, 500, True),
    ],
)
def test_what_must_be_certified(part, tolerance, not_certified, good):
    """All must be certified at 1e-3, and 999 of 1000 random programs at 1e-4."""
    verdict = verify.Verdict(tolerance, True, part, 2040, not_certified=not_certified)
    assert command._is_good(verdict, 1e-3) == good
    verdict.infeasible = 1
    assert not command._is_good(verdict, 1e-3)


def test_share_that_was_certified():
    """A share of certified instances is rounded down, so 100% means all."""
    assert verify.Verdict(1e-4, instances=1000, not_certified=1).certified == 0.999
    assert verify.Verdict(1e-4).certified == 1
    shown = [format_share(1 - bad / 10**5) for bad in (0, 1, 10, 10**5)]
    assert shown == ["100.00%", "99.99%", "99.99%", "0.00%"]


def test_kernels_count_steps(capsys):
    """Tables say iterations for problems and steps for counts."""
    verdicts = [
        verify.Verdict(1e-3, False, "random", 4, max_iterations=7, total_iterations=10),
        verify.Verdict(1e-3, True, "random", 4, max_iterations=2, total_iterations=3),
    ]
    tables.show_verdicts(tables.console(), verdicts, title="x")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["iterations,", "mean", "2.5"] in lines and ["iterations,", "max", "7"] in lines
    assert ["steps,", "mean", "0.8"] in lines and ["steps,", "max", "2"] in lines


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
    """Every kind of wrong answer is counted, and all but a wide gap are unsound."""
    monkeypatch.setattr(verify, "solve", _worse(field, change))
    (verdict,) = verify.verify(17, tolerances=(1e-3,))
    assert getattr(verdict, counted) > 0
    assert verdict.sound == (counted == "not_certified")


def test_highs_on_a_problem_solved_by_hand():
    """HiGHS finds the optimum of a program solved by hand."""
    mask = np.array([[True, False], [True, True], [False, True]])
    optimum = verify.highs_optimum(np.array([6.0, 3.0]), np.array([0.0, 1.0, 2.0]), mask)
    assert optimum == pytest.approx(4.0)
