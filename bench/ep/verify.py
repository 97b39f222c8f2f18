"""Section ``verify``: check the sums of many epochs while ranks are delayed at random."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from lplb_triton.bench.ep.sizes import N_COUNTS, PER_GRAPH
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure.timer import WrongAnswerError
from lplb_triton.bench.types import Row

__all__ = ["verify_sync"]


def verify_sync(worker: Worker, kind: str) -> Row:
    """Compare every sum of many epochs with the expected one, eagerly and under graph replay."""
    batches = 500
    draw = torch.Generator("cpu").manual_seed(0)
    counts = torch.randint(
        0, 4096, (batches, worker.ranks, N_COUNTS), generator=draw, dtype=torch.int32, device="cpu"
    ).to(worker.device)
    expected = counts.sum(1, dtype=torch.int32)
    totals = torch.empty_like(expected)
    version = torch.zeros(1, dtype=torch.int32, device=worker.device)
    wrong = torch.zeros((), dtype=torch.int64, device=worker.device)
    row: Row = {}
    with worker.connect(kind) as communicator:
        row["sync"] = repr(communicator)

        def exchange(i: int) -> None:
            communicator.exchange(counts[i, worker.rank], version, totals[i])

        for mode in ("eager", "graph"):
            done = 0
            begun = time.monotonic()
            per_round = batches if mode == "eager" else min(PER_GRAPH, batches)
            replay: Callable[[], object] | None = None
            if mode == "graph":

                def exchange_late(i: int) -> None:
                    worker.delay()
                    exchange(i)

                replay = worker.make_repeatable(
                    [partial(exchange_late, i) for i in range(per_round)]
                )
            while done < worker.job.sizes.epochs:
                totals.fill_(-9)
                if replay is None:
                    for i in range(per_round):
                        worker.delay()
                        exchange(i)
                else:
                    worker.delay()
                    replay()
                wrong += (totals[:per_round] != expected[:per_round]).any(1).sum()
                done += per_round
            communicator.check()
            row[f"{mode}_epochs"] = done
            row[f"{mode}_seconds"] = round(time.monotonic() - begun, 1)
            row[f"{mode}_wrong"] = worker.sum_over_ranks(int(wrong))
            wrong.zero_()
    if row["eager_wrong"] or row["graph_wrong"]:
        raise WrongAnswerError(f"sums were wrong: {row}")
    return row
