"""Traces of real expert loads: one file with the routed token counts of many batches.

A trace keeps, for every recorded batch and MoE layer, how many tokens each source rank routed to
each logical expert. The balancer sees exactly these numbers in production, so a trace can be
replayed through a placement and the solver without the model that produced it.

The saved form is an ordinary ``.npz``: `numpy.load` reads it without this module. The members are

==================  =====================  ========================================================
``counts``          smallest unsigned int  [batches, layers, sources, experts], in Fortran order
``steps``           int64                  [batches], training step of each batch
``meta``            unicode scalar         a JSON object
``format_version``  int64 scalar           `FORMAT_VERSION` of the writer
``sha256``          unicode scalar         checksum of the three above it, from version 2 on
==================  =====================  ========================================================

Fortran order puts the same expert, source and layer of successive batches side by side, and the
members are compressed with bzip2, whose block sort gains from that more than deflate can. The
checksum is of, in this order, the text of ``meta`` in UTF-8 and, for ``steps`` and ``counts``, the
array's ``dtype.str``, its shape as Python prints it and its little-endian bytes in C order.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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

FORMAT_VERSION = 2

_PACKAGED_NAME = "moe256.npz"
_AXES = "[batches, layers, sources, experts]"
# Tokens of an expert in one batch, over all sources, at most: ranks exchange them in int32. Times
# 2**24, the unit of shares, they stay far below 2**63.
MOST_TOKENS = 2**31 - 1


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
        _check_counts(self.counts, "counts")
        if self.counts.ndim != 4:
            raise ValueError(f"counts must have the axes {_AXES}, got shape {self.counts.shape}")
        _check_totals(self.counts, "counts")
        _check_steps(self.steps, self.counts.shape[0], "steps")
        _check_meta(self.meta, "meta")

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
    _check_meta(trace.meta, "trace.meta")
    meta = {**trace.meta, "format_version": FORMAT_VERSION}
    counts = trace.counts
    members: dict[str, npt.NDArray[Any]] = {
        "format_version": np.array(FORMAT_VERSION, dtype=np.int64),
        "meta": np.array(json.dumps(meta, sort_keys=True, allow_nan=False)),
        "steps": trace.steps,
        "counts": np.asfortranarray(counts.astype(np.min_scalar_type(int(counts.max())))),
    }
    members["sha256"] = np.array(_checksum(members))
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for name, array in members.items():
                    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                    entry.compress_type = zipfile.ZIP_BZIP2
                    entry.external_attr = 0o644 << 16
                    with archive.open(entry, "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out whether `save` could write there, without leaving a file.

    Parameters
    ----------
    path
        As for `save`.

    Raises
    ------
    OSError
        If it couldn't: there is no such folder (``FileNotFoundError``), ``path`` is a folder, or
        no file can be made there.
    """
    target = Path(path)
    if not os.path.isdir(target.parent):
        raise FileNotFoundError(f"path: no such folder: {str(target.parent)!r}")
    if os.path.isdir(target):
        raise IsADirectoryError(f"path is a folder: {str(target)!r}")
    temporary = _temporary(target)
    try:
        with open(temporary, "wb"):
            pass
    except OSError as error:
        text = f"path: can't write {target.name!r} in {str(target.parent)!r}: {error.strerror}"
        raise type(error)(text) from error
    temporary.unlink()


def _temporary(target: Path) -> Path:
    # In the same folder, so that os.replace stays within one file system.
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


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
        content = _read_npz(source)
        _check_sum(content, source)
    elif source.suffix == ".json":
        content = _read_json(source)
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


