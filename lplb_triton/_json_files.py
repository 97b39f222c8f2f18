"""What the package's JSON files have in common: a format, its version, and a checksum.

The checksum is the SHA-256, in hexadecimal, of the other members as one JSON text in ASCII, with
sorted keys and without spaces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lplb_triton._version import __version__

__all__ = ["check_content", "check_names", "compute_checksum", "make_head"]


def make_head(kind: str, version: int) -> dict[str, Any]:
    """Return the members that a file of format ``kind`` begins with."""
    return {
        "format": kind,
        "format_version": version,
        "created_by": f"lplb_triton {__version__}",
    }


def compute_checksum(content: Mapping[str, Any]) -> str:
    """Compute the checksum that the head of this module describes."""
    covered = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_content(
    content: object, kind: str, version: int, members: Sequence[str], what: str
) -> Mapping[str, Any]:
    """Return the members of a file, or raise a ValueError that says what is wrong with them.

    Parameters
    ----------
    content
        What the file says.
    kind, version
        Its format, and the newest version that can be read.
    members
        Names of all members.
    what
        What it is a file of, for messages.
    """
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"not a file of {what}: 'format' must be {kind!r}")
    # A newer format may have other members, so its version comes first.
    written = content.get("format_version")
    if type(written) is not int or written < 1:
        raise ValueError(f"'format_version' must be a positive integer, got {written!r}")
    if written > version:
        raise ValueError(
            f"'format_version' is {written}, this version of the package reads up to "
            f"{version}; upgrade the package"
        )
    check_names(content, members, "the file")
    if content["sha256"] != compute_checksum(content):
        raise ValueError("'sha256' does not match: the file is damaged, or was changed by hand")
    return content


def check_names(content: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Raise a ValueError unless exactly these members are there."""
    missing = [repr(name) for name in names if name not in content]
    unknown = [repr(name) for name in content if name not in names]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown:
        raise ValueError(f"{where} has unknown members: {', '.join(unknown)}")
