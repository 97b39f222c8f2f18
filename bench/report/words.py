"""What a report says in words: its headline, and the three answers under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

__all__ = [
    "METHODS",
    "Headline",
    "answer_batch_size",
    "answer_changes",
    "answer_gain",
    "compare_tokens",
    "count_slots",
    "count_things",
    "find_headline",
    "name_cell",
    "name_method",
    "name_size",
    "say_headline",
    "sort_changes",
]

METHODS = {
    "eplb": "EPLB's placement",
    "chain": "the placement <code>chain</code>",
    "place": "the placement <code>place</code>",
    "none": "experts in order",
}
# Name of the sizes that a trace says of its own model.
OWN = "this model"
# A change is worth naming from this part on.
WORTH = 0.01


@dataclass(frozen=True)
class Headline:
    """Parts of the slowest rank's tokens that are saved: over EPLB and over no balancing.

    Attributes
    ----------
    eplb, none
        In the mean.
    eplb_p95, none_p95
        Of the 95th percentiles.
    most
        Over EPLB, of the least that any split over the same copies can reach.
    """

    eplb: float
    none: float
    eplb_p95: float
    none_p95: float
    most: float


def find_headline(cell: Mapping[str, Any]) -> Headline:
    """Compute the figures of the headline of one combination."""
    found = cell["imbalance"]
    mean = {name: found[name]["mean"] for name in ("none", "eplb", "integer")}
    p95 = {name: found[name]["p95"] for name in ("none", "eplb", "integer")}
    bound = float(np.mean([layer["bound"] for layer in cell["by_layer"]]))
    return Headline(
        eplb=1 - mean["integer"] / mean["eplb"],
        none=1 - mean["integer"] / mean["none"],
        eplb_p95=1 - p95["integer"] / p95["eplb"],
        none_p95=1 - p95["integer"] / p95["none"],
        most=1 - bound / mean["eplb"],
    )


def compare_tokens(saved: float, noun: str = " tokens") -> str:
    """Say how many tokens a part is, up to the word that it is compared with."""
    if abs(saved) < 0.005:
        return f"about as many{noun} as"
    return f"{abs(100 * saved):.0f}% {'fewer' if saved > 0 else 'more'}{noun} than"


def name_cell(cell: Mapping[str, Any], short: bool = False) -> str:
    """Name a combination, as escaped text."""
    method = escape(str(cell["placement"]))
    slots = count_slots(int(cell["slots"]))
    if short:
        return f"EP {int(cell['ep'])}, {method}, {slots}"
    copies = f"{slots.replace(' ', ' redundant ')} per rank" if int(cell["slots"]) else "no copies"
    return f"{int(cell['ep'])} ranks, {method}, {copies}"


def name_method(cell: Mapping[str, Any]) -> str:
    """Name the placement of a combination, as escaped text."""
    method = str(cell["placement"])
    return METHODS.get(method, f"the topology <code>{escape(method)}</code>")


def count_slots(number: int) -> str:
    """Say how many slots."""
    return count_things(number, "slot")


def count_things(number: int, noun: str) -> str:
    """Say how many there are of something."""
    some = {"batch": "batches"}.get(noun.split()[-1], f"{noun.split()[-1]}s")
    plural = " ".join([*noun.split()[:-1], some])
    return f"{number:,} {noun if number == 1 else plural}"


def say_headline(cell: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Say the headline: in words, as a number, what the number is, and the text below it."""
    found = find_headline(cell)
    if not int(cell["slots"]):
        mean = {name: float(cell["imbalance"][name]["mean"]) for name in ("integer", "eplb")}
        return (
            f"Without copies nothing is balanced: the slowest rank has {mean['integer']:.2f} times "
            "the mean load",
            f"{mean['integer']:.2f}",
            "load of the slowest rank over the mean load",
            f"EPLB's order of the experts, without copies too, has {mean['eplb']:.2f}.",
        )
    return (
        f"The slowest rank gets {compare_tokens(found.eplb)} with EPLB, and "
        f"{compare_tokens(found.none, '')} with no balancing",
        f"{-100 * found.eplb:+.0f}%".replace("-", "\N{MINUS SIGN}"),
        "load of the slowest rank against EPLB",
        f"In the worst batches (95th percentile) it gets {compare_tokens(found.eplb_p95)} with "
        f"EPLB and {compare_tokens(found.none_p95, '')} with no balancing. No split over these "
        f"copies can do better than {compare_tokens(found.most)} with EPLB.",
    )


