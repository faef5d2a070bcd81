"""The kernel distance of features as a module: `evaluate.load` takes this folder."""

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import VECTOR, FeatureMetric


class Kernel(FeatureMetric):
    statistic = metrics.KernelDistance
    inputs = {"references": VECTOR, "predictions": VECTOR}
    inputs_description = """references: features of images, predictions: those of their reconstructions, (n, dim); with
`evaluate.load(..., extractor=VisionFeatures(...))` the pixels of both, (n, 3, H, W) in [-1, 1]."""
    citation = """@inproceedings{binkowski2018demystifying,
  title = {Demystifying {MMD} {GANs}},
  author = {Bi{\\'n}kowski, Miko{\\l}aj and Sutherland, Danica J. and Arbel, Michael and Gretton, Arthur},
  booktitle = {ICLR},
  year = {2018}
}"""
