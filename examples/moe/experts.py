"""Products of experts with ragged groups of rows, and the reordering of rows before and after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def count_assignments(ids: Tensor, sources: int, experts: int) -> Tensor:
    """Count routed assignments per source rank and expert, without waiting for the device.

    Parameters
    ----------
    ids
        int64 [tokens, top_k], each source rank's tokens contiguous and equally many.
    sources, experts
        Sizes of the result.

    Returns
    -------
    Tensor
        int32 [sources, experts].
    """
    source = torch.arange(sources, device=ids.device).view(sources, 1)
    cell = (source * experts + ids.view(sources, -1)).flatten()
    counts = torch.zeros(sources * experts, dtype=torch.int32, device=ids.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell, dtype=torch.int32)).view(sources, -1)


class Dispatch(torch.autograd.Function):
    """Copy each token once per chosen expert, ordered by expert.

    The gradient of an index in autograd is a scatter with atomics. As ``order`` is a permutation,
    a gather by its inverse gives the same gradient, faster and in a fixed order of summation.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        per_choice = grad[inverse].view(-1, ctx.top_k, grad.shape[-1])
        dtype = torch.promote_types(grad.dtype, torch.float32)
        return per_choice.sum(1, dtype=dtype).to(grad.dtype), None, None, None


class Collect(torch.autograd.Function):
    """Bring the experts' outputs back into the order of the tokens' choices."""

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y[inverse]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def find_grouped_mm() -> Callable[..., Tensor] | None:
    """Return torch's matrix product over ragged groups of rows, under its old or its new name."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def expert_outputs(x: Tensor, w_in: Tensor, w_out: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """Apply to each row the SwiGLU block of its expert.

    Parameters
    ----------
    x
        Rows ordered by expert, [rows, hidden].
    w_in
        [experts, hidden, 2 * expert_hidden], gate and value side by side.
    w_out
        [experts, expert_hidden, hidden].
    ends
        int32 [experts], where each expert's rows end.
    grouped
        Use torch's grouped matrix product in bfloat16, which needs no sizes on the host;
        otherwise loop over the experts that have rows, in the dtype of ``x``.

    Returns
    -------
    Tensor
        [rows, hidden], in the dtype of ``x``.
    """
    if grouped:
        matmul = find_grouped_mm()
        if matmul is None:
            raise RuntimeError("expert_matmul 'grouped' needs a torch with grouped_mm; use 'loop'")
        low = torch.bfloat16
        gate, value = matmul(x.to(low), w_in.to(low), offs=ends).chunk(2, dim=-1)
        return matmul(functional.silu(gate) * value, w_out.to(low), offs=ends).to(x.dtype)
    outputs = []
    begin = 0
    # unbind, since the gradient of an index is as large as the weights of all experts.
    weights = zip(w_in.to(x.dtype).unbind(), w_out.to(x.dtype).unbind(), strict=True)
    for end, (weight_in, weight_out) in zip(ends.tolist(), weights, strict=True):
        if end > begin:
            gate, value = (x[begin:end] @ weight_in).chunk(2, dim=-1)
            outputs.append((functional.silu(gate) * value) @ weight_out)
        begin = end
    # Even without rows the result must depend on the inputs, because a rank without tokens takes
    # part in the backward pass too.
    return torch.cat(outputs) if outputs else x @ w_in[0].to(x.dtype) @ w_in[0].to(x.dtype).t()


def check_grouped(device: torch.device) -> None:
    """Compare the grouped matrix product with the loop on ragged groups, gradients too.

    The grouped product is a recent addition to torch and its alignment rules changed between
    releases, so every run checks it first.

    Parameters
    ----------
    device
        Where to compare.

    Raises
    ------
    RuntimeError
        If they differ by more than bfloat16's rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0, 7, 1, 0, 45, 3, 8, 0])
    ends = sizes.cumsum(0).to(device=device, dtype=torch.int32)
    shapes = ((int(sizes.sum()), 32), (8, 32, 48), (8, 24, 32))
    values = [torch.randn(shape, generator=generator) / 4 for shape in shapes]
    factor = torch.randn(shapes[0], generator=generator).to(device)
    found = []
    for grouped in (True, False):
        leaves = [
            value.to(device=device, dtype=torch.bfloat16).float().requires_grad_()
            for value in values
        ]
        output = expert_outputs(leaves[0], leaves[1], leaves[2], ends, grouped)
        (output * factor).sum().backward()
        found.append([output.detach()] + [leaf.grad for leaf in leaves])
    for name, got, expected in zip(("output", "x", "w_in", "w_out"), *found, strict=True):
        error = float((got - expected).norm() / expected.norm())
        # Three roundings of 2**-9 each are expected; with a wrong group the error is about 1.
        if not error < 0.02:
            raise RuntimeError(
                f"torch's grouped matrix product is wrong here ({name}: relative error "
                f"{error:.3g}); run with --expert-matmul loop"
            )
