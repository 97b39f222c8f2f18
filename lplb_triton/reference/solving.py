"""Plain-torch twins of the kernels: no Triton, no shared code, any device.

The torch backend of the package runs these, and the tests hold the kernels against them.
Equation numbers refer to docs/method.md.
"""

from __future__ import annotations

import torch

from lplb_triton.problem import Problem
from lplb_triton.solution import SHARE_BITS, Solution, Status

__all__ = [
    "as_plan",
    "assign_copies",
    "certify",
    "check_counts_of",
    "check_cumulative",
    "copy_quotas",
    "count_experts",
    "cumulative_shares",
    "divide_quotas",
    "gap_to_aim_at",
    "quantize_shares",
    "rounding_offsets",
    "shares_of_quotas",
    "solve",
    "valid_loads",
]

# Start and step of the interior-point method (equations 4 and 9).
START_MARGIN = 0.1
START_CENTERING = 0.03
STEP_FACTOR = 0.99
MIN_CENTERING = 0.01
REGULARIZATION = 0.03
# Columns whose total load is under this part of the tolerance stay split evenly (equation 10).
LIGHT_PART = 0.05
# The loop aims a little lower than the tolerance, so that rounding the shares keeps it, but at no
# less than a part of it.
TARGET_PART = 0.98
LEAST_TARGET_PART = 0.75
# Shares are summed as multiples of 2**-36 before they are rounded to multiples of 2**-24.
PART_BITS = 36


