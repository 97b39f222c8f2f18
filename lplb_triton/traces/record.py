"""Record the expert loads of a training or serving script, for `lplb_triton.traces.trace`.

A `Recorder` takes the top-k ids of every MoE layer. Counts add up in a buffer on the ids' device
and come to the host once in `flush_every` kept batches, so a call never waits for the device. The
number of batches is bounded: when it is full, every second one is dropped and half as many are
kept from then on. With several processes each writes a file of its own; `merge` puts them together.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton._checks import check_integer
from lplb_triton.traces.ranks import group_is_up, list_some, merge, own_rank, rank_path, run_id
from lplb_triton.traces.trace import Trace, check_writable, save

__all__ = ["Recorder", "merge", "rank_path"]

# Of a row of bins the first counts ids below -1, the second ids of -1, the last ids too large.
_MORE_BINS = 3
_MOST_IDS = torch.iinfo(torch.int32).max
_KEEP_CALLING = "add must be called for every layer, with an empty tensor where there are no tokens"
_log = logging.getLogger(__name__)


class Recorder:
    """Record token counts by batch, layer and expert.

    Parameters
    ----------
    path
        File to write, ending in ``.npz``; with several processes `rank_path` of it. Its folder must
        exist. An existing file is replaced.
    n_experts
        Logical experts of a layer.
    layers
        MoE layers.
    adds_per_step
        Calls of `add` for each layer between two of `step`: 1, or the number of micro-batches (or
        chunks) that are to be counted as one batch. None allows any number, none at all included,
        and so can't notice a `step` or an `add` that was forgotten.
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
        Stored with the trace; strings as keys, JSON-able, without the key ``recorder``.

    Raises
    ------
    TypeError, ValueError
        For a bad argument, by its name; a ``ValueError`` also in a process of several (by the
        environment variable ``WORLD_SIZE``) if neither ``torch.distributed`` nor ``rank`` says
        which it is.
    OSError
        If the file can't be written where ``path`` says.

    Examples
    --------
    >>> import tempfile
    >>> from lplb_triton.traces.trace import load
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
        adds_per_step: int | None = 1,
        every: int = 1,
        max_batches: int = 1024,
        flush_every: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.n_experts = check_integer("n_experts", n_experts)
        self.layers = check_integer("layers", layers)
        self._adds_per_step = None
        if adds_per_step is not None:
            self._adds_per_step = check_integer("adds_per_step", adds_per_step)
        self.every = check_integer("every", every)
        self.max_batches = check_integer("max_batches", max_batches, 2)
        self._flush_every = check_integer("flush_every", flush_every)
        # Only a later call can tell whether the process group was initialised after this was made.
        self._made_before_group = rank is None and not group_is_up()
        self._rank, self._world_size = own_rank(rank, world_size)
        if Path(path).suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {str(path)!r}")
        own = path if self._world_size == 1 else rank_path(path, self._rank)
        # Absolute, as the script may change its folder while it runs.
        self.path = Path(own).absolute()
        check_writable(self.path)
        self._meta = copy.deepcopy(meta or {})
        # This raises at once if a trace can't hold such a meta.
        Trace(np.zeros((1, 1, 1, 1), np.int32), np.zeros(1, np.int64), self._meta)
        if "recorder" in self._meta:
            raise ValueError("meta must not have the key 'recorder', which is the recorder's own")
        self._run = run_id()
        self._kept: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        self._steps: list[int] = []
        self._buffer: torch.Tensor | None = None
        self._pending: list[int] = []
        self._batch = 0
        # Calls of add by layer, in this batch and in all, and ids of this batch.
        self._adds, self._all_adds, self._ids = ([0] * self.layers for _ in range(3))
        self._closed = False
        # Batches that no file has; shared with the finalizer, which warns that they are lost.
        self._unwritten = [0]
        weakref.finalize(self, _warn_of_loss, self.path, self._unwritten)

    def __enter__(self) -> Recorder:
        """Return the recorder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the file, also after an error in the body, which then goes on.

        After an error this logs a warning (to the logger named as this module) that says what was
        written, or why nothing could be. A batch whose last `add` was still to come is left out.
        """
        if kind is None:
            self.close()
            return
        if self._closed or not (self._steps or self._pending):
            self._closed = True
            return
        try:
            notes, bad = self._finish(keep_begun=self._adds_per_step is not None)
        except Exception as failure:
            _log.warning("recording ended by %s: %s", kind.__name__, failure)
            return
        kept = f"{self.path} has {len(self._steps)} batches"
        for note in (kept, *notes, *([bad] if bad is not None else [])):
            _log.warning("recording ended by %s: %s", kind.__name__, note)

    def add(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Count the logical ids of one layer.

        Parameters
        ----------
        layer
            In [0, layers).
        topk_ids
            Integer tensor of any shape, empty where there are no tokens; -1 counts nowhere. All
            calls on one device, and on one stream or on streams that wait for each other. Ids out
            of range raise when the counts come to the host (`step`, `save`, `close`).

        Raises
        ------
        TypeError, ValueError
            For a bad argument.
        RuntimeError
            If the recorder is closed; if the layer had ``adds_per_step`` calls in this batch
            already; or if the stream is being captured into a CUDA graph, whose replays would
            count into the wrong batch. The call then counts nothing.
        """
        self._check_open()
        if check_integer("layer", layer, 0) >= self.layers:
            raise ValueError(f"layer must be in [0, {self.layers}), got {layer}")
        if not isinstance(topk_ids, torch.Tensor):
            raise TypeError(f"topk_ids must be a torch.Tensor, got {type(topk_ids).__name__}")
        if topk_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
        if self._buffer is not None and self._buffer.device != topk_ids.device:
            raise ValueError(
                f"topk_ids is on {topk_ids.device}, earlier ones were on {self._buffer.device}"
            )
        if topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("add can't be captured into a CUDA graph; call it outside")
        self._check_repeat(layer, topk_ids.numel())
        self._adds[layer] += 1
        self._all_adds[layer] += 1
        self._ids[layer] += topk_ids.numel()
        if self._batch % self.every == 0:
            self._count(layer, topk_ids)

    def _check_repeat(self, layer: int, n_ids: int) -> None:
        """Refuse a call that belongs to another batch, or that counters have no room for."""
        if self._adds[layer] == self._adds_per_step:
            often = "twice" if self._adds_per_step == 1 else f"{self._adds_per_step + 1} times"
            raise RuntimeError(
                f"add was called {often} for layer {layer} in batch {self._batch}: call step() "
                "after every batch. If several calls make up a batch (micro-batches, chunks), say "
                "how many by adds_per_step; call add outside of checkpointed functions, which run "
                "twice, and not in evaluation"
            )
        if self._ids[layer] + n_ids > _MOST_IDS:
            raise ValueError(
                f"topk_ids of layer {layer} in batch {self._batch} are more than {_MOST_IDS}; "
                "call step() after every batch"
            )

    def _count(self, layer: int, topk_ids: torch.Tensor) -> None:
        if self._buffer is None:
            shape = (self._flush_every, self.layers, self.n_experts + _MORE_BINS)
            # A tensor made in inference mode can't be changed outside of it.
            with torch.inference_mode(False):
                self._buffer = torch.zeros(shape, dtype=torch.int32, device=topk_ids.device)
                self._one = torch.ones(1, dtype=torch.int32, device=topk_ids.device)
        bins = (topk_ids.detach().reshape(-1).long() + 2).clamp_(0, self.n_experts + 2)
        row = self._buffer[len(self._pending), layer]
        row.scatter_add_(0, bins, self._one.expand_as(bins))

    def step(self) -> None:
        """End a batch. Every rank must call it once a batch, with or without tokens.

        Raises
        ------
        ValueError
            If an id of the batches since the last copy was out of range. Such a batch is left out;
            the others are kept.
        RuntimeError
            If the recorder is closed; if `add` was not called ``adds_per_step`` times for every
            layer (the batch then goes on); or if ``torch.distributed`` was initialised after the
            recorder was made, so that all ranks would write one file.
        """
        self._check_open()
        if self._made_before_group and group_is_up() and dist.get_world_size() > 1:
            raise RuntimeError(
                "torch.distributed was initialised after the recorder was made, so every rank "
                f"would write {self.path}: make the recorder later, or give rank and world_size"
            )
        missing = self._missing()
        if missing and not any(self._adds):
            raise RuntimeError(f"step() without add in batch {self._batch}: {_KEEP_CALLING}")
        if missing:
            raise RuntimeError(f"{self._shortfall(missing)}: {_KEEP_CALLING}")
        bad = self._end_batch()
        if bad is not None:
            raise bad

    def discard(self) -> None:
        """Drop what was counted of the batch that was begun, as after an error in its middle.

        Raises
        ------
        RuntimeError
            If the recorder is closed.
        """
        self._check_open()
        if self._buffer is not None:
            # Rows behind the ended batches hold the begun one only.
            self._buffer[len(self._pending) :].zero_()
        self._begin_batch()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the recorder is closed")

    def _missing(self) -> list[int]:
        """Layers whose calls of this batch are not all there."""
        needed = self._adds_per_step or 0
        return [layer for layer, adds in enumerate(self._adds) if adds < needed]

    def _shortfall(self, layers: list[int]) -> str:
        few = "no call" if self._adds_per_step == 1 else f"fewer than {self._adds_per_step} calls"
        return f"batch {self._batch} had {few} of add for layers {list_some(layers)}"

    def _begin_batch(self) -> None:
        self._adds, self._ids = [0] * self.layers, [0] * self.layers

    def _end_batch(self) -> Exception | None:
        """Take the batch in; what `_flush` returns if that was due."""
        self._begin_batch()
        if self._batch % self.every == 0:
            self._pending.append(self._batch)
            self._unwritten[0] += 1
        self._batch += 1
        full = len(self._steps) + len(self._pending) == self.max_batches
        due = full or len(self._pending) == self._flush_every
        return self._flush() if due else None

    def _flush(self) -> Exception | None:
        """Bring the counts of ended batches to the host; halve what is kept if that is full.

        Whatever is wrong with a batch is returned, so that the others can be kept first.
        """
        steps, self._pending = self._pending, []
        try:
            counts = self._fetch(len(steps))
        except RuntimeError as error:
            self._unwritten[0] -= len(steps)
            text = f"the counts of {len(steps)} batches could not be read from the device: {error}"
            return RuntimeError(text)
        bad = counts[..., 0] + counts[..., -1]
        good = [i for i in range(len(steps)) if not bad[i].any()]
        self._kept.extend(counts[i, :, 2:-1] for i in good)
        self._steps.extend(steps[i] for i in good)
        self._unwritten[0] -= len(steps) - len(good)
        while len(self._steps) >= self.max_batches:
            self.every *= 2
            kept = [i for i, step in enumerate(self._steps) if step % self.every == 0]
            self._kept = [self._kept[i] for i in kept]
            self._steps = [self._steps[i] for i in kept]
        if len(good) == len(steps):
            return None
        batch, layer = (int(i) for i in np.argwhere(bad)[0])
        return ValueError(
            f"topk_ids must be in [-1, {self.n_experts}); {int(bad[batch, layer])} of layer "
            f"{layer} in batch {steps[batch]} were not ({len(steps) - len(good)} of the last "
            f"{len(steps)} batches are left out for such ids)"
        )

    def _fetch(self, ended: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Return counts of the first batches, ``[ended, layers, bins]``, and clear the buffer."""
        if self._buffer is None:
            return np.zeros((ended, self.layers, self.n_experts + _MORE_BINS), dtype=np.int32)
        counts: np.ndarray[Any, np.dtype[np.int32]]
        counts = self._buffer[:ended].to("cpu", copy=True).numpy()
        # The counts of a batch that has not ended lie behind the others; they become the first.
        rest = self._buffer[ended : ended + any(self._adds)].clone()
        self._buffer.zero_()
        self._buffer[: len(rest)] = rest
        return counts

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write the batches that have ended; recording goes on.

        Parameters
        ----------
        path
            Another file than the recorder's own, ending in ``.npz``.

        Raises
        ------
        ValueError
            If there are none, or an id was out of range. Batches without such an id are written
            before that is raised.
        RuntimeError
            If counts could not be read from the device; those of before are written.
        OSError
            If the file can't be written. The batches stay in memory.

        Warns
        -----
        UserWarning
            If ``adds_per_step`` is None and a layer never had an `add`.
        """
        bad = self._flush()
        try:
            self._write(self.path if path is None else Path(path), bad)
        except OSError as error:
            advice = "the batches stay in memory: call save(path) for another file"
            raise _with_advice(error, f"{error}; {advice}") from error
        for note in self._never_added():
            warnings.warn(note, stacklevel=2)
        if bad is not None:
            raise bad

    def close(self) -> None:
        """Write the file. A second call does nothing.

        A batch without its `step` counts as ended if every layer had its calls of `add`.

        Raises
        ------
        ValueError, RuntimeError
            As `save`; the file is then written and the recorder closed, unless no batch was good.
        OSError
            If the file can't be written. The batches are then written to a new folder for
            temporary files, which the error names, and stay in memory: `save` takes another path,
            and `close` tries again.

        Warns
        -----
        UserWarning
            As `save`, or if a batch that was begun is left out, or if several calls of `add` are
            one batch because `step` was never called.
        """
        if self._closed:
            return
        notes, bad = self._finish(keep_begun=True)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        if bad is not None:
            raise bad

    def _finish(self, keep_begun: bool) -> tuple[list[str], Exception | None]:
        """Write the file and close; return what there is to warn of, and to raise."""
        notes, bad = [], None
        if any(self._adds):
            missing = self._missing()
            if self._batch == 0 and max(self._adds) > (self._adds_per_step or 1):
                notes.append("step() was never called, so all calls of add are one batch")
            if missing:
                notes.append(f"{self._shortfall(missing)} and is left out")
            elif not keep_begun:
                notes.append(f"batch {self._batch}, which was begun, is left out")
            if missing or not keep_begun:
                self._begin_batch()
            else:
                bad = self._end_batch()
        bad = bad or self._flush()
        try:
            self._write(self.path, bad, *notes)
        except OSError as error:
            raise self._rescue(error) from error
        self._closed, self._buffer = True, None
        return notes + self._never_added(), bad

    def _never_added(self) -> list[str]:
        never = [layer for layer, adds in enumerate(self._all_adds) if not adds]
        return (
            [f"add was never called for layers {list_some(never)}: they count 0"] if never else []
        )

    def _write(self, path: Path, bad: Exception | None = None, *notes: str) -> None:
        if not self._steps:
            why = "; ".join(notes) or "call add for every layer, then step"
            raise bad or ValueError(f"no batch was recorded: {why}")
        own = {
            "rank": self._rank,
            "world_size": self._world_size,
            "every": self.every,
            "seen": self._batch,
            "run": self._run,
        }
        counts = np.stack(self._kept)[:, :, None]
        meta = {**self._meta, "recorder": own}
        check_writable(path)
        save(path, Trace(counts, np.array(self._steps, dtype=np.int64), meta))
        self._unwritten[0] = 0

    def _rescue(self, error: OSError) -> OSError:
        """Write to a folder for temporary files; the error to raise, which says where."""
        try:
            other = Path(tempfile.mkdtemp(prefix="lplb_triton-")) / self.path.name
            self._write(other)
        except OSError:
            where = "in memory only"
        else:
            where = f"in {other} and in memory"
        return _with_advice(
            error,
            f"{error}; the {len(self._steps)} batches are {where}: call close() again, or "
            "save(path) for another file",
        )


def _warn_of_loss(path: Path, unwritten: list[int]) -> None:
    if unwritten[0]:
        _log.warning(
            "the recorder of %s was not closed: %d batches are lost. Use it in a `with` block, or "
            "call close()",
            path, unwritten[0],
        )  # fmt: skip


def _with_advice(error: OSError, text: str) -> OSError:
    """Make an error of the same kind that says more."""
    more = type(error)(text)
    more.errno = error.errno
    return more
