"""Checks that slots hold gradients only where the next call expects them."""

from __future__ import annotations

from lplb_triton.training.checks import is_trained
from lplb_triton.training.originals import Originals
from lplb_triton.training.slots import Slots

__all__ = ["require_current_gradients", "require_reduced"]


def require_reduced(slots: Slots, before: str) -> None:
    """Raise a RuntimeError if slots hold gradients, which ``before`` would lose."""
    names = slots.names_with_gradients()
    if names:
        raise RuntimeError(
            f"slots of {', '.join(names)} hold gradients that reduce_grads has not taken: "
            f"call reduce_grads before {before}, or zero_grad to drop them"
        )


def require_current_gradients(
    slots: Slots, originals: Originals, synced: list[tuple[int, int]] | None
) -> None:
    """Raise a RuntimeError if slots hold gradients for frozen or changed parameters.

    ``synced`` is the stamp of the originals at the last `Replicas.sync_weights`.
    """
    names = slots.names_with_gradients()
    frozen = [name for name in names if not is_trained(originals[name])]
    if frozen:
        raise RuntimeError(
            f"{', '.join(frozen)} got frozen while slots hold gradients: call reduce_grads "
            "before that, or zero_grad to drop them"
        )
    if names and originals.stamp() != synced:
        raise RuntimeError(
            f"parameters changed since the last sync_weights, but slots of {', '.join(names)} "
            "hold gradients: call sync_weights after a change, before the next forward pass "
            "(zero_grad drops these gradients)"
        )
