"""Sums of token counts over the expert-parallel group.

`connect` makes a communicator; `Balancer` and `Planner` make and share one by themselves when they
are given a group. docs/sync.md says which back end is for what.
"""

from lplb_triton.sync._base import Communicator, SyncError
from lplb_triton.sync._connect import connect

__all__ = ["Communicator", "SyncError", "connect"]
