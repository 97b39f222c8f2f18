"""Record the expert loads of a model of transformers: hooks around a `Recorder`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lplb_triton.traces.record import Recorder

__all__ = ["ModelRecorder", "record"]

# Names of the experts per token in the configurations of models.
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "num_experts_per_token",
)
# Names of the width of the model and of the inner width of an expert in experts modules.
_WIDTH_NAMES = {
    "hidden": ("hidden_dim", "hidden_size"),
    "inner": ("intermediate_dim", "intermediate_size"),
}


def record(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    every: int = 1,
    max_batches: int = 1024,
    flush_every: int = 64,
    rank: int | None = None,
    world_size: int | None = None,
    meta: dict[str, Any] | None = None,
) -> ModelRecorder:
    """Record which experts the tokens of a model go to, in every forward pass from now on.

    Every forward pass of ``model`` is one batch of the trace, in training (each micro-batch of an
    accumulation is one), in evaluation and in ``generate``. What gradient checkpointing computes
    again is not counted again, and a forward pass that fails is left out. With expert parallelism
    every rank records the logical experts of its own tokens, before they are sent, into a file of
    its own (`lplb_triton.traces.record.merge` puts the files together); ranks of a tensor-parallel
    group, which hold the same batch, each count their part of it.

    Parameters
    ----------
    model
        The module that the script calls, so the outermost one: a model of transformers 5 or newer,
        or a wrapper around it.
    path
        File to write, ending in ``.npz``; with several processes a file for each rank, such as
        ``trace.rank00003.npz``.
    every, max_batches, flush_every, rank, world_size
        As for `lplb_triton.traces.record.Recorder`.
    meta
        Stored with the trace beside ``model``, ``layer_names`` and, where the model says them,
        ``top_k``, ``hidden`` (width of the model) and ``inner`` (inner width of an expert); these
        come first, and ``meta`` replaces them.

    Returns
    -------
    ModelRecorder
        To be used in a ``with`` block, or closed by its ``close``. Until then nothing is written.

    Raises
    ------
    TypeError
        If ``model`` is no `torch.nn.Module`.
    ValueError
        If the model has no experts module, its layers have different numbers of experts, its
        layers are spread over ranks (pipeline parallelism), or its expert parallelism hands the
        experts local ids, as older releases of transformers do; or as for `Recorder`.
    OSError
        If the file can't be written where ``path`` says.

    Examples
    --------
    .. code-block:: python

        from lplb_triton.integrations.transformers import record

        with record(model, "trace.npz"):
            model.generate(**inputs)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    experts = find_experts(model)
    n_experts = _count_experts(experts)
    part, parts = _find_part(model)
    found: dict[str, Any] = {"model": type(model).__name__, "layer_names": list(experts)}
    first = next(iter(experts.values()))
    found.update(_read_widths(first))
    top_k = _read_top_k(first)
    if top_k is not None:
        found["top_k"] = top_k
    recorder = Recorder(
        path,
        n_experts,
        len(experts),
        adds_per_step=None,
        every=every,
        max_batches=max_batches,
        flush_every=flush_every,
        rank=rank,
        world_size=world_size,
        meta={**found, **(meta or {})},
    )
    return ModelRecorder(model, experts, recorder, part, parts)


