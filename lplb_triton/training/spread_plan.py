"""What one rank sends to fill the redundant slots of a placement that keeps experts at home."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lplb_triton._checks import check_timeout, resolve_device
from lplb_triton.live import LivePlan
from lplb_triton.placement import Placement
from lplb_triton.sync import SyncError
from lplb_triton.sync._base import group_timeout
from lplb_triton.training.checks import (
    Spec,
    check_at_home,
    check_backend,
    check_group,
    check_on_all_ranks,
    check_placement,
    describe_placement,
    is_trained,
    is_usable,
)
from lplb_triton.training.live_agreement import (
    checksum_experts,
    read_experts,
    require_same_plan,
)
from lplb_triton.training.routes import Traffic, plan_redundant_traffic
from lplb_triton.training.rows import Index, Rows, ordinary_tensors, parts_of, row_shape
from lplb_triton.training.transfer import start_copies, start_sums

__all__ = ["SpreadPlan", "find_plan"]

_Fact = tuple[bool, tuple[int, ...], str]

_handles = itertools.count()
_plans: weakref.WeakValueDictionary[int, SpreadPlan] = weakref.WeakValueDictionary()


class SpreadPlan:
    """Which rows `spread` sends: one placement, seen from one rank.

    Construction is collective over the group and checks first: if the placement of one rank is
    wrong or differs from rank 0's, every rank raises.

    Parameters
    ----------
    placement : Placement
        One that keeps experts at home: made with ``keep_home=True``. The same on all ranks;
        `Balancer.placement` is. Its live slots, if it has any, are empty: `fill` makes the plan
        of a batch.
    group : torch.distributed.ProcessGroup or None
        The EP group, NCCL for tensors on a GPU, gloo on a CPU; None if ``ep_size`` is 1.
    device : torch.device, str or None
        Device of the originals; by default the current GPU, or the CPU if there is none.
    timeout : float or None
        On a CPU, bound on the wait for other ranks' plans of a batch, in seconds; by default the
        group's own.

    Attributes
    ----------
    placement : Placement
        As given.
    parent : SpreadPlan or None
        The plan of the placement, of one that `fill` has made.
    rank : int
        This rank's number in the group.
    n_local : int
        Experts of each rank: rank r has the originals of ``r * n_local`` and following.
    n_redundant : int
        Redundant slots of each rank; slots ``n_local`` to ``slots_per_rank - 1`` are redundant,
        the live ones among them come last.

    Raises
    ------
    TypeError, ValueError
        Naming the argument and, if it is another rank's, the rank.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        timeout: float | None = None,
    ) -> None:
        def check() -> Spec:
            check_group("group", group)
            check_placement(placement, group, live=True)
            check_at_home(placement)
            self._timeout = None if timeout is None else check_timeout(timeout)
            self.device = resolve_device(device)
            check_backend(group, self.device)
            return {"placement": describe_placement(placement)}

        check_on_all_ranks({"group": group} if is_usable(group) else {}, check)
        self._set_up(placement, group)

    @classmethod
    def of_agreed(
        cls,
        placement: Placement,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        idle: bool = False,
    ) -> SpreadPlan:
        """Make a plan of a placement that the ranks have agreed on, without communication.

        By an idle plan nothing is sent, and the weights of redundant slots are zeros.
        """
        check_at_home(placement)
        made = object.__new__(cls)
        made.device, made._timeout = device, None
        made._set_up(placement, group, idle)
        return made

    def fill(self, live: LivePlan | torch.Tensor) -> SpreadPlan:
        """Return the plan of a batch, in which live slots hold experts; local to this rank.

        It is used like this one, for one batch: every batch, and every region that is recomputed,
        takes a plan of its own. All ranks fill theirs by the same experts, which they compare
        before the first weights are sent (see `agree`). Where no live slot holds an expert, what
        is sent is what this plan sends. It waits for the device.

        Parameters
        ----------
        live : LivePlan or torch.Tensor
            `Balancer.live` after the batch's `Balancer.run`, or its ``experts``,
            ``[ep_size, live_per_rank]`` int32, -1 for none.

        Returns
        -------
        SpreadPlan
            Slots that stay empty hold zeros. It is retired with this plan.

        Raises
        ------
        TypeError, ValueError
            If the placement has no live slots, or ``live`` doesn't fit.
        RuntimeError
            If this plan was retired.
        """
        if not self.placement.live_per_rank:
            raise ValueError(
                "fill needs a plan whose placement has live slots: placement.with_live_slots(1)"
            )
        if self.parent is not None or self.idle:
            raise ValueError("fill needs the plan of a placement, not that of a batch or idle one")
        self.require_current()
        experts = read_experts(live, self.placement)
        made = object.__new__(type(self))
        made.device, made._timeout = self.device, self._timeout
        made._set_up(self.placement, self.group, batch=(self, experts))
        return made

    def _set_up(
        self,
        placement: Placement,
        group: dist.ProcessGroup | None,
        idle: bool = False,
        batch: tuple[SpreadPlan, NDArray[np.int32]] | None = None,
    ) -> None:
        """Make what this rank sends, and register the plan for the operators."""
        self.placement, self.group, self.idle = placement, group, idle
        self.rank = 0 if group is None else dist.get_rank(group)
        self.n_local = placement.n_logical // placement.ep_size
        self.n_redundant = placement.slots_per_rank - self.n_local
        self.parent: SpreadPlan | None = None
        self._trained: dict[tuple[_Fact, ...], tuple[bool, ...]] = {}
        self._latest: tuple[bytes, Traffic] | None = None
        self._failure: SyncError | None = None
        self._checksum: int | None = None
        with ordinary_tensors():
            if batch is None:
                self.traffic = plan_redundant_traffic(placement, self.rank, self.device, idle=idle)
            else:
                self.parent, experts = batch
                self._trained = self.parent._trained
                self._checksum = checksum_experts(experts)
                self.traffic = self.parent._plan_batch(experts)
        # Parts of an original by expert that the operators take: those with copies, and one more,
        # so that autograd brings a rank without any to the exchange of gradients.
        self.given = sorted({0, *self.copied.host})
        routes = self.traffic.weight_routes
        filled = {*routes.local_to.host, *routes.into.host}
        self._empty = [row for row in range(self.n_redundant) if row not in filled]
        self._current = True
        self.handle = next(_handles)
        _plans[self.handle] = self

    def _plan_batch(self, experts: NDArray[np.int32]) -> Traffic:
        """Plan what this rank sends where live slots hold ``experts``."""
        if (experts < 0).all():
            return self.traffic
        key = experts.tobytes()
        # A checkpointed region that is recomputed has the same experts once more.
        if self._latest is None or self._latest[0] != key:
            traffic = plan_redundant_traffic(self.placement, self.rank, self.device, live=experts)
            self._latest = key, traffic
        return self._latest[1]

    def agree(self) -> None:
        """Compare the experts of live slots over the ranks; collective, in the first call only.

        The first `spread` by the plan of a batch does it before it sends anything. To compare
        before tokens are sent, call it on all ranks before that. On a GPU the ranks wait for one
        another as long as the group's collectives do.

        Raises
        ------
        SyncError
            On every rank, if ranks have other experts in live slots, or, on a CPU, don't come in
            time. Every later batch of the parent raises it, too.
        """
        parent = self.parent
        if parent is None or self.group is None:
            return
        if parent._failure is not None:
            raise parent._failure
        if self._checksum is None:
            return
        checksum, self._checksum = self._checksum, None
        limit = self._timeout
        if limit is None:
            limit = group_timeout(self.group, self.device)
        try:
            require_same_plan(
                self.group, "filling live slots", limit, (self.n_redundant, checksum), self.device
            )
        except SyncError as error:
            parent._failure = error
            raise

    @property
    def copied(self) -> Index:
        """Rows of this rank's experts that have copies."""
        return self.traffic.summed

    def __repr__(self) -> str:
        """Write the placement and the rank in one line."""
        return f"SpreadPlan({self.placement!r}, rank={self.rank})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled, since a plan belongs to a process group."""
        raise TypeError("a SpreadPlan can't be pickled or copied: make another of its placement")

    def count_messages(self) -> tuple[int, int]:
        """Return how many rows of each original this rank sends and receives.

        A forward pass sends and receives as many rows of weights, and a backward pass receives and
        sends as many rows of gradients.
        """
        return sum(self.traffic.weight_routes.out_counts), sum(self.traffic.weight_routes.in_counts)

    def retire(self) -> None:
        """Declare that another plan has taken this one's place.

        A backward pass through slots of this plan, or of a batch that was filled by it, raises from
        now on: what it recomputes, or reads from the slots' memory, would be of the other plan.
        """
        self._current = False

    def require_current(self) -> None:
        """Raise a RuntimeError if the plan was retired."""
        if not self._current:
            raise RuntimeError(
                "the placement changed between a forward pass and its backward pass (or what it "
                "recomputes): change it between optimizer steps, when no graph is alive"
            )
        if self.parent is not None:
            self.parent.require_current()

    def agree_on_training(self, originals: Sequence[Rows]) -> tuple[bool, ...]:
        """Return for each original whether any rank trains any of its experts.

        Ranks that train none take part in the gradients' exchange all the same, or the others
        would wait for them. It is collective where originals differ from those of earlier calls.

        Raises
        ------
        ValueError
            On every rank, if originals differ in number, shapes or dtypes between ranks, or a
            stacked one requires gradients on some of them only.
        """
        facts = tuple(_describe_rows(rows) for rows in originals)
        if self.idle or self.group is None:
            return tuple(fact[0] for fact in facts)
        if facts in self._trained:
            return self._trained[facts]
        everywhere: list[tuple[_Fact, ...]] = [()] * self.group.size()
        dist.all_gather_object(everywhere, facts, group=self.group)
        shapes = [[fact[1:] for fact in theirs] for theirs in everywhere]
        for rank, theirs in enumerate(shapes):
            if theirs != shapes[0]:
                raise ValueError(
                    "originals must have the same shapes and dtypes on all ranks, "
                    f"got {shapes[0]} on rank 0 and {theirs} on rank {rank}"
                )
        for i, ranks in enumerate(zip(*everywhere, strict=True)):
            if isinstance(originals[i], torch.Tensor) and len({fact[0] for fact in ranks}) > 1:
                raise ValueError(
                    f"requires_grad of originals[{i}] must be the same on all ranks, "
                    f"got {[fact[0] for fact in ranks]}"
                )
        trained = tuple(any(fact[0] for fact in ranks) for ranks in zip(*everywhere, strict=True))
        self._trained[facts] = trained
        return trained

    def send_weights(
        self, originals: Sequence[Rows], into: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return the weights of this rank's redundant slots, ``[n_redundant, ...]`` each.

        They are written to the tensors ``into``, if these are given. Rows of empty slots are zeros.
        """
        if into is None:
            into = [
                parts_of(rows)[0].new_empty((self.n_redundant, *row_shape(rows)))
                for rows in originals
            ]
        self.agree()
        for slots in into:
            for row in self._empty:
                slots[row].zero_()
        pairs = list(zip(into, originals, strict=True))
        start_copies(pairs, self.traffic.weight_routes, self.group)()
        return list(into)

    def return_gradients(
        self, gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return the sums of the copies' gradients, ``[len(copied), ...]`` each.

        Parameters
        ----------
        gradients
            Gradients of the weights that `send_weights` returned.
        into
            Contiguous tensors ``[n_local, ...]`` of the gradients' dtype: the sums are added to
            their rows and rounded once, and nothing is returned.

        Returns
        -------
        list of torch.Tensor
            A row for each of ``copied``, in at least float32. The order of sums is fixed: copies
            on this rank first, then the others by slot number.
        """
        return start_sums(gradients, self.traffic, self.group)(into)


def _describe_rows(rows: Rows) -> _Fact:
    """Return whether any of the rows is trained, and shape and dtype of a row."""
    return is_trained(rows), tuple(row_shape(rows)), str(parts_of(rows)[0].dtype)


def find_plan(handle: int) -> SpreadPlan:
    """Return the plan with this number, or raise if it no longer exists."""
    plan = _plans.get(handle)
    if plan is None:
        raise RuntimeError("the SpreadPlan of this call no longer exists; keep a reference to it")
    return plan
