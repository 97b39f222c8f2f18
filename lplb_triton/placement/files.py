"""Placements in files: JSON with a version and a checksum, one placement for each layer.

The file is an object with the members

==================  ================================================================================
``format``          `FORMAT`
``format_version``  `FORMAT_VERSION` of the writer
``created_by``      the writer's package and its version
``note``            text of the caller's
``placements``      list of objects: ``layer``, and the arguments of `Placement`: ``phy2log``,
                    ``ep_size``, ``n_logical``, ``n_group``, ``max_columns``, ``live_per_rank``
``sha256``          checksum of the other members
==================  ================================================================================

The checksum is the SHA-256, in hexadecimal, of the other members as one JSON text in ASCII, with
sorted keys and without spaces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lplb_triton._checks import check_integer
from lplb_triton._files import parse_json, replace_file
from lplb_triton._json_files import check_content, check_names, compute_checksum, make_head

if TYPE_CHECKING:
    from lplb_triton.placement.placement import Placement

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "PlacementFile",
    "lay_out_placements",
    "load_placements",
    "save_placements",
]

FORMAT, FORMAT_VERSION = "lplb_triton placements", 1
# Members of the file and of each placement in it, besides its arguments.
MEMBERS = ("format", "format_version", "created_by", "note", "placements", "sha256")
ARGUMENTS = ("phy2log", "ep_size", "n_logical", "n_group", "max_columns", "live_per_rank")

# What users of a trace are told, who may take it for a placement.
TRACE_HINT = (
    "not a JSON file of placements, but like a trace: `lplb-bench place` makes a file of "
    "placements from a trace"
)

P = TypeVar("P", bound="PlacementFile")


class PlacementFile:
    """The part of `lplb_triton.Placement` that saves it to a file and loads it."""

    def save(self, path: str | os.PathLike[str], *, layer: int = 0, note: str = "") -> None:
        """Write the placement to a JSON file, replacing an existing one in a single step.

        Equal placements give equal bytes. `lplb_triton.placement.save_placements` writes the
        placements of many layers to one file.

        Parameters
        ----------
        path : str or path
            The file.
        layer : int
            Number of the layer that the placement is for.
        note : str
            Text to keep with it, such as what it was made from.

        Raises
        ------
        TypeError, ValueError
            If ``layer`` or ``note`` is of the wrong kind, or a layer is negative.
        OSError
            If the file can't be written.
        """
        save_placements(path, {layer: self}, note=note)  # type: ignore[dict-item]

    @classmethod
    def load(cls: type[P], path: str | os.PathLike[str], *, layer: int | None = None) -> P:
        """Read a placement that `save` wrote; it equals the one that was saved.

        Parameters
        ----------
        path : str or path
            The file.
        layer : int or None
            Which layer's placement; it may be left out if the file holds one.

        Returns
        -------
        Placement

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file isn't one of placements, is damaged or of a newer format, or doesn't have
            the layer; the message names the file and what is wrong with it.
        """
        found = _read(Path(path), cls)
        if layer is None and len(found) == 1:
            return next(iter(found.values()))
        layers = ", ".join(map(str, found))
        if layer is None:
            raise ValueError(f"{path} has placements of the layers {layers}: give layer")
        layer = check_integer("layer", layer, 0)
        if layer not in found:
            raise ValueError(f"layer must be one of those in {path}, {layers}, got {layer}")
        return found[layer]


def save_placements(
    path: str | os.PathLike[str], placements: Mapping[int, Placement], *, note: str = ""
) -> None:
    """Write the placements of several layers to one file, replacing it in a single step.

    Parameters
    ----------
    path : str or path
        The file.
    placements : mapping of int to Placement
        By number of the layer.
    note : str
        Text to keep with them.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, a layer is negative, or there is no placement.
    OSError
        If the file can't be written.
    """
    text = lay_out_placements(placements, note=note)
    with replace_file(Path(path)) as file:
        file.write(text.encode())


def lay_out_placements(placements: Mapping[int, Placement], *, note: str = "") -> str:
    """Return the text that `save_placements` writes, after the same checks."""
    if not isinstance(placements, Mapping):
        raise TypeError(f"placements must be a mapping, got {type(placements).__name__}")
    if not placements:
        raise ValueError("placements must hold at least one")
    if not isinstance(note, str):
        raise TypeError(f"note must be a str, got {type(note).__name__}")
    entries = []
    for layer, placement in placements.items():
        if not isinstance(placement, PlacementFile):
            raise TypeError(f"placements must hold Placements, got {type(placement).__name__}")
        number = check_integer("layer", layer, 0)
        entries.append({"layer": number, **placement.__getstate__()})
    content: dict[str, Any] = {
        **make_head(FORMAT, FORMAT_VERSION),
        "note": note,
        "placements": sorted(entries, key=lambda entry: entry["layer"]),
    }
    content["sha256"] = compute_checksum(content)
    return _lay_out(content)


def load_placements(path: str | os.PathLike[str]) -> dict[int, Placement]:
    """Read all placements of a file.

    Parameters
    ----------
    path : str or path
        A file of `save_placements`, `Placement.save` or ``lplb-bench place``.

    Returns
    -------
    dict of int to Placement
        By number of the layer, in ascending order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file isn't one of placements, is damaged or of a newer format; the message names
        the file and what is wrong with it.
    """
    from lplb_triton.placement.placement import Placement  # it is a subclass of this file's class

    return _read(Path(path), Placement)


def _lay_out(content: Mapping[str, Any]) -> str:
    """Return the text of a file: a line for each member and for each placement."""
    lines = []
    for name, value in content.items():
        text = json.dumps(value)
        if name == "placements":
            text = "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _read(path: Path, kind: type[P]) -> dict[int, P]:
    """Read a file and check all of it, naming it in every message."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {str(path)!r}")
    data = path.read_bytes()
    # An .npz file is a zip archive. A trace in JSON is nested lists, or an object with counts.
    archive = data.startswith(b"PK")
    content: Any = None if archive else parse_json(data, str(path))
    nested = isinstance(content, list) and content and isinstance(content[0], list)
    if archive or nested or (isinstance(content, dict) and "counts" in content):
        raise ValueError(f"{path}: {TRACE_HINT}")
    try:
        _check_content(content)
        return _make_placements(content["placements"], kind)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        # The caller passed a path, so every bad file is a bad value.
        raise ValueError(f"{path}: {error}") from error


def _check_content(content: object) -> None:
    """Raise a ValueError that says what is wrong with the members of a file."""
    members = check_content(content, FORMAT, FORMAT_VERSION, MEMBERS, "placements")
    if not isinstance(members["placements"], list) or not members["placements"]:
        raise ValueError("'placements' must be a list that is not empty")


def _make_placements(entries: list[Any], kind: type[P]) -> dict[int, P]:
    """Make the placements of a file by layer."""
    found: dict[int, P] = {}
    for number, entry in enumerate(entries):
        where = f"'placements'[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object, got {type(entry).__name__}")
        check_names(entry, ("layer", *ARGUMENTS), where)
        layer, arguments = entry["layer"], {name: entry[name] for name in ARGUMENTS}
        try:
            check_integer("layer", layer, 0)
            if layer in found:
                raise ValueError(f"layer {layer} is there twice")
            if not isinstance(arguments["phy2log"], list):
                raise ValueError("phy2log must be a list")
            found[layer] = kind(**arguments)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {error}") from error
    return dict(sorted(found.items()))
