"""Files of a recorder in several processes: which process writes which, and how to merge them."""

from __future__ import annotations

import itertools
import os
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from lplb_triton._checks import check_integer
from lplb_triton.traces.trace import Trace, load, save

__all__ = ["group_is_up", "list_some", "merge", "merge_into", "own_rank", "rank_path", "run_id"]


def rank_path(path: str | os.PathLike[str], rank: int) -> Path:
    """Return the path of one rank's file: ``trace.rank00003.npz`` for ``trace.npz``."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}.rank{rank:05d}{whole.suffix}")


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
        ``counts`` ``[batches, layers, world_size, experts]``; ``meta`` is that of rank 0.

    Raises
    ------
    TypeError
        If ``paths`` is a single path.
    FileNotFoundError
        If there is no such file.
    ValueError
        If a file isn't a recorder's or is merged already, ranks are missing or there twice, sizes
        differ, files are of different runs (as far as ``torch.distributed`` was in use, which
        tells), or no batch is in all files.

    Warns
    -----
    UserWarning
        If the ranks ended after different numbers of batches or a batch is left out: where a rank
        skipped a `Recorder.step`, batches of the same number don't belong together.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"paths must be a sequence of paths, got {type(paths).__name__}")
    traces: dict[int, Trace] = {}
    sizes: tuple[int, ...] = ()
    for path in paths:
        trace = load(path)
        rank, world_size = _read_rank(path, trace)
        if rank in traces:
            raise ValueError(f"{path}: rank {rank} is there twice")
        sizes = sizes or (world_size, trace.layers, trace.experts)
        if sizes != (world_size, trace.layers, trace.experts):
            raise ValueError(f"{path}: other ranks, layers or experts than in {paths[0]}")
        traces[rank] = trace
        if _get_run(trace) != _get_run(next(iter(traces.values()))):
            raise ValueError(f"{path}: of another run than {paths[0]}")
    absent = (rank for rank in range(sizes[0] if sizes else 1) if rank not in traces)
    missing = list(itertools.islice(absent, 9))
    if missing:
        raise ValueError(f"paths must hold every rank's file; missing: {list_some(missing)}")
    return _merge_traces([trace for _, trace in sorted(traces.items())])


def merge_into(
    target: str | os.PathLike[str], paths: Sequence[str | os.PathLike[str]]
) -> list[str]:
    """Write what `merge` makes of the files of all ranks.

    Parameters
    ----------
    target
        File to write, ending in ``.npz``, none of ``paths`` under whatever name. Its folder is made
        if need be.
    paths
        As for `merge`.

    Returns
    -------
    list of str
        What `merge` warns of.

    Raises
    ------
    ValueError
        As `merge`; if ``target`` ends in something else or is one of ``paths``.
    OSError
        If a file can't be read or written.
    """
    merged = Path(target)
    if merged.suffix != ".npz":
        raise ValueError(f"the merged trace must end in .npz, got {str(merged)!r}")
    for path in map(Path, paths):
        same = merged.exists() and path.exists() and merged.samefile(path)
        if same or merged.resolve() == path.resolve():
            raise ValueError(
                f"the merged trace {merged} would overwrite {path}, which is one of the files to "
                "merge; give another name"
            )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = merge(paths)
    merged.parent.mkdir(parents=True, exist_ok=True)
    save(merged, trace)
    return [str(warning.message) for warning in caught]


def _read_rank(path: str | os.PathLike[str], trace: Trace) -> tuple[int, int]:
    """Return rank and number of ranks of a recorder's file; a ``ValueError`` names the file."""
    own = trace.meta.get("recorder")
    if not isinstance(own, dict) or not {"rank", "world_size"} <= set(own):
        raise ValueError(f"{path}: not written by a Recorder")
    if "merged" in own or trace.sources != 1:
        raise ValueError(f"{path}: merged already")
    try:
        return _check_rank(own["rank"], own["world_size"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _get_run(trace: Trace) -> object:
    return trace.meta["recorder"].get("run")


def _merge_traces(traces: list[Trace]) -> Trace:
    """Merge the traces of all ranks, which come in order of ranks."""
    every = [set(trace.steps.tolist()) for trace in traces]
    common = set.intersection(*every)
    if not common:
        raise ValueError("paths must share batches; no step is in all of them")
    seen = [trace.meta["recorder"].get("seen") for trace in traces]
    left_out = len(set.union(*every)) - len(common)
    if left_out or any(number != seen[0] for number in seen):
        shown = ", ".join(f"rank {rank}: {number}" for rank, number in enumerate(seen[:8]))
        warnings.warn(
            f"{left_out} batches are not in all files and left out; the ranks ended after so many "
            f"batches: {shown}{', ...' if len(seen) > 8 else ''}. If a rank skipped step() on the "
            "way, batches of the same number don't belong together",
            stacklevel=3,
        )
    steps = np.array(sorted(common), dtype=np.int64)
    parts = [trace.counts[np.isin(trace.steps, steps)] for trace in traces]
    own = {**traces[0].meta["recorder"], "merged": len(traces)}
    return Trace(np.concatenate(parts, axis=2), steps, {**traces[0].meta, "recorder": own})


def own_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and number of ranks: those given, else torch.distributed's, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size must be given together")
    if rank is None or world_size is None:
        if group_is_up():
            return dist.get_rank(), dist.get_world_size()
        started = os.environ.get("WORLD_SIZE", "")
        if started.isdigit() and int(started) > 1:
            raise ValueError(
                f"rank and world_size must be given, or torch.distributed initialised before: this "
                f"is one of several processes (WORLD_SIZE is {started})"
            )
        return 0, 1
    return _check_rank(rank, world_size)


def _check_rank(rank: object, world_size: object) -> tuple[int, int]:
    ranks = check_integer("world_size", world_size)
    own = check_integer("rank", rank, 0)
    if own >= ranks:
        raise ValueError(f"rank must be below world_size {ranks}, got {own}")
    return own, ranks


def group_is_up() -> bool:
    """Say whether torch.distributed has a default group."""
    return dist.is_available() and dist.is_initialized()


def run_id() -> str | None:
    """Agree on a name with all processes of the default group; no rank waits for another."""
    store = dist.distributed_c10d._get_default_store() if group_is_up() else None
    if store is None:
        return None
    mine = uuid.uuid4().hex
    try:
        found: bytes = store.compare_set("lplb_triton/recorder/run", "", mine)
    except RuntimeError:
        # Stores of test doubles have no such call; then merging can't tell runs apart.
        return None
    return found.decode()


def list_some(numbers: Iterable[int]) -> str:
    """Write numbers for a message, the first eight of them."""
    found = [str(number) for number in numbers]
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
