"""The best plan of live slots by HiGHS, for small cases with every expert at home."""

from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


class Optimum(NamedTuple):
    """What HiGHS knows of the smallest largest load, in tokens."""

    reached: float
    """Of the best plan that was found."""
    proved: float
    """No plan is below this."""


def find_live_optimum(counts, ep_size, live_per_rank, *, seconds=10.0, gap=2e-3):
    """Find the smallest largest load over all plans of live slots; tokens may be divided.

    Variables are the tokens ``x`` of expert e that rank b takes and whether it does, ``y``, for
    every rank but the home one, and the largest load t. A rank takes ``live_per_rank`` experts at
    most, whether or not it sends some of its own.

    Parameters
    ----------
    counts : numpy.ndarray
        ``[n_logical]`` tokens of each expert, as many experts on each rank in order.
    ep_size, live_per_rank : int
        Ranks, and live slots of each.
    seconds : float
        Time that HiGHS may take.
    gap : float
        Relative gap at which it may stop.

    Returns
    -------
    Optimum
    """
    per_rank = len(counts) // ep_size
    home = np.arange(len(counts)) // per_rank
    expert, rank = np.divmod(np.arange(len(counts) * ep_size), ep_size)
    used = (home[expert] != rank) & (counts[expert] > 0)
    expert, rank = expert[used], rank[used]
    n = len(expert)
    load = counts.reshape(ep_size, -1).sum(1)
    x, y, t = np.arange(n), n + np.arange(n), 2 * n
    # Rows: the load of each rank, its slots, tokens of each expert, and tokens of each pair.
    slots_row, expert_row, pair_row = ep_size, 2 * ep_size, 2 * ep_size + len(counts)
    entries = [
        (home[expert], x, -1.0),
        (rank, x, 1.0),
        (np.arange(ep_size), np.full(ep_size, t), -1.0),
        (slots_row + rank, y, 1.0),
        (expert_row + expert, x, 1.0),
        (pair_row + x, x, 1.0),
        (pair_row + x, y, -counts[expert].astype(float)),
    ]
    rows, columns = (np.concatenate([entry[i] for entry in entries]) for i in (0, 1))
    values = np.concatenate([np.broadcast_to(entry[2], len(entry[0])) for entry in entries])
    table = coo_array((values, (rows, columns)), shape=(pair_row + n, 2 * n + 1)).tocsr()
    most = np.concatenate([-load, np.full(ep_size, live_per_rank), counts, np.zeros(n)])
    found = milp(
        np.append(np.zeros(2 * n), 1.0),
        constraints=LinearConstraint(table, -np.inf, most),
        integrality=np.concatenate([np.zeros(n), np.ones(n), [0]]),
        bounds=Bounds(
            np.append(np.zeros(2 * n), load.sum() / ep_size),
            np.concatenate([np.full(n, np.inf), np.ones(n), [np.inf]]),
        ),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
    assert found.mip_dual_bound is not None, found.message
    reached = np.inf if found.x is None else float(found.fun)
    return Optimum(reached, float(found.mip_dual_bound))
