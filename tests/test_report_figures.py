"""What a report shows beside the comparison: changes, batch sizes, times, maps, and its words."""

import base64
import io
import re

import numpy as np
import pytest
from helpers.traces import make_trace
from PIL import Image

from lplb_triton.bench import balance, report
from lplb_triton.bench.advise.predict import GRID
from lplb_triton.bench.live import find_gain
from lplb_triton.bench.report import charts, svg, words
from lplb_triton.bench.report.style import STYLE
from lplb_triton.traces import trace as traces

OPTIONS = balance.Options((8,), (1, 2), ("eplb",))


@pytest.fixture(scope="module")
def trace():
    """A small trace that says the sizes of its layers."""
    found = make_trace()
    meta = {"top_k": 2, "hidden": 4096, "inner": 1536}
    return traces.Trace(found.counts, found.steps, meta)


@pytest.fixture(scope="module")
def cells(trace):
    """One and two slots on eight ranks, placed by EPLB."""
    return balance.run(trace, OPTIONS)


def test_the_shown_combination_is_the_best_with_the_fewest_slots(trace, cells):
    """Slots that gain nothing are not shown, and what is impossible is passed over."""
    means = [cell.imbalance("integer").mean() for cell in cells]
    assert means[1] < 0.995 * means[0] and balance.choose_shown(cells) == 1
    none = balance.Cell(4, 1, "cube", reason="no")
    assert balance.choose_shown((none, cells[1], cells[0], cells[1])) == 1
    # With one slot only there is no choice; the first EP size decides.
    assert balance.choose_shown((cells[0], balance.Cell(16, 1, "cube", reason="no"))) == 0


def test_the_typical_batch_has_the_median_gain(cells):
    """As many batches gain more than the typical one as gain less."""
    cell = cells[0]
    gain = (cell.imbalance("eplb") - cell.imbalance("integer")).flatten()
    loads = cell.typical().loads
    own = (loads["eplb"].max() - loads["integer"].max()) / loads["eplb"].mean()
    assert (gain < own - 1e-9).sum() <= len(gain) / 2 >= (gain > own + 1e-9).sum()


def test_eplb_is_compared_under_every_placement(trace, cells):
    """Loads of EPLB with as many slots are the same whatever placement is balanced."""
    (chain,) = balance.run(trace, balance.Options((8,), (1,), ("chain",)))
    np.testing.assert_array_equal(chain.imbalance("eplb"), cells[0].imbalance("even"))
    assert (chain.imbalance("even") != chain.imbalance("eplb")).any()


def test_changes_are_what_a_comparison_finds(trace, cells):
    """Each change gives the figures that the whole comparison gives for it."""
    rows = {row["change"]: row for row in balance.find_changes(trace, cells[0], OPTIONS)}
    assert list(rows) == ["nothing", "slots", "chain", "fresh"]
    (chain,) = balance.run(trace, balance.Options((8,), (1,), ("chain",)))
    for name, cell in (("nothing", cells[0]), ("slots", cells[1]), ("chain", chain)):
        values = cell.imbalance("integer")
        assert rows[name]["imbalance"] == pytest.approx(values.mean())
        assert rows[name]["p95"] == pytest.approx(np.percentile(values, 95))
        assert rows[name]["bound"] == pytest.approx(cell.bound().mean(), rel=1e-6)
        assert rows[name]["slots"] == cell.slots
    # Placed by the first half of the same batches twice, history and test are alike.
    counts = np.concatenate([trace.counts[:6]] * 2)
    twice = traces.Trace(counts, np.arange(12))
    (cell,) = balance.run(twice, balance.Options((8,), (1,)))
    same = {row["change"]: row for row in balance.find_changes(twice, cell, OPTIONS)}
    assert same["fresh"]["imbalance"] == pytest.approx(same["nothing"]["imbalance"])


def test_changes_that_are_impossible_are_left_out(trace):
    """No copies have nothing to change, and full ranks take no further slot."""
    (none,) = balance.run(trace, balance.Options((8,), (1,), ("none",)))
    assert [row["change"] for row in balance.find_changes(trace, none, OPTIONS)] == ["nothing"]
    (full,) = balance.run(trace, balance.Options((2,), (16,), ("eplb",)))
    rows = balance.find_changes(trace, full, OPTIONS)
    assert [row["change"] for row in rows] == ["nothing", "chain", "fresh"]


