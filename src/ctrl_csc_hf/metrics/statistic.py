"""What every figure of merit shares: a batch is added to sums, the figures are computed from the sums."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class Statistic(ABC):
    """What is known of a data set after some of its batches.

    A subclass's `update` adds a batch, of any device and floating type, to what lies in main memory; the figures do
    not depend on how the data are cut into batches.
    """

    def __init__(self) -> None:
        self.count = 0  # images added

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """The figures of what was added so far; ValueError where that is too little."""

    def _require(self, least: int = 1) -> None:
        if self.count < least:
            raise ValueError(f"{type(self).__name__} needs {least} or more images added by update, got {self.count}")


def check_matrix(name: str, value: Tensor, columns: int | None = None) -> None:
    if value.ndim != 2 or value.shape[1] != (columns or value.shape[1]):
        raise ValueError(f"{name} must have shape (n, {columns or 'dim'}), got {tuple(value.shape)}")


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")


def check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({count},), got {labels.dtype} of {tuple(labels.shape)}")
    if count and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")
