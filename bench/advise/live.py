"""Predict live slots against static ones, and suggest their rules.

A layer takes as long as the products of its slowest rank, which `gemm` models, and with live slots
also as long as the busiest port needs for the experts that it sends or receives. Nothing is taken
to overlap, so what is predicted for live slots is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton.bench.advise.models import BYTES, MATRICES, Model
from lplb_triton.bench.live.plans import StaticPlan, solve_batches
from lplb_triton.bench.placement import Case, make_by_history
from lplb_triton.bench.types import Floats
from lplb_triton.costs.gemm import GemmModel
from lplb_triton.live import LEAST_ABOVE, MOST_ABOVE, LiveRules
from lplb_triton.reference.live import (
    Copies,
    LiveCase,
    count_running,
    plan_live,
    split_running,
)

__all__ = [
    "GIGABYTES_PER_SECOND",
    "LIVE_GRID",
    "TERAFLOPS",
    "LiveBatch",
    "advise_live",
    "count_live_bytes",
    "count_ports",
    "count_transfers",
    "plan_live_batch",
    "suggest_live_above",
    "suggest_live_cost",
]

Ints = NDArray[np.int64]

# What rates are taken to be unless measured: of a pull over NVLink, and of grouped products.
GIGABYTES_PER_SECOND, TERAFLOPS = 350.0, 600.0
# Tokens per rank that break-even is searched among, and batches of each case.
LIVE_GRID = tuple(2**k for k in range(8, 17))
BATCHES = 4
# Products of both passes take three times those of the forward pass.
TRAINING = 3


class LiveBatch(NamedTuple):
    """A batch on static copies alone and with live slots."""

    static: Ints
    """``[ep_size, static_per_rank]`` rows of each slot without live slots."""
    live: Ints
    """``[ep_size, static_per_rank + live_per_rank]`` rows of each slot with them."""
    pieces: int
    """Live slots that are filled."""
    ports: tuple[int, int]
    """Experts that the busiest rank sends, and that the busiest rank receives."""


def count_transfers(training: bool, keep: bool = False) -> int:
    """Count how often an expert's bytes move: weights, and in training again, and gradients.

    Parameters
    ----------
    training
        Whether there is a backward pass.
    keep
        Whether the backward pass finds the weights where the forward pass left them.
    """
    return 3 - keep if training else 1


def suggest_live_cost(
    *,
    gigabytes_per_second: float = GIGABYTES_PER_SECOND,
    teraflops: float = TERAFLOPS,
    weight_bytes: float = BYTES,
    training: bool = False,
    keep: bool = False,
) -> int:
    """Suggest ``live_cost`` of `lplb_triton.Balancer`: the time of a fetch in tokens' products.

    Both grow with the expert, so its sizes don't matter: a weight is ``weight_bytes`` to move, and
    two operations for each token.

    Parameters
    ----------
    gigabytes_per_second
        Rate at which a rank's port moves weights, as measured by ``lplb-bench ep --sections live``.
    teraflops
        Rate of the expert products.
    weight_bytes
        Bytes of a weight as it is moved, scales included.
    training
        Count the backward pass: three times the products, another pull and the gradients, which
        are taken to be as large as the weights.
    keep
        Of training: the weights are kept from the forward pass and not pulled again.

    Returns
    -------
    int
        Tokens, at least 1.

    Raises
    ------
    ValueError
        If a rate or a size isn't positive and finite.

    Examples
    --------
    >>> suggest_live_cost()
    1714
    >>> suggest_live_cost(training=True, keep=True)
    1143
    """
    for name, value in (
        ("gigabytes_per_second", gigabytes_per_second),
        ("teraflops", teraflops),
        ("weight_bytes", weight_bytes),
    ):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    moved = count_transfers(training, keep) * weight_bytes / (gigabytes_per_second * 1e9)
    computed = 2 * (TRAINING if training else 1) / (teraflops * 1e12)
    return max(1, round(moved / computed))


def suggest_live_above(cost: int, tokens: int, top_k: int) -> float | None:
    """Suggest ``live_above`` of `lplb_triton.Balancer`.

    A fetch that takes off less than it costs doesn't pay, so no plan is worth making where the
    largest load exceeds the mean by less.

    Parameters
    ----------
    cost
        ``live_cost``.
    tokens
        Of a rank in a batch.
    top_k
        Experts of a token.

    Returns
    -------
    float or None
        At least the balancer's default; None if even twice the mean load isn't worth a fetch.
    """
    above = max(LiveRules().above, LEAST_ABOVE + cost / (tokens * top_k))
    return None if above > MOST_ABOVE else round(above, 3)


def count_ports(experts: Ints, homes: Ints) -> tuple[int, int]:
    """Count the experts that the busiest rank sends, and that the busiest rank receives.

    Parameters
    ----------
    experts
        ``[ep_size, live_per_rank]``, what is fetched; -1 for nothing.
    homes
        ``[n_logical]``, rank of each expert's original.
    """
    fetched = experts >= 0
    sent = np.bincount(homes[experts[fetched]], minlength=len(experts))
    return int(sent.max()), int(fetched.sum(1).max())


def plan_live_batch(case: LiveCase, static: StaticPlan, batch: int) -> LiveBatch:
    """Plan a batch with and without live slots, and count the rows of each slot.

    Parameters
    ----------
    case
        Sizes and rules of the live slots.
    static
        The LP's plans on the static copies.
    batch
        Which of them.
    """
    counts = static.counts[batch]
    n_static = int(static.copies.place.max()) + 1
    cumulative = static.cumulative[batch]
    found = plan_live(case, counts, cumulative, static.copies, float(static.max_load[batch]))
    n_slots = n_static + case.live_per_rank
    return LiveBatch(
        _count_rows(counts, cumulative, static.copies, case.ep_size, n_static),
        _count_rows(counts, found.cumulative, found.copies, case.ep_size, n_slots),
        len(found.pieces),
        count_ports(found.experts, static.home),
    )


def _count_rows(counts: Ints, cumulative: Ints, copies: Copies, ep_size: int, n_slots: int) -> Ints:
    tokens = split_running(count_running(counts, cumulative, copies), copies.start)
    rows = np.zeros((ep_size, n_slots), dtype=np.int64)
    np.add.at(rows, (copies.rank, copies.place), tokens)
    return rows


def scale_batches(static: StaticPlan, rows: int) -> StaticPlan:
    """Scale the batches of plans to ``rows`` tokens times top-k over all ranks.

    Shares don't depend on the number of tokens, so nothing is solved again.
    """
    factor = rows / static.counts.sum(1, keepdims=True)
    return static._replace(
        counts=(static.counts * factor).round().astype(np.int64),
        max_load=static.max_load * factor[:, 0],
    )


def advise_live(
    model: Model,
    gemm: GemmModel,
    cases: Sequence[Case],
    ep: int,
    tokens: int,
    placement: tuple[str, int],
    live: int,
    *,
    layers: int = 1,
    training: bool = False,
    keep: bool = False,
    gigabytes_per_second: float = GIGABYTES_PER_SECOND,
    teraflops: float = TERAFLOPS,
) -> dict[str, Any]:
    """Predict what live slots save over a static placement, and suggest their rules.

    Parameters
    ----------
    model, gemm, cases, ep, tokens
        As `lplb_triton.bench.advise.advise` takes them.
    placement
        Method and redundant slots of the static placement, on which the live slots come on top.
    live
        Live slots of a rank.
    layers
        MoE layers, for ``bytes``.
    training, keep
        Count the backward pass; keep weights for it, or pull them again.
    gigabytes_per_second, teraflops
        Rates of a port and of the expert products.

    Returns
    -------
    dict
        ``live``, ``placement`` and ``slots``; ``cost`` and ``above``, the suggested rules
        (``above`` None where no fetch can pay, and what follows but ``break_even`` is then without
        live slots); means over the batches of ``pieces`` (live slots filled on all ranks),
        ``fetching`` (part of the batches), ``sent`` and ``received`` (experts at the busiest
        port), ``fetch_us``, ``layer_us`` by ``static`` and ``live`` (fetches included), and
        ``saving_us``; ``break_even``, tokens per rank in `LIVE_GRID` from which on live slots save
        time, or None; ``bytes``, see `count_live_bytes`.
    """
    cost = suggest_live_cost(
        gigabytes_per_second=gigabytes_per_second, teraflops=teraflops, training=training, keep=keep
    )
    piece_us = MATRICES * BYTES * model.hidden * model.inner / gigabytes_per_second / 1e3
    layer = _LiveLayer(
        model, gemm, ep, live, cost,
        work=TRAINING if training else 1,
        piece_us=piece_us * count_transfers(training, keep),
        statics=[_solve_case(case, ep, placement) for case in cases],
    )  # fmt: skip
    break_even = None
    for size in reversed(LIVE_GRID):
        if layer.predict(size)["saving_us"] <= 0:
            break
        break_even = size
    return {
        "live": live,
        "placement": placement[0],
        "slots": placement[1],
        "cost": cost,
        **layer.predict(tokens),
        "break_even": break_even,
        "bytes": count_live_bytes(model, live, layers=layers, training=training),
    }


@dataclass(frozen=True)
class _LiveLayer:
    """A layer on its ranks, with the LP's plans of some batches.

    Attributes
    ----------
    model, gemm, ep, live, cost
        As of `advise_live`.
    work
        Products of a batch, in forward passes.
    piece_us
        Time of an expert at a port, in all passes.
    statics
        Plans on the static copies, by case.
    """

    model: Model
    gemm: GemmModel
    ep: int
    live: int
    cost: int
    work: int
    piece_us: float
    statics: Sequence[StaticPlan]

    def predict(self, tokens: int) -> dict[str, Any]:
        """Predict for so many tokens per rank, means over the batches."""
        above = suggest_live_above(self.cost, tokens, self.model.top_k)
        case = LiveCase(self.ep, self.live, MOST_ABOVE if above is None else above, self.cost)
        rows = tokens * self.model.top_k * self.ep
        found = [
            plan_live_batch(case, scaled, batch)
            for scaled in (scale_batches(one, rows) for one in self.statics)
            for batch in range(len(scaled.counts))
        ]
        static = self._find_slowest([one.static for one in found])
        fetched = np.array([one.pieces > 0 for one in found])
        # Batches that fetch nothing have no live rows, and aren't slower for their empty slots.
        products = np.where(fetched, self._find_slowest([one.live for one in found]), static)
        ports = np.array([one.ports for one in found], dtype=np.float64)
        fetch_us = self.piece_us * ports.max(1)
        with_live = products + fetch_us
        return {
            "above": above,
            "pieces": float(np.mean([one.pieces for one in found])),
            "fetching": float(fetched.mean()),
            "sent": float(ports[:, 0].mean()),
            "received": float(ports[:, 1].mean()),
            "fetch_us": float(fetch_us.mean()),
            "layer_us": {"static": float(static.mean()), "live": float(with_live.mean())},
            "saving_us": float((static - with_live).mean()),
        }

    def _find_slowest(self, rows: Sequence[Ints]) -> Floats:
        """Predict the products of each batch's slowest rank, ``[batches]``."""
        stacked = np.stack(rows).astype(np.float64)
        slowest: Floats = self.gemm(self.model.hidden, self.model.inner, stacked).max(1)
        return self.work * slowest


