"""Section ``weights``: the cost of giving one layer's slots their weights, and of gradients."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lplb_triton import Replicas, SpreadPlan, chain, spread
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.bench.measure.timer import WrongAnswerError, compute_statistics
from lplb_triton.bench.types import Row
from lplb_triton.training.slot_memory import extend_memory
from lplb_triton.training.spread import stack_slots

__all__ = ["FORMS", "measure_weights"]

WARM_UP = 3


class Form:
    """One way to give slots their weights.

    Parameters
    ----------
    plan
        Of a placement that keeps experts at home.
    params
        This rank's originals, ``[n_local, ...]`` each.
    """

    redundant_only = False

    def __init__(self, plan: SpreadPlan, params: Sequence[torch.nn.Parameter]) -> None:
        self.plan, self.params = plan, params
        self.slots: Sequence[torch.Tensor] = ()

    def fill(self) -> None:
        """Give the slots their weights, as before a forward pass."""
        self.slots = spread(self.plan, *self.params)

    def finish(self, grads: Sequence[torch.Tensor]) -> None:
        """Return the slots' gradients, as in or after a backward pass."""
        torch.autograd.backward(self.slots, grads)
        self.slots = ()

    def gradient(self) -> torch.Tensor:
        """Return the gradient of the last original, float32."""
        grad = self.params[-1].grad
        if grad is None:
            raise WrongAnswerError("no gradient came back")
        return grad.float()

    def drop_gradients(self) -> None:
        """Forget the originals' gradients."""
        for param in self.params:
            param.grad = None


