"""Replicas in training: their weights follow the originals, their gradients go back to them.

Every logical expert has one *original*, the tensor that the optimizer updates. The model computes
with *slot weights*, one row for each physical slot of this rank, in one contiguous tensor. Before
a forward pass slot weights are copied from the originals; after the backward pass the gradients of
all slots of an expert are added up on its original. So training with replicas computes the same
function, and the same gradients up to the order of sums, as training without.

Each rank has ``n_logical / ep_size`` originals, whatever the placement: parameters and optimizer
state keep the shapes they have without replicas. An original is on a rank that holds a copy
wherever that can be; then only the other copies' weights and gradients travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lplb_triton.placement import Placement

__all__ = ["Handle", "Replicas"]

Ints = NDArray[np.int64]
Rows: TypeAlias = torch.Tensor | list[torch.Tensor]
"""One row per expert: a stacked tensor ``[n, ...]``, or n tensors ``[...]``."""


class _Index(NamedTuple):
    """Row numbers, on the host and on the device."""

    host: list[int]
    device: torch.Tensor


class _Routes(NamedTuple):
    """Rows that one rank copies, sends and receives; messages are grouped by peer."""

    local_from: _Index
    local_to: _Index
    out: _Index
    out_counts: list[int]
    into: _Index
    in_counts: list[int]
    remote: bool
    """Whether any rank sends anything: if not, no rank communicates."""


class Handle:
    """Work under way; nothing may be taken from the `Replicas` before `wait`."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        """Finish the work; on a GPU only the current stream waits. A second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            with torch.no_grad():
                finish()

    @property
    def done(self) -> bool:
        """Whether `wait` was called."""
        return self._finish is None


