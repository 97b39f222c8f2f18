"""Make the instances on which the solver is compared with HiGHS, in parts.

===========  =====================================================================================
``random``   random programs of every shape and load family (`lplb_triton.testing.instances`)
``traffic``  the packaged trace and drawn traffic, on placements made from their history
``hard``     experts with 5 to 60 copies; copies that connect only a few ranks each; no copies
===========  =====================================================================================

Among the batches of the last two are some without tokens, and some whose tokens all go to one
expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lplb_triton import place
from lplb_triton.bench.balance import make_placement
from lplb_triton.bench.measure import loads as traffic_loads
from lplb_triton.bench.measure.cases import Case
from lplb_triton.bench.measure.loads import Loads
from lplb_triton.placement import Placement
from lplb_triton.testing.instances import (
    FAMILIES,
    TOKENS_PER_EXPERT,
    Instance,
    Part,
    draw_loads,
    draw_part,
)
from lplb_triton.traces import trace as traces

__all__ = [
    "BATCHES",
    "CASES",
    "FEWEST_RANKS",
    "HARD",
    "Islands",
    "Wide",
    "make_hard_part",
    "make_parts",
    "make_traffic_part",
]

# Batches of a load set or of a load family on each placement, by default.
BATCHES = 8
# With at least so many ranks, a quarter of the batches is made.
MANY_RANKS = 128
# Trials of `place`, which is used for few ranks only.
TRIALS = 30

# EPLB and chain on every number of ranks, with one redundant slot and with two.
CASES = tuple(
    Case(*sizes)
    for sizes in (
        (256, 8, "eplb", 1),
        (256, 8, "chain", 2),
        (256, 8, "place", 1),
        (256, 16, "eplb", 2),
        (256, 16, "chain", 1),
        (256, 16, "place", 2),
        (256, 32, "eplb", 1),
        (256, 32, "chain", 2),
        (256, 32, "place", 1),
        (256, 64, "eplb", 1),
        (256, 64, "eplb", 2),
        (256, 64, "chain", 1),
        (256, 64, "chain", 2),
        (288, 72, "eplb", 2),
        (288, 72, "chain", 1),
        (288, 96, "eplb", 1),
        (288, 96, "chain", 2),
        (256, 128, "eplb", 2),
        (256, 128, "chain", 1),
        (288, 144, "eplb", 1),
        (288, 144, "chain", 2),
        (256, 256, "eplb", 2),
        (256, 256, "chain", 1),
    )
)
FEWEST_RANKS = min(case.ep for case in CASES)


def _count_batches(n: int, ranks: int) -> int:
    return n if ranks < MANY_RANKS else max(1, n // 4)


def _make_extreme_batches(
    placement: Placement, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Make batches without tokens, and with all tokens for one expert: of most copies, or any."""
    copies = torch.bincount(placement.phy2log.long(), minlength=placement.n_logical)
    found = {"no tokens": torch.zeros(placement.n_logical, dtype=torch.int32)}
    for name, expert in (
        ("one expert, most copies", int(copies.argmax())),
        ("one expert", int(rng.integers(placement.n_logical))),
    ):
        found[name] = torch.zeros(placement.n_logical, dtype=torch.int32)
        found[name][expert] = TOKENS_PER_EXPERT * placement.n_logical
    return found


def make_traffic_part(n_batches: int, seed: int, cases: Sequence[Case] = CASES) -> Part:
    """Make the part with real traffic on placements made from the history of each load set.

    Parameters
    ----------
    n_batches
        Batches of each load set; a quarter from 128 ranks on. The first load set of a case also
        has batches without tokens, and with all tokens for one expert.
    seed
        Seed of the drawn load sets.
    cases
        Placements.

    Returns
    -------
    Part
    """
    trace = traces.packaged()
    jobs: list[tuple[Case, Loads]] = []
    for case in cases:
        n = _count_batches(n_batches, case.ep)
        found = traffic_loads.draw_load_sets(case.experts, n, seed)
        if case.experts == trace.experts:
            found = traffic_loads.split_trace(trace, "packaged trace", n) + found
        jobs += [(case, loads) for loads in found]
    steps = Counter(str(case) for case, _ in jobs)
    return Part("traffic", list(steps.items()), _generate_traffic(jobs, seed))


def _generate_traffic(jobs: Sequence[tuple[Case, Loads]], seed: int) -> Iterator[Instance]:
    seen: set[Case] = set()
    for case, loads in jobs:
        if case.placement == "place":
            placement = place(
                loads.history, case.ep, redundant_per_rank=case.slots, trials=TRIALS, device="cpu"
            )
        else:
            placement = make_placement(case.placement, loads.history, case.ep, case.slots)
        rows = list(loads.batches)
        names = [f"{loads.kind}, {loads.name}"] * len(rows)
        if case not in seen:
            more = _make_extreme_batches(placement, np.random.default_rng(seed))
            names, rows = names + list(more), rows + list(more.values())
        seen.add(case)
        yield Instance(str(case), names, placement, torch.stack(rows))


