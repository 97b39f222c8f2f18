"""Ways to balance the layer: which slots tokens go to, and where the slots' weights come from.

Static redundant slots are filled once, as `lplb_triton.Replicas` fills them once per optimizer
step, and their gradients return outside of what is timed; or `lplb_triton.spread` sends their
weights and gradients in each pass. Both are compared with live slots that go with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lplb_triton import Balancer, LiveSlots, Placement, SpreadPlan
from lplb_triton.bench.advise.live import count_ports, suggest_live_cost
from lplb_triton.bench.ep.layer.exchange import Weights
from lplb_triton.bench.ep.layer.sizes import LayerSizes
from lplb_triton.bench.ep.worker import Worker
from lplb_triton.training.live_layer import LivePull
from lplb_triton.training.slot_memory import extend_memory
from lplb_triton.training.spread import attach, stack_slots

__all__ = ["Form", "find_cost", "make_forms"]


class Form:
    """One way to balance the layer; this one leaves experts in order, without copies.

    Parameters
    ----------
    worker
        This rank.
    placement
        Slots of the experts, live ones included.
    originals
        This rank's weights, ``[n_local, ...]`` each, of which the form has copies of its own.

    Attributes
    ----------
    params : list of torch.nn.Parameter
        Whose gradients are wanted; the first ``n_local`` rows are the originals.
    """

    def __init__(
        self, worker: Worker, placement: Placement, originals: Sequence[torch.Tensor]
    ) -> None:
        self.worker, self.placement = worker, placement
        self.n_local = len(originals[0])
        self.params = self._make_params(originals)

    def _make_params(self, originals: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(one.clone()) for one in originals]

    @property
    def static(self) -> int:
        """Slots of a rank whose weights are in the first tensor."""
        return self.placement.slots_per_rank

    def choose_slots(self, ids: torch.Tensor) -> torch.Tensor:
        """Return physical ids: in order the slot of an expert has its number."""
        return ids

    def start(self) -> None:
        """Begin to fetch weights, before tokens are dispatched."""

    def finish(self) -> Sequence[Weights]:
        """Return the weights of the static slots, then of the live ones if they are apart."""
        w_in, w_out = self.params
        return [(w_in, w_out)]

    def attach(self, y: torch.Tensor) -> torch.Tensor:
        """Return the experts' output, whose backward pass then involves every rank."""
        return y

    def collect_gradients(self) -> list[torch.Tensor]:
        """Return the gradients of the originals, ``[n_local, ...]`` each; collective."""
        return [_read_gradient(param) for param in self.params]

    def drop_gradients(self) -> None:
        """Forget the gradients of the parameters."""
        for param in self.params:
            param.grad = None

    def count_pieces(self) -> int:
        """Count the live slots of all ranks that the last batch fills."""
        return 0

    def count_port_rows(self) -> int:
        """Count the experts that the busiest rank sent or received in the last batch."""
        return 0

    def count_bytes(self) -> int:
        """Count the bytes that this rank holds for live slots besides the static ones."""
        return 0

    def close(self) -> None:
        """Let go of what other ranks may use; collective."""


def _read_gradient(param: torch.nn.Parameter) -> torch.Tensor:
    if param.grad is None:
        raise RuntimeError("no gradient of the weights came back")
    return param.grad


