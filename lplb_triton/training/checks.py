"""Checks of the arguments of `Replicas`, on one rank and across ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import torch
import torch.distributed as dist

from lplb_triton.placement import Placement
from lplb_triton.placement.home import is_at_home
from lplb_triton.placement.moves import require_placement, require_static_slots
from lplb_triton.training.rows import Rows, check_rows, describe_tensor, parts_of

__all__ = [
    "TRAINABLE",
    "Spec",
    "check_at_home",
    "check_backend",
    "check_dtype",
    "check_group",
    "check_on_all_ranks",
    "check_params",
    "check_placement",
    "describe_placement",
    "is_trained",
    "is_usable",
]

Spec = dict[str, object]
"""Facts that must be the same on all ranks, by what the caller calls them."""

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of parameters that get gradients."""


def check_on_all_ranks(
    groups: Mapping[str, dist.ProcessGroup],
    check: Callable[[], Spec],
    own: Mapping[str, Spec] | None = None,
) -> None:
    """Raise on every rank if ``check`` does on one of them, or returns another dict than rank 0's.

    Nothing but the outcome of the check is sent.

    Parameters
    ----------
    groups : mapping of str to ProcessGroup
        By the names of the caller's arguments.
    check : callable
        This rank's check.
    own : mapping of str to dict, or None
        For a name in ``groups``, what else must be the same over that group.
    """
    error: Exception | None = None
    spec: Spec = {}
    try:
        spec = check()
    except Exception as caught:  # the other ranks must learn of any error
        error = caught
    for name, group in groups.items():
        mine = {**spec, **(own or {}).get(name, {})}
        reports: list[tuple[str | None, Spec]] = [(None, {})] * group.size()
        dist.all_gather_object(reports, (None if error is None else str(error), mine), group=group)
        if error is None:
            error = _find_disagreement(name, reports)
    if error is not None:
        raise error


def _find_disagreement(group: str, reports: list[tuple[str | None, Spec]]) -> ValueError | None:
    """Return the error of the first rank that failed or differs from rank 0, if there is one."""
    for rank, (message, _) in enumerate(reports):
        if message is not None:
            return ValueError(f"on rank {rank} of {group}: {message}")
    first = reports[0][1]
    for rank, (_, theirs) in enumerate(reports):
        for key in {**first, **theirs}:
            if first.get(key) == theirs.get(key):
                continue
            if key == "placement":
                return ValueError(
                    f"placement must be the same on all ranks, ranks 0 and {rank} of {group} "
                    "differ; Balancer.placement is rank 0's everywhere"
                )
            return ValueError(
                f"{key} must be the same on all ranks, got {first.get(key, 'nothing')} on rank 0 "
                f"of {group} and {theirs.get(key, 'nothing')} on rank {rank}"
            )
    return None


def is_usable(group: object) -> TypeGuard[dist.ProcessGroup]:
    """Whether this rank can call collectives over ``group``."""
    return group is not None and isinstance(group, dist.ProcessGroup)


def check_group(name: str, group: object) -> None:
    """Raise naming the argument unless it is None or a group that this rank is in."""
    if group is None or is_usable(group):
        return
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must contain this rank, got a group that it isn't a member of")
    raise TypeError(f"{name} must be a ProcessGroup or None, got {type(group).__name__}")


def check_placement(
    placement: Placement, group: dist.ProcessGroup | None, *, live: bool = False
) -> None:
    """Raise unless ``placement`` is for the ranks of ``group``, with live slots if ``live``."""
    placement = require_placement("placement", placement)
    if not live:
        require_static_slots("placement", placement)
    if group is None and placement.ep_size > 1:
        raise ValueError(
            f"placement is for {placement.ep_size} ranks (its ep_size): give group=, the process "
            "group of these ranks"
        )
    size = 1 if group is None else group.size()
    if placement.ep_size != size:
        raise ValueError(
            f"placement must have the group's number of ranks as ep_size, {size}, "
            f"got {placement.ep_size}"
        )
    if placement.n_logical % size:
        raise ValueError(
            f"placement must have a multiple of {size} (ep_size) logical experts, "
            f"got {placement.n_logical}"
        )


def check_at_home(placement: Placement, wanted: bool = True) -> None:
    """Raise a ValueError if experts of ``placement`` are to be at home, and are not."""
    if wanted and not is_at_home(placement):
        raise ValueError(
            "placement must keep every expert at home: make it with keep_home=True "
            "(Placement.from_history, chain, place)"
        )


def check_dtype(dtype: object) -> None:
    """Raise naming ``dtype`` unless it is None or that of a parameter that gets gradients."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {type(dtype).__name__}")
    if dtype is not None and dtype not in TRAINABLE:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


def check_params(
    params: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], n_own: int
) -> dict[str, Rows]:
    """Return the originals in order of their names, which is the same on every rank."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a mapping, got {type(params).__name__}")
    if not params:
        raise ValueError("params must name at least one tensor, got none")
    checked: dict[str, Rows] = {}
    for name in sorted(params):
        label = f"params[{name!r}]"
        checked[name] = rows = check_rows(label, params[name], n_own)
        parts = parts_of(rows)
        if len({part.requires_grad for part in parts}) > 1:
            raise ValueError(f"{label} must be trained (requires_grad) for all experts or none")
        if not is_trained(rows):
            continue
        if any(hasattr(part, "main_grad") for part in parts):
            raise ValueError(
                f"{label} has a main_grad, so its optimizer won't read .grad, where Replicas puts "
                "gradients; use lplb_triton.spread"
            )
        if not all(part.is_leaf for part in parts):
            raise ValueError(f"{label} must hold leaves of the autograd graph")
        if parts[0].dtype not in TRAINABLE:
            raise TypeError(
                f"{label} must have requires_grad=False, since only float16, bfloat16, float32 "
                f"and float64 can be trained, got {describe_tensor(parts[0])}"
            )
        if parts[0].is_inference():
            raise ValueError(f"{label} was made under torch.inference_mode, so it can't be trained")
    devices = {part.device for rows in checked.values() for part in parts_of(rows)}
    if len(devices) > 1:
        raise ValueError(f"params must be on one device, got {sorted(map(str, devices))}")
    return checked


def is_trained(rows: Rows) -> bool:
    """Whether the rows get gradients."""
    return any(part.requires_grad for part in parts_of(rows))


def check_backend(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raise unless ``group`` can send tensors on ``device``."""
    backend = None if group is None else dist.get_backend(group)
    if backend == ("gloo" if device.type == "cuda" else "nccl"):
        raise ValueError(
            f"group must be an NCCL group for parameters on a GPU and a gloo group on a CPU, "
            f"got {backend} for {device}"
        )


def describe_placement(placement: Placement) -> tuple[object, ...]:
    """Describe a placement so that equal placements have equal descriptions."""
    return placement.ep_size, placement.n_logical, placement.phy2log.numpy().tobytes()
