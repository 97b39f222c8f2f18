"""A rank's originals, and checks for changes that a `Replicas` does not make itself."""

from __future__ import annotations

import torch

from lplb_triton.training.rows import Rows, describe_tensor, parts_of

__all__ = ["Originals"]


class Originals(dict[str, Rows]):
    """The originals by name, with the shapes, dtypes and devices that they had at the start."""

    def __init__(self, params: dict[str, Rows]) -> None:
        super().__init__(params)
        self._kinds = {name: _kind_of(parts_of(rows)[0]) for name, rows in params.items()}

    def require_same_kinds(self) -> None:
        """Raise RuntimeError if one has another shape, dtype or device than at the start."""
        for name, rows in self.items():
            for part in parts_of(rows):
                if _kind_of(part) != self._kinds[name]:
                    shape, dtype, device = self._kinds[name]
                    raise RuntimeError(
                        f"params[{name!r}] was {dtype} of shape {tuple(shape)} on {device} and is "
                        f"{describe_tensor(part)}: that needs another Replicas"
                    )

    def stamp(self) -> list[tuple[int, int]]:
        """Return the address of each tensor and how often it was written, to detect changes."""
        return [
            # Torch doesn't count the writes of tensors made in inference mode.
            (part.data_ptr(), -1 if part.is_inference() else part._version)
            for rows in self.values()
            for part in parts_of(rows)
        ]


def _kind_of(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Return what must not change."""
    return tensor.shape, tensor.dtype, tensor.device
