"""The file of a trace: reading, writing and checking its members.

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
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lplb_triton._files import parse_json, replace_file, temporary_path

__all__ = [
    "FORMAT_VERSION",
    "check_checksum",
    "check_writable",
    "compute_checksum",
    "parse_json",
    "read_json",
    "read_npz",
    "write_npz",
]

FORMAT_VERSION = 2


def write_npz(target: Path, members: dict[str, npt.NDArray[Any]]) -> None:
    """Write an archive to a file beside the target, which it then replaces in a single step."""
    with replace_file(target) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in members.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_BZIP2
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out whether a trace could be saved there, without leaving a file.

    Parameters
    ----------
    path
        As for `lplb_triton.traces.trace.save`.

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
    temporary = temporary_path(target)
    try:
        with open(temporary, "wb"):
            pass
    except OSError as error:
        text = f"path: can't write {target.name!r} in {str(target.parent)!r}: {error.strerror}"
        raise type(error)(text) from error
    temporary.unlink()


def read_npz(path: Path) -> dict[str, Any]:
    """Read every member of an ``.npz`` as an array, without ever unpickling."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz archive (or cut short)")
    content: dict[str, Any] = {}
    name = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            # This version may be unable to read members of a newer format: check the version first.
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


def compute_checksum(members: dict[str, Any]) -> str:
    """Compute the SHA-256 of the members that the head of this module describes."""
    digest = hashlib.sha256(str(members["meta"]).encode())
    for name in ("steps", "counts"):
        array = members[name]
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_checksum(content: dict[str, Any], path: Path) -> None:
    """Compare a file of version 2 or later with its checksum; a user's own counts have none."""
    if int(content.get("format_version", 1)) < 2:
        return
    for name in ("sha256", "meta", "steps", "counts"):
        if name not in content:
            raise ValueError(f"{path}: key {name!r} is missing")
    if str(content.pop("sha256")) != compute_checksum(content):
        raise ValueError(f"{path}: 'sha256' does not match: the file was changed or damaged")


def read_json(path: Path) -> dict[str, Any]:
    """Read counts and what stands beside them from JSON, with `counts` and `steps` as arrays."""
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
        # numpy converts integers that don't fit in 64 bits to another type.
        numbers = np.array(value, dtype=object).ravel().tolist()
        if numbers and all(type(number) is int for number in numbers):
            bits = max(number.bit_length() for number in numbers)
            raise ValueError(f"{path}: {key!r} must hold integers of 64 bits, got one of {bits}")
    return array


class _FormatError(ValueError):
    """The message is complete, so that it is not wrapped as damage to the file."""


def _check_version(version: npt.NDArray[Any], path: Path) -> None:
    if version.ndim != 0 or version.dtype.kind not in "iu" or version < 1:
        raise _FormatError(f"{path}: 'format_version' must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise _FormatError(
            f"{path}: 'format_version' is {int(version)}, this version of the package reads up to "
            f"{FORMAT_VERSION}; upgrade the package"
        )
