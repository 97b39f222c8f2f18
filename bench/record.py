"""Record the expert loads of a training or serving script, for `lplb_triton.bench.trace`.

A `Recorder` takes the top-k ids of every MoE layer. Counts add up in a buffer on the ids' device
and come to the host once in `flush_every` kept batches, so a call never waits for the device. The
number of batches is bounded: when it is full, every second one is dropped and half as many are
kept from then on. With several processes each writes a file of its own; `merge` puts them together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton.bench.trace import Trace, load, save
from lplb_triton.placement import check_integer

__all__ = ["Recorder", "merge", "rank_path"]

# Of a row of bins the first counts ids below -1, the second ids of -1, the last ids too large.
_MORE_BINS = 3


def rank_path(path: str | os.PathLike[str], rank: int) -> Path:
    """Where one of several processes writes: ``trace.npz`` becomes ``trace.rank00003.npz``."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}.rank{rank:05d}{whole.suffix}")


class Recorder:
    """Record token counts by batch, layer and expert.

    Parameters
    ----------
    path
        File to write, ending in ``.npz``; with several processes `rank_path` of it.
    n_experts
        Logical experts of a layer.
    layers
        MoE layers.
    every
        Keep one batch in so many.
    max_batches
        Batches kept at most, 2 or more. When they are reached, every second one is dropped and
        ``every`` doubles. Host memory: ``max_batches * layers * n_experts`` times 4 bytes.
    flush_every
        Kept batches between two copies from the device.
    rank, world_size
        By default those of ``torch.distributed``, or 0 of 1 where it isn't initialised.
    meta
        Stored with the trace; strings as keys, JSON-able.

    Raises
    ------
    TypeError, ValueError
        For a bad argument, by its name.

    Examples
    --------
    >>> import tempfile
    >>> from lplb_triton.bench.trace import load
    >>> path = tempfile.mkdtemp() + "/trace.npz"
    >>> with Recorder(path, n_experts=4, layers=1) as recorder:
    ...     for batch in range(3):
    ...         recorder.add(0, torch.tensor([[0, 1], [0, 2]]))
    ...         recorder.step()
    >>> load(path).counts[:, 0, 0].tolist()
    [[2, 1, 1, 0], [2, 1, 1, 0], [2, 1, 1, 0]]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_experts: int,
        layers: int,
        *,
        every: int = 1,
        max_batches: int = 1024,
        flush_every: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.n_experts = check_integer("n_experts", n_experts)
        self.layers = check_integer("layers", layers)
        self.every = check_integer("every", every)
        self.max_batches = check_integer("max_batches", max_batches, 2)
        self._flush_every = check_integer("flush_every", flush_every)
        if (rank is None) != (world_size is None):
            raise ValueError("rank and world_size must be given together")
        ready = dist.is_available() and dist.is_initialized()
        if rank is None or world_size is None:
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)
        self._world_size = check_integer("world_size", world_size)
        self._rank = check_integer("rank", rank, 0)
        if self._rank >= self._world_size:
            raise ValueError(f"rank must be below world_size {world_size}, got {rank}")
        if Path(path).suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {str(path)!r}")
        self.path = Path(path) if self._world_size == 1 else rank_path(path, self._rank)
        self._meta = dict(meta or {})
        self._kept: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        self._steps: list[int] = []
        self._buffer: torch.Tensor | None = None
        self._pending: list[int] = []
        self._batch = 0
        self._touched = False
        self._closed = False

    def __enter__(self) -> Recorder:
        """Return the recorder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the file, also after an error in the body, whose cause it may help to find."""
        if kind is None or self._kept or self._pending:
            self.close()

    def add(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Count the logical ids of one layer; several calls of a batch add up.

        Parameters
        ----------
        layer
            In [0, layers).
        topk_ids
            Integer tensor of any shape; -1 counts nowhere. All calls on one device. Ids out of
            range raise when the counts come to the host (`step`, `save`, `close`).

        Raises
        ------
        TypeError, ValueError
            For a bad argument.
        RuntimeError
            If the recorder is closed, or the stream is being captured into a CUDA graph, whose
            replays would count into the wrong batch.
        """
        if self._closed:
            raise RuntimeError("the recorder is closed")
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer must be in [0, {self.layers}), got {layer}")
        if not isinstance(topk_ids, torch.Tensor):
            raise TypeError(f"topk_ids must be a torch.Tensor, got {type(topk_ids).__name__}")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
        self._touched = True
        if self._batch % self.every:
            return
        if topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("add can't be captured into a CUDA graph; call it outside")
        if self._buffer is None:
            shape = (self._flush_every, self.layers, self.n_experts + _MORE_BINS)
            self._buffer = torch.zeros(shape, dtype=torch.int32, device=topk_ids.device)
            self._one = torch.ones(1, dtype=torch.int32, device=topk_ids.device)
        elif self._buffer.device != topk_ids.device:
            raise ValueError(
                f"topk_ids is on {topk_ids.device}, earlier ones were on {self._buffer.device}"
            )
        bins = (topk_ids.detach().reshape(-1).long() + 2).clamp_(0, self.n_experts + 2)
        row = self._buffer[len(self._pending), layer]
        row.scatter_add_(0, bins, self._one.expand_as(bins))

    def step(self) -> None:
        """End a batch. Every rank must call it once a batch, with or without tokens.

        Raises
        ------
        ValueError
            If an id of the batches since the last copy was out of range.
        RuntimeError
            If the recorder is closed.
        """
        if self._closed:
            raise RuntimeError("the recorder is closed")
        if self._batch % self.every == 0:
            self._pending.append(self._batch)
            if len(self._pending) == self._flush_every or (
                len(self._steps) + len(self._pending) == self.max_batches
            ):
                self._flush()
        self._batch += 1
        self._touched = False

    def _flush(self) -> None:
        """Bring the counts of ended batches to the host; halve what is kept if that is full."""
        ended, steps, self._pending = len(self._pending), self._pending, []
        if self._buffer is None:
            counts = np.zeros((ended, self.layers, self.n_experts + _MORE_BINS), dtype=np.int32)
        else:
            counts = self._buffer[:ended].to("cpu", copy=True).numpy()
            # A batch that goes on lies behind the ended ones; it becomes the first.
            rest = self._buffer[ended:].clone()
            self._buffer.zero_()
            self._buffer[: len(rest)] = rest
        bad = counts[..., 0] + counts[..., -1]
        if bad.any():
            batch, layer = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"topk_ids must be in [-1, {self.n_experts}); {int(bad[batch, layer])} of layer "
                f"{layer} in batch {steps[batch]} were not"
            )
        self._kept.extend(counts[..., 2:-1])
        self._steps.extend(steps)
        while len(self._steps) >= self.max_batches:
            self.every *= 2
            kept = [i for i, step in enumerate(self._steps) if step % self.every == 0]
            self._kept = [self._kept[i] for i in kept]
            self._steps = [self._steps[i] for i in kept]

    def save(self) -> None:
        """Write the batches that have ended; recording goes on.

        Raises
        ------
        ValueError
            If there are none, or an id was out of range.
        OSError
            If the file can't be written.
        """
        self._flush()
        if not self._steps:
            raise ValueError("no batch was recorded: call add for every layer, then step")
        meta = {
            **self._meta,
            "recorder": {
                "rank": self._rank,
                "world_size": self._world_size,
                "every": self.every,
                "seen": self._batch,
            },
        }
        counts = np.stack(self._kept)[:, :, None]
        save(self.path, Trace(counts, np.array(self._steps, dtype=np.int64), meta))

    def close(self) -> None:
        """Write the file; a batch that was begun counts as ended. A second call does nothing."""
        if self._closed:
            return
        if self._touched:
            self.step()
        self.save()
        self._closed = True
        self._buffer = None


