"""Placements for ``objective="time"``: which copies are worth having for batches of a known size.

In a small batch a rank takes about as long as its active experts take to be read, so a placement
is good if every rank has as many experts that are often active as the others, and if copies let
them trade. With more rows, whole tiles count, and then rows. A few placements that are made for one
or the other are judged by the predicted times of their plans in sampled batches, and the one with
the least mean is taken. Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import reference
from lplb_triton._checks import check_choice, check_integer, check_number
from lplb_triton._layout import MAX_COUNT
from lplb_triton._objective import OBJECTIVES, resolve_cost
from lplb_triton.placement import Placement
from lplb_triton.placement.chaining import chain, check_load, scale_rows
from lplb_triton.placement.moves import keep_slots, plan_moves
from lplb_triton.reference.time import plan_time
from lplb_triton.reference.time_tables import make_time_tables
from lplb_triton.solver import solve

if TYPE_CHECKING:
    from lplb_triton.costs import TimeCost

__all__ = ["level_homes", "place_by_time", "predict_times", "sample_counts"]

Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]

# Batches that placements are judged by, unless the caller says how many.
SAMPLES = 32
# A placement that is slower by this factor than another in a quarter of the batches, but at least
# in so many, isn't judged by the others.
MOST_BEHIND, LEAST_JUDGED = 1.03, 4
# With fewer recorded batches than this, `dispersion` states how loads fluctuate.
MIN_BATCHES = 8


def place_by_time(
    place: Callable[..., Placement],
    history: torch.Tensor,
    ep_size: int,
    objective: str,
    cost: TimeCost | None,
    rows_per_rank: int | None,
    arguments: dict[str, Any],
) -> Placement:
    """Place for plans by time; `lplb_triton.place` with ``objective="time"``.

    Parameters
    ----------
    place
        `lplb_triton.place`, whose placement by tokens is one to judge.
    history, ep_size, objective, cost, rows_per_rank
        Its arguments.
    arguments
        Its other arguments, by name.

    Returns
    -------
    Placement
        Of those judged, the one whose plans by time are predicted to take the least, moves from
        ``previous`` included.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.
    """
    check_choice("objective", objective, OBJECTIVES)
    if objective == "tokens":
        name = "rows_per_rank" if cost is None else "cost"
        raise ValueError(f"{name} needs objective='time'")
    options = dict(arguments)
    for name in ("ranks_per_node", "traffic_price", "num_groups"):
        if options.pop(name) is not None:
            raise ValueError(f"{name} needs objective='tokens'")
    if rows_per_rank is None:
        raise ValueError(
            "objective='time' needs rows_per_rank: tokens of a rank in a batch, times top-k"
        )
    rows = check_integer("rows_per_rank", rows_per_rank)
    if rows * check_integer("ep_size", ep_size) > MAX_COUNT:
        raise ValueError(
            f"rows_per_rank must be at most {MAX_COUNT // ep_size} on {ep_size} ranks, got {rows}"
        )
    options["trials"] = 0 if options["trials"] is None else options["trials"]
    samples = options.pop("samples")
    samples = SAMPLES if samples is None else check_integer("samples", samples, 1)
    load = scale_rows(check_load("history", history, (1, 2)))
    load = load[load.sum(1) > 0]
    # Without a search, its start is as good as any by the mean, and is found much faster.
    seen = _average(load) if len(load) and not options["trials"] else history
    by_tokens = place(seen, ep_size, **options)
    cost = resolve_cost(by_tokens, objective, cost)
    assert cost is not None
    if not len(load):
        return by_tokens
    rng = np.random.default_rng(options["seed"])
    counts = sample_counts(load, rows * ep_size, samples, options["dispersion"], rng)
    made = [by_tokens, *_make_candidates(load, counts, cost, ep_size, options)]
    made = _keep_fast(made, counts[: max(LEAST_JUDGED, samples // 4)], cost)
    return _choose(made, counts, cost, options["previous"], options["move_penalty"])


def _average(load: Doubles) -> torch.Tensor:
    """Return the mean of loads, each batch counting equally, ``[n_logical]``."""
    return torch.from_numpy((load / load.sum(1, keepdims=True)).mean(0))


def _make_candidates(
    load: Doubles, counts: Ints, cost: TimeCost, ep_size: int, options: dict[str, Any]
) -> list[Placement]:
    """Make placements that may be faster than the one by tokens.

    The chain; and its copies, on one domain those of EPLB too, on originals where frameworks put
    them and, where originals may move, on levelled ones.
    """
    redundant, domain = options["redundant_per_rank"], options["ranks_per_domain"]
    mean = _average(load)
    found = []
    orders = [np.arange(len(mean))]
    if not options["keep_home"]:
        orders.append(level_homes(estimate_weights(counts, cost, ep_size), ep_size))
        found.append(chain(mean, ep_size, redundant_per_rank=redundant, ranks_per_domain=domain))
    for order in orders:
        names = torch.from_numpy(order)
        ordered = mean[names]
        copied = [
            chain(
                ordered,
                ep_size,
                redundant_per_rank=redundant,
                ranks_per_domain=domain,
                keep_home=True,
            )
        ]
        if domain is None:
            copied.append(
                Placement.from_history(
                    ordered, ep_size, redundant_per_rank=redundant, keep_home=True
                )
            )
        found += [
            Placement(names[one.phy2log.long()], ep_size, n_logical=len(mean), n_group=one.n_group)
            for one in copied
        ]
    return found


def _keep_fast(made: list[Placement], counts: Ints, cost: TimeCost) -> list[Placement]:
    """Keep placements that are near the fastest one in some of the batches."""
    means = [float(predict_times(one, counts, cost).mean()) for one in made]
    limit = MOST_BEHIND * min(means)
    return [one for one, mean in zip(made, means, strict=True) if mean <= limit]


def _choose(
    made: list[Placement],
    counts: Ints,
    cost: TimeCost,
    previous: Placement | None,
    penalty: float,
) -> Placement:
    """Choose the placement with the least mean time, the price of moves included.

    A weight that moves costs the penalty times the mean time with the previous placement.
    """
    penalty = check_number("move_penalty", penalty)
    if previous is None:
        return min(made, key=lambda one: float(predict_times(one, counts, cost).mean()))
    # With a price on moves the placement by tokens may be far from the previous one.
    before = Placement(
        previous.with_live_slots(0).phy2log, made[0].ep_size,
        n_logical=made[0].n_logical, n_group=made[0].n_group,
    )  # fmt: skip
    old = before.phy2log.long()[None]
    kept = [before] + [
        Placement(
            keep_slots(one.phy2log.long()[None], old, one.ep_size)[0], one.ep_size,
            n_logical=one.n_logical, n_group=one.n_group,
        )
        for one in made
    ]  # fmt: skip
    unit = float(predict_times(before, counts, cost).mean())

    def price(one: Placement) -> float:
        moved = plan_moves(before, one).moved if penalty else 0
        return float(predict_times(one, counts, cost).mean()) + penalty * unit * moved

    return min(kept, key=price)


def sample_counts(
    load: Doubles, rows: int, samples: int, dispersion: float, rng: np.random.Generator
) -> Ints:
    """Draw batches of so many rows by recorded loads.

    Parameters
    ----------
    load
        ``[batches, n_logical]`` float64, each with some load.
    rows
        Rows of a batch over all ranks.
    samples
        Batches to draw.
    dispersion
        Standard deviation of the logarithm of each expert's load, with fewer than `MIN_BATCHES`.
    rng
        Source of the draws.

    Returns
    -------
    numpy.ndarray
        ``[samples, n_logical]`` int64.
    """
    chosen = load[rng.integers(len(load), size=samples)]
    if len(load) < MIN_BATCHES:
        chosen = chosen * rng.lognormal(0.0, dispersion, chosen.shape)
    parts = chosen / chosen.sum(1, keepdims=True)
    return rng.multinomial(rows, parts).astype(np.int64)


def estimate_weights(counts: Ints, cost: TimeCost, ep_size: int) -> Doubles:
    """Estimate the microseconds that every expert adds to its rank, ``[n_logical]``.

    An active expert adds what one more of them costs a rank with few tiles, and every tile but
    the first a tile's slope, every row a row's.
    """
    n_local = max(counts.shape[1] // ep_size, 1)
    size = int(counts.sum(1).mean() >= cost.wide_from * counts.shape[1])
    most = min(n_local, cost.table.shape[2] - 1)
    by_active = float(cost.table[size, n_local, most] - cost.table[size, n_local - 1, most])
    tiles = np.maximum(-(-counts // cost.sides[size]) - 1, 0)
    each = by_active * (counts > 0) + cost.slopes[size] * tiles + cost.per_row * counts
    weights: Doubles = each.mean(0)
    return weights


def level_homes(weights: Doubles, ep_size: int) -> Ints:
    """Order experts so that ranks with equal numbers of them have about equal weights.

    The heaviest first, every expert goes to the lightest rank that has room.

    Returns
    -------
    numpy.ndarray
        ``[n_logical]`` int64: experts of rank 0, ascending, then those of rank 1, and so on.
    """
    room = np.full(ep_size, len(weights) // ep_size)
    load = np.zeros(ep_size)
    ranks = np.zeros(len(weights), dtype=np.int64)
    for expert in np.argsort(-weights, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, load, np.inf)))
        ranks[expert] = rank
        load[rank] += weights[expert]
        room[rank] -= 1
    return np.argsort(ranks, kind="stable").astype(np.int64)


def predict_times(placement: Placement, counts: Ints, cost: TimeCost) -> Doubles:
    """Predict the slowest rank's time in batches, with plans by time and exact quotas.

    Parameters
    ----------
    placement : Placement
        Without live slots.
    counts : numpy.ndarray
        ``[batches, n_logical]`` int64 tokens of every expert.
    cost : TimeCost
        For at least the slots of a rank.

    Returns
    -------
    numpy.ndarray
        ``[batches]`` float64 microseconds.
    """
    s = placement.structure
    shares = solve(placement.problem(torch.from_numpy(counts)), backend="torch").shares
    names = ("copy_cell", "copy_index", "copy_multiplicity", "copy_start")
    tables = [torch.tensor(getattr(s, name), device="cpu") for name in names]
    groups = make_time_tables(placement)
    copy_start = s.copy_start.astype(np.int64)
    times: Doubles = np.zeros((len(counts), len(groups)))
    for batch, tokens in enumerate(counts):
        first = batch * placement.n_group
        mine = shares[first : first + placement.n_group]
        cumulative = reference.cumulative_shares(mine, *tables).reshape(-1).numpy()
        for group, cells in enumerate(groups):
            plan = plan_time(cells, cost, tokens, cumulative.astype(np.int64), copy_start)
            times[batch, group] = plan.times[1]
    slowest: Doubles = times.max(1)
    return slowest