def quantize_shares(shares: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Round shares to multiples of 2**-24 that add up to exactly 1 (equation 11).

    Running sums over a column are rounded, so each share is off by less than one unit.

    Parameters
    ----------
    shares : torch.Tensor
        ``[..., G, C]`` float, non-negative, about 1 in sum over G where a column has a copy.
    mask : torch.Tensor
        ``[..., G, C]`` bool, where a copy is.

    Returns
    -------
    torch.Tensor
        ``[..., G, C]`` int64 units of 2**-24; each column with a copy sums to 2**24.
    """
    # Integers, whose sums are exact and the same on every device.
    parts = torch.where(mask, torch.round(shares.double() * (1 << PART_BITS)), 0.0).long()
    upto = parts.cumsum(-2)
    total = upto[..., -1:, :].clamp(min=1)
    upto = ((upto << SHARE_BITS) + total // 2) // total
    return torch.diff(upto, dim=-2, prepend=torch.zeros_like(upto[..., :1, :]))


class _Newton:
    """The linear system of one interior-point iterate, for a batch of instances."""

    def __init__(
        self,
        x: torch.Tensor,
        z: torch.Tensor,
        s: torch.Tensor,
        y: torch.Tensor,
        w: torch.Tensor,
        active: torch.Tensor,
    ) -> None:
        tiny = torch.finfo(x.dtype).tiny
        self.x, self.s, self.y, self.w, self.active = x, s, y, w.unsqueeze(1), active
        self.d_copy = torch.where(active, x / z, 0.0)
        self.d_column = self.d_copy.sum(1, keepdim=True).clamp(min=tiny)
        self.wd = self.w * self.d_copy
        # Equation 5: off-diagonal first, the diagonal from its row sums (no subtraction).
        v = self.wd / self.d_column.sqrt()
        # In float64, which autocast and the precision set for float32 products don't touch.
        off = (v.double() @ v.double().mT).to(v.dtype)
        off.diagonal(dim1=-2, dim2=-1).zero_()
        diagonal = off.sum(2) + s / y
        # Equation 7: adding rho * ones changes nothing, since dy sums to 0.
        rho = REGULARIZATION * diagonal.amax(1)
        matrix = torch.diag_embed(diagonal) - off + rho[:, None, None]
        self.factor, _ = torch.linalg.cholesky_ex(matrix)

    def column_mean(self, value: torch.Tensor) -> torch.Tensor:
        """D-weighted mean over the copies of each column, ``[B, 1, C]``."""
        return (self.d_copy * value).sum(1, keepdim=True) / self.d_column

    def direction(
        self, target_xz: torch.Tensor, target_sy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Solve equation 5 and return (dx, dz, ds, dy) by equation 6."""
        q = torch.where(self.active, target_xz / self.x, 0.0)
        q_mean = self.column_mean(q)
        rhs = (self.wd * (q - q_mean)).sum(2) + target_sy / self.y
        both = torch.stack([rhs, torch.ones_like(rhs)], dim=2)
        u, v = torch.cholesky_solve(both, self.factor).unbind(2)
        dt = u.sum(1, keepdim=True) / v.sum(1, keepdim=True)
        dy = u - dt * v
        slope = self.w * (dy.unsqueeze(2) - self.column_mean(dy.unsqueeze(2).expand_as(q)))
        dx = self.d_copy * (q - q_mean - slope)
        dz = torch.where(self.active, slope + q_mean, 0.0)
        ds = dt - (self.w * dx).sum(2)
        return dx, dz, ds, dy


def _step_length(*pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Largest step at which every value stays non-negative, ``[B]`` (equation 9)."""
    rates = [torch.where(dv < 0, -dv / v, 0.0).flatten(1).amax(1) for v, dv in pairs]
    return 1.0 / torch.stack(rates).amax(0).clamp(min=1e-30)


def solve(problem: Problem, tolerance: float, max_iterations: int, dtype: torch.dtype) -> Solution:
    """Primal-dual interior-point method on a batch of instances (equations 1 to 11).

    Whatever the caller has set in torch makes no difference, and nothing has a gradient.

    Parameters
    ----------
    problem : Problem
        The instances.
    tolerance : float
        Relative gap to reach.
    max_iterations : int
        Bound on the iterations.
    dtype : torch.dtype
        float32 or float64, the arithmetic; the certificate is evaluated in float64.

    Returns
    -------
    Solution
        ``max_load``, ``lower_bound`` and ``gap`` in float64.
    """
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        return _solve(problem, tolerance, max_iterations, dtype)


def _solve(problem: Problem, tolerance: float, max_iterations: int, dtype: torch.dtype) -> Solution:
    mask = problem.mask.expand(problem.n_instances, -1, -1)
    n_copies = mask.sum(1)
    weights, fixed, unit, invalid = valid_loads(problem, n_copies)
    ranks, columns = fixed.shape[1], weights.shape[1]
    w, f = (weights / unit).to(dtype), (fixed / unit).to(dtype)

    # Equation 4: the even split, y uniform, every product x z a part of the mean of s y.
    even = mask.to(dtype) / n_copies.clamp(min=1).to(dtype)[:, None]
    light = w <= LIGHT_PART * tolerance / max(columns, 1)
    active = mask & (~light & (n_copies > 1)).unsqueeze(1)
    w_active = torch.where(active, w.unsqueeze(1), 0.0)
    base = f + (torch.where(active, 0.0, w.unsqueeze(1)) * even).sum(2)
    load = base + (w_active * even).sum(2)
    best, best_load = even, load.amax(1)
    if problem.start is not None:
        start = as_plan(problem.start, mask, even)
        start_load = (f + (w.unsqueeze(1) * start).sum(2)).amax(1)
        better = start_load < best_load
        best = torch.where(better[:, None, None], start, best)
        best_load = torch.where(better, start_load, best_load)
    pinned = f + torch.where(mask & (n_copies == 1)[:, None], w[:, None], 0.0).sum(2)
    bound = torch.maximum(load.mean(1), pinned.amax(1))

    even_load = load.amax(1)
    t = even_load + START_MARGIN * (even_load - load.mean(1)).clamp(min=1e-6)
    s = t[:, None] - load
    y = torch.full_like(s, 1.0 / ranks)
    x = torch.where(active, even, 1.0)
    z = START_CENTERING * (s * y).mean(1)[:, None, None] / x
    n_products = active.sum((1, 2)) + ranks
    iterations = torch.zeros(len(w), dtype=torch.int32, device=w.device)
    # In float32 the bound itself carries round-off; take off more than that can be.
    allowance = 2.0**-20 if dtype == torch.float32 else 2.0**-46

    aim = gap_to_aim_at(tolerance - allowance, ranks)
    for _ in range(max_iterations):
        running = best_load - bound > aim * best_load
        if not bool(running.any()):
            break
        iterations += running.int()
        newton = _Newton(x, z, s, y, w, active)
        xz, sy = torch.where(active, x * z, 0.0), s * y
        mu = (xz.sum((1, 2)) + sy.sum(1)) / n_products
        # Equation 8: predictor, then corrector.
        dx, dz, ds, dy = newton.direction(-xz, -sy)
        primal = _step_length((x, dx), (s, ds)).clamp(max=1.0)
        dual = _step_length((z, dz), (y, dy)).clamp(max=1.0)
        xz_affine = (x + primal[:, None, None] * dx) * (z + dual[:, None, None] * dz)
        sy_affine = (s + primal[:, None] * ds) * (y + dual[:, None] * dy)
        affine = torch.where(active, xz_affine, 0.0).sum((1, 2)) + sy_affine.sum(1)
        mu_affine = affine / n_products
        target = mu * ((mu_affine / mu) ** 4).clamp(min=MIN_CENTERING, max=1.0)
        dx, dz, ds, dy = newton.direction(
            target[:, None, None] - xz - dx * dz, target[:, None] - sy - ds * dy
        )
        # Equation 9: the full step, with what is negative cut off, gives a plan and a bound.
        plan = torch.where(active, (x + dx).clamp(min=0.0), 0.0)
        plan = torch.where(active, plan / plan.sum(1, keepdim=True), even)
        load = base + (w_active * plan).sum(2)
        better = running & (load.amax(1) < best_load)
        best = torch.where(better[:, None, None], plan, best)
        best_load = torch.where(better, load.amax(1), best_load)
        new_bound = _lower_bound((y + dy).clamp(min=0.0), f, w, mask)
        bound = torch.where(running, torch.fmax(bound, new_bound), bound)
        primal = (STEP_FACTOR * _step_length((x, dx), (s, ds))).clamp(max=1.0)
        dual = (STEP_FACTOR * _step_length((z, dz), (y, dy))).clamp(max=1.0)
        # A certified instance stands still while the rest of the batch goes on.
        primal, dual = torch.where(running, primal, 0.0), torch.where(running, dual, 0.0)
        x = torch.where(running[:, None, None], x + primal[:, None, None] * dx, x)
        z = torch.where(running[:, None, None], z + dual[:, None, None] * dz, z)
        s = torch.where(running[:, None], s + primal[:, None] * ds, s)
        y = torch.where(running[:, None], y + dual[:, None] * dy, y)

    lower = bound.double() * unit[:, 0] * (1.0 - allowance)
    return certify(best, mask, weights, fixed, lower, iterations, invalid, tolerance)


def valid_loads(
    problem: Problem, n_copies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the loads of a problem in float64, 0 in instances that have no answer.

    These are instances with a load that is negative or not finite, or a weight without a copy.

    Parameters
    ----------
    problem : Problem
        The instances.
    n_copies : torch.Tensor
        ``[B, C]`` or ``[1, C]`` int, ranks that hold each column.

    Returns
    -------
    weights, fixed : torch.Tensor
        ``[B, C]`` and ``[B, G]``.
    unit : torch.Tensor
        ``[B, 1]``, mean load of a rank; 1 where there is no load.
    invalid : torch.Tensor
        ``[B]`` bool.
    """
    weights, fixed = problem.weights.double(), problem.fixed.double()
    invalid = (
        ~(torch.isfinite(weights) & (weights >= 0)).all(1)
        | ~(torch.isfinite(fixed) & (fixed >= 0)).all(1)
        | ~torch.isfinite(weights.sum(1) + fixed.sum(1))
        | ((weights > 0) & (n_copies == 0)).any(1)
    )
    weights = torch.where(invalid[:, None], 0.0, weights)
    fixed = torch.where(invalid[:, None], 0.0, fixed)
    total = weights.sum(1) + fixed.sum(1)
    unit = torch.where(total > 0, total / fixed.shape[1], 1.0)[:, None]
    return weights, fixed, unit, invalid


def certify(
    plan: torch.Tensor,
    mask: torch.Tensor,
    weights: torch.Tensor,
    fixed: torch.Tensor,
    bound: torch.Tensor,
    iterations: torch.Tensor,
    invalid: torch.Tensor,
    tolerance: float,
) -> Solution:
    """Round plans (equation 11) and judge what they have become, in float64.

    Parameters
    ----------
    plan : torch.Tensor
        ``[B, G, C]`` float, shares, about 1 in sum over G where a column has a copy.
    mask : torch.Tensor
        ``[B, G, C]`` bool, where a copy is.
    weights, fixed : torch.Tensor
        ``[B, C]`` and ``[B, G]`` float64, 0 in invalid instances.
    bound : torch.Tensor
        ``[B]`` float64, a load that no plan can beat, in the unit of the weights.
    iterations : torch.Tensor
        ``[B]`` int32.
    invalid : torch.Tensor
        ``[B]`` bool.
    tolerance : float
        Relative gap that was asked for.

    Returns
    -------
    Solution
    """
    units = quantize_shares(plan, mask)
    shares = units.double() / (1 << SHARE_BITS)
    max_load = (fixed + (weights.unsqueeze(1) * shares).sum(2)).amax(1)
    lower = torch.minimum(bound, max_load)
    gap = torch.where(max_load > 0, (max_load - lower) / max_load.clamp(min=1e-300), 0.0)
    status = torch.where(gap <= tolerance, int(Status.CERTIFIED), int(Status.GAP))
    return Solution(
        shares=shares.float(),
        max_load=max_load.masked_fill(invalid, torch.inf),
        lower_bound=lower.masked_fill(invalid, 0.0),
        gap=gap.masked_fill(invalid, torch.inf),
        iterations=iterations.masked_fill(invalid, 0),
        status=status.masked_fill(invalid, int(Status.INVALID)).int(),
        tolerance=tolerance,
    )


def as_plan(shares: torch.Tensor, mask: torch.Tensor, even: torch.Tensor) -> torch.Tensor:
    """Make a plan of any numbers ``[B, G, C]``: shares where copies are, 1 in sum."""
    shares = torch.where(mask & (shares > 0), shares.to(even.dtype), 0.0).clamp(max=1.0)
    total = shares.sum(1, keepdim=True)
    return torch.where(total > 0, shares / total.clamp(min=1e-30), even)


def gap_to_aim_at(target: float, ranks: int) -> float:
    """Relative gap at which rounding, which costs at most ``ranks`` units, keeps ``target``."""
    rounded = target - ranks / (1 << SHARE_BITS)
    return max(min(TARGET_PART * target, rounded), LEAST_TARGET_PART * target)


def _lower_bound(
    y: torch.Tensor, fixed: torch.Tensor, w: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Evaluate equation 3 at ``y / sum(y)``, ``[B]``."""
    y = y / y.sum(1, keepdim=True)
    cheapest = torch.where(mask, y.unsqueeze(2), torch.inf).amin(1)
    return (y * fixed).sum(1) + torch.where(w > 0, w * cheapest, 0.0).sum(1)


def count_experts(
    idx: torch.Tensor, n_logical: int, chunk: int, n_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count ids per expert, in total and as running sums over chunks of the batch.

    Parameters
    ----------
    idx : torch.Tensor
        int, any shape; ids in [-1, n_logical), -1 counts nowhere.
    n_logical : int
        Number of logical experts.
    chunk : int
        Ids per row of the running sums.
    n_rows : int
        Number of rows, ``n_rows * chunk >= idx.numel()``.

    Returns
    -------
    counts : torch.Tensor
        ``[n_logical]`` int32.
    running : torch.Tensor
        ``[n_rows, n_logical]`` int32; row i counts the ids before ``(i + 1) * chunk``.
    """
    flat = idx.reshape(-1).long()
    row = torch.arange(flat.numel(), device=flat.device) // chunk
    valid = flat >= 0
    cell = row[valid] * n_logical + flat[valid]
    by_row = torch.bincount(cell, minlength=n_rows * n_logical).reshape(n_rows, n_logical)
    running = by_row.cumsum(0).int()
    return running[-1].clone(), running


def cumulative_shares(
    shares: torch.Tensor,
    copy_cell: torch.Tensor,
    copy_index: torch.Tensor,
    copy_multiplicity: torch.Tensor,
    copy_start: torch.Tensor,
) -> torch.Tensor:
    """Turn shares by rank and column into cumulative shares by copy (equation 12).

    Parameters
    ----------
    shares : torch.Tensor
        ``[n_group, G, C]`` float32, multiples of 2**-24.
    copy_cell, copy_index, copy_multiplicity, copy_start : torch.Tensor
        Of `lplb_triton.Placement.structure`.

    Returns
    -------
    torch.Tensor
        ``[n_physical]`` int32 in units of 2**-24: part of the expert's tokens that go to this
        copy or an earlier one; 2**24 at each expert's last copy.
    """
    one = 1 << SHARE_BITS
    units = torch.round(shares.double().reshape(-1) * one).long()
    if units.numel() == 0:
        units = torch.zeros(1, dtype=torch.long, device=shares.device)
    here = torch.where(copy_cell < 0, one, units[copy_cell.clamp(min=0).long()])
    index, multiplicity = copy_index.long(), copy_multiplicity.long()
    # Copies on one rank share that rank's part as evenly as integers allow.
    part = (index + 1) * here // multiplicity - index * here // multiplicity
    return _cumsum_by_expert(part, copy_start).int()


def _cumsum_by_expert(values: torch.Tensor, copy_start: torch.Tensor) -> torch.Tensor:
    """Sum up the copies of each expert one by one, ``[n_physical]``."""
    running = values.cumsum(0)
    first = copy_start[:-1].long()
    before = torch.where(first > 0, running[(first - 1).clamp(min=0)], 0)
    return running - _by_copy(before, copy_start, values.numel())


def _by_copy(values: torch.Tensor, copy_start: torch.Tensor, n_copies: int) -> torch.Tensor:
    """Repeat each expert's value for its copies, ``[n_copies]``."""
    return values.repeat_interleave(copy_start.diff().long(), output_size=n_copies)


def rounding_offsets(rank: int, n_logical: int) -> torch.Tensor:
    """Offsets that make the rounding of many ranks cancel (equation 13).

    Parameters
    ----------
    rank : int
        This rank's number in the EP group.
    n_logical : int
        Number of logical experts.

    Returns
    -------
    torch.Tensor
        ``[n_logical]`` int64 in [0, 2**24), on the CPU.
    """
    expert = torch.arange(n_logical, dtype=torch.int64, device="cpu")
    return (rank * 10368889 + expert * 12664745 + (1 << 23)) % (1 << SHARE_BITS)


def copy_quotas(
    counts: torch.Tensor, cumulative: torch.Tensor, copy_start: torch.Tensor, rank: int
) -> torch.Tensor:
    """Tokens that each copy gets from this rank (equation 12).

    Parameters
    ----------
    counts : torch.Tensor
        ``[n_logical]`` int, this rank's tokens per expert.
    cumulative : torch.Tensor
        ``[n_physical]`` int32, see `cumulative_shares`.
    copy_start : torch.Tensor
        ``[n_logical + 1]`` int32.
    rank : int
        This rank's number in the EP group.

    Returns
    -------
    torch.Tensor
        ``[n_physical]`` int64, by copy (expert-major); each expert's quotas sum to its count.
    """
    n_copies = cumulative.numel()
    per_copy = _by_copy(counts.long(), copy_start, n_copies)
    theta = rounding_offsets(rank, counts.numel()).to(counts.device)
    theta = _by_copy(theta, copy_start, n_copies)
    ends = (per_copy * cumulative.long() + theta) >> SHARE_BITS
    starts = ends.roll(1)
    starts[copy_start[:-1].long()] = 0
    return ends - starts


def assign_copies(
    idx: torch.Tensor,
    counts: torch.Tensor,
    cumulative: torch.Tensor,
    copy_start: torch.Tensor,
    copy_slot: torch.Tensor,
    rank: int,
) -> torch.Tensor:
    """Rewrite logical into physical ids, quotas met exactly, copies spread over the batch.

    Parameters
    ----------
    idx : torch.Tensor
        int, any shape; ids in [-1, n_logical), -1 stays -1.
    counts, cumulative, copy_start, rank
        As for `copy_quotas`; ``counts`` must be the counts of ``idx``.
    copy_slot : torch.Tensor
        ``[n_physical]`` int32, slot of each copy.

    Returns
    -------
    torch.Tensor
        Physical ids, shape and dtype of ``idx``.
    """
    flat = idx.reshape(-1).long()
    out = torch.full_like(flat, -1)
    where = torch.nonzero(flat >= 0).flatten()
    expert = flat[where]
    # Position of each token among the tokens of its expert, in batch order.
    by_expert = torch.argsort(expert, stable=True)
    counts = counts.long()
    first = counts.cumsum(0) - counts
    position = torch.empty_like(expert)
    position[by_expert] = (
        torch.arange(expert.numel(), device=flat.device) - first[expert[by_expert]]
    )
    ends = copy_quotas(counts, cumulative, copy_start, rank).cumsum(0)
    ends = torch.nn.functional.pad(ends, (1, 0))

    # Equation 14: halve the range of copies, each time dealing the node's tokens out evenly.
    low = copy_start.long()[expert]
    high = copy_start.long()[expert + 1] - 1
    while bool((low < high).any()):
        inner = low < high
        middle = (low + high) // 2
        size = ends[high + 1] - ends[low]
        quota = ends[middle + 1] - ends[low]
        scaled = position * quota + size // 2
        taken = scaled // size.clamp(min=1)
        left = inner & (scaled - taken * size + quota >= size)
        right = inner & ~left
        position = torch.where(left, taken, torch.where(right, position - taken, position))
        high = torch.where(left, middle, high)
        low = torch.where(right, middle + 1, low)
    out[where] = copy_slot.long()[low]
    return out.reshape(idx.shape).to(idx.dtype)


def check_counts_of(name: str, idx: torch.Tensor, counts: torch.Tensor) -> None:
    """Raise a ValueError that names ``counts`` unless they are those of ``idx``; waits for them."""
    found = torch.bincount(idx[idx >= 0].long(), minlength=counts.numel())
    if not torch.equal(found, counts.long()):
        raise ValueError(f"{name} must end with the counts of idx")


def check_cumulative(
    counts: torch.Tensor, cumulative: torch.Tensor, copy_start: torch.Tensor, rank: int
) -> None:
    """Raise a ValueError unless these shares give out all tokens; waits for the device.

    Arguments as for `copy_quotas`. Shares of a rank's exact quotas (equation 17) may end below
    2**24.
    """
    first = copy_start[:-1].long()
    parts = cumulative.diff(prepend=cumulative.new_zeros(1))
    parts[first] = cumulative[first]
    bad = (parts < 0).any() | (cumulative > 1 << SHARE_BITS).any()
    quotas = copy_quotas(counts, cumulative, copy_start, rank)
    given = _cumsum_by_expert(quotas, copy_start)[copy_start[1:].long() - 1]
    if bool(bad | (given != counts).any()):
        raise ValueError(
            "cumulative must rise from 0 or more to 2**24 over the copies of each expert"
        )


def divide_quotas(
    gathered: torch.Tensor,
    cumulative: torch.Tensor,
    copy_start: torch.Tensor,
    holder: torch.Tensor,
    ranks_per_node: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide exact global quotas among the ranks, near ones first (equations 15 and 16).

    Parameters
    ----------
    gathered : torch.Tensor
        ``[n_ranks, n_logical]`` int, every rank's tokens per expert.
    cumulative : torch.Tensor
        ``[n_physical]`` int32, see `cumulative_shares`.
    copy_start : torch.Tensor
        ``[n_logical + 1]`` int32.
    holder : torch.Tensor
        ``[n_physical]`` int, rank of each copy.
    ranks_per_node : int
        Consecutive ranks that share a node.

    Returns
    -------
    quotas : torch.Tensor
        ``[n_ranks, n_physical]`` int64, tokens that each copy gets from each rank.
    kept : torch.Tensor
        ``[n_ranks, 3]`` int64: of each rank's tokens those that stay on the rank, those that stay
        on its node, and all of them.
    """
    n_ranks, n_logical = gathered.shape
    every = torch.arange(n_logical, device=gathered.device)
    expert = _by_copy(every, copy_start, cumulative.numel())
    supply = gathered.long()[:, expert]
    demand = copy_quotas(gathered.sum(0), cumulative, copy_start, 0)

    quotas = torch.zeros_like(supply)
    rank = torch.arange(n_ranks, device=gathered.device).unsqueeze(1)
    nearness = (
        rank == holder.unsqueeze(0),
        rank // ranks_per_node == holder.unsqueeze(0) // ranks_per_node,
        torch.ones_like(quotas, dtype=torch.bool),
    )
    for size in (1, ranks_per_node, n_ranks):
        for first in range(0, n_ranks, size):
            block = slice(first, min(first + size, n_ranks))
            here = (holder >= first) & (holder < first + size)
            met = _meet(supply[block], torch.where(here, demand, 0), copy_start)
            quotas[block] += met
            demand = demand - met.sum(0)
            # A rank has the same supply in front of each copy of an expert.
            used = torch.zeros(met.shape[0], n_logical, dtype=torch.long, device=met.device)
            supply[block] -= used.index_add_(1, expert, met)[:, expert]
    kept = torch.stack([torch.where(near, quotas, 0).sum(1) for near in nearness], 1)
    return quotas, kept


def _meet(supply: torch.Tensor, demand: torch.Tensor, copy_start: torch.Tensor) -> torch.Tensor:
    """Match supply by rank with demand by copy, both in order, expert by expert.

    ``supply`` [ranks, n_copies] (the same at all copies of an expert), ``demand`` [n_copies].
    """
    supply_end = supply.cumsum(0)
    demand_end = _cumsum_by_expert(demand, copy_start)
    end = torch.minimum(supply_end, demand_end)
    begin = torch.maximum(supply_end - supply, demand_end - demand)
    return (end - begin).clamp(min=0)


def shares_of_quotas(
    quotas: torch.Tensor, counts: torch.Tensor, copy_start: torch.Tensor, rank: int
) -> torch.Tensor:
    """Cumulative shares that `copy_quotas` turns into exactly these quotas (equation 17).

    Parameters
    ----------
    quotas : torch.Tensor
        ``[n_physical]`` int, this rank's tokens for each copy.
    counts : torch.Tensor
        ``[n_logical]`` int, this rank's tokens per expert, each below 2**24.
    copy_start : torch.Tensor
        ``[n_logical + 1]`` int32.
    rank : int
        This rank's number in the EP group.

    Returns
    -------
    torch.Tensor
        ``[n_physical]`` int32 in units of 2**-24, by copy.
    """
    ends = _cumsum_by_expert(quotas, copy_start)
    size = _by_copy(counts.long().clamp(min=1), copy_start, quotas.numel())
    theta = rounding_offsets(rank, counts.numel()).to(quotas.device)
    theta = _by_copy(theta, copy_start, quotas.numel())
    shares = ((ends << SHARE_BITS) - theta + size - 1).div(size, rounding_mode="floor")
    return torch.where(ends > 0, shares, 0).int()
