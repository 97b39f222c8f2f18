"""Traces drawn at random for tests of the benchmark."""

import numpy as np

from lplb_triton.traces import trace as traces


def make_trace(batches=12, layers=2, sources=4, experts=32, steps=None, seed=0):
    """Draw a trace whose loads keep a long-term skew and jitter from batch to batch."""
    rng = np.random.default_rng(seed)
    long_term = rng.normal(size=(1, layers, 1, experts))
    jitter = 0.3 * rng.normal(size=(batches, layers, 1, experts))
    rate = 20 * np.exp(long_term + jitter)
    counts = rng.poisson(np.broadcast_to(rate, (batches, layers, sources, experts)))
    if steps is None:
        steps = np.arange(batches)
    return traces.Trace(counts.astype(np.int64), np.asarray(steps, dtype=np.int64), {"made": "up"})
