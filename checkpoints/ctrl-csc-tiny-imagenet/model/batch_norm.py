"""Batch norm as the loop needs it: over one process's batch or all processes' together.

torch's own updates its running statistics whenever it trains, and synchronises on GPUs alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """Batch norm (n, channels, h, w) that leaves its running statistics alone where asked to.

    sum_over_processes: where set, a batch is a part of one that lies on several processes: the function adds tensors
        up over them, in place, and every process has at least one image. Values and gradients are the whole batch's.
    """

    running_mean: Tensor
    running_var: Tensor
    batch_statistics: tuple[Tensor, Tensor] | None = None  # mean and 1 / deviation of the last batch, in training
    sum_over_processes: Callable[[Tensor], Tensor] | None = None
    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.momentum = 0.1
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(
        self, codes: Tensor, update_statistics: bool, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Normalises by the running statistics; in training by `statistics` of another batch, or by the batch's."""
        if not torch.compiler.is_compiling() and len(codes) == 1:
            codes = codes.contiguous()  # of one image in channels-last order torch 2.13 gets the gradient wrong
        if self.training and statistics is None:
            if self.sum_over_processes is not None:
                return self._normalize_over_processes(codes, update_statistics, self.sum_over_processes)
            return self._normalize_by_batch(codes, update_statistics)
        mean, variance = self.running_mean, self.running_var
        if self.training and statistics is not None:
            mean, variance = statistics[0], statistics[1].pow(-2) - self.eps
        return F.batch_norm(codes, mean, variance, self.weight, self.bias, eps=self.eps)

    def _normalize_by_batch(self, codes: Tensor, update_statistics: bool) -> Tensor:
        momentum = self.momentum if update_statistics else 0.0
        # As F.batch_norm, which does not give the batch's statistics.
        normalized, mean, inverse_deviation = torch.native_batch_norm(
            codes, self.weight, self.bias, self.running_mean, self.running_var, True, momentum, self.eps
        )
        self.batch_statistics = (mean.detach(), inverse_deviation.detach())
        return normalized

    def _normalize_over_processes(
        self, codes: Tensor, update_statistics: bool, sum_over_processes: Callable[[Tensor], Tensor]
    ) -> Tensor:
        variance, mean = torch.var_mean(codes.detach().to(self.running_var.dtype), dim=(0, 2, 3), correction=0)
        mean, variance = mean.double(), variance.double()  # in which nothing is lost by subtracting the means' squares
        count = torch.full_like(mean, codes.numel() // codes.shape[1])
        sums = sum_over_processes(torch.stack([count, count * mean, count * (variance + mean.square())]))
        count, mean = sums[0], sums[1] / sums[0]
        variance = sums[2] / count - mean.square()
        dtype = self.running_var.dtype
        if update_statistics:
            self.running_mean.lerp_(mean.to(dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(dtype), self.momentum)
        inverse_deviation = (variance + self.eps).rsqrt().to(dtype)
        self.batch_statistics = (mean.to(dtype), inverse_deviation)
        return _NormalizeOverProcesses.apply(
            codes, self.batch_statistics[0], inverse_deviation, count[0].to(dtype), sum_over_processes
        ) * self.weight[:, None, None].to(codes.dtype) + self.bias[:, None, None].to(codes.dtype)


class _NormalizeOverProcesses(torch.autograd.Function):
    """(x - mean) / deviation, whose gradient also goes through mean and deviation, on all processes."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, mean: Tensor, inverse_deviation: Tensor, count: Tensor, sum_over_processes: Any
    ) -> Tensor:
        normalized = (codes - mean[:, None, None].to(codes.dtype)) * inverse_deviation[:, None, None].to(codes.dtype)
        ctx.save_for_backward(normalized, inverse_deviation, count)
        ctx.sum_over_processes = sum_over_processes
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normalized, inverse_deviation, count = ctx.saved_tensors
        (gradient,) = gradients
        sums = torch.stack([gradient.sum(dim=(0, 2, 3)), (gradient * normalized).sum(dim=(0, 2, 3))])
        means = (ctx.sum_over_processes(sums.to(count.dtype)) / count).to(gradient.dtype)
        centred = gradient - means[0, :, None, None] - normalized * means[1, :, None, None]
        return centred * inverse_deviation[:, None, None].to(gradient.dtype), None, None, None, None
