"""Which `Replicas` a parameter belongs to, and which optimizers update it.

One hook runs before the steps of all optimizers of the process, since a `Replicas` does not know
which of them updates its parameters. The hook looks parameters up by identity and does nothing for
those that belong to no `Replicas`.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from lplb_triton.training.rows import Rows, parts_of

__all__ = ["Claim", "check_unclaimed"]

_claims = WeakTensorKeyDictionary()
"""The last claim on each parameter; it outlives the `Replicas`, but not the parameter."""
_names: dict[int, tuple[Claim, set[str]]] = {}
"""By id of a parameter that a living `Replicas` holds: the claim, and its names there."""
_slots: dict[int, str] = {}
"""By id of a slot weight that a living `Replicas` holds: its name there."""


class Claim:
    """A `Replicas`' claim on its parameters; it holds no reference to the `Replicas`.

    Parameters
    ----------
    params : mapping of str to Rows
        The originals.
    weights : mapping of str to torch.Tensor
        Slot weights.
    owner : object
        The `Replicas`.
    check_step : callable
        A method of ``owner``, called with the names of the originals that an optimizer is about
        to update; it may raise.
    """

    def __init__(
        self,
        params: Mapping[str, Rows],
        weights: Mapping[str, torch.Tensor],
        owner: object,
        check_step: Callable[[set[str]], None],
    ) -> None:
        _hook_optimizers()
        self.in_order = True
        """Whether the originals lie in logical order."""
        self._check_step = weakref.WeakMethod(check_step)
        self._stepped: dict[int, weakref.ref[torch.optim.Optimizer]] = {}
        for name, rows in params.items():
            for part in parts_of(rows):
                _claims[part] = self
                _names.setdefault(id(part), (self, set()))[1].add(name)
        _slots.update((id(weight), name) for name, weight in weights.items())
        ids = [id(part) for rows in params.values() for part in parts_of(rows)]
        self._end = weakref.finalize(owner, _forget, ids + [id(w) for w in weights.values()])
        self._end.atexit = False

    @property
    def alive(self) -> bool:
        """Whether the `Replicas` exists and has not released its parameters."""
        return self._end.alive

    def release(self) -> None:
        """Release the parameters."""
        self._end()

    def observe_step(self, optimizer: torch.optim.Optimizer, names: set[str]) -> None:
        """Remember that ``optimizer`` updates the originals of these names, unless it must not."""
        self._stepped[id(optimizer)] = weakref.ref(optimizer)
        check = self._check_step()
        if check is not None:
            check(names)

    def check_given(
        self, given: Iterable[torch.optim.Optimizer], params: Mapping[str, Rows]
    ) -> None:
        """Raise if an optimizer that updates originals has state for them, and isn't given."""
        # Optimizers are compared by their state, which one that wraps another shares.
        known = {id(one.state) for one in given}
        missing = self._find_missing(known, params)
        if missing is not None:
            gc.collect()  # the object may be garbage already
            missing = self._find_missing(known, params)
        if missing is not None:
            raise ValueError(f"optimizer must include the {missing}: it has to follow experts")

    def _find_missing(self, known: set[int], params: Mapping[str, Rows]) -> str | None:
        """Describe an optimizer with state for these originals that is not a known one."""
        for optimizer in (ref() for ref in self._stepped.values()):
            if optimizer is None or id(optimizer.state) in known:
                continue
            for name, rows in params.items():
                for part in parts_of(rows):
                    state = optimizer.state.get(part, {})
                    if any(isinstance(value, torch.Tensor) for value in state.values()):
                        return f"{type(optimizer).__name__} that has state for params[{name!r}]"
        return None


def check_unclaimed(params: Mapping[str, Rows]) -> None:
    """Raise if a parameter belongs to a `Replicas`, or one has left it out of order."""
    found = _find_claim(params)
    if found is not None and found[1].alive:
        gc.collect()  # the object may be garbage already
        found = _find_claim(params)
    if found is None:
        return
    name, claim = found
    if claim.alive:
        raise ValueError(f"params[{name!r}] belongs to another Replicas: close() that one first")
    raise ValueError(
        f"params[{name!r}] is not in logical order: a Replicas moved its experts and was dropped "
        "without close(), which would have put them back"
    )


def _find_claim(params: Mapping[str, Rows]) -> tuple[str, Claim] | None:
    """Find a parameter with a claim that is alive or left it out of order, and the claim."""
    for name, rows in params.items():
        for part in parts_of(rows):
            claim = _claims.get(part)  # type: ignore[no-untyped-call]
            if claim is not None and (claim.alive or not claim.in_order):
                return name, claim
    return None


def _forget(ids: list[int]) -> None:
    """Remove parameters and slot weights by their ids."""
    for key in ids:
        _names.pop(key, None)
        _slots.pop(key, None)


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Report the step to every `Replicas` whose originals ``optimizer`` updates."""
    if torch.compiler.is_compiling() or not _names:
        return
    updated: dict[Claim, set[str]] = {}
    for group in optimizer.param_groups:
        ids = set(map(id, group["params"]))
        for slot in ids & _slots.keys():
            raise RuntimeError(
                f"{type(optimizer).__name__} must update the parameters given to Replicas, "
                f"not Replicas.weights[{_slots[slot]!r}]"
            )
        for param in ids & _names.keys():
            claim, names = _names[param]
            updated.setdefault(claim, set()).update(names)
    for claim, names in updated.items():
        claim.observe_step(optimizer, names)


@functools.cache
def _hook_optimizers() -> None:
    """Register the hook, once per process."""
    register_optimizer_step_pre_hook(_before_step)
