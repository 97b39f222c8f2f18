"""Section ``time``: time an exchange of 256 counts and a plain all-reduce."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

from lplb_triton.bench.ep.sizes import N_COUNTS, PER_GRAPH
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure.timer import WrongAnswerError
from lplb_triton.bench.types import Row

__all__ = ["time_exchange"]


def time_exchange(worker: Worker, kind: str) -> Row:
    """Time an exchange of 256 counts, with and without a gather, and a plain all-reduce."""
    counts = torch.arange(N_COUNTS, dtype=torch.int32, device=worker.device)
    version = torch.zeros(1, dtype=torch.int32, device=worker.device)
    total = torch.empty_like(counts)
    gathered = torch.empty(worker.ranks, N_COUNTS, dtype=torch.int32, device=worker.device)
    row: Row = {}
    with worker.connect(kind) as communicator:
        for name, rows in (("sum", None), ("sum and gather", gathered)):
            calls = [partial(communicator.exchange, counts, version, total, rows)] * PER_GRAPH
            row[name] = worker.time_replays(calls)
            if not torch.equal(total, counts * worker.ranks):
                raise WrongAnswerError(f"{name} is wrong")
        communicator.check()
    plain = torch.zeros_like(counts)
    row["calls_per_replay"] = PER_GRAPH
    row["all-reduce"] = worker.time_replays([partial(dist.all_reduce, plain)] * PER_GRAPH)
    return row