def answer_gain(cell: Mapping[str, Any]) -> str:
    """Answer what balancing gains."""
    mean = {k: float(cell["imbalance"][k]["mean"]) for k in ("none", "eplb", "integer")}
    wait = {name: _say_percent(100 * (1 - 1 / value)) for name, value in mean.items()}
    load = {name: f"{value:.2f}" for name, value in mean.items()}
    loads = _say_beside(load, " times")
    waits = _say_beside(wait, "")
    return (
        f"<p>The most loaded rank has {load['integer']} times the mean load{loads} EPLB's copies "
        f"share evenly.</p><p>All other ranks wait for it: a rank waits {wait['integer']} of the "
        f"time of the experts' products{waits}</p>"
    )


def _say_percent(value: float) -> str:
    return "less than 1%" if value < 0.5 else f"{value:.0f}%"


def _say_beside(texts: Mapping[str, str], unit: str) -> str:
    """Say what a figure is with EPLB and with no balancing, unless it reads the same there."""
    others = {"eplb": "with EPLB", "none": "with no balancing"}
    same = [name for key, name in others.items() if texts[key] == texts["integer"]]
    changed = [
        f"{texts[key]}{unit} {name}"
        for key, name in others.items()
        if texts[key] != texts["integer"]
    ]
    said = f", as {' and '.join(same)}" if same else ""
    return said + (f", instead of {' and '.join(changed)}." if changed else ".")


def name_size(size: Mapping[str, Any]) -> str:
    """Name the sizes of a layer, as escaped text."""
    name = str(size["name"])
    if name == OWN:
        return "this model's experts"
    return f"experts as large as those of {escape(name)}"


def answer_batch_size(saving: Mapping[str, Any], sizes: Sequence[Mapping[str, Any]]) -> str:
    """Answer from which batch size on balancing pays, and what larger batches change."""
    last = int(saving["grid"][-1])
    lines = []
    for size in saving["sizes"]:
        found = {k: size["pays_from"][k] for k in ("eplb", "none")}
        eplb = _say_from(found["eplb"], last)
        lines.append(f"<li>{name_size(size)}: {eplb}</li>")
    text = (
        "<p>Against EPLB, predicted for a forward pass on H100s, in tokens of one rank:</p>"
        f"<ul>{''.join(lines)}</ul>"
    )
    if saving["tokens"] is not None:
        text += _say_recorded(float(saving["tokens"]), saving["sizes"])
    text += _say_by_time(saving)
    first, largest = sizes[0], sizes[-1]
    if len(sizes) > 1:
        text += (
            f"<p>In batches {int(largest['batches'])} times as large the most loaded rank "
            f"{_say_change(first['integer'], largest['integer'])} the mean load; with EPLB it "
            f"{_say_change(first['eplb'], largest['eplb'])}.</p>"
        )
    return text


def _say_by_time(saving: Mapping[str, Any]) -> str:
    """Say what plans by time save in small batches; nothing where that isn't predicted."""
    lines = []
    for size in saving["sizes"]:
        # Reports of earlier versions don't have it.
        saved = size.get("by_time")
        if saved is not None:
            parts = ", ".join(f"{round(100 * part)}%" for part in saved)
            lines.append(f"<li>{name_size(size)}: {parts}</li>")
    if not lines:
        return ""
    small = ", ".join(f"{int(tokens):,}" for tokens in saving["small"])
    return (
        f"<p>In batches of {small} tokens of a rank, as in decoding, plans by time "
        "(<code>Balancer(objective=&quot;time&quot;)</code>) are predicted to take so much less "
        f"than plans by tokens:</p><ul>{''.join(lines)}</ul>"
    )


def _say_change(before: float, after: float) -> str:
    """Say how a load over the mean changes, or that it reads the same."""
    if f"{before:.2f}" == f"{after:.2f}":
        return f"stays at {after:.2f} times"
    return f"goes from {before:.2f} to {after:.2f} times"


def _say_from(tokens: Any, last: int) -> str:
    if tokens is None:
        return f"it does not pay up to {last:,}"
    return f"pays from <b>{int(tokens):,}</b> on"


def _say_recorded(tokens: float, sizes: Sequence[Mapping[str, Any]]) -> str:
    """Say for how many of the sizes a recorded batch is large enough."""
    starts = [size["pays_from"]["eplb"] for size in sizes]
    enough = sum(start is not None and start <= tokens for start in starts)
    verdict = {0: "too few for any of these", len(sizes): "enough for all of these"}
    which = verdict.get(enough, f"enough for {enough} of these {len(sizes)}")
    return f"<p>A recorded batch has {tokens:,.0f} tokens of each rank: {which}.</p>"


