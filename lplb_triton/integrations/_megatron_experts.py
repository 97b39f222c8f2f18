"""Megatron-Core's experts modules, called with the weights of redundant slots."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lplb_triton.integrations._layer import LayerBalance
from lplb_triton.training.spread import attach, copy_weights

__all__ = ["replace_grouped_forward", "replace_sequential_forward"]


def replace_sequential_forward(experts: Any, balance: LayerBalance) -> None:
    """Let a ``SequentialMLP`` compute all slots of its rank; its modules stay as they are."""
    experts.forward = _SequentialSlots(experts, balance)


def replace_grouped_forward(experts: Any, balance: LayerBalance) -> None:
    """Let a ``TEGroupedMLP`` compute all slots of its rank; its modules stay as they are."""
    slots: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        slots.clear()
        try:
            output, bias = type(experts).forward(experts, *args, **kwargs)
            return attach(output, slots, balance.batch_plan), bias
        finally:
            slots.clear()

    experts.forward = forward
    for linear in (experts.linear_fc1, experts.linear_fc2):
        linear.forward = partial(_call_grouped_linear, linear, balance, slots)


class _SequentialSlots:
    """The forward pass of ``SequentialMLP`` over its own experts and copies of others.

    Its own code runs, on a list of experts that is longer. Copies come last, and the weights are
    sent when the first of them is called: a hook before an expert's call, by which the distributed
    optimizer waits for its parameters, has then run for all of them.
    """

    def __init__(self, experts: Any, balance: LayerBalance) -> None:
        self.experts, self.balance = experts, balance
        self.n_redundant = balance.plan.n_redundant
        self.view = copy.copy(experts)
        self.view.__dict__["_modules"] = {}
        self.view.__dict__["num_local_experts"] = len(experts.local_experts) + self.n_redundant
        self.template = _copy_structure(experts.local_experts[0])
        self.names = [_split(name) for name, _ in experts.local_experts[0].named_parameters()]
        self.targets: list[tuple[dict[str, Any], str]] = [
            (cast(Any, self.template.get_submodule(path)._parameters), name)
            for path, name in self.names
        ]
        self.sources = [
            [(expert.get_submodule(path), name) for expert in experts.local_experts]
            for path, name in self.names
        ]
        self._clear_template()

    def __call__(
        self, hidden: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        slots: list[torch.Tensor] = []
        copies = [partial(self._call_copy, slots, i) for i in range(self.n_redundant)]
        self.view.__dict__["config"] = self.experts.config
        self.view.__dict__["training"] = self.experts.training
        self.view.__dict__["local_experts"] = [*self.experts.local_experts, *copies]
        try:
            output, bias = type(self.experts).forward(self.view, hidden, tokens_per_expert, probs)
        finally:
            self.view.__dict__["local_experts"] = []
        return attach(output, slots, self.balance.batch_plan), bias

    def _call_copy(
        self, slots: list[torch.Tensor], number: int, tokens: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Compute a redundant slot's tokens; without any, only take part in the exchange."""
        if self.balance.idle:
            return tokens, None  # all tokens are at home
        if not slots:
            weights = [[module._parameters[name] for module, name in row] for row in self.sources]
            slots.extend(copy_weights(self.balance.batch_plan, weights))
        if not len(tokens):
            return tokens, None
        for (parameters, name), stacked in zip(self.targets, slots, strict=True):
            parameters[name] = _take_row(stacked, number)
        try:
            result: tuple[torch.Tensor, Any] = self.template(tokens, probs)
        finally:
            self._clear_template()
        return result

    def _clear_template(self) -> None:
        """Let weights go that a call used."""
        for parameters, name in self.targets:
            parameters[name] = None


def _take_row(stacked: torch.Tensor, number: int) -> torch.Tensor:
    """Return a row; of a single one the gradient is a view too, and not a copy into zeros."""
    return stacked.squeeze(0) if len(stacked) == 1 else stacked[number]


def _split(name: str) -> tuple[str, str]:
    """Split a parameter's name into the module's and its own."""
    path, _, last = name.rpartition(".")
    return path, last


def _copy_structure(module: nn.Module) -> nn.Module:
    """Copy modules but no parameters; hooks stay behind, since they concern parameters."""
    twin = copy.copy(module)
    state: dict[str, Any] = twin.__dict__
    state["_parameters"] = dict(module._parameters)
    state["_modules"] = {
        name: None if child is None else _copy_structure(child)
        for name, child in module._modules.items()
    }
    for name in list(state):
        if name.startswith("_") and name.endswith(("_hooks", "_hooks_with_kwargs")):
            state[name] = OrderedDict()
    return twin


def _call_grouped_linear(
    linear: Any,
    balance: LayerBalance,
    slots: list[torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call a grouped linear whose parameters are ``weight{i}`` and, with a bias, ``bias{i}``."""
    kinds = [kind for kind in ("weight", "bias") if f"{kind}0" in linear._parameters]
    plan = balance.batch_plan
    weights = [[linear._parameters[f"{kind}{i}"] for i in range(plan.n_local)] for kind in kinds]
    copies = copy_weights(plan, weights)
    slots.extend(copies)
    forward: Callable[..., Any] = type(linear).forward
    with _lend_slots(linear, kinds, copies, plan.n_local):
        return forward(linear, *args, **kwargs)


@contextlib.contextmanager
def _lend_slots(
    linear: Any, kinds: list[str], copies: tuple[torch.Tensor, ...], n_local: int
) -> Iterator[None]:
    """Give a grouped linear the weights of redundant slots for a call."""
    lent: list[tuple[dict[str, Any], str]] = []
    n_redundant = len(copies[0])
    # Without a bias, Transformer Engine keeps an empty tensor in its place.
    empty = linear.__dict__.get("bias0")
    try:
        for i in range(n_redundant):
            for kind, stacked in zip(kinds, copies, strict=True):
                lent.append((linear._parameters, f"{kind}{n_local + i}"))
                linear._parameters[lent[-1][1]] = _take_row(stacked, i)
            if empty is not None:
                lent.append((linear.__dict__, f"bias{n_local + i}"))
                linear.__dict__[lent[-1][1]] = empty
        linear.num_gemms = n_local + n_redundant
        yield
    finally:
        linear.num_gemms = n_local
        for where, name in lent:
            where.pop(name, None)
