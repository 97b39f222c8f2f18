"""Copies of balancers, and their state in files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lplb_triton._backends.layer import create_layer
from lplb_triton._backends.recorder import LoadRecorder
from lplb_triton._checks import resolve_device
from lplb_triton._locality import Locality
from lplb_triton._torch_op import opaque, outside_modes
from lplb_triton.solver import resolve_backend

if TYPE_CHECKING:
    from lplb_triton.balancer import Balancer

__all__ = ["copy_balancer", "load_balancer", "saved_state"]

B = TypeVar("B", bound="Balancer")

# Tensors of a layer that copies and files keep.
COUNTERS = ("certified", "solves", "uncertified", "traffic", "metrics")


@opaque
def copy_balancer(balancer: B) -> B:
    """Make a balancer of its own in the same group, with the communicator shared; local."""
    copied = _restore(type(balancer), saved_state(balancer), balancer.device)
    copied._membership.copy_from(balancer._membership)
    return copied


def saved_state(balancer: Balancer) -> dict[str, Any]:
    """Return everything that a file keeps; its names are also those in older files."""
    layer, member = balancer._layer, balancer._membership
    return {
        "placement": layer.placement,
        "settings": {
            "tolerance": layer.tolerance,
            "max_iterations": layer.max_iterations,
            "quotas": layer.quotas,
            "solver": layer.solver,
            "live": layer.live,
            "cost": layer.cost,
            "locality": tuple(layer.locality),
            "_given_backend": balancer._given_backend,
            "_own_rank": member.own_rank,
            "_timeout": member.timeout,
            "_checked": layer.checked,
        },
        "sync": member.sync if isinstance(member.sync, str) else "auto",
        "counters": {name: getattr(layer, name).cpu() for name in COUNTERS},
        "recorder": _saved_recorder(layer.recorder),
        "device": layer.device.type,
        "ranks": member.ranks,
    }


def _saved_recorder(recorder: LoadRecorder | None) -> dict[str, Any] | None:
    """Return what a file keeps of recorded loads."""
    if recorder is None:
        return None
    loads = recorder.read().cpu()
    return {"recording": recorder.recording, "decay": recorder.decay, "loads": loads}


def load_balancer(kind: type[B], state: dict[str, Any]) -> B:
    """Make a balancer of class ``kind`` from what `saved_state` returned, without a group."""
    if state["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this Balancer was saved on a GPU, and torch finds none here")
    with outside_modes():
        return _restore(kind, state, resolve_device(state["device"]))


def _restore(kind: type[B], state: dict[str, Any], device: torch.device) -> B:
    """Make a balancer on ``device`` from a state, without a group."""
    settings = state["settings"]
    given_backend, own_rank = settings["_given_backend"], settings["_own_rank"]
    layer = create_layer(
        state["placement"],
        device,
        resolve_backend(given_backend, device),
        rank=own_rank or 0,
        quotas=settings["quotas"],
        solver=settings["solver"],
        live=settings.get("live"),
        cost=settings.get("cost"),
        locality=Locality(*settings.get("locality", (None, None))),
        tolerance=settings["tolerance"],
        max_iterations=settings["max_iterations"],
        checked=settings["_checked"],
    )
    balancer = kind.__new__(kind)
    balancer._set_up(layer, given_backend, own_rank, state["sync"], settings["_timeout"])
    for name, values in state["counters"].items():
        getattr(layer, name).copy_(values)
    recorded = state.get("recorder")
    if recorded is not None:
        layer.recorder = LoadRecorder(layer.placement.n_logical, device)
        layer.recorder.recording, layer.recorder.decay = recorded["recording"], recorded["decay"]
        layer.recorder.write(recorded["loads"])
    ranks = balancer._membership.saved_ranks = state["ranks"]
    if ranks is not None:
        layer.blocked = (
            f"this Balancer was saved with a group, of ranks {list(ranks)}, and has none here: "
            "call set_group(group) on every rank"
        )
    return balancer
