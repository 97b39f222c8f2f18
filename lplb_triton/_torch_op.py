"""`Balancer.run` as operators of torch, and what keeps the caller's modes out of our own work."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["is_plain", "opaque", "outside_modes", "register"]

F = TypeVar("F", bound=Callable[..., Any])


class _Runs(Protocol):
    """What an operator needs of a balancer."""

    def _run(self, idx: torch.Tensor, certified: torch.Tensor | None, n_sms: int) -> torch.Tensor:
        """Run one batch, all arguments checked."""


_handles = itertools.count()
_balancers: weakref.WeakValueDictionary[int, _Runs] = weakref.WeakValueDictionary()


def register(balancer: _Runs) -> int:
    """Give a balancer the number by which the operators find it, as long as it exists."""
    handle = next(_handles)
    _balancers[handle] = balancer
    return handle


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether nobody but torch itself wants to see what is done with a tensor.

    That is neither a compiler, nor a tensor of a class of its own, nor a dispatch mode.
    """
    return (
        not torch.compiler.is_compiling()
        and type(tensor) is torch.Tensor
        and not torch._C._len_torch_dispatch_stack()
    )


@contextmanager
def outside_modes() -> Iterator[None]:
    """Leave dispatch modes, function modes, inference mode and autocast for a while.

    What a balancer keeps must not be recorded, replayed or replaced by a mode that happens to be
    on when it is made, such as selective checkpointing's.
    """
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
    """Make a method work `outside_modes`, unless it is given tensors of another class."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or any(map(_is_foreign, (*args, *kwargs.values()))):
            return method(*args, **kwargs)
        with outside_modes():
            return method(*args, **kwargs)

    return cast(F, wrapper)


def _is_foreign(value: object) -> bool:
    return isinstance(value, torch.Tensor) and type(value) is not torch.Tensor


# The operators take an integer for the balancer, so that torch.compile sees one opaque call. A
# balancer's own counters belong to it as its tables do: an operator that declared them as changed
# would keep a compiler from capturing the region in a CUDA graph.
torch.library.define("lplb_triton::balance", "(Tensor idx, int handle, int n_sms) -> Tensor")
torch.library.define(
    "lplb_triton::balance_counted",
    "(Tensor idx, Tensor(a!) certified, int handle, int n_sms) -> Tensor",
)


def _find(handle: int) -> _Runs:
    balancer = _balancers.get(handle)
    if balancer is None:
        raise RuntimeError("the Balancer of this call no longer exists; keep a reference to it")
    return balancer


def _balance(idx: torch.Tensor, handle: int, n_sms: int) -> torch.Tensor:
    return _find(handle)._run(idx, None, n_sms)


def _balance_counted(
    idx: torch.Tensor, certified: torch.Tensor, handle: int, n_sms: int
) -> torch.Tensor:
    return _find(handle)._run(idx, certified, n_sms)


def _fake(idx: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(idx, memory_format=torch.contiguous_format)


for _name, _call in (("balance", _balance), ("balance_counted", _balance_counted)):
    torch.library.impl(f"lplb_triton::{_name}", "CompositeExplicitAutograd", _call)
    torch.library.register_fake(f"lplb_triton::{_name}", _fake)
# A call whose ids nobody uses still takes part in the group's sum.
torch.fx.node.has_side_effect(torch.ops.lplb_triton.balance.default)
