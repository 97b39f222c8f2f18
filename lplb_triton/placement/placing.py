"""Placement for the linear program: choose what is copied where from recorded batches.

EPLB builds its placement for even splits. When the program of docs/method.md (equation 1) is solved
exactly for every batch, the remaining imbalance is due to the placement. `place` searches for one
whose optima over recorded and synthetic batches are low, on a CPU by the cuts that bind it
(`lplb_triton.placement.cut_search`), on a GPU by solving thousands of programs in a launch
(`lplb_triton.placement.exact_search`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton._checks import check_flag, check_integer, check_number
from lplb_triton._threads import one_thread
from lplb_triton.placement import Placement
from lplb_triton.placement.by_time import place_by_time
from lplb_triton.placement.chaining import (
    chain,
    check_load,
    check_ranks,
    read_traffic,
    scale_rows,
)
from lplb_triton.placement.cut_search import CutSearch
from lplb_triton.placement.exact_search import CANDIDATES, ExactSearch
from lplb_triton.placement.home import is_at_home
from lplb_triton.placement.moves import (
    check_same_sizes,
    keep_slots,
    number_domains,
    require_placement,
)
from lplb_triton.placement.near_plans import measure_far
from lplb_triton.placement.nodes import TrafficPrice, find_ranks_outside
from lplb_triton.solver import solve

if TYPE_CHECKING:
    from lplb_triton.costs import TimeCost

__all__ = ["place"]

_Float = NDArray[np.float32]
_Double = NDArray[np.float64]

# Default samples and trials.
CPU_EFFORT, GPU_EFFORT = (256, 2000), (512, 96 * CANDIDATES)
# With fewer batches than this, `dispersion` states how loads fluctuate.
MIN_BATCHES = 8
# Powers of the fluctuations in synthetic batches. The search goes on with the next power if the
# mean optimum exceeds a perfect balance by no more than MAX_EXCESS.
FLUCTUATION_POWERS = (1.0, 1.5, 2.0)
MAX_EXCESS = 3e-3
# Trials at each power but the first.
STRESS_TRIALS = 300
# The most that searches with larger fluctuations may cost over recorded batches, in mean rank
# loads.
STRESS_COST = 5e-4
# With more, an expert's load would vary by more than 20,000 times from batch to batch, and its
# power would overflow.
MAX_DISPERSION = 10.0


def place(
    history: torch.Tensor,
    ep_size: int,
    *,
    redundant_per_rank: int = 1,
    previous: Placement | None = None,
    move_penalty: float = 0.0,
    ranks_per_domain: int | None = None,
    samples: int | None = None,
    trials: int | None = None,
    dispersion: float = 0.2,
    device: torch.device | str | None = None,
    seed: int = 0,
    keep_home: bool = False,
    ranks_per_node: int | None = None,
    traffic_price: float | None = None,
    num_groups: int | None = None,
    objective: str = "tokens",
    cost: TimeCost | None = None,
    rows_per_rank: int | None = None,
) -> Placement:
    """Place and replicate experts so that the program's optimum is low over recorded batches.

    Starts from the better one of EPLB's placement and that of `lplb_triton.chain` (or from the
    previous one) and improves it by local search: swap two slots of different ranks, or give a slot
    of an expert with several copies to another expert. What is made small is the mean, with a
    little of the mean of the worst tenth, of the optima of equation 1 over `samples` batches:
    recorded ones, at most half, and synthetic ones, in which every expert's deviation from its mean
    is taken from one of two recorded batches. Synthetic batches keep the search from fitting the
    accidents of a short history. Where a placement does well on them, the search goes on with
    larger deviations, as a margin for loads that drift. An expert is repeated on a rank only if the
    rank has all others (of its domain) too.

    With `ranks_per_node`, the part of all tokens that leave their node, times the price, is added
    to the mean of the optima: in the search by an estimate, and in the choice between its start and
    its results by two linear programs for each of 16 batches (HiGHS, on the host).

    Parameters
    ----------
    history : torch.Tensor
        ``[batches, n_logical]``, load (e.g. tokens) of each logical expert in each batch, finite
        and non-negative, any real dtype, any device; or ``[n_logical]``, the mean alone. Each
        batch counts equally, whatever its total; batches without load are left out. With fewer
        than 8 batches the fluctuations are assumed, see `dispersion`. With `ranks_per_node` also
        ``[batches, sources, n_logical]``, see `lplb_triton.chain`.
    ep_size : int
        Number of ranks; divides ``n_logical``.
    redundant_per_rank : int
        Redundant slots per rank (0: the experts are only distributed).
    previous : Placement or None
        Placement to start from, of the same sizes; experts that stay on a rank keep their slots.
        See `lplb_triton.plan_moves` for what has to be copied. Slots of it that repeat an expert
        on its rank are given to others, unless moves have a price.
    move_penalty : float
        What an expert weight that a rank does not have in `previous` costs, in mean rank loads
        of the mean optimum: 1e-3 asks for 0.1% less imbalance per weight moved. Needs `previous`.
    ranks_per_domain : int or None
        Consecutive ranks that form a node or NVLink domain; divides `ep_size`. All copies of an
        expert then lie in one domain (also in `previous`), and the domains are the groups of the
        placement. None: copies may lie anywhere.
    samples : int or None
        Batches that a placement is judged by. Of a history longer than half of it, a sample. By
        default 256 on a CPU and 512 on a GPU.
    trials : int or None
        Changes to try: the effort. Time is roughly proportional to it; 0 returns the start. By
        default 2,000 on a CPU and 16,384 on a GPU, where changes are tried 64 at a time.
    dispersion : float
        Assumed standard deviation of the logarithm of each expert's load from batch to batch,
        at most 10, used with fewer than 8 batches.
    device : torch.device, str or None
        Where to search; by default where `history` is. On a CPU torch and numpy's OpenBLAS use one
        thread in this process during the search.
    seed : int
        Seed of the random choices. The placement depends on nothing else but the arguments (and
        on the rounding of the processor at hand: where several processes need it, compute it in
        one and broadcast it).
    keep_home : bool
        Whether the first ``n_logical / ep_size`` slots of rank r hold experts
        ``r * n_logical / ep_size`` and following, in order, as frameworks shard them (also in
        `previous`). Only the redundant slots are chosen then.
    ranks_per_node : int or None
        Consecutive ranks of a node; divides `ep_size`, and isn't combined with
        `ranks_per_domain`. Copies may lie on any node.
    traffic_price : float or None
        Tokens of load that a token sent to another node is worth, at most 1e6: 1, the default,
        takes 1% more load on the most loaded rank for 1% of the tokens that no longer leave their
        node, and 0 makes the placement without nodes. Needs `ranks_per_node`.
    num_groups : int or None
        Groups of consecutive experts, of which the router gives a token a few only: all copies of a
        group's experts lie in one node then (also in `previous`), see `lplb_triton.chain`. Needs
        `ranks_per_node`.
    objective : {"tokens", "time"}
        ``"time"``: for a `Balancer` that makes plans by time, such as in decoding. Several
        placements are judged by the predicted times of these plans in `samples` (32) batches, drawn
        by recorded loads: the one by tokens, found with `trials` (0), and placements with equal
        numbers of active experts on every rank. A move costs `move_penalty` times the mean time
        with `previous`.
    cost : TimeCost or None
        What a rank's products take, with ``objective="time"``.
    rows_per_rank : int or None
        Tokens of a rank in a batch, times top-k, with ``objective="time"``.

    Returns
    -------
    Placement
        One LP group over all ranks, or one for each domain, or for each node with `num_groups`. The
        mean optimum over `history` (plus the prices of moves and of traffic) is no larger than that
        of the start (so than EPLB's, where that is one), up to the solver's tolerance of 1e-3 and,
        where the search took a margin for drift, 5e-4. With
        ``objective="time"`` it is that of the placements judged whose mean time is the least.

    Raises
    ------
    TypeError
        If `history` is not a tensor of a real dtype or another argument has the wrong type.
    ValueError
        If a shape or value is not as stated above. The message names the argument.

    Examples
    --------
    >>> history = torch.tensor([[8.0, 1.0, 1.0, 2.0], [2.0, 1.0, 1.0, 8.0]]).repeat(4, 1)
    >>> place(history, 2, redundant_per_rank=1)
    Placement(4 experts in 6 slots, 2 ranks, 1 group(s), up to 2 copies)
    """
    if objective != "tokens" or cost is not None or rows_per_rank is not None:
        arguments = {
            "redundant_per_rank": redundant_per_rank, "previous": previous,
            "move_penalty": move_penalty, "ranks_per_domain": ranks_per_domain,
            "samples": samples, "trials": trials, "dispersion": dispersion, "device": device,
            "seed": seed, "keep_home": keep_home, "ranks_per_node": ranks_per_node,
            "traffic_price": traffic_price, "num_groups": num_groups,
        }  # fmt: skip
        return place_by_time(place, history, ep_size, objective, cost, rows_per_rank, arguments)
    rows = check_load("history", history, (1, 2) if ranks_per_node is None else (1, 2, 3))
    where = history.device if device is None else _check_device(device)
    n_logical = rows.shape[1]
    n_ranks = check_ranks(ep_size, ranks_per_domain, n_logical)
    traffic, groups, rows = read_traffic(
        *("history", history, rows, n_ranks),
        *(ranks_per_node, traffic_price, ranks_per_domain, num_groups),
    )
    load = scale_rows(rows)
    if traffic is not None and groups is not None:
        ranks_per_domain = traffic.ranks_per_node
    redundant = check_integer("redundant_per_rank", redundant_per_rank, 0)
    effort = CPU_EFFORT if where.type == "cpu" else GPU_EFFORT
    n_samples = effort[0] if samples is None else check_integer("samples", samples, 1)
    n_trials = effort[1] if trials is None else check_integer("trials", trials, 0)
    dispersion = check_number("dispersion", dispersion, MAX_DISPERSION)
    penalty = check_number("move_penalty", move_penalty)
    rng = np.random.default_rng(check_integer("seed", seed, 0))
    stay = check_flag("keep_home", keep_home)
    domain = number_domains(n_ranks, ranks_per_domain)
    load = load[load.sum(1) > 0]
    load = load / load.sum(1, keepdims=True) * n_ranks
    mean = load.mean(0) if len(load) else np.ones(n_logical)
    counts = torch.from_numpy(load).to(where)
    if previous is not None:
        start = _start_from(
            previous, mean, n_ranks, redundant, ranks_per_domain, groups, not penalty
        )
    elif penalty:
        raise ValueError("move_penalty needs previous, the placement that moves start from")
    else:
        sizes = (n_ranks, redundant, ranks_per_domain, stay)
        start = _choose_start(history, mean, counts, sizes, traffic, groups)
    if stay and not is_at_home(start):
        raise ValueError("previous must have every expert at home, see keep_home")
    if n_ranks == 1 or not len(load) or not n_trials:
        return start
    fixed = np.arange(start.n_physical) % start.slots_per_rank < n_logical // n_ranks
    price = _price_moves(start, penalty, traffic, groups)
    search = _Search(load, counts, price, domain, where, rng, fixed if stay else None, traffic)
    best = search.improve(start, n_samples, n_trials, dispersion)
    phy2log = keep_slots(best.phy2log.long()[None], start.phy2log.long()[None], n_ranks)[0]
    return Placement(phy2log, n_ranks, n_logical=n_logical, n_group=start.n_group)


def _start_from(
    previous: Placement,
    mean: _Double,
    ranks: int,
    redundant: int,
    ranks_per_domain: int | None,
    num_groups: int | None,
    may_replace: bool,
) -> Placement:
    """Return the previous placement with the domains as groups, or raise naming the argument.

    Slots that repeat an expert on their rank are given to others if ``may_replace``.
    """
    n_logical = len(mean)
    # What live slots hold belongs to a batch and not to the placement.
    previous = require_placement("previous", previous).with_live_slots(0)
    check_same_sizes("previous", previous, (n_logical, n_logical + redundant * ranks, ranks))
    n_domains = ranks // (ranks_per_domain or ranks)
    try:
        start = Placement(previous.phy2log, ranks, n_logical=n_logical, n_group=n_domains)
    except ValueError as error:
        name, value = "ranks_per_domain", ranks_per_domain
        if num_groups is not None:
            name, value = "num_groups", num_groups
        raise ValueError(f"{name} is {value}, but previous.{error}") from error
    return _replace_repeats(start, mean) if may_replace else start


def _choose_start(
    history: torch.Tensor,
    mean: _Double,
    counts: torch.Tensor,
    sizes: tuple[int, int, int | None, bool],
    traffic: TrafficPrice | None,
    num_groups: int | None,
) -> Placement:
    """Choose the best placement to start from, with the ``sizes`` of `_list_starts`."""
    starts = _list_starts(torch.from_numpy(mean), *sizes)
    if traffic is not None:
        near = chain(
            *(history, sizes[0]),
            redundant_per_rank=sizes[1],
            keep_home=sizes[3],
            ranks_per_node=traffic.ranks_per_node,
            traffic_price=traffic.price,
            num_groups=num_groups,
        )
        # The other starts don't know which groups belong together.
        starts = [near] if num_groups is not None else [near, *starts]
    free = np.zeros((len(mean), sizes[0]), dtype=np.float32)
    return min(starts, key=lambda one: _compute_cost(one, counts, free, traffic))


def _list_starts(
    mean: torch.Tensor, ranks: int, redundant: int, ranks_per_domain: int | None, stay: bool
) -> list[Placement]:
    """List placements to start from: the chained one and EPLB's.

    If experts are to ``stay`` at home, they are two that keep them there.
    """
    n_domains = ranks // (ranks_per_domain or ranks)
    n_logical = len(mean)
    if stay:
        starts = [
            chain(
                mean,
                ranks,
                redundant_per_rank=redundant,
                ranks_per_domain=ranks_per_domain,
                keep_home=True,
            )
        ]
        if n_domains == 1:
            starts.append(
                Placement.from_history(mean, ranks, redundant_per_rank=redundant, keep_home=True)
            )
        return starts
    # With groups of one expert each, EPLB packs single experts onto domains by load.
    groups = n_logical if n_domains > 1 else 1
    eplb = Placement.from_history(
        mean, ranks, redundant_per_rank=redundant, num_groups=groups, num_nodes=n_domains
    )
    eplb = Placement(eplb.phy2log, ranks, n_logical=n_logical, n_group=n_domains)
    eplb = _replace_repeats(eplb, mean.numpy())
    # With more slots than this, every rank has every expert of its domain.
    if redundant * ranks > n_logical * (ranks // n_domains - 1):
        return [eplb]
    chained = chain(mean, ranks, redundant_per_rank=redundant, ranks_per_domain=ranks_per_domain)
    return [chained, eplb]


def _replace_repeats(placement: Placement, mean: _Double) -> Placement:
    """Give slots that repeat an expert on their rank to the heaviest experts that the rank lacks.

    Repeats stay where a rank has every expert of its group. The optimum can only fall.
    """
    structure = placement.structure
    repeats = np.sort(structure.copy_slot[structure.copy_index > 0])
    if not repeats.size:
        return placement
    phy2log, copies = placement.phy2log.long().numpy(), placement.logcnt.long().numpy()
    for slot in repeats:
        first = slot - slot % placement.slots_per_rank
        row = phy2log[first : first + placement.slots_per_rank]
        group = structure.cell_group == structure.cell_group[phy2log[slot]]
        lacking = np.setdiff1d(np.flatnonzero(group), row)
        if lacking.size:
            heaviest = np.lexsort((copies[lacking], -mean[lacking] / copies[lacking]))[0]
            copies[phy2log[slot]] -= 1
            phy2log[slot] = lacking[heaviest]
            copies[phy2log[slot]] += 1
    return Placement(
        phy2log, placement.ep_size, n_logical=placement.n_logical, n_group=placement.n_group
    )


def _check_device(device: torch.device | str) -> torch.device:
    """Return a device that can compute, or raise naming it."""
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a CPU or GPU: {error}") from None
    if where.type == "meta":
        raise ValueError("device must be a CPU or GPU, got meta")
    return where


def draw_batches(
    load: _Double, samples: int, dispersion: float, power: float, rng: np.random.Generator
) -> _Float:
    """Draw batches ``[samples, E]`` to judge by: recorded ones, at most half, and synthetic."""
    total, mean = load.sum(1).mean(), load.mean(0)
    recorded = min(len(load), (samples + 1) // 2)
    missing = samples - recorded
    if len(load) < MIN_BATCHES:
        ratio = rng.lognormal(0.0, dispersion, (missing, load.shape[1]))
    else:
        relative = load / np.where(mean > 0, mean, 1.0)
        one, two = rng.integers(len(load), size=(2, missing))
        from_first = rng.random((missing, load.shape[1])) < 0.5
        ratio = np.where(from_first, relative[one], relative[two])
    synthetic = mean * ratio**power
    synthetic = synthetic[synthetic.sum(1) > 0]
    load = np.concatenate([load[rng.permutation(len(load))[:recorded]], synthetic])
    # The order is random, so that consecutive batches are a fair sample.
    load = rng.permutation(load)
    scaled: _Float = (load / load.sum(1, keepdims=True) * total).astype(np.float32)
    return scaled


def _price_moves(
    start: Placement, penalty: float, traffic: TrafficPrice | None, num_groups: int | None
) -> _Float:
    """Price a copy on a rank, ``[n_logical, ranks]``; the copies of the start cost nothing.

    Copies out of their group's node cost more than any gain.
    """
    price = np.zeros((start.n_logical, start.ep_size), dtype=np.float32)
    # No move pays for more: an optimum is at most as many mean rank loads as there are ranks, and
    # traffic costs at most 2.5 times its price.
    most = 2.0 * start.ep_size + (0.0 if traffic is None else 3.0 * traffic.price)
    if penalty:
        price += np.float32(min(penalty, most))
        price[start.phy2log.numpy(), start.rank_of_slot.numpy()] = 0.0
    if num_groups is not None:
        price = np.maximum(price, np.float32(most) * find_ranks_outside(start, num_groups))
    return price


class _Search(NamedTuple):
    """What the searches at all powers of the fluctuations have in common."""

    load: _Double
    """``[batches, E]`` recorded batches, in mean rank loads."""
    counts: torch.Tensor
    """The same on the device."""
    price: _Float
    """``[E, ranks]`` price of a copy on a rank."""
    domain: NDArray[np.int64]
    """``[ranks]`` domain of each rank."""
    device: torch.device
    """Where to search."""
    rng: np.random.Generator
    """Source of all random choices."""
    fixed: NDArray[np.bool_] | None
    """``[n_physical]`` slots whose experts stay at home, or None."""
    traffic: TrafficPrice | None
    """Price of tokens that leave their node, or None."""

    def improve(
        self, start: Placement, n_samples: int, n_trials: int, dispersion: float
    ) -> Placement:
        """Search from a start, with larger fluctuations while the placement is nearly perfect."""
        best, limit = start, _compute_cost(start, self.counts, self.price, self.traffic)
        for power in FLUCTUATION_POWERS:
            batches = draw_batches(self.load, n_samples, dispersion, power, self.rng)
            found, excess, used = self.run(best, batches, n_trials)
            n_trials -= used
            cost = _compute_cost(found, self.counts, self.price, self.traffic)
            if cost <= limit + STRESS_COST / len(FLUCTUATION_POWERS):
                best, limit = found, min(limit, cost)
            n_trials = min(n_trials, STRESS_TRIALS)
            if excess > MAX_EXCESS or n_trials < 1:
                break
        return best

    def run(self, start: Placement, batches: _Float, n_trials: int) -> tuple[Placement, float, int]:
        """Search by cuts or exactly; return the placement, its mean excess and the trials used."""
        if self.device.type == "cpu":
            by_cuts = CutSearch(
                start, batches, self.price, self.domain, self.rng, self.fixed, self.traffic
            )
            with one_thread():
                found, excess = by_cuts.run(n_trials)
            return found, excess, by_cuts.trial
        seed = int(self.rng.integers(2**31))
        exact = ExactSearch(
            start,
            torch.from_numpy(batches).to(self.device),
            torch.from_numpy(self.price),
            torch.from_numpy(self.domain),
            torch.Generator(self.device).manual_seed(seed),
            None if self.fixed is None else torch.from_numpy(self.fixed),
            self.traffic,
        )
        found, excess = exact.run(max(1, n_trials // CANDIDATES))
        return found, excess, exact.steps * CANDIDATES


def _compute_cost(
    placement: Placement, counts: torch.Tensor, price: _Float, traffic: TrafficPrice | None
) -> float:
    """Add the mean optimum over batches, in mean rank loads, the moves' price and the traffic's."""
    if not len(counts):
        return 0.0
    parts = [
        solve(placement.problem(part)).max_load.reshape(len(part), -1).amax(1)
        for part in torch.split(counts, 256)
    ]
    expert, rank = placement.phy2log.numpy(), placement.rank_of_slot.numpy()
    cost = float(torch.cat(parts).mean() + price[expert, rank].sum())
    if traffic is None:
        return cost
    return cost + traffic.price * measure_far(placement, counts.cpu().numpy(), traffic)
