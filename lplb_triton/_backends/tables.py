"""A placement's index tables in fixed device memory, rewritten in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lplb_triton._backends.arrays import (
    make_copy_arrays,
    make_dense_arrays,
    make_kernel_arrays,
    make_live_arrays,
)
from lplb_triton._backends.near_arrays import make_near_arrays
from lplb_triton._backends.time_arrays import make_time_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lplb_triton.placement import Placement

__all__ = ["DeviceTables"]

# Tables start on this many bytes, so that no kernel is compiled twice for alignment.
ALIGNMENT = 256


class DeviceTables:
    """One block of device memory with a typed view for every table.

    Captured CUDA graphs and launches hold the views' addresses, so the block lives as long as
    its owner and `write` only changes what is in it.

    Parameters
    ----------
    placement : Placement
        The first one; all others must have its sizes.
    device : torch.device
    kernels : bool
        Whether Triton's kernels read the tables; the torch twin needs few of them.
    dense : bool
        Whether to add the tables of the interior-point kernel.
    time : bool
        Whether to add the tables of plans by time.
    near : int or None
        Ranks of a node, to add the tables of near plans.

    Attributes
    ----------
    views : dict of str to torch.Tensor
        The tables by name, as in `kernels.SolveTables`, `SelectTables` and `ExpandTables`.
    """

    def __init__(
        self,
        placement: Placement,
        device: torch.device,
        *,
        kernels: bool = True,
        dense: bool = False,
        time: bool = False,
        near: int | None = None,
    ) -> None:
        self._kernels, self._dense, self._time, self._near = kernels, dense, time, near
        # Kernels are compiled for as many classes in the table of pairs as the first placement has.
        self._pair_classes: int | None = None
        arrays = self._make_arrays(placement)
        if kernels:
            self._pair_classes = arrays["pairs"].shape[1]
        self._offsets: dict[str, int] = {}
        size = 0
        for name, array in arrays.items():
            self._offsets[name] = size
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        # A table may be empty (no columns); its view must still have an address.
        self._block = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device=device)
        self._host = torch.zeros(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        self.views = self._view_tables(self._block, arrays)
        host = self._view_tables(self._host, arrays)
        self._host_views = {name: view.numpy() for name, view in host.items()}
        self._sizes = {name: array.shape for name, array in arrays.items()}
        self._fill(arrays)
        self._placement = placement

    @property
    def n_bytes(self) -> int:
        """Size of the block."""
        return self._block.numel()

    def _view_tables(
        self, block: torch.Tensor, arrays: dict[str, NDArray[Any]]
    ) -> dict[str, torch.Tensor]:
        """Return a typed view of every table in a block laid out by ``_offsets``."""
        views = {}
        for name, array in arrays.items():
            offset, dtype = self._offsets[name], torch.from_numpy(np.empty(0, array.dtype)).dtype
            views[name] = block[offset : offset + array.nbytes].view(dtype).view(array.shape)
        return views

    def _make_arrays(self, placement: Placement) -> dict[str, NDArray[Any]]:
        """Make all tables of a placement."""
        if not self._kernels:
            return make_copy_arrays(placement)
        arrays = make_kernel_arrays(placement, self._pair_classes)
        if self._dense:
            arrays |= make_dense_arrays(placement)
        if self._time:
            arrays |= make_time_arrays(placement)
        if self._near is not None:
            arrays |= make_near_arrays(placement, self._near)
        if placement.live_per_rank:
            arrays |= make_live_arrays(placement)
        return arrays

    def write(self, placement: Placement) -> None:
        """Copy another placement of the same sizes into the block, on the current stream.

        Does nothing if it is the one that is there.
        """
        if placement == self._placement:
            return
        arrays = self._make_arrays(placement)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._sizes:
            raise ValueError(f"placement must have the sizes of the first one, got {placement}")
        self._fill(arrays)
        self._placement = placement

    def _fill(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Copy arrays to the device, through the block on the host."""
        for name, array in arrays.items():
            self._host_views[name][...] = array
        self._block.copy_(self._host)
