"""Expert balancing inside Megatron-Core: replicas of experts, filled by an LP for every batch.

Parameters stay Megatron's own, in logical order: data parallelism, the distributed optimizer,
gradient clipping and (distributed) checkpoints see an ordinary model with expert parallelism.
Replicas' weights are sent when a layer runs, and their gradients are sent home when its backward
pass does (see `lplb_triton.spread`).

``SequentialMLP`` was run as it is, with megatron-core 0.16.1 and 0.19.2. The grouped linears of
``TEGroupedMLP`` are called with more weights; that was tested with stand-ins that have the
parameters (``weight0``, ``bias0`` ..) and the forward method of Transformer Engine's, not with
Transformer Engine itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lplb_triton._checks import check_integer, check_number
from lplb_triton.integrations._layer import (
    BALANCE_ABOVE,
    Imbalance,
    LayerBalance,
    measure_imbalance,
    rebalance_layers,
)
from lplb_triton.integrations._megatron_checks import check_layer, import_megatron
from lplb_triton.integrations._megatron_layer import balance_layer
from lplb_triton.placement.arguments import check_live_slots

__all__ = ["Balancing", "balance"]


class Balancing:
    """What `balance` returns: call `step` once per optimizer step, or as often as you like.

    Attributes
    ----------
    layers : dict[str, LayerBalance]
        The balanced layers of this rank by name, such as ``"decoder.layers.3.mlp"``.
    every : int
        Steps between placements.
    """

    def __init__(self, layers: dict[str, LayerBalance], every: int) -> None:
        self.layers, self.every = layers, every
        self._iteration: int | None = None
        self._steps = 0

    def measure(self) -> dict[str, Imbalance]:
        """Return each layer's imbalance over its latest batches, at most eight.

        Collective over each layer's EP group; it waits for the device.
        """
        found = measure_imbalance(self.layers.values())
        return dict(zip(self.layers, found, strict=True))

    def step(
        self,
        iteration: int | None = None,
        *,
        writer: Any = None,
        wandb_writer: Any = None,
        per_layer_logging: bool = False,
    ) -> dict[str, float]:
        """Place copies anew after the first optimizer step and then after every ``every`` steps.

        Call it after the optimizer's step. Where there is no place for that, as with Megatron-LM's
        ``pretrain``, call it with the iteration's number at the head of ``forward_step``: only the
        first call with another number than before counts as a step. No graph may be alive.
        When it places copies it is collective over the EP groups, and waits for the device.

        Parameters
        ----------
        iteration : int or None
            Number of the step, for ``writer`` and to tell steps apart; None counts calls.
        writer : SummaryWriter or None
            As of Megatron-LM's ``get_tensorboard_writer()``.
        wandb_writer : wandb run or None
            As of Megatron-LM's ``get_wandb_writer()``.
        per_layer_logging : bool
            Whether layers are written too, as by Megatron's ``--moe-per-layer-logging``.

        Returns
        -------
        dict[str, float]
            Empty unless copies were placed. ``moe_imbalance_before`` and ``moe_imbalance_after``:
            largest load of a rank over the mean one, without and with replicas, over the latest
            batches and the layers of this rank; and ``moe/imbalance_before_layer_{i}`` ..
        """
        if iteration is None:
            self._steps += 1
        elif self._iteration is None:
            # With a number, the first call stands before the first step.
            self._iteration = iteration
        elif iteration != self._iteration:
            self._iteration = iteration
            self._steps += 1
        else:
            return {}
        if self._steps == 0 or (self._steps - 1) % self.every or not self.layers:
            return {}
        imbalance = self.measure()
        rebalance_layers(self.layers.values())
        scalars = _name_scalars(list(imbalance.values()))
        number = self._steps if iteration is None else iteration
        written = scalars if per_layer_logging else dict(list(scalars.items())[:2])
        if writer is not None:
            for name, value in written.items():
                writer.add_scalar(name, value, number)
        if wandb_writer is not None:
            wandb_writer.log(written, number)
        return scalars


def balance(
    model: nn.Module | Sequence[nn.Module],
    redundant: int = 1,
    *,
    live: int = 0,
    every: int = 100,
    balance_above: float = BALANCE_ABOVE,
) -> Balancing:
    """Give the MoE layers of a Megatron-Core model replicas, and balance every batch by an LP.

    Call it in the script's model provider, before data parallelism wraps the model, on all ranks.
    It is collective over the EP groups. A pipeline stage without MoE layers has nothing to do.

    Parameters
    ----------
    model : torch.nn.Module, or sequence of torch.nn.Module
        A model, or the chunks of a virtual pipeline.
    redundant : int
        Slots for copies per rank and layer, at least 1, or 0 with live slots.
    live : int
        Live slots per rank and layer, 0 to 2, which each batch fills with the experts that it
        needs. The host waits for the device in every layer then.
    every : int
        Steps after which `Balancing.step` places copies anew.
    balance_above : float
        A layer whose imbalance without replicas is at or below this when copies are placed routes
        every token home until they are placed again, and sends no weights.

    Returns
    -------
    Balancing

    Raises
    ------
    ImportError
        Without megatron-core.
    TypeError
        If ``model`` isn't a module or modules.
    ValueError
        Naming a setting that can't be had together with replicas, and its layer; no layer is
        changed then.

    Examples
    --------
    .. code-block:: python

        model = GPTModel(config, ...)
        balancing = balance(model, redundant=1, every=100)
        ...
        optimizer.step()
        balancing.step(iteration, writer=tensorboard_writer)
    """
    live = check_live_slots(live, 1, "live")
    redundant = check_integer("redundant", redundant, 0 if live else 1)
    every = check_integer("every", every, 1)
    found = list(_find_layers(model))
    for label, layer in found:
        check_layer(label, layer)
    above = check_number("balance_above", balance_above)
    layers = {label: balance_layer(label, layer, redundant, live, above) for label, layer in found}
    return Balancing(layers, every)


def _find_layers(model: nn.Module | Sequence[nn.Module]) -> Iterable[tuple[str, Any]]:
    """Find the MoE layers, each with a name of its own."""
    moe_layer = import_megatron("transformer.moe.moe_layer").MoELayer
    chunks = [model] if isinstance(model, nn.Module) else model
    if not isinstance(chunks, Sequence) or not all(isinstance(c, nn.Module) for c in chunks):
        raise TypeError(f"model must be a module or a list of them, got {type(model).__name__}")
    for i, chunk in enumerate(chunks):
        prefix = f"{i}." if len(chunks) > 1 else ""
        for name, module in chunk.named_modules():
            if isinstance(module, moe_layer):
                yield prefix + name, module


def _name_scalars(layers: list[Imbalance]) -> dict[str, float]:
    """Name the numbers that are logged, the means of the layers first."""
    sides = Imbalance._fields
    scalars = {
        f"moe_imbalance_{side}": sum(getattr(one, side) for one in layers) / len(layers)
        for side in sides
    }
    for i, one in enumerate(layers):
        for side in sides:
            scalars[f"moe/imbalance_{side}_layer_{i}"] = getattr(one, side)
    return scalars
