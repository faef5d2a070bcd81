"""The peak signal-to-noise ratio as a module: `evaluate.load` takes this folder."""

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import IMAGE, StreamingMetric


class Psnr(StreamingMetric):
    statistic = metrics.PeakSignalToNoiseRatio
    inputs = {"references": IMAGE, "predictions": IMAGE}
    inputs_description = "references: images, predictions: their reconstructions, (n, C, H, W) pixels in [-1, 1]."
    citation = """@article{wang2009mean,
  title = {Mean Squared Error: Love It or Leave It? A New Look at Signal Fidelity Measures},
  author = {Wang, Zhou and Bovik, Alan C.},
  journal = {IEEE Signal Processing Magazine},
  volume = {26},
  number = {1},
  pages = {98--117},
  year = {2009}
}"""