def merge(paths: Sequence[str | os.PathLike[str]]) -> Trace:
    """Put the files of all ranks together, one source each.

    Parameters
    ----------
    paths
        As `Recorder` wrote them, in any order: all ranks of one run. A batch that some ranks
        lack, such as the last one of a run that was stopped, is left out.

    Returns
    -------
    Trace
        ``counts`` ``[batches, layers, world_size, experts]``.

    Raises
    ------
    ValueError
        If a file isn't a recorder's, ranks are missing or there twice, sizes differ, or no batch is
        in all files.
    """
    traces: dict[int, Trace] = {}
    world = layers = experts = 0
    for path in paths:
        trace = load(path)
        own = trace.meta.get("recorder")
        if not isinstance(own, dict) or not {"rank", "world_size"} <= set(own):
            raise ValueError(f"{path}: not written by a Recorder")
        if own["rank"] in traces:
            raise ValueError(f"{path}: rank {own['rank']} is there twice")
        if traces and (own["world_size"], trace.layers, trace.experts) != (world, layers, experts):
            raise ValueError(f"{path}: other ranks, layers or experts than in {paths[0]}")
        world, layers, experts = own["world_size"], trace.layers, trace.experts
        traces[own["rank"]] = trace
    missing = sorted(set(range(world)) - set(traces))
    if missing or not traces:
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise ValueError(f"paths must hold every rank's file; missing: {shown or 'all'}")
    common = set.intersection(*(set(trace.steps.tolist()) for trace in traces.values()))
    if not common:
        raise ValueError("paths must share batches; no step is in all of them")
    steps = np.array(sorted(common), dtype=np.int64)
    parts = [trace.counts[np.isin(trace.steps, steps)] for _, trace in sorted(traces.items())]
    counts = np.concatenate(parts, axis=2)
    meta = {key: value for key, value in traces[0].meta.items() if key != "recorder"}
    meta["recorder"] = {**traces[0].meta["recorder"], "merged": world}
    return Trace(counts, steps, meta)
