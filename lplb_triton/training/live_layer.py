"""A layer whose experts other ranks may fetch, and one fetch of a batch's live experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from lplb_triton._torch_op import outside_modes
from lplb_triton.live import LivePlan
from lplb_triton.placement import Placement
from lplb_triton.training.live_rows import LiveRows
from lplb_triton.training.routes import Traffic

if TYPE_CHECKING:
    from lplb_triton.balancer import Balancer
    from lplb_triton.training.live_slots import LiveSlots

__all__ = ["LiveFetch", "LiveLayer", "LivePull", "find_homes"]


def find_homes(placement: Placement) -> np.ndarray:
    """Return rank and static slot of each expert's original, ``[n_logical, 2]`` int32."""
    first = placement.log2phy[:, 0].numpy()
    return np.stack(np.divmod(first, placement.slots_per_rank), 1).astype(np.int32)


class LiveLayer:
    """The weights of one layer's static slots; made by `LiveSlots.add`.

    Attributes
    ----------
    number : int
        Of the layer, in the order of `LiveSlots.add`.
    sources : tuple of torch.Tensor
        ``[static_per_rank, ...]`` each, as given.
    """

    def __init__(
        self,
        slots: LiveSlots,
        number: int,
        balancer: Balancer | Placement,
        sources: Sequence[torch.Tensor],
        rows: LiveRows,
    ) -> None:
        self.slots, self.number, self.rows = slots, number, rows
        self.sources = tuple(sources)
        self._balancer = balancer
        self.placement = self._current_placement()
        self.homes = find_homes(self.placement)
        self.homes_on_device = torch.from_numpy(self.homes).to(slots.device)
        self.routed: tuple[bytes, Traffic] | None = None
        self.held: torch.Tensor | None = None
        self.memory: torch.Tensor | None = None
        self._views: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        if slots.resident:
            self.memory = slots.make_memory(rows)
            shape = (slots.live_per_rank,)
            self.held = torch.full(shape, -1, dtype=torch.int32, device=slots.device)
        self._stamps = self._read_stamps()

    def _current_placement(self) -> Placement:
        """Return the placement that the layer's balancer has now."""
        given = self._balancer
        return given if isinstance(given, Placement) else given.placement

    def _read_stamps(self) -> list[tuple[int, int]]:
        """Return how often each source was written, and where it is."""
        # Torch doesn't count the writes of tensors made in inference mode.
        return [(0 if s.is_inference() else s._version, s.data_ptr()) for s in self.sources]

    def view_live(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return new tensors over the live slots in ``memory``, one for each source."""
        if self._views is None or self._views[0] is not memory:
            # Later calls get tensors of these, which must not be those of inference mode.
            with outside_modes():
                views = [self.rows.view(memory, number) for number in range(len(self.sources))]
            if self.slots.keeps_memory:
                # Nothing may hold the memory of one call.
                return views
            self._views = memory, views
        # Each tensor counts its writes by itself: that the slots' memory is filled anew while a
        # graph is alive is as it should be, so autograd must not know.
        return [view.data for view in self._views[1]]

    def may_have_changed(self, number: int) -> bool:
        """Whether a source may differ from what was read of it before."""
        # An optimizer may write to a parameter's data, of whose writes torch doesn't tell.
        return self.rows.kinds[number].trained or self._read_stamps() != self._stamps

    def accept_changes(self) -> None:
        """Take the present weights for those that other ranks read."""
        self._stamps = self._read_stamps()

    def require_current(self) -> None:
        """Raise a RuntimeError if weights or homes are not those that other ranks read."""
        if self._read_stamps() != self._stamps:
            raise RuntimeError(
                f"weights of layer {self.number} changed outside of LiveSlots.update(), so other "
                "ranks don't read what is there now: change them within it, on all ranks"
            )
        placement = self._current_placement()
        if placement is not self.placement:
            homes = find_homes(placement)
            if homes.shape != self.homes.shape or (homes != self.homes).any():
                raise RuntimeError(
                    f"the placement of layer {self.number} has other homes of experts than when "
                    "the layer was added: placements made with keep_home=True keep them"
                )
            self.placement = placement
            self.routed = None

    def pull(self, live: LivePlan | torch.Tensor | None = None) -> LivePull:
        """Start to fetch the live experts of a batch; all ranks call it, in the same order.

        The copies run on a stream of their own, beside what is launched from here until
        `LivePull.wait`. They wait for nothing but what the current stream was given before.

        Parameters
        ----------
        live : LivePlan, torch.Tensor or None
            `Balancer.live`, or its ``experts``, ``[ep_size, live_per_rank]`` int32 on the device;
            by default those of the last batch of the balancer that the layer was added with.

        Returns
        -------
        LivePull

        Raises
        ------
        TypeError, ValueError
            If ``live`` doesn't fit, or is missing where the layer was added without a balancer.
        RuntimeError
            If weights changed outside of `LiveSlots.update`, or within it.
        SyncError
            If an earlier call failed, or, by messages, this one.
        """
        if live is None:
            if isinstance(self._balancer, Placement) or not hasattr(
                type(self._balancer), "live_experts"
            ):
                kind = type(self._balancer).__name__
                raise TypeError(f"live must be given: the layer was added with {kind}, no balancer")
            live = self._balancer.live_experts
        plan = live.experts if isinstance(live, LivePlan) else live
        return LivePull(self.slots.start(self, plan))


class LiveFetch:
    """What is known of one pull: it has no part in a graph of autograd, which refers to it."""

    def __init__(
        self, layer: LiveLayer, plan: torch.Tensor, memory: torch.Tensor, step: int
    ) -> None:
        self.layer, self.plan, self.memory, self.step = layer, plan, memory, step
        self.slots = layer.slots
        self.traffic: Traffic | None = None
        # This rank's part of the plan, where the host reads it.
        self.experts: tuple[int, ...] | None = None
        # The stream, by its handle, that was the current one when the pull began.
        self.begun_on = 0

    def list_weights(self) -> tuple[torch.Tensor, ...]:
        """Return new tensors over the weights: all static slots, then all live slots."""
        layer = self.layer
        return (*(source.detach() for source in layer.sources), *layer.view_live(self.memory))

    def require_same_step(self) -> None:
        """Raise a RuntimeError if weights may have changed since the forward pass."""
        if self.step != self.slots.step:
            raise RuntimeError(
                "LiveSlots.update() lies between a forward pass and its backward pass, which "
                "would read other weights: run backward before the optimizer's step"
            )
        self.layer.require_current()


class LivePull:
    """Live experts of one batch on their way; made by `LiveLayer.pull`."""

    def __init__(self, fetch: LiveFetch) -> None:
        self._fetch = fetch
        self._pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None

    def wait(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Return the weights of this rank's slots; the current stream waits for them.

        Returns
        -------
        tuple of pairs of torch.Tensor
            For each source its static slots, ``[static_per_rank, ...]`` in the same memory, and
            its live slots, ``[live_per_rank, ...]``. Slots that the plan leaves empty hold zeros
            or weights of earlier batches. Rows of live slots are at multiples of 16 bytes, so
            these tensors aren't contiguous where rows are not. They hold this batch's weights
            until the next `pull` or backward pass of any layer; `attach` fetches them again for
            the backward pass. With ``backward="keep"`` they are memory of this call.

        Raises
        ------
        RuntimeError
            If another pull, a backward pass or an update has come between this pull and the first
            call of `wait`, unless each call or layer has memory of its own.
        """
        if self._pairs is None:
            fetch, layer = self._fetch, self._fetch.layer
            fetch.slots.finish(fetch)
            if torch.is_grad_enabled() and layer.rows.trained:
                weights = _Weights.apply(fetch, *layer.sources)  # type: ignore[no-untyped-call]
            else:
                weights = fetch.list_weights()
            n = len(layer.sources)
            self._pairs = tuple(zip(weights[:n], weights[n:], strict=True))
        return self._pairs

    def attach(self, output: torch.Tensor) -> torch.Tensor:
        """Return the experts' ``output``, whose backward pass begins with this pull's part.

        It fetches the weights again if the slots have held others since, and makes sure that this
        rank takes part in the return of gradients even if its slots got no tokens.

        Parameters
        ----------
        output : torch.Tensor
            Floating-point, of the operations that used the weights.

        Returns
        -------
        torch.Tensor
            With the same values.
        """
        if not torch.is_grad_enabled():
            return output
        weights = [one for pair in self.wait() for one in pair]
        result: torch.Tensor = _Attach.apply(self._fetch, output, *weights)  # type: ignore[no-untyped-call]
        return result


class _Weights(torch.autograd.Function):
    """Weights of static and live slots; the gradients of live slots return to their homes."""

    @staticmethod
    def forward(ctx: Any, fetch: LiveFetch, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.fetch = fetch
        with outside_modes(), torch.no_grad():
            weights = fetch.list_weights()
        trained = {*fetch.layer.rows.trained}
        n = len(sources)
        ctx.mark_non_differentiable(
            *(one for number, one in enumerate(weights) if number % n not in trained)
        )
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        fetch: LiveFetch = ctx.fetch
        fetch.require_same_step()
        n, trained = len(grads) // 2, fetch.layer.rows.trained
        results: list[torch.Tensor | None] = [None] * n
        with outside_modes(), torch.no_grad():
            own = [_take(grads[number], fetch.slots.reuse_gradients) for number in trained]
            live = [grads[n + number].contiguous() for number in trained]
            fetch.slots.return_gradients(fetch, own, live)
        for number, grad in zip(trained, own, strict=True):
            results[number] = grad
        return (None, *results)


def _take(grad: torch.Tensor, reuse: bool) -> torch.Tensor:
    """Return a contiguous gradient that may be added to."""
    whole = grad.contiguous()
    return whole if reuse or whole is not grad else grad.clone()


class _Attach(torch.autograd.Function):
    """The identity of an output; see `LivePull.attach`."""

    @staticmethod
    def forward(
        ctx: Any, fetch: LiveFetch, output: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.fetch, ctx.n_weights = fetch, len(weights)
        # Not a view for autograd, so that a layer may write to it.
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        fetch: LiveFetch = ctx.fetch
        fetch.require_same_step()
        with outside_modes(), torch.no_grad():
            fetch.slots.refill(fetch)
        # An undefined gradient is no work for autograd, but its receiver runs all the same.
        return (None, grads[0], *[None] * ctx.n_weights)
