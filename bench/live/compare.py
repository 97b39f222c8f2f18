"""Balance the same batches in every way, and compute figures from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lplb_triton.bench import peers
from lplb_triton.bench.live.plans import (
    HOME,
    Base,
    BatchPlan,
    StaticPlan,
    make_static_plan,
    plan_batch,
)
from lplb_triton.bench.live.sources import Source
from lplb_triton.bench.placement import explain_impossible
from lplb_triton.bench.types import Floats, Row
from lplb_triton.reference.live import LiveCase, choose_unit_shift

__all__ = ["WAYS", "Options", "is_right", "run"]

Ints = NDArray[np.int64]

WAYS = ("none", "eplb_1", "eplb", "chain", "published", "base", "live")


@dataclass(frozen=True)
class Options:
    """What to compare.

    Parameters
    ----------
    ep
        EP sizes.
    live
        Live slots of a rank.
    bases
        Static placements below the live slots.
    above
        A plan is made if the largest load exceeds this many times the mean.
    cost, fanout, domain
        As in `lplb_triton.reference.live.LiveCase`.
    """

    ep: tuple[int, ...] = (32,)
    live: tuple[int, ...] = (1,)
    bases: tuple[Base, ...] = (Base(HOME, 0), Base("chain", 2))
    above: float = 1.02
    cost: int = 0
    fanout: int = 0
    domain: int = 0


@dataclass
class _Figures:
    """One value a batch, by name."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, values: Iterable[float]) -> None:
        self.values.setdefault(name, []).extend(float(value) for value in values)

    def extend(self, other: _Figures) -> None:
        for name, values in other.values.items():
            self.add(name, values)