class ModelRecorder:
    """The hooks of `record`, which makes it, and the recorder behind them.

    Attributes
    ----------
    recorder : Recorder
        What counts and writes.
    layers : tuple of str
        The names of the experts modules in the model; their order is that of the trace's layers.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: dict[str, nn.Module],
        recorder: Recorder,
        part: int,
        parts: int,
    ) -> None:
        self.recorder, self.layers = recorder, tuple(experts)
        self._part, self._parts = part, parts
        self._device: torch.device | None = None
        self._inside = False
        self._handles = [
            model.register_forward_pre_hook(_keep_eager(self._begin), prepend=True),
            model.register_forward_hook(_keep_eager(self._end)),
        ]
        for layer, module in enumerate(experts.values()):
            hook = _keep_eager(_LayerHook(self, layer).count)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def path(self) -> Path:
        """The file of this rank."""
        return self.recorder.path

    def __enter__(self) -> ModelRecorder:
        """Return the recorder of the model."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks and write the file, as `Recorder.__exit__` does."""
        self._remove_hooks()
        self.recorder.__exit__(kind, error, trace)

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write the batches so far, as `Recorder.save` does; recording goes on."""
        self.recorder.save(path)

    def close(self) -> None:
        """Remove the hooks and write the file, as `Recorder.close`; a second call does nothing."""
        self._remove_hooks()
        self.recorder.close()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._inside:
            # The last forward pass failed, so that its counts are incomplete.
            self.recorder.discard()
            self._inside = False

    def _begin(self, *_: object) -> None:
        """Begin a batch before a forward pass of the model."""
        if _is_recomputed():
            return
        if self._inside:
            # The forward pass before this one raised, since it never came to its end.
            self.recorder.discard()
        self._inside = True

    def _end(self, *_: object) -> None:
        """End the batch after a forward pass of the model."""
        if not _is_recomputed():
            self._inside = False
            self.recorder.step()

    def count(self, layer: int, module: nn.Module, ids: object) -> None:
        """Count the ids that the experts of a layer were called with."""
        if _is_recomputed():
            return
        name = self.layers[layer]
        if not self._inside:
            raise RuntimeError(
                f"{name} was called outside of the forward pass of the recorded model, so its "
                "batch has no end: give record() the module that the script calls, which may be "
                "a part of the model or a wrapper around it"
            )
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.is_complex():
            kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise TypeError(
                f"{name} ({type(module).__name__}) must be called as experts(hidden_states, "
                f"top_k_index, top_k_weights) with integer ids, got {kind} for top_k_index"
            )
        ids = self._take_own(ids.detach())
        if self._device is None:
            self._device = ids.device
        # Layers may lie on several devices; the recorder counts on that of the first.
        self.recorder.add(layer, ids.to(self._device, torch.int64, non_blocking=True))

    def _take_own(self, ids: torch.Tensor) -> torch.Tensor:
        """Take the tokens that are counted here where several ranks hold the same batch."""
        if isinstance(ids, DTensor):
            sharded = any(placement.is_shard() for placement in ids.placements)
            ids = ids.to_local()
            if sharded:
                return ids
        if self._parts == 1:
            return ids
        each = -(-len(ids) // self._parts)
        return ids[self._part * each : (self._part + 1) * each]


class _LayerHook:
    """The hook of one experts module."""

    def __init__(self, recorder: ModelRecorder, layer: int) -> None:
        self._recorder, self._layer = recorder, layer

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the ids of a call of the module."""
        ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        self._recorder.count(self._layer, module, ids)


def _keep_eager(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep a hook from being compiled with its module, which would be done anew for each batch."""
    eager: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return eager


def _is_recomputed() -> bool:
    """Say whether this thread is within a backward pass, where checkpointing runs layers again."""
    return torch._C._current_graph_task_id() != -1


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Find the experts modules of a model of transformers by name, in the model's order.

    Raises
    ------
    ValueError
        If there is none.
    """
    experts = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_is_expert_parallel")
    }
    if not experts:
        raise ValueError(
            f"model ({type(model).__name__}) has no experts module as those of transformers 5 "
            "and newer, which are called as experts(hidden_states, top_k_index, top_k_weights)"
        )
    return experts


def _count_experts(experts: dict[str, nn.Module]) -> int:
    """Return the number of logical experts, which must be the same in every layer."""
    counts = {name: _count_logical(name, module) for name, module in experts.items()}
    first, n_experts = next(iter(counts.items()))
    for name, other in counts.items():
        if other != n_experts:
            raise ValueError(
                "model must have the same number of experts in every layer: "
                f"{first} has {n_experts}, {name} has {other}"
            )
    return n_experts


def _count_logical(name: str, module: nn.Module) -> int:
    """Return the number of logical experts of a module, whose own number may be a rank's part."""
    if not module._is_expert_parallel:
        return int(module.num_experts)  # type: ignore[arg-type]
    if "forward" not in vars(module):
        raise ValueError(
            f"{name} is expert-parallel and called with the local ids of its rank, from which "
            "logical ones can't be told: record without expert parallelism, or use a release of "
            "transformers that has the style ep_dispatch_experts, such as 5.24"
        )
    # The shape of a parameter that is sharded over ranks is that of the whole.
    shapes = [p.shape for p in module.parameters(recurse=False) if isinstance(p, DTensor)]
    if not shapes:
        raise ValueError(f"{name} is expert-parallel, but none of its parameters is a DTensor")
    return shapes[0][0]


def _find_part(model: nn.Module) -> tuple[int, int]:
    """Return which part of a batch this rank counts, and of how many ranks that hold the batch."""
    for module in model.modules():
        meshes = getattr(module, "_mesh_manager", None)
        if meshes is None:
            continue
        if meshes.get_mesh("pp").size() > 1:
            raise ValueError(
                "model must not be pipeline-parallel: a trace has all layers, and a rank of it "
                "some of them"
            )
        mesh = meshes.get_mesh("tp")
        return mesh.get_local_rank(), mesh.size()
    return 0, 1


def _read_top_k(module: nn.Module) -> int | None:
    """Return the experts per token by the configuration of an experts module, if it says so."""
    config = getattr(module, "config", None)
    for name in _TOP_K_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _read_widths(module: nn.Module) -> dict[str, int]:
    """Return the widths that an experts module says, in the words of a trace."""
    found = {}
    for width, names in _WIDTH_NAMES.items():
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int) and value > 0:
                found[width] = value
                break
    return found