def _solve_case(case: Case, ep: int, placement: tuple[str, int]) -> StaticPlan:
    """Place experts by a case's history, and solve the LP of a few of its batches."""
    method, slots = placement
    made = make_by_history(method, case.history, ep, slots, torch.device("cpu"), None)
    chosen = np.linspace(0, len(case.test) - 1, min(BATCHES, len(case.test))).round().astype(int)
    counts = case.test[chosen].sum(1)
    counts = counts[counts.sum(1) > 0]
    if not len(counts):
        raise ValueError("no test batch has tokens")
    # With so many tokens the shares hold for every batch size.
    scaled = (counts.double() * (1e8 / counts.sum(1, keepdim=True))).round().long()
    return solve_batches(made, scaled.numpy())


def count_live_bytes(
    model: Model, slots: int, *, layers: int = 1, training: bool = False, ep: int | None = None
) -> dict[str, int | None]:
    """Count the bytes on a rank of live slots, and of as many static slots.

    Parameters
    ----------
    model
        Sizes of a layer; weights and gradients are bfloat16.
    slots
        Live slots of a rank, and static redundant ones to compare with.
    layers
        MoE layers. Live slots are shared by all of them, static ones aren't.
    training
        Count the memory of two halves from which other ranks read the gradients of live slots. (The
        gradients that a layer's backward pass itself makes exist for one layer at a time, and are
        left out of both.)
    ep
        Ranks, for ``staged``.

    Returns
    -------
    dict
        ``live`` and ``static`` of all layers; ``staged``, a second copy of all experts of a rank,
        which is only needed where parameters can't lie in symmetric memory; None without ``ep``.
    """
    expert = MATRICES * BYTES * model.hidden * model.inner
    staged = None if ep is None else layers * (model.experts // ep) * expert
    return {
        "live": slots * expert * (3 if training else 1),
        "static": layers * slots * expert,
        "staged": staged,
    }