def _read_npz(path: Path) -> dict[str, Any]:
    """Every member of an ``.npz`` as an array, without ever unpickling."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz archive (or cut short)")
    content: dict[str, Any] = {}
    name = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            # A newer format may hold members that this version cannot read, so look first.
            for name in sorted(archive.files, key=lambda key: key != "format_version"):
                content[name] = archive[name]
                if name == "format_version":
                    _check_version(content[name], path)
    except _FormatError:
        raise
    except Exception as error:
        # Every decompressor raises an error of its own, LZMA's and Zstandard's from modules that
        # a Python may lack, and encryption and unknown methods raise others: no list is complete.
        where = f"key {name!r} cannot be read" if name else "the archive cannot be read"
        raise ValueError(f"{path}: {where}: {error}") from error
    return content


def _checksum(members: dict[str, Any]) -> str:
    """SHA-256 of the members, as the head of this module says."""
    digest = hashlib.sha256(str(members["meta"]).encode())
    for name in ("steps", "counts"):
        array = members[name]
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _check_sum(content: dict[str, Any], path: Path) -> None:
    """Hold a file of version 2 on against its checksum; own counts have neither."""
    if int(content.get("format_version", 1)) < 2:
        return
    for name in ("sha256", "meta", "steps", "counts"):
        if name not in content:
            raise ValueError(f"{path}: key {name!r} is missing")
    if str(content.pop("sha256")) != _checksum(content):
        raise ValueError(f"{path}: 'sha256' does not match: the file was changed or damaged")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    parsed = parse_json(path.read_bytes(), str(path))
    if isinstance(parsed, list):
        parsed = {"counts": parsed}
    if not isinstance(parsed, dict):
        raise ValueError(
            f"{path}: expected nested lists or an object with the key 'counts', "
            f"got {type(parsed).__name__}"
        )
    if "format_version" in parsed:
        _check_version(np.asarray(parsed["format_version"]), path)
    for key in ("counts", "steps"):
        if key in parsed:
            parsed[key] = _array_from_json(parsed[key], key, path)
    return parsed


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON.

    Parameters
    ----------
    text
        What to parse; bytes are UTF-8.
    name
        What it is, for messages.

    Returns
    -------
    object
        What it says.

    Raises
    ------
    ValueError
        If it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError:
        # The parser's own stack; a trace or a report has a few levels.
        raise ValueError(f"{name}: JSON is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from error


def _array_from_json(value: object, key: str, path: Path) -> npt.NDArray[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: {key!r} must be nested lists, got {type(value).__name__}")
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: {key!r} must be nested lists of integers, of equal length on each level"
        ) from error
    if array.dtype.kind in "fO":
        # Integers that don't fit in 64 bits become something else.
        numbers = np.array(value, dtype=object).ravel().tolist()
        if numbers and all(type(number) is int for number in numbers):
            bits = max(number.bit_length() for number in numbers)
            raise ValueError(f"{path}: {key!r} must hold integers of 64 bits, got one of {bits}")
    return array


class _FormatError(ValueError):
    """Already says everything; not to be wrapped as damage to the file."""


def _check_version(version: npt.NDArray[Any], path: Path) -> None:
    if version.ndim != 0 or version.dtype.kind not in "iu" or version < 1:
        raise _FormatError(f"{path}: 'format_version' must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise _FormatError(
            f"{path}: 'format_version' is {int(version)}, this version of the package reads up to "
            f"{FORMAT_VERSION}; upgrade the package"
        )


def _from_content(content: dict[str, Any]) -> Trace:
    if "counts" not in content:
        keys = ", ".join(repr(key) for key in sorted(content)) or "none"
        raise ValueError(f"key 'counts' is missing; the file has {keys}")
    counts = content["counts"]
    _check_counts(counts, "'counts'")
    if counts.ndim == 2:
        counts = counts[:, np.newaxis, np.newaxis, :]
    elif counts.ndim == 3:
        counts = counts[:, :, np.newaxis, :]
    elif counts.ndim != 4:
        raise ValueError(
            "'counts' must be [batches, experts], [batches, layers, experts] or "
            f"{_AXES}, got shape {counts.shape}"
        )
    _check_totals(counts, "'counts'")
    counts = np.ascontiguousarray(counts, dtype=np.int32)

    steps = content.get("steps")
    if steps is None:
        steps = np.arange(counts.shape[0], dtype=np.int64)
    elif steps.dtype.kind in "iu":
        if steps.size and steps.max() > np.iinfo(np.int64).max:
            raise ValueError(f"'steps' must fit in int64, got {int(steps.max())}")
        steps = steps.astype(np.int64)
    _check_steps(steps, counts.shape[0], "'steps'")
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
    _check_meta(stored, "'meta'")
    meta.update(stored)
    return meta


def _check_counts(counts: object, name: str) -> None:
    if not isinstance(counts, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, got {type(counts).__name__}")
    if counts.ndim > 0 and counts.size == 0:
        raise ValueError(
            f"{name} must hold at least one batch, layer, source and expert, "
            f"got shape {counts.shape}"
        )
    if counts.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {counts.dtype}")
    if counts.min() < 0:
        raise ValueError(f"{name} must not be negative, got {int(counts.min())}")


def _check_totals(counts: npt.NDArray[np.integer[Any]], name: str) -> None:
    """Raise where an expert of ``[batches, layers, sources, experts]`` has too many tokens."""
    largest = int(counts.max())
    if largest <= MOST_TOKENS // counts.shape[2]:
        return
    # A count that is too large by itself may not be added to others: that could overflow.
    totals = counts.max(2) if largest > MOST_TOKENS else counts.sum(2, dtype=np.int64)
    batch, layer, expert = (int(i) for i in np.unravel_index(int(totals.argmax()), totals.shape))
    tokens = int(totals[batch, layer, expert])
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"{name} must give an expert at most {MOST_TOKENS} tokens in a batch over all sources "
            f"(ranks exchange them in int32), got {tokens} or more for expert {expert} of layer "
            f"{layer} in batch {batch}; record shorter batches, or divide all counts by one number"
        )


def _check_steps(steps: object, batches: int, name: str) -> None:
    if not isinstance(steps, np.ndarray) or steps.dtype != np.int64:
        found = steps.dtype if isinstance(steps, np.ndarray) else type(steps).__name__
        raise TypeError(f"{name} must be an int64 numpy array, got {found}")
    if steps.shape != (batches,):
        raise ValueError(f"{name} must have shape ({batches},), one per batch, got {steps.shape}")
    if steps.min() < 0:
        raise ValueError(f"{name} must not be negative, got {int(steps.min())}")


def _check_meta(meta: object, name: str) -> None:
    if not isinstance(meta, dict):
        raise TypeError(f"{name} must be a dict, got {type(meta).__name__}")
    for key in meta:
        if not isinstance(key, str):
            raise TypeError(f"{name} must have string keys, got {key!r}")
    try:
        json.dumps(meta, allow_nan=False)
    except RecursionError:
        raise ValueError(f"{name} must be something JSON can hold: nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be something JSON can hold: {error}") from error
