"""Which channel of an exchange a stream's calls go through, and how ranks find disorder.

Calls of one stream come one after the other, so a stream has a channel of its own. Ranks can't
compare their streams. What they can compare is how each came to its channel: with which call of the
communicator, and on what kind of stream. That goes with every call's counts (docs/sync.md).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lplb_triton import kernels

__all__ = ["CHANNELS", "Channels", "Stream", "disorder"]

CHANNELS = 64
# An opening in 15 bits: number of the call, kind of the stream, place among its kind.
NUMBER_BITS, KIND_BITS, PLACE_BITS = 9, 2, 4
BY_HAND, DEFAULT, POOL, EXTERNAL = range(4)
KINDS = (
    "bind", "the default stream", "a stream of torch's pool", "a stream from outside torch",
)  # fmt: skip


class Stream(NamedTuple):
    """A CUDA stream: what the driver calls it, and torch's number for it."""

    handle: int
    number: int

    @property
    def kind(self) -> int:
        """One of DEFAULT, POOL and EXTERNAL."""
        # torch numbers its own streams, all of them odd; others have their address there.
        if self.number == 0:
            return DEFAULT
        return POOL if self.number & 1 else EXTERNAL

    @property
    def series(self) -> int | None:
        """Streams of one series have numbers in the order in which they were made."""
        return self.number & 0x1F if self.kind == POOL else None


class Channels:
    """Channels of a communicator's streams, on this rank.

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
        """Channel of this call, which comes from a stream; its first call opens one."""
        call = next(self._calls)
        channel = self._by_stream.get(handle)
        if channel is None:
            with self._lock:
                channel = self._by_stream.get(handle) or self._open(handle, call)
        return channel

    def bind(self, handle: int, number: int) -> None:
        """Give a stream a channel by number; the caller answers for the order."""
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"channel must be an int, got {type(number).__name__}")
        if not 0 <= number < CHANNELS:
            raise ValueError(f"channel must be in [0, {CHANNELS}), got {number}")
        with self._lock:
            opening = self.openings.setdefault(number, BY_HAND)
            self._by_stream[handle] = self._make(number, opening)

    def _open(self, handle: int, call: int) -> kernels.Channel:
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
        opening = self.openings[number] = _pack(call, stream.kind, place)
        channel = self._by_stream[handle] = self._make(number, opening)
        return channel


def _pack(call: int, kind: int, place: int) -> int:
    call %= 1 << NUMBER_BITS
    place = min(place, (1 << PLACE_BITS) - 1)
    return (place << KIND_BITS | kind) << NUMBER_BITS | call


def disorder(mine: int, theirs: Mapping[int, int]) -> str:
    """Say how this rank and others opened one channel."""
    others = ", ".join(f"rank {rank} {_describe(opening)}" for rank, opening in theirs.items())
    return (
        f"{others}, and this rank {_describe(mine)}. The first call of a stream must be the same "
        "call, by number, on every rank; or bind(channel) every stream before its first call"
    )


def _describe(opening: int) -> str:
    call = opening & ((1 << NUMBER_BITS) - 1)
    kind = opening >> NUMBER_BITS & ((1 << KIND_BITS) - 1)
    place = opening >> (NUMBER_BITS + KIND_BITS)
    if kind == BY_HAND:
        return "opened the channel by bind"
    which = f", behind {place} older ones" if kind == POOL else ""
    return f"opened the channel with call {call} on {KINDS[kind]}{which}"
