"""Traces of real expert loads: one file with the routed token counts of many batches.

A trace keeps, for every recorded batch and MoE layer, how many tokens each source rank routed to
each logical expert. The balancer sees exactly these numbers in production, so a trace can be
replayed through a placement and the solver without the model that produced it.

A trace is saved as an ordinary ``.npz``, whose members `lplb_triton.traces.files` describes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lplb_triton._checks import check_integer
from lplb_triton.traces.checks import (
    AXES,
    MOST_TOKENS,
    check_counts,
    check_meta,
    check_steps,
    check_totals,
)
from lplb_triton.traces.files import (
    FORMAT_VERSION,
    check_checksum,
    check_writable,
    compute_checksum,
    parse_json,
    read_json,
    read_npz,
    write_npz,
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

_PACKAGED_NAME = "moe256.npz"


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Routed token counts of a sequence of batches.

    Parameters
    ----------
    counts
        Integer array [batches, layers, sources, experts]: assignments (token and expert pairs)
        that the tokens of one source rank sent to one logical expert. ``sources`` is 1 where only
        totals over all ranks are known. Over all sources an expert may have at most `MOST_TOKENS`
        in a batch of a layer, which is what ranks can exchange (int32).
    steps
        int64 [batches], training step (or position in the stream) of each batch.
    meta
        JSON-able description: how the trace was made, model, ``top_k``, tokens per source,
        hardware, date. Keys are strings.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a shape or a value is out of range.
    """

    counts: npt.NDArray[np.integer[Any]]
    steps: npt.NDArray[np.int64]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check all three arguments."""
        check_counts(self.counts, "counts")
        if self.counts.ndim != 4:
            raise ValueError(f"counts must have the axes {AXES}, got shape {self.counts.shape}")
        check_totals(self.counts, "counts")
        check_steps(self.steps, self.counts.shape[0], "steps")
        check_meta(self.meta, "meta")

    def __repr__(self) -> str:
        """Sizes in one line."""
        return (
            f"Trace({self.batches} batches, {self.layers} layers, {self.sources} sources, "
            f"{self.experts} experts)"
        )

    @property
    def batches(self) -> int:
        """Number of recorded batches."""
        return int(self.counts.shape[0])

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return int(self.counts.shape[1])

    @property
    def sources(self) -> int:
        """Number of source ranks; 1 where only totals are known."""
        return int(self.counts.shape[2])

    @property
    def experts(self) -> int:
        """Number of logical experts."""
        return int(self.counts.shape[3])

    def totals(self) -> npt.NDArray[np.int64]:
        """Sum the counts over the source ranks.

        Returns
        -------
        numpy.ndarray
            int64 [batches, layers, experts].
        """
        totals: npt.NDArray[np.int64] = self.counts.sum(axis=2, dtype=np.int64)
        return totals

    def loads(self, layer: int | None = None) -> torch.Tensor:
        """Return the loads of one layer, as every way of placing experts takes them.

        ``place(trace.loads(3), 32)``, ``chain(trace.loads(3), 32)`` and
        ``Placement.from_history(trace.loads(3), 32)`` place by all batches, and slices of it, such
        as ``trace.loads(3)[-100:]``, by some.

        Parameters
        ----------
        layer
            Index of the layer; it may be left out if the trace has one.

        Returns
        -------
        torch.Tensor
            ``[batches, experts]`` float64 on the CPU, tokens over all sources.

        Raises
        ------
        TypeError, ValueError
            If ``layer`` is no integer, is not in the trace, or is missing where there are several.
        """
        if layer is None:
            if self.layers > 1:
                raise ValueError(f"layer must be given for a trace of {self.layers} layers")
            layer = 0
        layer = check_integer("layer", layer, 0)
        if layer >= self.layers:
            raise ValueError(f"layer must be in [0, {self.layers}), got {layer}")
        return torch.from_numpy(self.counts[:, layer].sum(axis=1, dtype=np.float64))


def save(path: str | os.PathLike[str], trace: Trace) -> None:
    """Write a trace to an ``.npz`` file, replacing an existing one in a single step.

    The same trace gives the same bytes: no time stamps are stored in the archive. ``meta`` is
    written with its ``format_version`` set to `FORMAT_VERSION`.

    Parameters
    ----------
    path
        File to write; must end in ``.npz``. A reader sees the old file or the whole new one.
    trace
        What to write.

    Raises
    ------
    TypeError
        If ``trace`` is not a `Trace`.
    ValueError
        If ``path`` does not end in ``.npz``, or ``trace.meta`` was changed into something that
        JSON cannot hold.
    OSError
        If the file cannot be written.
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"trace must be a Trace, got {type(trace).__name__}")
    target = Path(path)
    if target.suffix != ".npz":
        raise ValueError(f"path must end in .npz, got {str(target)!r}")
    check_meta(trace.meta, "trace.meta")
    meta = {**trace.meta, "format_version": FORMAT_VERSION}
    counts = trace.counts
    members: dict[str, npt.NDArray[Any]] = {
        "format_version": np.array(FORMAT_VERSION, dtype=np.int64),
        "meta": np.array(json.dumps(meta, sort_keys=True, allow_nan=False)),
        "steps": trace.steps,
        "counts": np.asfortranarray(counts.astype(np.min_scalar_type(int(counts.max())))),
    }
    members["sha256"] = np.array(compute_checksum(members))
    write_npz(target, members)


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a trace written by `save`, or a user's own counts.

    Own counts come as ``.npz`` with an array ``counts``, or as ``.json``: nested lists, or an
    object with ``counts``. Both may also hold ``steps`` [batches]. ``counts`` is
    [batches, experts], [batches, layers, experts] or [batches, layers, sources, experts]; a
    missing axis becomes one of length 1, and missing ``steps`` are 0, 1, 2, ... Single numbers and
    strings beside ``counts`` (``top_k``, say) are kept in ``meta``.

    Parameters
    ----------
    path
        File ending in ``.npz`` or ``.json``.

    Returns
    -------
    Trace
        With ``counts`` as int32, whatever the stored width.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, is of a newer format, or a key is missing or holds something else
        than expected; the message names the file and the key.
    """
    source = Path(path)
    if source.suffix == ".npz":
        content = read_npz(source)
        check_checksum(content, source)
    elif source.suffix == ".json":
        content = read_json(source)
    else:
        raise ValueError(f"path must end in .npz or .json, got {str(source)!r}")
    try:
        return _from_content(content)
    except (TypeError, ValueError) as error:
        # One type for every bad file: the caller passed a path, not the wrong kind of object.
        raise ValueError(f"{source}: {error}") from error


def packaged() -> Trace:
    """Load the trace that comes with the package.

    It was recorded by ``examples/train_moe.py``, whose text describes it; ``meta`` holds the
    settings.

    Returns
    -------
    Trace
        Early and late training batches of a small MoE language model with 256 experts.

    Raises
    ------
    FileNotFoundError
        If this installation came without the file.
    """
    resource = resources.files("lplb_triton.bench").joinpath("data").joinpath(_PACKAGED_NAME)
    if not resource.is_file():
        raise FileNotFoundError(
            f"the packaged trace bench/data/{_PACKAGED_NAME} is not part of this installation; "
            "record it with examples/train_moe.py --record bench/data/" + _PACKAGED_NAME
        )
    with resources.as_file(resource) as path:
        return load(path)


def _from_content(content: dict[str, Any]) -> Trace:
    if "counts" not in content:
        keys = ", ".join(repr(key) for key in sorted(content)) or "none"
        raise ValueError(f"key 'counts' is missing; the file has {keys}")
    counts = content["counts"]
    check_counts(counts, "'counts'")
    if counts.ndim == 2:
        counts = counts[:, np.newaxis, np.newaxis, :]
    elif counts.ndim == 3:
        counts = counts[:, :, np.newaxis, :]
    elif counts.ndim != 4:
        raise ValueError(
            "'counts' must be [batches, experts], [batches, layers, experts] or "
            f"{AXES}, got shape {counts.shape}"
        )
    check_totals(counts, "'counts'")
    counts = np.ascontiguousarray(counts, dtype=np.int32)

    steps = content.get("steps")
    if steps is None:
        steps = np.arange(counts.shape[0], dtype=np.int64)
    elif steps.dtype.kind in "iu":
        if steps.size and steps.max() > np.iinfo(np.int64).max:
            raise ValueError(f"'steps' must fit in int64, got {int(steps.max())}")
        steps = steps.astype(np.int64)
    check_steps(steps, counts.shape[0], "'steps'")
    return Trace(counts=counts, steps=steps, meta=_meta_from_content(content))


def _meta_from_content(content: dict[str, Any]) -> dict[str, Any]:
    """``meta`` of the file, completed by the single values that stand beside ``counts``."""
    meta: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iufbU":
            value = value.item()
        if key != "meta" and isinstance(value, (int, float, str)):
            meta[key] = value
    stored = content.get("meta", {})
    if isinstance(stored, np.ndarray):
        if stored.ndim != 0 or stored.dtype.kind != "U":
            raise ValueError(f"'meta' must be a JSON string, got an array of {stored.dtype}")
        stored = parse_json(stored.item(), "'meta'")
    check_meta(stored, "'meta'")
    meta.update(stored)
    return meta
