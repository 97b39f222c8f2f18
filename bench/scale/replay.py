"""Run the simulation over sizes, loads and plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lplb_triton import Placement, chain
from lplb_triton.bench.measure.timer import Timer
from lplb_triton.bench.placement import explain_impossible
from lplb_triton.bench.scale.loads import LOADS, ScaleLoads, choose_experts, draw_loads
from lplb_triton.bench.scale.plans import Outcome, plan_even, plan_levels, plan_programs
from lplb_triton.bench.scale.sizes import explain_refusal, measure_sizes
from lplb_triton.bench.scale.times import compile_solves, time_plans
from lplb_triton.bench.types import Row

__all__ = ["Options", "find_break_even", "run"]

# Ranks of a group up to which LPs of two levels are solved: the LPs within groups are dense.
MOST_LEVELS = 128


@dataclass(frozen=True)
class Options:
    """What to simulate.

    Attributes
    ----------
    ep, slots, groups
        Ranks, redundant slots of each, and sizes of groups; groups that don't divide the ranks
        into several are left out.
    loads
        Some of `lplb_triton.bench.scale.LOADS`.
    experts
        Logical experts; None for the least multiple of the ranks from 256 on.
    ranks_per_node
        Consecutive ranks of a node.
    batches, seed
        Test batches, and the seed of synthetic loads.
    tolerance
        Certified gap asked of every LP.
    """

    ep: Sequence[int]
    slots: Sequence[int] = (1, 2)
    groups: Sequence[int] = (8, 64, 512)
    loads: Sequence[str] = LOADS
    experts: int | None = None
    ranks_per_node: int = 8
    batches: int = 4
    seed: int = 0
    tolerance: float = 1e-3


def run(
    options: Options,
    timer: Timer | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
) -> tuple[list[Row], list[Row]]:
    """Simulate every combination.

    Parameters
    ----------
    options
        What to simulate.
    timer, device
        Timer of the solves and their device; None where nothing is timed.
    progress
        Called after each load of each number of slots of each number of ranks.

    Returns
    -------
    rows : list of dict
        ``ep``, ``experts``, ``slots``, ``load``, ``plan`` (``even``, ``one``, ``group`` or
        ``levels``) and ``group`` (ranks of an LP); ``imbalance`` by ``mean`` and ``max`` over the
        batches, ``gap``, ``across`` by ``local`` and ``global`` quotas (see
        `lplb_triton.bench.scale.Outcome`); what `measure_sizes` returns; ``refused``, why the
        Triton back end doesn't take it, or None; ``us``, statistics of the solve of ``one`` and
        ``group``, or None where it isn't timed; ``uncertified``, timed batches above the tolerance.
    left_out : list of dict
        ``ep``, ``slots``, ``load`` and ``reason``.

    Raises
    ------
    WrongAnswerError
        If a plan that is to be timed is wrong.
    """
    rows: list[Row] = []
    left_out: list[Row] = []
    for ep in options.ep:
        experts = choose_experts(ep) if options.experts is None else options.experts
        for slots in options.slots:
            compiled = False
            for load in options.loads:
                head = {"ep": ep, "experts": experts, "slots": slots, "load": load}
                try:
                    loads = _draw(options, ep, experts, slots, load)
                except ValueError as error:
                    left_out.append({**head, "reason": str(error)})
                else:
                    plans = list(_make_plans(options, ep, slots, loads))
                    if timer is not None and not compiled:
                        _compile(plans, device, options.tolerance)
                        compiled = True
                    found = [_measure(plan, loads, options, timer, device) for plan in plans]
                    rows += [{**head, **row} for row in found]
                if progress is not None:
                    progress()
    return rows, left_out


def _draw(options: Options, ep: int, experts: int, slots: int, load: str) -> ScaleLoads:
    reason = explain_impossible(experts, ep, slots)
    if reason is not None:
        raise ValueError(reason)
    return draw_loads(load, ep, experts, options.batches, options.ranks_per_node, options.seed)


@dataclass(frozen=True)
class _Plan:
    """A way to balance: its name, ranks of an LP, and where experts are."""

    name: str
    group: int
    placement: Placement


def _make_plans(options: Options, ep: int, slots: int, loads: ScaleLoads) -> Iterator[_Plan]:
    history = loads.history
    yield _Plan("even", ep, Placement.from_history(history, ep, redundant_per_rank=slots))
    one = chain(history, ep, redundant_per_rank=slots)
    yield _Plan("one", ep, one)
    for group in options.groups:
        if ep % group or group >= ep:
            continue
        within = chain(history, ep, redundant_per_rank=slots, ranks_per_domain=group)
        yield _Plan("group", group, within)
        if group <= MOST_LEVELS:
            yield _Plan("levels", group, one)


def _is_timed(plan: _Plan) -> bool:
    """Say whether a plan's solve is timed; two levels take longer than the LPs within groups."""
    return plan.name in ("one", "group") and explain_refusal(plan.placement) is None


def _compile(plans: Sequence[_Plan], device: torch.device | str, tolerance: float) -> None:
    compile_solves([plan.placement for plan in plans if _is_timed(plan)], device, tolerance)


def _measure(
    plan: _Plan,
    loads: ScaleLoads,
    options: Options,
    timer: Timer | None,
    device: torch.device | str,
) -> Row:
    """Measure one plan."""
    if plan.name == "even":
        outcome = plan_even(plan.placement, loads)
    elif plan.name == "levels":
        outcome = plan_levels(plan.placement, plan.group, loads, options.tolerance)
    else:
        outcome = plan_programs(plan.placement, loads, options.tolerance)
    row = {"plan": plan.name, "group": plan.group, **_report(outcome)}
    if plan.name in ("one", "group"):
        row |= measure_sizes(plan.placement)
    row["refused"] = explain_refusal(plan.placement) if plan.name == "one" else None
    row |= {"us": None, "uncertified": None}
    if timer is not None and _is_timed(plan):
        row |= time_plans(plan.placement, loads.test, timer, device, options.tolerance)
    return row


def _report(outcome: Outcome) -> Row:
    return {
        "imbalance": {
            "mean": float(np.mean(outcome.imbalance)),
            "max": max(outcome.imbalance),
        },
        "gap": outcome.gap,
        "across": {"local": outcome.across_local, "global": outcome.across_global},
    }


def find_break_even(one: Row, other: Row) -> tuple[str, float | None]:
    """Find for which layers another plan is faster than one LP of all ranks.

    A layer takes the mean expert products of a rank times the imbalance, and the solve.

    Parameters
    ----------
    one, other
        Rows of `run` with times.

    Returns
    -------
    verdict : {"always", "never", "below", "above"}
    layer_us : float or None
        Microseconds of a rank's mean expert products below or above which it is faster.
    """
    saved = one["us"]["median"] - other["us"]["median"]
    lost = other["imbalance"]["mean"] - one["imbalance"]["mean"]
    if saved <= 0 <= lost:
        return "never", None
    if saved >= 0 >= lost:
        return "always", None
    return ("below" if saved > 0 else "above"), saved / lost
