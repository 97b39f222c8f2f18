"""The former name of `lplb_triton.traces.record`."""

from lplb_triton.traces.record import (
    Recorder,
    merge,
    rank_path,
)

__all__ = [
    "Recorder",
    "merge",
    "rank_path",
]