def test_larger_batches_are_sums(trace, cells):
    """Batches twice as large are those of a trace of sums of two."""
    rows = balance.compare_batch_sizes(trace, cells[0], OPTIONS)
    assert [row["batches"] for row in rows] == [1, 2, 4]
    for name in ("none", "eplb", "integer"):
        assert rows[0][name] == pytest.approx(cells[0].imbalance(name).mean())
    counts = trace.counts.copy()
    pairs = counts[6:].reshape(3, 2, *counts.shape[1:]).sum(1)
    summed = traces.Trace(np.concatenate([counts[:6], pairs]), np.arange(9))
    (cell,) = balance.run(summed, balance.Options((8,), (1,), ("eplb",), history=6))
    assert rows[1]["integer"] == pytest.approx(cell.imbalance("integer").mean())
    assert rows[1]["rows"] == pytest.approx(pairs.sum((2, 3)).mean() / 8)


def test_times_are_predicted_for_the_models_own_sizes(trace, cells):
    """The first sizes are the trace's own, and balancing pays from where the line crosses 0."""
    found = report.predict_saving(trace, cells[1], 1e-3)
    names = [size["name"] for size in found["sizes"]]
    assert names == ["this model", "mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b"]
    own, like = found["sizes"][0], found["sizes"][-1]
    # They are as wide as Qwen3's, and have the trace's experts.
    assert own["net"] == like["net"] and own["experts"] == 32 and own["top_k"] == 2
    assert found["tokens"] == pytest.approx(trace.totals().sum(2).mean() / 2 / 8)
    for size in found["sizes"]:
        assert len(size["net"]) == len(GRID) == len(found["overhead_us"])
        first = GRID.index(size["pays_from"]["eplb"])
        assert min(size["net"][first:]) > 0 >= size["net"][first - 1]
        assert size["pays_from"]["none"] <= size["pays_from"]["eplb"]
        # No plan by time is slower than the token plan but by what steps half as high allow.
        assert len(size["by_time"]) == len(found["small"]) and min(size["by_time"]) > -0.05
    answer = words.answer_batch_size(found, [{"batches": 1, "integer": 1, "eplb": 1}])
    assert "In batches of 16, 64, 256 tokens of a rank" in answer
    # What is saved in large batches is what the imbalance says.
    imbalance = {name: cells[1].imbalance(name).mean() for name in ("eplb", "lp")}
    assert own["net"][-1] == pytest.approx(1 - imbalance["lp"] / imbalance["eplb"], abs=0.03)


@pytest.mark.parametrize("meta", [{}, {"top_k": "2", "hidden": True, "inner": 0}])
def test_unknown_sizes_are_those_of_published_models(cells, meta):
    """Without sizes of its own a trace has no tokens per rank, and no model of its own."""
    found = make_trace()
    saving = report.predict_saving(traces.Trace(found.counts, found.steps, meta), cells[1], 1e-3)
    assert saving["tokens"] is None
    assert [size["top_k"] for size in saving["sizes"]] == [2, 8, 8]


def test_no_tokens_save_nothing():
    """A trace whose test batches are empty has no times, and its page says that it never pays."""
    counts = make_trace(layers=1).counts.copy()
    counts[6:] = 0
    trace = traces.Trace(counts, np.arange(12))
    cells = balance.run(trace, balance.Options((8,), (1,)))
    saving = report.predict_saving(trace, cells[0], 1e-3)
    assert all(set(size["net"]) == {None} for size in saving["sizes"])
    answer = words.answer_batch_size(saving, balance.compare_batch_sizes(trace, cells[0], OPTIONS))
    assert answer.count("does not pay up to 131,072") == 3
    assert {size["by_time"] for size in saving["sizes"]} == {None} and "plans by time" not in answer


