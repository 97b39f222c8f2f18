"""Scratch memory: one block per device and stream, shared by any number of layers."""

from __future__ import annotations

import torch

__all__ = ["find_stream", "reserve", "scratch", "workspace_bytes"]

_required: dict[torch.device, int] = {}
_blocks: dict[tuple[torch.device, int], torch.Tensor] = {}
# Blocks for the next streams of a GPU. On a stream's first call, allocations may go to a pool whose
# owner doesn't expect any of them to stay: `torch.compile` warms up its CUDA graphs with such a
# pool, on a stream of its own, besides the one that the program runs on.
_spares: dict[torch.device, list[torch.Tensor]] = {}
N_SPARES = 2


def _stream_key(device: torch.device) -> tuple[torch.device, int]:
    """Return a key for the current stream of ``device``; a CPU has one stream."""
    if device.type != "cuda":
        return device, 0
    # The raw handle: to make a Stream object takes as long as a launch.
    return device, torch._C._cuda_getCurrentRawStream(device.index)


def find_stream(device: torch.device) -> int:
    """Return a key for the current stream of ``device`` among its streams; 0 for a CPU."""
    return _stream_key(device)[1]


def reserve(device: torch.device, n_bytes: int) -> None:
    """Make every block of ``device`` at least ``n_bytes`` large from its next use on."""
    _required[device] = max(n_bytes, _required.get(device, 0))
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        spares = [b for b in _spares.get(device, ()) if b.numel() >= _required[device]]
        spares += [_new_block(device) for _ in range(N_SPARES - len(spares))]
        _spares[device] = spares


def _new_block(device: torch.device) -> torch.Tensor:
    """Allocate a block of the size that is required."""
    # The block outlives an inference mode that happens to be on, so it is no inference tensor.
    with torch.inference_mode(False):
        return torch.empty(_required[device], dtype=torch.uint8, device=device)


def _take_block(device: torch.device) -> torch.Tensor:
    """Return a block for the current stream: a spare one that is large enough, or a new one."""
    spares = _spares.get(device, [])
    if not spares or spares[-1].numel() < _required[device]:
        return _new_block(device)
    block = spares.pop()
    block.record_stream(torch.cuda.current_stream(device))
    return block


def scratch(device: torch.device) -> tuple[torch.Tensor, int | None]:
    """Return the current stream's block (uint8), and the stream's key to cache views under.

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
        block = _blocks[key] = _take_block(device)
    return block, key[1]


def workspace_bytes(device: torch.device | str | None = None) -> int:
    """Return the scratch memory held for all streams of a device, in bytes.

    A GPU's includes blocks that the next streams will take. The blocks that CUDA graphs hold
    themselves are not counted.

    Parameters
    ----------
    device : torch.device, str or None
        ``None`` adds up all devices.

    Returns
    -------
    int
    """
    wanted = None if device is None else torch.device(device)
    held = [(owner, block) for (owner, _), block in _blocks.items()]
    held += [(owner, block) for owner, blocks in _spares.items() for block in blocks]
    return sum(
        block.numel()
        for owner, block in held
        if wanted is None or owner == wanted or (wanted.index is None and owner.type == wanted.type)
    )
