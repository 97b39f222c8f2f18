"""Random min-max programs: the load families that solvers are checked and timed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lplb_triton import chain, topologies
from lplb_triton.placement import Placement
from lplb_triton.problem import Problem

__all__ = [
    "FAMILIES",
    "SHAPES",
    "Instance",
    "Part",
    "corpus",
    "draw_loads",
    "draw_part",
    "named_topology",
    "shape_placement",
]

Floats = NDArray[np.float64]

TOKENS_PER_EXPERT = 1024
# Limits of a shape or topology made by its name, so that a typing error does not take all memory.
MAX_RANKS, MAX_SLOTS = 4096, 2**16


def _normal(rng: np.random.Generator, n: int) -> Floats:
    return np.clip(rng.normal(1.0, 0.3, n), 0.0, None)


def _lognormal(rng: np.random.Generator, n: int) -> Floats:
    return rng.lognormal(0.0, 1.0, n)


def _zipf(rng: np.random.Generator, n: int) -> Floats:
    return rng.permutation(np.arange(1, n + 1) ** -1.2)


def _hot(rng: np.random.Generator, n: int) -> Floats:
    loads = rng.uniform(0.5, 1.5, n)
    loads[rng.integers(n)] *= n
    return loads


def _sparse(rng: np.random.Generator, n: int) -> Floats:
    return rng.lognormal(0.0, 1.0, n) * (rng.random(n) < 0.2)


def _dirichlet(rng: np.random.Generator, n: int) -> Floats:
    return rng.dirichlet(np.full(n, 0.1))


def _few_tokens(rng: np.random.Generator, n: int) -> Floats:
    return rng.poisson(0.5, n).astype(np.float64)


def _wide_range(rng: np.random.Generator, n: int) -> Floats:
    return 10.0 ** rng.uniform(-6.0, 3.0, n)


def _equal(rng: np.random.Generator, n: int) -> Floats:
    return np.full(n, float(rng.integers(1, 100)))


def _empty(rng: np.random.Generator, n: int) -> Floats:
    return np.zeros(n)


# The first six are those of the published comparison; the others are edge cases.
FAMILIES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "normal": _normal,
    "lognormal": _lognormal,
    "zipf": _zipf,
    "one hot expert": _hot,
    "sparse": _sparse,
    "dirichlet": _dirichlet,
    "few tokens": _few_tokens,
    "wide range": _wide_range,
    "equal": _equal,
    "empty": _empty,
}
# Families that keep their own small numbers; the rest are scaled to a batch's token counts.
_UNSCALED = ("few tokens", "equal", "empty")


class Instance(NamedTuple):
    """One shape with a batch of loads."""

    shape: str
    families: list[str]
    placement: Placement
    counts: torch.Tensor
    """[B, n_logical] int32 tokens per logical expert, row i drawn from ``families[i]``."""

    @property
    def problem(self) -> Problem:
        """The programs, one per row (and group)."""
        return self.placement.problem(self.counts)


class Part(NamedTuple):
    """Instances of one kind, such as random ones."""

    name: str
    """``random``, or ``traffic`` or ``hard`` of `lplb-bench verify`."""
    steps: list[tuple[str, int]]
    """Name of each placement, and how many instances there are of it."""
    instances: Iterator[Instance]
    """In this order."""

    @property
    def as_problems(self) -> bool:
        """Whether `lplb_triton.solve` solves them too, whose kernel takes no 256 ranks."""
        return self.name == "random"


def draw_loads(family: str, rng: np.random.Generator, n_experts: int) -> torch.Tensor:
    """Draw token counts per expert from a family.

    Parameters
    ----------
    family : str
        A key of `FAMILIES`.
    rng : numpy.random.Generator
        Source of randomness.
    n_experts : int
        Number of experts.

    Returns
    -------
    torch.Tensor
        ``[n_experts]`` int32.

    Raises
    ------
    ValueError
        If the family is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")
    loads = FAMILIES[family](rng, n_experts)
    if family not in _UNSCALED and loads.sum() > 0:
        loads = loads * (TOKENS_PER_EXPERT * n_experts / loads.sum())
    return torch.from_numpy(np.floor(loads).astype(np.int32))


def _random_copies(rng: np.random.Generator, ep_size: int, n_logical: int, slots: int) -> Placement:
    """Make a random slot map with every expert; a rank may hold several copies of one."""
    spare = ep_size * slots - n_logical
    extra = rng.integers(n_logical, size=spare)
    flat = rng.permutation(np.concatenate([np.arange(n_logical), extra]))
    return Placement.from_phy2log(flat, ep_size, n_logical=n_logical)