def run(
    sources: Callable[[int], Sequence[Source]],
    options: Options,
    progress: Callable[[], None] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Compare all ways on all sources.

    Parameters
    ----------
    sources
        Of an EP size; all sizes have as many.
    options
        What to compare.
    progress
        Called after each source of each combination of EP size, base and number of live slots.

    Returns
    -------
    rows : list of dict
        ``ep``, ``live``, ``base``, ``sources`` (what `summarize` makes of each, with its name) and
        ``all`` (the same of all their batches together).
    left_out : list of dict
        ``ep``, ``live``, ``base``, ``source`` and ``reason`` of what can't be laid out.
    """
    rows: list[Row] = []
    left_out: list[Row] = []
    for ep in options.ep:
        here = sources(ep)
        known: dict[tuple[int, int, Base], StaticPlan] = {}
        for base in options.bases:
            for live in options.live:
                head = {"ep": ep, "live": live, "base": str(base)}
                found, together = [], _Figures()
                for number, source in enumerate(here):
                    reason = explain_impossible(source.experts, ep, base.slots)
                    if reason is not None:
                        left_out.append({**head, "source": source.name, "reason": reason})
                    else:
                        case = LiveCase(
                            ep, live, options.above, options.cost, options.fanout, options.domain
                        )
                        figures = _compare_source(number, source, case, base, known)
                        together.extend(figures)
                        found.append({"name": source.name, **summarize(figures)})
                    if progress is not None:
                        progress()
                if found:
                    rows.append({**head, "sources": found, "all": summarize(together)})
    return rows, left_out


def _compare_source(
    number: int,
    source: Source,
    case: LiveCase,
    base: Base,
    known: dict[tuple[int, int, Base], StaticPlan],
) -> _Figures:
    """Balance all batches of a source; ``known`` keeps the plans of static placements."""
    figures = _Figures()
    total = base.slots + case.live_per_rank
    ways = {
        "none": Base(HOME, 0),
        "eplb_1": Base("eplb", 1),
        "eplb": Base("eplb", total),
        "chain": Base("chain", total),
        "base": base,
    }
    for at, one in enumerate(source.cases):
        counts = one.test.sum(1).numpy()
        counts = counts[counts.sum(1) > 0]
        for way, static in ways.items():
            if explain_impossible(source.experts, case.ep_size, static.slots) is None:
                key = (number, at, static)
                if key not in known:
                    known[key] = make_static_plan(static, one.history, counts, case.ep_size)
                figures.add(way, known[key].find_imbalance())
        _add_published(figures, counts, case)
        _add_live(figures, known[(number, at, base)], case)
    return figures


def _add_published(figures: _Figures, counts: Ints, case: LiveCase) -> None:
    per_rank = counts.shape[1] // case.ep_size
    for row in counts:
        found = peers.plan_replicas(row, case.ep_size, case.live_per_rank)
        home = [replica.expert // per_rank for replica in found.replicas]
        figures.add("published", [found.loads.max() * case.ep_size / row.sum()])
        figures.add("published_pieces", [len(home) / case.ep_size])
        figures.add("published_leaving", [_count_most(home)])


def _add_live(figures: _Figures, static: StaticPlan, case: LiveCase) -> None:
    for batch, counts in enumerate(static.counts):
        found = plan_batch(case, static, batch)
        mean = counts.sum() / case.ep_size
        held = found.experts[found.experts >= 0]
        figures.add("live", [found.loads.max() / mean])
        figures.add("tokens", [mean])
        figures.add("pieces", [len(held) / case.ep_size])
        figures.add("leaving", [_count_most(static.home[held].tolist())])
        figures.add("bound", [found.bound / mean])
        figures.add("gap", [max(0.0, 1 - found.bound / found.loads.max())])
        figures.add("wrong", [not is_right(found, static, batch)])


def _count_most(ranks: list[int]) -> int:
    """Count how often the most frequent rank comes."""
    return int(np.bincount(ranks).max()) if ranks else 0


def is_right(found: BatchPlan, static: StaticPlan, batch: int) -> bool:
    """Say whether a plan keeps all tokens, is no worse than the LP, and copies nothing twice.

    Parameters
    ----------
    found
        The plan.
    static
        What it was made on.
    batch
        Which batch.

    Returns
    -------
    bool
    """
    before = static.find_loads(batch)
    n_slots = int(static.copies.place.max()) + 1
    # Loads of more than 2**20 tokens are planned in units of several.
    shift = choose_unit_shift(float(static.max_load[batch]), n_slots, static.ep_size)
    rounding = ((1 << shift) - 1) * n_slots
    n_experts = len(static.counts[batch])
    held = np.zeros((static.ep_size, n_experts), dtype=np.int64)
    # EPLB itself may put an expert twice on a rank.
    expert = np.repeat(np.arange(n_experts), np.diff(static.copies.start))
    held[static.copies.rank, expert] = 1
    rank, slot = np.nonzero(found.experts >= 0)
    np.add.at(held, (rank, found.experts[rank, slot]), 1)
    return bool(
        found.loads.sum() == before.sum()
        and found.loads.max() <= before.max() + rounding
        and held.max() <= 1
    )


def summarize(figures: _Figures) -> Row:
    """Make a row of the JSON file from one value a batch.

    Parameters
    ----------
    figures
        Of one source, or of several.

    Returns
    -------
    dict
        ``batches``; ``imbalance`` by way, with mean, p95 and max, or None where the way can't be
        laid out for every batch; ``published`` and ``live``, each with ``pieces`` (mean a rank),
        ``fetching`` (part of the batches with pieces) and ``leaving`` (copies that leave the
        busiest home rank: mean and max); of ``live`` also ``bound`` (mean, over the mean load),
        ``gap`` (mean and max), ``less_a_token`` (mean and max imbalance if the fullest rank had one
        token less, though at least 1) and ``wrong`` (plans that fail their check).
    """
    values = {name: np.array(found, dtype=np.float64) for name, found in figures.values.items()}
    n = len(values["live"])
    live = _summarize_fetches(values["pieces"], values["leaving"])
    less = np.maximum(values["live"] - 1 / values["tokens"], 1.0)
    return {
        "batches": n,
        "imbalance": {
            way: _summarize_ways(values[way]) if len(values.get(way, ())) == n else None
            for way in WAYS
        },
        "published": _summarize_fetches(values["published_pieces"], values["published_leaving"]),
        "live": {
            **live,
            "bound": float(values["bound"].mean()),
            "gap": {"mean": float(values["gap"].mean()), "max": float(values["gap"].max())},
            "less_a_token": {"mean": float(less.mean()), "max": float(less.max())},
            "wrong": int(values["wrong"].sum()),
        },
    }


def _summarize_ways(values: Floats) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "p95": float(np.percentile(values, 95)),
        "max": float(values.max()),
    }


def _summarize_fetches(pieces: Floats, leaving: Floats) -> Row:
    return {
        "pieces": float(pieces.mean()),
        "fetching": float((pieces > 0).mean()),
        "leaving": {"mean": float(leaving.mean()), "max": int(leaving.max())},
    }
