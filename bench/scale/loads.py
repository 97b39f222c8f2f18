"""Loads of layers on hundreds of ranks: the packaged trace spread out, and synthetic ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from lplb_triton.bench.balance import find_stretches, spread_sources
from lplb_triton.bench.types import Floats
from lplb_triton.traces import trace as traces

__all__ = ["LOADS", "ScaleLoads", "choose_experts", "draw_loads"]

FEWEST_EXPERTS = 256
# Synthetic loads: assignments that a rank sends in a batch, batches of history, and the spread of
# an expert's load from batch to batch.
ASSIGNMENTS, HISTORY, JITTER = 32768, 32, 0.3
# Successive recorded batches that make up one. A recorded batch has 8,192 assignments of a layer:
# of 256 ranks each would have 32, and their noise would be most of the imbalance.
TOGETHER = 8

_POPULARITY: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "lognormal": lambda rng, experts: rng.lognormal(0, 1, experts),
    "zipf": lambda rng, experts: 1 / (1.0 + rng.permutation(experts)),
}
LOADS = ("trace", *_POPULARITY)


class ScaleLoads(NamedTuple):
    """Loads of one layer.

    Attributes
    ----------
    history
        ``[n_logical]`` float64, what placements are made from.
    test
        ``[batches, n_logical]`` int64 tokens.
    by_node
        ``[batches, nodes, n_logical]`` float64, the tokens that each node's ranks send.
    """

    history: torch.Tensor
    test: torch.Tensor
    by_node: torch.Tensor


def choose_experts(ep: int) -> int:
    """Return the least multiple of the ranks that is at least 256."""
    return ep * -(-FEWEST_EXPERTS // ep)


def draw_loads(
    name: str, ep: int, experts: int, batches: int, ranks_per_node: int, seed: int = 0
) -> ScaleLoads:
    """Draw or replay loads.

    The packaged trace has 256 experts in each of four layers. For 512 to 1,024 experts two to four
    of its layers stand side by side as one. A recorded source rank's tokens are spread evenly over
    as many ranks as there are for it, or several sources make up a rank. Eight successive batches
    are added up to one. The experts are placed by the first half of the last stretch, and the test
    batches are spread evenly over its other half.

    Parameters
    ----------
    name
        One of `LOADS`.
    ep, experts
        Ranks and logical experts.
    batches
        Test batches.
    ranks_per_node
        Consecutive ranks of a node; divides ``ep``.
    seed
        Of synthetic loads.

    Returns
    -------
    ScaleLoads

    Raises
    ------
    ValueError
        If the name is unknown, the ranks don't make up nodes, or the trace has not so many experts
        or batches.
    """
    if name not in LOADS:
        raise ValueError(f"name must be one of {', '.join(LOADS)}; got {name!r}")
    if ep % ranks_per_node:
        raise ValueError(f"ranks_per_node must divide {ep} ranks, got {ranks_per_node}")
    if name == "trace":
        return _spread_trace(ep, experts, batches, ep // ranks_per_node)
    rng = np.random.default_rng([seed, LOADS.index(name), experts])
    rates = _POPULARITY[name](rng, experts) * rng.lognormal(0, JITTER, (HISTORY + batches, experts))
    rates /= rates.sum(1, keepdims=True)
    test = (rates[HISTORY:] * (ASSIGNMENTS * ep)).round().astype(np.int64)
    nodes = ep // ranks_per_node
    by_node = np.repeat(test[:, None] / nodes, nodes, axis=1)
    return ScaleLoads(*map(torch.from_numpy, (rates[:HISTORY].mean(0), test, by_node)))


@lru_cache(maxsize=1)
def _load_packaged() -> traces.Trace:
    """Load the packaged trace once: every number of ranks and slots takes it."""
    return traces.packaged()


def _spread_trace(ep: int, experts: int, batches: int, nodes: int) -> ScaleLoads:
    recorded = _load_packaged()
    layers, rest = divmod(experts, recorded.experts)
    if rest or layers > recorded.layers:
        raise ValueError(
            f"the packaged trace has {recorded.layers} layers of {recorded.experts} experts, which "
            f"don't make up {experts}"
        )
    part = find_stretches(recorded.steps, 0.5)[-1]
    most = (part.stop - part.split) // TOGETHER
    if batches > most:
        raise ValueError(f"batches must be at most {most} for the packaged trace, got {batches}")
    counts = recorded.counts[:, :layers].astype(np.int64)
    # Batch, source, then the experts of all layers.
    counts = counts.transpose(0, 2, 1, 3).reshape(recorded.batches, recorded.sources, experts)
    first_of = np.linspace(part.split, part.stop - TOGETHER, batches).round().astype(int)
    test = np.stack([counts[at : at + TOGETHER].sum(0) for at in first_of])
    history = counts[part.start : part.split].sum(1).mean(0)
    by_node = np.stack([spread_sources(batch.astype(np.float64), nodes) for batch in test])
    return ScaleLoads(*map(torch.from_numpy, (history, test.sum(1), by_node)))
