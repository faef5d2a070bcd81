"""The Fréchet distance of features as a module: `evaluate.load` takes this folder."""

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import VECTOR, FeatureMetric


class Frechet(FeatureMetric):
    statistic = metrics.FrechetDistance
    inputs = {"references": VECTOR, "predictions": VECTOR}
    inputs_description = """references: features of images, predictions: those of their reconstructions, (n, dim); with
`evaluate.load(..., extractor=VisionFeatures(...))` the pixels of both, (n, 3, H, W) in [-1, 1]."""
    citation = """@inproceedings{heusel2017gans,
  title = {{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
  author = {Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle = {NeurIPS},
  year = {2017}
}"""
