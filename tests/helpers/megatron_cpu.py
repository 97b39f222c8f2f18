"""Megatron-Core on a CPU, over gloo: what its code asks of CUDA, and small models in float64.

`pretend_cuda` changes torch and Megatron, so it is for processes that end with a test.
"""

import contextlib
import functools
import inspect
import re
import zlib

import torch
import torch.distributed as dist


class _Stream:
    """A stream or an event that has nothing to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    wait_event = record = record_stream = wait_stream

    def record_event(self, event=None):
        return event or _Stream()

    def synchronize(self):
        pass

    def query(self):
        return True


def _on_cpu(make):
    """A factory of tensors that takes the CPU for CUDA."""

    @functools.wraps(make)
    def made(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda") or isinstance(
            kwargs.get("device"), int
        ):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


def pretend_cuda():
    """Let Megatron's MoE layers, models and optimizers run on tensors of the CPU."""
    stream = _Stream()
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    for name in ("tensor", "zeros", "empty", "ones", "full", "arange", "zeros_like", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    plain_type = torch.Tensor.type
    # Optimizers tell parameters apart by the name of their type on a GPU.
    torch.Tensor.type = lambda self, *args, **kwargs: (
        plain_type(self, *args, **kwargs)
        if args or kwargs
        else plain_type(self).replace("torch.", "torch.cuda.")
    )
    for name in ("Float", "Int", "Long", "BFloat16"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))

    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # 0.16.1 forgets this name where there is no Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **kwargs: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def start(expert_parallel):
    """Set Megatron's process groups up, of ranks that gloo connects."""
    pretend_cuda()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
    random.initialize_rng_tracker()
    random.get_cuda_rng_tracker().add(random.get_expert_parallel_rng_tracker_name(), 1)
    random.get_cuda_rng_tracker().add("model-parallel-rng", 2)


def stop():
    """Let go of Megatron's process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    with contextlib.suppress(AttributeError):
        parallel_state.destroy_global_memory_buffer()


def make_config(dtype=torch.float64, **settings):
    """A configuration of two small layers with eight experts, two of them for each token."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = dict(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        moe_ffn_hidden_size=24,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    if dtype == torch.float64 and "moe_router_dtype" not in settings:
        given["moe_router_dtype"] = None
    return TransformerConfig(**{**given, **settings})


def _seeded(name, like):
    """Numbers that depend on the name only, so that every way of sharding gives the same model."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64) * 0.3


def fill(model):
    """Give a model weights that don't depend on who has which expert, and a skewed router."""
    from megatron.core import parallel_state

    rank = parallel_state.get_expert_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            own = 8 // parallel_state.get_expert_model_parallel_world_size()
            expert = re.search(r"local_experts\.(\d+)|linear_fc\d\.(?:weight|bias)(\d+)$", name)
            if expert:
                number = int(expert[1] or expert[2])
                name = f"{name.replace(str(number), '')} of {rank * own + number}"
            parameter.copy_(_seeded(name, parameter))
            if "router.weight" in name:
                parameter.add_(torch.linspace(0.6, 0, 8, dtype=torch.float64)[:, None])


def make_layer(dtype=torch.float64, **settings):
    """An MoE layer by itself, with the weights that `fill` gives it."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    config = make_config(dtype, **settings)
    spec = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    if "submodules" in inspect.signature(MoELayer.__init__).parameters and hasattr(
        spec, "submodules"
    ):
        layer = MoELayer(config, spec.submodules, layer_number=1)
    else:
        layer = spec(config, layer_number=1)
    fill(layer)
    return layer


class _GroupedLinear(torch.nn.Module):
    """Has the parameters and the forward method of Transformer Engine's grouped linears."""

    def __init__(
        self, num_gemms, input_size, output_size, *, config, bias, skip_bias_add, **kwargs
    ):
        super().__init__()
        self.num_gemms, self.use_bias, self.returns_bias = num_gemms, bias, skip_bias_add and bias
        for i in range(num_gemms):
            shape = output_size, input_size
            weight = torch.empty(shape, dtype=config.params_dtype)
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight))
            if bias:
                offset = torch.empty(output_size, dtype=config.params_dtype)
                self.register_parameter(f"bias{i}", torch.nn.Parameter(offset))
            else:
                setattr(self, f"bias{i}", torch.Tensor())
        for parameter in self.parameters():
            parameter.allreduce = config.expert_model_parallel_size == 1

    def forward(self, x, m_splits):
        assert len(m_splits) == self.num_gemms
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        parts = [a @ w.t() for a, w in zip(x.split(m_splits), weights, strict=True)]
        if self.use_bias and not self.returns_bias:
            parts = [a + b for a, b in zip(parts, biases, strict=True)]
        return torch.cat(parts), biases if self.returns_bias else None


def make_grouped_layer(dtype=torch.float64, **settings):
    """An MoE layer with Megatron's ``TEGroupedMLP`` over stand-ins of its grouped linears."""
    from megatron.core.transformer.moe import experts
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    settings = {"add_bias_linear": True, "bias_dropout_fusion": False, **settings}
    layer = make_layer(dtype, **settings)
    kinds = [getattr(experts, name, None) for name in ("GroupedMLPSubmodules", "MLPSubmodules")]
    submodules = next(kind for kind in kinds if kind is not None)(
        linear_fc1=_GroupedLinear, linear_fc2=_GroupedLinear
    )
    layer.experts = experts.TEGroupedMLP(
        layer.num_local_experts, layer.config, submodules, pg_collection=get_default_pg_collection()
    )
    fill(layer)
    return layer


def make_model(dtype=torch.float64, **settings):
    """A GPT of two MoE layers, with the weights that `fill` gives it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = make_config(dtype, **settings)
    spec = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=16)
    fill(model)
    return model.to(dtype)


def run_layer(layer, seed, tokens=24, offset=0.3):
    """Run a layer on a batch that is the rank's own; returns its input, output and a loss."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    dtype = next(layer.parameters()).dtype
    x = torch.randn(tokens, 2, 16, generator=generator, dtype=torch.float64) + offset
    x = x.to(dtype).requires_grad_()
    output, _ = layer(x)
    weights = torch.linspace(-1, 1, 16, dtype=torch.float64)
    return x, output, (output.double() * weights).square().mean()


def run_model(model, seed, length=16):
    """Return a model's mean loss over a batch that is the rank's own."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    ids = torch.randint(0, 32, (2, length), generator=generator)
    # Some ids are frequent, as words are.
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids % 4, ids)
    positions = torch.arange(length).expand(2, -1)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return model(ids, positions, mask, labels=ids.roll(-1, 1)).double().mean()


def gradients(model):
    """Gradients of all parameters by name; every parameter must have one."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare_pass(plain, ours, run, step):
    """Run one pass of both models; return the worst difference of their gradients."""
    for model in (plain, ours):
        model.zero_grad()
        run(model, step).backward()
    return worst_difference(gradients(plain), gradients(ours))


def worst_difference(plain, other):
    """The largest difference, relative to the largest number of its tensor, over all ranks."""
    worst = torch.zeros((), dtype=torch.float64)
    for name, want in plain.items():
        scale = want.abs().max().clamp(min=1e-30)
        worst = torch.maximum(worst, ((want - other[name]).abs().max() / scale).double())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)
