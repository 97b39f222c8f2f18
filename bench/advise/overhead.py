"""Predict the cost of balancing a batch from measured times."""

from __future__ import annotations

import numpy as np

__all__ = ["predict_overhead_us"]

# Measured on one H100 (docs/benchmarks.md): median run without sync by ranks, for TOKENS tokens of
# 256 experts, top-8, microseconds. Sync: what it adds to a run of two H100s over NVLink.
TOKENS = (128, 4096, 16384)
RUN_US = {8: (6.9, 8.0, 14.0), 32: (8.9, 10.3, 18.5), 64: (12.6, 13.5, 22.2)}
SYNC_US = 4.6


def predict_overhead_us(ep: int, tokens: int) -> dict[str, float]:
    """Predict the time of ``run`` from figures measured on H100s; see the head of this file.

    Parameters
    ----------
    ep
        Ranks; between the measured sizes interpolated, beyond 64 in proportion to ``ep``.
    tokens
        Of a rank; beyond 16,384 in proportion.

    Returns
    -------
    dict
        ``sync``, and ``run`` for the rest, in microseconds.
    """
    by_ranks = [float(np.interp(tokens, TOKENS, times)) for times in RUN_US.values()]
    run = float(np.interp(ep, list(RUN_US), by_ranks))
    return {
        "sync": SYNC_US,
        "run": run * max(1.0, ep / max(RUN_US)) * max(1.0, tokens / TOKENS[-1]),
    }