# Names that `shape_placement` takes.
SHAPES = (
    "ring:8",
    "cube",
    "hypercube",
    "torus:4x8",
    "torus:8x8",
    "ring:5",
    "torus:3x4",
    "eplb:2:1",
    "eplb:8:1",
    "eplb:16:2",
    "eplb:24:1",
    "eplb:32:2",
    "eplb:64:1",
    "eplb:64:2",
    "random:7:3",
    "random:12:2",
    "random:32:4",
)


def named_topology(name: str) -> torch.Tensor:
    """Build a topology from its name, up to 4096 ranks.

    Parameters
    ----------
    name : str
        As for `lplb_triton.topologies.from_name`.

    Returns
    -------
    torch.Tensor
        ``[group_size, num_redundants]`` int32 on the CPU.

    Raises
    ------
    ValueError
        If there is no such topology, or it has more ranks.
    """
    sizes = [size.lstrip("0")[:6] for size in name.partition(":")[2].split("x")]
    if math.prod(int(size) for size in sizes if size.isdecimal()) > MAX_RANKS:
        raise ValueError(f"{name} has more than {MAX_RANKS} ranks")
    return topologies.from_name(name)


def shape_placement(
    shape: str, rng: np.random.Generator, *, n_experts: int | None = None
) -> Placement:
    """Make the placement of a shape by its name.

    Parameters
    ----------
    shape : str
        A topology's name (8 experts per rank), ``eplb:RANKS:SLOTS`` or ``chain:RANKS:SLOTS``
        (by a lognormal history) or ``random:RANKS:SLOTS`` (arbitrary copies).
    rng : numpy.random.Generator
        Source of the history or of the copies.
    n_experts : int or None
        Number of logical experts, a multiple of the ranks; by default as named above, and 256
        for EPLB and arbitrary copies from 16 ranks on.

    Returns
    -------
    Placement

    Raises
    ------
    ValueError
        If there is no such shape.
    """
    kind, _, rest = shape.partition(":")
    if kind in ("eplb", "chain", "random"):
        sizes = rest.split(":")
        if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
            raise ValueError(f"shape must be {kind}:RANKS:SLOTS, got {shape!r}")
        # Nine digits are enough to see that a number is too large.
        ranks, slots = (int(size.lstrip("0")[:9] or 0) for size in sizes)
        if ranks < 1:
            raise ValueError(f"shape must have at least one rank, got {shape!r}")
        if ranks > MAX_RANKS or ranks * slots > MAX_SLOTS:
            raise ValueError(
                f"shape must have at most {MAX_RANKS} ranks and {MAX_SLOTS} redundant slots in "
                f"all, got {shape!r}"
            )
        per_rank = max(1, 256 // ranks) if ranks >= 16 else 8
        n_logical = per_rank * ranks if n_experts is None else n_experts
        per_rank = n_logical // ranks
        if kind == "random":
            return _random_copies(rng, ranks, n_logical, per_rank + slots)
        history = draw_loads("lognormal", rng, n_logical)
        if kind == "chain":
            return chain(history, ranks, redundant_per_rank=slots)
        return Placement.from_history(history, ranks, redundant_per_rank=slots)
    r2o = named_topology(shape)
    ranks, slots = r2o.shape
    n_logical = ranks * 8 if n_experts is None else n_experts
    return Placement.from_topology(r2o, n_logical + ranks * slots, n_logical, ranks)


def corpus(n_instances: int, seed: int) -> Iterator[Instance]:
    """Yield about ``n_instances`` random programs, spread evenly over shapes and families.

    Parameters
    ----------
    n_instances : int
        Total over all shapes; rounded up to whole batches.
    seed : int
        Seed of everything drawn.

    Yields
    ------
    Instance
        One per shape, with its share of the loads.
    """
    rng = np.random.default_rng(seed)
    families = tuple(FAMILIES)
    per_shape = -(-n_instances // len(SHAPES))
    for shape in SHAPES:
        placement = shape_placement(shape, rng)
        names = [families[i % len(families)] for i in range(per_shape)]
        rows = [draw_loads(name, rng, placement.n_logical) for name in names]
        yield Instance(shape, names, placement, torch.stack(rows))


def draw_part(n_instances: int, seed: int) -> Part:
    """Return random programs of `corpus` as one part.

    Parameters
    ----------
    n_instances, seed : int
        As for `corpus`.

    Returns
    -------
    Part
        Its name is ``random``.
    """
    return Part("random", [(shape, 1) for shape in SHAPES], corpus(n_instances, seed))
