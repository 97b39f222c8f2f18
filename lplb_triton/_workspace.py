"""Scratch memory: one block per device and stream, shared by any number of layers."""

from __future__ import annotations

import torch

__all__ = ["reserve", "scratch", "workspace_bytes"]

_required: dict[torch.device, int] = {}
_blocks: dict[tuple[torch.device, int], torch.Tensor] = {}


def _stream_key(device: torch.device) -> tuple[torch.device, int]:
    """Name the current stream of ``device``; CPUs have one."""
    if device.type != "cuda":
        return device, 0
    # Without a Stream object on the way, which costs as much as a launch.
    return device, torch._C._cuda_getCurrentRawStream(device.index)


def reserve(device: torch.device, n_bytes: int) -> None:
    """Make every block of ``device`` at least ``n_bytes`` large from its next use on."""
    _required[device] = max(n_bytes, _required.get(device, 0))


def scratch(device: torch.device) -> tuple[torch.Tensor, int | None]:
    """Block of the current stream (uint8), and the stream's key to cache views under.

    The block is the caller's until the next call on the same stream.

    Kernels on one stream run one after the other, so all layers may use one block. While a
    CUDA graph is being captured the block is a fresh one from the graph's own memory: two
    graphs may be replayed at the same time, whatever stream they were captured on. Its key is
    ``None``: views of it must not be kept.
    """
    n_bytes = _required[device]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(n_bytes, dtype=torch.uint8, device=device), None
    key = _stream_key(device)
    block = _blocks.get(key)
    if block is None or block.numel() < n_bytes:
        # Later calls, in inference mode or not, write to the same block.
        with torch.inference_mode(False):
            block = _blocks[key] = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    return block, key[1]


def workspace_bytes(device: torch.device | str | None = None) -> int:
    """Scratch held for all streams of a device, in bytes (CUDA graphs hold their own).

    Parameters
    ----------
    device : torch.device, str or None
        ``None`` adds up all devices.

    Returns
    -------
    int
    """
    wanted = None if device is None else torch.device(device)
    return sum(
        block.numel()
        for (owner, _), block in _blocks.items()
        if wanted is None or owner == wanted or (wanted.index is None and owner.type == wanted.type)
    )