class Replicas:
    """Keeps the replicas of one MoE layer true on one rank of an EP group.

    Give it the layer's expert parameters as they are without replicas, and compute with `weights`
    instead. Per step::

        weights = replicas.weights["w_in"]  # [slots_per_rank, ...], as often as needed
        loss.backward()                     # once or, to accumulate, several times
        replicas.reduce_grads()             # fills the parameters' .grad
        optimizer.step()                    # knows the parameters only
        replicas.sync_weights()

    Construction, `move` and `logical_order` are collective and check first: if the arguments of
    one rank are wrong or differ from rank 0's, every rank raises and no data has moved.
    `sync_weights` and `reduce_grads` are collective too, in the same order on all ranks.

    Parameters
    ----------
    placement : Placement
        The same on all ranks; `Balancer.placement` is. ``ep_size`` must divide ``n_logical``.
    params : mapping of str to torch.Tensor, or to a sequence of torch.Tensor
        This rank's originals by name: a floating-point tensor ``[n_logical / ep_size, ...]``, or
        as many tensors ``[...]`` of one shape. Rank r holds the logical experts from
        ``r * n_logical / ep_size`` on, in order. The constructor moves them to the ranks that
        `experts` names, so whoever reads them by expert reads `experts` too.
    group : torch.distributed.ProcessGroup or None
        The EP group, NCCL for tensors on a GPU, gloo on a CPU; None if ``ep_size`` is 1.
    data_parallel_group : torch.distributed.ProcessGroup or None
        The ranks of all EP groups that hold copies of the same originals, if there are several
        EP groups. It is used to check that they agree on the placement; averaging gradients over
        it stays with the caller, after `reduce_grads`.
    dtype : torch.dtype or None
        Of the slot weights; by default that of each parameter. Gradients are accumulated, sent
        and summed in the parameter's dtype (float16 and bfloat16 are summed in float32).
    optimizer : torch.optim.Optimizer or None
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

    def __init__(
        self,
        placement: Placement,
        params: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
        *,
        group: dist.ProcessGroup | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self._groups = [g for g in (group, data_parallel_group) if g is not None]

        def check() -> dict[str, object]:
            _check_placement(placement, group)
            self._n_own = placement.n_logical // placement.ep_size
            self._params = _check_params(params, self._n_own)
            self.device = next(_parts(rows)[0] for rows in self._params.values()).device
            _check_backend(group, self.device)
            if dtype is not None and not dtype.is_floating_point:
                raise TypeError(f"dtype must be a floating-point type, got {dtype}")
            return {
                **_describe_params(self._params),
                "dtype": str(dtype),
                "placement": _fingerprint(placement),
                **_describe_state(self._state(optimizer, None)),
            }

        _agree(self._groups, check)
        self._placement = placement
        self._pending: Handle | None = None
        self._synced: list[int] | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        for name, rows in self._params.items():
            part = _parts(rows)[0]
            shape = part.shape[1:] if isinstance(rows, torch.Tensor) else part.shape
            weight = torch.empty(
                (placement.slots_per_rank, *shape), dtype=dtype or part.dtype, device=self.device
            )
            weight.requires_grad_(part.requires_grad)
            if part.requires_grad and weight.dtype != part.dtype:
                weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    self._accumulator(name, part.dtype)
                )
            self._weights[name] = weight
        self._home = np.arange(placement.n_logical)
        self._seats = self._home
        self._relocate(_assign(placement, self._home), self._state(optimizer, None))
        self.sync_weights()

    @property
    def placement(self) -> Placement:
        """The placement in use (immutable)."""
        return self._placement

    @property
    def experts(self) -> torch.Tensor:
        """``[n_logical / ep_size]`` int64 on the CPU: logical expert of each of this rank's rows.

        The order of the parameters, their gradients and their optimizer state.
        """
        mine = np.argsort(self._seats)[self.rank * self._n_own :][: self._n_own]
        return torch.from_numpy(mine.copy())

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Slot weights by name, ``[slots_per_rank, ...]`` each, to compute with.

        Row i is physical slot ``rank * slots_per_rank + i``. They are leaves of the autograd
        graph, contiguous, and stay the same tensors for good. The optimizer must not get them.

        Raises
        ------
        RuntimeError
            If a handle waits to be finished, or a parameter was changed (in a way that torch
            counts) since the last `sync_weights`.
        """
        self._require_idle()
        if self._versions() != self._synced:
            raise RuntimeError("parameters changed since the last sync_weights: call it first")
        return MappingProxyType(self._weights)

    def __repr__(self) -> str:
        """Placement, names and rank in one line."""
        return f"Replicas({self._placement!r}, {', '.join(self._params)}, rank={self.rank})"

    @torch.no_grad()
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
        """
        self._require_idle()
        routes = self._routes
        versions = self._versions()
        arriving = []
        for name, rows in self._params.items():
            weight = self._weights[name].detach()
            _put(weight, routes.local_to, _take(rows, routes.local_from))
            if routes.remote:
                message = _take(rows, routes.out).to(weight.dtype)
                arriving.append((weight, *self._exchange(message, routes)))

        def finish() -> None:
            for weight, message, work in arriving:
                work.wait()
                _put(weight, routes.into, message)
            self._synced = versions

        return self._start(finish, async_op)

    @torch.no_grad()
    def reduce_grads(self, *, async_op: bool = False) -> Handle:
        """Add the gradients of all slots to the originals'; collective over the group.

        The slots' gradients are used up. An original's ``.grad`` gets the sum over its expert's
        slots in a fixed order: those of its own rank first, then the others by slot number. It is
        added to what ``.grad`` holds already; a slot without gradient counts as zeros.

        Parameters
        ----------
        async_op : bool
            Return while messages are under way; ``wait()`` before ``.grad`` is read.

        Returns
        -------
        Handle
            Finished, unless ``async_op``.
        """
        self._require_idle()
        back = self._back
        arriving: list[tuple[Rows, torch.Tensor, tuple[torch.Tensor, dist.Work] | None]] = []
        for name, rows in self._params.items():
            weight = self._weights[name]
            if not weight.requires_grad:
                continue
            dtype = _parts(rows)[0].dtype
            grad = self._sums.pop(name, None)
            if weight.grad is not None:
                grad = weight.grad.to(dtype) if grad is None else grad.add_(weight.grad)
                weight.grad = None
            if grad is None:
                grad = torch.zeros_like(weight, dtype=dtype)
            message = self._exchange(_take(grad, back.out), back) if back.remote else None
            total = torch.zeros(
                (self._n_own, *grad.shape[1:]),
                dtype=torch.promote_types(dtype, torch.float32),
                device=grad.device,
            )
            for slots, to in self._local_rounds:
                total.index_add_(0, to.device, _take(grad, slots).to(total.dtype))
            arriving.append((rows, total, message))

        def finish() -> None:
            for rows, total, message in arriving:
                if message is not None:
                    received, work = message
                    work.wait()
                    for positions, to in self._arriving_rounds:
                        total.index_add_(0, to.device, _take(received, positions).to(total.dtype))
                _add_grad(rows, total)

        return self._start(finish, async_op)

    def move(
        self,
        placement: Placement,
        optimizer: torch.optim.Optimizer | None,
        *,
        also: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Use another placement from the next forward pass on; collective over the group.

        Originals move, with their gradients and optimizer state, to ranks that hold a copy,
        as few of them as can be; then the slots are filled. Parameters stay the same objects.

        Parameters
        ----------
        placement : Placement
            The same on all ranks, with as many experts, slots and ranks as the first.
        optimizer : torch.optim.Optimizer or None
            The one that updates the parameters. None only if it has no state for them.
        also : mapping of str to torch.Tensor, or None
            Other tensors ``[n_logical / ep_size, ...]`` whose rows belong to the originals, such
            as master weights in float32.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            On every rank, before anything moves: another placement or optimizer state on another
            rank, other sizes, state that isn't held by expert (a sharded optimizer's), gradients
            that `reduce_grads` has not taken yet. Another rank's mistake is a ValueError that
            names the rank.
        """

        def check() -> dict[str, object]:
            _check_placement(placement, self.group)
            for name in ("n_logical", "n_physical"):
                wanted, got = getattr(self._placement, name), getattr(placement, name)
                if wanted != got:
                    raise ValueError(f"placement must have {name} {wanted}, got {got}")
            moving = self._check_move(optimizer, also)
            return {"placement": _fingerprint(placement), **_describe_state(moving)}

        _agree(self._groups, check)
        self._placement = placement
        self._relocate(_assign(placement, self._seats), self._state(optimizer, also))
        self.sync_weights()

    @contextmanager
    def logical_order(
        self,
        optimizer: torch.optim.Optimizer | None,
        *,
        also: Mapping[str, torch.Tensor] | None = None,
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
        seats = self._seats
        self._checked_relocate(self._home, optimizer, also)
        yield
        self._checked_relocate(seats, optimizer, also)
        self.sync_weights()

    def _checked_relocate(
        self,
        seats: Ints,
        optimizer: torch.optim.Optimizer | None,
        also: Mapping[str, torch.Tensor] | None,
    ) -> None:
        _agree(self._groups, lambda: _describe_state(self._check_move(optimizer, also)))
        self._relocate(seats, self._state(optimizer, also))

    def _check_move(
        self, optimizer: torch.optim.Optimizer | None, also: Mapping[str, torch.Tensor] | None
    ) -> dict[str, Rows]:
        self._require_idle()
        if self._sums or any(weight.grad is not None for weight in self._weights.values()):
            raise RuntimeError("slots hold gradients: call reduce_grads before moving experts")
        return self._state(optimizer, also)

    def _state(
        self, optimizer: torch.optim.Optimizer | None, also: Mapping[str, torch.Tensor] | None
    ) -> dict[str, Rows]:
        """Everything beside the parameters that has a row per original, by name."""
        state: dict[str, Rows] = {}
        for name, rows in self._params.items():
            parts = _parts(rows)
            with_grad = sum(part.grad is not None for part in parts)
            if with_grad not in (0, len(parts)):
                raise ValueError(f"params[{name!r}] has gradients for some of its tensors only")
            if with_grad:
                grads = [part.grad for part in parts if part.grad is not None]
                state[f"{name}.grad"] = grads[0] if isinstance(rows, torch.Tensor) else grads
            if optimizer is None:
                continue
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
                )
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(part) not in known for part in parts):
                raise ValueError(
                    f"optimizer does not update params[{name!r}]; one that updates copies or "
                    "shards of it needs its state given as `also`"
                )
            held = [optimizer.state.get(part, {}) for part in parts]
            for key in sorted({key for entry in held for key in entry}):
                values = [entry.get(key) for entry in held]
                label = f"{name}.{key}"
                if not all(isinstance(value, torch.Tensor) for value in values):
                    plain = isinstance(values[0], (int, float, str, type(None)))
                    if plain and all(value == values[0] for value in values):
                        continue  # one number or flag for all experts
                    raise ValueError(
                        f"optimizer state {label!r} is neither a tensor nor the same for all "
                        "experts: it can't follow them"
                    )
                tensors: list[torch.Tensor] = values
                if not isinstance(rows, torch.Tensor):
                    state[label] = tensors
                elif tensors[0].ndim > 0:
                    state[label] = tensors[0]
        for name, tensor in (also or {}).items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"also[{name!r}] must be a tensor, got {type(tensor).__name__}")
            state[f"also[{name!r}]"] = tensor
        for label, moved in state.items():
            for tensor in _parts(moved):
                if _is_dtensor(tensor):
                    raise TypeError(f"{label} is a DTensor: sharded state can't follow experts")
                if isinstance(moved, torch.Tensor) and len(tensor) != self._n_own:
                    raise ValueError(
                        f"{label} must have a row for each of this rank's {self._n_own} experts, "
                        f"got shape {tuple(tensor.shape)}: sharded state can't follow experts"
                    )
        return state

    def _relocate(self, seats: Ints, state: dict[str, Rows]) -> None:
        """Move the originals to ``seats``, everything that belongs to them too."""
        moved = np.flatnonzero(seats != self._seats)
        if moved.size:
            ep_size = self._placement.ep_size
            routes = self._plan(self._seats[moved], self._n_own, seats[moved], self._n_own, ep_size)
            with torch.no_grad():
                for rows in (*self._params.values(), *state.values()):
                    # All rows are read before the first is written: they may trade places.
                    local = _take(rows, routes.local_from)
                    message = None
                    if routes.remote:
                        message, work = self._exchange(_take(rows, routes.out), routes)
                        work.wait()
                    _put(rows, routes.local_to, local)
                    if message is not None:
                        _put(rows, routes.into, message)
        self._seats = seats
        self._index()

    def _index(self) -> None:
        """Derive the routes of weights and gradients from placement and seats."""
        p = self._placement
        slots = np.arange(p.n_physical)
        seat = self._seats[p.phy2log.numpy()]
        self._routes = self._plan(seat, self._n_own, slots, p.slots_per_rank, p.ep_size)
        r = self._routes
        self._back = r._replace(
            local_from=r.local_to, local_to=r.local_from, out=r.into, out_counts=r.in_counts,
            into=r.out, in_counts=r.out_counts,
        )  # fmt: skip
        # Equal targets go to different rounds, which gives sums a fixed order.
        seen = [0] * self._n_own
        self._local_rounds = self._rounds(self._back.local_from.host, self._back.local_to, seen)
        arrived = list(range(len(self._back.into.host)))
        seen = [0] * self._n_own
        self._arriving_rounds = self._rounds(arrived, self._back.into, seen)
        self._synced = None

    def _rounds(
        self, source: list[int], target: _Index, seen: list[int]
    ) -> list[tuple[_Index, _Index]]:
        rounds: list[tuple[list[int], list[int]]] = []
        for origin, row in zip(source, target.host, strict=True):
            if seen[row] == len(rounds):
                rounds.append(([], []))
            rounds[seen[row]][0].append(origin)
            rounds[seen[row]][1].append(row)
            seen[row] += 1
        return [(self._to_index(a), self._to_index(b)) for a, b in rounds]

    def _to_index(self, rows: list[int]) -> _Index:
        return _Index(rows, torch.tensor(rows, dtype=torch.int64, device=self.device))

    def _plan(
        self, source: Ints, per_source: int, target: Ints, per_target: int, n: int
    ) -> _Routes:
        """Routes of items from global rows ``source`` to global rows ``target``."""
        src, dst = source // per_source, target // per_target
        mine = self.rank
        local = np.flatnonzero((src == mine) & (dst == mine))
        out = np.flatnonzero((src == mine) & (dst != mine))
        into = np.flatnonzero((src != mine) & (dst == mine))
        # Both ends list the items of a pair of ranks in the same order.
        out = out[np.argsort(dst[out], kind="stable")]
        into = into[np.argsort(src[into], kind="stable")]

        def rows(values: Ints, per_rank: int) -> _Index:
            return self._to_index((values % per_rank).tolist())

        return _Routes(
            rows(source[local], per_source),
            rows(target[local], per_target),
            rows(source[out], per_source),
            np.bincount(dst[out], minlength=n).tolist(),
            rows(target[into], per_target),
            np.bincount(src[into], minlength=n).tolist(),
            bool((src != dst).any()),
        )

    def _exchange(self, rows: torch.Tensor, routes: _Routes) -> tuple[torch.Tensor, dist.Work]:
        """Start sending rows to their ranks; returns the rows that will have come, and the work."""
        rows = rows.contiguous()
        received = rows.new_empty((sum(routes.in_counts), *rows.shape[1:]))
        size = rows.shape[1:].numel() * rows.element_size()
        # As bytes, so that every dtype can be sent by every back end.
        work = dist.all_to_all_single(
            received.view(-1).view(torch.uint8),
            rows.view(-1).view(torch.uint8),
            [count * size for count in routes.in_counts],
            [count * size for count in routes.out_counts],
            group=self.group,
            async_op=True,
        )
        return received, work

    def _start(self, finish: Callable[[], None], async_op: bool) -> Handle:
        handle = Handle(finish)
        if async_op:
            self._pending = handle
        else:
            handle.wait()
        return handle

    def _require_idle(self) -> None:
        if self._pending is not None and not self._pending.done:
            raise RuntimeError("an asynchronous call is under way: wait() for its handle first")
        self._pending = None

    def _versions(self) -> list[int]:
        return [part._version for rows in self._params.values() for part in _parts(rows)]

    def _accumulator(self, name: str, dtype: torch.dtype) -> Callable[[torch.Tensor], None]:
        """Make the hook that sums a slot tensor's gradients in the parameter's dtype."""
        sums = self._sums

        def accumulate(weight: torch.Tensor) -> None:
            if weight.grad is None:
                return
            if name in sums:
                sums[name].add_(weight.grad)
            else:
                sums[name] = weight.grad.to(dtype)
            weight.grad = None

        return accumulate


