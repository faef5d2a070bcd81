"""The sparsity of the codes of each stage as a module: `evaluate.load` takes this folder."""

from typing import Any

from torch import Tensor

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import IMAGE, StreamingMetric


class CodeSparsity(StreamingMetric):
    statistic = metrics.CodeSparsity
    inputs = {"predictions": IMAGE}
    inputs_description = "predictions: a tuple of every stage's codes, (n, C, h, w) each."
    citation = """@inproceedings{dai2022revisiting,
  title = {Revisiting Sparse Convolutional Model for Visual Recognition},
  author = {Dai, Xili and Li, Mingyang and Zhai, Pengyuan and Tong, Shengbang and Gao, Xingjian and
    Huang, Shao-Lun and Zhu, Zhihui and You, Chong and Ma, Yi},
  booktitle = {NeurIPS},
  year = {2022}
}"""

    def _convert(self, value: Any) -> tuple[Tensor, ...]:
        return tuple(super(CodeSparsity, self)._convert(codes) for codes in value)
