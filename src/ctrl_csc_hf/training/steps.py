"""A training step for which nothing waits: its optimisers, its figures, and all that it launches as one CUDA graph."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

REFINED_STEPS = 10  # of a phase: the first ones move the dictionaries most, and one step of power iteration loses them
EAGER_CALLS = 3  # before the capture, in which libraries choose their kernels and optimisers make their state


def make_adam(
    parameters: Iterable[nn.Parameter], learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)
) -> Adam:
    """Adam in one kernel; on a GPU its learning rate lies there, where a captured step finds the present one."""
    parameters = list(parameters)
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    rate: Any = torch.tensor(learning_rate, device=device) if on_gpu else learning_rate
    return Adam(parameters, rate, betas, fused=device.type in ("cpu", "cuda"), capturable=on_gpu)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class StepFigures:
    """Figures of the steps, left on the device until they have been copied.

    `read` gives those of the steps before the last `read` but one: their copy is under way since the last one, so
    nothing waits for it.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._under_way: list[tuple[list[tuple[int, tuple[str, ...]]], Tensor, Any]] = []

    def keep(self, step: int, figures: dict[str, Tensor]) -> None:
        """Of one step: scalars by name."""
        self._kept.append((step, tuple(figures), torch.stack([value.detach() for value in figures.values()])))

    def read(self, *, everything: bool = False) -> list[tuple[int, dict[str, float]]]:
        """Steps and their figures, in order.

        Args:
            everything: also those of the last steps, for which it waits.

        Raises:
            FloatingPointError: for the first loss that is not finite, with step and name.
        """
        if self._kept:
            values = torch.stack([values for _, _, values in self._kept])
            copy = values.to("cpu", non_blocking=True)
            arrival = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
            self._under_way.append(([(step, names) for step, names, _ in self._kept], copy, arrival))
            self._kept = []
        arrived, self._under_way = (self._under_way, []) if everything else (self._under_way[:-1], self._under_way[-1:])
        found = []
        for steps, copy, arrival in arrived:
            if arrival is not None:
                arrival.synchronize()
            for (step, names), row in zip(steps, copy.tolist(), strict=True):
                found.append((step, dict(zip(names, row, strict=True))))
        for step, figures in found:
            for name, value in figures.items():
                if name.endswith("loss") and not math.isfinite(value):
                    raise FloatingPointError(f"step {step}: the {name.replace('_', ' ')} is {value}")
        return found


class Replay:
    """A step as one CUDA graph: captured at its fourth call, then launched as a whole.

    Args:
        step: of tensors of fixed shapes, which reads no value of the GPU and keeps what it changes in place: weights,
            statistics, states of optimisers. What it returns is overwritten by the next call.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step, self.calls, self.stream = step, 0, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.graph is None and self.calls < EAGER_CALLS:
            self.calls += 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.step(*self.inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.outputs
