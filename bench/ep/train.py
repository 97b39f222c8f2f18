"""Section ``train``: train with and without balancing, by ``examples/train_moe_ep.py``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.types import Row

__all__ = ["EXAMPLES", "SKEWED", "train"]

# Limit, in nats, on the difference of losses that the order of sums may explain.
MOST_NOISE = 0.1
# Least imbalance of skewed routing with experts in order.
SKEWED = 1.4
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def train(worker: Worker, routing: str) -> Row:
    """Train with every balance and compare; ``routing`` is skewed, learned or even.

    Even routing gives every expert the same number of tokens, which shows the time with a perfect
    balance.
    """
    sys.path.append(str(EXAMPLES))
    script = importlib.import_module("train_moe_ep")
    sizes = worker.job.sizes
    settings = script.Settings(
        **sizes.training,
        balance="none,lplb" if routing == "even" else "none,eplb,lplb",
        router_bias=sizes.router_bias if routing == "skewed" else 0.0,
        even_routing=routing == "even",
    )

    def train_runs(settings: Any) -> Any:
        return script.train(settings, worker.device, worker.group, lambda line: None)

    runs = train_runs(settings)
    (backwards,) = train_runs(replace(settings, balance="none", reverse_sums=True))
    for made in runs:
        made.step_ms, made.moe_ms = worker.slowest(made.step_ms), worker.slowest(made.moe_ms)
    rows = script.make_report(settings, runs, worker.ranks, worker.device)["medians"]
    noise = _distance(backwards.losses, runs[0].losses)
    for summary, made in zip(rows, runs, strict=True):
        difference = _distance(made.losses, runs[0].losses)
        summary.update(certified=made.certified, loss_difference=difference)
    row = {
        "settings": sizes.training,
        "router_bias": settings.router_bias,
        "runs": rows,
        "reversed_difference": noise,
    }
    allowed = sizes.parity + min(sizes.noise * noise, MOST_NOISE)
    faults = [
        f"losses of {summary['balance']} and none differ by {summary['loss_difference']:.1e}, "
        f"more than {allowed:.1e}"
        for summary in rows
        if not summary["loss_difference"] <= allowed
    ]
    if rows[-1]["certified"] != 1.0:
        faults.append(f"the part of LPs that were certified is {rows[-1]['certified']}")
    if routing == "skewed" and rows[0]["unbalanced"] < SKEWED:
        faults.append(f"routing is not skewed: imbalance {rows[0]['unbalanced']:.3f} in order")
    if faults:
        row["failed"] = "; ".join(faults)
    return row


def _distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """Return the root mean square of the difference of two curves."""
    return float(np.sqrt(np.mean(np.square(np.subtract(losses, others)))))
