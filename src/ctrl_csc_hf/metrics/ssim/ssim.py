"""The structural similarity as a module: `evaluate.load` takes this folder."""

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import IMAGE, StreamingMetric


class Ssim(StreamingMetric):
    statistic = metrics.StructuralSimilarity
    inputs = {"references": IMAGE, "predictions": IMAGE}
    inputs_description = "references: images, predictions: their reconstructions, (n, C, H, W) pixels in [-1, 1]."
    citation = """@article{wang2004image,
  title = {Image Quality Assessment: From Error Visibility to Structural Similarity},
  author = {Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  journal = {IEEE Transactions on Image Processing},
  volume = {13},
  number = {4},
  pages = {600--612},
  year = {2004}
}"""
