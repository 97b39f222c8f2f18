"""`Balancer.run` as torch operators, and protection of a balancer's state from torch's modes."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["is_plain", "opaque", "outside_modes", "register"]

F = TypeVar("F", bound=Callable[..., Any])


class _Runner(Protocol):
    """What an operator needs of a balancer's back end."""

    def run(self, idx: torch.Tensor, certified: torch.Tensor | None, n_sms: int) -> torch.Tensor:
        """Run one batch, with checked arguments."""


_handles = itertools.count()
_backends: weakref.WeakValueDictionary[int, _Runner] = weakref.WeakValueDictionary()


def register(backend: _Runner) -> int:
    """Return a new number by which the operators find a back end, as long as it exists."""
    handle = next(_handles)
    _backends[handle] = backend
    return handle


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a call with this tensor can skip the operators.

    It can unless torch.compile is tracing, the tensor is of a subclass, or a dispatch mode is on.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is torch.Tensor
        and not torch._C._len_torch_dispatch_stack()
    )


def outside_modes() -> AbstractContextManager[None]:
    """Turn off dispatch modes, function modes, inference mode and autocast within the context.

    A mode that is on while a balancer makes its state, such as selective checkpointing's, must not
    record, replay or replace that state.
    """
    # Nearly always there is nothing to turn off, and the contexts take host time.
    return _turn_off_modes() if _is_in_mode() else _NOTHING


_NOTHING = nullcontext()


def _is_in_mode() -> bool:
    """Whether anything is on that `outside_modes` turns off."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cuda")
        or torch.is_autocast_enabled("cpu")
    )


@contextmanager
def _turn_off_modes() -> Iterator[None]:
    with ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        if torch._C._len_torch_function_stack():
            stack.enter_context(torch._C.DisableTorchFunction())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def opaque(method: F) -> F:
    """Decorate a method to run `outside_modes`, unless it is given tensors of a subclass."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or any(map(_is_subclassed, (*args, *kwargs.values()))):
            return method(*args, **kwargs)
        with outside_modes():
            return method(*args, **kwargs)

    return cast(F, wrapper)


def _is_subclassed(value: object) -> bool:
    """Whether a value is a tensor of a subclass."""
    return isinstance(value, torch.Tensor) and type(value) is not torch.Tensor


# The operators take an integer that stands for the balancer, so that torch.compile sees one opaque
# call. They don't declare that they change the balancer's own counters: torch.compile would not
# capture a region with such an operator in a CUDA graph.
torch.library.define("lplb_triton::balance", "(Tensor idx, int handle, int n_sms) -> Tensor")
torch.library.define(
    "lplb_triton::balance_counted",
    "(Tensor idx, Tensor(a!) certified, int handle, int n_sms) -> Tensor",
)


def _find(handle: int) -> _Runner:
    """Return the back end with this number, or raise if its balancer no longer exists."""
    backend = _backends.get(handle)
    if backend is None:
        raise RuntimeError("the Balancer of this call no longer exists; keep a reference to it")
    return backend


def _balance(idx: torch.Tensor, handle: int, n_sms: int) -> torch.Tensor:
    """Run one batch with the balancer's own counter of certified groups."""
    return _find(handle).run(idx, None, n_sms)


def _balance_counted(
    idx: torch.Tensor, certified: torch.Tensor, handle: int, n_sms: int
) -> torch.Tensor:
    """Run one batch with the caller's counter of certified groups."""
    return _find(handle).run(idx, certified, n_sms)


def _fake(idx: torch.Tensor, *_: Any) -> torch.Tensor:
    """Return what tracing needs to know of the result: its shape, dtype and device."""
    return torch.empty_like(idx, memory_format=torch.contiguous_format)


for _name, _call in (("balance", _balance), ("balance_counted", _balance_counted)):
    torch.library.impl(f"lplb_triton::{_name}", "CompositeExplicitAutograd", _call)
    torch.library.register_fake(f"lplb_triton::{_name}", _fake)
# A call must not be removed as dead code if its result is unused: it takes part in the group's sum.
torch.fx.node.has_side_effect(torch.ops.lplb_triton.balance.default)