def _parts(rows: Rows) -> list[torch.Tensor]:
    return [rows] if isinstance(rows, torch.Tensor) else rows


def _is_dtensor(tensor: torch.Tensor) -> bool:
    # By duck type, since importing the class takes a while.
    return hasattr(tensor, "to_local")


def _take(rows: Rows, index: _Index) -> torch.Tensor:
    """Return a fresh tensor of the given rows."""
    if isinstance(rows, torch.Tensor):
        return rows.detach().index_select(0, index.device)
    if not index.host:
        return rows[0].new_empty((0, *rows[0].shape))
    return torch.stack([rows[i].detach() for i in index.host])


def _put(rows: Rows, index: _Index, values: torch.Tensor) -> None:
    """Write the given rows."""
    if isinstance(rows, torch.Tensor):
        rows.detach().index_copy_(0, index.device, values.to(rows.dtype))
        return
    for i, value in zip(index.host, values, strict=True):
        rows[i].detach().copy_(value)


def _add_grad(rows: Rows, total: torch.Tensor) -> None:
    parts = (
        [(rows, total)] if isinstance(rows, torch.Tensor) else list(zip(rows, total, strict=True))
    )
    for param, value in parts:
        if param.grad is None:
            param.grad = value.to(param.dtype)
        else:
            param.grad += value.to(param.grad.dtype)