class Wide(NamedTuple):
    """Placement with experts of many copies; others have one or two copies on the other slots."""

    ranks: int
    slots: int
    """All slots of a rank."""
    copies: tuple[int, ...]
    """Copies of each such expert, all on different ranks."""

    def placement(self, rng: np.random.Generator) -> Placement:
        """Draw the ranks of the copies."""
        held: list[list[int]] = [[] for _ in range(self.ranks)]
        for expert, copies in enumerate(self.copies):
            free = [rank for rank, slots in enumerate(held) if len(slots) < self.slots]
            for rank in rng.choice(free, copies, replace=False):
                held[rank].append(expert)
        left = [r for r, slots in enumerate(held) for _ in range(self.slots - len(slots))]
        open_slots = rng.permutation(left).tolist()
        expert = len(self.copies)
        while open_slots:
            held[open_slots.pop()].append(expert)
            # Every third one gets a second copy, mostly on another rank.
            if open_slots and expert % 3 == 0:
                held[open_slots.pop()].append(expert)
            expert += 1
        return _make_placement(held, rng)


class Islands(NamedTuple):
    """Placement whose copies connect ranks to several components; the other ranks have none."""

    ranks: int
    slots: int
    """All slots of a rank."""
    sizes: tuple[int, ...]
    """Ranks of each component, a ring; with three slots a rank also an expert on all its ranks."""

    def placement(self, rng: np.random.Generator) -> Placement:
        """Draw the ranks of the components."""
        held: list[list[int]] = [[] for _ in range(self.ranks)]
        order, expert = rng.permutation(self.ranks).tolist(), 0
        for size in self.sizes:
            island, order = order[:size], order[size:]
            for at, rank in enumerate(island):
                for end in (rank, island[(at + 1) % size]):
                    held[end].append(expert)
                expert += 1
            if self.slots > 2:
                for rank in island:
                    held[rank].append(expert)
                expert += 1
        for slots in held:
            while len(slots) < self.slots:
                slots.append(expert)
                expert += 1
        return _make_placement(held, rng)


def _make_placement(held: Sequence[Sequence[int]], rng: np.random.Generator) -> Placement:
    """Make a placement of the experts in each rank's slots, renumbered in random order."""
    flat = np.array([expert for slots in held for expert in slots])
    n_logical = int(flat.max()) + 1
    return Placement.from_phy2log(rng.permutation(n_logical)[flat], len(held), n_logical=n_logical)


HARD: Mapping[str, Wide | Islands] = {
    "5 to 8 copies on 8 ranks": Wide(8, 6, (8, 7, 6, 5)),
    "5 to 16 copies on 16 ranks": Wide(16, 5, (16, 13, 9, 5)),
    "5 to 8 copies of 24 experts on 32 ranks": Wide(32, 8, (5, 6, 7, 8) * 6),
    "5 to 32 copies on 32 ranks": Wide(32, 6, (32, 28, 20, 12, 5)),
    "12 to 60 copies on 64 ranks": Wide(64, 5, (60, 48, 33, 17, 12)),
    "5 to 60 copies on 72 ranks": Wide(72, 6, (60, 60, 24, 11, 6, 5)),
    "5 to 60 copies on 128 ranks": Wide(128, 4, (60, 30, 15, 8, 5)),
    "2 components of 8 ranks": Islands(8, 4, (2, 3)),
    "5 components of 16 ranks": Islands(16, 3, (2, 2, 2, 2, 5)),
    "6 components of 64 ranks": Islands(64, 4, (8, 8, 8, 8, 8, 12)),
    "20 components of 72 ranks": Islands(72, 2, (2,) * 15 + (5,) * 5),
    "8 components of 128 ranks": Islands(128, 3, (16,) * 6 + (5, 5)),
    "no copies on 8 ranks": Islands(8, 4, ()),
}


def make_hard_part(n_batches: int, seed: int, shapes: Mapping[str, Wide | Islands] = HARD) -> Part:
    """Make the part with hard placements under uneven loads.

    Parameters
    ----------
    n_batches
        Batches of each load family; in half of them the load of an expert is multiplied by its
        number of copies; a quarter from 128 ranks on. There are also batches without tokens, and
        with all tokens for one expert.
    seed
        Seed of placements and loads.
    shapes
        Placements by name.

    Returns
    -------
    Part
    """
    return Part("hard", [(name, 1) for name in shapes], _generate_hard(n_batches, seed, shapes))


def _generate_hard(
    n_batches: int, seed: int, shapes: Mapping[str, Wide | Islands]
) -> Iterator[Instance]:
    for index, (name, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng([seed, index])
        placement = shape.placement(rng)
        copies = torch.bincount(placement.phy2log.long(), minlength=placement.n_logical)
        names, rows = [], []
        for family in FAMILIES:
            for at in range(_count_batches(n_batches, shape.ranks)):
                counts = draw_loads(family, rng, placement.n_logical)
                names.append(family)
                rows.append(counts * copies.int() if at % 2 == 0 else counts)
        more = _make_extreme_batches(placement, rng)
        names, rows = names + list(more), rows + list(more.values())
        yield Instance(name, names, placement, torch.stack(rows))


def make_parts(
    n_instances: int, seed: int, n_batches: int = 0, most_ranks: int | None = None
) -> list[Part]:
    """Make the parts that `lplb-bench verify` solves.

    Parameters
    ----------
    n_instances
        Random programs, over all shapes.
    seed
        Seed of everything drawn.
    n_batches
        As for `make_traffic_part` and `make_hard_part`; 0 for random programs alone.
    most_ranks
        Limit on the ranks of the placements of these two.

    Returns
    -------
    list of Part
    """
    found = [draw_part(n_instances, seed)]
    if n_batches:
        most = np.inf if most_ranks is None else most_ranks
        cases = [case for case in CASES if case.ep <= most]
        shapes = {name: shape for name, shape in HARD.items() if shape.ranks <= most}
        found += [
            make_traffic_part(n_batches, seed, cases),
            make_hard_part(n_batches, seed, shapes),
        ]
    return found
