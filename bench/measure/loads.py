"""Load sets of recorded traces, and seeded random ones.

A *load set* is a history, by which a case places its experts, and the batches that are timed after
it. The history of a drawn load set is its expected tokens; every batch differs from it in its own
way:

============  ====================================================================================
``jitter``    lognormal popularity; every batch multiplies each expert by a lognormal of its own
``rotating``  lognormal popularity; every batch moves it on by some experts
``burst``     lognormal popularity; in every batch a few experts are many times as popular
============  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lplb_triton.bench.types import Floats
from lplb_triton.traces.trace import Trace

__all__ = [
    "TOP_K",
    "Loads",
]


# Tokens of a drawn batch, and experts of each token.
TOKENS, TOP_K = 32768, 8

# Standard deviations of the logarithms in the jitter families: of the popularity, and of a batch.
SIGMAS, JITTERS = (0.5, 0.8, 1.0), (0.2, 0.3, 0.5)

ROTATING_SIGMA, ROTATION = 1.0, 3

BURST_SIGMA, BURST_EXPERTS, BURST_TIMES = 0.5, 3, (5.0, 30.0)

DRAWN = ("jitter", "rotating", "burst")

# Batches of a drawn load set by default; of a trace all batches are timed.
BATCHES = 12


@dataclass(frozen=True, eq=False)
class Loads:
    """A history and the batches after it.

    Attributes
    ----------
    kind
        One of `DRAWN`, or the name of the trace.
    name
        Distinguishes the load sets of a kind.
    history
        ``[n, experts]``, tokens by batch (one row of expected ones for drawn loads).
    batches
        ``[B, experts]`` int32, tokens summed over source ranks.
    """

    kind: str
    name: str
    history: torch.Tensor
    batches: torch.Tensor

    @property
    def experts(self) -> int:
        """Number of logical experts."""
        return int(self.batches.shape[1])


def split_trace(trace: Trace, source: str, most: int | None = None) -> list[Loads]:
    """Cut each layer of a trace in two: the first half places, the second is timed.

    A gap in the trace does not end a history here. So the packaged trace is a hard test: its
    placements are made early in training and used late.

    Parameters
    ----------
    trace
        At least two batches.
    source
        Its name.
    most
        Limit on the timed batches of a layer, evenly spread; None for all.

    Returns
    -------
    list of Loads
        One per layer.

    Raises
    ------
    ValueError
        If there is only one batch.
    """
    half = trace.batches // 2
    if half < 1:
        raise ValueError(f"{source} has one batch, which leaves none to place by")
    counts = trace.totals()
    timed = trace.batches - half
    chosen = half + np.linspace(0, timed - 1, min(timed, most or timed)).round().astype(int)
    return [
        Loads(
            source,
            f"layer {layer}",
            torch.from_numpy(counts[:half, layer].copy()),
            torch.from_numpy(counts[chosen, layer].astype(np.int32)),
        )
        for layer in range(trace.layers)
    ]


def draw_load_sets(experts: int, n_batches: int, seed: int) -> list[Loads]:
    """Draw the jitter families, ``rotating`` and ``burst``.

    Parameters
    ----------
    experts
        Logical experts.
    n_batches
        Batches of each load set.
    seed
        A load set depends on this, on its index in the list and on the number of experts only.

    Returns
    -------
    list of Loads
        Eleven.
    """
    draws: list[tuple[str, str, float, Callable[..., Floats]]] = [
        ("jitter", f"sigma {sigma}, jitter {spread}", sigma, partial(_jitter, spread=spread))
        for sigma in SIGMAS
        for spread in JITTERS
    ]
    draws.append(("rotating", f"by {ROTATION} experts", ROTATING_SIGMA, _rotate))
    draws.append(("burst", f"of {BURST_EXPERTS} experts", BURST_SIGMA, _burst))
    found = []
    for index, (kind, name, sigma, change) in enumerate(draws):
        rng = np.random.default_rng([seed, experts, index])
        popularity = rng.lognormal(0, sigma, experts)
        popularity /= popularity.sum()
        batches = np.empty((n_batches, experts), dtype=np.int32)
        for at, batch in enumerate(batches):
            loads = change(popularity, rng, at)
            batch[:] = rng.multinomial(TOKENS * TOP_K, loads / loads.sum())
        history = torch.from_numpy(popularity * (TOKENS * TOP_K))[None]
        found.append(Loads(kind, name, history, torch.from_numpy(batches)))
    return found


def _jitter(popularity: Floats, rng: np.random.Generator, at: int, spread: float) -> Floats:
    return popularity * rng.lognormal(0, spread, len(popularity))


def _rotate(popularity: Floats, rng: np.random.Generator, at: int) -> Floats:
    moved: Floats = np.roll(popularity, ROTATION * at)
    return moved


def _burst(popularity: Floats, rng: np.random.Generator, at: int) -> Floats:
    n_hot = min(BURST_EXPERTS, len(popularity))
    loads: Floats = popularity.copy()
    loads[rng.choice(len(loads), n_hot, replace=False)] *= rng.uniform(*BURST_TIMES, n_hot)
    return loads