class _Balanced(Form):
    """A form with a balancer, whose static copies are kept between steps.

    Parameters
    ----------
    evenly
        Whether the tokens of an expert are split evenly, as EPLB does.
    **rules
        Of the balancer.
    """

    def __init__(
        self,
        worker: Worker,
        placement: Placement,
        originals: Sequence[torch.Tensor],
        *,
        evenly: bool = False,
        **rules: Any,
    ) -> None:
        self.balancer = Balancer(placement, group=worker.group, device=worker.device, **rules)
        self.balancer.warmup()
        static = placement.with_live_slots(0)
        self.plan = SpreadPlan(static, group=worker.group, device=worker.device)
        self.evenly = evenly
        shares = [
            (1 << 24) * (copy + 1) // count
            for count in placement.logcnt.tolist()
            for copy in range(count)
        ]
        self._even = torch.tensor(shares, dtype=torch.int32, device=worker.device)
        super().__init__(worker, placement, originals)

    def _make_params(self, originals: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
        copies = self.plan.send_weights(originals)
        return [
            torch.nn.Parameter(self._place(torch.cat([own, rows])))
            for own, rows in zip(originals, copies, strict=True)
        ]

    def _place(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the slots in the memory that they are to have."""
        return slots

    def choose_slots(self, ids: torch.Tensor) -> torch.Tensor:
        """Choose a copy for every id."""
        if not self.evenly:
            return self.balancer.run(ids)
        _, running = self.balancer.count(ids)
        return self.balancer.select(ids, self._even, running)

    def collect_gradients(self) -> list[torch.Tensor]:
        """Add the gradients of static copies to those of the originals."""
        grads = super().collect_gradients()
        own = [grad[: self.n_local].clone() for grad in grads]
        self.plan.return_gradients([grad[self.n_local :].contiguous() for grad in grads], own)
        return own

    def close(self) -> None:
        """Raise what was reported since the last call, and close load sync."""
        self.balancer.check()
        self.balancer.close()


class _BySpread(_Balanced):
    """A form whose static copies are sent in each pass, and filled live slots with them."""

    def _make_params(self, originals: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(one.clone()) for one in originals]
        self._slots: tuple[torch.Tensor, ...] = ()
        # Live slots can't lie behind the parameters' own memory, so all slots are copied anew.
        self._buffers: list[torch.Tensor] | None = None
        if not self.placement.live_per_rank:
            extra = self.placement.slots_per_rank - self.n_local
            self._buffers = [extend_memory(param, extra) for param in params]
        else:
            self.plan = SpreadPlan(
                self.placement, group=self.worker.group, device=self.worker.device
            )
        return params

    def _find_plan(self) -> SpreadPlan:
        if not self.placement.live_per_rank:
            return self.plan
        return self.plan.fill(self.balancer.live)

    def finish(self) -> Sequence[Weights]:
        """Send the rows of redundant slots."""
        w_in, w_out = self._slots = stack_slots(
            self._find_plan(), self.params, buffers=self._buffers, reuse_gradients=True
        )
        return [(w_in, w_out)]

    def attach(self, y: torch.Tensor) -> torch.Tensor:
        """Have the slots' backward pass run on every rank."""
        slots, self._slots = self._slots, ()
        return attach(y, slots)

    def collect_gradients(self) -> list[torch.Tensor]:
        """Return the gradients, in which those of all copies are."""
        return [_read_gradient(param) for param in self.params]

    def count_pieces(self) -> int:
        """Count the live slots of all ranks that the last batch fills."""
        return int((self.balancer.live.experts >= 0).sum()) if self.placement.live_per_rank else 0

    def count_port_rows(self) -> int:
        """Count the rows of static and live slots at the busiest rank."""
        mine = float(max(self._find_plan().count_messages()))
        return round(self.worker.slowest([mine])[0])


class _ByLiveSlots(_Balanced):
    """Live slots that `lplb_triton.LiveSlots` fills, beside static copies that are kept.

    Parameters
    ----------
    sizes
        Of the layer.
    transport
        Of the weights.
    """

    def __init__(
        self,
        worker: Worker,
        placement: Placement,
        originals: Sequence[torch.Tensor],
        *,
        sizes: LayerSizes,
        transport: str,
        **rules: Any,
    ) -> None:
        # A layer's weights are used by one grouped product, which makes a fresh gradient.
        self.slots = LiveSlots(
            placement.live_per_rank, group=worker.group, device=worker.device,
            transport=transport, n_sms=sizes.n_sms, backward=sizes.backward, reuse_gradients=True,
        )  # fmt: skip
        super().__init__(worker, placement, originals, **rules)
        self.layer = self.slots.add(self.balancer, *self.params)
        self._homes = (placement.log2phy[:, 0] // placement.slots_per_rank).numpy()
        self._pull: LivePull | None = None

    def _place(self, slots: torch.Tensor) -> torch.Tensor:
        return self.slots.empty(slots.shape, slots.dtype).copy_(slots)

    @property
    def static(self) -> int:
        """Slots of a rank whose weights are in the first tensor."""
        return self.placement.static_per_rank

    def start(self) -> None:
        """Begin the pull on a stream of its own."""
        self._pull = self.layer.pull()

    def finish(self) -> Sequence[Weights]:
        """Wait for the pull."""
        assert self._pull is not None
        (w_in, live_in), (w_out, live_out) = self._pull.wait()
        return [(w_in, w_out), (live_in, live_out)]

    def attach(self, y: torch.Tensor) -> torch.Tensor:
        """Have the weights fetched again in the backward pass."""
        assert self._pull is not None
        pull, self._pull = self._pull, None
        return pull.attach(y)

    def count_pieces(self) -> int:
        """Count the live slots of all ranks that the last batch fills."""
        return int((self.balancer.live.experts >= 0).sum())

    def count_port_rows(self) -> int:
        """Count the experts at the busiest port."""
        return max(count_ports(self.balancer.live.experts.cpu().numpy(), self._homes))

    def count_bytes(self) -> int:
        """Count what `LiveSlots` holds but the weights themselves."""
        return sum(n for name, n in self.slots.memory().items() if name != "in_place")

    def close(self) -> None:
        """Raise what was reported since the last call, and close live slots and load sync."""
        self.slots.check()
        self.slots.close()
        super().close()


def make_forms(
    worker: Worker, sizes: LayerSizes, placement: Placement, originals: Sequence[torch.Tensor]
) -> dict[str, Callable[[], Form]]:
    """Return what makes each form, by its name; to make one is collective.

    Parameters
    ----------
    worker
        This rank.
    sizes
        Of the layer.
    placement
        With the static copies.
    originals
        This rank's weights.
    """
    in_order = Placement(torch.arange(sizes.experts, device="cpu"), worker.ranks)
    live = placement.with_live_slots(sizes.live)
    rules: dict[str, Any] = {"live_above": sizes.above, "live_cost": find_cost(sizes)}
    found: dict[str, Callable[[], Form]] = {
        "none": lambda: Form(worker, in_order, originals),
        "eplb": lambda: _Balanced(worker, placement, originals, evenly=True),
        "lplb": lambda: _Balanced(worker, placement, originals),
    }

    def make_live(transport: str) -> Callable[[], Form]:
        return lambda: _ByLiveSlots(
            worker, live, originals, sizes=sizes, transport=transport, **rules
        )

    for transport in sizes.transports:
        if transport == "spread":
            found["lplb, spread"] = lambda: _BySpread(worker, placement, originals)
            found["live, spread"] = lambda: _BySpread(worker, live, originals, **rules)
        else:
            found[f"live, {transport}"] = make_live(transport)
    return found


def find_cost(sizes: LayerSizes) -> int:
    """Return ``live_cost``: as given, or what is suggested for training."""
    if sizes.cost is not None:
        return sizes.cost
    return suggest_live_cost(training=True, keep=sizes.backward == "keep")
