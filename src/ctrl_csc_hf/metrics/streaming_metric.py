"""The base class of the `evaluate` modules in the folders beside, which alone import it: `evaluate` is an extra.

A module gives `evaluate`'s interface to a class of `ctrl_csc_hf.metrics`. It adds every batch to the class at once,
where `evaluate` would write all data to Arrow files and read them back.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value
from torch import Tensor

from .statistic import Statistic

NUMBER = Value("float32")
LABEL = Value("int64")
VECTOR = Sequence(NUMBER)
IMAGE = Sequence(Sequence(VECTOR))


class StreamingMetric(evaluate.Metric, ABC):
    """A module that adds batches up. Tensors, arrays and nested lists go in, one entry an image.

    It is abstract, so that `evaluate.load` does not take it for the module of a script that imports it.

    Args:
        config_name, num_process, process_id, cache_dir, keep_in_memory, experiment_id, hash: what `evaluate.load`
            gives. Nothing is stored, so there is one process: gather batches before they are added.
        options: of the class of `ctrl_csc_hf.metrics`.

    Raises:
        ValueError: for num_process other than 1.
    """

    inputs: dict[str, Any]  # the arguments of the class's `update`, in its order, under evaluate's names
    inputs_description: str
    citation: str

    def __init__(
        self,
        config_name: str | None = None,
        num_process: int = 1,
        process_id: int = 0,
        cache_dir: str | None = None,
        keep_in_memory: bool = False,
        experiment_id: str | None = None,
        hash: str | None = None,
        **options: Any,
    ) -> None:
        if num_process != 1:
            raise ValueError(f"num_process must be 1, with batches gathered from the processes, got {num_process}")
        super().__init__(config_name=config_name, cache_dir=cache_dir, experiment_id=experiment_id, hash=hash)
        self.options = options
        self.values: Any = self.statistic(**options)

    @property
    @abstractmethod
    def statistic(self) -> type[Statistic]:
        """The class of `ctrl_csc_hf.metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(self.statistic),
            citation=self.citation,
            inputs_description="\n" + self.inputs_description,  # `evaluate` appends it to docstrings
            features=Features(self.inputs),
        )

    def _convert(self, value: Any) -> Any:
        """What was given as an input -> what `update` takes."""
        return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))

    def add_batch(self, *, predictions: Any = None, references: Any = None, **others: Any) -> None:
        """Adds a batch; ValueError for other inputs than the module's, or data that do not fit."""
        given = {"predictions": predictions, "references": references, **others}
        given = {name: value for name, value in given.items() if value is not None}
        if given.keys() != self.inputs.keys():
            raise ValueError(f"{self.name} needs the inputs {sorted(self.inputs)}, got {sorted(given)}")
        self.values.update(*(self._convert(given[name]) for name in self.inputs))

    def add(self, *, prediction: Any = None, reference: Any = None, **others: Any) -> None:
        """Adds one image's data, as `add_batch`."""
        given = {"predictions": prediction, "references": reference, **others}
        self.add_batch(**{name: _batch_of_one(value) for name, value in given.items() if value is not None})

    def compute(self, *, predictions: Any = None, references: Any = None, **others: Any) -> dict[str, Any]:
        """Adds a batch if one is given, gives the figures of all that was added, and starts anew."""
        if predictions is not None or references is not None or others:
            self.add_batch(predictions=predictions, references=references, **others)
        figures = self.values.compute()
        self.values = self.statistic(**self.options)
        return figures

    def __len__(self) -> int:
        """Images added since the last `compute`."""
        return self.values.count


class FeatureMetric(StreamingMetric):
    """A module on a network's features: given `extractor`, it takes pixels (n, 3, H, W) in [-1, 1] instead of features.

    Args:
        extractor: `ctrl_csc_hf.metrics.VisionFeatures` or `InceptionFeatures`.
        options: as `StreamingMetric`.
    """

    def __init__(self, *arguments: Any, extractor: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.extractor = extractor

    def _convert(self, value: Any) -> Tensor:
        value = super()._convert(value)
        return value if self.extractor is None else self.extractor(value)


def _batch_of_one(value: Any) -> Any:
    """One image's data -> a batch of it; a tuple is of a stage each."""
    if isinstance(value, tuple):
        return tuple(map(_batch_of_one, value))
    return value[None] if isinstance(value, Tensor) else np.asarray(value)[None]
