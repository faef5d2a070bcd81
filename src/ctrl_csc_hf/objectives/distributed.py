"""One batch that lies on several processes: what they exchange so that each sees the objective of all of it.

Every process computes the utility J of the whole batch, and its own images' part of the means over images. The sum of
their gradients is then the gradient of one process with the whole batch. What J needs of features of other processes
passes here without a sum in the backward pass: each process's J already is the whole.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def num_processes() -> int:
    """1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in place."""
    if num_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def count_over_processes(count: int, device: torch.device) -> Tensor | int:
    """The sum of the processes' counts: of one process its own, of more a tensor, for which nothing waits."""
    return count if num_processes() == 1 else sum_over_processes(torch.full((), count, device=device))


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Replaces the gradients by their sums over the processes, in one exchange a dtype."""
    if num_processes() == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        flat = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


class _SumForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def sum_for_all(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, for a loss that all of them compute whole."""
    return _SumForAll.apply(tensor)


class _GatherForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(num_processes())]
        dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
        sizes = [int(count) for count in counts]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        first = sum(sizes[: dist.get_rank()])
        ctx.own = slice(first, first + len(rows))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.own]


def gather_for_all(rows: Tensor) -> Tensor:
    """The processes' rows (n_r, ...), by rank, for a loss that all of them compute whole; their numbers may differ."""
    return _GatherForAll.apply(rows)
