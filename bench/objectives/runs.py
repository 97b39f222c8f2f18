"""Time `Balancer.run` by tokens and by time."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from lplb_triton import Balancer, TimeCost
from lplb_triton.bench.measure.timer import Timer, WrongAnswerError, compute_statistics
from lplb_triton.bench.objectives.batches import Batch
from lplb_triton.bench.types import Row

__all__ = ["RUNS", "time_runs"]

# In the order of timing: the last one is the first one again, which shows whether the GPU's speed
# has changed in between.
RUNS = ("tokens", "time", "again")


def time_runs(
    batch: Batch, n_batches: int, cost: TimeCost, timer: Timer, device: torch.device
) -> Row:
    """Time runs of one rank, replayed from CUDA graphs on a GPU.

    Parameters
    ----------
    batch
        Says the placement, and the tokens of a rank; its load gives the ids. Counts are this
        rank's own, so that no time of a sum over ranks is in.
    n_batches
        Batches, each with ids of its own.
    cost
        Of the plans by time.
    timer, device
        Timer of the launches, and the device that they run on.

    Returns
    -------
    dict
        ``model``, ``ep``, ``slots``, ``placement``, ``tokens``; ``us`` by `RUNS`, statistics over
        the batches.

    Raises
    ------
    WrongAnswerError
        If an id is no copy of its logical one, or a second run gives other ids.
    """
    placement = batch.place(cost)
    rng = np.random.default_rng(0)
    parts = batch.count() / batch.count().sum()
    drawn = rng.choice(len(parts), (n_batches, batch.tokens, batch.model.top_k), p=parts)
    ids = torch.from_numpy(drawn.astype(np.int64)).to(device)
    backend = "triton" if device.type == "cuda" else "torch"
    by_tokens, by_time = (
        Balancer(
            placement, device=device, backend=backend, rank=0, objective=objective,
            cost=cost if objective == "time" else None,
        )
        for objective in ("tokens", "time")
    )  # fmt: skip
    held = placement.phy2log.long().to(device)
    for balancer in (by_tokens, by_time):
        for idx in ids:
            out = balancer.run(idx)
            if not torch.equal(held[out], idx):
                raise WrongAnswerError(f"{balancer}: an id is no copy of its logical id")
            if not torch.equal(balancer.run(idx), out):
                raise WrongAnswerError(f"{balancer}: a second run gives other ids")
    us = {}
    for name, balancer in zip(RUNS, (by_tokens, by_time, by_tokens), strict=True):
        idx = ids[0].clone()
        times = timer.time_batches(partial(balancer.run, idx), idx, ids)
        us[name] = compute_statistics(times)
    return {
        "model": batch.name,
        "ep": batch.ep,
        "slots": batch.slots,
        "placement": batch.method,
        "tokens": batch.tokens,
        "us": us,
    }
