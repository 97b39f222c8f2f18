"""vLLM 0.32.0's EPLB on CPUs over gloo: shims, a tiny MoE model, and a run that a test judges.

Run by torchrun, a process per rank. ``RECORDS`` is a file for what each rank saw; the class that
vLLM takes as its policy is what its own plugins registered.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch

LAYERS, LOGICAL, REDUNDANT, RANKS = 2, 8, 4, 2
PHYSICAL = LOGICAL + REDUNDANT
LOCAL = PHYSICAL // RANKS
# Two parameters of an expert, with shapes and dtypes of their own.
SHAPES = (((3, 5), torch.float32), ((7,), torch.bfloat16))
CHOICES, WINDOW, INTERVAL = 1000, 2, 40
# How popular experts are in the first layer; in the second, they are two places further on. vLLM
# starts with the two popular ones on one rank only, and a placement that was made for them has one
# copy of the expert that is popular afterwards.
POPULARITY = ((1, 1, 1, 1, 6, 6, 1, 1), (1, 20, 1, 1, 1, 1, 1, 1))
PHASES = len(POPULARITY)


def make_weights():
    """Return the logical experts' parameters, ``[layer][parameter]``, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(LOGICAL, *shape, generator=generator).to(dtype) for shape, dtype in SHAPES]
        for _ in range(LAYERS)
    ]


def draw_choices(phase, rank):
    """Return the experts that a rank's tokens choose, ``[layers, choices]``."""
    generator = torch.Generator().manual_seed(100 * phase + rank)
    popularity = torch.tensor(POPULARITY[phase], dtype=torch.float32)
    chosen = [
        torch.multinomial(popularity.roll(2 * layer), CHOICES, True, generator=generator)
        for layer in range(LAYERS)
    ]
    return torch.stack(chosen)


class Event:
    """An event of a device without streams: whatever was issued before has ended."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        pass

    def wait(self, *_):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, _):
        return 0.0


class Stream:
    """A stream of such a device."""

    def __init__(self, *_, **__):
        pass

    def synchronize(self):
        pass


def apply_shims():
    """Give vLLM the events and streams that it asks of an accelerator."""
    torch.Event, torch.Stream = Event, Stream
    torch.accelerator.current_stream = lambda *_: Stream()
    torch.accelerator.set_stream = lambda *_: None
    torch.accelerator.set_device_index = lambda *_: None


def make_model(rank):
    """Return a model that has of vLLM's ``MixtureOfExperts`` what EPLB uses, and no more."""
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.models.interfaces import MixtureOfExperts

    class Layer:
        def __init__(self, weights):
            slots = torch.arange(rank * LOCAL, (rank + 1) * LOCAL) % LOGICAL
            self.weights = [weight[slots].clone() for weight in weights]
            self.eplb_state = EplbLayerState()

        def get_expert_weights(self):
            return self.weights

        def set_eplb_state(self, moe_layer_idx, **tensors):
            self.eplb_state.set_layer_state(moe_layer_idx, **tensors)

        def route(self, logical):
            """Send an expert's choices to its copies in turn, and count them as vLLM's router."""
            state = self.eplb_state
            turn = torch.arange(len(logical)) % state.logical_replica_count[logical]
            physical = state.logical_to_physical_map[logical, turn]
            counts = torch.bincount(physical, minlength=PHYSICAL)
            if bool(state.should_record_tensor):
                state.expert_load_view += counts.int()
            return counts

    class Model(MixtureOfExperts):
        num_moe_layers, num_expert_groups, num_shared_experts = LAYERS, 1, 0
        num_logical_experts = num_routed_experts = LOGICAL
        num_redundant_experts, num_physical_experts = REDUNDANT, PHYSICAL
        num_local_physical_experts = LOCAL

        def __init__(self):
            self.moe_layers = [Layer(weights) for weights in make_weights()]

        def route(self, choices):
            pairs = zip(self.moe_layers, choices, strict=True)
            return torch.stack([layer.route(chosen) for layer, chosen in pairs])

    return Model()


class ModelConfig:
    """What EPLB asks of vLLM's own class: a name and a key."""

    model = "tiny"

    def compute_hash(self):
        return self.model


def describe(model_state):
    """Return copies of the maps, and of this rank's slots' weights."""
    return {
        "phy2log": model_state.physical_to_logical_map.clone(),
        "log2phy": model_state.logical_to_physical_map.clone(),
        "copies": model_state.logical_replica_count.clone(),
        "weights": [[w.clone() for w in layer] for layer in model_state.model.expert_weights],
    }


def wait_for_worker(state, model_state):
    """Step until the worker's layers have been taken over, one a step."""
    deadline = time.monotonic() + 60
    while model_state.rebalanced:
        if time.monotonic() > deadline:
            raise TimeoutError("vLLM's worker did not end its rearrangement")
        time.sleep(0.01)
        state.step(is_dummy=True)


def run(parallel, rank):
    """Route skewed choices before and after each rearrangement; return what was seen."""
    from vllm.distributed.eplb.eplb_state import EplbState

    state, config, model = EplbState(parallel, torch.device("cpu")), ModelConfig(), make_model(rank)
    state.add_model(model, config)
    state.device_index = 0
    state.start_async_loop()
    model_state = state.model_states[config.compute_hash()]
    policy = f"{state.policy.__module__}.{state.policy.__qualname__}"
    found = {"policy": policy, "is_async": state.is_async, "phases": []}
    for phase in range(PHASES):
        while state.expert_rearrangement_step < INTERVAL - WINDOW:
            state.step(is_dummy=True)
        choices, before = draw_choices(phase, rank), describe(model_state)
        for _ in range(WINDOW):
            seen = {"before": before, "counts_before": model.route(choices)}
            state.step()
        wait_for_worker(state, model_state)
        seen |= {"after": describe(model_state), "counts_after": model.route(choices)}
        found["phases"].append(seen)
    return found


def make_parallel_config(use_async):
    """Return vLLM's settings; those that it refuses on a CPU are set when it has looked."""
    from vllm.config import ParallelConfig
    from vllm.config.parallel import EPLBConfig

    eplb = EPLBConfig(
        window_size=WINDOW, step_interval=INTERVAL, use_async=use_async, communicator="torch_gloo"
    )
    parallel = ParallelConfig(
        tensor_parallel_size=RANKS, enable_expert_parallel=True, eplb_config=eplb
    )
    parallel.enable_eplb, eplb.num_redundant_experts = True, REDUNDANT
    return parallel


def main():
    """Rearrange synchronously and by vLLM's worker, and write what this rank saw."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.plugins import load_general_plugins

    rank = int(os.environ["RANK"])
    load_general_plugins()
    config = VllmConfig()
    config.parallel_config = make_parallel_config(use_async=False)
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(
            RANKS, rank, local_rank=rank, backend="gloo", timeout=timedelta(seconds=60)
        )
        parallel_state.initialize_model_parallel(RANKS)
        apply_shims()
        found = [run(make_parallel_config(use_async), rank) for use_async in (False, True)]
    torch.save(found, Path(f"{os.environ['RECORDS']}.{rank}"))
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
