"""Section ``pipeline``: time whole runs with load sync after checking their loads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from lplb_triton import Balancer, Placement, topologies
from lplb_triton.bench.ep.loads import check_loads
from lplb_triton.bench.ep.sizes import N_COUNTS
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure.loads import TOP_K
from lplb_triton.bench.measure.timer import WrongAnswerError
from lplb_triton.bench.types import Row

__all__ = ["make_placements", "time_pipeline"]

# Batches of the whole run, and how often a CUDA graph holds each: ranks start a replay at slightly
# different times, which matters less the more calls a replay has.
N_BATCHES, ROUNDS = 8, 5


def make_placements(ranks: int) -> dict[str, Placement]:
    """Make placements: a fixed topology for the ranks, and EPLB with one and two slots per rank."""
    load = torch.from_numpy(np.random.default_rng(0).lognormal(0, 1, N_COUNTS))
    fixed = {4: "torus:2x2", 8: "cube"}.get(ranks, f"ring:{ranks}")
    r2o = topologies.from_name(fixed)
    slots = N_COUNTS + r2o.shape[1] * ranks
    made = {fixed: Placement.from_topology(r2o, slots, N_COUNTS, ranks, workload=load)}
    for redundant in (1, 2):
        made[f"eplb:{ranks}:{redundant}"] = Placement.from_history(
            load, ranks, redundant_per_rank=redundant
        )
    return made


def _draw_batches(worker: Worker) -> list[torch.Tensor]:
    """Draw batches of this rank's logical ids, ``[tokens, 8]``, with loads near the history."""
    popularity = np.random.default_rng(0).lognormal(0, 1, N_COUNTS)
    popularity = popularity * np.random.default_rng(1).lognormal(0, 0.3, N_COUNTS)
    scores = np.log(popularity) + worker.rng.gumbel(
        size=(N_BATCHES, worker.job.sizes.tokens, N_COUNTS)
    )
    chosen = np.argpartition(-scores, TOP_K, axis=2)[:, :, :TOP_K]
    return list(torch.from_numpy(chosen.copy()).to(worker.device))


def time_pipeline(worker: Worker, kind: str) -> Row:
    """Time whole runs with sync, after checking the loads that result."""
    batches, rounds = _draw_batches(worker), ROUNDS if worker.on_gpu else 1
    communicator = worker.connect(kind)
    row: Row = {"sync": repr(communicator), "placements": {}}
    row["calls_per_replay"] = rounds * len(batches)
    for name, placement in make_placements(worker.ranks).items():
        found: Row = {}
        for quotas in ("local", "global"):
            balancer = Balancer(placement, device=worker.device, sync=communicator, quotas=quotas)
            calls = [partial(balancer.run, idx) for idx in batches]
            found[quotas] = {
                **check_loads(worker, balancer, batches),
                "same_again": _check_repeats(worker, balancer, batches),
                "run_us": worker.time_replays(calls * rounds),
                "host_us": worker.time_on_host(calls),
            }
            balancer.check()
        alone = Balancer(placement, device=worker.device, rank=worker.rank)
        alone.warmup()
        calls = [partial(alone.run, idx) for idx in batches]
        found["without_sync_us"] = worker.time_replays(calls * rounds)
        row["placements"][name] = found
    communicator.close()
    return row


def _check_repeats(worker: Worker, balancer: Balancer, batches: Sequence[torch.Tensor]) -> int:
    """Check that delays of ranks never change the ids; return how many runs were compared."""
    first = [balancer.run(idx) for idx in batches]
    wrong = torch.zeros((), dtype=torch.int64, device=worker.device)
    outs: list[torch.Tensor] = []

    def run_all() -> None:
        outs[:] = [balancer.run(idx) for idx in batches]

    replay = worker.make_repeatable([run_all])
    rounds = max(1, worker.job.sizes.epochs // 100)
    for _ in range(rounds):
        worker.delay()
        replay()
        for want, out, idx in zip(first, outs, batches, strict=True):
            wrong += (out != want).any()
            worker.delay()
            wrong += (balancer.run(idx) != want).any()
    changed = worker.sum_over_ranks(int(wrong))
    if changed:
        raise WrongAnswerError(f"ids of {changed} runs changed, on all ranks together")
    return 2 * rounds * len(batches)
