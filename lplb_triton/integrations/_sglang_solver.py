"""SGLang's solver of one MoE layer, backed by `lplb_triton.Balancer`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lplb_triton._checks import check_choice, check_integer
from lplb_triton._membership import warn_if_no_group
from lplb_triton._objective import OBJECTIVES
from lplb_triton._updates import update_placements
from lplb_triton.balancer import Balancer
from lplb_triton.costs import TimeCost
from lplb_triton.integrations._checks import check_int_map
from lplb_triton.integrations._sglang_maps import MAP_NAMES, Maps, Tables, read_maps
from lplb_triton.placement import Placement
from lplb_triton.solution import SolveError
from lplb_triton.solver import DEFAULT_TOLERANCE

__all__ = ["LPLBSolver", "update_solvers"]

_ALONE = (
    "Give ep_group= to sum counts over it, or replicated_tokens=True where every rank holds all "
    "tokens"
)


class LPLBSolver:
    """One MoE layer's LP solver, with the interface of SGLang's class of that name.

    `solve` counts the tokens, sums them over the group, solves the LP and returns the share of
    every copy, for SGLang's sampling. `run` returns physical ids instead, with quotas met exactly.
    All ranks of the group call one or the other for every batch, with or without tokens; a rank
    that has none may call `solve` while others call `run`. With ``replicated_tokens`` nothing is
    summed, and `run` returns the same ids on every rank.

    Parameters
    ----------
    phy2log : torch.Tensor
        ``[num_physical]`` int, logical expert of each slot; the same on every rank. Rank r owns
        the r-th run of ``num_physical / num_gpus`` slots. Its device is the solver's. Both maps
        are copied.
    log2phy : torch.Tensor
        ``[num_logical, max_copies]`` int, slots of each expert, padded with -1. A row that lists
        only some of the expert's slots is warned of: its probabilities are the plan's shares of
        the slots listed, scaled to sum to 1, and so not the plan's.
    num_gpus : int
        Ranks; divides ``num_physical``.
    ep_group : ProcessGroup, GroupCoordinator or None
        The group to sum over: torch's, or an object whose ``device_group`` is torch's. Collective:
        every rank constructs its solvers in the same order. ``None``: counts are global. With
        ``replicated_tokens`` it only serves to compare the ranks' maps.
    logical_to_all_physical_map_num_valid : torch.Tensor or None
        ``[num_logical]`` int, slots that each row lists. Only checked.
    backend : {"triton", "torch"} or None
        As for `lplb_triton.Balancer`.
    tolerance : float
        Certified relative gap of the plans, at least 1e-5.
    replicated_tokens : bool
        Whether every rank holds all tokens of the group, in the same order, and all must pick the
        same copy for a token: SGLang without an all-to-all back end (``--moe-a2a-backend none``),
        where each rank computes its own experts for all tokens and the results are summed. Counts
        are then global as they are, and `run` doesn't depend on the rank. The ids of a batch must
        be equal on all ranks, bit for bit. `solve` is equal on all ranks too, but sampling by it
        is not.
    objective : {"tokens", "time"}
        As for `lplb_triton.Balancer`. With ``"time"``, which is of use in decoding, `solve` returns
        the shares of the plan by time: a closed copy has probability 0. Whole tiles need `run`,
        since sampling is noisy.
    cost : lplb_triton.TimeCost or None
        What a rank's expert products take, with ``objective="time"``; the same on every rank.

    Attributes
    ----------
    balancer : lplb_triton.Balancer
        What does the work; counts groups solved and certified.
    num_gpus, num_logical, num_phy, max_copies : int
        Sizes.
    ep_group, replicated_tokens
        As given.
    log2phy : torch.Tensor
        ``[num_logical, max_copies]`` int64 on the device.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that doesn't fit.

    Warns
    -----
    RuntimeWarning
        If rows of ``log2phy`` list only some of their expert's slots, or if torch.distributed is
        up with ``num_gpus`` ranks and neither ``ep_group`` nor ``replicated_tokens`` is given.

    Notes
    -----
    The tensor that `solve` returns is the same in every call, so CUDA graphs that read it stay
    valid; after a change of placement call `update` on the old solver instead of making another.
    Until the first batch it holds an even share for each slot listed.

    Examples
    --------
    >>> phy2log = torch.tensor([0, 1, 0, 2])
    >>> log2phy = torch.tensor([[0, 2], [1, -1], [3, -1]])
    >>> solver = LPLBSolver(phy2log, log2phy, 2)
    >>> solver.solve(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]])).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        phy2log: torch.Tensor,
        log2phy: torch.Tensor,
        num_gpus: int,
        ep_group: object = None,
        logical_to_all_physical_map_num_valid: torch.Tensor | None = None,
        *,
        backend: str | None = None,
        tolerance: float = DEFAULT_TOLERANCE,
        replicated_tokens: bool = False,
        objective: str = "tokens",
        cost: TimeCost | None = None,
    ) -> None:
        self.num_gpus = check_integer("num_gpus", num_gpus)
        self.ep_group = ep_group
        if not isinstance(replicated_tokens, bool):
            raise TypeError(
                f"replicated_tokens must be a bool, got {type(replicated_tokens).__name__}"
            )
        self.replicated_tokens = replicated_tokens
        group = _process_group(ep_group)
        if group is not None and group.size() != self.num_gpus:
            raise ValueError(
                f"ep_group must have num_gpus {self.num_gpus} ranks, got {group.size()}"
            )
        phy2log = check_int_map("phy2log", phy2log, 1)
        log2phy = check_int_map("log2phy", log2phy, 2)
        self.num_phy, (self.num_logical, self.max_copies) = len(phy2log), log2phy.shape
        n_valid = logical_to_all_physical_map_num_valid
        if phy2log.device != log2phy.device:
            raise ValueError(f"log2phy is on {log2phy.device}, phy2log on {phy2log.device}")
        check_choice("objective", objective, OBJECTIVES)
        self._by_time = objective == "time"
        maps = read_maps(
            phy2log, log2phy, n_valid, self.num_gpus, None, stacklevel=2, by_slot=self._by_time
        )
        if group is None and not replicated_tokens:
            warn_if_no_group(maps.placement, stacklevel=2, advice=_ALONE)
        # Tensors made in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            self.balancer = Balancer(
                maps.placement,
                group=group,
                # Without a group there is no other rank whose rounding could differ.
                rank=0 if group is None and not replicated_tokens else None,
                quotas="replicated" if replicated_tokens else "local",
                device=phy2log.device,
                backend=backend,
                tolerance=tolerance,
                objective=objective,
                cost=cost,
            )
            _check_same(maps.placement, self.balancer.placement)
            self._allocate(maps)

    def _allocate(self, maps: Maps) -> None:
        """Make the tables and the buffer of `solve`, and compile the kernels of a batch."""
        device = self.balancer.device
        self._tables = Tables(maps, (self.num_logical, self.max_copies), device)
        self._one = torch.ones(1, dtype=torch.float32, device=device)
        self._probabilities = self._tables.even.clone()
        if self.balancer.backend == "triton":
            self.balancer.warmup()
            no_counts = torch.zeros(self.num_logical, dtype=torch.int32, device=device)
            self._write_probabilities(self._find_shares(no_counts))
            self._probabilities.copy_(self._tables.even)
            self.balancer.certified.zero_()
            self.balancer.solves.zero_()

    @property
    def log2phy(self) -> torch.Tensor:
        """``[num_logical, max_copies]`` int64 on the device, slots of each expert."""
        return self._tables.log2phy

    def solve(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Shares of every copy for this batch; collective over the group, no host sync on Triton.

        Parameters
        ----------
        topk_ids : torch.Tensor
            int32 or int64, any shape (SGLang: ``[tokens, top_k]``, possibly no tokens), logical
            ids in [-1, num_logical); -1 is not counted. Columns of fused shared experts, whose
            ids lie beyond, must be split off.

        Returns
        -------
        torch.Tensor
            ``[num_logical, max_copies]`` float32, in the layout of ``log2phy``: the part of the
            expert's tokens that each copy should take. Each row sums to 1, padding is 0. The same
            tensor in every call: the next one overwrites it.

        Raises
        ------
        TypeError, ValueError
            As for `lplb_triton.Balancer.run`.
        RuntimeError
            On a GPU, if an earlier call met an id out of range (it was not counted).
        """
        try:
            counts, _ = self.balancer.count(topk_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _translate_error(error) from None
        return self._write_probabilities(self._find_shares(self.balancer.sync(counts)))

    def _find_shares(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the plan's shares: by slot if it is by time, else by rank and column."""
        if self._by_time:
            return self.balancer.share_slots(counts)
        return self.balancer.solve(counts).shares

    def run(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Physical ids for this batch, in place of `solve` and sampling; quotas are met exactly.

        Parameters
        ----------
        topk_ids : torch.Tensor
            As for `solve`.

        Returns
        -------
        torch.Tensor
            Physical ids, contiguous, of the shape and dtype of ``topk_ids``; -1 stays -1. All
            slots of ``phy2log`` are used, whatever ``log2phy`` lists.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for `solve`.
        """
        try:
            return self.balancer.run(topk_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _translate_error(error) from None

    def update(
        self,
        phy2log: torch.Tensor,
        log2phy: torch.Tensor,
        logical_to_all_physical_map_num_valid: torch.Tensor | None = None,
    ) -> None:
        """Write another placement of the same sizes into the tables; collective over the group.

        Waits for the device. Captured CUDA graphs use the new placement from their next replay on.
        Maps that haven't changed are compared, and nothing is written. For more than one layer see
        `update_solvers`.

        Parameters
        ----------
        phy2log, log2phy, logical_to_all_physical_map_num_valid : torch.Tensor
            As at construction, of the same shapes; on any device, quickest on the CPU.

        Raises
        ------
        TypeError, ValueError
            Naming the argument that doesn't fit, on every rank if it is one rank's. Nothing is
            changed then, unless the cause is that ranks disagree on ``phy2log``.
        """
        maps = (phy2log, log2phy, logical_to_all_physical_map_num_valid)
        _update([self], maps, "LPLBSolver.update", ())

    def check(self) -> None:
        """Wait for the device and raise if a batch was not certified or held a bad id.

        Raises
        ------
        RuntimeError
            If a call, or a graph replay, met an id out of range.
        SolveError
            If a plan since the start was not certified within the tolerance; it was feasible and
            no worse than the even split all the same.
        """
        try:
            self.balancer.check()
        except RuntimeError as error:
            raise _translate_error(error) from None
        solves, certified = int(self.balancer.solves), int(self.balancer.certified)
        if certified != solves:
            raise SolveError(
                f"{solves - certified} of {solves} batches not certified within "
                f"{self.balancer.tolerance:g}"
            )

    def _write_probabilities(self, shares: torch.Tensor) -> torch.Tensor:
        """Write shares of `_find_shares` by expert and copy into the fixed buffer."""
        tables = self._tables
        part = torch.cat([shares.reshape(-1), self._one])[tables.cell] * tables.part
        listed = part.sum(1, keepdim=True)
        torch.where(listed > 0, part / listed, tables.even, out=self._probabilities)
        return self._probabilities


def update_solvers(
    solvers: Sequence[LPLBSolver],
    phy2log: torch.Tensor,
    log2phy: torch.Tensor,
    logical_to_all_physical_map_num_valid: torch.Tensor | None = None,
) -> None:
    """Call `LPLBSolver.update` for many layers at once; collective over their group.

    However many layers there are, the ranks meet once, and the device is waited for twice.

    Parameters
    ----------
    solvers : sequence of LPLBSolver
        Of equal sizes, on one device and with one group, in the same order on every rank.
    phy2log : torch.Tensor
        ``[layers, num_physical]`` int.
    log2phy : torch.Tensor
        ``[layers, num_logical, max_copies]`` int.
    logical_to_all_physical_map_num_valid : torch.Tensor or None
        ``[layers, num_logical]`` int. All on any device, quickest on the CPU.

    Raises
    ------
    TypeError, ValueError
        As for `LPLBSolver.update`.
    """
    solvers = list(solvers)
    if not solvers:
        return
    places = {(id(s.balancer.group), s.balancer.device) for s in solvers}
    sizes = {(s.num_gpus, s.num_phy, s.num_logical, s.max_copies) for s in solvers}
    for what, found in (("of one group and device", places), ("of equal sizes", sizes)):
        if len(found) > 1:
            raise ValueError(f"solvers must be {what}, got {len(found)} kinds")
    maps = (phy2log, log2phy, logical_to_all_physical_map_num_valid)
    _update(solvers, maps, "update_solvers", (len(solvers),))


def _update(
    solvers: list[LPLBSolver],
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    purpose: str,
    layers: tuple[int, ...],
) -> None:
    """Check the maps, whose first axes are ``layers``, on all ranks, and write them."""
    read, problem = [], None
    try:
        read = _read_layers(solvers, maps, layers)
    except Exception as error:  # the other ranks must learn of any error
        problem = error

    def write(used: list[Placement]) -> None:
        for mine, agreed in zip(read, used, strict=True):
            _check_same(mine.placement, agreed)
        for solver, mine in zip(solvers, read, strict=True):
            solver._tables.write(mine)

    balancers = [solver.balancer for solver in solvers]
    update_placements(balancers, [m.placement for m in read], purpose, problem=problem, also=write)


def _read_layers(
    solvers: list[LPLBSolver],
    maps: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    layers: tuple[int, ...],
) -> list[Maps]:
    """Check the maps of each layer and return them."""
    first, (phy2log, log2phy, n_valid) = solvers[0], maps
    experts = _move_to_cpu(MAP_NAMES[0], phy2log, layers, (first.num_phy,))
    slots = _move_to_cpu(MAP_NAMES[1], log2phy, layers, (first.num_logical, first.max_copies))
    listed = None
    if n_valid is not None:
        listed = _move_to_cpu(MAP_NAMES[2], n_valid, layers, (first.num_logical,))
    return [
        read_maps(
            experts[i],
            slots[i],
            None if listed is None else listed[i],
            first.num_gpus,
            solver.balancer.placement,
            stacklevel=4,
            by_slot=solver._by_time,
        )
        for i, solver in enumerate(solvers)
    ]


def _move_to_cpu(
    name: str, value: torch.Tensor, layers: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """Check a map of all layers, and return it as ``[layers, *shape]`` on the CPU."""
    value = check_int_map(name, value, len(layers) + len(shape))
    if value.shape != layers + shape:
        raise ValueError(f"{name} must have shape {layers + shape}, got {tuple(value.shape)}")
    return value.detach().cpu().reshape(-1, *shape)


def _process_group(ep_group: object) -> dist.ProcessGroup | None:
    """Return torch's process group of ``ep_group``, or raise naming it."""
    if ep_group is None:
        return None
    for group in (ep_group, getattr(ep_group, "device_group", None)):
        if isinstance(group, dist.ProcessGroup):
            return group
    raise TypeError(
        "ep_group must be a ProcessGroup, have one as device_group, or be None, "
        f"got {type(ep_group).__name__}"
    )


def _translate_error(error: Exception) -> Exception:
    """Return the balancer's error about ``idx`` as one about ``topk_ids``; others as they are."""
    message = str(error)
    if type(error) in (TypeError, ValueError, RuntimeError) and message.startswith("idx "):
        return type(error)("topk_ids" + message.removeprefix("idx"))
    return error


def _check_same(mine: Placement, agreed: Placement) -> None:
    """Raise if rank 0 has another placement."""
    if mine != agreed:
        raise ValueError("phy2log must be the same on every rank; rank 0's differs from this one's")
