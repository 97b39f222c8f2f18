"""Plans of batches: on static copies by the LP, and with live slots on top."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import Placement, reference, solve
from lplb_triton._layout import SHARE_ONE
from lplb_triton.bench.balance import BY_HISTORY, make_placement
from lplb_triton.bench.types import Floats
from lplb_triton.reference.live import (
    Copies,
    LiveCase,
    count_running,
    find_homes,
    list_copies,
    plan_live,
    split_running,
)

__all__ = [
    "HOME",
    "Base",
    "BatchPlan",
    "StaticPlan",
    "make_static_plan",
    "place_base",
    "plan_batch",
    "read_base",
    "read_copies",
    "solve_batches",
]

Ints = NDArray[np.int64]

HOME = "home"


class Base(NamedTuple):
    """A static placement, by its name and its redundant slots on each rank."""

    name: str
    slots: int

    def __str__(self) -> str:
        """Write it as `read_base` takes it."""
        return f"{self.name}:{self.slots}" if self.slots else self.name


def read_base(text: str) -> Base:
    """Read the name of a base placement.

    Parameters
    ----------
    text
        ``"home"`` (experts in order, no copies), or ``"eplb:2"``, ``"chain:2"`` and ``"place:2"``
        with any number of redundant slots.

    Returns
    -------
    Base

    Raises
    ------
    ValueError
        For anything else.
    """
    if text == HOME:
        return Base(HOME, 0)
    name, _, slots = text.partition(":")
    if name not in BY_HISTORY or not slots.isdecimal() or not 1 <= len(slots) <= 4:
        raise ValueError(f"base must be home or {'|'.join(BY_HISTORY)} with :SLOTS, got {text!r}")
    if int(slots) < 1:
        raise ValueError(f"base must have at least one slot, or be home; got {text!r}")
    return Base(name, int(slots))


class StaticPlan(NamedTuple):
    """The LP's plans of several batches on one placement."""

    ep_size: int
    counts: Ints
    """[batches, n_logical] tokens of each expert."""
    copies: Copies
    home: Ints
    """[n_logical] rank of each expert's original."""
    cumulative: Ints
    """[batches, n_copies] cumulative shares in units of 2**-24."""
    max_load: Floats
    """[batches] largest load by the LP, in fractions of tokens."""

    def find_loads(self, batch: int) -> Ints:
        """Compute the tokens of each rank, ``[ep_size]``."""
        plan = (self.counts[batch], self.cumulative[batch], self.copies)
        return find_rank_loads(*plan, self.ep_size)

    def find_imbalance(self) -> Floats:
        """Compute the largest over the mean load of each batch, ``[batches]``."""
        largest = [self.find_loads(batch).max() for batch in range(len(self.counts))]
        mean = self.counts.sum(1) / self.ep_size
        return np.array(largest, dtype=np.float64) / np.asarray(mean, dtype=np.float64)


class BatchPlan(NamedTuple):
    """What live slots do in one batch."""

    experts: Ints
    """[ep_size, live_per_rank] what each live slot holds, -1 for nothing."""
    loads: Ints
    """[ep_size] tokens of each rank."""
    bound: float
    """A largest load that no plan can beat."""
    max_load: float
    """Largest load as the plan itself tells it, before shares are rounded to tokens."""


def find_rank_loads(counts: Ints, cumulative: Ints, copies: Copies, ep_size: int) -> Ints:
    """Compute the tokens of each rank over all source ranks, by cumulative shares."""
    tokens = split_running(count_running(counts, cumulative, copies), copies.start)
    return np.bincount(copies.rank, tokens, ep_size).astype(np.int64)


def make_static_plan(base: Base, history: torch.Tensor, counts: Ints, ep_size: int) -> StaticPlan:
    """Place experts by a history, and solve the LP of each batch.

    Parameters
    ----------
    base
        What to place by.
    history
        ``[batches, n_logical]`` tokens.
    counts
        ``[batches, n_logical]`` int64 tokens of the batches to plan.
    ep_size
        Ranks.

    Returns
    -------
    StaticPlan

    Raises
    ------
    ValueError
        If the sizes don't fit.
    SolveError
        If an LP was not certified.
    """
    return solve_batches(place_base(base, history, ep_size), counts)


def place_base(base: Base, history: torch.Tensor, ep_size: int) -> Placement:
    """Place experts by a history ``[batches, n_logical]``.

    Raises
    ------
    ValueError
        If the sizes don't fit.
    """
    name = "none" if base.name == HOME else base.name
    return make_placement(name, history, ep_size, base.slots)


def read_copies(placement: Placement) -> tuple[Copies, Ints]:
    """Return the copies of a placement without live slots, and each expert's home rank."""
    copies = list_copies(placement)
    return copies, find_homes(copies)


def solve_batches(placement: Placement, counts: Ints, *, certified: bool = True) -> StaticPlan:
    """Solve the LP of each batch on a placement.

    Parameters
    ----------
    placement
        Of one group, without live slots.
    counts
        ``[batches, n_logical]`` int64 tokens.
    certified
        Whether every LP must be.

    Returns
    -------
    StaticPlan

    Raises
    ------
    SolveError
        If an LP that must be certified isn't.
    """
    structure = placement.structure
    copies, home = read_copies(placement)
    tokens = torch.from_numpy(counts)
    if placement.n_copies == placement.n_logical:
        cumulative = np.full((len(counts), placement.n_copies), SHARE_ONE, dtype=np.int64)
        largest = placement.even_loads(tokens).amax(1).numpy().astype(np.float64)
        return StaticPlan(placement.ep_size, counts, copies, home, cumulative, largest)
    solution = solve(placement.problem(tokens))
    if certified:
        solution.check()
    tables = [
        torch.tensor(table, device="cpu")
        for table in (
            *(structure.copy_cell, structure.copy_index, structure.copy_multiplicity),
            structure.copy_start,
        )
    ]
    shape = (len(counts), 1, placement.group_size, placement.max_columns)
    shares = solution.shares.cpu().reshape(shape)
    cumulative = np.stack([reference.cumulative_shares(one, *tables).numpy() for one in shares])
    largest = solution.max_load.cpu().double().numpy()
    return StaticPlan(placement.ep_size, counts, copies, home, cumulative.astype(np.int64), largest)


def plan_batch(case: LiveCase, static: StaticPlan, batch: int) -> BatchPlan:
    """Plan the live slots of one batch by the twin in numpy.

    Whatever else plans a batch takes the place of this function.

    Parameters
    ----------
    case
        Sizes and rules.
    static
        The LP's plans.
    batch
        Which of them.

    Returns
    -------
    BatchPlan
    """
    counts = static.counts[batch]
    found = plan_live(
        case, counts, static.cumulative[batch], static.copies, float(static.max_load[batch])
    )
    loads = find_rank_loads(counts, found.cumulative, found.copies, case.ep_size)
    return BatchPlan(found.experts, loads, found.bound, found.max_load)
