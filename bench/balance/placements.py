"""Placements by name, made from a history of loads."""

from __future__ import annotations

import numpy as np
import torch

from lplb_triton import Placement, chain, place
from lplb_triton.testing.instances import named_topology

__all__ = ["BY_HISTORY", "make_placement"]

# Placements that are made for a number of slots from any history.
BY_HISTORY = ("eplb", "chain", "place")


def make_placement(name: str, load: torch.Tensor, ep: int, slots: int) -> Placement:
    """Place experts by their load history.

    Parameters
    ----------
    name
        ``"none"`` (contiguous, no replicas), ``"eplb"``, ``"chain"``, ``"place"`` or a name that
        `lplb_triton.topologies.from_name` knows.
    load
        [n_logical] or [batches, n_logical], tokens of each logical expert. All but ``"place"``
        use the sum over the batches only.
    ep
        Number of ranks; must divide ``n_logical``.
    slots
        Redundant slots per rank (``"none"`` has none).

    Returns
    -------
    Placement

    Raises
    ------
    ValueError
        If the combination is impossible; the message says which sizes don't fit.
    """
    n_logical = load.shape[-1]
    total = load.reshape(-1, n_logical).sum(0)
    if ep < 1 or n_logical % ep:
        raise ValueError(f"EP size {ep} does not divide the {n_logical} experts")
    if name == "none":
        return Placement.from_phy2log(np.arange(n_logical), ep, n_logical=n_logical)
    if name in BY_HISTORY:
        if n_logical + ep * slots > n_logical * ep:
            raise ValueError(f"{slots} redundant slots on {ep} ranks are more than copies can fill")
        if name == "place":
            return place(load, ep, redundant_per_rank=slots)
        if name == "chain":
            return chain(total, ep, redundant_per_rank=slots)
        return Placement.from_history(total, ep, redundant_per_rank=slots)
    r2o = named_topology(name)
    if ep % len(r2o):
        raise ValueError(f"{name} has groups of {len(r2o)} ranks, which do not divide EP size {ep}")
    columns = r2o.shape[1]
    if slots < columns or slots % columns:
        raise ValueError(
            f"{name} needs a positive multiple of {columns} redundant slots per rank, got {slots}"
        )
    if slots > n_logical // ep:
        raise ValueError(
            f"{name} copies at most the {n_logical // ep} experts that a rank has, "
            f"got {slots} slots"
        )
    return Placement.from_topology(r2o, n_logical + ep * slots, n_logical, ep, workload=total)
