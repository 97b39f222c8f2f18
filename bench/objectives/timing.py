"""Time the ranks of a batch that may be the slowest, by every way in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lplb_triton.bench.objectives.plans import WayPlan

__all__ = ["MOST_RANKS", "NEAR", "ROUNDS", "choose_ranks", "select_ranks", "time_plans"]

# Ranks predicted to take more than this part of the slowest rank's time are timed, at most so many.
NEAR, MOST_RANKS = 0.85, 6
# Of ranks that take longer than this, at most so many are timed, since rows decide which is the
# slowest, and in at most so many rounds, the second in opposite order.
LONG_US, MOST_LONG, LONG_ROUNDS = 2000.0, 2, 2
# Of a way that is predicted to take so many times as long as the fastest, one rank is timed.
FAR_BEHIND = 1.5
# Rounds through all ranks of all ways, of which the median counts.
ROUNDS = 3

TimeRows = Callable[[Sequence[int], float], float]
Key = tuple[int, ...]


def select_ranks(plan: WayPlan, most: int = MOST_RANKS) -> tuple[list[int], int]:
    """Select the ranks that are timed.

    Parameters
    ----------
    plan
        Rows and predicted times.
    most
        The most ranks.

    Returns
    -------
    ranks : list of int
        Those predicted within 15% of the slowest, the slowest first, without ranks that have the
        same rows as others.
    left_out : int
        How many more of them there are.
    """
    slowest = float(plan.us.max())
    near: dict[Key, int] = {}
    for rank in np.argsort(-plan.us, kind="stable").tolist():
        if plan.us[rank] >= NEAR * slowest:
            near.setdefault(_make_key(plan, rank), rank)
    most = min(most, MOST_LONG) if slowest > LONG_US else most
    return list(near.values())[:most], max(len(near) - most, 0)


def choose_ranks(
    plans: dict[str, WayPlan], most: int = MOST_RANKS
) -> dict[str, tuple[list[int], int]]:
    """Select the ranks of every way as `select_ranks` does; one of a way that is far behind."""
    far = FAR_BEHIND * min(float(plan.us.max()) for plan in plans.values())
    return {
        way: select_ranks(plan, 1 if plan.us.max() > far else most) for way, plan in plans.items()
    }


def _make_key(plan: WayPlan, rank: int) -> Key:
    """Return what decides a rank's time: its rows in order."""
    return tuple(sorted(plan.rows[rank].tolist(), reverse=True))


def time_plans(
    plans: dict[str, WayPlan],
    time_rows: TimeRows,
    most: int = MOST_RANKS,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Time every way's slowest ranks, interleaved.

    Parameters
    ----------
    plans
        By way.
    time_rows
        Returns the microseconds of a rank with these rows; the second argument is about how many.
    most
        Ranks of a way that are timed, at most.
    rounds
        Rounds through all of them; the median counts.

    Returns
    -------
    dict of str to float
        Microseconds of the slowest rank, by way. Ranks with the same rows are timed once, also of
        different ways.
    """
    keys = {
        way: [_make_key(plans[way], rank) for rank in ranks]
        for way, (ranks, _) in choose_ranks(plans, most).items()
    }
    about = {
        _make_key(plan, rank): float(plan.us[rank])
        for plan in plans.values()
        for rank in range(len(plan.us))
    }
    # One rank of each way after the other, so that ways are measured close together.
    longest = max(len(mine) for mine in keys.values())
    order = list(dict.fromkeys(k for i in range(longest) for m in keys.values() for k in m[i:][:1]))
    times: dict[Key, list[float]] = {key: [] for key in order}
    for at in range(rounds):
        for key in order if at % 2 == 0 else reversed(order):
            if at < LONG_ROUNDS or about[key] <= LONG_US:
                times[key].append(time_rows(key, about[key]))
    return {way: max(float(np.median(times[key])) for key in mine) for way, mine in keys.items()}
