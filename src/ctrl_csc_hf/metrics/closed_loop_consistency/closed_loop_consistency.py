"""The consistency of latents round the loop as a module: `evaluate.load` takes this folder."""

from ctrl_csc_hf import metrics
from ctrl_csc_hf.metrics.streaming_metric import VECTOR, StreamingMetric


class ClosedLoopConsistency(StreamingMetric):
    statistic = metrics.ClosedLoopConsistency
    inputs = {"references": VECTOR, "predictions": VECTOR}
    inputs_description = "references: latents z, predictions: those of the reconstructions, zh = f(g(z)), (n, d)."
    citation = """@article{dai2022ctrl,
  title = {{CTRL}: Closed-Loop Transcription to an {LDR} via Minimaxing Rate Reduction},
  author = {Dai, Xili and Tong, Shengbang and Li, Mingyang and Wu, Ziyang and Psenka, Michael and
    Chan, Kwan Ho Ryan and Zhai, Pengyuan and Yu, Yaodong and Yuan, Xiaojun and Shum, Heung-Yeung and Ma, Yi},
  journal = {Entropy},
  volume = {24},
  number = {4},
  pages = {456},
  year = {2022}
}"""
