"""Costs in files: JSON with a version and a checksum.

The file is an object with the members

==================  ================================================================================
``format``          `FORMAT`
``format_version``  `FORMAT_VERSION` of the writer
``created_by``      the writer's package and its version
``cost``            the arguments of `TimeCost`; tables as ``shape`` and ``base64`` of float32 in
                    little-endian order, ``smoothed`` likewise
``sha256``          checksum of the other members
==================  ================================================================================

The checksum is the SHA-256, in hexadecimal, of the other members as one JSON text in ASCII, with
sorted keys and without spaces.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lplb_triton._files import parse_json, replace_file
from lplb_triton._json_files import check_content, check_names, compute_checksum, make_head

__all__ = ["FORMAT", "FORMAT_VERSION", "CostFile", "lay_out_cost"]

FORMAT, FORMAT_VERSION = "lplb_triton time cost", 1
MEMBERS = ("format", "format_version", "created_by", "cost", "sha256")
TABLES = ("table", "smoothed")
NUMBERS = ("slopes", "per_row", "sides", "wide_from", "source")

C = TypeVar("C", bound="CostFile")


class CostFile:
    """The part of `lplb_triton.TimeCost` that saves it to a file and loads it."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cost to a JSON file, replacing an existing one in a single step.

        Equal costs give equal bytes.

        Parameters
        ----------
        path : str or path
            The file.

        Raises
        ------
        OSError
            If the file can't be written.
        """
        text = lay_out_cost(self)
        with replace_file(Path(path)) as file:
            file.write(text.encode())

    @classmethod
    def load(cls: type[C], path: str | os.PathLike[str]) -> C:
        """Read a cost that `save` wrote; it equals the one that was saved.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        TimeCost

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file isn't one of a cost, is damaged or of a newer format; the message names
            the file and what is wrong with it.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: no such file: {str(path)!r}")
        content = parse_json(path.read_bytes(), str(path))
        try:
            _check_content(content)
            cost = content["cost"]
            check_names(cost, (*TABLES, *NUMBERS), "'cost'")
            tables = {name: _unpack(name, cost[name]) for name in TABLES}
            numbers = {name: cost[name] for name in NUMBERS}
            for name in ("slopes", "sides"):
                numbers[name] = tuple(numbers[name])
            return cls(**tables, **numbers)
        except (TypeError, ValueError, OverflowError) as error:
            # The caller passed a path, so every bad file is a bad value.
            raise ValueError(f"{path}: {error}") from error


def lay_out_cost(cost: CostFile) -> str:
    """Return the text that `CostFile.save` writes."""
    arguments: dict[str, Any] = {name: getattr(cost, name) for name in NUMBERS}
    arguments |= {name: _pack(getattr(cost, name)) for name in TABLES}
    content = {
        **make_head(FORMAT, FORMAT_VERSION),
        "cost": arguments,
    }
    content["sha256"] = compute_checksum(content)
    return json.dumps(content, indent=1) + "\n"


def _pack(table: NDArray[np.float32]) -> dict[str, Any]:
    """Return a table as members of a JSON object."""
    text = base64.b64encode(table.astype("<f4").tobytes()).decode()
    return {"shape": list(table.shape), "base64": text}


def _unpack(name: str, packed: object) -> NDArray[np.float32]:
    """Return the table that `_pack` has packed."""
    if not isinstance(packed, dict):
        raise ValueError(f"{name!r} must be an object")
    check_names(packed, ("shape", "base64"), repr(name))
    values = np.frombuffer(base64.b64decode(packed["base64"], validate=True), dtype="<f4")
    table: NDArray[np.float32] = values.reshape(packed["shape"]).astype(np.float32)
    return table


def _check_content(content: object) -> None:
    """Raise a ValueError that says what is wrong with the members of a file."""
    members = check_content(content, FORMAT, FORMAT_VERSION, MEMBERS, "a cost")
    if not isinstance(members["cost"], dict):
        raise ValueError("'cost' must be an object")
