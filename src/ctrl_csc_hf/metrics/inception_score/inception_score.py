"""The Inception score as a module: `evaluate.load` takes this folder."""

from typing import Any

from torch import Tensor

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import VECTOR, FeatureMetric


class InceptionScore(FeatureMetric):
    statistic = metrics.InceptionScore
    inputs = {"predictions": VECTOR}
    inputs_description = """predictions: a classifier's logits of images, (n, num_classes); with
`evaluate.load(..., extractor=VisionFeatures(...))` the images' pixels, (n, 3, H, W) in [-1, 1]."""
    citation = """@inproceedings{salimans2016improved,
  title = {Improved Techniques for Training {GANs}},
  author = {Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and Chen, Xi},
  booktitle = {NeurIPS},
  year = {2016}
}"""

    def _convert(self, value: Any) -> Tensor:
        value = super()._convert(value)
        return value if self.extractor is None else self.extractor.logits(value)
