"""Replicas in training: weights are copied from originals, gradients are summed on them.

Every logical expert has one *original*, the tensor that the optimizer updates. The model computes
with *slot weights*, one row for each physical slot of this rank, in one contiguous tensor. Before
a forward pass slot weights are copied from the originals; after the backward pass the gradients of
all slots of an expert are added up on its original. So training with replicas computes the same
function, and the same gradients up to the order of sums, as training without.

Each rank has ``n_logical / ep_size`` originals, whatever the placement: parameters and optimizer
state keep the shapes they have without replicas. An original is on a rank that holds a copy
wherever that is possible, so that only the other copies' weights and gradients are sent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton._checks import check_flag
from lplb_triton.placement import Placement
from lplb_triton.training.checks import (
    Spec,
    check_at_home,
    check_backend,
    check_dtype,
    check_group,
    check_on_all_ranks,
    check_params,
    check_placement,
    describe_placement,
    is_usable,
)
from lplb_triton.training.gradients import require_current_gradients, require_reduced
from lplb_triton.training.handle import Handle
from lplb_triton.training.originals import Originals
from lplb_triton.training.owners import Claim, check_unclaimed
from lplb_triton.training.routes import Ints, assign_positions, plan_layer_traffic, plan_routes
from lplb_triton.training.rows import Rows, ordinary_tensors, parts_of
from lplb_triton.training.slots import Slots
from lplb_triton.training.state import Optimizers, find_movable, list_optimizers
from lplb_triton.training.transfer import move_rows, start_gradients, start_weights

__all__ = ["Handle", "Replicas"]


class Replicas:
    """Keeps the replicas of one MoE layer equal to their originals, on one rank of an EP group.

    Give it the layer's expert parameters as they are without replicas, and compute with `weights`
    instead. Per step::

        weights = replicas.weights["w_in"]  # [slots_per_rank, ...], as often as needed
        loss.backward()                     # once or, to accumulate, several times
        replicas.reduce_grads()             # fills the parameters' .grad
        optimizer.step()                    # knows the parameters only
        replicas.sync_weights()

    A call that is forgotten is an error at the next one: reading `weights`, and `reduce_grads`,
    after a step without `sync_weights`; the step of a `torch.optim.Optimizer`, and `sync_weights`,
    after a backward pass without `reduce_grads`.

    Construction, `move`, `logical_order` and `close` are collective and check first: if the
    arguments of one rank are wrong or differ from rank 0's, every rank raises and no data has
    moved. `sync_weights` and `reduce_grads` are collective too, in the same order on all ranks.
    All of them do the same under `torch.inference_mode`, `torch.no_grad` and `torch.autocast`.

    Parameters
    ----------
    placement : Placement
        The same on all ranks; `Balancer.placement` is. ``ep_size`` must divide ``n_logical``.
    params : mapping of str to torch.Tensor, or to a sequence of torch.Tensor
        This rank's originals by name: a tensor ``[n_logical / ep_size, ...]``, or as many tensors
        ``[...]`` of one shape. Rank r holds the logical experts from ``r * n_logical / ep_size``
        on, in order. The constructor moves them to the ranks that `experts` names, so whoever
        reads them by expert reads `experts` too. Those with ``requires_grad`` are trained: leaves
        in float16, bfloat16, float32 or float64. All others are frozen and copied as bytes, of
        any dtype (packed FP4 or FP8 weights beside their scales, for instance). The tensors
        themselves are kept: a parameter that takes the place of one needs another `Replicas`.
    group : torch.distributed.ProcessGroup or None
        The EP group, NCCL for tensors on a GPU, gloo on a CPU; None if ``ep_size`` is 1.
    data_parallel_group : torch.distributed.ProcessGroup or None
        The ranks of all EP groups that hold copies of the same originals, if there are several
        EP groups. It is used to check that they agree on the placement; averaging gradients over
        it stays with the caller, after `reduce_grads`.
    dtype : torch.dtype or None
        Dtype of the slot weights of trained parameters; by default that of each parameter.
        Gradients are accumulated, sent and summed in the parameter's dtype (float16 and bfloat16
        are summed in float32).
    redundant_only : bool
        Have `weights` hold the redundant slots only: the model computes with the parameters
        themselves in the others. The placement must keep experts at home (``keep_home=True``).
    optimizer : torch.optim.Optimizer, sequence of them, or None
        Needed only if it already has state for ``params``.

    Raises
    ------
    TypeError, ValueError
        Naming the argument and, if it is another rank's, the rank.

    Examples
    --------
    >>> load = torch.tensor([90.0, 10.0, 40.0, 60.0])
    >>> placement = Placement.from_history(load, 1, redundant_per_rank=2)
    >>> w = torch.nn.Parameter(torch.randn(4, 8, 8))
    >>> replicas = Replicas(placement, {"w": w})
    >>> replicas.weights["w"].square().sum().backward()
    >>> replicas.reduce_grads().done
    True
    >>> w.grad.shape
    torch.Size([4, 8, 8])
    """

    @ordinary_tensors()
    def __init__(
        self,
        placement: Placement,
        params: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
        *,
        group: dist.ProcessGroup | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        redundant_only: bool = False,
        optimizer: Optimizers = None,
    ) -> None:
        self.group = group
        self._redundant_only = check_flag("redundant_only", redundant_only)
        given = {"group": group, "data_parallel_group": data_parallel_group}
        self._groups = {name: one for name, one in given.items() if is_usable(one)}
        self.rank = dist.get_rank(group) if "group" in self._groups else 0
        movable: list[Rows] = []

        def check() -> Spec:
            for name, one in given.items():
                check_group(name, one)
            check_placement(placement, group)
            check_at_home(placement, redundant_only)
            self._n_own = placement.n_logical // placement.ep_size
            self._originals = Originals(check_params(params, self._n_own))
            check_unclaimed(self._originals)
            self.device = next(parts_of(rows)[0] for rows in self._originals.values()).device
            check_backend(group, self.device)
            check_dtype(dtype)
            rows, spec = find_movable(
                self._originals, self._n_own, list_optimizers(optimizer), None
            )
            movable.extend(rows)
            spec |= {"dtype": str(dtype), "redundant_only": redundant_only}
            return {"placement": describe_placement(placement), **spec}

        own: dict[str, Spec] = {"data_parallel_group": {"the rank in group": self.rank}}
        check_on_all_ranks(self._groups, check, own)
        self._placement = placement
        self._dtype = dtype
        self._ordered = False
        self._logical_positions = np.arange(placement.n_logical)
        self._positions = self._logical_positions
        self._attach()
        self._relocate(assign_positions(placement, self._logical_positions), movable)
        self.sync_weights()

    def _attach(self) -> None:
        """Make the slots of this object's parameters, and claim the parameters."""
        self._pending: Handle | None = None
        self._synced: list[tuple[int, int]] | None = None
        n_slots = self._placement.slots_per_rank - self._redundant_only * self._n_own
        self._slots = Slots(self._originals, n_slots, self._dtype)
        self._claim = Claim(self._originals, self._slots.weights, self, self._check_step)

    @property
    def placement(self) -> Placement:
        """The placement in use (immutable)."""
        return self._placement

    @property
    def experts(self) -> torch.Tensor:
        """``[n_logical / ep_size]`` int64 on the CPU: logical expert of each of this rank's rows.

        This is the order of the parameters, their gradients and their optimizer state.
        """
        mine = np.argsort(self._positions)[self.rank * self._n_own :][: self._n_own]
        return torch.from_numpy(mine.copy())

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Slot weights by name, ``[slots_per_rank, ...]`` each, to compute with.

        Row i is physical slot ``rank * slots_per_rank + i``; with ``redundant_only`` the first row
        is the first redundant slot. They are leaves of the autograd
        graph, contiguous, and stay the same tensors as long as the `Replicas` exists. They require
        gradients while their parameter does. The optimizer must not update them.

        Raises
        ------
        RuntimeError
            If a handle waits to be finished, or a parameter was changed (in a way that torch
            counts) since the last `sync_weights`.
        """
        self._require_idle()
        if self._originals.stamp() != self._synced:
            self._originals.require_same_kinds()
            raise RuntimeError("parameters changed since the last sync_weights: call it first")
        self._slots.follow(self._originals)
        return MappingProxyType(self._slots.weights)

    def __repr__(self) -> str:
        """Write placement, names and rank in one line."""
        return f"Replicas({self._placement!r}, {', '.join(self._originals)}, rank={self.rank})"

    @ordinary_tensors()
    def __deepcopy__(self, memo: dict[int, object]) -> Replicas:
        """Copy the parameters and make slots of their own for them, without gradients.

        In the copy of a module that holds both, the copied `Replicas` has the copied parameters.
        The group stays the same.
        """
        self._require_idle()
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(vars(self))
        copied._originals = Originals(copy.deepcopy(dict(self._originals), memo))
        copied._ordered = False
        copied._attach()
        for name, weight in self._slots.weights.items():
            copied._slots.weights[name].copy_(weight)
        copied._claim.in_order = self._claim.in_order
        if self._originals.stamp() == self._synced:
            copied._synced = copied._originals.stamp()
        return copied

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled or copied without its parameters."""
        raise TypeError(
            "a Replicas can't be pickled or copied by copy.copy: it belongs to its parameters, "
            "their optimizer and a process group. Save the parameters inside logical_order() and "
            "make another Replicas when they are loaded; copy.deepcopy copies parameters too"
        )

    @ordinary_tensors()
    def sync_weights(self, *, async_op: bool = False) -> Handle:
        """Copy the originals' weights to every slot; collective over the group.

        Parameters
        ----------
        async_op : bool
            Return while messages are under way; ``wait()`` before `weights` is read.

        Returns
        -------
        Handle
            Finished, unless ``async_op``.

        Raises
        ------
        RuntimeError
            If slots hold gradients that `reduce_grads` has not taken, a handle waits to be
            finished, or a parameter has another shape, dtype or device than at first.
        """
        self._require_idle()
        self._originals.require_same_kinds()
        require_reduced(self._slots, "sync_weights()")
        stamp = self._originals.stamp()
        finish_copies = start_weights(
            self._originals, self._slots, self._traffic.weight_routes, self.group
        )

        def finish() -> None:
            finish_copies()
            self._synced = stamp

        return self._start("sync_weights", finish, async_op)

    @ordinary_tensors()
    def reduce_grads(self, *, async_op: bool = False) -> Handle:
        """Add the gradients of all slots to the originals'; collective over the group.

        The slots' gradients are removed. An original's ``.grad`` gets the sum over its expert's
        slots in a fixed order: those of its own rank first, then the others by slot number. It is
        added to what ``.grad`` holds already; a slot without gradient counts as zeros. Frozen
        parameters, which are the same on all ranks, are left out.

        Parameters
        ----------
        async_op : bool
            Return while messages are under way; ``wait()`` before ``.grad`` is read.

        Returns
        -------
        Handle
            Finished, unless ``async_op``.

        Raises
        ------
        RuntimeError
            If slots hold gradients and a parameter was changed or frozen since the last
            `sync_weights`, a handle waits to be finished, or a parameter has another shape, dtype
            or device than at first.
        """
        self._require_idle()
        self._originals.require_same_kinds()
        require_current_gradients(self._slots, self._originals, self._synced)
        finish = start_gradients(self._originals, self._slots, self._traffic, self.group)
        return self._start("reduce_grads", finish, async_op)

    def zero_grad(self) -> None:
        """Drop the gradients that slots hold, for a step that is abandoned; not collective.

        ``optimizer.zero_grad()`` leaves them, and they would be added to those of the next step.
        """
        self._require_idle()
        self._slots.drop_gradients()

    def move(
        self,
        placement: Placement,
        optimizer: Optimizers,
        *,
        also: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None,
    ) -> None:
        """Use another placement from the next forward pass on; collective over the group.

        Originals move, with their gradients and optimizer state, to ranks that hold a copy,
        as few of them as possible; then the slots are filled. Parameters stay the same objects.
        Entries that are the same rows of the same memory move once.

        Parameters
        ----------
        placement : Placement
            The same on all ranks, with as many experts, slots and ranks as the first.
        optimizer : torch.optim.Optimizer, sequence of them, or None
            Those that update the trained parameters. None only if none has state for them.
        also : mapping of str to tensor or to a sequence of tensors, or None
            Others of any dtype whose rows belong to the originals, such as master weights in
            float32: ``[n_logical / ep_size, ...]``, or as many tensors of one shape.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            On every rank, before anything moves: another placement or optimizer state on another
            rank, other sizes, state that isn't held by expert (a sharded optimizer's), an
            optimizer with state that isn't given, tensors that share memory but are not the same
            rows, gradients that `reduce_grads` has not taken yet. Another rank's mistake is a
            ValueError that names the rank.
        """

        def check() -> Spec:
            check_placement(placement, self.group)
            check_at_home(placement, self._redundant_only)
            for name in ("n_logical", "n_physical"):
                wanted, got = getattr(self._placement, name), getattr(placement, name)
                if wanted != got:
                    raise ValueError(f"placement must have {name} {wanted}, got {got}")
            if self._ordered:
                raise RuntimeError("move() can't be called inside logical_order()")
            return {"placement": describe_placement(placement)}

        movable = self._collect_movable(optimizer, also, check)
        self._placement = placement
        self._relocate(assign_positions(placement, self._positions), movable)
        self.sync_weights()

    @contextmanager
    def logical_order(
        self,
        optimizer: Optimizers,
        *,
        also: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None,
    ) -> Iterator[None]:
        """Have the originals in logical order inside a ``with`` block, to save or load them.

        Inside, rank r's parameters and optimizer state are those of the experts from
        ``r * n_logical / ep_size`` on, as without replicas: whatever saves and loads a model with
        plain expert parallelism does so here. Concatenated over the ranks the rows are in order
        of logical ids, so they can be cut up for another EP size. At the end the originals go
        back and the slots are filled. If the block raises, they stay in logical order, which is
        valid but slower: call `sync_weights` to go on. Collective over the group.

        Parameters
        ----------
        optimizer, also
            As for `move`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `move`, also after the block for state that was loaded in it.
        """
        positions, nested = self._positions, self._ordered
        self._relocate(self._logical_positions, self._collect_movable(optimizer, also))
        self._ordered = True
        try:
            yield
        finally:
            self._ordered = nested
        self._relocate(positions, self._collect_movable(optimizer, also))
        self.sync_weights()

    def close(
        self,
        optimizer: Optimizers,
        *,
        also: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None,
    ) -> None:
        """Put the originals in logical order for good, and give them free; collective.

        Nothing can be done with the `Replicas` afterwards. Another one may be made of its
        parameters, for other numbers of slots, another dtype or what is trained.

        Parameters
        ----------
        optimizer, also
            As for `move`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `move`.
        """

        def check() -> Spec:
            if self._ordered:
                raise RuntimeError("close() can't be called inside logical_order()")
            return {}

        self._relocate(self._logical_positions, self._collect_movable(optimizer, also, check))
        self._claim.release()

    def _collect_movable(
        self,
        optimizer: Optimizers,
        also: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None,
        check_more: Callable[[], Spec] = dict,
    ) -> list[Rows]:
        """Return what has to move, or raise on every rank if one rank's arguments are wrong."""
        movable: list[Rows] = []

        def check() -> Spec:
            spec = check_more()
            self._require_idle()
            self._originals.require_same_kinds()
            require_reduced(self._slots, "moving experts")
            optimizers = list_optimizers(optimizer)
            self._claim.check_given(optimizers.values(), self._originals)
            rows, facts = find_movable(self._originals, self._n_own, optimizers, also)
            movable.extend(rows)
            return {**spec, **facts}

        check_on_all_ranks(self._groups, check)
        return movable

    @ordinary_tensors()
    def _relocate(self, positions: Ints, movable: list[Rows]) -> None:
        """Move the originals, and everything that belongs to them, to ``positions``."""
        moved = np.flatnonzero(positions != self._positions)
        if moved.size:
            source, target, n_own = self._positions[moved], positions[moved], self._n_own
            routes = plan_routes(
                source, n_own, target, n_own, self._placement.ep_size, self.rank, self.device
            )
            move_rows(movable, routes, self.group, self.device)
        self._positions = positions
        self._claim.in_order = bool((positions == self._logical_positions).all())
        self._traffic = plan_layer_traffic(
            self._placement, positions, self.rank, self.device, self._redundant_only
        )
        self._synced = None

    def _start(self, call: str, finish: Callable[[], None], async_op: bool) -> Handle:
        """Return the handle of a call, finished unless ``async_op``."""
        handle = Handle(call, finish)
        if async_op:
            self._pending = handle
        else:
            handle.wait()
        return handle

    def _require_idle(self) -> None:
        """Raise if this object was closed or a handle waits to be finished."""
        if not self._claim.alive:
            raise RuntimeError("this Replicas was closed")
        if self._pending is not None and not self._pending.done:
            raise RuntimeError(
                f"{self._pending.call}(async_op=True) is under way: wait() for its handle first"
            )
        self._pending = None

    def _check_step(self, names: set[str]) -> None:
        """Raise if an optimizer must not update the originals of these names."""
        # Weights that are being sent were read already. Gradients that are being sent are missing.
        if self._pending is not None and self._pending.call == "reduce_grads":
            self._require_idle()
        if names.intersection(self._slots.names_with_gradients()):
            require_reduced(self._slots, "the optimizer's step")
