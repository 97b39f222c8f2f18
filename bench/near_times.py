"""Time `Balancer.run` with and without plans that keep tokens near, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from lplb_triton import Balancer, Placement
from lplb_triton._backends.layer import create_layer
from lplb_triton._backends.levelling import LevellingBackend
from lplb_triton._locality import Locality
from lplb_triton._settings import check_size
from lplb_triton.bench.measure.timer import Timer, WrongAnswerError, compute_statistics
from lplb_triton.bench.near_plans import SLACK
from lplb_triton.bench.node_placements import Ints, make, sum_sources
from lplb_triton.bench.types import Row
from lplb_triton.reference.near import plan_near, write_near_shares
from lplb_triton.reference.near_tables import NearTables, make_near_tables
from lplb_triton.solver import DEFAULT_TOLERANCE
from lplb_triton.sync import Communicator

__all__ = ["RUNS", "time_cases"]

# In the order of timing: the last one is the first one again, which shows whether the GPU's speed
# has changed in between.
RUNS = ("without", "with", "again")
MAX_ITERATIONS = 40


class _Words(Communicator):
    """Stands for all other ranks: their counts are in a tensor of words, behind this rank's ids."""

    kind = "memory"

    def __init__(self, words: torch.Tensor, n_ids: int, ep_size: int, ranks_per_node: int) -> None:
        # Its base wants a process group, and here there is none.
        self.ranks_per_node, self.closed, self.users = ranks_per_node, False, 0
        self._gathered = words[n_ids:].view(ep_size, -1)

    def exchange(
        self,
        counts: torch.Tensor,
        version: torch.Tensor,
        total: torch.Tensor,
        gathered: torch.Tensor | None = None,
    ) -> None:
        """Hand out every rank's counts and their sums."""
        torch.sum(self._gathered, 0, dtype=torch.int32, out=total)
        if gathered is not None:
            gathered.copy_(self._gathered)

    def check(self) -> None:
        """Return, since nothing can fail."""

    def bind(self, channel: int) -> None:
        """Return, since all streams read the same words."""

    def prepare(self, n: int) -> None:
        """Return, since nothing is compiled."""

    def failed(self) -> bool:
        """Return that nothing has failed."""
        return False

    def _release(self, failed: bool) -> None:
        """Return, since nothing is held."""


class _Case(NamedTuple):
    """What runs of one rank are timed on."""

    placement: Placement
    ranks_per_node: int
    batches: torch.Tensor
    """[batches, n] int32: ids of rank 0, then the counts of all ranks."""
    tables: NearTables
    tokens: int
    top_k: int