def sort_changes(changes: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """Return the changes with the part of the slowest rank's tokens that each saves, best first."""
    now = changes[0]["imbalance"]
    rated = [(1 - change["imbalance"] / now, change) for change in changes[1:]]
    return sorted(rated, key=lambda pair: -pair[0])


def answer_changes(report: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Answer what to change: what to use, and what would gain more, the best first."""
    steps = []
    if not int(cell["slots"]):
        steps.append("Compare placements with redundant slots, such as <code>--slots 1,2</code>.")
    elif find_headline(cell).eplb < WORTH:
        steps.append(
            "Splitting by the linear program gains less than 1% here: EPLB alone is enough."
        )
    else:
        saving = report["shown"]["saving"]
        steps.append(_advise_use(saving, cell))
        if all(size["pays_from"]["eplb"] is None for size in saving["sizes"]):
            # More copies would only be of use to what doesn't pay.
            return f"<p>{steps[0]}</p>"
    now = report["shown"]["changes"][0]["imbalance"]
    for saved, change in sort_changes(report["shown"]["changes"]):
        if saved >= WORTH:
            steps.append(
                f"{_advise(change, cell)}: {change['imbalance']:.3f} instead of {now:.3f} times "
                f"the mean load, {100 * saved:.1f}% less."
            )
    steps += _advise_live(report.get("live"))
    if len(steps) > 1 and "nothing" in steps[0]:
        steps[0] += " What follows is for those experts too."
    if len(steps) < 2:
        steps.append(
            "Another placement, one more slot per rank or a placement made from newer loads would "
            "each gain less than 1%."
        )
    return "<ol>" + "".join(f"<li>{step}</li>" for step in steps) + "</ol>"


def _advise_use(saving: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Say whether to balance: for the model's own experts if they are known, else for others."""
    plan = (
        f"{name_method(cell)} with {count_slots(int(cell['slots']))} per rank for copies, and let "
        "<code>Balancer.run</code> split each batch."
    )
    paying = [size for size in saving["sizes"] if size["pays_from"]["eplb"] is not None]
    own = next((size for size in saving["sizes"] if size["name"] == OWN), None)
    advice = ""
    if own is not None:
        name = f"For experts of this model's size ({int(own['hidden'])} x {int(own['inner'])})"
        if own["pays_from"]["eplb"] is None:
            advice = f"{name}: nothing. {_say_never(own, saving['grid'])} "
        elif saving["tokens"] is None or own["pays_from"]["eplb"] <= saving["tokens"]:
            return f"Use {plan}"
        else:
            start, tokens = int(own["pays_from"]["eplb"]), float(saving["tokens"])
            return (
                f"{name} it pays from {start:,} tokens a rank on; your batches have {tokens:,.0f}. "
                f"For batches that large use {plan}"
            )
    if not paying:
        return advice or f"Nothing. {_say_never(saving['sizes'][0], saving['grid'])}"
    least = min(paying, key=lambda size: int(size["pays_from"]["eplb"]))
    start, tokens = int(least["pays_from"]["eplb"]), saving["tokens"]
    few = tokens is not None and tokens < start
    have = f" (your batches have {tokens:,.0f})" if few else ""
    return (
        f"{advice}For {name_size(least)} it pays from {start:,} tokens a rank on{have}: use {plan}"
    )


def _say_never(size: Mapping[str, Any], grid: Sequence[int]) -> str:
    last = f"{int(grid[-1]):,} tokens a rank"
    if max(size["net"]) <= 0:
        return f"Balancing takes longer than it saves at every batch size up to {last}."
    return f"Balancing takes longer than it saves in batches of {last}."


def _advise(change: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    slots = int(change["slots"])
    return {
        "slots": f"One more slot per rank ({slots}), which takes the memory of one more expert",
        "chain": "The placement <code>chain</code> with as many slots, which costs no more",
        "fresh": f"Newer loads, roughly: {name_method(cell)} made from these very batches",
    }[change["change"]]


def _advise_live(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lp, live = (float(np.mean(found["imbalance"][name])) for name in ("lp", "live"))
    if 1 - live / lp < WORTH:
        return []
    return [
        f'<a href="#live">Live slots</a>, {int(found["live"])} on each rank: {live:.3f} instead of '
        f"{lp:.3f} in layer {int(found['layer'])}, {100 * (1 - live / lp):.1f}% less "
        "(without the time of fetching)."
    ]
