"""Replicas of experts in models of transformers: expert-parallel implementation ``"lplb"``.

Importing this module registers it, with one redundant slot per rank::

    import lplb_triton.integrations.transformers

    model = AutoModelForCausalLM.from_pretrained(
        ..., distributed_config=DistributedConfig(
            ep_size=8, fsdp_size=8, ep_implementation="lplb"))

Parameters stay where transformers has them, so that FSDP, the optimizer and checkpoints see plain
expert parallelism; see docs/frameworks.md. transformers 5.24 or newer is needed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lplb_triton._checks import check_integer, check_number
from lplb_triton.integrations import layers as balanced_layers
from lplb_triton.integrations._layer import BALANCE_ABOVE
from lplb_triton.integrations._transformers_record import ModelRecorder, record
from lplb_triton.integrations.layers import Imbalance
from lplb_triton.placement.arguments import check_live_slots

try:
    from transformers import TrainerCallback
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from lplb_triton.integrations._transformers_experts import BalancedEP, find_layers
except ImportError as error:
    raise ImportError(
        "lplb_triton.integrations.transformers needs transformers 5.24 or newer: "
        "pip install 'lplb_triton[integrations]' (Python 3.11 or newer)"
    ) from error

__all__ = [
    "Imbalance",
    "ModelRecorder",
    "Rebalance",
    "measure_imbalance",
    "rebalance",
    "record",
    "register",
]


def register(
    name: str = "lplb",
    *,
    redundant: int = 1,
    balance_above: float = BALANCE_ABOVE,
    live: int = 0,
) -> None:
    """Register an expert-parallel implementation of transformers with replicas.

    Models that are loaded from now on find it by its name. Importing this module registers
    ``"lplb"`` with one redundant slot.

    Parameters
    ----------
    name : str
        For ``DistributedConfig(ep_implementation=name)``.
    redundant : int
        Redundant slots per rank: copies of other ranks' experts that each rank holds per layer.
    balance_above : float
        A layer whose imbalance without replicas is at or below this when it is rebalanced routes
        every token home until the next time, and sends no weights.
    live : int
        Live slots per rank, 0 to 2, which hold the experts that a batch needs beyond the redundant
        slots. Weights of all slots are put together in each forward pass then, also where the
        parameters' memory would be extended without live slots.

    Raises
    ------
    TypeError, ValueError
        If ``name`` isn't a string, ``redundant`` isn't an integer of at least 1,
        ``balance_above`` isn't a number of at least 0, or ``live`` isn't 0, 1 or 2.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    slots = check_integer("redundant", redundant, 1)
    above = check_number("balance_above", balance_above)
    n_live = check_live_slots(live, 1, "live")
    made = functools.partial(BalancedEP, redundant=slots, balance_above=above, live=n_live)
    EPImplementationInterface.register(name, made)


def rebalance(model: torch.nn.Module, load: torch.Tensor | None = None) -> None:
    """Choose the experts that have copies anew, in every MoE layer; collective.

    All ranks call it, between optimizer steps, when no graph is alive. Nothing moves: the next
    forward pass sends the weights of other experts.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded with ``ep_implementation="lplb"``.
    load : torch.Tensor or None
        ``[n_layers, n_experts]``, non-negative loads of experts to place copies by, the same on
        all ranks, such as those of a recorded trace. Before the first forward pass it makes the
        first placement. None takes the loads since the last call; layers without any stay.

    Raises
    ------
    TypeError, ValueError
        If the model has no such layer, or ``load`` doesn't fit.
    """
    layers = find_layers(model)
    if load is not None:
        if not isinstance(load, torch.Tensor):
            raise TypeError(f"load must be a tensor, got {type(load).__name__}")
        shape = (len(layers), next(iter(layers.values())).n_experts)
        if load.shape != shape:
            raise ValueError(
                f"load must have shape {shape}, a row for each MoE layer and a column for each "
                f"expert, got {tuple(load.shape)}"
            )
        for layer, row in zip(layers.values(), load.cpu(), strict=True):
            layer.use_load(row)
        return
    made = [layer.balance for layer in layers.values() if layer.balance is not None]
    balanced_layers.rebalance_layers(made)


def measure_imbalance(model: torch.nn.Module) -> dict[str, Imbalance]:
    """Return each MoE layer's imbalance over its latest batches, at most eight; collective.

    All ranks call it. It waits for the device.

    Parameters
    ----------
    model : torch.nn.Module
        Loaded with ``ep_implementation="lplb"``.

    Returns
    -------
    dict of str to Imbalance
        By name of the experts module: largest load of a rank over the mean one, ``before`` with
        every token on its expert's home rank, and ``after`` with replicas. Layers that have not
        run are left out.
    """
    layers = {
        name: layer.balance
        for name, layer in find_layers(model).items()
        if layer.balance is not None
    }
    return dict(zip(layers, balanced_layers.measure_imbalance(layers.values()), strict=True))


class Rebalance(TrainerCallback):  # type: ignore[misc]
    """Callback of transformers' Trainer that rebalances, and logs imbalances.

    ``imbalance_before`` and ``imbalance_after`` join every log of training steps: the mean over
    MoE layers of `measure_imbalance`. Callbacks that stand before this one in the Trainer's list
    have read the log by then.

    Parameters
    ----------
    every : int
        Optimizer steps from one rebalancing to the next.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = check_integer("every", every, 1)
        self._measured: dict[str, float] = {}

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        """Rebalance where that is due; what has been measured until then is kept for the log."""
        if state.global_step % self.every == 0:
            self._measure(model)
            rebalance(model)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any],
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Add the imbalances to a log of training steps, which every rank makes."""
        if "loss" in logs:
            self._measure(model)
            logs.update(self._measured)
            state.log_history[-1].update(self._measured)

    def _measure(self, model: torch.nn.Module) -> None:
        """Measure imbalances; collective. The former ones stay if no layer has run since."""
        found = list(measure_imbalance(model).values())
        if found:
            self._measured = {
                "imbalance_before": sum(one.before for one in found) / len(found),
                "imbalance_after": sum(one.after for one in found) / len(found),
            }


register()