def time_cases(
    cases: Sequence[tuple[str, Ints, Ints]],
    method: str,
    sizes: tuple[int, int, int, float | None],
    drawn: tuple[int, int, int],
    timer: Timer,
    device: torch.device,
) -> Row:
    """Check every batch against the twin, and time runs of rank 0 on it.

    Parameters
    ----------
    cases
        What `lplb_triton.bench.node_placements.split_cases` returned.
    method
        How experts are placed, see `lplb_triton.bench.node_placements.make`.
    sizes
        Ranks, redundant slots of each, ranks of a node, and the price on traffic.
    drawn
        Tokens of a rank, experts of a token, and batches of each case at most.
    timer, device
        `lplb_triton.bench.measure.timer.GraphTimer` on a GPU.

    Returns
    -------
    dict
        ``method``, ``tokens``; ``batches``, ``nearer`` (batches that ``saved`` is above 0 in),
        ``saved`` (the part of the assignments that leave their node by the balancer's LP and stay
        by its near plan, mean), and ``us`` by `RUNS`: statistics of `Balancer.run` over the
        batches. Quotas are exact in all three. Two small launches of torch stand for load sync:
        they copy and add up the counts of all ranks, which lie in this rank's memory.

    Raises
    ------
    WrongAnswerError
        If an id is no copy of its logical one, a second run gives other ids, or the shares are not
        those of the twin.
    """
    ep, slots, ranks_per_node, price = sizes
    tokens, top_k, most = drawn
    times: dict[str, list[float]] = {name: [] for name in RUNS}
    saved: list[float] = []
    for number, (_, history, test) in enumerate(cases):
        rng = np.random.default_rng(number)
        placement = make(method, history, ep, slots, ranks_per_node, price)
        chosen = np.unique(np.linspace(0, len(test) - 1, min(most, len(test))).astype(np.int64))
        by_node = sum_sources(test[chosen], ep // ranks_per_node)
        gathered = [_draw_counts(one, ranks_per_node, tokens * top_k, rng) for one in by_node]
        case = _lay_out(placement, gathered, ranks_per_node, tokens, top_k)
        saved += _time_case(case, gathered, timer, device, times)
    return {
        "method": method,
        "tokens": tokens,
        "batches": len(saved),
        "nearer": sum(part > 0 for part in saved),
        "saved": float(np.mean(saved)),
        "us": {name: compute_statistics(found) for name, found in times.items()},
    }


def _draw_counts(
    by_node: Ints, ranks_per_node: int, assignments: int, rng: np.random.Generator
) -> Ints:
    """Draw every rank's counts in proportion to those of its node, ``[ranks, E]``.

    A node without any has those of all nodes.
    """
    total = by_node.sum(1, keepdims=True)
    rates = np.where(total > 0, by_node, by_node.sum(0))
    part = rates / rates.sum(1, keepdims=True)
    drawn: Ints = rng.multinomial(assignments, part.repeat(ranks_per_node, 0)).astype(np.int64)
    return drawn


def _time_case(
    case: _Case,
    gathered: Sequence[Ints],
    timer: Timer,
    device: torch.device,
    times: dict[str, list[float]],
) -> list[float]:
    """Check and time all batches of a case, and add their times; returns what is kept near."""
    words, batches = case.batches[0].clone().to(device), case.batches.to(device)
    n_ids = case.tokens * case.top_k
    idx = words[:n_ids].view(-1, case.top_k)
    runs = {
        slack: _make_balancer(case, Locality(case.ranks_per_node, slack), words, n_ids)
        for slack in (None, SLACK)
    }
    saved = []
    for batch, counts in zip(batches, gathered, strict=True):
        words.copy_(batch)
        saved.append(_check(case, runs, idx, counts))
    for name, slack in zip(RUNS, (None, SLACK, None), strict=True):
        times[name] += timer.time_batches(partial(runs[slack].run, idx), words, batches)
    return saved


def _lay_out(
    placement: Placement, gathered: Sequence[Ints], ranks_per_node: int, tokens: int, top_k: int
) -> _Case:
    """Put rank 0's ids and all counts of a batch into one tensor, since a timer copies one."""
    rng = np.random.default_rng(0)
    rows = []
    for counts in gathered:
        ids = rng.permutation(np.arange(counts.shape[1]).repeat(counts[0]))
        rows.append(np.concatenate([ids, counts.reshape(-1)]).astype(np.int32))
    (tables,) = make_near_tables(placement, ranks_per_node)
    batches = torch.from_numpy(np.stack(rows))
    return _Case(placement, ranks_per_node, batches, tables, tokens, top_k)


def _make_balancer(case: _Case, locality: Locality, words: torch.Tensor, n_ids: int) -> Balancer:
    """Make rank 0's balancer with exact quotas, whose other ranks are in ``words``."""
    check_size(case.placement, "levelling", words.device)
    layer = create_layer(
        case.placement, words.device, "triton", rank=0, quotas="global", solver="levelling",
        tolerance=DEFAULT_TOLERANCE, max_iterations=MAX_ITERATIONS, locality=locality,
    )  # fmt: skip
    balancer = Balancer.__new__(Balancer)
    balancer._set_up(layer, "triton", None, "auto", None)
    communicator = _Words(words, n_ids, case.placement.ep_size, case.ranks_per_node)
    balancer.communicator = communicator
    balancer._backend.follow_communicator()
    return balancer


def _check(
    case: _Case, runs: dict[float | None, Balancer], idx: torch.Tensor, counts: Ints
) -> float:
    """Check the ids of a batch, and hold the shares of its near plan against the twin's.

    Returns the part of all assignments that the near plan keeps in their node.
    """
    placement, found = case.placement, {}
    for slack, balancer in runs.items():
        out = balancer.run(idx)
        if not torch.equal(placement.phy2log.to(out.device)[out.long()], idx):
            raise WrongAnswerError(f"{placement!r}: a physical id is no copy of its logical id")
        if not torch.equal(balancer.run(idx), out):
            raise WrongAnswerError(f"{placement!r}: a second run gives other ids")
        backend = balancer._backend
        if not isinstance(backend, LevellingBackend):
            raise TypeError(f"near plans are timed by the Triton back end, got {balancer!r}")
        found[slack] = backend.read_static_plan()[0].cpu().numpy().astype(np.int64)
        bound = float(backend._find_scratch(balancer._layer.default_n_sms).buffers.stats[1, 0])
    start = placement.structure.copy_start.astype(np.int64)
    shares = found[None].copy()
    plan = plan_near(case.tables, counts, shares, start, bound, SLACK)
    if plan is None:
        return 0.0
    before, after = plan.numbers[:2]
    write_near_shares(case.tables, plan, shares)
    if not np.array_equal(shares, found[SLACK]):
        raise WrongAnswerError(f"{placement!r}: shares of the near plan are not the twin's")
    return float(before - after) / float(counts.sum())
