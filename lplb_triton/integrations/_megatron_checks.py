"""What of Megatron-Core's settings doesn't go together with copies of experts, and why."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

__all__ = ["check_layer", "find_kind", "import_megatron"]


class _Refusal(NamedTuple):
    """A setting that is refused unless it has one of the values in ``allowed``."""

    name: str
    allowed: tuple[object, ...]
    reason: str


_OFF = (None, False)
_REFUSED = (
    _Refusal(
        "gradient_accumulation_fusion",
        _OFF,
        "its backward pass writes main_grad itself, and the gradients of copies would be lost "
        "(in Megatron-LM: --no-gradient-accumulation-fusion)",
    ),
    _Refusal("fp8", _OFF, "copies of quantized weights are not written"),
    _Refusal("fp4", _OFF, "copies of quantized weights are not written"),
    _Refusal(
        "moe_pad_expert_input_to_capacity",
        _OFF,
        "a copy would be padded to the capacity of an expert",
    ),
    _Refusal(
        "delay_wgrad_compute",
        _OFF,
        "gradients of copies have to be there when the backward pass sends them home",
    ),
    _Refusal(
        "overlap_dispatch_backward_with_experts_wgrad",
        _OFF,
        "gradients of copies have to be there when the backward pass sends them home",
    ),
    _Refusal(
        "overlap_moe_expert_parallel_comm",
        _OFF,
        "a layer's passes would run in pieces beside those of another micro-batch",
    ),
    _Refusal("use_transformer_engine_op_fuser", _OFF, "its fused experts keep their own weights"),
    _Refusal("moe_single_grouped_weight", _OFF, "copies need a weight of their own"),
    _Refusal("moe_single_grouped_bias", _OFF, "copies need a bias of their own"),
    _Refusal("fine_grained_activation_offloading", _OFF, "it was never run with copies"),
    _Refusal("moe_paged_stash", _OFF, "it was never run with copies"),
    _Refusal("enable_cuda_graph", _OFF, "a graph would replay one placement for ever"),
    _Refusal("external_cuda_graph", _OFF, "a graph would replay one placement for ever"),
    _Refusal("cuda_graph_impl", (*_OFF, "none"), "a graph would replay one placement for ever"),
    _Refusal("expert_tensor_parallel_num_weight_shards", (*_OFF, 1), "experts have to be whole"),
    _Refusal(
        "transformer_impl",
        (None, "local", "transformer_engine"),
        "its layers have dispatchers of their own",
    ),
    _Refusal(
        "moe_token_dispatcher_type",
        ("alltoall", "allgather"),
        "its buffers are made for the number of experts",
    ),
)


def import_megatron(module: str) -> Any:
    """Return a module of ``megatron.core``."""
    try:
        return importlib.import_module(f"megatron.core.{module}")
    except ImportError as error:
        raise ImportError(
            f"lplb_triton.integrations.megatron needs megatron-core: {error}"
        ) from error


def check_layer(label: str, layer: Any) -> None:
    """Raise a ValueError that names what keeps an MoE layer from having copies."""
    config, dispatcher = layer.config, layer.token_dispatcher
    for refusal in _REFUSED:
        value = getattr(config, refusal.name, refusal.allowed[0])
        if value not in refusal.allowed:
            raise ValueError(
                f"{label}: {refusal.name}={value!r} can't be balanced: {refusal.reason}"
            )
    if layer.ep_group.size() == 1:
        raise ValueError(f"{label}: expert_model_parallel_size must be at least 2, got 1")
    if dispatcher.tp_size > 1:
        raise ValueError(
            f"{label}: expert_tensor_parallel_size must be 1, got {dispatcher.tp_size}: all parts "
            "of an expert would need the same placement"
        )
    known = import_megatron("transformer.moe.token_dispatcher")
    if type(dispatcher) not in (
        known.MoEAlltoAllTokenDispatcher,
        known.MoEAllGatherTokenDispatcher,
    ):
        raise ValueError(
            f"{label}: a token dispatcher of type {type(dispatcher).__name__} can't be balanced"
        )
    for where, patched in (("token_dispatcher", dispatcher), ("experts", layer.experts)):
        if {"dispatch_preprocess", "forward"} & set(vars(patched)):
            raise ValueError(f"{label}: {where} was changed before; balance a model once")
    find_kind(label, layer.experts)


def find_kind(label: str, experts: Any) -> str:
    """Return ``"sequential"`` or ``"grouped"`` for a layer's experts, or raise a ValueError."""
    known = import_megatron("transformer.moe.experts")
    if type(experts).forward is known.SequentialMLP.forward:
        return "sequential"
    if type(experts).forward is not known.TEGroupedMLP.forward:
        raise ValueError(
            f"{label}: experts of type {type(experts).__name__} can't be balanced; SequentialMLP "
            "and TEGroupedMLP can"
        )
    for name in ("linear_fc1", "linear_fc2"):
        if "weight0" not in getattr(experts, name)._parameters:
            raise ValueError(f"{label}: {name} must have a parameter weight0, weight1 .. by expert")
    return "grouped"
