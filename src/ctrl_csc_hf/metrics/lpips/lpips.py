"""The learned perceptual similarity as a module: `evaluate.load` takes this folder."""

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import IMAGE, StreamingMetric


class Lpips(StreamingMetric):
    statistic = metrics.LearnedPerceptualSimilarity
    inputs = {"references": IMAGE, "predictions": IMAGE}
    inputs_description = "references: images, predictions: their reconstructions, (n, 3, H, W) pixels in [-1, 1]."
    citation = """@inproceedings{zhang2018unreasonable,
  title = {The Unreasonable Effectiveness of Deep Features as a Perceptual Metric},
  author = {Zhang, Richard and Isola, Phillip and Efros, Alexei A. and Shechtman, Eli and Wang, Oliver},
  booktitle = {CVPR},
  year = {2018}
}"""