class InPlace(Form):
    """Slots whose first rows are the parameters' own memory."""

    def __init__(self, plan: SpreadPlan, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(plan, params)
        self.buffers = [extend_memory(param, plan.n_redundant) for param in params]

    def fill(self) -> None:
        """Write the redundant rows."""
        self.slots = stack_slots(self.plan, self.params, buffers=self.buffers, reuse_gradients=True)


class ByExpert(Form):
    """Redundant rows of parameters that are one tensor per expert."""

    redundant_only = True

    def __init__(self, plan: SpreadPlan, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(plan, params)
        self.parts = [[torch.nn.Parameter(row.detach()) for row in param] for param in params]

    def fill(self) -> None:
        """Receive the redundant rows."""
        self.slots = spread(self.plan, *self.parts, redundant_only=True)

    def gradient(self) -> torch.Tensor:
        """Return the gradients of the last original's parts, zeros for those without copies."""
        return torch.stack(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parts[-1]]
        ).float()

    def drop_gradients(self) -> None:
        """Forget the parts' gradients."""
        for part in (one for parts in self.parts for one in parts):
            part.grad = None


class ByReplicas(Form):
    """Leaf slots that last for a step."""

    def __init__(self, plan: SpreadPlan, params: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(plan, params)
        self.replicas = Replicas(
            plan.placement,
            {str(i): param for i, param in enumerate(params)},
            group=plan.group,
            redundant_only=self.redundant_only,
        )

    def fill(self) -> None:
        """Copy the originals to the slots."""
        self.replicas.sync_weights()
        self.slots = [self.replicas.weights[str(i)] for i in range(len(self.params))]

    def finish(self, grads: Sequence[torch.Tensor]) -> None:
        """Add the slots' gradients up."""
        for slots, grad in zip(self.slots, grads, strict=True):
            slots.grad = grad
        self.replicas.reduce_grads()


class ByRedundantReplicas(ByReplicas):
    """Leaf slots that last for a step, of the redundant slots only."""

    redundant_only = True


FORMS = {
    "stacked anew": Form,
    "in place": InPlace,
    "by expert": ByExpert,
    "Replicas": ByReplicas,
    "Replicas, rows": ByRedundantReplicas,
}


def measure_weights(worker: Worker, slots: str) -> Row:
    """Time one layer's weights to slots and gradients back, by every form; ``slots`` per rank."""
    redundant, sizes = int(slots), worker.job.sizes.training
    experts, hidden, inner = sizes["experts"], sizes["hidden"], sizes["expert_hidden"]
    load = torch.arange(1.0, experts + 1, device="cpu").flip(0)
    placement = chain(load, worker.ranks, redundant_per_rank=redundant, keep_home=True)
    plan = SpreadPlan(placement, group=worker.group, device=worker.device)
    dtype = torch.bfloat16 if worker.on_gpu else torch.float32
    shapes = ((2 * inner, hidden), (hidden, inner))
    generator = torch.Generator(worker.device).manual_seed(worker.rank)

    def draw(rows: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=dtype, device=worker.device)

    originals = [draw(plan.n_local, shape) for shape in shapes]
    upstream = [draw(placement.slots_per_rank, shape) for shape in shapes]
    expected = _sum_gradients(worker, plan, upstream[1])
    out, into = plan.count_messages()
    expert_bytes = sum(shape[0] * shape[1] for shape in shapes) * originals[0].element_size()
    row: Row = {
        "experts": experts,
        "bytes_per_expert": expert_bytes,
        "rows_out": worker.sum_over_ranks(out) / worker.ranks,
        "home_bytes": plan.n_local * expert_bytes,
        "forms": {},
    }
    for name, kind in FORMS.items():
        row["forms"][name] = _measure(worker, plan, kind, originals, upstream, expected)
    return row


def _sum_gradients(worker: Worker, plan: SpreadPlan, upstream: torch.Tensor) -> torch.Tensor:
    """Return what this rank's originals must get, from every rank's gradients."""
    parts = [torch.empty_like(upstream) for _ in range(worker.ranks)]
    dist.all_gather(parts, upstream)
    wide = torch.zeros(
        plan.placement.n_logical, *upstream.shape[1:], dtype=torch.float32, device=worker.device
    )
    slots = plan.placement.phy2log.long().view(worker.ranks, -1).tolist()
    for part, experts in zip(parts, slots, strict=True):
        for expert, grad in zip(experts, part, strict=True):
            wide[expert] += grad.float()
    return wide[plan.rank * plan.n_local :][: plan.n_local].clone()


def _measure(
    worker: Worker,
    plan: SpreadPlan,
    kind: type[Form],
    originals: Sequence[torch.Tensor],
    upstream: Sequence[torch.Tensor],
    expected: torch.Tensor,
) -> Row:
    """Check one form's gradients, then time it."""
    params = [torch.nn.Parameter(one.clone()) for one in originals]
    first = plan.n_local if kind.redundant_only else 0
    before = _allocated(worker)
    form = kind(plan, params)
    form.fill()
    kept = _allocated(worker) - before
    form.finish([grad[first:].clone() for grad in upstream])
    total = form.gradient()
    if first:  # the framework's own backward pass adds the gradients of what is at home
        total = total + upstream[-1][:first].float()
    limit = 0.05 if originals[0].dtype == torch.bfloat16 else 1e-5
    if not torch.allclose(total, expected, rtol=limit, atol=limit):
        raise WrongAnswerError("a gradient is not the sum over the copies")
    del total
    times = []
    for _ in range(worker.job.sizes.replays + WARM_UP):
        form.drop_gradients()
        times.append(_time_passes(worker, form, [grad[first:].clone() for grad in upstream]))
    times = times[WARM_UP:]
    return {
        "kept_bytes": kept if worker.on_gpu else None,
        **{
            name: compute_statistics(worker.slowest([found[name] for found in times]))
            for name in times[0]
        },
    }


def _allocated(worker: Worker) -> int:
    """Return the bytes in use on the device."""
    return torch.cuda.memory_allocated(worker.device) if worker.on_gpu else 0


def _time_passes(worker: Worker, form: Form, grads: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the microseconds of both passes, the host's work included."""
    found = {}
    for name, work in (("weights", form.fill), ("gradients", lambda: form.finish(grads))):
        dist.all_reduce(worker.start)
        _synchronize(worker)
        begun = time.perf_counter()
        work()
        _synchronize(worker)
        found[name] = 1e6 * (time.perf_counter() - begun)
    return found


def _synchronize(worker: Worker) -> None:
    """Wait for the device."""
    if worker.on_gpu:
        torch.cuda.synchronize()
