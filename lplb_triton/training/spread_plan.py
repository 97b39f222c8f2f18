"""What one rank sends to fill the redundant slots of a placement that keeps experts at home."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from lplb_triton._checks import check_timeout, resolve_device
from lplb_triton.live import LivePlan
from lplb_triton.placement import Placement
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
from lplb_triton.training.live_experts import read_experts
from lplb_triton.training.routes import Ints, plan_redundant_traffic
from lplb_triton.training.rows import (
    Index,
    Rows,
    ordinary_tensors,
    parts_of,
    row_shape,
)
from lplb_triton.training.transfer import start_copies, start_sums

__all__ = ["FILL_TIMEOUT", "SpreadPlan", "find_plan"]

# Seconds that ranks on CPUs wait for one another when they compare what live slots hold.
FILL_TIMEOUT = 30.0

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
        `Balancer.placement` is. With live slots, this is the plan of a batch in which all of them
        are empty, and `fill` makes those of other batches.
    group : torch.distributed.ProcessGroup or None
        The EP group, NCCL for tensors on a GPU, gloo on a CPU; None if ``ep_size`` is 1.
    device : torch.device, str or None
        Device of the originals; by default the current GPU, or the CPU if there is none.
    timeout : float
        Seconds that ranks on CPUs wait for one another in `fill`. On GPUs the time-out of the
        process group bounds the wait.

    Attributes
    ----------
    placement : Placement
        As given.
    rank : int
        This rank's number in the group.
    n_local : int
        Experts of each rank: rank r has the originals of ``r * n_local`` and following.
    n_redundant : int
        Redundant slots of each rank; slots ``n_local`` to ``slots_per_rank - 1`` are redundant.
        Live slots are among them, the last ones. Where they are empty, their weights are zeros.

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
        timeout: float = FILL_TIMEOUT,
    ) -> None:
        def check() -> Spec:
            check_group("group", group)
            check_placement(placement, group, may_have_live=True)
            check_at_home(placement)
            self.device = resolve_device(device)
            check_backend(group, self.device)
            self._timeout = check_timeout(timeout)
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
        made.device, made._timeout = device, FILL_TIMEOUT
        made._set_up(placement, group, idle)
        return made

    def fill(self, experts: LivePlan | torch.Tensor) -> SpreadPlan:
        """Return the plan of a batch, in which live slots hold these experts.

        It is collective over the group. The ranks compare a checksum of the experts, so call it
        before the tokens of the batch are sent. It reads the experts on the host, which waits for
        the device. `spread` and the backward pass through its slots take the result as any plan.

        Parameters
        ----------
        experts : LivePlan or torch.Tensor
            `Balancer.live` after the batch's `Balancer.run`, or its ``experts``:
            ``[ep_size, live_per_rank]`` int32 or int64, the logical expert of each live slot, -1
            for none; the same on all ranks.

        Returns
        -------
        SpreadPlan
            This plan itself if no live slot is filled. Otherwise one that is retired with this
            plan and agrees with it on the placement, the group and `n_redundant`.

        Raises
        ------
        TypeError, ValueError
            If the placement has no live slots, or ``experts`` doesn't fit it.
        RuntimeError
            If the plan is idle, was retired, or is that of a batch already.
        SyncError
            On every rank, if the experts differ between ranks or a rank's don't fit. If a rank
            dies or doesn't come within the time-out, it is named where it can be found.
        """
        if not self.placement.live_per_rank:
            raise ValueError(
                f"the plan's placement must have live slots (with_live_slots), got {self.placement}"
            )
        if self._parent is not None:
            raise RuntimeError("this plan is that of a batch: call fill of the plan it was made by")
        if self.idle:
            raise RuntimeError("an idle plan sends nothing, so its live slots can't be filled")
        self.require_current()
        self._fills += 1
        with ordinary_tensors():
            found = read_experts(
                experts, self.placement, self.group, self.device, self._timeout, self._fills
            )
        if not (found >= 0).any():
            return self
        made = object.__new__(SpreadPlan)
        made.device, made._timeout = self.device, self._timeout
        made._set_up(self.placement, self.group, parent=self, live=found)
        return made

    def _set_up(
        self,
        placement: Placement,
        group: dist.ProcessGroup | None,
        idle: bool = False,
        *,
        parent: SpreadPlan | None = None,
        live: Ints | None = None,
    ) -> None:
        """Make what this rank sends, and register the plan for the operators."""
        self.placement, self.group, self.idle = placement, group, idle
        self.rank = 0 if group is None else dist.get_rank(group)
        self.n_local = placement.n_logical // placement.ep_size
        self.n_redundant = placement.slots_per_rank - self.n_local
        with ordinary_tensors():
            self.traffic = plan_redundant_traffic(
                placement, self.rank, self.device, idle=idle, live=live
            )
        n_live = placement.live_per_rank
        if live is None:
            live = np.full((placement.ep_size, n_live), -1)
        first = self.n_redundant - n_live
        # Redundant rows without weights: they are zeroed, for products that pass over all slots.
        self._empty_rows = [first + i for i in np.flatnonzero(live[self.rank] < 0).tolist()]
        self._parent, self._fills = parent, 0
        # Parts of an original by expert that the operators take: those with copies, and one more,
        # so that autograd brings a rank without any to the exchange of gradients.
        self.given = sorted({0, *self.copied.host})
        self._current = True
        # Plans of batches share what the ranks have agreed on, so that no batch has to ask again.
        self._trained: dict[tuple[_Fact, ...], tuple[bool, ...]] = (
            {} if parent is None else parent._trained
        )
        self.handle = next(_handles)
        _plans[self.handle] = self

    @property
    def copied(self) -> Index:
        """Rows of this rank's experts that have copies."""
        return self.traffic.summed

    @property
    def is_of_batch(self) -> bool:
        """Whether `fill` made this plan, so that its live slots hold the experts of a batch."""
        return self._parent is not None

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

        A backward pass through slots of this plan raises from now on: what it recomputes, or reads
        from the slots' memory, would be of the other plan.
        """
        self._current = False

    def require_current(self) -> None:
        """Raise a RuntimeError if the plan, or the one that it was made by, was retired."""
        if self._parent is not None:
            self._parent.require_current()
        if not self._current:
            raise RuntimeError(
                "the placement changed between a forward pass and its backward pass (or what it "
                "recomputes): change it between optimizer steps, when no graph is alive"
            )

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

        They are written to the tensors ``into``, if these are given.
        """
        if into is None:
            into = [
                parts_of(rows)[0].new_empty((self.n_redundant, *row_shape(rows)))
                for rows in originals
            ]
        if self.idle:
            for slots in into:
                slots.zero_()
        for row in self._empty_rows:
            for slots in into:
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