def _assign(placement: Placement, current: Ints) -> Ints:
    """Seat of each expert's original: rank * n_own + row, every seat taken once.

    A rank that holds a copy, if that is possible for all; among those the seat it has, then its
    rank, then the rank of the earliest copy by `Placement.log2phy`.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, needed here only

    n, ep_size = placement.n_logical, placement.ep_size
    n_own = n // ep_size
    slots = placement.log2phy.numpy()
    # The worst case of everything else adds up to less than one original without a copy.
    absent = 4.0 * n
    by_rank = np.full((n, ep_size), absent)
    for j in reversed(range(slots.shape[1])):
        have = np.flatnonzero(slots[:, j] >= 0)
        by_rank[have, slots[have, j] // placement.slots_per_rank] = 1 + j / slots.shape[1]
    experts = np.arange(n)
    by_rank[experts, current // n_own] -= 0.75
    cost = np.repeat(by_rank, n_own, axis=1)
    cost[experts, current] -= 0.25
    _, seats = linear_sum_assignment(cost)
    return np.asarray(seats, dtype=np.int64)


def _agree(groups: list[dist.ProcessGroup], check: Callable[[], dict[str, object]]) -> None:
    """Raise on every rank if ``check`` does on one of them, or returns another dict than rank 0's.

    Nothing but the outcome of the check is sent.
    """
    error: Exception | None = None
    spec: dict[str, object] = {}
    try:
        spec = check()
    except (TypeError, ValueError, RuntimeError) as caught:
        error = caught
    for group in groups:
        reports: list[tuple[str | None, dict[str, object]]] = [(None, {})] * group.size()
        dist.all_gather_object(reports, (None if error is None else str(error), spec), group=group)
        if error is None:
            error = _disagreement(reports)
    if error is not None:
        raise error


def _disagreement(reports: list[tuple[str | None, dict[str, object]]]) -> ValueError | None:
    for rank, (message, _) in enumerate(reports):
        if message is not None:
            return ValueError(f"on rank {rank} of the group: {message}")
    first = reports[0][1]
    for rank, (_, theirs) in enumerate(reports):
        for key in {**first, **theirs}:
            if first.get(key) == theirs.get(key):
                continue
            if key == "placement":
                return ValueError(
                    f"placement must be the same on all ranks, ranks 0 and {rank} of the group "
                    "differ; Balancer.placement is rank 0's everywhere"
                )
            return ValueError(
                f"{key} must be the same on all ranks, got {first.get(key, 'nothing')} on rank 0 "
                f"of the group and {theirs.get(key, 'nothing')} on rank {rank}"
            )
    return None


def _fingerprint(placement: Placement) -> tuple[object, ...]:
    return placement.ep_size, placement.n_logical, placement.phy2log.numpy().tobytes()


def _check_placement(placement: Placement, group: dist.ProcessGroup | None) -> None:
    if not isinstance(placement, Placement):
        raise TypeError(f"placement must be a Placement, got {type(placement).__name__}")
    size = 1 if group is None else group.size()
    if placement.ep_size != size:
        raise ValueError(
            f"placement must have the group's number of ranks as ep_size, {size}, "
            f"got {placement.ep_size}"
        )
    if placement.n_logical % size:
        raise ValueError(
            f"placement must have a multiple of {size} (ep_size) logical experts, "
            f"got {placement.n_logical}"
        )


def _check_params(
    params: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], n_own: int
) -> dict[str, Rows]:
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a mapping, got {type(params).__name__}")
    if not params:
        raise ValueError("params must name at least one tensor, got none")
    checked: dict[str, Rows] = {}
    for name, value in params.items():
        rows: Rows = value if isinstance(value, torch.Tensor) else list(value)
        parts = _parts(rows)
        for part in parts:
            if not isinstance(part, torch.Tensor) or not part.dtype.is_floating_point:
                raise TypeError(f"params[{name!r}] must hold floating-point tensors, got {part!r}")
            if _is_dtensor(part):
                raise TypeError(
                    f"params[{name!r}] is a DTensor; give this rank's whole experts as a plain "
                    "tensor (fully sharded parameters are not supported)"
                )
            if part.requires_grad and not part.is_leaf:
                raise ValueError(f"params[{name!r}] must hold leaves of the autograd graph")
        n = len(rows) if not isinstance(rows, torch.Tensor) or rows.ndim else 0
        if n != n_own:
            raise ValueError(f"params[{name!r}] must hold {n_own} experts on each rank, got {n}")
        if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
            raise ValueError(f"params[{name!r}] must hold tensors of one shape and dtype")
        checked[name] = rows
    devices = {part.device for rows in checked.values() for part in _parts(rows)}
    if len(devices) > 1:
        raise ValueError(f"params must be on one device, got {sorted(map(str, devices))}")
    return checked


def _check_backend(group: dist.ProcessGroup | None, device: torch.device) -> None:
    backend = None if group is None else dist.get_backend(group)
    if backend == ("gloo" if device.type == "cuda" else "nccl"):
        raise ValueError(
            f"group must be an NCCL group for parameters on a GPU and a gloo group on a CPU, "
            f"got {backend} for {device}"
        )


def _describe_params(params: dict[str, Rows]) -> dict[str, object]:
    return {
        f"params[{name!r}]": (
            "stacked" if isinstance(rows, torch.Tensor) else "separate",
            *tuple(_parts(rows)[0].shape),
            str(_parts(rows)[0].dtype),
            "trained" if _parts(rows)[0].requires_grad else "frozen",
        )
        for name, rows in params.items()
    }


def _describe_state(state: dict[str, Rows]) -> dict[str, object]:
    return {
        label: (tuple(_parts(rows)[0].shape), str(_parts(rows)[0].dtype))
        for label, rows in state.items()
    }
