"""Sizes at scale: the solver's tables, and what ranks send each other to add up their counts."""

from __future__ import annotations

from typing import Any

import torch

from lplb_triton import Placement
from lplb_triton._backends.tables import DeviceTables
from lplb_triton._checks import check_placement_size
from lplb_triton._layout import GATHERED_HEADER_WORDS, HEADER_WORDS, MAX_RANKS
from lplb_triton.bench.types import Row

__all__ = ["count_wire_bytes", "explain_refusal", "measure_sizes"]

# Bytes of a word in memory that a kernel writes to, and of one in a message of torch.distributed.
PEER_WORD, MESSAGE_WORD = 8, 4


def explain_refusal(placement: Placement) -> str | None:
    """Say why the Triton back end refuses a placement; None if it takes it."""
    try:
        check_placement_size(placement)
    except ValueError as error:
        return str(error)
    return None


def measure_sizes(placement: Placement) -> dict[str, int]:
    """Measure the tables of a placement.

    Parameters
    ----------
    placement
        Of any size.

    Returns
    -------
    dict
        Numbers of ``columns`` (of the group with the most), ``copies`` (of the expert with the
        most), and ``table_bytes`` of the kernels' tables of one layer.

    Raises
    ------
    ValueError
        If a group has more pairs of a column and a rank than tables can number.
    """
    used = placement.structure.mask.any(1).sum(1)
    return {
        "columns": int(used.max()),
        "copies": int(placement.logcnt.max()),
        "table_bytes": DeviceTables(placement, torch.device("cpu")).n_bytes,
    }


def count_wire_bytes(ep: int, experts: int, ranks_per_node: int) -> list[Row]:
    """Count the bytes of counts that are sent for one layer and batch.

    An all-gather is counted as a ring in the order of the ranks: a rank sends on every row but the
    next rank's, and one rank of a node sends to the next node.

    Parameters
    ----------
    ep, experts
        Ranks and logical experts.
    ranks_per_node
        Consecutive ranks of a node; divides ``ep``.

    Returns
    -------
    list of dict
        ``sync`` and ``quotas``; bytes that a rank has ``sent`` in all, that the busiest rank has
        sent ``across`` nodes, and that a whole ``node`` has; or ``reason``, why the sync method
        refuses so many ranks.
    """
    nodes = ep // ranks_per_node
    message = (GATHERED_HEADER_WORDS + experts) * MESSAGE_WORD
    row = (HEADER_WORDS + experts) * PEER_WORD
    rows: list[Row] = []

    def add(sync: str, quotas: str, **found: Any) -> None:
        rows.append({"ep": ep, "experts": experts, "sync": sync, "quotas": quotas, **found})

    ring = (ep - 1) * message
    add("distributed", "any", sent=ring, across=ring, node=ring)
    if ep > MAX_RANKS:
        add("symmetric", "any", reason=f"sync='symmetric' takes at most {MAX_RANKS} ranks")
    else:
        across = (ep - ranks_per_node) * row
        add("symmetric", "any", sent=(ep - 1) * row, across=across, node=ranks_per_node * across)
    if not 1 < ranks_per_node < ep:
        add("hierarchical", "any", reason="it takes several nodes of several ranks")
        return rows
    wide = (GATHERED_HEADER_WORDS + ranks_per_node * experts) * MESSAGE_WORD
    for quotas, outer in (("local", message), ("global", wide)):
        across, within = (nodes - 1) * outer, (ranks_per_node - 1) * row
        node = ranks_per_node * across
        add("hierarchical", quotas, sent=within + across, across=across, node=node)
    return rows