def test_maps_hold_rank_loads(cells):
    """The maps have every rank's load over the mean, of at most 48 batches and 8 layers."""
    found = report.rank_loads(cells[0])
    assert found["batches"] == list(range(6)) and [r["layer"] for r in found["layers"]] == [0, 1]
    percent = np.array(found["layers"][1]["integer"])
    assert percent.shape == (6, 8)
    assert percent.max(1) / 100 == pytest.approx(cells[0].imbalance("integer")[1], abs=0.006)
    long = balance.run(make_trace(batches=120, layers=10), balance.Options((8,), (1,)))[0]
    found = report.rank_loads(long)
    assert len(found["batches"]) == 48 and found["batches"][-1] == 59
    assert [row["layer"] for row in found["layers"]] == [0, 1, 3, 4, 5, 6, 8, 9]


def read_png(address):
    """Read the image of a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(address.split("base64,")[1])))


def test_maps_show_hot_and_cold_by_colour_and_opacity():
    """More than the mean is orange, less is blue, the mean is transparent, and extremes opaque."""
    colors = charts.color_loads(np.array([[1.0, 2.0, 0.5], [1.1, 8.0, 0.0]]), 2.0)
    image = read_png(svg.encode_png(colors))
    assert image.size == (3, 2) and image.mode == "RGBA"
    assert image.getpixel((0, 0))[3] == 0
    assert image.getpixel((1, 0)) == image.getpixel((1, 1)) == (*charts.HOT, 255)
    assert image.getpixel((2, 0)) == image.getpixel((2, 1)) == (*charts.COLD, 255)
    assert 0 < image.getpixel((0, 1))[3] < 255


def test_the_map_of_experts_starts_with_the_hottest():
    """The first row of the map of experts is the most loaded expert, whose number is named."""
    counts = np.full((6, 1, 1, 4), 10)
    counts[3:, 0, 0, 2] = 100
    found = report.heat(traces.Trace(counts, np.arange(6)), 0)
    assert found["steps"] == list(range(6)) and found["tokens"][4] == [10, 10, 100, 10]
    shown = report.sections.show_experts(found)
    assert "most loaded, in times the mean load: 2 (" in shown.lower()
    image = read_png(shown.split('href="')[1].split('"')[0])
    assert image.size == (6, 4)
    assert image.getpixel((0, 0))[3] == 0 and image.getpixel((5, 0))[:3] == charts.HOT
    assert image.getpixel((5, 1))[:3] == charts.COLD


def test_round_numbers_of_axes():
    """Axes have two to ten round numbers within their ends, whatever the range."""
    rng = np.random.default_rng(0)
    for scale in 10.0 ** rng.uniform(-3, 6, 200):
        low = scale * rng.uniform(-1, 1)
        high = low + scale * rng.uniform(0.1, 3)
        ticks = svg.choose_ticks(low, high)
        assert 2 <= len(ticks) <= 10 and low - 1e-6 * scale <= ticks[0] <= ticks[-1] <= high * 1.01
    assert [svg.format_tick(v) for v in (0.1 + 0.2, 1.0, 4096, 1e6)] == [
        "0.3", "1", "4,096", "1,000,000"
    ]  # fmt: skip


def test_long_traces_are_drawn_as_means():
    """A line has at most 240 points, each the mean of as many batches."""
    values = np.arange(1000.0)[None]
    thin, each = charts.thin_out(values)
    assert each == 5 and thin.shape == (1, 200) and thin[0, 0] == 2.0
    assert charts.thin_out(values[:, :240])[1] == 1


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (0.174, "17% fewer tokens than"),
        (0.004, "about as many tokens as"),
        (-0.05, "5% more tokens than"),
    ],
)
def test_gains_in_words(saved, said):
    """A gain, none and a loss are named as such."""
    assert words.compare_tokens(saved) == said


def test_headline_without_copies(trace):
    """Where there are no copies, the headline is the imbalance, and the page has no minus zero."""
    (none,) = balance.run(trace, balance.Options((8,), (1,), ("none",)))
    values = {name: float(none.imbalance(name).mean()) for name in ("none", "eplb", "integer")}
    stated = {name: {"mean": v, "p95": v} for name, v in values.items()}
    cell = {"slots": 0, "imbalance": stated, "by_layer": [{"bound": [1.0]}]}
    headline, number, unit, text = words.say_headline(cell)
    assert "nothing is balanced" in headline and number == f"{values['none']:.2f}"
    assert "mean load" in unit and f"{values['eplb']:.2f}" in text


def test_one_batch_is_a_level_line():
    """A picture of a single batch has lines that can be seen."""
    lines = [charts.Line("none", [1.5]), charts.Line("lp", [1.1])]
    drawn = charts.draw_lines("a", "b", "c", lines, x=[0.0], x_axis="d", y_axis="e", below=[1.0])
    assert drawn.count('class="line') == 4 and drawn.count("L670.0") >= 2


def test_counts_of_things():
    """One thing is in the singular, several in the plural."""
    said = [words.count_things(1, "test batch"), words.count_things(1200, "test batch")]
    assert said == ["1 test batch", "1,200 test batches"] and words.count_slots(2) == "2 slots"


def test_advice_without_a_gain(trace, cells):
    """Where the linear program gains under 1%, the answer is that EPLB is enough."""
    figures = {"none": 1.5, "eplb": 1.004, "integer": 1.003}
    cell = {
        **{"ep": 8, "slots": 1, "placement": "eplb", "by_layer": [{"bound": [1.0]}]},
        "imbalance": {name: {"mean": v, "p95": v} for name, v in figures.items()},
    }
    change = {"change": "slots", "slots": 2, "imbalance": 1.0}
    report_of = {"shown": {"changes": [{"imbalance": 1.003}, change]}}
    answer = words.answer_changes(report_of, cell)
    assert "EPLB alone is enough" in answer and "each gain less than 1%" in answer
    change["imbalance"] = 0.98
    assert "One more slot per rank (2)" in words.answer_changes(report_of, cell)
    assert "--slots 1,2" in words.answer_changes(report_of, {**cell, "slots": 0})


def make_advice(starts, tokens, names=("this model", "mixtral-8x7b", "deepseek-v3")):
    """Answer what to change where balancing pays from given sizes of batches on."""
    figures = {"none": 1.5, "eplb": 1.2, "integer": 1.01}
    cell = {
        **{"ep": 8, "slots": 2, "placement": "eplb", "by_layer": [{"bound": [1.0]}]},
        "imbalance": {name: {"mean": v, "p95": v} for name, v in figures.items()},
    }
    sizes = [
        {"name": name, "hidden": 64, "inner": 32, "net": [-1.0, 0.0 if start is None else 0.1],
         "pays_from": {"eplb": start}}
        for name, start in zip(names, starts, strict=True)
    ]  # fmt: skip
    saving = {"grid": [16, 131072], "tokens": tokens, "sizes": sizes}
    fresh = {"change": "fresh", "slots": 2, "imbalance": 0.95}
    shown = {"changes": [{"imbalance": 1.01}, fresh], "saving": saving}
    return words.answer_changes({"shown": shown}, cell)


def test_advice_says_for_which_experts_balancing_pays():
    """What doesn't pay for the model's own experts or in its batches is not recommended."""
    use = "EPLB's placement with 2 slots per rank for copies"
    never = "takes longer than it saves at every batch size up to 131,072 tokens a rank"
    answer = make_advice((None, 256, 1024), 300.0)
    assert f"model's size (64 x 32): nothing. Balancing {never}. For experts as large" in answer
    assert f"mixtral-8x7b it pays from 256 tokens a rank on: use {use}" in answer
    assert "What follows is for those experts too." in answer
    assert "Newer loads, roughly: EPLB's placement made from these very batches" in answer
    answer = make_advice((512, 256, 1024), 300.0)
    assert "(64 x 32) it pays from 512 tokens a rank on; your batches have 300." in answer
    assert f"For batches that large use {use}" in answer
    assert f"<li>Use {use}" in make_advice((256, None, None), 300.0)
    assert "on (your batches have 32): use" in make_advice((None, 256, 1024), 32.0)
    for starts, names in (((None, None), ("this model", "a")), ((None, None), ("a", "b"))):
        answer = make_advice(starts, None, names)
        assert never in answer and "othing" in answer and "slots" not in answer
    assert make_advice((1024, 512), None, ("a", "b")).startswith(
        f"<ol><li>For experts as large as those of b it pays from 512 tokens a rank on: use {use}"
    )


def test_equal_figures_are_said_once():
    """Figures that read the same are not set against each other."""
    cell = {"imbalance": {name: {"mean": 1.001} for name in ("none", "eplb", "integer")}}
    answer = words.answer_gain(cell)
    assert "has 1.00 times the mean load, as with EPLB and with no balancing." in answer
    assert "waits less than 1% of the time" in answer and "instead" not in answer
    cell["imbalance"]["none"]["mean"] = 1.5
    answer = words.answer_gain(cell)
    assert "as with EPLB, instead of 1.50 times with no balancing." in answer
    sizes = [{"batches": n, "integer": 1.001, "eplb": 1 + 0.1 / n} for n in (1, 2)]
    answer = words.answer_batch_size({"grid": [1], "sizes": [], "tokens": None}, sizes)
    assert "rank stays at 1.00 times the mean load; with EPLB it goes from 1.10 to 1.05" in answer


def test_changes_without_a_gain_are_named():
    """A change that leaves as much as before has no gain, and a newer placement is no bound."""
    layer = {"bound": [1.0]}
    cell = {
        **{"applicable": True, "ep": 8, "slots": 1, "placement": "eplb", "by_layer": [layer]},
        "imbalance": {name: {"mean": 1.02} for name in ("lp", "integer")},
    }
    rows = (("nothing", 1.02), ("slots", 1.01), ("fresh", 1.03))
    changes = [{"change": name, "slots": 1, "imbalance": value} for name, value in rows]
    shown = report.sections.show_remainder({"cells": [cell], "shown": {"changes": changes}}, cell)
    assert "3.0%, no gain" in shown and shown.count("no gain") == 4
    assert "roughly what newer loads could give; it can be worse" in shown
    assert "at most." not in shown


def test_maps_say_how_far_loads_are_from_the_mean():
    """Over a map that shows nothing stands the largest deviation."""
    layer = {"layer": 0, "eplb": [[60.0, 140.0]], "integer": [[99.6, 100.4]]}
    shown = report.sections.show_ranks({"batches": [0], "layers": [layer]})
    assert "All ranks within 0.4% of the mean." in shown
    assert "From 60% to 140% of the mean." in shown


def test_all_rows_show_the_same_batch(cells):
    """One batch under each combination has the median of the gains that they have together."""
    first, second = balance.find_typical(cells)
    assert (first.layer, first.batch) == (second.layer, second.batch)
    assert first.loads["none"].tolist() == second.loads["none"].tolist()
    gains = np.mean([c.imbalance("eplb") - c.imbalance("integer") for c in cells], axis=0)
    own = gains[first.layer, first.batch - 6]
    assert (gains < own - 1e-9).sum() <= gains.size / 2 >= (gains > own + 1e-9).sum()


def test_topologies_of_several_groups_have_no_live_slots():
    """Where every placement has several groups of ranks, nothing is said of live slots."""
    trace = make_trace(sources=1)
    cells = balance.run(trace, balance.Options((16,), (2,), ("ring:8",)))
    assert cells[0].reason is None and find_gain(trace, cells) is None


def test_an_empty_batch_is_balanced():
    """A batch without tokens needs no live slots and has imbalance 1."""
    counts = make_trace(layers=1).counts.copy()
    counts[-1] = 0
    trace = traces.Trace(counts, np.arange(len(counts)))
    found = find_gain(trace, balance.run(trace, balance.Options((8,), (1,), ("eplb",))))
    assert found["imbalance"]["lp"][-1] == found["imbalance"]["live"][-1] == 1.0


def read_colors(text):
    """Return the colours that a part of the style gives names to, as red, green and blue."""
    found = re.findall(r"--(\w+): #(\w{6})", text)
    return {name: [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for name, code in found}


def find_contrast(one, other):
    """Compute the contrast of two colours as the web's accessibility guidelines define it."""
    lights = []
    for color in (one, other):
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_colors_stand_out_in_both_schemes():
    """Letters have a contrast of at least 4.5 to what is behind them, lines and bars of 3."""
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    schemes = [read_colors(light), read_colors(dark.partition("} }")[0])]
    assert schemes[0].keys() == schemes[1].keys() and len(schemes[0]) == 14
    for colors in schemes:
        for name in ("ink", "soft", "link", "lp"):
            assert find_contrast(colors[name], colors["ground"]) >= 4.5, name
        assert find_contrast(colors["ink"], colors["card"]) >= 4.5
        for name in ("none", "eplb", "lp", "tokens", "copies", "axis"):
            assert find_contrast(colors[name], colors["ground"]) >= 3, name
