"""What the latents tell of the class as a module: `evaluate.load(..., num_classes=K)` takes this folder."""

from typing import Any

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import LABEL, VECTOR, StreamingMetric


class LatentProbe(StreamingMetric):
    statistic = metrics.LatentProbe
    inputs = {"predictions": VECTOR, "references": LABEL}
    inputs_description = """predictions: test latents (n, d), references: their labels (n,) in [0, num_classes).
First `fit_update(latents, labels)` adds training latents, batch by batch."""
    citation = """@inproceedings{wu2018unsupervised,
  title = {Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
  author = {Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
  booktitle = {CVPR},
  year = {2018}
}
@article{alain2016understanding,
  title = {Understanding Intermediate Layers Using Linear Classifier Probes},
  author = {Alain, Guillaume and Bengio, Yoshua},
  journal = {arXiv:1610.01644},
  year = {2016}
}"""

    def fit_update(self, latents: Any, labels: Any) -> None:
        """Adds training latents (n, d) and their labels (n,)."""
        self.values.fit_update(self._convert(latents), self._convert(labels))
