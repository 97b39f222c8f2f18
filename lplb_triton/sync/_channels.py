"""Assignment of channels to streams, and detection of ranks whose calls are in different orders.

Calls on one stream run one after the other, so every stream has a channel of its own. Ranks can't
compare their streams, but they can compare how each opened its channel: with which call of the
communicator, and on what kind of stream. This *opening* is sent with every call's counts (see
docs/sync.md).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from lplb_triton._checks import require_int
from lplb_triton._layout import CHANNELS

if TYPE_CHECKING:
    from lplb_triton import kernels

__all__ = ["CHANNELS", "Channels", "Stream", "describe_mismatch"]

# Bits of the fields of an opening: the number of the call, the kind of the stream, and the stream's
# place among those of its kind.
NUMBER_BITS, KIND_BITS, PLACE_BITS = 9, 2, 4
BY_HAND, DEFAULT, POOL, EXTERNAL = range(4)
KINDS = (
    "bind", "the default stream", "a stream of torch's pool", "a stream from outside torch",
)  # fmt: skip


class Stream(NamedTuple):
    """A CUDA stream: the driver's handle, and torch's number for it."""

    handle: int
    number: int

    @property
    def kind(self) -> int:
        """One of DEFAULT, POOL and EXTERNAL."""
        # Streams of torch's pool have odd numbers; the number of other streams is their address.
        if self.number == 0:
            return DEFAULT
        return POOL if self.number & 1 else EXTERNAL

    @property
    def series(self) -> int | None:
        """Part of the pool's numbers within which they rise in the order of creation."""
        return self.number & 0x1F if self.kind == POOL else None


class Channels:
    """The channels that a communicator has given to this rank's streams.

    Parameters
    ----------
    name : str
        Of the communicator, for messages.
    current : callable
        Returns the current `Stream`; called when a stream is new.

    Attributes
    ----------
    openings : dict of int to int
        By number of a channel, how it was opened.
    """

    def __init__(self, name: str, current: Callable[[], Stream]) -> None:
        from lplb_triton import kernels

        self._make: type[kernels.Channel] = kernels.Channel
        self._name, self._current = name, current
        self._by_stream: dict[int, kernels.Channel] = {}
        self._streams: list[Stream] = []
        self._calls = itertools.count(1)
        self._lock = threading.Lock()
        self.openings: dict[int, int] = {}

    def of(self, handle: int) -> kernels.Channel:
        """Return the channel of a call on a stream; the stream's first call opens one."""
        call = next(self._calls)
        channel = self._by_stream.get(handle)
        if channel is None:
            with self._lock:
                channel = self._by_stream.get(handle) or self._open(handle, call)
        return channel

    def bind(self, handle: int, number: int) -> None:
        """Assign a channel to a stream by number; the caller is responsible for the order."""
        number = require_int("channel", number)
        if not 0 <= number < CHANNELS:
            raise ValueError(f"channel must be in [0, {CHANNELS}), got {number}")
        with self._lock:
            opening = self.openings.setdefault(number, BY_HAND)
            self._by_stream[handle] = self._make(number, opening)

    def _open(self, handle: int, call: int) -> kernels.Channel:
        """Open the first free channel for a stream, by its call of number ``call``."""
        number = next((n for n in range(CHANNELS) if n not in self.openings), None)
        if number is None:
            raise RuntimeError(
                f"all {CHANNELS} channels of {self._name} are taken, one by each stream that has "
                "called: call from fewer streams, or bind(channel) those whose calls never overlap "
                "to one channel, in the same way on every rank"
            )
        stream = self._current()
        place = sum(
            stream.series is not None
            and other.series == stream.series
            and other.number < stream.number
            for other in self._streams
        )
        self._streams.append(stream)
        opening = self.openings[number] = _pack_opening(call, stream.kind, place)
        channel = self._by_stream[handle] = self._make(number, opening)
        return channel


def _pack_opening(call: int, kind: int, place: int) -> int:
    """Return an opening as one number."""
    call %= 1 << NUMBER_BITS
    place = min(place, (1 << PLACE_BITS) - 1)
    return (place << KIND_BITS | kind) << NUMBER_BITS | call


def describe_mismatch(mine: int, theirs: Mapping[int, int]) -> str:
    """Return the message on a channel that this rank and others opened differently."""
    others = ", ".join(f"rank {rank} {_describe(opening)}" for rank, opening in theirs.items())
    return (
        f"{others}, and this rank {_describe(mine)}. The first call of a stream must be the same "
        "call, by number, on every rank; or bind(channel) every stream before its first call"
    )


def _describe(opening: int) -> str:
    """Return an opening in words."""
    call = opening & ((1 << NUMBER_BITS) - 1)
    kind = opening >> NUMBER_BITS & ((1 << KIND_BITS) - 1)
    place = opening >> (NUMBER_BITS + KIND_BITS)
    if kind == BY_HAND:
        return "opened the channel by bind"
    which = f", behind {place} older ones" if kind == POOL else ""
    return f"opened the channel with call {call} on {KINDS[kind]}{which}"
