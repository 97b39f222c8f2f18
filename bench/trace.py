"""The former name of `lplb_triton.traces.trace`."""

from lplb_triton.traces.trace import (
    FORMAT_VERSION,
    MOST_TOKENS,
    Trace,
    check_writable,
    load,
    packaged,
    parse_json,
    save,
)

__all__ = [
    "FORMAT_VERSION",
    "MOST_TOKENS",
    "Trace",
    "check_writable",
    "load",
    "packaged",
    "parse_json",
    "save",
]
