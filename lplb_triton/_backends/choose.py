"""Choice of the back end's class."""

from __future__ import annotations

from lplb_triton._backends.base import Backend
from lplb_triton._backends.layer import Layer
from lplb_triton._backends.torch import TorchBackend

__all__ = ["create_backend"]


def create_backend(layer: Layer) -> Backend:
    """Make the back end that the layer's ``backend`` and ``solver`` name."""
    if layer.backend == "torch":
        return TorchBackend(layer)
    # These modules import Triton, which a process that only uses torch may lack.
    if layer.solver == "interior_point":
        from lplb_triton._backends.interior_point import InteriorPointBackend

        return InteriorPointBackend(layer)
    from lplb_triton._backends.levelling import LevellingBackend

    return LevellingBackend(layer)
